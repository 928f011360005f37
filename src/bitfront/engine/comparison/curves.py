"""The progress of a run after each evaluation, as curves: arithmetic on arrays of losses, for comparing strategies.

All objectives are minimised here. Before its first result a run has a best value of infinity and a volume of 0. A level
that a run never reached has infinity evaluations, so that medians and quartiles over runs count such runs too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitfront.pareto import Front, dominated, hypervolume

Values = NDArray[np.float64]
#: Number of candidates compared with the front at a time: at the start and at most.
FIRST_BLOCK, LARGEST_BLOCK = 16, 4096
#: Differences up to this size are rounding: sums of volumes depend on their order in the last digits.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Spread:
    """A number per random seed, with median and quartiles. Infinity means not reached."""

    values: tuple[float, ...]
    median: float
    low: float
    high: float

    @property
    def reached(self) -> int:
        """How many of the values are finite."""
        return int(np.isfinite(self.values).sum())


def spread(values: Sequence[float]) -> Spread:
    """The median and quartiles of one or more numbers."""
    low, median, high = quantiles(np.array(values, dtype=np.float64)[:, None])[:, 0].tolist()
    return Spread(tuple(float(v) for v in values), median, low, high)


def quantiles(values: Values) -> Values:
    """Lower quartile, median and upper quartile over the rows, shape (3, columns).

    Values between two finite numbers are interpolated linearly; between a number and infinity the result is infinity.

    Args:
        values: shape (rows, columns), one row or more; finite or infinity.
    """
    ordered = np.sort(values, axis=0)
    result = np.empty((3, values.shape[1]))
    for row, share in enumerate((0.25, 0.5, 0.75)):
        place = share * (len(values) - 1)
        below, part = int(place), place - int(place)
        result[row] = ordered[below]
        if part:
            above = ordered[below + 1]
            finite = np.isfinite(above)
            result[row, finite] += part * (above[finite] - ordered[below][finite])
            result[row, ~finite] = np.inf
    return result


def best_so_far(losses: Values) -> Values:
    """The least loss up to each row, shape (evaluations,); infinity before the first.

    Args:
        losses: of one objective, shape (evaluations,). NaN (failed, or a constraint violated) does not count.
    """
    best: Values = np.minimum.accumulate(np.where(np.isnan(losses), np.inf, losses))
    return best


def volumes(losses: Values, reference: Values) -> Values:
    """Hypervolume of the first 1, 2, ... candidates, shape (evaluations,).

    A candidate that joins the front adds its exclusive hypervolume: its box, without the part that the other members
    dominate (While, Bradstreet and Barone 2012).

    Args:
        losses: shape (evaluations, objectives), in the order of evaluation; rows with NaN add nothing.
        reference: the reference point, shape (objectives,); results beyond it add nothing.
    """
    gained = np.zeros(len(losses))
    front = Front(losses.shape[1])
    start, size = 0, FIRST_BLOCK
    inside = np.asarray((np.nan_to_num(losses, nan=np.inf) < reference).all(axis=1))
    while start < len(losses):
        rows = np.flatnonzero(inside[start : start + size]) + start
        # The front so far dominates most candidates of a long run; only the others are added one by one.
        for row in rows[~dominated(losses[rows], front.losses)].tolist():
            clipped = np.maximum(front.losses, losses[row])
            gained[row] = np.prod(reference - losses[row]) - hypervolume(clipped, reference)
            front.add(losses[row : row + 1])
        start, size = start + size, min(2 * size, LARGEST_BLOCK)
    total: Values = np.cumsum(np.maximum(gained, 0.0))
    return total


def first_reaching(curve: Values, level: float) -> float:
    """Number of evaluations until a rising curve reaches `level`; infinity if it never does."""
    reached = np.flatnonzero(curve >= level - ROUNDING)
    return float(reached[0] + 1) if len(reached) else np.inf


def at_evaluations(curves: Sequence[Values], count: int, before: float) -> Values:
    """Curves of several runs at 1, 2, ... `count` evaluations, shape (runs, count).

    Args:
        curves: per run the value after each of its evaluations. After its end a run keeps its last value.
        count: number of evaluations, 1 or more.
        before: the value before the first evaluation.
    """
    places = np.arange(1, count + 1)
    return np.stack([np.append(before, curve)[np.minimum(places, len(curve))] for curve in curves])


def at_moments(curves: Sequence[Values], seconds: Sequence[Values], moments: Values, before: float) -> Values:
    """Curves of several runs at `moments`, shape (runs, moments).

    Args:
        curves: per run the value after each of its evaluations.
        seconds: per run the time at the end of each of its evaluations; rising.
        moments: times, in seconds.
        before: the value before the first evaluation.
    """
    rows = []
    for curve, times in zip(curves, seconds, strict=True):
        place = np.searchsorted(times, moments, side="right")
        rows.append(np.append(before, curve)[place])
    return np.stack(rows)
