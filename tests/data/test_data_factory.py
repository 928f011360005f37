"""The user's data: every kind of object that holds samples, and `package.module:factory`."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.data import Dataset as TorchDataset

from bitfront.data.arrays import from_arrays, from_splits
from bitfront.data.base import DataRequest
from bitfront.data.factory import from_object
from bitfront.data.loading import load_dataset
from bitfront.errors import ConfigError, DataError
from bitfront.testing.data import check_dataset

X = torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(90) % 3
PAIR = TensorDataset(X, Y)


class Samples(TorchDataset):
    """Map-style, without an IndexError at its end."""

    def __init__(self, x=X, y=Y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index % len(self.x)].numpy(), int(self.y[index % len(self.x)])


class Stream(IterableDataset):
    def __init__(self, count=90):
        self.count = count

    def __iter__(self):
        for i in range(self.count):
            yield X[i % 90] + i // 90, Y[i % 90]


def read(value, **request):
    return from_object(value, DataRequest(**request), name="mine", source="my_data:make")


@pytest.mark.parametrize(
    "value",
    [
        (X, Y),
        (X.numpy(), Y.numpy()),
        [X, Y],
        PAIR,
        Samples(),
        Stream(),
        DataLoader(PAIR, batch_size=32),
        DataLoader(Stream(), batch_size=32),
    ],
    ids=["tensors", "numpy", "list", "TensorDataset", "map", "iterable", "loader", "loader of a stream"],
)
def test_every_kind_of_samples_gives_the_same_dataset(value):
    dataset = read(value)
    check_dataset(dataset)
    assert dataset.fingerprint == from_arrays(X, Y).fingerprint
    assert (dataset.name, dataset.source) == ("mine", "my_data:make")


def parts(kind):
    cuts = [slice(0, 50), slice(50, 70), slice(70, 90)]
    return [kind(X[c], Y[c]) for c in cuts]


@pytest.mark.parametrize("kind", [lambda x, y: (x, y), TensorDataset, lambda x, y: DataLoader(TensorDataset(x, y))])
def test_splits_as_tuple_or_dict(kind):
    three = parts(kind)
    dataset = read(tuple(three))
    check_dataset(dataset)
    assert torch.equal(dataset.x["val"], X[50:70])
    assert read(dict(zip(("train", "validation", "test"), three, strict=True))).fingerprint == dataset.fingerprint
    two = read([three[0], three[2]])
    assert torch.equal(two.x["test"], X[70:])
    assert two.fingerprint == from_splits({"train": (X[:50], Y[:50]), "test": (X[70:], Y[70:])}).fingerprint


def test_a_shuffling_loader_is_read_the_same_every_time_and_disturbs_nobody():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    one, two = (read({"train": DataLoader(PAIR, batch_size=8, shuffle=True)}) for _ in range(2))
    assert one.fingerprint == two.fingerprint
    assert torch.equal(torch.rand(3), expected)


def test_a_bitfront_dataset_passes_through():
    dataset = from_arrays(X, Y)
    assert read(dataset) is dataset


def test_the_size_is_reported():
    lines = []
    read({"train": PAIR}, report=lines.append)
    assert lines == ["my_data:make, train: 90 samples, 0.0 MB read into memory"]


@pytest.mark.parametrize(
    "value",
    [PAIR, Stream(), Stream(10**9), DataLoader(PAIR, batch_size=8), (X, Y), {"train": (X[:60], Y[:60]), "test": PAIR}],
)
def test_the_limit_is_checked_while_reading(value):
    with pytest.raises(DataError, match=r"my_data:make.* needs more than 9.31e-07 GiB in memory .*\(limit_bytes\)"):
        read(value, limit_bytes=1000)


def ragged(i):
    return np.zeros(3 + (i == 7)), 0


class By(TorchDataset):
    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return self.make(index)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (By(ragged), r"sample 7 has the shape \(4,\), the first has \(3,\); every sample needs the same"),
        (By(lambda i: np.zeros(3)), r"sample 0 is a ndarray; needed is \(x, y\)"),
        (By(lambda i: (1, 2, 3)), r"sample 0 is a tuple of 3; needed is \(x, y\)"),
        (By(lambda i: {"image": 1}), r"sample 0 is a dict with the keys image; needed is"),
        (By(lambda i: (object(), 1)), "x of my_data:make: sample 0 is a object, not numbers"),
        (By(lambda i: 1 / 0), r"reading the samples failed: ZeroDivisionError: division by zero \(.*test_data_factory"),
        (Stream(0), "my_data:make gave no samples"),
        ((X, X, Y, Y), "cannot read a tuple of 4 as samples; allowed: "),
        (X, "cannot read a Tensor as samples"),
        (None, "cannot read a NoneType as samples"),
        ((PAIR, PAIR, PAIR, PAIR), "got a tuple of 4 splits"),
        ({"train": PAIR, "tests": PAIR}, "no split called 'tests'.*Did you mean 'test'"),
        ({"train": PAIR, "test": PAIR}, "90 of the 90 test rows are training rows"),
        (DataLoader(PAIR, batch_size=None), "the DataLoader has batch_size=None"),
    ],
)
def test_the_message_names_what_cannot_be_read(value, message):
    with pytest.raises(DataError, match=message):
        read(value)


# -- package.module:factory ---------------------------------------------------------------------

GOOD = """
import torch
LIMIT = 3
def make():
    return torch.arange(60.0).reshape(30, 2), torch.arange(30) % 3
def broken():
    raise KeyError("no such column")
class Maker:
    @staticmethod
    def make():
        return make()
"""


@pytest.fixture
def module(request):
    """A module with a name that no other test uses, in the working directory; forgotten afterwards."""
    name = f"my_data_{abs(hash(request.node.name))}"
    Path(f"{name}.py").write_text(GOOD)
    before = list(sys.path)
    yield name
    sys.modules.pop(name, None)
    sys.path[:] = before


def test_a_factory_beside_the_toml_file_is_imported(module):
    dataset = load_dataset(f"{module}:make")
    check_dataset(dataset)
    assert dataset.name == "make"
    assert dataset.source == f"{module}:make"
    assert load_dataset(f"{module}:Maker.make").fingerprint == dataset.fingerprint


def test_factories_that_are_not_there(module):
    for spec, message in [
        (f"{module}:mke", "has no 'mke'; allowed: .*make. Did you mean 'make'"),
        (f"{module}:LIMIT", "is a int; needed is a function"),
        (
            "no_such_module:make",
            r"dataset: 'no_such_module:make': there is no module 'no_such_module', neither in the working directory",
        ),
        ("torch.no_such:make", "there is no module 'torch.no_such'"),
        ("a b:c", "'a b:c' is not of the form 'package.module:name'"),
        (":make", "is not of the form 'package.module:name'"),
        (f"{module}:", "is not of the form 'package.module:name'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_dataset(spec)


def test_factories_that_fail(module):
    with pytest.raises(
        DataError, match=rf"factory {module}:broken failed: KeyError: 'no such column' \(.*{module}.py:7\)"
    ):
        load_dataset(f"{module}:broken")
    Path("my_broken_import.py").write_text("import a_package_nobody_has\n")
    with pytest.raises(
        ConfigError, match=r"importing my_broken_import failed: ModuleNotFoundError: .*a_package_nobody_has"
    ):
        load_dataset("my_broken_import:make")
    Path("my_syntax.py").write_text("def make(:\n")
    with pytest.raises(ConfigError, match=r"importing my_syntax failed: SyntaxError"):
        load_dataset("my_syntax:make")
    with pytest.raises(DataError, match="is a factory, which opens its files itself, but dataset_path is"):
        load_dataset(f"{module}:make", DataRequest(path=Path("x.npz")))
