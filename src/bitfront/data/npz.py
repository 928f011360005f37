"""Any data in one NumPy file: ``dataset = "npz"`` with ``dataset_path``.

The file holds the arrays ``X_train, y_train[, X_val, y_val], X_test, y_test``, or ``X, y``, which are split
here. A missing val (or test) is cut from train. Optional: ``class_names``, ``feature_names``, ``name``, and
``standardise`` (true or false). With ``labels = false`` no y is needed.

A model with several inputs has an array for each in place of X, by its name: ``input_ids, attention_mask, y``, or
``input_ids_train, attention_mask_train, y_train, ...``.

uint8 features are images and are divided by 255. Float features of shape (samples, features) are standardised
with the training split's statistics, unless the file says ``standardise = False``. Float features of any other
shape are used as they are, because a mean per pixel is seldom wanted.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitfront.archives import check_members
from bitfront.data import DATASETS
from bitfront.data.arrays import from_arrays, from_splits
from bitfront.data.base import SPLITS, DataRequest, Dataset
from bitfront.data.raw import Array, as_text
from bitfront.errors import DataError, parsing

NEEDED = "needed are X_train, y_train[, X_val, y_val], X_test, y_test, or X and y"
#: Arrays that are neither samples nor targets.
DESCRIBING = ("name", "class_names", "feature_names", "standardise", "train_mean", "train_scale")
#: Features: one array, or several inputs by name.
Features = Array | dict[str, Array]


@DATASETS.register("npz")
def npz(request: DataRequest) -> Dataset:
    """A NumPy .npz file with X_train, y_train, X_test, y_test (or X, y): dataset_path names it.

    Raises:
        DataError: no path is given, the file lacks an array, or a value is not a feature or a label.
    """
    if request.path is None:
        raise DataError('dataset = "npz" needs dataset_path, the .npz file to read')
    content = read_npz(request.path, labels=request.targets.given)
    common: dict[str, Any] = {
        "name": content.name,
        "class_names": content.class_names or request.class_names,
        "feature_names": content.feature_names,
        "seed": request.seed,
        "targets": request.targets,
        "source": str(request.path),
    }
    if None in content.splits:
        x, y = content.splits[None]
        return from_arrays(x, y, standardise=_standardise(x, content, request.path), **common)
    splits = {str(split): pair for split, pair in content.splits.items()}
    x, _ = next(iter(splits.values()))
    return from_splits(splits, standardise=_standardise(x, content, request.path), **common)


def _standardise(x: Features, content: NpzContent, path: Path) -> bool:
    """Whether the features are standardised: as the file says, or else if they are floats in two dimensions."""
    setting = content.extra.get("standardise")
    if setting is None:
        return not isinstance(x, dict) and x.dtype.kind == "f" and x.ndim == 2
    if setting.size != 1 or setting.dtype.kind not in "biu":
        raise DataError(f"{path}: standardise is {setting.dtype} {setting.shape}; needed is one of True and False")
    return bool(setting)


@dataclass(frozen=True)
class NpzContent:
    """The arrays of an .npz file.

    Attributes:
        name: the array ``name``, or the file's name without its suffix.
        splits: (x, y) by split as the file holds them; under None where the file has X and y alone. Several inputs are
            a mapping, by name; y is None where it was not asked for.
        class_names: by index, or empty.
        feature_names: one per feature, or empty.
        extra: every other array, by its name.
    """

    name: str
    splits: dict[str | None, tuple[Features, Array | None]]
    class_names: tuple[str, ...]
    feature_names: tuple[str, ...]
    extra: dict[str, Array]


def read_npz(path: Path, *, labels: bool = True) -> NpzContent:
    """The arrays of the .npz file at `path`. Pickled objects are refused, so nothing in the file is executed.

    Args:
        path: the file.
        labels: whether it must have y; if not, a y that is there is left out.

    Raises:
        DataError: the file is missing, broken, not an .npz file, or lacks an array.
    """
    check_file(path)
    arrays = _arrays(path)
    holds = "the file has " + (", ".join(f"{key} {array.shape}" for key, array in arrays.items()) or "nothing")
    x, y = _by_split(arrays, labels)
    splits: dict[str | None, tuple[Features, Array | None]] = {}
    for split in (*SPLITS, None):
        suffix = "" if split is None else f"_{split}"
        if split in y and split not in x:
            raise DataError(f"{path} has no array X{suffix} for its y{suffix}; {holds}; {NEEDED}")
        if split in x and split not in y and labels:
            raise DataError(f"{path} has no array y{suffix} for its X{suffix}; {holds}; {NEEDED}")
        if split in x:
            splits[split] = x[split], y[split] if labels else None
    if None in splits and len(splits) > 1:
        raise DataError(f"{path} has both X, y and named splits; {holds}; leave one of them out")
    if not splits:
        raise DataError(f"{path} has no features and labels; {holds}; {NEEDED}")
    name = arrays.pop("name", None)
    return NpzContent(
        name=path.stem if name is None else " ".join(_strings(name)),
        splits=splits,
        class_names=_strings(arrays.pop("class_names", None)),
        feature_names=_strings(arrays.pop("feature_names", None)),
        extra={key: array for key, array in arrays.items() if key.lower().partition("_")[0] not in ("x", "y")},
    )


def _by_split(arrays: Mapping[str, Array], labels: bool) -> tuple[dict[str | None, Features], dict[str | None, Array]]:
    """(features, targets) by split, or under None. Without an array X, the other arrays of a split are its inputs.

    Args:
        arrays: by name.
        labels: whether only splits with targets count.
    """
    inputs: dict[str | None, dict[str, Array]] = {}
    single: dict[str | None, Features] = {}
    targets: dict[str | None, Array] = {}
    for key, array in arrays.items():
        split = next((split for split in SPLITS if key.lower().endswith(f"_{split}")), None)
        name = key if split is None else key.removesuffix(key[-len(split) - 1 :])
        if name.lower() == "x":
            single[split] = array
        elif name.lower() == "y":
            targets[split] = array
        elif key not in DESCRIBING:
            inputs.setdefault(split, {})[name] = array
    several = {split: of for split, of in inputs.items() if split in targets or not labels}
    return single or dict(several), targets


def check_file(path: Path) -> None:
    """Raises DataError unless `path` is a file; the message lists files in the same folder."""
    if path.is_file():
        return
    if path.is_dir():
        raise DataError(f"{path} is a folder; name the file in it")
    folder = path.parent
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())[:8] if folder.is_dir() else []
    listing = f"in {folder.resolve()} there are: {', '.join(names)}" if names else f"{folder.resolve()} holds no files"
    raise DataError(f"there is no file {path}; {listing}")


def _arrays(path: Path) -> dict[str, Array]:
    """Every array of the file, by name; what it declares is held against it before memory is taken."""
    why = f"{path} cannot be read as an .npz file"
    # Opened here, not by numpy, which leaves a broken archive open.
    with parsing(DataError, why, "write it with numpy.savez"), path.open("rb") as file:
        if file.read(6) == b"\x93NUMPY":
            raise DataError(f"{path} is one bare array; {NEEDED}, saved with numpy.savez")
        with zipfile.ZipFile(file) as archive:
            members = check_members(path, archive, path.stat().st_size, DataError)
            return {member.filename.removesuffix(".npy"): _array(archive, member, path) for member in members}


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> Array:
    key = member.filename.removesuffix(".npy")
    remedy = "save plain numbers or text with numpy.savez"
    with (
        parsing(DataError, f"{path}: the array {key} cannot be read: it is broken", remedy),
        archive.open(member) as file,
    ):
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"its format is {version}, and {list(readers)} are read")
        shape, fortran, dtype = readers[version](file)
        if dtype.hasobject:
            raise DataError(
                f"{path}: the array {key} cannot be read: it holds Python objects, which are never read; save plain "
                "numbers or text: y.astype(str) for labels that are words"
            )
        if dtype.names is not None or dtype.subdtype is not None:
            raise DataError(f"{path}: the array {key} has the dtype {dtype}; save one array of plain numbers per name")
        declared, held = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
        if declared != held:
            raise ValueError(f"its header declares {declared:,} bytes, and {held:,} follow")
        data = file.read()  # to the end, where the archive's checksum is compared
        if len(data) != held:
            raise ValueError(f"{held:,} bytes are declared, and {len(data):,} are there")
        flat = np.frombuffer(bytearray(data), dtype=dtype) if held else np.zeros(math.prod(shape), dtype=dtype)
        return flat.reshape(shape[::-1]).transpose() if fortran else flat.reshape(shape)


def _strings(array: Array | None) -> tuple[str, ...]:
    return () if array is None else tuple(as_text(array).reshape(-1).tolist())
