"""What is released: a wheel and a source distribution. Both are built, and the wheel is installed and run where nothing else
of this checkout can be imported.

The wheel is built from the source distribution, so what the latter lacks, the former lacks too.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import numpy as np
import pytest

from bitfront.kernels import native

ROOT = Path(__file__).parents[1]
#: What a checkout has at its root, and a source distribution too.
FILES = ["LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "MANIFEST.in", "Makefile", "constraints.txt"]
FOLDERS = ["bench", "docs", "examples", "src", "tests"]
IGNORED = ("__pycache__", "*.pyc", "*.egg-info")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

#: Trains candidates, so that both libraries of kernels are needed.
SEARCH = """
model = "jsc-tiny"
dataset = "npz"
dataset_path = "clouds.npz"
project = "small"
max_epochs = 1
accelerator = "cpu"

[search.search_space.setup]
by = "type"

[search.search_space.seed.linear.config]
name = ["integer"]
data_in_width = [4, 8]
weight_width = [2, 4, 8]
bias_width = [8]

[search.strategy]
name = "brute_force"
setup.n_trials = 4

[search.strategy.sw_runner.basic_evaluation]

[search.strategy.sw_runner.basic_train]
max_epochs = 1

[search.strategy.hw_runner.average_bitwidth]

[search.strategy.metrics]
accuracy.direction = "maximize"
average_bitwidth.direction = "minimize"
"""


def files(folder: Path) -> set[str]:
    """Paths of what stands below a folder, without caches and build products."""
    there = (p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc")
    return {str(p.relative_to(folder)) for p in there if not re.search(r"\.egg-info/|__pycache__/", str(p))}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, source distribution), built in a copy of the checkout without a network."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("release")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / "checkout" / name, ignore=shutil.ignore_patterns(*IGNORED))
    for name in [*FILES, "pyproject.toml"]:
        shutil.copy(ROOT / name, folder / "checkout")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "checkout")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


@pytest.mark.journey
def test_wheel_has_every_file_of_the_package(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == files(ROOT / "src"), "package-data in pyproject.toml names what is no Python"
    assert {"bitfront/py.typed", "bitfront/kernels/kernels.cpp"} <= names


@pytest.mark.journey
def test_source_distribution_has_the_tests_and_all_that_they_read(built):
    with tarfile.open(built[1]) as source:
        names = {name.split("/", 1)[1] for name in source.getnames() if not source.getmember(name).isdir()}
    expected = {f"{folder}/{file}" for folder in FOLDERS for file in files(ROOT / folder)} | {*FILES, "pyproject.toml"}
    missing = sorted(expected - names)
    assert not missing, "MANIFEST.in names what is no package"
    assert {n for n in names - expected if ".egg-info/" not in n} == {"PKG-INFO", "setup.cfg"}


@pytest.mark.journey
def test_metadata_of_the_wheel(built):
    with zipfile.ZipFile(built[0]) as wheel:
        (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
        said = HeaderParser().parsestr(wheel.read(f"{info}/METADATA").decode())
        license_text = wheel.read(f"{info}/licenses/LICENSE").decode()
    assert (said["Name"], said["Version"]) == ("bitfront", PROJECT["version"])
    assert (said["Author"], said["License-Expression"]) == ("Bitfront developers", "Apache-2.0")
    assert said["Summary"] == PROJECT["description"]
    assert said["Keywords"].split(",") == PROJECT["keywords"]
    assert said.get_payload().lstrip().startswith("# Bitfront")
    assert {re.match(r"[\w-]+", d)[0] for d in said.get_all("Requires-Dist") if "extra ==" not in d} == {
        re.match(r"[\w-]+", d)[0] for d in PROJECT["dependencies"]
    }
    assert "Apache License\n                           Version 2.0, January 2004" in license_text


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of an environment that has the wheel, and otherwise only its dependencies.

    The dependencies are those of the environment that runs the tests: its folder of packages is named in a ``.pth`` file,
    and the ``.pth`` files that stand there, an editable install's among them, are not read.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    programs = folder / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "--disable-pip-version-check"]
    command = [*pip, "install", "--quiet", "--no-index", "--no-deps", str(built[0])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (packages,) = folder.glob("lib/python3*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


def typed(*words: str | Path, folder: Path) -> str:
    """Standard output of a command that is to succeed, without settings of this process."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("BITFRONT_", "PYTHON"))}
    empty = {"OMP_NUM_THREADS": "1", "BITFRONT_CACHE": str(folder / "cache"), "HOME": str(folder)}
    done = subprocess.run(words, cwd=folder, env={**kept, **empty}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.journey
def test_installed_wheel_compiles_its_kernels_searches_and_reports(installed, tmp_path):
    home = typed(installed / "python", "-c", "import bitfront; print(bitfront.__file__)", folder=tmp_path)
    assert Path(home.strip()).is_relative_to(installed.parent)

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 16))
    labels = {split: np.arange(n) % 5 for split, n in (("train", 300), ("val", 100), ("test", 100))}
    arrays = {f"X_{s}": (centres[y] + rng.normal(size=(len(y), 16))).astype("f4") for s, y in labels.items()}
    np.savez(tmp_path / "clouds.npz", **arrays, **{f"y_{split}": y for split, y in labels.items()})
    (tmp_path / "small.toml").write_text(SEARCH)
    printed = typed(installed / "bitfront", "search", "--config", "small.toml", folder=tmp_path)
    assert "4 of 6 candidates evaluated" in printed
    compiled = {path.name.split("-")[0] for path in (tmp_path / "cache").glob("*.so")}
    assert compiled == (set() if native.library() is None else {"kernels", "training"})

    typed(installed / "bitfront", "report", "runs/small", folder=tmp_path)
    page = (tmp_path / "runs/small/report.html").read_text(encoding="utf-8")
    assert "Plotly" in page
    assert all(part in page for part in page_parts())


def page_parts() -> list[str]:
    """The first rule of the page's style and the first function of its program."""
    style, program = (ROOT / "src/bitfront/report" / name for name in ("page.css", "page.js"))
    return [style.read_text().split("{")[0].strip(), re.search(r"function \w+", program.read_text())[0]]


@pytest.mark.slow
def test_every_package_that_is_imported_is_a_declared_dependency():
    """What comes only along with a dependency may be gone with its next release."""
    extras = [d for name, listed in PROJECT["optional-dependencies"].items() if name != "dev" for d in listed]
    declared = {re.match(r"[\w.-]+", d)[0].lower().replace("_", "-") for d in PROJECT["dependencies"] + extras}
    homes, seen = importlib.metadata.packages_distributions(), set()
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for package in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"bitfront"}:
                projects = {home.lower().replace("_", "-") for home in homes.get(package, [])}
                seen |= projects
                assert not projects or projects & declared, (
                    f"{path.relative_to(ROOT)}: {package} is in no list of pyproject.toml"
                )
    assert {"torch", "numpy", "optuna"} <= seen
