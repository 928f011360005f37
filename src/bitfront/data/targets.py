"""What the targets of samples are: classes, numbers, labels, masks, tokens; how they are read from arrays, and checked.

A task (``bitfront.tasks``) says which of these its targets are. Data without labels has none until the float model is
known, whose outputs are then the targets. To add a kind, write a record here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bitfront.data.labels import class_indices
from bitfront.data.raw import Array, ArrayLike, array_name, to_numpy
from bitfront.errors import DataError, nearest, one_of

#: The target of a pixel or a token that has none, as in ``torch.nn.CrossEntropyLoss``.
NO_LABEL = -100


@dataclass(frozen=True)
class Targets:
    """One kind of targets.

    Attributes:
        name: what messages call them.
        needed: their dtype and shape in a dataset, for messages.
        dtype, axes: their dtype and number of axes in a dataset, 0 for any; the first axis is the samples.
        read: (arrays by split as the user gave them, names of outputs or none) → (arrays by split, names of outputs).
            Raises DataError.
        wrong: (targets of a split, number of names) → what they have and what is needed; empty if nothing is wrong.
        stratified: whether a split keeps the shares of classes.
        of_tokens: whether the features are ids of tokens too, which stay whole numbers.
        given: whether the data must have them. If not, they are the outputs of the float model, and until it is known
            there are none: ``(samples, 0)``.
        with_features: whether the features are part of the targets: those of an autoencoder.
    """

    name: str
    needed: str
    dtype: torch.dtype
    axes: int
    read: Callable[[Mapping[str | None, ArrayLike], Sequence[str]], tuple[dict[str | None, Array], tuple[str, ...]]]
    wrong: Callable[[Tensor, int], str]
    stratified: bool = False
    of_tokens: bool = False
    given: bool = True
    with_features: bool = False

    def __reduce__(self) -> tuple[Callable[[str], Targets], tuple[str]]:
        # Datasets travel to worker processes; there it is the same record again.
        return targets_named, (self.name,)


def targets_named(kind: Targets | str) -> Targets:
    """The kind of targets with a name; a record is itself. Raises DataError."""
    if isinstance(kind, Targets):
        return kind
    known = {one.name: one for one in KINDS}
    if kind not in known:
        raise DataError(f"there are no targets called {kind!r}; {one_of(known)}.{nearest(str(kind), list(known))}")
    return known[kind]


def _read_classes(
    labels: Mapping[str | None, ArrayLike], names: Sequence[str]
) -> tuple[dict[str | None, Array], tuple[str, ...]]:
    return class_indices(labels, names)  # type: ignore[arg-type, return-value]


def _wrong_classes(y: Tensor, names: int) -> str:
    if len(y) and int(y.min()) >= 0 and int(y.max()) < names:
        return ""
    span = f"labels from {int(y.min())} to {int(y.max())}" if len(y) else "no sample"
    return f"{span}; needed are labels from 0 to {names - 1}, one per class name"


def _each(targets: Mapping[str | None, ArrayLike], read: Callable[[Array, str], Array]) -> dict[str | None, Array]:
    """What `read` makes of the targets of each split, given its array and what an error calls it."""
    named = {split: array_name("y", split) for split in targets}
    return {split: read(to_numpy(given, named[split]), named[split]) for split, given in targets.items()}


def _read_numbers(
    targets: Mapping[str | None, ArrayLike], names: Sequence[str]
) -> tuple[dict[str | None, Array], tuple[str, ...]]:
    """float32, shape (samples, outputs), from (samples,) or (samples, outputs)."""
    read = _each(targets, _numbers)
    return read, _names_of_columns(read, names, "outputs")


def _numbers(y: Array, what: str) -> Array:
    if y.dtype.kind not in "fiub":
        raise DataError(f"{what} has the dtype {y.dtype}; a regression needs real numbers")
    if y.ndim not in (1, 2) or 0 in y.shape:
        raise DataError(f"{what} has the shape {y.shape}; needed are numbers (samples,) or (samples, outputs)")
    column = y.reshape(len(y), -1)
    finite = np.isfinite(column) & (np.abs(column.astype(np.float64)) <= np.finfo(np.float32).max)
    if not finite.all():
        row = int(np.flatnonzero(~finite.all(axis=1))[0])
        raise DataError(
            f"{what} is {column[row].tolist()} in row {row}; only finite numbers that fit into float32 are "
            "allowed: drop the row, or rescale the targets"
        )
    return column.astype(np.float32)


def _wrong_numbers(y: Tensor, names: int) -> str:
    if y.shape[1] != names:
        return f"{y.shape[1]} numbers per sample and {names} names of outputs; needed is one name per number"
    if not len(y):
        return "no sample; needed is one or more"
    return "" if bool(y.isfinite().all()) else "values that are not finite; needed are finite ones"


def _read_labels(
    targets: Mapping[str | None, ArrayLike], names: Sequence[str]
) -> tuple[dict[str | None, Array], tuple[str, ...]]:
    """float32, shape (samples, labels), 1 where a sample has a label and 0 where not."""
    read = _each(targets, _zeros_and_ones)
    return read, _names_of_columns(read, names, "labels")


def _zeros_and_ones(y: Array, what: str) -> Array:
    if y.dtype.kind not in "fiub" or y.ndim != 2 or 0 in y.shape:
        raise DataError(
            f"{what} is {y.dtype} of shape {y.shape}; needed are numbers (samples, labels), 1 where a sample has a "
            "label and 0 where not"
        )
    wrong = ((y != 0) & (y != 1)).any(axis=1)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(f"{what} is {y[row].tolist()} in row {row}; allowed: 1 for a label, 0 for none")
    return y.astype(np.float32)


def _names_of_columns(read: Mapping[str | None, Array], names: Sequence[str], what: str) -> tuple[str, ...]:
    """The names of the columns of targets. Raises DataError where splits differ in their number, or names do."""
    widths = {split: y.shape[1] for split, y in read.items()}
    if len(set(widths.values())) > 1:
        given = ", ".join(f"{array_name('y', split)} {width}" for split, width in widths.items())
        raise DataError(f"targets differ in their number of {what} ({given}); every split needs the same")
    width = next(iter(widths.values()))
    if names and len(names) != width:
        raise DataError(f"there are {len(names)} names for {width} {what}; give one for each, or none")
    return tuple(map(str, names or range(width)))


def _wrong_labels(y: Tensor, names: int) -> str:
    if y.shape[1] != names:
        return f"{y.shape[1]} labels and {names} names of labels; needed is one name per label"
    if not len(y):
        return "no sample; needed is one or more"
    return "" if bool(((y == 0) | (y == 1)).all()) else "values other than 0 and 1; needed are these"


def _read_masks(
    targets: Mapping[str | None, ArrayLike], names: Sequence[str]
) -> tuple[dict[str | None, Array], tuple[str, ...]]:
    """int64, shape (samples, height, width): the class of each pixel, ``NO_LABEL`` for one without."""
    read = _each(targets, _masks)
    count = max(2, *(int(y.max()) + 1 for y in read.values()))
    if names and len(names) < count:
        raise DataError(f"there are {len(names)} class names, and classes go up to {count - 1}; give one for each")
    for split, y in read.items():
        if wrong := _wrong_indices(torch.from_numpy(y), len(names) or count):
            raise DataError(f"{array_name('y', split)} has {wrong}")
    return read, tuple(map(str, names or range(count)))


def _masks(y: Array, what: str) -> Array:
    if y.ndim == 4 and 1 in (y.shape[1], y.shape[3]):
        y = y[:, 0] if y.shape[1] == 1 else y[..., 0]
    if y.dtype.kind not in "iub" or y.ndim != 3 or 0 in y.shape:
        raise DataError(
            f"{what} is {y.dtype} of shape {y.shape}; needed are whole numbers (samples, height, width): the class "
            f"of each pixel from 0, and 255 or {NO_LABEL} for a pixel without a label"
        )
    return np.where((y == 255) | (y == NO_LABEL), NO_LABEL, y.astype(np.int64))


def _wrong_indices(y: Tensor, names: int) -> str:
    if not y.numel():
        return "no value; needed is one or more"
    least, most = int(torch.where(y == NO_LABEL, 0, y).min()), int(y.max())
    if least >= 0 and most < names:
        return "no value with a label; needed is one or more" if most < 0 else ""
    return f"values from {least} to {most}; needed are 0 to {names - 1}, one per class name, or {NO_LABEL} for none"


def _read_tokens(
    targets: Mapping[str | None, ArrayLike], names: Sequence[str]
) -> tuple[dict[str | None, Array], tuple[str, ...]]:
    """int64, shape (samples, tokens): the token that is asked for at each place, ``NO_LABEL`` where none is."""
    read = {split: token_ids(given, array_name("y", split), least=NO_LABEL) for split, given in targets.items()}
    for split, y in read.items():
        if y.ndim != 2:
            raise DataError(f"{array_name('y', split)} has the shape {y.shape}; needed is (samples, tokens)")
        if wrong := _wrong_indices(torch.from_numpy(y), len(names) or int(y.max()) + 1):
            raise DataError(f"{array_name('y', split)} has {wrong}")
    return read, tuple(map(str, names or range(max(2, *(int(y.max()) + 1 for y in read.values())))))


def token_ids(given: ArrayLike, what: str, least: int = 0) -> Array:
    """Ids of tokens as int64, shape (samples, ...). Raises DataError where they are no integers from `least` up."""
    ids = to_numpy(given, what)
    if ids.dtype.kind not in "iu" or ids.ndim < 2 or 0 in ids.shape:
        raise DataError(
            f"{what} is {ids.dtype} of shape {ids.shape}; needed are ids of tokens: integers (samples, tokens)"
        )
    if int(ids.min()) < least:
        raise DataError(f"{what} has the id {int(ids.min())}; needed are integers from {least}")
    return ids.astype(np.int64)


def _read_outputs(
    targets: Mapping[str | None, ArrayLike], names: Sequence[str]
) -> tuple[dict[str | None, Array], tuple[str, ...]]:
    """Nothing is read: there are no targets yet."""
    return dict(targets), tuple(map(str, names))


def _wrong_outputs(y: Tensor, names: int) -> str:  # noqa: ARG001
    if not len(y):
        return "no sample; needed is one or more"
    return "" if bool(y.isfinite().all()) else "outputs that are not finite; needed are finite ones"


def _read_anomalies(
    targets: Mapping[str | None, ArrayLike], names: Sequence[str]
) -> tuple[dict[str | None, Array], tuple[str, ...]]:
    """int64, shape (samples,): 0 for a normal sample and 1 for an anomaly. The dataset joins the features to them."""
    if len(names) not in (0, 2):
        raise DataError(f"there are {len(names)} class names; needed are two, of normal samples and of anomalies")
    return _each(targets, _flags), tuple(map(str, names or ("normal", "anomalous")))


def _flags(y: Array, what: str) -> Array:
    flags = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if flags.dtype.kind not in "fiub" or flags.ndim != 1 or not len(flags):
        raise DataError(
            f"{what} is {y.dtype} of shape {y.shape}; needed are numbers (samples,), 0 for a normal sample and 1 for "
            "an anomaly"
        )
    wrong = np.flatnonzero((flags != 0) & (flags != 1))
    if len(wrong):
        raise DataError(f"{what} is {flags[wrong[0]]} in row {wrong[0]}; allowed: 0 for normal, 1 for an anomaly")
    return flags.astype(np.int64)


def with_features(flags: Array, x: Array) -> Array:
    """float32, shape (samples, 1 + features): whether each sample is an anomaly, then its features, flattened."""
    return np.concatenate([flags[:, None].astype(np.float32), x.reshape(len(x), -1)], axis=1)


def _wrong_anomalies(y: Tensor, names: int) -> str:  # noqa: ARG001
    if not len(y) or y.shape[1] < 2:
        return f"the shape {tuple(y.shape)}; needed are samples with one feature or more"
    if not bool(((y[:, 0] == 0) | (y[:, 0] == 1)).all()):
        return "a first column with other values than 0 and 1; needed are these"
    return "" if bool(y.isfinite().all()) else "values that are not finite; needed are finite ones"


CLASSES = Targets("classes", "int64 (samples,)", torch.int64, 1, _read_classes, _wrong_classes, stratified=True)
NUMBERS = Targets("numbers", "float32 (samples, outputs)", torch.float32, 2, _read_numbers, _wrong_numbers)
LABELS = Targets("labels", "float32 (samples, labels), 0 or 1", torch.float32, 2, _read_labels, _wrong_labels)
MASKS = Targets("masks", "int64 (samples, height, width)", torch.int64, 3, _read_masks, _wrong_indices)
TOKENS = Targets("tokens", "int64 (samples, tokens)", torch.int64, 2, _read_tokens, _wrong_indices, of_tokens=True)
ANOMALIES = Targets(
    "anomalies",
    "0 for a normal sample and 1 for an anomaly, (samples,); a dataset has the features behind them",
    torch.float32,
    2,
    _read_anomalies,
    _wrong_anomalies,
    stratified=True,
    with_features=True,
)
OUTPUTS = Targets(
    "outputs",
    "float32 (samples, ...), from the float model",
    torch.float32,
    0,
    _read_outputs,
    _wrong_outputs,
    given=False,
)
TOKEN_OUTPUTS = replace(OUTPUTS, name="outputs of tokens", of_tokens=True)
KINDS = (CLASSES, NUMBERS, LABELS, MASKS, TOKENS, ANOMALIES, OUTPUTS, TOKEN_OUTPUTS)
