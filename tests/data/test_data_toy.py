"""MASE's toy data."""

from pathlib import Path

import numpy as np
import pytest

import bitfront as bf
from bitfront.data.base import DataRequest
from bitfront.errors import DataError
from bitfront.testing.data import check_dataset


def test_toy_tiny():
    data = bf.load_dataset("toy_tiny")
    check_dataset(data)
    assert {split: tuple(x.shape) for split, x in data.x.items()} == dict.fromkeys(data.splits, (10_240, 1, 2, 2))
    for x, y in (data.split(split) for split in data.splits):
        assert np.array_equal(y.numpy(), (x.numpy().sum(axis=(1, 2, 3)) > 0).astype(int))
        assert 0.99 < float(x.abs().max()) <= 1
    with pytest.raises(DataError, match="computed and reads no file"):
        bf.load_dataset("toy_tiny", DataRequest(path=Path("x")))
