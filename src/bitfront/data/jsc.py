"""LHC jet substructure classification: 16 features of a jet, 5 kinds of particle that made it.

Two published data sets and one re-simulation share this format, and every file of them is read here: OpenML
42468 as ARFF, CERNBox's ``t_allpar_new`` table as HDF5, and .npz. They must not be mixed in one table of
results; the name and the source of the dataset say which one it is.

* **Classes are always g, q, w, z, t.** OpenML orders them g, q, t, w, z; a label is therefore mapped by the
  *name* of its class, and a file that does not name its classes is refused. A wrong order would show as 33 %
  accuracy.
* Features are taken by name too, into the order of ``FEATURES``; a leading ``j_`` is dropped.
* Features are standardised with the training split's statistics. A file with ``train_mean`` and
  ``train_scale`` brings the published scaler: its rows are a test split, standardised with that, and there is
  no train split.
* Repeated rows are kept (the published figures count them) but stay together when the split is cut here.

The file comes from ``dataset_path`` (a file or a folder), else the folder ``BITFRONT_DATA``, else the cache
folder, else it is downloaded there. What ARFF and HDF5 are parsed into is kept in the cache folder.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitfront.cache import cache_dir
from bitfront.data import DATASETS
from bitfront.data import npz as npz_file
from bitfront.data.arrays import by_name, from_arrays, from_splits
from bitfront.data.base import DataRequest, Dataset, Scaler
from bitfront.data.download import download, fetch_json
from bitfront.errors import DataError, DownloadError, one_of, require

Array = npt.NDArray[Any]

CLASSES = ("g", "q", "w", "z", "t")
FEATURES = (
    "zlogz",
    *(f"c1_b{b}_mmdt" for b in (0, 1, 2)),
    *(f"c2_b{b}_mmdt" for b in (1, 2)),
    *(f"d2_b{b}_mmdt" for b in (1, 2)),
    *(f"d2_a1_b{b}_mmdt" for b in (1, 2)),
    *(f"m2_b{b}_mmdt" for b in (1, 2)),
    *(f"n2_b{b}_mmdt" for b in (1, 2)),
    "mass_mmdt",
    "multiplicity",
)  # fmt: skip

OPENML_URL = "https://www.openml.org/api/v1/json/data/42468"
ARFF_NAME = "hls4ml_lhc_jets_hlf.arff"
HDF5_TABLE = "t_allpar_new"
FILE_NAMES = (
    "jsc.npz",
    ARFF_NAME,
    "jsc.arff",
    "processed-pythia82-lhc13-all-pt1-50k-r1_h022_e0175_t220_nonu_truth.z",
    "jsc.h5",
    "jsc.hdf5",
)
PUBLISHED = {830_000: "JSC-OpenML", 986_806: "JSC-CERNBox"}
READER_VERSION = 1  # raise it when a reader changes, so that what older ones parsed is not used


@DATASETS.register("jsc", "jet-substructure")
def jsc(request: DataRequest) -> Dataset:
    """LHC jet substructure: 16 features, classes g, q, w, z, t; from a local file, or downloaded once.

    x is (samples, 16), standardised. Splits of the file are kept; otherwise 70/15/15, stratified, from the
    seed.

    Raises:
        DataError: there is no such file, or a feature or class is missing in it.
        DownloadError: no file was found and none could be downloaded.
        MissingExtraError: the file is HDF5 and h5py is not installed.
    """
    path = _find(request)
    table = _read(path, request.report)
    common: dict[str, Any] = {
        "name": table.name,
        "class_names": CLASSES,
        "feature_names": FEATURES,
        "source": str(path),
    }
    if table.scaler is not None:
        pairs = list(table.splits.values())
        note = "test only: standardised with the scaler in the file"
        return from_splits({"test": pairs[0]}, standardise=table.scaler, test_only=True, notes=[note], **common)
    if None in table.splits:
        return from_arrays(*table.splits[None], standardise=True, seed=request.seed, **common)
    splits = {str(split): pair for split, pair in table.splits.items()}
    return from_splits(splits, standardise=True, seed=request.seed, **common)


@dataclass(frozen=True)
class _Table:
    """A file's rows: columns as FEATURES, labels as positions in CLASSES."""

    name: str
    splits: Mapping[str | None, tuple[Array, Array]]
    scaler: Scaler | None = None


# -- finding the file
# -------------------------------------------------------------------------------------------------


def _find(request: DataRequest) -> Path:
    if request.path is not None:
        return request.path if not request.path.is_dir() else _in_folder(request.path, "dataset_path")
    folder = os.environ.get("BITFRONT_DATA")
    if folder:
        place = Path(folder).expanduser()
        if not place.is_dir():
            raise DataError(f"BITFRONT_DATA is {folder!r}, which is not a folder; name the folder that holds the data")
        found = _first_known(place)
        if found is not None:
            return found
    return _first_known(cache_dir()) or _download(request)


def _first_known(folder: Path) -> Path | None:
    return next((folder / name for name in FILE_NAMES if (folder / name).is_file()), None)


def _in_folder(folder: Path, asked_by: str) -> Path:
    found = _first_known(folder)
    if found is None:
        raise DataError(
            f"{asked_by} is the folder {folder}, which holds no file of the jet data; {one_of(FILE_NAMES)}. "
            "Or name the file itself"
        )
    return found


def _download(request: DataRequest) -> Path:
    target = cache_dir() / ARFF_NAME
    advice = (
        f"Without a network: get {ARFF_NAME} (OpenML data set 42468) elsewhere and put it at {target}, or "
        "give its "
        "path as dataset_path, or put it in a folder and set BITFRONT_DATA to that folder"
    )
    page = os.environ.get("BITFRONT_OPENML_URL") or OPENML_URL
    description = fetch_json(page, advice=advice).get("data_set_description")
    url = description.get("url") if isinstance(description, dict) else None
    if not isinstance(description, dict) or not isinstance(url, str):
        raise DownloadError(f"{page} names no file to download (data_set_description.url). {advice}")
    md5 = description.get("md5_checksum")
    request.report(f"downloading the jet data (OpenML 42468) from {url} to {target}")
    checksum = f"md5:{md5.lower()}" if isinstance(md5, str) and md5 else None
    return download(url, target, checksum=checksum, progress=request.progress, advice=advice)


# -- reading it, whatever its format
# ----------------------------------------------------------------------------------


def _read(path: Path, report: Callable[[str], None]) -> _Table:
    npz_file.check_file(path)
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror or error}") from error
    if head.startswith(b"PK"):
        return _from_npz(path)
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return _through_cache(path, _hdf5_columns, report)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:1] in (b"%", b"@"):
        return _through_cache(path, _arff_columns, report)
    hint = ", it is compressed: unpack it first" if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")) else ""
    raise DataError(f"{path} is neither .npz nor HDF5 nor ARFF (it begins with {head[:8]!r}){hint}")


def _from_npz(path: Path) -> _Table:
    content = npz_file.read(path)
    width = len(content.feature_names) or len(FEATURES)
    order = _columns(content.feature_names or FEATURES, path)
    splits = {}
    for split, (x, y) in content.splits.items():
        suffix = "" if split is None else f"_{split}"
        if x.ndim != 2 or x.shape[1] != width:
            why = "one column per feature name" if content.feature_names else "the 16 features in the published order"
            raise DataError(f"{path}: X{suffix} has the shape {x.shape}; needed is (samples, {width}), {why}")
        labels = _mapped(y, content.class_names, f"{path}: y{suffix}")
        splits[split] = (x if order == list(range(width)) else x[:, order], labels)
    mean, scale = content.extra.get("train_mean"), content.extra.get("train_scale")
    if mean is None or scale is None:
        return _Table(content.name, splits)
    if len(splits) != 1 or not {None, "test"} & set(splits):
        raise DataError(
            f"{path} has train_mean and train_scale, which marks its rows as a test set of their own, but "
            "also the "
            f"splits {', '.join(map(str, splits))}; keep X and y alone, or drop the scaler"
        )
    if mean.shape != (width,) or scale.shape != mean.shape or not (scale > 0).all():
        raise DataError(
            f"{path}: train_mean {mean.shape} and train_scale {scale.shape} need one number per feature, "
            "and every "
            "scale above 0"
        )
    return _Table(content.name, splits, Scaler(tuple(mean[order].tolist()), tuple(scale[order].tolist())))


def _mapped(y: Array, class_names: Sequence[str], what: str) -> Array:
    """Labels of a file as positions in CLASSES, by the names of the classes."""
    if y.dtype.kind in "US":
        return by_name(np.array([_plain(t) for t in y.astype(str).reshape(-1).tolist()]), CLASSES, what)
    if not class_names:
        raise DataError(
            f"{what} holds numbers, and the file has no class_names to say which class each number is; "
            "OpenML counts "
            f"g, q, t, w, z, other files g, q, w, z, t. Add the array class_names; {one_of(CLASSES)}"
        )
    names = [_plain(name) for name in class_names]
    if sorted(names) != sorted(CLASSES):
        raise DataError(
            f"{what}: class_names are {', '.join(names)}; needed are these five, in any order: g, q, w, z, t"
        )
    if y.ndim == 2 and y.shape[1] == len(names):
        return _one_hot(y, names, what)
    if y.ndim != 1 or y.dtype.kind not in "iu" or not len(y) or y.min() < 0 or y.max() >= len(names):
        span = f" from {y.min()} to {y.max()}" if y.size and y.dtype.kind in "iuf" else ""
        raise DataError(f"{what} is {y.dtype} {y.shape}{span}; needed are integers from 0 to 4, or one-hot rows")
    return _positions(names)[y]


def _one_hot(rows: Array, names: Sequence[str], what: str) -> Array:
    wrong = ((rows != 0) & (rows != 1)).any(axis=1) | (rows.sum(axis=1) != 1)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(f"{what}: row {row} is not one-hot: {rows[row].tolist()} for the classes {', '.join(names)}")
    chosen: Array = np.argmax(rows, axis=1)
    return _positions(names)[chosen]


def _positions(names: Sequence[str]) -> Array:
    return np.array([CLASSES.index(name) for name in names], dtype=np.int64)


def _plain(name: str) -> str:
    """A feature's or class's name as we write it: without quotes and CERNBox's ``j_``."""
    return name.strip().strip("'\"").strip().removeprefix("j_")


def _columns(names: Sequence[str], path: Path) -> list[int]:
    """Where each of FEATURES stands among `names`."""
    position = {_plain(name): index for index, name in enumerate(names)}
    missing = [feature for feature in FEATURES if feature not in position]
    if missing:
        there = ", ".join(names[:30]) or "no names"
        raise DataError(
            f"{path} lacks the feature {missing[0]!r}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}; it has {there}"
        )
    return [position[feature] for feature in FEATURES]


# -- ARFF and HDF5: parsed once, then kept as .npz
# --------------------------------------------------------------------

Columns = Callable[[Path], tuple[Array, Array]]
"""A reader: (features (samples, 16) float32 in the order of FEATURES, labels (samples,) as positions in
CLASSES)."""


def _through_cache(path: Path, columns: Columns, report: Callable[[str], None]) -> _Table:
    stat = path.stat()
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{READER_VERSION}"
    kept = cache_dir() / "parsed" / f"jsc-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if kept.is_file():
        try:
            return _from_npz(kept)
        except DataError as error:
            report(f"reading {path} again, because what was kept of it is broken ({error})")
    report(f"reading {path} ({stat.st_size / 1e6:.0f} MB); the next start will be faster")
    x, y = columns(path)
    name = PUBLISHED.get(len(x), f"jsc ({path.stem})")
    _keep(kept, report, X=x, y=y.astype(np.uint8), feature_names=FEATURES, class_names=CLASSES, name=name)
    return _Table(name, {None: (x, y)})


def _keep(target: Path, report: Callable[[str], None], **arrays: Any) -> None:
    """Write atomically: under a name of its own first, so that processes started together never meet."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, own = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                np.savez(file, **arrays)
            Path(own).replace(target)  # atomic
        finally:
            Path(own).unlink(missing_ok=True)
    except OSError as error:
        report(
            f"what was read cannot be kept in {target.parent} ({error.strerror or error}); next time it is read again"
        )


def _hdf5_columns(path: Path) -> tuple[Array, Array]:
    h5py = require("h5py", "hdf5", f"reading {path}")
    wanted_labels = [f"j_{c}" for c in CLASSES]
    try:
        with h5py.File(path, "r") as file:
            if HDF5_TABLE not in file:
                raise DataError(f"{path} has no table {HDF5_TABLE!r}; it has {', '.join(file) or 'nothing'}")
            table = file[HDF5_TABLE]
            names = list(getattr(table.dtype, "names", None) or ())
            spelled = [names[index] for index in _columns(names, path)]
            lacking = [label for label in wanted_labels if label not in names]
            if lacking:
                raise DataError(f"{path} lacks the label column {lacking[0]!r}; {one_of(wanted_labels)}, one-hot")
            rows = table.fields([*spelled, *wanted_labels])[()]
    except OSError as error:
        raise DataError(f"{path} cannot be read as HDF5: {error}; the file may be cut short, get it again") from error
    x = np.stack([rows[name] for name in spelled], axis=1).astype(np.float32)
    one_hot = np.stack([rows[label] for label in wanted_labels], axis=1)
    return x, _one_hot(one_hot, CLASSES, str(path))


CHUNK_BYTES = 1 << 24


def _arff_columns(path: Path) -> tuple[Array, Array]:
    with path.open("rb") as file:
        names, label, line = _arff_header(file, path)
        order = _columns(names, path)
        # Classes are single letters that no number contains, so one byte-for-byte table turns labels into
        # their class index and line ends into separators, and numpy's own parser reads the rest at full
        # speed.
        codes = {ord(c): ord("0") + i for i, c in enumerate(CLASSES)} | {ord("\n"): ord(",")}
        translation = bytes(codes.get(byte, byte) for byte in range(256))
        xs, ys = [], []
        for first_line, chunk in _whole_lines(file, line):
            rows = chunk.count(b"\n")
            numbers = chunk.translate(translation, b"\r'\" \t").rstrip(b",")
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", DeprecationWarning)  # how numpy reports text that is no number
                    flat = np.fromstring(numbers.decode("ascii"), sep=",", dtype=np.float64)
                values = flat.reshape(rows, len(names))
            except (ValueError, DeprecationWarning) as error:
                raise _bad_line(chunk, first_line, names, label, path) from error
            codes_found = values[:, label]
            if not np.isin(codes_found, np.arange(len(CLASSES))).all():
                raise _bad_line(chunk, first_line, names, label, path)
            xs.append(values[:, order].astype(np.float32))
            ys.append(codes_found.astype(np.int64))
    if not xs:
        raise DataError(f"{path} has no rows after @DATA; the file may be cut short, get it again")
    return np.concatenate(xs), np.concatenate(ys)


ATTRIBUTE = re.compile(r"""@attribute\s+('[^']*'|"[^"]*"|\S+)\s+(.+)""", re.IGNORECASE)


def _arff_header(file: io.BufferedReader, path: Path) -> tuple[list[str], int, int]:
    """(names of all attributes, which of them is the class, number of the last line of the header)."""
    names: list[str] = []
    labels: list[int] = []
    for number, raw in enumerate(file, start=1):
        text = raw.decode("utf-8-sig", errors="replace").strip()
        if text.lower().startswith("@data"):
            if len(labels) != 1:
                raise DataError(
                    f"{path} declares {len(labels)} attributes with the classes g, q, w, z, t; needed is "
                    "one, e.g. "
                    "@ATTRIBUTE class {g, q, t, w, z}"
                )
            return names, labels[0], number
        match = ATTRIBUTE.match(text)
        if match:
            kind = match[2].strip()
            if kind.startswith("{"):
                values = [_plain(value) for value in kind.strip("{} ").split(",")]
                if sorted(values) != sorted(CLASSES):
                    raise DataError(
                        f"{path}:{number}: the attribute {match[1]} has the values {', '.join(values)}; "
                        "needed are "
                        "the classes g, q, w, z, t"
                    )
                labels.append(len(names))
            names.append(_plain(match[1]))
    raise DataError(f"{path} has no @DATA line; the file may be cut short, get it again")


def _whole_lines(file: io.BufferedReader, line: int) -> Iterator[tuple[int, bytes]]:
    """(number of the first line, lines) in chunks; blank lines and comments are dropped."""
    rest = b""
    while chunk := file.read(CHUNK_BYTES):
        whole, newline, rest = (rest + chunk).rpartition(b"\n")
        if newline:
            yield line + 1, _rows_only(whole + newline)
            line += whole.count(b"\n") + 1
    if rest.strip():
        yield line + 1, _rows_only(rest + b"\n")


def _rows_only(lines: bytes) -> bytes:
    lines = lines.replace(b"\r", b"")
    if b"%" not in lines and b"\n\n" not in lines and not lines.startswith(b"\n"):
        return lines
    kept = [row for row in lines.split(b"\n") if row.strip() and not row.lstrip().startswith(b"%")]
    return b"\n".join([*kept, b""])


def _bad_line(chunk: bytes, first_line: int, names: Sequence[str], label: int, path: Path) -> DataError:
    """The error for the first line of `chunk` that is not one number per attribute and one class."""
    for number, raw in enumerate(chunk.decode("utf-8", errors="replace").splitlines(), start=first_line):
        cells = raw.split(",")
        if len(cells) != len(names):
            return DataError(f"{path}: about line {number}: {len(cells)} values; needed are {len(names)}: {raw[:80]!r}")
        for index, cell in enumerate(cells):
            if index == label:
                if _plain(cell) not in CLASSES:
                    return DataError(f"{path}: about line {number}: the class is {cell!r}; {one_of(CLASSES)}")
                continue
            try:
                float(cell.strip().strip("'\""))
            except ValueError:
                return DataError(
                    f"{path}: about line {number}: {names[index]} is {cell.strip()!r}, which is not a number"
                )
    return DataError(f"{path}: the lines from {first_line} on cannot be read as numbers")
