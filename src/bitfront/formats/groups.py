"""Groups: neighbours along the input dimension of a weight that share a scale.

The input dimension is dimension 1 of a matrix or a filter. A group of a convolution is some input channels with all
their positions in the kernel. Of a vector, groups lie along its only dimension. The last group may be short.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitfront.formats.base import PERCENTILE, FormatError, FormatParameter, Operand
from bitfront.formats.scales import is_weight

#: Longest group that a parameter allows.
LONGEST = 4096


def size_parameter(meaning: str, default: int | None) -> FormatParameter:
    """The parameter ``group_size``."""
    words = ("NA",) if default is None else ()
    return FormatParameter(meaning, default=default, low=1, high=LONGEST, words=words)


def check_operand(operand: Operand, parameter: str) -> None:
    """Raises FormatError, of `parameter`, for an operand that has no groups."""
    if not is_weight(operand):
        called = "a weight that depends on the samples" if operand == "factor" else operand
        raise FormatError(f"groups are for weights that are parameters, not for {called}", parameter)


def block_of(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The block of a grid with a scale per group, for a tensor or for its scales, of this shape."""
    return (1, size) if len(shape) > 1 else (size,)


def groups_of(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The shape of the scales of a tensor of this shape: (rows, groups), of a vector (groups,)."""
    *rows, inputs = shape[:2] or (1,)
    return *rows, -(-inputs // size)


def grouped(x: Tensor, size: int) -> Tensor:
    """The values of each group, shape (\\*groups_of(shape), values), float64; NaN where the last group has none."""
    shape = groups_of(tuple(x.shape), size)
    values = x.detach().double().reshape(*(x.shape[:2] or (1,)), math.prod(x.shape[2:]))
    inputs, each = values.shape[-2:]
    missing = shape[-1] * size - inputs
    if missing:
        values = torch.cat([values, values.new_full((*values.shape[:-2], missing, each), math.nan)], dim=-2)
    return values.reshape(*shape, size * each)


def known(values: Tensor) -> Tensor:
    """`values`, with 0 for those that are not finite. A group has a 0 anyway: every format with groups holds it."""
    return torch.where(values.isfinite(), values, torch.zeros_like(values))


def percentile_ends(values: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of groups, cut as ``base.percentile_range`` cuts those of a tensor.

    Args:
        values: as ``grouped`` gives them.
        low, high: the ends of each group.
    """
    finite = values.isfinite()
    size = torch.where(finite, values.abs(), torch.full_like(values, math.inf)).sort(dim=-1).values
    last = (torch.ceil(PERCENTILE * finite.sum(dim=-1, keepdim=True)).long() - 1).clamp(min=0)
    reach = size.gather(-1, last).squeeze(-1)
    reach = torch.where(reach == 0, torch.full_like(reach, math.inf), reach)
    return torch.maximum(low, -reach), torch.minimum(high, reach)
