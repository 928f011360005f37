"""The kernels in torch alone: for machines without a C++ compiler, and for GPUs.

The operations and their order are those of ``kernels.cpp``, so the results are the same to the last bit. They are
slower, because each operation is one pass over memory.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfront.kernels.whole import whole_by_row

_EXP = (1.0, 5.0000001201e-1, 1.6666665459e-1, 4.1665795894e-2, 8.3334519073e-3, 1.3981999507e-3, 1.9875691500e-4)
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)


def score(logits: Tensor, labels: Tensor, rectify: bool) -> tuple[Tensor, Tensor]:
    """See :func:`bitfront.kernels.score`."""
    loss, right = of_samples(logits, labels, rectify)
    return loss.double().sum(dim=1), right.sum(dim=1)


def of_samples(logits: Tensor, labels: Tensor, rectify: bool) -> tuple[Tensor, Tensor]:
    """The loss of each sample, float32, and whether it is right: both of shape (candidates, samples)."""
    z = logits.clamp(min=0.0) if rectify else logits
    best, arg = z.max(dim=1)
    # Of equal values `argmax` is guaranteed to give the first, `max` is not.
    arg = z.argmax(dim=1)
    label_logits = z.gather(1, labels.long().expand(len(z), 1, -1)).squeeze(1)
    total = torch.zeros_like(best)
    for c in range(z.shape[1]):
        total += exp_nonpositive(z[:, c] - best)
    loss = log_positive(total) + (best - label_logits)
    loss = torch.where(total == total, loss, total)
    return torch.round(loss * 2.0**20) * 2.0**-20, arg == labels


def ordered(weight: Tensor, x: Tensor) -> Tensor:
    """See :func:`bitfront.kernels.ordered`; here without a batch too."""
    rows, columns = weight.double(), x.double()
    sums = torch.zeros(*x.shape[:-2], weight.shape[-2], x.shape[-1], dtype=torch.float64, device=x.device)
    for k in range(x.shape[-2]):
        sums += rows[..., k, None] * columns[..., k, None, :]
    return sums.float()


def rounded(values: Tensor, grids: NDArray[np.float32]) -> Tensor:
    """`values`, float32, shape (states, ...), each state rounded by its numbers; see
    :func:`bitfront.kernels.round_blocks`."""
    wide = (-1, *(1,) * (values.dim() - 1))
    numbers = (column.view(wide) for column in torch.from_numpy(grids).to(values.device).unbind(1))
    scale, low, high, step, divisor, zero, way = numbers
    coded, otherwise = divisor != 0, bool(way.any())

    def to_whole(x: Tensor) -> Tensor:
        return whole_by_row(x, way) if otherwise else torch.round(x)

    plain = torch.clamp(to_whole(values * scale), low, high) * step
    if not bool(coded.any()):
        return plain
    codes = torch.clamp(to_whole(values / torch.where(coded, divisor, 1.0)) + zero, low, high)
    return torch.where(coded, (codes - zero) * step, plain)


def exp_nonpositive(x: Tensor) -> Tensor:
    """e to the power of x, for x ≤ 0; below −87 as at −87."""
    x = torch.where(x < -87.0, -87.0, x)
    n = torch.round(x * 1.44269504088896341)
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    r2 = r * r
    low = _EXP[1] + r * _EXP[2]
    middle = _EXP[3] + r * _EXP[4]
    high = _EXP[5] + r * _EXP[6]
    p = _EXP[0] + (r + r2 * (low + r2 * (middle + r2 * high)))
    exponent = (torch.nan_to_num(n, nan=0.0).to(torch.int32) + 127) << 23
    return p * exponent.view(torch.float32)


def log_positive(x: Tensor) -> Tensor:
    """The natural logarithm of normal positive numbers."""
    bits = torch.nan_to_num(x, nan=1.0).view(torch.int32)
    m = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32)
    high = m > 1.41421356237
    m = torch.where(high, m * 0.5, m)
    e = ((bits >> 23) - 127 + high.to(torch.int32)).float()
    f = m - 1.0
    z = f * f
    p = _LOG[0] * f + _LOG[1]
    for coefficient in _LOG[2:]:
        p = p * f + coefficient
    y = p * z * f + e * -2.12194440e-4
    return (f + (y - 0.5 * z)) + e * 0.693359375
