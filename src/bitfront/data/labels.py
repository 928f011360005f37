"""Labels of any spelling (class indices, class names, one-hot rows) as class indices, with every check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bitfront.data.raw import Array, ArrayLike, array_name, as_text, to_numpy
from bitfront.errors import DataError, one_of

if TYPE_CHECKING:
    from bitfront.data.base import Split

#: More classes than this are taken for a mistake, such as identifiers given as labels.
MAX_CLASSES = 1_000_000


def class_indices(
    labels: Mapping[Split | None, ArrayLike], class_names: Sequence[str]
) -> tuple[dict[Split | None, Array], tuple[str, ...]]:
    """int64 class indices by split, shape (samples,), and the names of all classes.

    Args:
        labels: by split; under None where the samples are not split yet.
        class_names: by index; empty to take the names from the labels.

    Raises:
        DataError: a label is not a class, a class name is given twice, or there is only one class.
    """
    names = tuple(str(name) for name in class_names)
    if len(set(names)) != len(names):
        raise DataError(f"class_names gives a name twice: {', '.join(names)}; every class needs a different one")
    raw = {split: to_numpy(y, array_name("y", split)) for split, y in labels.items()}
    columns = {split: _one_column(y, array_name("y", split)) for split, y in raw.items()}
    _refuse_mixed(raw, columns)
    if any(y.dtype.kind in "US" for y in columns.values()):
        texts = {split: as_text(y) for split, y in columns.items()}
        names = names or tuple(np.unique(np.concatenate(list(texts.values()))).tolist())
        return {split: indices_by_name(y, names, array_name("y", split)) for split, y in texts.items()}, names
    indices = {split: _checked_indices(y, len(names), array_name("y", split)) for split, y in columns.items()}
    one_hot_widths = [y.shape[1] for y in raw.values() if y.ndim == 2]
    count = len(names) or max([*one_hot_widths, *(int(y.max()) + 1 for y in indices.values())])
    if count < 2:
        raise DataError("every label is the same; a classifier needs at least two classes")
    return indices, names or tuple(str(index) for index in range(count))


def _refuse_mixed(raw: Mapping[Split | None, Array], columns: Mapping[Split | None, Array]) -> None:
    """Raises DataError where one split has class names and another numbers, or one-hot rows are not equally wide."""
    texts = [split for split, y in columns.items() if y.dtype.kind in "US"]
    if texts and len(texts) < len(columns):
        given = ", ".join(f"{array_name('y', split)} {y.dtype}" for split, y in columns.items())
        raise DataError(
            f"the labels of some splits are names, those of others are numbers ({given}); which name is which number "
            "is not known. Give all splits names, or all of them class indices"
        )
    widths = {split: y.shape[1] for split, y in raw.items() if y.ndim == 2 and y.shape[1] > 1}
    if len(set(widths.values())) > 1:
        given = ", ".join(f"{array_name('y', split)} {width}" for split, width in widths.items())
        raise DataError(f"one-hot rows differ in their number of classes ({given}); every split needs the same")


def indices_by_name(labels: Array, names: Sequence[str], what: str) -> Array:
    """int64 positions in `names` of the texts `labels`, shape (samples,).

    Raises:
        DataError: a text is not among the names; the message calls the labels `what`.
    """
    distinct, inverse = np.unique(labels, return_inverse=True)
    position = {name: index for index, name in enumerate(names)}
    unknown = [str(label) for label in distinct if str(label) not in position]
    if unknown:
        raise DataError(f"{what} has the label {unknown[0]!r}; {one_of(names)}")
    return np.array([position[str(label)] for label in distinct], dtype=np.int64)[inverse.reshape(-1)]


def _one_column(y: Array, what: str) -> Array:
    """`y` as one value per sample; one-hot rows become indices."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim == 2 and y.dtype.kind in "fiub":
        wrong = ((y != 0) & (y != 1)).any(axis=1) | ((y == 1).sum(axis=1) != 1)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise DataError(
                f"{what} has the shape {y.shape}, and row {row} is not one-hot: {y[row].tolist()}; needed are class "
                "indices (samples,) or one-hot rows (samples, classes)"
            )
        indices: Array = np.argmax(y, axis=1)
        return indices
    if y.ndim != 1:
        raise DataError(
            f"{what} has the shape {y.shape}; needed are class indices (samples,) or one-hot rows (samples, classes)"
        )
    return y


def _checked_indices(y: Array, classes: int, what: str) -> Array:
    """`y` as int64; `classes` is the number of classes, or 0 where the labels decide it."""
    if y.dtype.kind not in "fiub":
        raise DataError(f"{what} has the dtype {y.dtype}; needed are integer class indices, or class names as text")
    if len(y) == 0:
        raise DataError(f"{what} is empty; every split needs at least one sample")
    if y.dtype.kind == "f":
        whole = np.isfinite(y) & (y == np.floor(y)) & (np.abs(y) < 2**31)
        if not whole.all():
            row = int(np.flatnonzero(~whole)[0])
            raise DataError(
                f"{what} is {y[row]} in row {row}, which is not a class index: labels of classes are "
                "integers from 0. For other tasks there is the key task, e.g. task = 'regression'"
            )
    allowed = f"allowed: 0 to {classes - 1}" if classes else "allowed: integers from 0"
    wrong = (y < 0) | (y >= classes) if classes else y < 0
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(f"{what} is {y[row]} in row {row}, which is not a class index; {allowed}")
    if not classes and y.max() > MAX_CLASSES:
        raise DataError(
            f"{what} goes up to {y.max()}, which would be {int(y.max()) + 1:,} classes; {allowed}, without gaps, and "
            f"at most {MAX_CLASSES:,}. Number the classes anew"
        )
    return y.astype(np.int64)
