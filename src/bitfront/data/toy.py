"""MASE's toy data: four numbers, and whether their sum is positive. Computed, so it needs no file."""

from __future__ import annotations

import numpy as np

from bitfront.data import DATASETS
from bitfront.data.arrays import from_splits
from bitfront.data.base import SPLITS, DataRequest, Dataset
from bitfront.data.raw import Array
from bitfront.errors import DataError

#: In each split.
SAMPLES = 10_240


@DATASETS.register("toy-tiny", sample_shape=(1, 2, 2), num_classes=2)
def toy_tiny(request: DataRequest) -> Dataset:
    """Four uniform numbers in [-1, 1], as 1 x 2 x 2, and whether their sum is positive; MASE's, needs no file.

    Raises:
        DataError: a path was given.
    """
    if request.path is not None:
        raise DataError(
            f'dataset = "toy-tiny" is computed and reads no file, but dataset_path is {request.path}; leave '
            'dataset_path out, or use dataset = "npz"'
        )
    return from_splits(
        {split: _samples(seed) for seed, split in enumerate(SPLITS)},
        name="toy-tiny",
        class_names=("not positive", "positive"),
        seed=request.seed,
        source="computed",
        targets=request.targets,
    )


def _samples(seed: int) -> tuple[Array, Array]:
    """(x, y) of a split, whose numbers are those of MASE: drawn from 0, 1 and 2 for train, validation and test."""
    values = np.random.RandomState(seed).rand(SAMPLES, 4) * 2 - 1
    return values.reshape(-1, 1, 2, 2).astype(np.float32), (values.sum(axis=1) > 0).astype(np.int64)
