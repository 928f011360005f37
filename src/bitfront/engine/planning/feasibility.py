"""The constraints of a search: which candidates cannot fulfil them, known before they are evaluated, and which do not.

What follows from the candidate in closed form is checked first, for whole batches, and what violates it is never
evaluated. How small (or large) such a metric can become at all is found before the search, so that a constraint that
nothing can fulfil is refused with a number.
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
from bitfront.spaces.base import Codes

Values = NDArray[np.float64]
#: Rounds of trying every option of every group; sums and maxima over sites need two.
ROUNDS = 4


@dataclass(frozen=True, eq=False)
class Feasibility:
    """Constraints on what an evaluator measures. Without any, everything fulfils them.

    Attributes:
        constraints: resolved: none of them is relative to the float model.
    """

    evaluator: Evaluator
    constraints: tuple[Constraint, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.constraints)

    def before(self, codes: Codes) -> Values:
        """By how much candidates violate what is known without evaluating them; 0 where they do not, shape (codes,)."""
        known = [c for c in self.constraints if c.metric in self.evaluator.closed_form]
        if not known:
            return np.zeros(len(codes))
        return total(known, self.evaluator.closed_form_values(codes, {c.metric for c in known}))

    def after(self, values: Mapping[str, Values]) -> Values:
        """By how much evaluated candidates violate the constraints; 0 where they do not, or where they failed."""
        if not self.constraints:
            return np.zeros(len(next(iter(values.values()))))
        return total(self.constraints, values)


def read(asked: Mapping[str, str], evaluator: Evaluator) -> tuple[Constraint, ...]:
    """The constraints of ``[search.constraints]``.

    Raises:
        ConfigError: one cannot be read; its key is named.
    """
    metrics = {m.name: m for runner in evaluator.runners for m in runner.produces}
    found = []
    for name, condition in asked.items():
        try:
            found.append(words.parse(words.statement(name, condition), metrics))
        except ConfigError as error:
            error.key = ("search", "constraints", name)
            raise
    return tuple(found)


def check(evaluator: Evaluator, constraints: Sequence[Constraint], *, trained: bool) -> Codes:
    """Refuse what nothing in the space can fulfil.

    Args:
        trained: whether the weights are the ones of the search; without, metrics that look at them are not checked.

    Returns:
        For each constraint that can be checked the candidate that fulfils it best, and the one that violates all of
        them together least, shape (candidates, parameters): where a search under constraints should begin.

    Raises:
        ConfigError: a constraint cannot be fulfilled; says how near any candidate gets.
    """
    metrics = {m.name: m for runner in evaluator.runners for m in runner.produces}
    known = [
        c
        for c in constraints
        if c.metric in evaluator.closed_form and (trained or c.metric not in evaluator.of_weights)
    ]
    found = []
    for own in known:
        code = nearest(evaluator, [own])
        found.append(code)
        value = evaluator.closed_form_values(code[None], {own.metric})[own.metric]
        if own.excess(value)[0] > 0:
            unit = metrics[own.metric].unit
            word = "smallest" if own.comparison in ("<", "<=") else "nearest"
            raise ConfigError(
                f"{own.text!r} cannot be fulfilled: the {word} {own.metric} that this space can reach is "
                f"{value[0]:,.6g}{' ' + unit if unit else ''}",
                key=("search", "constraints", own.text.split()[0]),
            )
    if len(known) > 1:
        found.append(nearest(evaluator, known))
    return np.array(found, dtype=np.int64).reshape(len(found), len(evaluator.space.parameters))


def nearest(evaluator: Evaluator, constraints: Sequence[Constraint]) -> NDArray[np.int64]:
    """The candidate that goes furthest towards constraints on closed-form metrics.

    From the best of the uniform candidates, one group after the other takes its best option, until nothing changes:
    exact for sums over sites. A maximum over sites (``peak_memory``, a parameter that sites share) does not move as
    long as another site holds it up, which is why the descent begins where all sites are narrow.
    """
    space = evaluator.space
    names = {c.metric for c in constraints}
    last = np.array([[group.size - 1 for group in space.groups]], dtype=np.int64)
    starts = np.concatenate([space.numbered(0, 1), space.codes(last), space.uniform()])
    values = evaluator.closed_form_values(starts, names)
    options = space.options(starts)[int(np.argmin(sum(_height(c, values[c.metric]) for c in constraints)))]
    for _ in range(ROUNDS):
        before = options.copy()
        for g, group in enumerate(space.groups):
            if group.size == 1:
                continue
            rows = np.repeat(options[None], group.size, axis=0)
            rows[:, g] = np.arange(group.size)
            values = evaluator.closed_form_values(space.codes(rows), names)
            options[g] = int(np.argmin(sum(_height(c, values[c.metric]) for c in constraints)))
        if (options == before).all():
            break
    code: NDArray[np.int64] = space.codes(options[None])[0]
    return code


def _height(own: Constraint, values: Values) -> Values:
    """How far values are on the wrong side, or how little on the right one: smaller is better."""
    scale = abs(own.bound) if own.bound else 1.0
    if own.comparison in ("<", "<="):
        return (values - own.bound) / scale
    if own.comparison in (">", ">="):
        return (own.bound - values) / scale
    return np.abs(values - own.bound) / scale
