"""Successive halving (Jamieson, Talwalkar 2016) for fronts: which candidates are not trained to the end.

A cohort is a group of candidates that are compared with each other. It is trained up to a rung, a number of epochs.
There a share `keep` of the cohort goes on: the candidates that no other one dominates, in accuracy
(or what leads in another task) and in every cost in closed form (with the weights of that moment), then the most
accurate of the others. The front goes on even if it is
larger than this share. The rest stops.

With constraints, the front is that of the candidates that fulfil them at the rung, then come the others of these, then
the rest, those that are closest to the bounds first. What is known before any training is not compared here: the loop
leaves out candidates that violate such constraints.

Cohorts are consecutive proposals, and their size is a setting. So whether a candidate stops depends on its cohort only,
not on the clock or the number of processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitfront.constraints import Constraint
from bitfront.pareto import Losses, non_dominated


@dataclass(frozen=True)
class Halving:
    """The settings of successive halving.

    Attributes:
        rungs: numbers of epochs after which candidates are compared, ascending, all before the last epoch.
        keep: the share of a cohort that goes on at each rung, above 0, below 1.
        cohort: number of candidates that are compared with each other.
        costs: (metric in closed form, 1 if smaller is better or −1 if larger is better).
        constraints: of the search, with absolute bounds. Those on what is measured with a clock do not count.
    """

    rungs: tuple[int, ...]
    keep: float
    cohort: int
    costs: tuple[tuple[str, float], ...]
    constraints: tuple[Constraint, ...] = ()


def going_on(losses: Losses, keep: float, violation: NDArray[np.float64] | None = None) -> NDArray[np.bool_]:
    """Which candidates of a cohort go on, bool, shape (candidates,).

    Args:
        losses: shape (candidates, objectives), smaller is better; the first column stands for accuracy.
        keep: the share that goes on, above 0, at most 1. More go on if the front is larger.
        violation: of the constraints at this rung, shape (candidates,), 0 where they are fulfilled; None: there are
            none.
    """
    violation = np.zeros(len(losses)) if violation is None else violation
    violation = np.where(np.isnan(losses).any(axis=1), np.inf, violation)
    fulfilling = np.flatnonzero(violation == 0)
    stays = np.zeros(len(losses), dtype=bool)
    stays[fulfilling[non_dominated(losses[fulfilling])]] = True
    # A stable sort: of equally accurate candidates the first ones go on.
    for row in np.lexsort((losses[:, 0], violation)):
        if stays.sum() >= math.ceil(keep * len(losses)):
            break
        stays[row] = True
    return stays
