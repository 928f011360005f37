"""The digits dataset: its content, its split, and what it refuses."""

import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from bitfront.data import DATASETS
from bitfront.data import digits as module
from bitfront.data.base import DataRequest
from bitfront.data.loading import load_dataset
from bitfront.errors import ConfigError, DataError, MissingExtraError, UnknownNameError
from bitfront.testing.data import check_dataset


def test_digits_is_a_dataset_of_images_in_0_to_1():
    digits = load_dataset("digits")
    check_dataset(digits)
    assert digits.sample_shape == (1, 8, 8)
    assert digits.num_classes == 10
    assert sum(len(digits.y[s]) for s in digits.splits) == 1797
    assert min(float(x.min()) for x in digits.x.values()) == 0
    assert max(float(x.max()) for x in digits.x.values()) == 1
    for split in digits.splits:
        assert torch.bincount(digits.y[split], minlength=10).min() > 0


@pytest.mark.parametrize("table", [module.TABLE, "elsewhere.csv.gz"])
def test_it_is_what_scikit_learn_loads(table, monkeypatch):
    monkeypatch.setattr(module, "TABLE", table)
    read = []
    monkeypatch.setattr(module, "from_arrays", lambda *a, **k: read.append((a, k)))
    module.digits(DataRequest())
    [((images, labels), more)] = read
    bunch = load_digits()
    assert images.dtype == np.float32
    assert np.array_equal(images[:, 0] * 16, bunch.images)
    assert labels.dtype == np.int64
    assert np.array_equal(labels, bunch.target)
    assert more["feature_names"] == bunch.feature_names


def test_the_seed_sets_the_split():
    assert load_dataset("digits").fingerprint == load_dataset("digits", DataRequest(seed=0)).fingerprint
    assert load_dataset("digits").fingerprint != load_dataset("digits", DataRequest(seed=1)).fingerprint


def test_digits_reads_no_file(tmp_path):
    with pytest.raises(DataError, match="comes with scikit-learn and reads no file, but dataset_path is"):
        load_dataset("digits", DataRequest(path=tmp_path))


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'bitfront\[digits\]'"):
        load_dataset("digits")


def test_the_room_lists_its_members():
    assert {"digits", "jsc", "npz"} <= set(DATASETS.names())
    assert all(text for _, text in DATASETS.described())
    with pytest.raises(UnknownNameError, match=r"no dataset called 'digit'; .*Did you mean 'digits'"):
        load_dataset("digit")
    with pytest.raises(ConfigError):
        load_dataset("no_such_package:make")
