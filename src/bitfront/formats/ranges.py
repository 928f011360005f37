"""Which part of its range an affine format covers: rules that look at the values, for many channels or groups at once.

Every rule takes rows of values. A row is a tensor, a channel or a group, and its result depends on no other row.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfront.formats.base import PERCENTILE

#: Parts of the full range that ``least_error`` is asked about, the largest first.
SHRINKS = tuple(i / 64 for i in range(64, 7, -1))
#: Bins of the histogram that ``entropy_reach`` looks at.
BINS = 2048
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


def entropy_reach(values: Tensor, largest: float, levels: int) -> float:
    """The largest absolute value that is worth covering: the one whose cut and quantized histogram tells least apart
    from the whole one, by its Kullback-Leibler divergence (Migacz, 8-bit Inference with TensorRT, GTC 2017).

    The histogram has ``BINS`` bins. For each number i of bins from `levels` on: P is the first i bins, what is beyond
    counted in the last of them; Q is the first i bins in `levels` neighbouring groups, each group spread evenly over
    those of its bins that are not empty. Where the last of them is empty and P counts something there, which would make
    the divergence infinite, Q has one value in it. The i with the smallest divergence of Q from P is taken, the largest
    among equals, and the reach is ``(i + 1/2) / BINS`` of the whole one.

    A value counts once, however often it occurs, and zeros do not count. A value that many samples share (the bias of a
    channel where an image is empty) is a spike of the histogram. Q spreads it over its group, though a format moves it
    by half a step at most, and most of the range was cut off to keep the group of the spike narrow.

    Args:
        values: finite, any shape.
        largest: the largest absolute value of the whole tensor.
        levels: how many codes cover the positive values.

    Returns:
        The reach; infinite where there is nothing to choose.
    """
    size = torch.from_numpy(np.unique(values.double().abs().numpy(force=True)))
    size = size[size > 0]
    if levels >= BINS or not len(size) or not 0 < largest < math.inf:
        return math.inf
    counts = np.bincount((size * (BINS / largest)).long().clamp(max=BINS - 1).numpy(force=True), minlength=BINS)
    number = np.arange(levels, BINS + 1)
    edges = number[:, None] * np.arange(levels + 1) // levels
    up_to, filled, entropy = (
        np.concatenate([[0.0], np.cumsum(column)]) for column in (counts, counts > 0, _xlogx(counts.astype(np.float64)))
    )
    total, inside, last = float(len(size)), up_to[number], counts[number - 1].astype(np.float64)
    beyond = total - inside
    # Σ p log p − Σ p log q, and q is the same in all bins of a group that are not empty.
    of_p = (entropy[number - 1] + _xlogx(last + beyond)) / total - math.log(total)
    group, bins = np.diff(up_to[edges], axis=1), np.diff(filled[edges], axis=1)
    empty = (beyond > 0) & (last == 0)
    group[:, -1] += empty
    bins[:, -1] += empty
    inside = inside + empty
    with np.errstate(divide="ignore", invalid="ignore"):
        of_q = np.where(group > 0, np.log(group / (bins * inside[:, None])), 0.0)
    weighted = (group * of_q).sum(axis=1) + (beyond - empty) * of_q[:, -1]
    divergence = of_p - weighted / total
    chosen = len(number) - 1 - int(np.argmin(divergence[::-1]))
    return (int(number[chosen]) + 0.5) * largest / BINS


def _xlogx(x: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = x * np.log(np.maximum(x, 1.0))
    return result
