"""Which candidates are not worth training on: successive halving (Jamieson, Talwalkar 2016), for fronts.

A cohort of candidates is trained to a rung. Those that others of the cohort dominate there, in accuracy and in every
cost that needs no data (by the weights they have there), stop, the least accurate first, until so many are left as are
to be kept; whoever is on the cohort's own front goes on. Cohorts are cut from what is proposed, in order, and their
size is a setting: whether a candidate stops depends on its cohort, and on neither the clock nor the number of
processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitfront.pareto import Losses, non_dominated


@dataclass(frozen=True)
class Halving:
    """When to look, and how many may go on.

    Attributes:
        rungs: epochs after which candidates are compared, ascending, all before the last one.
        keep: the share that goes on at each.
        cohort: how many candidates are compared with each other.
        costs: (closed-form metric, 1 where smaller is better, −1 where larger is).
    """

    rungs: tuple[int, ...]
    keep: float
    cohort: int
    costs: tuple[tuple[str, float], ...]


def going_on(losses: Losses, keep: float) -> NDArray[np.bool_]:
    """Which candidates go on, shape (candidates,).

    Args:
        losses: shape (candidates, objectives), smaller is better; the first is that of accuracy.
        keep: the share that goes on at least; more do where the front is larger.
    """
    stays = np.zeros(len(losses), dtype=bool)
    stays[non_dominated(losses)] = True
    # Equal ones in the order given.
    for row in np.argsort(losses[:, 0], kind="stable"):
        if stays.sum() >= math.ceil(keep * len(losses)):
            break
        stays[row] = True
    return stays
