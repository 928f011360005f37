"""Which part of its range an affine format covers: rules that look at the values, for many channels or groups at once.

Every rule takes rows of values. A row is a tensor, a channel or a group, and its result depends on no other row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitfront.formats.base import PERCENTILE

#: Parts of the full range that ``least_error`` is asked about, the largest first.
SHRINKS = tuple(i / 64 for i in range(64, 7, -1))
#: So many values are rounded at a time; fewer would be slower, and more would fill the memory.
TOGETHER = 1 << 19
#: After so many options it is looked at again which rows can still get better.
LOOK = 8
#: What is cut off may be smaller by so much than computed.
ROUNDING = 1e-9


def percentile_ends(values: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of rows, cut as ``base.percentile_range`` cuts those of a tensor.

    Args:
        values: shape (*rows, values); those that are not finite do not count.
        low, high: the ends of each row.
    """
    finite = values.isfinite()
    if bool(finite.all()):
        size = values.abs()
        reach = size.kthvalue(math.ceil(PERCENTILE * size.shape[-1]), dim=-1).values
    else:
        size = torch.where(finite, values.abs(), torch.full_like(values, math.inf)).sort(dim=-1).values
        last = (torch.ceil(PERCENTILE * finite.sum(dim=-1, keepdim=True)).long() - 1).clamp(min=0)
        reach = size.gather(-1, last).squeeze(-1)
    reach = torch.where(reach == 0, torch.full_like(reach, math.inf), reach)
    return torch.maximum(low, -reach), torch.minimum(high, reach)


def least_error(values: Tensor, scales: Tensor, zeros: Tensor, codes: tuple[int, int]) -> Tensor:
    """Per row the option with the smallest squared error, the first among equals.

    Options that cannot be best are not computed: what an option cuts off is cut off by the later ones too. Where that
    alone is a larger error than the smallest one so far, the later options of this row are left out.

    Args:
        values: float64, finite, shape (rows, values).
        scales, zeros: float64 and int64, shape (rows, options). The range of an option contains those of later ones, up
            to the rounding of its zero point.
        codes: the smallest and the largest code.

    Returns:
        Indices of options, int64, shape (rows,).
    """
    step = max(1, TOGETHER // max(1, values.shape[1]))
    parts = [slice(start, start + step) for start in range(0, len(values), step)]
    chosen = [_least_error(values[part], scales[part], zeros[part], codes) for part in parts]
    return torch.cat(chosen) if chosen else zeros.new_zeros(0)


def _least_error(values: Tensor, scales: Tensor, zeros: Tensor, codes: tuple[int, int]) -> Tensor:
    shifted = bool(zeros.any())
    best, chosen = torch.full_like(scales[:, 0], math.inf), torch.zeros_like(zeros[:, 0])
    rows, buffer = torch.arange(len(values), device=values.device), torch.empty_like(values)
    for option in range(scales.shape[1]):
        if option and option % LOOK == 0:
            least = _cut_off(values, scales[:, option], zeros, option, codes, buffer[: len(rows)])
            going = least * (1 - ROUNDING) <= best[rows]
            if not bool(going.all()):
                values, rows, scales, zeros = values[going], rows[going], scales[going], zeros[going]
            if not len(rows):
                break
        scale, zero = scales[:, option, None], zeros[:, option, None].to(values.dtype)
        # As Grid.round computes it.
        rounded = torch.mul(values, scale.reciprocal(), out=buffer[: len(rows)]).round_()
        if shifted:
            rounded.add_(zero).clamp_(*codes).sub_(zero)
        else:
            rounded.clamp_(*codes)
        error = _squared(torch.addcmul(values, rounded, scale, value=-1, out=rounded))
        less = error < best[rows]
        best[rows[less]], chosen[rows[less]] = error[less], option
    return chosen


def _cut_off(
    values: Tensor, scale: Tensor, zeros: Tensor, option: int, codes: tuple[int, int], buffer: Tensor
) -> Tensor:
    """The squared error that is outside the range of an option and of all later ones, per row; `buffer` is changed."""
    zero = zeros[:, option].to(values.dtype)
    # A rounded zero point moves a range by half a step at most; there are two of them, of this option and a later one.
    slack = torch.where((zeros != 0).any(dim=1), 1.001 * scale, torch.zeros_like(scale))
    low, high = (codes[0] - zero) * scale - slack, (codes[1] - zero) * scale + slack
    return _squared(torch.clamp(values, low[:, None], high[:, None], out=buffer).sub_(values))


def _squared(values: Tensor) -> Tensor:
    """The sum of the squares of each row."""
    norm: Tensor = torch.linalg.vector_norm(values, dim=-1)
    return norm.square()
