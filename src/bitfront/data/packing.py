"""Several inputs by name, packed into one tensor: one row of numbers per sample.

Everything that handles samples (splits, batches, fingerprints, worker processes) then handles one tensor. A model gets
its inputs back by name, with their shapes and dtypes (``tasks/adapting.py``). float64 holds every float32, and every
integer up to 2^53, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitfront.data.raw import Array, ArrayLike, array_name, to_numpy
from bitfront.errors import DataError

_EXACT = 2**53


@dataclass(frozen=True)
class PackedInput:
    """One input of a model, in the rows of a packed tensor.

    Attributes:
        name: the argument of the model's ``forward``.
        shape: of one sample.
        dtype: int64, bool or float32: what the model gets.
        start: the first column of it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def stop(self) -> int:
        """The column behind the last one."""
        return self.start + math.prod(self.shape)

    def unpacked(self, packed: Tensor) -> Tensor:
        """This input of some samples, shape ``(samples, *shape)``, from packed rows."""
        return packed[:, self.start : self.stop].to(self.dtype).reshape(-1, *self.shape)


def packed(
    features: Mapping[str | None, Mapping[str, ArrayLike]],
) -> tuple[dict[str | None, Array], tuple[PackedInput, ...]]:
    """(float64 rows by split, shape (samples, columns); what they hold).

    Args:
        features: split, or None where samples are not split yet → name → array, shape (samples, ...). Integers stay
            integers, except for uint8, which is divided by 255.

    Raises:
        DataError: names, shapes or dtypes differ between splits, or a value is no finite number.
    """
    arrays = {
        split: {str(name): _numbers(given, f"{array_name('x', split)}, {name}") for name, given in of.items()}
        for split, of in features.items()
    }
    (first_split, first), *_ = arrays.items()
    if not first:
        raise DataError("x is an empty mapping; give one array per argument of the model's forward, by its name")
    for split, of in arrays.items():
        if {n: (a.shape[1:], a.dtype) for n, a in of.items()} != {n: (a.shape[1:], a.dtype) for n, a in first.items()}:
            raise DataError(
                f"the inputs of {split} are {_described(of)}, those of {first_split} are {_described(first)}; every "
                "split needs the same"
            )
        if len({len(a) for a in of.values()}) > 1:
            raise DataError(f"the inputs {_described(of)} have different numbers of samples; they must be equal")
    layout, start = [], 0
    for name, array in first.items():
        layout.append(PackedInput(name, tuple(array.shape[1:]), torch.from_numpy(array[:1]).dtype, start))
        start = layout[-1].stop
    return {split: _rows([of[name] for name in first]) for split, of in arrays.items()}, tuple(layout)


def _rows(arrays: Sequence[Array]) -> Array:
    return np.concatenate([a.reshape(len(a), -1).astype(np.float64) for a in arrays], axis=1)


def _described(arrays: Mapping[str, Array]) -> str:
    return ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())


def _numbers(given: ArrayLike, what: str) -> Array:
    array = to_numpy(given, what)
    if array.dtype.kind not in "fiub" or array.ndim < 1 or 0 in array.shape:
        raise DataError(f"{what} is {array.dtype} of shape {array.shape}; needed are numbers (samples, ...)")
    if array.dtype == np.uint8:
        return array.astype(np.float32) / np.float32(255)
    if array.dtype.kind == "b":
        return array
    if array.dtype.kind in "iu":
        if int(np.abs(array).max()) > _EXACT:
            raise DataError(f"{what} has {int(np.abs(array).max()):,}; integers of inputs may go up to {_EXACT:,}")
        return array.astype(np.int64)
    with np.errstate(over="ignore"):
        single = array.astype(np.float32)
    if not np.isfinite(single).all():
        raise DataError(f"{what} has values that are not finite, or do not fit into float32")
    return single
