"""The constraints of a search: which candidates violate them, before and after they are evaluated.

Constraints on metrics in closed form are checked first, for whole batches; a candidate that violates one is not
evaluated. Before the search, the smallest (or largest) possible value of such a metric is computed, so that a
constraint that no candidate can fulfil is an error that states this value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitfront import constraints as words
from bitfront.constraints import Constraint, total
from bitfront.engine.evaluation.interface import Evaluator
from bitfront.errors import ConfigError
from bitfront.metrics.base import Metric
from bitfront.spaces.base import Codes

Values = NDArray[np.float64]
#: At most so many passes of coordinate descent over the groups; sums and maxima over sites need two.
ROUNDS = 4


@dataclass(frozen=True, eq=False)
class Feasibility:
    """Constraints on the metrics of an evaluator. False if there are none; then every candidate fulfils them.

    Attributes:
        evaluator: gives the metrics.
        constraints: with absolute bounds: bounds relative to the float model are resolved.
    """

    evaluator: Evaluator
    constraints: tuple[Constraint, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.constraints)

    def before(self, codes: Codes) -> Values:
        """Total violation of the constraints on metrics in closed form, without evaluating the candidates.

        Args:
            codes: candidates, int64, shape (candidates, parameters).

        Returns:
            float64, shape (candidates,), 0 or more; 0 where every constraint is fulfilled.
        """
        known = [c for c in self.constraints if c.metric in self.evaluator.closed_form]
        if not known:
            return np.zeros(len(codes))
        return total(known, self.evaluator.closed_form_values(codes, {c.metric for c in known}))

    def after(self, values: Mapping[str, Values]) -> Values:
        """Total violation of all constraints by evaluated candidates.

        Args:
            values: metric → values, float64, shape (candidates,); NaN for candidates that failed.

        Returns:
            float64, shape (candidates,), 0 or more; 0 where every constraint is fulfilled, and for failed candidates.
        """
        if not self.constraints:
            return np.zeros(len(next(iter(values.values()))))
        return total(self.constraints, values)

    def margins(self, values: Mapping[str, Values]) -> Values:
        """Distances from the bounds of constraints that are only known after an evaluation.

        Args:
            values: as in ``after``.

        Returns:
            float64, shape (candidates, such constraints), as shares of the bounds: positive where one is violated, NaN
            where the metric is unknown.
        """
        later = [c for c in self.constraints if c.metric not in self.evaluator.closed_form]
        columns = [_distance(c, values[c.metric]) for c in later]
        return np.stack(columns, axis=1) if columns else np.zeros((len(next(iter(values.values()))), 0))


def read(conditions: Mapping[str, str], metrics: Sequence[Metric]) -> tuple[Constraint, ...]:
    """Parse the constraints of ``[search.constraints]``.

    Args:
        conditions: key → condition, as in the TOML.
        metrics: those that conditions may name.

    Raises:
        ConfigError: a condition cannot be parsed, or names an unknown metric; its key is named.
    """
    known, parsed = {metric.name: metric for metric in metrics}, []
    for name, condition in conditions.items():
        try:
            parsed.append(words.parse_constraint(words.statement(name, condition), known))
        except ConfigError as error:
            error.key = ("search", "constraints", name)
            raise
    return tuple(parsed)


def check(evaluator: Evaluator, constraints: Sequence[Constraint], *, trained: bool) -> Codes:
    """Check that the space has candidates that fulfil each constraint on a metric in closed form.

    Args:
        evaluator: gives the metrics.
        constraints: with absolute bounds.
        trained: whether the model has the weights of the search. If not, metrics that depend on weights are not
            checked.

    Returns:
        Candidates to start a search from, int64, shape (candidates, parameters): for each constraint that was checked
        the candidate that fulfils it best, and, if there are several, the one with the least total violation.

    Raises:
        ConfigError: no candidate fulfils a constraint; the message says the nearest value that one reaches.
    """
    metrics = {m.name: m for runner in evaluator.runners for m in runner.produces}
    known = [
        c
        for c in constraints
        if c.metric in evaluator.closed_form and (trained or c.metric not in evaluator.of_weights)
    ]
    starts = []
    for constraint in known:
        code = closest(evaluator, [constraint])
        starts.append(code)
        value = evaluator.closed_form_values(code[None], {constraint.metric})[constraint.metric]
        if constraint.excess(value)[0] > 0:
            unit = metrics[constraint.metric].unit
            word = "smallest" if constraint.comparison in ("<", "<=") else "nearest"
            raise ConfigError(
                f"{constraint.text!r} cannot be fulfilled: the {word} {constraint.metric} that this space can reach is "
                f"{value[0]:,.6g}{' ' + unit if unit else ''}; relax the constraint, or add choices to the space",
                key=("search", "constraints", constraint.text.split()[0]),
            )
    if len(known) > 1:
        starts.append(closest(evaluator, known))
    return np.array(starts, dtype=np.int64).reshape(len(starts), len(evaluator.space.parameters))


def closest(evaluator: Evaluator, constraints: Sequence[Constraint]) -> NDArray[np.int64]:
    """The candidate with the least total violation of constraints on metrics in closed form, or the largest margin.

    Coordinate descent: from the best of the uniform candidates, one group after the other takes its best option, until
    nothing changes. Exact for sums over sites. It can miss the optimum of a maximum over sites (``peak_memory``,
    a parameter that sites share), because such a maximum does not change while another site has it; therefore the
    descent starts where all sites are narrow.

    Args:
        evaluator: gives the metrics.
        constraints: one or more, with absolute bounds, all on metrics in closed form.

    Returns:
        A code, int64, shape (parameters,).
    """
    space = evaluator.space
    names = {c.metric for c in constraints}
    last = np.array([[group.size - 1 for group in space.groups]], dtype=np.int64)
    starts = np.concatenate([space.numbered(0, 1), space.codes(last), space.uniform()])
    values = evaluator.closed_form_values(starts, names)
    options = space.options(starts)[int(np.argmin(sum(_distance(c, values[c.metric]) for c in constraints)))]
    for _ in range(ROUNDS):
        before = options.copy()
        for g, group in enumerate(space.groups):
            if group.size == 1:
                continue
            rows = np.repeat(options[None], group.size, axis=0)
            rows[:, g] = np.arange(group.size)
            values = evaluator.closed_form_values(space.codes(rows), names)
            options[g] = int(np.argmin(sum(_distance(c, values[c.metric]) for c in constraints)))
        if (options == before).all():
            break
    code: NDArray[np.int64] = space.codes(options[None])[0]
    return code


def _distance(constraint: Constraint, values: Values) -> Values:
    """Signed distance of values from the bound, as a share of it: positive where violated; smaller is better."""
    scale = abs(constraint.bound) if constraint.bound else 1.0
    if constraint.comparison in ("<", "<="):
        return (values - constraint.bound) / scale
    if constraint.comparison in (">", ">="):
        return (constraint.bound - values) / scale
    return np.abs(values - constraint.bound) / scale
