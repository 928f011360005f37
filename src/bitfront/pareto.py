"""The Pareto front: which candidates no other candidate dominates, and their hypervolume. Smaller is better."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.float64]

#: Distance from the worst of the front to the reference point, as a share of the front's extent.
MARGIN = 0.1
#: Rows in a block: a front is computed block by block, and then merged.
BLOCK = 2**12
#: Rows that all others are compared with at a time.
STEP = 16


class Front:
    """The front of all candidates added so far, updated with every block of them.

    It is the same as ``non_dominated`` of all candidates at once.

    Attributes:
        losses: of the members, shape (members, objectives), in the order of ``non_dominated``.
        rows: the positions of the members among all candidates added, shape (members,).
        count: how many candidates were added.
    """

    def __init__(self, objectives: int) -> None:
        self.losses: Losses = np.zeros((0, objectives))
        self.rows: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.count = 0

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, losses: Losses) -> None:
        """Add candidates, shape (candidates, objectives); NaN in the rows of candidates that failed."""
        for start in range(0, len(losses), BLOCK):
            block = losses[start : start + BLOCK]
            rows = np.flatnonzero(~dominated(block, self.losses))
            rows = rows[_survivors(block[rows])]
            kept = ~dominated(self.losses, block[rows])
            # Old members stand before new ones, so that equal rows stay in the order of their positions.
            both = np.concatenate([self.losses[kept], block[rows]])
            rows = np.concatenate([self.rows[kept], self.count + rows])
            order = np.lexsort(both.T[::-1])
            self.losses, self.rows = both[order], rows[order]
            self.count += len(block)


def non_dominated(losses: Losses) -> NDArray[np.int64]:
    """The rows that no other row dominates, sorted by the objectives, equal rows by their position.

    A row dominates another if it is larger in no objective and smaller in at least one. Equal rows do not dominate each
    other. Rows with a NaN (failed candidates) are never part of the front.

    Args:
        losses: shape (candidates, objectives), to be minimised.

    Returns:
        Row numbers, shape (members,).
    """
    front = Front(losses.shape[1])
    front.add(losses)
    return front.rows


def non_dominated_sorted(losses: Losses) -> NDArray[np.bool_]:
    """Which rows no other row dominates, of equal rows all or none; shape (candidates,).

    Faster than ``non_dominated``, for rows that are sorted already.

    Args:
        losses: shape (candidates, objectives), without NaN, sorted by the first objective, then by the second, ...
    """
    # A row is dominated only by rows before it.
    if losses.shape[1] == 1:
        return np.asarray(losses[:, 0] == losses[:1, 0])
    keep = np.zeros(len(losses), dtype=bool)
    if losses.shape[1] == 2 and len(losses):
        first, second = losses[:, 0], losses[:, 1]
        # A row whose second value only equals the smallest one before it stays if it equals the row that has that
        # value.
        rows = np.flatnonzero(second == np.minimum.accumulate(second))
        lower = np.concatenate([[True], second[rows[1:]] < second[rows[:-1]]])
        holder = np.maximum.accumulate(np.where(lower, rows, 0))
        keep[rows] = first[rows] == first[holder]
        return keep
    remaining, start = np.arange(len(losses)), 0
    while start < len(remaining):
        values = losses[remaining]
        removed = _dominated_by_any(values, values[start : start + STEP])
        start = min(start + STEP, len(remaining)) - int(removed[: start + STEP].sum())
        remaining = remaining[~removed]
    keep[remaining] = True
    return keep


def _survivors(losses: Losses) -> NDArray[np.int64]:
    """``non_dominated`` of one block."""
    rows: NDArray[np.int64] = np.flatnonzero(~np.isnan(losses).any(axis=1)).astype(np.int64)
    rows = rows[np.lexsort(losses[rows].T[::-1])]
    return rows[non_dominated_sorted(losses[rows])]


def _rank_sums(losses: Losses) -> NDArray[np.int64]:
    """For each row the sum of its ranks in the columns; unlike the sum of the values it is finite for infinite ones."""
    total = np.zeros(len(losses), dtype=np.int64)
    for column in losses.T:
        total += np.unique(column, return_inverse=True)[1]
    return total


def dominated(losses: Losses, by: Losses) -> NDArray[np.bool_]:
    """Which rows of `losses` are dominated by a row of `by`, shape (rows of `losses`,).

    Args:
        losses: shape (candidates, objectives).
        by: shape (others, objectives), without NaN.
    """
    result = np.zeros(len(losses), dtype=bool)
    if not len(by):
        return result
    if losses.shape[1] == 2:
        # The smallest second value among the rows whose first is not larger, and among those whose first is smaller.
        order = np.lexsort(by.T[::-1])
        first, smallest = by[order, 0], np.minimum.accumulate(by[order, 1])
        smallest = np.concatenate([[np.inf], smallest])
        first_not_larger = smallest[np.searchsorted(first, losses[:, 0], side="right")]
        first_smaller = smallest[np.searchsorted(first, losses[:, 0], side="left")]
        some_smaller = np.searchsorted(first, losses[:, 0], side="left") > 0
        return np.asarray((first_not_larger < losses[:, 1]) | ((first_smaller <= losses[:, 1]) & some_smaller))
    # Rows that are small in all objectives dominate most others, so they are compared first.
    by = by[np.argsort(_rank_sums(by), kind="stable")]
    remaining = np.arange(len(losses))
    for start in range(0, len(by), STEP):
        removed = _dominated_by_any(losses[remaining], by[start : start + STEP])
        result[remaining[removed]] = True
        remaining = remaining[~removed]
    return result


def _dominated_by_any(losses: Losses, by: Losses) -> NDArray[np.bool_]:
    """``dominated`` by definition: every row is compared with every row."""
    nowhere_larger = np.ones((len(losses), len(by)), dtype=bool)
    somewhere_smaller = np.zeros_like(nowhere_larger)
    for column, others in zip(losses.T[:, :, None], by.T, strict=True):
        nowhere_larger &= others <= column
        somewhere_smaller |= others < column
    return np.asarray((nowhere_larger & somewhere_smaller).any(axis=1))


def hypervolume(losses: Losses, reference: NDArray[np.float64]) -> float:
    """The volume that the rows dominate, up to `reference`; rows beyond it, or with NaN, add nothing.

    Exact, by slicing along the first objective (Zitzler and Thiele 1998); meant for small fronts.

    Args:
        losses: shape (candidates, objectives), to be minimised.
        reference: shape (objectives,), a point that is worse than all candidates of interest.
    """
    inside = losses[~np.isnan(losses).any(axis=1) & (np.nan_to_num(losses, nan=np.inf) < reference).all(axis=1)]
    if not len(inside):
        return 0.0
    front = inside[non_dominated(inside)]
    if front.shape[1] == 1:
        return float(reference[0] - front.min())
    edges = np.append(front[1:, 0], reference[0])
    if front.shape[1] == 2:  # a staircase
        return float((edges - front[:, 0]) @ (reference[1] - front[:, 1]))
    total = 0.0
    for i, edge in enumerate(edges):
        if edge > front[i, 0]:
            total += (edge - front[i, 0]) * hypervolume(front[: i + 1, 1:], reference[1:])
    return total


def reference_point(losses: Losses) -> Losses:
    """The reference point for hypervolumes, shape (objectives,).

    It is the worst value on the front plus ``MARGIN`` times the extent of the front, in each objective. Where the front
    has no extent, the extent of all results counts; where these have none either, the absolute value.

    Args:
        losses: of all results together, shape (results, objectives). Rows with NaN do not count; one must.
    """
    known = losses[np.isfinite(losses).all(axis=1)]
    front = known[non_dominated(known)]
    worst = front.max(axis=0)
    extent = np.ptp(front, axis=0)
    extent = np.where(extent > 0, extent, np.ptp(known, axis=0))
    extent = np.where(extent > 0, extent, np.where(worst != 0, np.abs(worst), 1.0))
    point: Losses = worst + MARGIN * extent
    return point
