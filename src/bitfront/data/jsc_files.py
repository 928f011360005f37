"""Reads a file of the jet substructure data, whatever its format: .npz, HDF5 or ARFF.

ARFF and HDF5 take long to parse, so what they hold is kept as .npz in the cache folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitfront.archives import check_sizes
from bitfront.cache import cache_dir
from bitfront.data.base import Scaler
from bitfront.data.jsc_arff import read_arff
from bitfront.data.jsc_columns import CLASSES, FEATURES, class_positions, feature_columns, one_hot_positions
from bitfront.data.npz import check_file, read_npz
from bitfront.data.raw import Array
from bitfront.errors import DataError, cause, one_of, parsing, require
from bitfront.files import whole

HDF5_TABLE = "t_allpar_new"
#: The name of a published file, by its number of rows.
PUBLISHED = {830_000: "JSC-OpenML", 986_806: "JSC-CERNBox"}
READER_VERSION = 1  # raise it when a reader changes, so that what older ones parsed is not used

ColumnReader = Callable[[Path], tuple[Array, Array]]
"""From a path to (features (samples, 16) float32 in the order of FEATURES, labels (samples,) as positions in
CLASSES)."""


@dataclass(frozen=True)
class JetTable:
    """The rows of a file.

    Attributes:
        name: of the data set, for tables of results.
        splits: (features, labels) by split; under None where the file has no splits. Features are
            (samples, 16) in the order of FEATURES, labels (samples,) positions in CLASSES.
        scaler: the published scaler, where the file brings one; its rows are then a test split.
    """

    name: str
    splits: Mapping[str | None, tuple[Array, Array]]
    scaler: Scaler | None = None


def read_jets(path: Path, report: Callable[[str], None]) -> JetTable:
    """The rows of the file at `path`; `report` is called with a line where reading takes long.

    Raises:
        DataError: the file is missing, of another format, broken, or lacks a feature or a class.
        MissingExtraError: it is HDF5 and h5py is not installed.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror or error}") from error
    if head.startswith(b"PK"):
        return _from_npz(path)
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return _parsed_once(path, _read_hdf5, report)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:1] in (b"%", b"@"):
        return _parsed_once(path, read_arff, report)
    hint = ", it is compressed: unpack it first" if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")) else ""
    raise DataError(f"{path} is neither .npz nor HDF5 nor ARFF (it begins with {head[:8]!r}){hint}")


def _from_npz(path: Path) -> JetTable:
    content = read_npz(path)
    width = len(content.feature_names) or len(FEATURES)
    order = feature_columns(content.feature_names or FEATURES, path)
    splits = {}
    for split, (x, y) in content.splits.items():
        suffix = "" if split is None else f"_{split}"
        if isinstance(x, dict) or y is None:
            raise DataError(f"{path}: needed is one array X{suffix} with the features of the jets, and y{suffix}")
        if x.ndim != 2 or x.shape[1] != width:
            why = "one column per feature name" if content.feature_names else "the 16 features in the published order"
            raise DataError(f"{path}: X{suffix} has the shape {x.shape}; needed is (samples, {width}), {why}")
        labels = class_positions(y, content.class_names, f"{path}: y{suffix}")
        splits[split] = (x if order == list(range(width)) else x[:, order], labels)
    mean, scale = content.extra.get("train_mean"), content.extra.get("train_scale")
    if mean is None or scale is None:
        return JetTable(content.name, splits)
    if len(splits) != 1 or not {None, "test"} & set(splits):
        raise DataError(
            f"{path} has train_mean and train_scale, so its rows must be a test set alone, but it has the splits "
            f"{', '.join(map(str, splits))}; keep X and y alone, or drop the scaler"
        )
    if mean.shape != (width,) or scale.shape != mean.shape or not (scale > 0).all():
        raise DataError(
            f"{path}: train_mean {mean.shape} and train_scale {scale.shape} need one number per feature, and every "
            "scale above 0"
        )
    return JetTable(content.name, splits, Scaler(tuple(mean[order].tolist()), tuple(scale[order].tolist())))


def _parsed_once(path: Path, reader: ColumnReader, report: Callable[[str], None]) -> JetTable:
    """The rows that `reader` parses from `path`, or that an earlier call has kept in the cache folder."""
    stat = path.stat()
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{READER_VERSION}"
    cached = cache_dir() / "parsed" / f"jsc-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if cached.is_file():
        try:
            return _from_npz(cached)
        except DataError as error:
            report(f"reading {path} again, because its cached copy is broken ({error})")
    report(f"reading {path} ({stat.st_size / 1e6:.0f} MB); the next start will be faster")
    x, y = reader(path)
    name = PUBLISHED.get(len(x), f"jsc ({path.stem})")
    _keep(cached, report, X=x, y=y.astype(np.uint8), feature_names=FEATURES, class_names=CLASSES, name=name)
    return JetTable(name, {None: (x, y)})


def _keep(target: Path, report: Callable[[str], None], **arrays: Any) -> None:
    """Writes atomically, so that processes started together do not collide."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole(target, DataError) as part, part.open("wb") as file:
            np.savez(file, **arrays)
    except (OSError, DataError) as error:
        report(f"the parsed data cannot be kept in {target.parent} ({cause(error)}); the next start parses it again")


def _read_hdf5(path: Path) -> tuple[Array, Array]:
    h5py = require("h5py", "hdf5", f"reading {path}")
    label_names = [f"j_{name}" for name in CLASSES]
    remedy = "the file may be damaged or cut short, get it again"
    with parsing(DataError, f"{path} cannot be read as HDF5", remedy), h5py.File(path, "r") as file:
        table = _hdf5_table(h5py, file, path)
        names = list(table.dtype.names or ())
        feature_names = [names[index] for index in feature_columns(names, path)]
        missing = [label for label in label_names if label not in names]
        if missing:
            raise DataError(f"{path} lacks the label column {missing[0]!r}; {one_of(label_names)}, one-hot")
        wanted = [*feature_names, *label_names]
        odd = [f"{name} ({table.dtype[name]})" for name in wanted if not _is_number(table.dtype[name])]
        if odd:
            raise DataError(f"{path}: the column {odd[0]} does not hold one number per row; needed are plain numbers")
        rows = table.fields(wanted)[()]
    x = np.stack([rows[name] for name in feature_names], axis=1).astype(np.float32)
    one_hot = np.stack([rows[label] for label in label_names], axis=1)
    return x, one_hot_positions(one_hot, CLASSES, str(path))


def _is_number(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "fiub" and dtype.names is None and dtype.subdtype is None


def _hdf5_table(h5py: Any, file: Any, path: Path) -> Any:
    """The table of jets, once it is in this very file and no larger than that can be."""
    names = list(file)
    if HDF5_TABLE not in names:
        raise DataError(f"{path} has no table {HDF5_TABLE!r}; it has {', '.join(names[:30]) or 'nothing'}")
    link = file.get(HDF5_TABLE, getlink=True)
    if not isinstance(link, h5py.HardLink):
        # A link may lead to any file of this machine.
        raise DataError(
            f"{path}: {HDF5_TABLE!r} is a {type(link).__name__}, which is not followed; give a file with the table"
        )
    table = file[HDF5_TABLE]
    if not isinstance(table, h5py.Dataset):
        raise DataError(f"{path}: {HDF5_TABLE!r} is a {type(table).__name__}; needed is a table")
    if table.is_virtual or table.external:
        raise DataError(f"{path}: {HDF5_TABLE!r} has its rows in other files, which are not read; copy them into one")
    if table.ndim != 1 or not len(table):
        raise DataError(f"{path}: {HDF5_TABLE!r} has the shape {table.shape}; needed is one dimension, of rows")
    check_sizes(path, [table.size * table.dtype.itemsize], path.stat().st_size, DataError)
    return table
