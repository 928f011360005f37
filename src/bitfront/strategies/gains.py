"""How much candidates would add to a front, all at once: hypervolume gained, and distance where nothing is gained."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitfront.pareto import hypervolume, non_dominated, reference_point

Floats = NDArray[np.float64]


def reference(losses: Floats, focus: Floats | None = None) -> Floats:
    """A point that is worse than the front by ``MARGIN`` of its extent, but not worse than `focus`, if anything of the
    front is better than that.

    Args:
        losses: the front, shape (members, objectives), 1 or more.
        focus: the largest losses that matter, shape (objectives,); None: all do.
    """
    if focus is not None:
        inside = (losses <= focus).all(axis=1)
        losses = losses[inside] if inside.any() else losses
    point = reference_point(losses)
    return point if focus is None or not inside.any() else np.where(np.isfinite(focus), focus, point)


def gains(front: Floats, point: Floats, candidates: Floats) -> Floats:
    """The hypervolume that each candidate alone would add to a front, shape (candidates,).

    Args:
        front: losses of its members, shape (members, objectives).
        point: the reference point, shape (objectives,).
        candidates: their losses, shape (candidates, objectives), without NaN.
    """
    if candidates.shape[1] == 1:
        best = min(float(front.min(initial=np.inf)), float(point[0]))
        result: Floats = np.maximum(best - candidates[:, 0], 0.0)
        return result
    inside = front[(front < point).all(axis=1)]
    inside = inside[non_dominated(inside)]
    if candidates.shape[1] == 2:
        return _gains_in_a_plane(inside, point, candidates)
    gained = np.zeros(len(candidates))
    for row in np.flatnonzero((candidates < point).all(axis=1)).tolist():
        clipped = np.maximum(inside, candidates[row])
        gained[row] = np.prod(point - candidates[row]) - hypervolume(clipped, point)
    return np.maximum(gained, 0.0)


def _gains_in_a_plane(front: Floats, point: Floats, candidates: Floats) -> Floats:
    """``gains`` for two objectives: the area between a candidate, the front's staircase and the reference point.

    The front is sorted by the first objective. From one member's first loss to the next one's, what is not dominated
    yet lies below the former's second loss.
    """
    edges = np.concatenate([[-np.inf], front[:, 0], point[:1]])
    heights = np.concatenate([point[1:], front[:, 1]])
    first, second = candidates[:, 0], candidates[:, 1]
    gained = np.zeros(len(candidates))
    for left, right, height in zip(edges[:-1], edges[1:], heights, strict=True):
        gained += np.maximum(right - np.maximum(first, left), 0.0) * np.maximum(height - second, 0.0)
    return gained


def distances(front: Floats, candidates: Floats) -> Floats:
    """How far each candidate is behind a front, shape (candidates,): the least amount by which all of its losses would
    have to fall for it not to be dominated, in shares of the front's extent; negative where it is not dominated."""
    extent = np.ptp(front, axis=0)
    extent = np.where(extent > 0, extent, 1.0)
    behind = np.full(len(candidates), -np.inf)
    for member in front:
        behind = np.maximum(behind, ((candidates - member) / extent).min(axis=1))
    return behind
