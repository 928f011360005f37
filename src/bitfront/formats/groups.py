"""Groups: neighbours along the input dimension of a weight that share a scale.

The input dimension is the one along which products are summed: dimension 1 of the weight of a Linear or a convolution.
A group of a convolution is some input channels with all their positions in the kernel. Of a vector, groups lie along
its only dimension. The last group may be short.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitfront.formats.base import FormatError, FormatParameter, OperandKind, dimension
from bitfront.formats.grid import WHOLE

#: Longest group that a parameter allows.
LONGEST = 4096


def size_parameter(meaning: str, default: int | None) -> FormatParameter:
    """The parameter ``group_size``."""
    words = ("NA",) if default is None else ()
    return FormatParameter(meaning, default=default, low=1, high=LONGEST, words=words)


def check_kind(kind: OperandKind, parameter: str) -> None:
    """Raises FormatError, of `parameter`, for an operand that has no groups."""
    if not kind.stored_weight:
        raise FormatError(f"groups are for weights that are parameters, not for {kind}", parameter)
    if kind.channel_axis is None:
        raise FormatError("groups are for weights that have output channels", parameter)


def dimensions(rank: int, axis: int, summed: int | None) -> tuple[int, int]:
    """(the dimension of the rows, that of the inputs) of a tensor of this rank; of a vector (0, 0).

    Args:
        axis: that of the output channels, as in ``OperandKind``.
        summed: that of the sums; None: dimension 1.
    """
    if rank < 2:
        return 0, 0
    rows, inputs = dimension(axis, rank), dimension(1 if summed is None else summed, rank)
    if rows is None or inputs is None or rows == inputs:
        raise FormatError(f"groups need a tensor with dimensions {axis} and {summed}; this one has {rank}")
    return rows, inputs


def block_of(rank: int, size: int, rows: int, inputs: int) -> tuple[int, ...]:
    """The block of a grid with a scale per group, for a tensor of this rank and the dimensions of its rows and
    inputs."""
    if rank < 2:
        return (size,)
    return tuple(1 if d == rows else size if d == inputs else WHOLE for d in range(max(rows, inputs) + 1))


def number_of_groups(shape: tuple[int, ...], size: int, axis: int, summed: int | None) -> int:
    """How many groups a tensor of this shape has; axes as in ``dimensions``."""
    if len(shape) < 2:
        return -(-(shape or (1,))[0] // size)
    rows, inputs = dimensions(len(shape), axis, summed)
    return shape[rows] * -(-shape[inputs] // size)


def grouped(x: Tensor, size: int, rows: int, inputs: int) -> Tensor:
    """The values of each group, float64, shape (rows, groups, values), of a vector (groups, values); NaN where the last
    group has none."""
    x = x.detach().double()
    x = x.movedim((rows, inputs), (0, 1)) if x.dim() > 1 else x
    values = x.reshape(*(x.shape[:2] or (1,)), math.prod(x.shape[2:]))
    number, each = values.shape[-2:]
    groups = -(-number // size)
    missing = groups * size - number
    if missing:
        values = torch.cat([values, values.new_full((*values.shape[:-2], missing, each), math.nan)], dim=-2)
    return values.reshape(*values.shape[:-2], groups, size * each)


def laid(per_group: Tensor, rows: int, inputs: int) -> Tensor:
    """What a group has, shape (rows, groups) or (groups,), as the entry of a grid: along dimensions of the tensor."""
    if per_group.dim() < 2:
        return per_group
    shape = [1] * (max(rows, inputs) + 1)
    shape[rows], shape[inputs] = per_group.shape
    return (per_group if rows < inputs else per_group.T).reshape(shape)


def known(values: Tensor) -> Tensor:
    """`values`, with 0 for those that are not finite. A group has a 0 anyway: every format with groups holds it."""
    return torch.where(values.isfinite(), values, torch.zeros_like(values))
