"""Exact minima of sums over groups: the front of two sums, and one sum under bounds on others.

If every group adds a number per option to a value and to a cost, the front of value against cost follows by dynamic
programming over the groups (the multiple-choice knapsack problem; Kellerer, Pferschy and Pisinger 2004, chapter 11),
and the least value under several bounds by integer programming (HiGHS). Nothing is drawn at random.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitfront.pareto import non_dominated_sorted
from bitfront.spaces.base import Codes

Floats = NDArray[np.float64]

#: The largest number of partial sums that are kept after each group. If more are not dominated, the best one is kept
#: per interval of the cost.
KEPT = 2048


@dataclass(frozen=True, eq=False)
class SeparableFront:
    """The candidates that have the least value for their cost.

    Attributes:
        options: int64, shape (members, groups), sorted by cost.
        values: shape (members,), falling.
        costs: shape (members,), rising.
        exact: whether every member of the front is there. If not, it is the best per interval of the cost.
    """

    options: Codes
    values: Floats
    costs: Floats
    exact: bool


def front(values: Sequence[Floats], costs: Sequence[Floats], most: int = KEPT) -> SeparableFront:
    """The front of two sums over groups, both to be minimised.

    Args:
        values: per group, what each option adds to the value, shape (options,).
        costs: per group, what each option adds to the cost, shape (options,). Options whose cost is NaN are left out.
        most: the largest number of partial sums that are kept after each group.
    """
    value, cost = np.zeros(1), np.zeros(1)
    #: Per group: (the partial sum that each kept one continues, the option that it adds).
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    exact = True
    for of_value, of_cost in zip(values, costs, strict=True):
        both = np.stack([(cost[:, None] + of_cost).ravel(), (value[:, None] + of_value).ravel()], axis=1)
        order = np.lexsort(both.T[::-1])
        order = order[np.isfinite(both[order]).all(axis=1)]
        kept = order[non_dominated_sorted(both[order])]
        # Of equal sums one is enough.
        rows = both[kept]
        kept = kept[np.concatenate([[True], (np.diff(rows, axis=0) != 0).any(axis=1)])[: len(kept)]]
        if len(kept) > most:
            kept, exact = _thinned(kept, both[kept, 0], most), False
        cost, value = both[kept, 0], both[kept, 1]
        steps.append((kept // len(of_value), kept % len(of_value)))
    options = np.zeros((len(cost), len(steps)), dtype=np.int64)
    at = np.arange(len(cost))
    for g in range(len(steps) - 1, -1, -1):
        options[:, g] = steps[g][1][at]
        at = steps[g][0][at]
    return SeparableFront(options, value, cost, exact)


def _thinned(rows: NDArray[np.int64], costs: Floats, most: int) -> NDArray[np.int64]:
    """The last row, which has the least value, in each of `most` intervals of the cost; `costs` rise."""
    cells = ((costs - costs[0]) / (costs[-1] - costs[0]) * (most - 1)).astype(np.int64)
    last = np.concatenate([cells[1:] != cells[:-1], [True]])
    last[0] = True
    kept: NDArray[np.int64] = rows[last]
    return kept


def minimum(values: Sequence[Floats], bounds: Sequence[tuple[Sequence[Floats], float]]) -> Codes | None:
    """The candidate with the least sum under bounds on other sums.

    Args:
        values: per group, what each option adds to the value, shape (options,).
        bounds: sums, given like `values`, each with the largest value that it may have.

    Returns:
        The option of each group, int64, shape (groups,); None if no candidate keeps the bounds.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # it loads slowly, and few searches need it
    from scipy.sparse import csr_array, vstack

    sizes = [len(v) for v in values]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    total = len(owner)
    one_each = csr_array((np.ones(total), (owner, np.arange(total))), shape=(len(sizes), total))
    constraints = [LinearConstraint(one_each, 1, 1)]
    if bounds:
        matrix = vstack([csr_array(np.concatenate(list(tables))[None]) for tables, _ in bounds])
        constraints.append(LinearConstraint(matrix, ub=[bound for _, bound in bounds]))
    solution = milp(
        np.concatenate(list(values)),
        integrality=np.ones(total),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if solution.x is None:
        return None
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return np.array([int(np.argmax(solution.x[a:b])) for a, b in itertools.pairwise(starts.tolist())], dtype=np.int64)
