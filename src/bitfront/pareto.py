"""Which candidates nobody beats, and how much they dominate. All objectives are to be minimised here."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.float64]

#: Rows compared at a time: what a block leaves is compared with what the others leave.
BLOCK = 2**12
#: Rows that all others are compared with in one go.
STEP = 16


class Front:
    """The front of everything told so far, kept as it comes: the same as ``non_dominated`` of all of it at once.

    Attributes:
        losses: of its members, shape (members, objectives), in the order of ``non_dominated``.
        rows: their places among everything told, shape (members,).
        told: how many were told.
    """

    def __init__(self, objectives: int) -> None:
        self.losses: Losses = np.zeros((0, objectives))
        self.rows: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.told = 0

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, losses: Losses) -> None:
        """Tell more candidates, shape (candidates, objectives); NaN in rows that failed."""
        for start in range(0, len(losses), BLOCK):
            block = losses[start : start + BLOCK]
            rows = np.flatnonzero(~dominated(block, self.losses))
            rows = rows[_survivors(block[rows])]
            kept = ~dominated(self.losses, block[rows])
            # Members stand before newcomers, so that equal rows stay in the order of their places.
            both = np.concatenate([self.losses[kept], block[rows]])
            rows = np.concatenate([self.rows[kept], self.told + rows])
            order = np.lexsort(both.T[::-1])
            self.losses, self.rows = both[order], rows[order]
            self.told += len(block)


def non_dominated(losses: Losses) -> NDArray[np.int64]:
    """Rows that no other row dominates, sorted by the objectives, equal rows by their place.

    A row dominates another if it is nowhere larger and somewhere smaller; equal rows do not dominate each other. Rows
    with a NaN (failed candidates) are never part of the front.

    Args:
        losses: shape (candidates, objectives).
    """
    front = Front(losses.shape[1])
    front.add(losses)
    return front.rows


def non_dominated_sorted(losses: Losses) -> NDArray[np.bool_]:
    """Which rows no other row dominates, of equal rows all or none; shape (candidates,). Quicker than
    ``non_dominated`` where the rows are in order already.

    Args:
        losses: shape (candidates, objectives), without NaN, sorted by the first objective, then by the second, ...
    """
    # Whoever dominates a row stands before it.
    if losses.shape[1] == 1:
        return np.asarray(losses[:, 0] == losses[:1, 0])
    keep = np.zeros(len(losses), dtype=bool)
    if losses.shape[1] == 2 and len(losses):
        first, second = losses[:, 0], losses[:, 1]
        # What is as low as anything before it, but came later, stays only if it equals the one that was that low.
        rows = np.flatnonzero(second == np.minimum.accumulate(second))
        lower = np.concatenate([[True], second[rows[1:]] < second[rows[:-1]]])
        holder = np.maximum.accumulate(np.where(lower, rows, 0))
        keep[rows] = first[rows] == first[holder]
        return keep
    left, at = np.arange(len(losses)), 0
    while at < len(left):
        values = losses[left]
        beaten = _beaten(values, values[at : at + STEP])
        at = min(at + STEP, len(left)) - int(beaten[: at + STEP].sum())
        left = left[~beaten]
    keep[left] = True
    return keep


def _survivors(losses: Losses) -> NDArray[np.int64]:
    """``non_dominated`` of one block."""
    rows: NDArray[np.int64] = np.flatnonzero(~np.isnan(losses).any(axis=1)).astype(np.int64)
    rows = rows[np.lexsort(losses[rows].T[::-1])]
    return rows[non_dominated_sorted(losses[rows])]


def _rank_sums(losses: Losses) -> NDArray[np.int64]:
    """Per row the sum of its ranks in each column; safe where the sum of the values is not, at infinity."""
    total = np.zeros(len(losses), dtype=np.int64)
    for column in losses.T:
        total += np.unique(column, return_inverse=True)[1]
    return total


def dominated(losses: Losses, by: Losses) -> NDArray[np.bool_]:
    """Which rows of `losses` some row of `by` dominates, shape (rows of `losses`,)."""
    beaten = np.zeros(len(losses), dtype=bool)
    if not len(by):
        return beaten
    if losses.shape[1] == 2:
        # The best second value among those whose first is as good, and among those whose first is better.
        order = np.lexsort(by.T[::-1])
        first, best = by[order, 0], np.minimum.accumulate(by[order, 1])
        best = np.concatenate([[np.inf], best])
        as_good = best[np.searchsorted(first, losses[:, 0], side="right")]
        better = best[np.searchsorted(first, losses[:, 0], side="left")]
        there = np.searchsorted(first, losses[:, 0], side="left") > 0
        found: NDArray[np.bool_] = (as_good < losses[:, 1]) | ((better <= losses[:, 1]) & there)
        return found
    # Those that are good in everything come first, and take away the most.
    by = by[np.argsort(_rank_sums(by), kind="stable")]
    left = np.arange(len(losses))
    for start in range(0, len(by), STEP):
        away = _beaten(losses[left], by[start : start + STEP])
        beaten[left[away]] = True
        left = left[~away]
    return beaten


def _beaten(losses: Losses, by: Losses) -> NDArray[np.bool_]:
    """``dominated`` by definition: every row is compared with every row."""
    nowhere_larger = np.ones((len(losses), len(by)), dtype=bool)
    somewhere_smaller = np.zeros_like(nowhere_larger)
    for mine, theirs in zip(losses.T[:, :, None], by.T, strict=True):
        nowhere_larger &= theirs <= mine
        somewhere_smaller |= theirs < mine
    return np.asarray((nowhere_larger & somewhere_smaller).any(axis=1))


def hypervolume(losses: Losses, reference: NDArray[np.float64]) -> float:
    """Volume that the rows dominate, up to `reference`; rows beyond it, or with NaN, add nothing.

    By slicing along the first objective (Zitzler and Thiele 1998; exact, meant for small fronts).
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
