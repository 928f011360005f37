"""Handwritten digits, 8 by 8 pixels: the default dataset, so that a first run needs no file and no network."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitfront.data import DATASETS
from bitfront.data.arrays import from_arrays
from bitfront.data.base import DataRequest, Dataset
from bitfront.errors import DataError, require

#: Where scikit-learn keeps the table: a row per image, its 64 pixels and the digit it shows.
TABLE = "datasets/data/digits.csv.gz"


@DATASETS.register("digits", sample_shape=(1, 8, 8), num_classes=10)
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
            f'{request.path}; leave dataset_path out, or use dataset = "npz"'
        )
    table = _digits_table()
    return from_arrays(
        table[:, :64].reshape(-1, 1, 8, 8) / np.float32(16),  # pixels count from 0 to 16
        table[:, 64].astype(np.int64),
        name="digits",
        class_names=[str(c) for c in range(10)],
        feature_names=[f"pixel_{row}_{column}" for row in range(8) for column in range(8)],
        seed=request.seed,
        source="scikit-learn's load_digits",
    )


def _digits_table() -> NDArray[np.float32]:
    """The table that ``load_digits`` reads, float32, shape (1797, 65): 64 pixels and the digit.

    Read without importing scikit-learn where possible: the import takes longer than everything else that a small
    search does before it starts. If the file moves in a later version, scikit-learn is asked.
    """
    package = importlib.util.find_spec("sklearn")
    file = Path(package.origin).parent / TABLE if package and package.origin else None
    if file is not None and file.is_file():
        return np.loadtxt(file, delimiter=",", dtype=np.float32)
    bunch = require("sklearn.datasets", "digits", 'dataset = "digits"').load_digits()
    return np.column_stack([bunch.data, bunch.target]).astype(np.float32)
