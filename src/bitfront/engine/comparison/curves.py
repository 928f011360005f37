"""How far a search had come after each evaluation: arithmetic on arrays of losses, for comparing strategies.

All objectives are to be minimised here. A run that has found nothing yet has a best of infinity and a volume of 0; what
was never reached is infinity too, so that medians and quartiles over runs stay honest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitfront.pareto import Front, dominated, hypervolume, non_dominated

Values = NDArray[np.float64]
#: The reference point lies beyond the worst of the front by this part of the front's extent.
MARGIN = 0.1
#: Candidates compared with the front at a time, at first and at most.
FIRST_BLOCK, LARGEST_BLOCK = 16, 4096
#: Sums of volumes in another order differ in the last digits.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Spread:
    """Some numbers, one per seed, with their median and quartiles; infinity where something was not reached."""

    values: tuple[float, ...]
    median: float
    low: float
    high: float

    @property
    def reached(self) -> int:
        """How many of the values are finite."""
        return int(np.isfinite(self.values).sum())


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of some numbers."""
    low, median, high = quantiles(np.array(values, dtype=np.float64)[:, None])[:, 0].tolist()
    return Spread(tuple(float(v) for v in values), median, low, high)


def quantiles(values: Values) -> Values:
    """Lower quartile, median and upper quartile over the rows, shape (3, columns).

    Between two numbers it is interpolated; between a number and infinity there is only infinity.
    """
    ordered = np.sort(values, axis=0)
    found = np.empty((3, values.shape[1]))
    for row, share in enumerate((0.25, 0.5, 0.75)):
        place = share * (len(values) - 1)
        below, part = int(place), place - int(place)
        found[row] = ordered[below]
        if part:
            above = ordered[below + 1]
            known = np.isfinite(above)
            found[row, known] += part * (above[known] - ordered[below][known])
            found[row, ~known] = np.inf
    return found


def best_so_far(losses: Values) -> Values:
    """The least of a column up to each row, shape (evaluations,); NaN (failed, constraint violated) does not count."""
    found: Values = np.minimum.accumulate(np.where(np.isnan(losses), np.inf, losses))
    return found


def reference_point(losses: Values) -> Values:
    """Up to where volumes are taken, shape (objectives,): the worst of the front, and a tenth of its extent more.

    Where the front has no extent, it is a tenth of that of all results; where these have none either, of the value.

    Args:
        losses: all results together, shape (results, objectives); rows with NaN do not count.
    """
    known = losses[np.isfinite(losses).all(axis=1)]
    front = known[non_dominated(known)]
    worst = front.max(axis=0)
    extent = np.ptp(front, axis=0)
    extent = np.where(extent > 0, extent, np.ptp(known, axis=0))
    extent = np.where(extent > 0, extent, np.where(worst != 0, np.abs(worst), 1.0))
    point: Values = worst + MARGIN * extent
    return point


def volumes(losses: Values, reference: Values) -> Values:
    """Hypervolume of the first 1, 2, ... candidates, shape (evaluations,).

    Each newcomer to the front adds what it alone dominates: its own box without what the others dominate of it (While,
    Bradstreet and Barone 2012).

    Args:
        losses: shape (evaluations, objectives), in the order of evaluation; rows with NaN add nothing.
    """
    gained = np.zeros(len(losses))
    front = Front(losses.shape[1])
    start, size = 0, FIRST_BLOCK
    inside = np.asarray((np.nan_to_num(losses, nan=np.inf) < reference).all(axis=1))
    while start < len(losses):
        rows = np.flatnonzero(inside[start : start + size]) + start
        # Most of a long run is beaten by what was there before; only the others are looked at one by one.
        for row in rows[~dominated(losses[rows], front.losses)].tolist():
            clipped = np.maximum(front.losses, losses[row])
            gained[row] = np.prod(reference - losses[row]) - hypervolume(clipped, reference)
            front.add(losses[row : row + 1])
        start, size = start + size, min(2 * size, LARGEST_BLOCK)
    found: Values = np.cumsum(np.maximum(gained, 0.0))
    return found


def first_reaching(curve: Values, level: float) -> float:
    """After how many evaluations a rising curve is at `level`; infinity if it never is."""
    there = np.flatnonzero(curve >= level - ROUNDING)
    return float(there[0] + 1) if len(there) else np.inf


def at_evaluations(curves: Sequence[Values], count: int, before: float) -> Values:
    """Curves of several runs at 1, 2, ... `count` evaluations, shape (runs, count); one that ended earlier stays.

    Args:
        before: what a curve is before the first.
    """
    places = np.arange(1, count + 1)
    return np.stack([np.append(before, curve)[np.minimum(places, len(curve))] for curve in curves])


def at_moments(curves: Sequence[Values], seconds: Sequence[Values], moments: Values, before: float) -> Values:
    """Curves of several runs at some moments, shape (runs, moments).

    Args:
        seconds: per run, when each of its evaluations was done; rising.
        before: what a curve is before the first.
    """
    rows = []
    for curve, own in zip(curves, seconds, strict=True):
        place = np.searchsorted(own, moments, side="right")
        rows.append(np.append(before, curve)[place])
    return np.stack(rows)
