"""Handwritten digits, 8 by 8 pixels: the embedded default, so that a first run needs neither a file nor a
network."""

from __future__ import annotations

import numpy as np

from bitfront.data import DATASETS
from bitfront.data.arrays import from_arrays
from bitfront.data.base import DataRequest, Dataset
from bitfront.errors import DataError, require


@DATASETS.register("digits")
def digits(request: DataRequest) -> Dataset:
    """1,797 handwritten digits of 8x8 pixels from scikit-learn, 10 classes: needs no file and no network.

    x is (samples, 1, 8, 8) in [0, 1]; the split is stratified and drawn from the seed.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        DataError: a path was given.
    """
    if request.path is not None:
        raise DataError(
            'dataset = "digits" comes with scikit-learn and reads no file, but dataset_path is '
            f'{request.path}; leave it out, or use dataset = "npz"'
        )
    datasets = require("sklearn.datasets", "digits", 'dataset = "digits"')
    bunch = datasets.load_digits()
    images = np.asarray(bunch.images, dtype=np.float32)[:, None] / np.float32(16)  # pixels count from 0 to 16
    return from_arrays(
        images,
        np.asarray(bunch.target),
        name="digits",
        class_names=[str(c) for c in range(10)],
        feature_names=list(bunch.feature_names),
        seed=request.seed,
        source="scikit-learn's load_digits",
    )
