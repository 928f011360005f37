"""What the tests of the core share: reproducible hypothesis runs, a browser, and a short way to a space."""

import collections
import gc
import itertools
import multiprocessing
import os
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import bitfront
import properties
from bitfront.formats import FORMATS
from bitfront.graph import capture
from bitfront.operations import OPERATIONS
from bitfront.spaces.quantize import QuantizationSpace
from bitfront.spaces.request import SpaceRequest
from warm import Warm

properties.load()
# The tensors here are tiny; threads would only wait for one another.
torch.set_num_threads(1)


# A shell starts what runs in its background with interrupts ignored, and so would be every command that a test starts:
# one that is ended by Ctrl-C would never end.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


#: Whether the long ones are run too.
ALL = "BITFRONT_ALL" in os.environ


#: Of a parameter with so many values at most, each is in a case that runs.
VALUES = 8


def pytest_collection_modifyitems(items):
    sampled = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("long") and not ALL:
            item.add_marker(pytest.mark.skip(reason="it takes long; BITFRONT_ALL=1 runs it, and make all"))
        if item.get_closest_marker("sampled") and not ALL:
            sampled[item.nodeid.partition("[")[0]].append(item)
        if "browser" in item.fixturenames or item.get_closest_marker("journey"):
            item.add_marker(pytest.mark.slow)
    for cases in sampled.values():
        for item in _left_out(cases):
            item.add_marker(pytest.mark.skip(reason="one of many cases; BITFRONT_ALL=1 runs all, and make all"))


def _left_out(cases):
    """The cases of one test that do not run: of every n one does, and one with each value of parameters with few."""
    values = collections.defaultdict(set)
    of_cases = [
        {
            (name, repr(value)[:300])
            for name, value in (item.callspec.params.items() if hasattr(item, "callspec") else ())
        }
        for item in cases
    ]
    for name, value in itertools.chain(*of_cases):
        values[name].add(value)
    wanted = {(name, value) for name, of_name in values.items() if len(of_name) <= VALUES for value in of_name}
    # A parameter alone has as many values as there are cases.
    wanted = wanted if len(values) > 1 else set()
    every = cases[0].get_closest_marker("sampled").args[0]
    runs = {i for i in range(len(cases)) if i % every == 0}
    missing = wanted - set(itertools.chain(*(of_cases[i] for i in runs)))
    for i, of_case in enumerate(of_cases):
        if of_case & missing:
            runs.add(i)
            missing -= of_case
    return [item for i, item in enumerate(cases) if i not in runs]


def pytest_collection_finish():
    # Thousands of collected tests are there until the end; nobody needs to look through them for garbage again and again.
    gc.freeze()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine; .ci/run installs it where apt can")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def warm():
    """What forks commands, in place of starting each anew."""
    # Where the package stands that the tests import: the commands run that one, also from a second checkout.
    source = str(Path(bitfront.__file__).parents[1])
    fonts = Path(tempfile.gettempdir()) / f"bitfront-fonts-{os.getuid()}"
    warm = Warm({**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source, "MPLCONFIGDIR": str(fonts)})
    yield warm
    warm.end()


@pytest.fixture
def quick_workers(monkeypatch):
    """Worker processes that are forked from one that has torch imported; where a test is not about how they start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bitfront.engine.evaluation.workers", "bitfront.testing"])
    monkeypatch.setattr("bitfront.executors.processes.get_context", lambda _: context)


@pytest.fixture(scope="session")
def few_jets(tmp_path_factory):
    """A folder for ``BITFRONT_DATA`` with a tenth of the jets, where all of them would show nothing more."""
    whole = Path(os.environ.get("BITFRONT_DATA", Path(__file__).parents[2] / "shared" / "data")) / "jsc.npz"
    if not whole.is_file():
        pytest.skip("jet data: BITFRONT_DATA names no folder with jsc.npz")
    with np.load(whole) as file:
        arrays = dict(file)
    for split, number in {"train": 27_000, "val": 9_000, "test": 9_000}.items():
        for name in (f"X_{split}", f"y_{split}"):
            arrays[name] = arrays[name][:number]
    folder = tmp_path_factory.mktemp("jets")
    np.savez(folder / "jsc.npz", **arrays)
    return folder


@pytest.fixture(scope="session")
def space_of():
    """(model, sample shape, seed table, by) -> the quantization space of the captured model."""

    def build(model, shape, seed, by="name"):
        sample = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        return QuantizationSpace(SpaceRequest(capture(model, sample), by, seed))

    return build


@pytest.fixture
def formats(monkeypatch):
    """The registry of number formats; what a test registers is gone after it."""
    FORMATS.names()
    for table in ("_members", "_aliases", "_files"):
        monkeypatch.setattr(FORMATS, table, dict(getattr(FORMATS, table)))
    return FORMATS


@pytest.fixture
def operations(monkeypatch):
    """The registry of operations; what a test registers or changes is gone after it."""
    OPERATIONS.names()
    with monkeypatch.context() as patch:
        for table in ("_members", "_aliases", "_files"):
            patch.setattr(OPERATIONS, table, dict(getattr(OPERATIONS, table)))
        yield OPERATIONS
    OPERATIONS.version += 1


@pytest.fixture
def tiny_mlp():
    """Two linear layers, 4-3-2, with seeded weights: the sites fc1, relu, fc2."""

    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = torch.nn.Linear(4, 3)
            self.relu = torch.nn.ReLU()
            self.fc2 = torch.nn.Linear(3, 2)

        def forward(self, x):
            return self.fc2(self.relu(self.fc1(x)))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tiny()
