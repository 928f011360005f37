"""What the journeys share: an empty command line, a small dataset, a trained run folder to copy."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from journey import Shell, settings

from bitfront.kernels import native

#: Beside the checkout, or where the tests' data is said to be.
SHARED = Path(os.environ.get("BITFRONT_DATA", Path(__file__).parents[3] / "shared" / "data")).parent


def _blobs(path: Path, val: int) -> Path:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 16)) * 0.8
    arrays = {}
    for split, number in (("train", 2000), ("val", val), ("test", 1000)):
        y = rng.permutation(np.arange(number) % 5)
        arrays[f"X_{split}"] = (centres[y] + rng.normal(size=(number, 16))).astype(np.float32)
        arrays[f"y_{split}"] = y
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Five clouds of points with 16 features, as .npz: 2,000 / 1,000 / 1,000 rows."""
    return _blobs(tmp_path_factory.mktemp("data") / "clouds.npz", 1000)


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory, data, warm, kernels):
    """(folder, train's output): ``small.toml`` there, and ``runs/small`` after ``bitfront train``. To be copied."""
    folder = tmp_path_factory.mktemp("trained")
    shell = Shell(folder, warm, kernels)
    shell.write("small.toml", settings(data))
    return folder, shell("train", "--config", "small.toml")


@pytest.fixture(scope="session")
def searched_once(tmp_path_factory, trained_once, warm):
    """(folder, search's output): the same after ``bitfront search``. To be copied."""
    folder = tmp_path_factory.mktemp("searched")
    shutil.copytree(trained_once[0], folder, dirs_exist_ok=True)
    return folder, Shell(folder, warm)("search", "--config", "small.toml")


@pytest.fixture(scope="session")
def kernels():
    """The compiled kernels, which take seconds each; the tests of the kernels and of the package compile them anew."""
    libraries = (native.library(), native.training_library(), native.bits_library())
    return [Path(library._name) for library in libraries if library is not None]


@pytest.fixture
def shell(tmp_path, warm, kernels):
    """A command line in an empty folder, with the kernels compiled."""
    shell = Shell(tmp_path, warm, kernels)
    yield shell
    shell.end()


@pytest.fixture
def trained(shell, trained_once):
    """A command line in a folder with ``small.toml`` and its trained model in ``runs/small``."""
    shutil.copytree(trained_once[0], shell.folder, dirs_exist_ok=True)
    return shell


@pytest.fixture
def searched(shell, searched_once):
    """A command line in a folder where ``small.toml`` has been searched."""
    shutil.copytree(searched_once[0], shell.folder, dirs_exist_ok=True)
    return shell


@pytest.fixture
def shared_examples():
    """The folder of the example configurations that are tested as they are; skips where it does not stand."""
    if not (SHARED / "examples").is_dir() or not (SHARED / "data" / "jsc.npz").is_file():
        pytest.skip(f"needs {SHARED}/examples and {SHARED}/data/jsc.npz, which are not beside this checkout")
    return SHARED / "examples"
