"""Datasets in an .npz file: splits, standardisation, and files that are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bitfront.data.base import DataRequest
from bitfront.data.loading import load_dataset
from bitfront.errors import DataError
from bitfront.testing.data import check_dataset


def write(path=Path("mine.npz"), **arrays):
    np.savez(path, **arrays)
    return load_dataset("npz", DataRequest(path=path))


def blobs(n=120, classes=3):
    return np.random.default_rng(0).normal(3, 5, size=(n, 4)).astype(np.float32), np.arange(n) % classes


def test_x_and_y_are_split_and_standardised():
    x, y = blobs()
    dataset = write(X=x, y=y, class_names=["a", "b", "c"], feature_names=list("pqrs"), name="my data")
    check_dataset(dataset)
    assert (dataset.name, dataset.class_names, dataset.feature_names) == ("my data", ("a", "b", "c"), tuple("pqrs"))
    assert dataset.x["train"].mean(0).abs().max() < 1e-5
    assert dataset.source == "mine.npz"


def test_the_splits_of_the_file_and_the_name_of_the_file():
    x, y = blobs()
    dataset = write(x_train=x[:80], y_train=y[:80], x_test=x[80:], y_test=y[80:], standardise=False)
    check_dataset(dataset)
    assert dataset.name == "mine"
    assert dataset.scaler is None
    assert torch.equal(dataset.x["test"], torch.from_numpy(x[80:]))


def test_images_are_scaled_and_float_images_left_alone():
    images = np.random.default_rng(0).integers(0, 256, size=(60, 1, 4, 4)).astype(np.uint8)
    dataset = write(X=images, y=np.arange(60) % 3)
    assert dataset.scaler is None
    assert 0 <= float(dataset.x["train"].min()) < float(dataset.x["train"].max()) <= 1
    as_floats = write(X=(images / 255).astype(np.float32), y=np.arange(60) % 3)
    assert torch.allclose(as_floats.x["test"], dataset.x["test"])


def test_several_inputs_have_their_names():
    x, y = blobs()
    ids = np.arange(240).reshape(120, 2)
    whole = write(ids=ids, extra=x, y=y)
    assert [(one.name, one.shape, one.dtype) for one in whole.inputs] == [
        ("ids", (2,), torch.int64),
        ("extra", (4,), torch.float32),
    ]
    parts = {"ids_train": ids[:80], "extra_train": x[:80], "y_train": y[:80]}
    parts |= {"ids_test": ids[80:], "extra_test": x[80:], "y_test": y[80:]}
    split = write(**parts)
    (of_ids, of_extra), rows = split.inputs, split.x["test"]
    assert np.array_equal(of_ids.unpacked(rows), ids[80:])
    assert np.array_equal(of_extra.unpacked(rows), x[80:])
    assert np.array_equal(split.y["test"], y[80:])
    with pytest.raises(DataError, match=r"the inputs of test are ids .* every split needs the same"):
        write(**{name: array for name, array in parts.items() if name != "extra_test"})


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": [[1.0]]}, r"mine.npz has no array y for its X; the file has X \(1, 1\); needed are X_train, y_train"),
        ({"X_train": [[1.0]], "y_train": [0], "y_test": [0]}, "has no array X_test for its y_test"),
        ({"a": [1]}, r"mine.npz has no features and labels; the file has a \(1,\)"),
        ({}, "the file has nothing"),
        ({"X": [[1.0]], "y": [0], "X_train": [[1.0]], "y_train": [0]}, "has both X, y and named splits"),
        ({"X": np.array([{}, {}], dtype=object), "y": [0]}, "array X cannot be read: it holds Python objects"),
        ({"X_test": [[1.0]], "y_test": [0]}, "there is no train split"),
        ({"X": np.full((20, 2), np.nan), "y": [0, 1] * 10}, "mine.npz: x is nan in row 0, feature 0"),
    ],
)
def test_the_message_names_what_a_file_lacks(arrays, message):
    with pytest.raises(DataError, match=message):
        write(**arrays)


def test_a_home_folder_is_expanded(monkeypatch, tmp_path):
    x, y = blobs()
    np.savez("mine.npz", X=x, y=y)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_dataset("npz", DataRequest(path=Path("~/mine.npz"))).name == "mine"


def test_files_that_are_not_npz():
    Path("text.npz").write_text("hello")
    np.save("bare.npy", np.zeros(3))
    x, y = blobs()
    np.savez("whole.npz", X=x, y=y)
    Path("cut.npz").write_bytes(Path("whole.npz").read_bytes()[:500])
    for name, message in [
        ("text.npz", "text.npz cannot be read as an .npz file"),
        ("bare.npy", "one bare array"),
        ("cut.npz", "cannot be read as an .npz file"),
        ("none.npz", "there is no file none.npz; in .* there are: bare.npy, cut.npz, text.npz, whole.npz"),
        (".", "is a folder; name the file in it"),
    ]:
        with pytest.raises(DataError, match=message):
            load_dataset("npz", DataRequest(path=Path(name)))
    with pytest.raises(DataError, match="needs dataset_path"):
        load_dataset("npz")


@pytest.mark.parametrize("name", ["pendigits.npz", "mnist_t10k.npz"])
def test_shared_files(shared_file, name):
    dataset = load_dataset("npz", DataRequest(path=shared_file(name)))
    check_dataset(dataset)
    assert dataset.num_classes == 10
