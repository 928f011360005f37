"""Any classification data in one NumPy file: ``dataset = "npz"`` with ``dataset_path``.

Arrays ``X_train, y_train[, X_val, y_val], X_test, y_test``, or ``X, y`` to be split here; a missing val (or
test) is cut from train. Optional: ``class_names``, ``feature_names``, ``name``, and ``standardise`` (true or
false).

uint8 features are images and are divided by 255. Float features of shape (samples, features) are standardised
with the training split's statistics, unless the file says ``standardise = False``; float features of any
other shape are used as they are, since a mean per pixel is seldom meant.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitfront.data import DATASETS
from bitfront.data.arrays import from_arrays, from_splits
from bitfront.data.base import SPLITS, DataRequest, Dataset
from bitfront.errors import DataError

Array = npt.NDArray[Any]

NEEDED = "needed are X_train, y_train[, X_val, y_val], X_test, y_test, or X and y"


@DATASETS.register("npz")
def npz(request: DataRequest) -> Dataset:
    """A NumPy .npz file with X_train, y_train, X_test, y_test (or X, y): dataset_path names it.

    Raises:
        DataError: no path is given, or the file lacks an array or holds values that are no features or
        labels.
    """
    if request.path is None:
        raise DataError('dataset = "npz" needs dataset_path, the .npz file to read')
    content = read(request.path)
    common: dict[str, Any] = {
        "name": content.name,
        "class_names": content.class_names,
        "feature_names": content.feature_names,
        "seed": request.seed,
        "source": str(request.path),
    }
    if None in content.splits:
        x, y = content.splits[None]
        return from_arrays(x, y, standardise=_standardised(x, content), **common)
    splits = {str(split): pair for split, pair in content.splits.items()}
    first, _ = next(iter(splits.values()))
    return from_splits(splits, standardise=_standardised(first, content), **common)


def _standardised(x: Array, content: Content) -> bool:
    asked = content.extra.get("standardise")
    return x.dtype.kind == "f" and x.ndim == 2 if asked is None else bool(asked)


@dataclass(frozen=True)
class Content:
    """What an .npz file holds.

    Attributes:
        splits: (x, y) by split as they stand in the file, or under None where the file has X and y alone.
        extra: every other array.
    """

    name: str
    splits: dict[str | None, tuple[Array, Array]]
    class_names: tuple[str, ...]
    feature_names: tuple[str, ...]
    extra: dict[str, Array]


def read(path: Path) -> Content:
    """The arrays of the .npz file at `path`. Nothing in the file is executed: no pickles.

    Raises:
        DataError: it is missing, broken, not an .npz file, or lacks the arrays needed.
    """
    check_file(path)
    try:
        # Opened here, not by numpy, which leaves a broken archive open.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path} is one bare array; {NEEDED}, saved with numpy.savez")
            arrays = {key: _read_array(archive, key, path) for key in archive.files}
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read as an .npz file: {error}; write it with numpy.savez") from error

    found = {key.lower(): key for key in arrays}
    here = "the file has " + (", ".join(f"{k} {v.shape}" for k, v in arrays.items()) or "nothing")
    splits: dict[str | None, tuple[Array, Array]] = {}
    for split in (*SPLITS, None):
        suffix = "" if split is None else f"_{split}"
        x_key, y_key = found.get(f"x{suffix}"), found.get(f"y{suffix}")
        if (x_key is None) != (y_key is None):
            lacking = f"X{suffix}" if x_key is None else f"y{suffix}"
            raise DataError(f"{path} has no array {lacking} for its {x_key or y_key}; {here}; {NEEDED}")
        if x_key is not None and y_key is not None:
            splits[split] = arrays.pop(x_key), arrays.pop(y_key)
    if None in splits and len(splits) > 1:
        raise DataError(f"{path} has both X, y and named splits; {here}; leave one of them out")
    if not splits:
        raise DataError(f"{path} has no features and labels; {here}; {NEEDED}")
    name = arrays.pop("name", None)
    return Content(
        name=path.stem if name is None else str(name),
        splits=splits,
        class_names=_texts(arrays.pop("class_names", None)),
        feature_names=_texts(arrays.pop("feature_names", None)),
        extra=arrays,
    )


def check_file(path: Path) -> None:
    """Raises DataError unless `path` is a file; says what lies beside it."""
    if path.is_file():
        return
    if path.is_dir():
        raise DataError(f"{path} is a folder; name the file in it")
    folder = path.parent
    beside = sorted(p.name for p in folder.iterdir() if p.is_file())[:8] if folder.is_dir() else []
    there = f"in {folder.resolve()} there are: {', '.join(beside)}" if beside else f"{folder.resolve()} holds no files"
    raise DataError(f"there is no file {path}; {there}")


def _read_array(archive: np.lib.npyio.NpzFile, key: str, path: Path) -> Array:
    try:
        return np.asarray(archive[key])
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        why = "it holds Python objects, which are never read" if "pickle" in str(error) else f"it is broken: {error}"
        raise DataError(f"{path}: the array {key} cannot be read: {why}; save plain numbers or text") from error


def _texts(array: Array | None) -> tuple[str, ...]:
    return () if array is None else tuple(str(item) for item in array.reshape(-1).tolist())
