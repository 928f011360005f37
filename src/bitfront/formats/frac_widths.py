"""Rules that learn frac widths of fixed point from values, for many tensors, channels or single values at once.

Every rule takes rows of values. A row is a tensor, a channel or one value, and its result depends on no other row.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bitfront.formats.base import thinned_rows
from bitfront.formats.ranges import TOGETHER, percentile_ends
from bitfront.kernels.whole import Rounding, whole

#: Any step from 2^-96 to 2^96: with codes of up to 32 bits, all values are float32's.
LOWEST_FRAC_WIDTH, HIGHEST_FRAC_WIDTH = -96, 96
#: How a frac width is learned.
Rule = Literal["auto", "minmax", "percentile"]

#: The powers of two from 2^-97 to 2^97, exactly: torch computes a power with an error.
_FARTHEST = HIGHEST_FRAC_WIDTH + 1
_POWERS = torch.tensor([2.0**k for k in range(-_FARTHEST, _FARTHEST + 1)], dtype=torch.float64)


def learned_frac_widths(
    values: Tensor,
    ends: Tensor,
    width: int,
    codes: tuple[int, int],
    rule: Rule,
    *,
    rounding: Rounding = "even",
    wraps: bool = False,
) -> Tensor:
    """The frac width of each row of values.

    Args:
        values: shape (rows, values); those that are not finite do not count.
        ends: shape (rows, values); nothing but these say what the largest values of a row are.
        width: bits; a row of zeros gets half of them, rounded down.
        codes: the smallest and the largest code; negative values do not count where the smallest is 0.
        rule: as in ``Integer``.
        rounding: how values become whole numbers.
        wraps: whether values out of range come back on the other side. Then no rule lets one of `ends` be out of it.

    Returns:
        int64, shape (rows,).
    """
    step = max(1, TOGETHER // max(1, values.shape[1]))
    parts = zip(torch.split(values, step), torch.split(ends, step), strict=True)
    found = [_learned(part, its_ends, width, codes, rule, rounding, wraps) for part, its_ends in parts]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


def _learned(
    values: Tensor, ends: Tensor, width: int, codes: tuple[int, int], rule: str, rounding: Rounding, wraps: bool
) -> Tensor:
    signed = codes[0] < 0
    low, high = _ends(_known(ends, 0.0))
    if not signed:
        # An unsigned format cuts off negative values on purpose, so they do not count for the frac width.
        low, high = low.clamp(min=0), high.clamp(min=0)
    result = torch.full(low.shape, width // 2, dtype=torch.int64, device=low.device)
    some = (low != 0) | (high != 0)
    if rule == "percentile" and not wraps and values.shape[1]:
        seen = _known(thinned_rows(values), torch.nan)
        low, high = percentile_ends(seen if signed else seen.clamp(min=0), low, high)
    result[some] = _covering(low[some], high[some], width, codes, rounding)
    if rule == "auto":
        part = _known(thinned_rows(values), 0.0)
        some = some & (part != 0 if signed else part > 0).any(dim=1)
        result[some] = _least_error(part[some], width, codes, rounding, result[some] if wraps else None)
    return result


def _known(values: Tensor, otherwise: float) -> Tensor:
    """`values`, with something else for those that are not finite."""
    return torch.where(values.isfinite(), values, torch.full_like(values, otherwise))


def _ends(values: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of each row, float64; 0 of none."""
    if not values.shape[1]:
        none = torch.zeros(len(values), dtype=torch.float64, device=values.device)
        return none, none
    return values.amin(dim=1).double(), values.amax(dim=1).double()


def _power(frac: Tensor) -> Tensor:
    """2^frac, float64."""
    return _POWERS.to(frac.device)[frac + _FARTHEST]


def _covering(smallest: Tensor, largest: Tensor, width: int, codes: tuple[int, int], rounding: Rounding) -> Tensor:
    """The largest frac widths under which both ends, one of which is not zero, round without saturating."""
    low, high = codes
    beyond = width + 1 - torch.frexp(torch.maximum(-smallest, largest)).exponent.long()
    frac = beyond.clamp(LOWEST_FRAC_WIDTH, HIGHEST_FRAC_WIDTH)
    while True:
        scale = _power(frac)
        over = (whole(smallest * scale, rounding) < low) | (whole(largest * scale, rounding) > high)
        over &= frac > LOWEST_FRAC_WIDTH
        if not bool(over.any()):
            return frac
        frac = frac - over.long()


def _least_error(values: Tensor, width: int, codes: tuple[int, int], rounding: Rounding, most: Tensor | None) -> Tensor:
    """The frac widths with the smallest squared error on rows, float64; the smaller one among equals.

    Args:
        most: the largest that are allowed, under which nothing saturates; None for no limit.
    """

    def error(rows: Tensor, frac: Tensor) -> Tensor:
        some, scale = values[rows], _power(frac)[:, None]
        return ((torch.clamp(whole(some * scale, rounding), *codes) / scale - some) ** 2).sum(dim=1)

    def clipped(rows: Tensor, frac: Tensor) -> Tensor:
        """The error of saturation alone, which only grows with the frac width."""
        some, scale = values[rows], _power(frac)[:, None]
        return ((some.clamp(codes[0] / scale, codes[1] / scale) - some) ** 2).sum(dim=1)

    # As long as nothing saturates, a finer grid contains the coarser one, so its error is not larger.
    frac = _covering(*_ends(values), width, codes, rounding) if most is None else most.clone()
    every = torch.arange(len(values), device=values.device)
    best, least = frac.clone(), error(every, frac)
    rows = every[best > LOWEST_FRAC_WIDTH]
    while len(rows):
        rows = rows[error(rows, best[rows] - 1) == least[rows]]
        best[rows] -= 1
        rows = rows[best[rows] > LOWEST_FRAC_WIDTH]
    rows = every[frac < HIGHEST_FRAC_WIDTH] if most is None else every[:0]
    while len(rows):
        rows = rows[clipped(rows, frac[rows] + 1) < least[rows]]
        frac[rows] += 1
        loss = error(rows, frac[rows])
        less = loss < least[rows]
        best[rows[less]], least[rows[less]] = frac[rows[less]], loss[less]
        rows = rows[frac[rows] < HIGHEST_FRAC_WIDTH]
    return best
