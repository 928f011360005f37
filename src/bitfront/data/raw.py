"""Arrays as a user gives them: numpy arrays, torch tensors, or anything that numpy can read as an array."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from bitfront.errors import DataError, parsing

Array: TypeAlias = npt.NDArray[Any]
ArrayLike: TypeAlias = Any
"""A numpy array, a torch tensor, or anything numpy can read as one."""


def to_numpy(value: ArrayLike, what: str) -> Array:
    """`value` as a numpy array on the CPU, without a copy where possible; bfloat16 becomes float32.

    Raises:
        DataError: numpy cannot read it; the message calls it `what`.
    """
    with parsing(DataError, f"{what} cannot be read as an array", "give plain numbers, or text"):
        if isinstance(value, torch.Tensor):
            tensor = value.detach().cpu()
            return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        array = np.asarray(value)
    return _texts(array) if array.dtype.kind == "O" else array


def as_text(array: Array) -> Array:
    """An array of texts, bytes or numbers as one of texts; bytes are UTF-8."""
    return np.char.decode(array, "utf-8", "replace") if array.dtype.kind == "S" else array.astype(str)


def _texts(array: Array) -> Array:
    """An array of Python texts, as pandas gives columns of words, as one of NumPy's; any other one as it is."""
    items = array.reshape(-1).tolist()
    if items and all(isinstance(item, str) for item in items):
        return array.astype(str)
    if items and all(isinstance(item, bytes) for item in items):
        return as_text(array.astype(bytes))
    whole = bool(items) and all(isinstance(item, int) and abs(item) < 2**63 for item in items)
    return array.astype(np.int64) if whole else array


def array_name(array: str, split: str | None) -> str:
    """How messages name an array: ``"x of train"``, or ``"x"`` where there are no splits yet."""
    return array if split is None else f"{array} of {split}"
