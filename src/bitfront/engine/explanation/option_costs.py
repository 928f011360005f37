"""What options cost in closed form: sums over the groups of a space, checked against every trial."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitfront.engine.storage.records import OptionCosts
from bitfront.engine.storage.run import Run
from bitfront.spaces.base import Codes

Floats = NDArray[np.float64]

#: Options of all groups together, at most, for which costs are worked out from trials.
MOST = 600


@dataclass(frozen=True, eq=False)
class Cost:
    """A metric that adds up over the groups.

    Attributes:
        name: the metric.
        first: its value with the first option everywhere.
        tables: per group, what each option adds, shape (options,).
    """

    name: str
    first: float
    tables: tuple[Floats, ...]

    def of(self, options: Codes) -> Floats:
        """The metric of candidates, shape (candidates,).

        Args:
            options: shape (candidates, groups).
        """
        total = np.full(len(options), self.first)
        for g, table in enumerate(self.tables):
            total += table[options[:, g]]
        return total


def costs_of(run: Run) -> tuple[list[Cost], list[str]]:
    """(The metrics of a run that add up over the groups, remarks on those that do not).

    They are what the search stored; of an older run they follow from the trials, if these determine them. A metric for
    which the sums are not what a trial has is left out.
    """
    columns, remarks = run.columns, []
    complete = np.flatnonzero(columns.complete)
    options = run.space.options(columns.codes(complete))
    known: Mapping[str, OptionCosts] = run.option_costs or _worked_out(run, options, complete)
    costs, wrong = [], set()
    for name, kept in known.items():
        cost = Cost(name, kept.first, tuple(np.array(table) for table in kept.options))
        if name not in columns.metrics or [len(t) for t in cost.tables] != [g.size for g in run.space.groups]:
            continue
        measured = columns.metrics[name][complete]
        if _equal(cost.of(options), measured):
            costs.append(cost)
        else:
            wrong.add(name)
            remarks.append(f"{name} of the trials is not the sum of what their options cost, so it is left out")
    wanted = {p.metric for p in run.objectives.parts} | {c.metric for c in run.constraints}
    added = {cost.name for cost in costs}
    for name in sorted(wanted - added - wrong):
        if run.sides.get(name) == "hw_runner":
            remarks.append(f"{name} does not add up layer by layer, so it is no budget here")
    return costs, remarks


def _equal(sums: Floats, measured: Floats) -> bool:
    return np.allclose(sums, measured, rtol=1e-9, atol=1e-9 * max(1.0, float(np.abs(measured).max(initial=0.0))))


def _worked_out(run: Run, options: Codes, complete: NDArray[np.int64]) -> dict[str, OptionCosts]:
    """Metric → costs that explain it exactly in all trials, where the trials determine what every option costs."""
    sizes = [group.size for group in run.space.groups]
    unknown = 1 + sum(size - 1 for size in sizes)
    if unknown > MOST or len(options) <= unknown:
        return {}
    design = np.ones((len(options), unknown))
    column = 1
    for g, size in enumerate(sizes):
        design[:, column : column + size - 1] = options[:, g, None] == np.arange(1, size)
        column += size - 1
    if np.linalg.matrix_rank(design) < unknown:
        return {}
    result = {}
    for name, values in run.columns.metrics.items():
        measured = values[complete]
        if run.sides[name] != "hw_runner" or not np.isfinite(measured).all():
            continue  # accuracy may add up by chance, and is no cost
        solution = np.linalg.lstsq(design, measured, rcond=None)[0]
        if _equal(design @ solution, measured):
            ends = np.cumsum([1, *(size - 1 for size in sizes)])
            tables = [(0.0, *solution[a:b].tolist()) for a, b in itertools.pairwise(ends.tolist())]
            result[name] = OptionCosts(float(solution[0]), tuple(tables))
    return result
