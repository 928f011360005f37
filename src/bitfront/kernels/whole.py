"""How numbers become whole numbers: the roundings that hardware has, and what happens to a code that is out of range.

``even`` is the nearest whole number, half to even; ``half_up`` is ⌊v + 1/2⌋, an adder and a truncation in hardware;
``floor`` is ⌊v⌋, the truncation alone. The compiled kernels know a rounding by its place in ``ROUNDINGS``.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

#: How a number becomes a whole number.
Rounding = Literal["even", "half_up", "floor"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)


def whole(x: Tensor, rounding: Rounding = "even") -> Tensor:
    """`x` as whole numbers: same shape and dtype. Infinities and NaN stay."""
    if rounding == "even":
        return torch.round(x)
    below = torch.floor(x)
    # Not floor(x + 1/2): that sum rounds, so that the number before 1/2 would become 1. The difference is exact where
    # it decides.
    return below if rounding == "floor" else below + (x - below >= 0.5)


def whole_by_row(x: Tensor, rounding: Tensor) -> Tensor:
    """As ``whole``; `rounding` has places in ``ROUNDINGS``, and broadcasts against `x`."""
    up = torch.where(rounding == ROUNDINGS.index("half_up"), whole(x, "half_up"), torch.round(x))
    return torch.where(rounding == ROUNDINGS.index("floor"), torch.floor(x), up)


def wrapped(codes: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Whole numbers modulo the size of the range from `low` to `high`, in this range, as two's complement does.

    An infinity has no code: it becomes the end of the range. NaN stays.

    Args:
        codes: float64 of any size.
        low, high: float64, broadcastable to `codes`.
    """
    size = high - low + 1
    rest = torch.fmod(codes, size) + 0.0  # exact, whatever the size of the codes; no −0
    inside = torch.where(rest > high, rest - size, torch.where(rest < low, rest + size, rest))
    return torch.where(codes.isinf(), torch.clamp(codes, low, high), inside)
