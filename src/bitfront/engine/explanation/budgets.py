"""The predicted front of a run, what a budget's next unit buys along it, and the best candidate for any budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bitfront.constraints import Constraint
from bitfront.engine.explanation.layers import changes_between, known_or_expected
from bitfront.engine.explanation.model import Model, Trials
from bitfront.engine.explanation.option_costs import Cost
from bitfront.engine.explanation.results import Answer, Prices, Step
from bitfront.errors import ConfigError, RunError
from bitfront.pareto import non_dominated
from bitfront.spaces.base import Codes
from bitfront.strategies.base import History, Knowledge
from bitfront.strategies.prediction import ENUMERATED, MEMBERS, Modelled, Prediction
from bitfront.strategies.separable import SeparableFront, minimum
from bitfront.strategies.separable import front as separable_front

Floats = NDArray[np.float64]

#: Rounds of changes of one layer, and candidates from which they start.
ROUNDS, STARTS = 2, 4
#: Members of an exact front of the main effects that are taken.
TAKEN = 128
#: Bounds such as 0.7 are not exact.
SLACK = 1e-9


@dataclass(frozen=True, eq=False)
class Outlook:
    """Everything that budgets are answered from.

    Attributes:
        model: of the explained metric.
        trials: the trials that it was fitted to, and the others.
        costs: metrics in closed form that are explained.
        others: more of them, which budgets may be on.
        around: candidates on the front, shape (candidates, groups).
    """

    model: Model
    trials: Trials
    costs: Sequence[Cost]
    others: Sequence[Cost]
    around: Codes

    @cached_property
    def named(self) -> dict[str, Cost]:
        """Every metric in closed form by its name."""
        return {cost.name: cost for cost in (*self.costs, *self.others)}

    @property
    def exhaustive(self) -> bool:
        """Whether every candidate of the space is predicted."""
        return self.model.space.size <= ENUMERATED

    @cached_property
    def pool(self) -> Codes:
        """The candidates that are compared, by their options: all of a small space, otherwise those on and around the
        predicted fronts, and the trials."""
        space = self.model.space
        if self.exhaustive:
            return space.options(space.numbered(0, space.size))
        parts = [self.trials.options]
        for cost in self.costs:
            solved = self.exact[cost.name]
            rows = np.unique(np.linspace(0, len(solved.values) - 1, min(TAKEN, len(solved.values))).astype(np.int64))
            near = np.concatenate([solved.options[rows], self.around])
            prediction = self._prediction(cost)
            for _ in range(ROUNDS):
                pool = prediction.pool(near)
                front = non_dominated(pool.losses)
                starts = front[np.unique(np.linspace(0, len(front) - 1, min(MEMBERS, len(front))).astype(np.int64))]
                changed = prediction.changed(near[starts])
                kept = changed.options[non_dominated(changed.losses)]
                near = np.concatenate([near[front], kept])
            parts += [solved.options[rows], near]
        return np.unique(np.concatenate(parts), axis=0)

    @cached_property
    def losses(self) -> Floats:
        """Losses of the pool: measured where they were, else expected; shape (candidates,)."""
        return self.losses_of(self.pool)

    @cached_property
    def known(self) -> NDArray[np.bool_]:
        """Which candidates of the pool were evaluated."""
        known: NDArray[np.bool_] = self.trials.find(self.model.space, self.pool) >= 0
        return known

    def losses_of(self, options: Codes) -> Floats:
        """Losses of candidates: measured where they were, else expected."""
        found = self.trials.find(self.model.space, options)
        losses = self.model.losses(options)
        losses[found >= 0] = self.trials.losses[found[found >= 0]]
        return losses

    @cached_property
    def mains(self) -> list[Floats]:
        """Per group the main effect of each option around the front, on the transformed loss."""
        return self.model.effects.mains(self.around)

    @cached_property
    def exact(self) -> dict[str, SeparableFront]:
        """Cost → the exact front of the main effects."""
        return {cost.name: separable_front(self.mains, cost.tables) for cost in self.costs}

    def _prediction(self, cost: Cost) -> Prediction:
        space = self.model.space
        known = Knowledge(costs={1: lambda codes: cost.of(space.options(codes))})
        nothing = History(len(space.parameters), 2)
        return Prediction(space, nothing, known, (Modelled(0, self.model.effects, self.model.link),), 2)

    # -- prices

    def prices(self, cost: Cost, allowed: NDArray[np.bool_]) -> Prices:
        """What more of a cost buys along the predicted front.

        Args:
            cost: the cost.
            allowed: which candidates of the pool keep the constraints of the search.
        """
        rows = np.flatnonzero(allowed)
        both = np.stack([cost.of(self.pool[rows]), self.losses[rows]], axis=1)
        hull = rows[_hull(both)]
        at, losses = cost.of(self.pool[hull]), self.losses[hull]
        values = known_or_expected(self.model, self.trials, self.pool[hull])
        steps = []
        for i, (row, value) in enumerate(zip(hull.tolist(), values, strict=True)):
            last = i + 1 == len(hull)
            price = 0.0 if last else float((losses[i] - losses[i + 1]) / (at[i + 1] - at[i]))
            changes = {} if last else changes_between(self.model.space, self.pool[row], self.pool[hull[i + 1]])
            steps.append(Step(float(at[i]), value, price, changes))
        return Prices(cost.name, tuple(steps), self.exhaustive)

    # -- answers

    def allowed(self, constraints: Sequence[Constraint], options: Codes, losses: Floats) -> NDArray[np.bool_]:
        """Which candidates keep constraints, by costs in closed form and by measured or expected losses."""
        costs = {c.metric: self.named[c.metric].of(options) for c in constraints if c.metric in self.named}
        return self._keeping(constraints, costs, losses)

    def _keeping(
        self, constraints: Sequence[Constraint], costs: Mapping[str, Floats], losses: Floats
    ) -> NDArray[np.bool_]:
        good = np.ones(len(losses), dtype=bool)
        for constraint in constraints:
            is_metric = constraint.metric == self.model.metric
            good &= constraint.excess(self.model.sign * losses if is_metric else costs[constraint.metric]) == 0
        return good

    def answer(self, constraints: Sequence[Constraint]) -> Answer:
        """The best candidate under constraints: with the best metric, or, if one of them is on the explained metric,
        with the least of the first cost.

        Raises:
            RunError: no candidate keeps them, as far as is known.
        """
        least = bool(self.costs) and any(c.metric == self.model.metric for c in constraints)
        options, losses = self._best(constraints, self.pool, self.losses, least)
        if not self.exhaustive:
            if not least and (solved := self._solved(constraints)) is not None:
                options = np.concatenate([options, solved[None]])
                losses = np.concatenate([losses, self.losses_of(solved[None])])
            for _ in range(ROUNDS):
                changed, expected = self._neighbours(constraints, options, least)
                options = np.concatenate([options, changed])
                options, losses = self._best(constraints, options, np.concatenate([losses, expected]), least)
        if not len(options):
            raise RunError(self._why_none(constraints))
        answer = self.described(options[0], self.costs[0].name if least else self.model.metric)
        chance = self._chance(constraints, options[0]) if answer.value.trial is None else None
        return replace(answer, budgets=tuple(dict.fromkeys(c.text for c in constraints)), chance=chance)

    def _chance(self, constraints: Sequence[Constraint], options: Codes) -> float | None:
        """The probability that a candidate keeps the constraints on the explained metric; None if there are none."""
        on_metric = [c for c in constraints if c.metric == self.model.metric]
        if not on_metric:
            return None
        least = max((c.bound for c in on_metric if c.comparison in (">", ">=", "==")), default=-np.inf)
        most = min((c.bound for c in on_metric if c.comparison in ("<", "<=", "==")), default=np.inf)
        return self.model.chance(options, least, most)

    def _best(
        self, constraints: Sequence[Constraint], options: Codes, losses: Floats, least: bool
    ) -> tuple[Codes, Floats]:
        """The best candidates that keep constraints, the very best first, with their losses."""
        rows = np.flatnonzero(self.allowed(constraints, options, losses))
        first = self.costs[0].of(options[rows]) if self.costs else np.zeros(len(rows))
        rows = rows[np.lexsort((losses[rows], first) if least else (first, losses[rows]))[:STARTS]]
        return options[rows], losses[rows]

    def _solved(self, constraints: Sequence[Constraint]) -> Codes | None:
        """The exact solution of the main effects under upper bounds on costs; None if there is none."""
        upper = [c for c in constraints if c.metric in self.named and c.comparison in ("<", "<=")]
        rooms = [c.bound - self.named[c.metric].first + SLACK * abs(c.bound) for c in upper]
        if len(upper) == 1 and upper[0].metric in self.exact:
            front = self.exact[upper[0].metric]
            at = int(np.searchsorted(front.costs, rooms[0], side="right")) - 1
            return None if at < 0 else front.options[at]
        if not upper:
            return None
        bounds = [(self.named[c.metric].tables, room) for c, room in zip(upper, rooms, strict=True)]
        return minimum(self.mains, bounds)

    def _neighbours(self, constraints: Sequence[Constraint], options: Codes, least: bool) -> tuple[Codes, Floats]:
        """The best of all candidates that differ from one of those given in one layer, and their losses."""
        groups = [g for g, group in enumerate(self.model.space.groups) if group.size > 1]
        sizes = [self.model.space.groups[g].size for g in groups]
        changes = self.model.effects.changes(options)
        losses = self.model.link.inverse(np.concatenate([changes[g] for g in groups], axis=1).ravel())
        names = {c.metric for c in constraints if c.metric in self.named} | {cost.name for cost in self.costs[:1]}
        costs = {name: self._changed_costs(self.named[name], options, groups) for name in names}
        rows = np.flatnonzero(self._keeping(constraints, costs, losses))
        first = costs[self.costs[0].name][rows] if self.costs else np.zeros(len(rows))
        rows = rows[np.lexsort((losses[rows], first) if least else (first, losses[rows]))[:STARTS]]
        member, at = np.divmod(rows, sum(sizes))
        starts = np.cumsum([0, *sizes[:-1]])
        which = np.searchsorted(starts, at, side="right") - 1
        changed = options[member].copy()
        changed[np.arange(len(rows)), np.array(groups)[which]] = at - starts[which]
        return changed, losses[rows]

    @staticmethod
    def _changed_costs(cost: Cost, options: Codes, groups: Sequence[int]) -> Floats:
        """A cost of all changes of candidates in one group, in the order of ``_neighbours``."""
        now = cost.of(options)[:, None]
        return np.concatenate(
            [now + cost.tables[g] - cost.tables[g][options[:, g], None] for g in groups], axis=1
        ).ravel()

    def described(self, options: Codes, optimised: str) -> Answer:
        """A candidate, given by its options of shape (groups,), as an answer to no budget."""
        space = self.model.space
        code = space.codes(options[None])[0]
        return Answer(
            budgets=(),
            optimised=optimised,
            config=space.decode(code),
            code=tuple(code.tolist()),
            costs={name: float(cost.of(options[None])[0]) for name, cost in self.named.items()},
            value=known_or_expected(self.model, self.trials, options[None])[0],
            exact=self.exhaustive,
            verified={},
        )

    def _why_none(self, constraints: Sequence[Constraint]) -> str:
        """Why no candidate keeps constraints."""
        for constraint in constraints:
            cost = self.named.get(constraint.metric)
            if cost is None:
                continue
            low = cost.first + sum(float(table.min()) for table in cost.tables)
            high = cost.first + sum(float(table.max()) for table in cost.tables)
            if (constraint.excess(np.linspace(low, high, 1001)) > 0).all():
                return (
                    f"no candidate of the space fulfils {constraint.text!r}: its {constraint.metric} is {low:g} to "
                    f"{high:g}"
                )
        texts = " and ".join(repr(c.text) for c in constraints)
        best = self.model.sign * float(self.losses.min())
        return f"no candidate is expected to fulfil {texts}; the best {self.model.metric} expected anywhere is {best:g}"


def checked(constraints: Sequence[Constraint], outlook: Outlook) -> None:
    """Refuse budgets on metrics that are neither explained nor known in closed form.

    Raises:
        ConfigError: there is one.
    """
    possible = [*outlook.named, outlook.model.metric]
    for constraint in constraints:
        if constraint.metric not in possible:
            raise ConfigError(
                f"{constraint.text!r}: {constraint.metric} is not predicted here; a budget is on one of: "
                f"{', '.join(possible)}"
            )


def _hull(both: Floats) -> NDArray[np.int64]:
    """Rows on the lower convex hull of (cost, loss), from the least cost to the least loss."""
    rows: list[int] = []
    for row in non_dominated(both).tolist():
        x, y = both[row]
        if rows and both[rows[-1]][0] == x:
            continue
        while len(rows) > 1:
            (x0, y0), (x1, y1) = both[rows[-2]], both[rows[-1]]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            rows.pop()
        rows.append(row)
    return np.array(rows, dtype=np.int64)
