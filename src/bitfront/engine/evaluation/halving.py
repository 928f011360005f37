"""Successive halving (Jamieson, Talwalkar 2016) for fronts: which candidates are not trained to the end.

A cohort is a group of candidates that are compared with each other. It is trained up to a rung, a number of epochs.
There a share `keep` of the cohort goes on: the candidates that no other one dominates, in accuracy
(or what leads in another task) and in every cost in closed form (with the weights of that moment), then the most
accurate of the others. The front goes on even if it is
larger than this share. The rest stops.

Cohorts are consecutive proposals, and their size is a setting. So whether a candidate stops depends on its cohort only,
not on the clock or the number of processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitfront.pareto import Losses, non_dominated


@dataclass(frozen=True)
class Halving:
    """The settings of successive halving.

    Attributes:
        rungs: numbers of epochs after which candidates are compared, ascending, all before the last epoch.
        keep: the share of a cohort that goes on at each rung, above 0, below 1.
        cohort: number of candidates that are compared with each other.
        costs: (metric in closed form, 1 if smaller is better or −1 if larger is better).
    """

    rungs: tuple[int, ...]
    keep: float
    cohort: int
    costs: tuple[tuple[str, float], ...]


def going_on(losses: Losses, keep: float) -> NDArray[np.bool_]:
    """Which candidates of a cohort go on, bool, shape (candidates,).

    Args:
        losses: shape (candidates, objectives), smaller is better; the first column stands for accuracy.
        keep: the share that goes on, above 0, at most 1. More go on if the front is larger.
    """
    stays = np.zeros(len(losses), dtype=bool)
    stays[non_dominated(losses)] = True
    # A stable sort: of equally accurate candidates the first ones go on.
    for row in np.argsort(losses[:, 0], kind="stable"):
        if stays.sum() >= math.ceil(keep * len(losses)):
            break
        stays[row] = True
    return stays
