"""The columns of the jet substructure data: its features and classes, which a file is searched for by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bitfront.data.labels import indices_by_name
from bitfront.data.raw import Array, as_text
from bitfront.errors import DataError, one_of

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


def plain_name(name: str) -> str:
    """A feature's or class's name as Bitfront writes it: without quotes and without CERNBox's ``j_``."""
    return name.strip().strip("'\"").strip().removeprefix("j_")


def feature_columns(names: Sequence[str], path: Path) -> list[int]:
    """For each of FEATURES its position among `names`, the columns of the file at `path`.

    Raises:
        DataError: a feature is missing.
    """
    position = {plain_name(name): index for index, name in enumerate(names)}
    missing = [feature for feature in FEATURES if feature not in position]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"{path} lacks the feature {missing[0]!r}{more}; it has {', '.join(names[:30]) or 'no names'}")
    return [position[feature] for feature in FEATURES]


def class_positions(y: Array, class_names: Sequence[str], what: str) -> Array:
    """The labels of a file as int64 positions in CLASSES, shape (samples,), by the names of the classes.

    Args:
        y: class names, integers, or one-hot rows, as they stand in the file.
        class_names: the file's names of the classes, by index; empty where it has none.
        what: how messages name the labels.

    Raises:
        DataError: the classes have no names or other names, or a label is not one of them.
    """
    if y.dtype.kind in "US":
        texts = np.array([plain_name(text) for text in as_text(y).reshape(-1).tolist()])
        return indices_by_name(texts, CLASSES, what)
    if not class_names:
        raise DataError(
            f"{what} holds numbers, and the file has no class_names to say which class each number is; OpenML counts "
            f"g, q, t, w, z, other files g, q, w, z, t. Add the array class_names; {one_of(CLASSES)}"
        )
    names = [plain_name(name) for name in class_names]
    if sorted(names) != sorted(CLASSES):
        raise DataError(
            f"{what}: class_names are {', '.join(names)}; needed are these five, in any order: g, q, w, z, t"
        )
    if y.ndim == 2 and y.shape[1] == len(names):
        return one_hot_positions(y, names, what)
    if y.ndim != 1 or y.dtype.kind not in "iu" or not len(y) or y.min() < 0 or y.max() >= len(names):
        span = f" from {y.min()} to {y.max()}" if y.size and y.dtype.kind in "iuf" else ""
        raise DataError(f"{what} is {y.dtype} {y.shape}{span}; needed are integers from 0 to 4, or one-hot rows")
    return _positions(names)[y]


def one_hot_positions(rows: Array, names: Sequence[str], what: str) -> Array:
    """One-hot `rows`, shape (samples, 5), as int64 positions in CLASSES; `names` are the classes of the columns.

    Raises:
        DataError: a row is not one-hot.
    """
    wrong = ((rows != 0) & (rows != 1)).any(axis=1) | (rows.sum(axis=1) != 1)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(f"{what}: row {row} is not one-hot: {rows[row].tolist()} for the classes {', '.join(names)}")
    column: Array = np.argmax(rows, axis=1)
    return _positions(names)[column]


def _positions(names: Sequence[str]) -> Array:
    return np.array([CLASSES.index(name) for name in names], dtype=np.int64)
