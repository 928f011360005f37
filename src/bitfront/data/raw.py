"""Arrays as a user gives them: numpy arrays, torch tensors, or anything that numpy can read as an array."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from bitfront.errors import DataError

Array: TypeAlias = npt.NDArray[Any]
ArrayLike: TypeAlias = Any
"""A numpy array, a torch tensor, or anything numpy can read as one."""


def to_numpy(value: ArrayLike, what: str) -> Array:
    """`value` as a numpy array on the CPU, without a copy where possible; bfloat16 becomes float32.

    Raises:
        DataError: numpy cannot read it; the message calls it `what`.
    """
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:
        raise DataError(f"{what} cannot be read as an array: {error}") from error


def array_name(array: str, split: str | None) -> str:
    """How messages name an array: ``"x of train"``, or ``"x"`` where there are no splits yet."""
    return array if split is None else f"{array} of {split}"
