"""Which candidates nobody beats, and how much they dominate. All objectives are to be minimised here."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.float64]


def non_dominated(losses: Losses) -> NDArray[np.int64]:
    """Rows that no other row dominates, sorted by the objectives, equal rows by their place.

    A row dominates another if it is nowhere larger and somewhere smaller; equal rows do not dominate each other. Rows
    with a NaN (failed candidates) are never part of the front.

    Args:
        losses: shape (candidates, objectives).
    """
    rows: NDArray[np.int64] = np.flatnonzero(~np.isnan(losses).any(axis=1))
    if not len(rows):
        return rows
    rows = rows[np.lexsort(losses[rows].T[::-1])].astype(np.int64)
    values = losses[rows]
    if losses.shape[1] == 1:
        best: NDArray[np.int64] = rows[values[:, 0] == values[0, 0]]
        return best
    if losses.shape[1] == 2:
        # Sorted by the first objective: a row survives if its second is below all before it, or equals its twin.
        best_before = np.concatenate([[np.inf], np.minimum.accumulate(values[:, 1])[:-1]])
        keep = values[:, 1] < best_before
        twin = np.concatenate([[False], (values[1:] == values[:-1]).all(axis=1)])
        for i in np.flatnonzero(twin).tolist():
            keep[i] = keep[i - 1]
        return rows[keep]
    kept: list[int] = []
    for i, value in enumerate(values):
        # Lexicographic order: only earlier rows can dominate, and only surviving ones need be asked.
        others = values[kept]
        if not ((others <= value).all(axis=1) & (others < value).any(axis=1)).any():
            kept.append(i)
    return rows[kept]


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
    total = 0.0
    for i, edge in enumerate(edges):
        if edge > front[i, 0]:
            total += (edge - front[i, 0]) * hypervolume(front[: i + 1, 1:], reference[1:])
    return total
