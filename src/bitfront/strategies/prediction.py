"""What a model expects of candidates, and which of them to evaluate: the predicted front, and what would add to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bitfront.pareto import non_dominated
from bitfront.spaces.base import Codes, Space
from bitfront.strategies.anova import Effects
from bitfront.strategies.base import History, Knowledge
from bitfront.strategies.gains import distances, gains, reference
from bitfront.strategies.separable import front as separable_front

Floats = NDArray[np.float64]

#: In a space of at most this size, everything is predicted.
ENUMERATED = 2**15
#: Members of a front from which changes are tried, and partial sums in the exact front.
MEMBERS, PARTIAL = 32, 256
#: The most promising candidates, which are compared one by one.
COMPARED = 512
#: The most promising candidates of a large space, of which some may be known.
KEPT = 2048
#: The largest logarithm of a result.
LARGEST = 500.0
#: Quantiles of a normal distribution, for expected gains.
QUANTILES = (-1.28, -0.52, 0.0, 0.52, 1.28)


@dataclass(frozen=True)
class Link:
    """How results are transformed before they are modelled.

    Attributes:
        floor: log(result − floor) is modelled; −infinity: the result itself.
    """

    floor: float

    @staticmethod
    def of(results: Floats, offset: float) -> Link:
        """The link whose floor is below the least of `results` by the share `offset` of their extent."""
        extent = float(np.ptp(results))
        return Link(float(results.min()) - offset * (extent if extent > 0 else 1.0))

    def forward(self, results: Floats) -> Floats:
        """Transformed results, of the same shape."""
        transformed: Floats = np.log(results - self.floor) if np.isfinite(self.floor) else results
        return transformed

    def inverse(self, transformed: Floats) -> Floats:
        """Results, of the same shape. Those far above everything known are cut, so that none is infinite."""
        return np.exp(np.minimum(transformed, LARGEST)) + self.floor if np.isfinite(self.floor) else transformed

    def slope(self, results: Floats) -> Floats:
        """The derivative of ``forward``, of the same shape."""
        return 1.0 / (results - self.floor) if np.isfinite(self.floor) else np.ones_like(results)


@dataclass(frozen=True, eq=False)
class Modelled:
    """A result that is modelled.

    Attributes:
        objective: which one it is; None if it is the distance from a constraint.
        effects: the model of the transformed results.
        link: the transformation.
    """

    objective: int | None
    effects: Effects
    link: Link


@dataclass(frozen=True, eq=False)
class Pool:
    """Candidates with what is expected of them.

    Attributes:
        options: int64, shape (candidates, groups).
        losses: shape (candidates, objectives).
        violation: shape (candidates,), 0 where all constraints are fulfilled.
    """

    options: Codes
    losses: Floats
    violation: Floats

    def __getitem__(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Pool:
        return Pool(self.options[rows], self.losses[rows], self.violation[rows])

    def with_others(self, others: Pool) -> Pool:
        """Both together."""
        return Pool(
            np.concatenate([self.options, others.options]),
            np.concatenate([self.losses, others.losses]),
            np.concatenate([self.violation, others.violation]),
        )


@dataclass(frozen=True, eq=False)
class Prediction:
    """What is expected of every candidate of a space.

    Attributes:
        space: the space.
        history: the candidates with results. What is expected is computed once, before it grows.
        knowledge: what is known in closed form.
        models: the models of everything else.
        objectives: number of objectives.
        focus: the largest losses that matter, shape (objectives,); None: all do.
        sufficient: losses that are as good as any smaller one, shape (objectives,); None: there are none.
    """

    space: Space
    history: History
    knowledge: Knowledge
    models: Sequence[Modelled]
    objectives: int
    focus: Floats | None = None
    sufficient: Floats | None = None

    def pool(self, options: Codes) -> Pool:
        """What is expected of candidates, given by their options, shape (candidates, groups)."""
        return self._pool(options, [model.effects.mean(options) for model in self.models])

    def _pool(self, options: Codes, transformed: Sequence[Floats]) -> Pool:
        codes = self.space.codes(options)
        losses, violation = np.empty((len(options), self.objectives)), np.zeros(len(options))
        for objective, cost in self.knowledge.costs.items():
            losses[:, objective] = cost(codes)
        if self.knowledge.violation is not None:
            violation += self.knowledge.violation(codes)
        for model, values in zip(self.models, transformed, strict=True):
            expected = model.link.inverse(values)
            if model.objective is None:
                violation += np.maximum(expected, 0.0)
            else:
                losses[:, model.objective] = expected
        # A cost without a value, such as the size of a program that cannot be written, is that of a failure.
        fine = np.flatnonzero(np.isfinite(losses).all(axis=1))
        return Pool(options, self._worth(losses), violation)[fine]

    def _worth(self, losses: Floats) -> Floats:
        """Losses that count, of the same shape: what is better than sufficient counts as sufficient."""
        return losses if self.sufficient is None else np.maximum(losses, self.sufficient)

    def changed(self, options: Codes) -> Pool:
        """All candidates that differ from those given in the option of one group."""
        several = [g for g, group in enumerate(self.space.groups) if group.size > 1]
        parts, moved = [], [model.effects.changes(options) for model in self.models]
        expected: list[list[Floats]] = [[] for _ in self.models]
        for g in several:
            size = self.space.groups[g].size
            part = np.repeat(options, size, axis=0)
            part[:, g] = np.tile(np.arange(size), len(options))
            parts.append(part)
            for values, changes in zip(expected, moved, strict=True):
                values.append(changes[g].ravel())
        return self._pool(np.concatenate(parts), [np.concatenate(values) for values in expected])

    def best(self, n: int) -> Codes:
        """Up to `n` candidates that are not in the history, those that are expected to add most first.

        Returns:
            Codes, shape (candidates, parameters).
        """
        pool, point = self._promising
        if not len(pool.options):
            return self.space.codes(pool.options)
        chosen = _chosen(pool, lambda: self._outcomes, self._front, point, n)
        return self.space.codes(pool.options[chosen])

    def gains_more(self, resolution: Floats) -> bool:
        """Whether any candidate that is not in the history has a chance of 10 % to beat the front by more than
        `resolution`, shape (objectives,): it would add to the front even if its losses were so much larger.

        The most promising ones are looked at, as for a proposal. Their means alone would end a search too early: what
        the model knows least is then left out.
        """
        pool, point = self._promising
        able = pool.violation <= 0
        return any((gains(self._front, point, losses[able] + resolution) > 0).any() for losses in self._outcomes)

    @cached_property
    def _promising(self) -> tuple[Pool, Floats]:
        """(the most promising candidates that are not in the history, the reference point)."""
        pool = self._unknown(self.history, self._front)
        if not len(pool.options):
            return pool, np.zeros(self.objectives)
        point = self._point(self._front, pool)
        return pool[_order(pool, self._front, point)[:COMPARED]], point

    @cached_property
    def _front(self) -> Floats:
        """Losses of the front so far, shape (members, objectives); none while nothing fulfils the constraints."""
        losses = self._worth(self.history.losses[front_rows(self.history, len(self.history))])
        return losses[non_dominated(losses)]

    def _unknown(self, history: History, front: Floats) -> Pool:
        """The candidates that are not in the history: all, or those around the predicted front of a large space."""
        if self.space.size <= ENUMERATED:
            return self.pool(self.space.options(history.fresh(self.space.numbered(0, self.space.size))))
        return self._solved(history, front)

    @cached_property
    def _outcomes(self) -> list[Floats]:
        """Possible losses of the promising candidates, equally likely, each of shape (candidates, objectives)."""
        pool, _ = self._promising
        outcomes = [pool.losses.copy() for _ in QUANTILES]
        for model in self.models:
            if model.objective is None:
                continue
            mean, deviation = model.effects.mean(pool.options), model.effects.deviation(pool.options)
            for outcome, quantile in zip(outcomes, QUANTILES, strict=True):
                outcome[:, model.objective] = model.link.inverse(mean + quantile * deviation)
        return [self._worth(outcome) for outcome in outcomes]

    def _point(self, front: Floats, pool: Pool) -> Floats:
        """The reference point: of the front so far and the predicted one, so that both of their ends count."""
        fulfilling = pool.losses[pool.violation <= 0]
        both = np.concatenate([front, fulfilling if len(front) or len(fulfilling) else pool.losses])
        return reference(both[non_dominated(both)], self.focus)

    def _solved(self, history: History, front: Floats) -> Pool:
        """Unknown candidates on and around the predicted front of a space that is too large to enumerate."""
        members = self.space.options(history.codes[self._members(history)])
        pool = self.pool(members)
        for options in self._exact_fronts(members):
            pool = pool.with_others(self.pool(options))
        for _ in range(2):
            point = self._point(front, pool)
            pool = pool.with_others(self.changed(pool.options[_spread_pool(pool, point)]))
        pool = pool[_order(pool, front, self._point(front, pool))[:KEPT]]
        return self.pool(self.space.options(history.fresh(self.space.codes(pool.options))))

    def _members(self, history: History) -> NDArray[np.int64]:
        """Rows of evaluated candidates around which the model is solved: the front, or what violates least."""
        rows = np.flatnonzero(np.isfinite(history.losses).all(axis=1))
        fulfilling = rows[history.violation[rows] == 0]
        if not len(fulfilling):
            return rows[np.argsort(history.violation[rows], kind="stable")][:MEMBERS]
        losses = self._worth(history.losses[fulfilling])
        chosen: NDArray[np.int64] = fulfilling[spread(losses, reference(losses[non_dominated(losses)], self.focus))]
        return chosen

    def _exact_fronts(self, members: Codes) -> Iterator[Codes]:
        """Predicted fronts of pairs of results, exact for the main effects around `members`."""
        tables = [[change.mean(axis=0) for change in model.effects.changes(members)] for model in self.models]
        for cost in self.knowledge.costs.values():
            tables.append(cost_tables(self.space, cost, members[:1]))
        for i, values in enumerate(tables[: len(self.models)]):
            for costs in tables[i + 1 :]:
                solved = separable_front(values, costs, PARTIAL)
                if not len(solved.values):
                    continue
                rows = np.linspace(0, len(solved.values) - 1, min(2 * MEMBERS, len(solved.values))).astype(np.int64)
                yield solved.options[rows]


def front_rows(history: History, length: int) -> NDArray[np.int64]:
    """The rows of the front of the first `length` candidates of a history, of those that fulfil the constraints."""
    fulfilling = np.flatnonzero(history.violation[:length] == 0)
    return fulfilling[non_dominated(history.losses[fulfilling])]


def cost_tables(space: Space, cost: Callable[[Codes], Floats], options: Codes | None = None) -> list[Floats]:
    """Per group what its options add to a cost in closed form, shape (options,), compared with a candidate.

    Args:
        space: the space.
        cost: from canonical codes to costs.
        options: of the candidate, shape (1, groups); None: the first option everywhere.
    """
    start = np.zeros((1, len(space.groups)), dtype=np.int64) if options is None else options
    rows = np.repeat(start, sum(group.size for group in space.groups), axis=0)
    places, end = [], 0
    for g, group in enumerate(space.groups):
        places.append(slice(end, end + group.size))
        rows[places[-1], g] = np.arange(group.size)
        end += group.size
    values = cost(space.codes(rows)) - cost(space.codes(start))
    return [values[place] for place in places]


def spread(losses: Floats, point: Floats, most: int = MEMBERS) -> NDArray[np.int64]:
    """Rows of up to `most` members of the front of `losses`, evenly along it; those within `point` if any are."""
    rows = non_dominated(losses)
    inside = rows[(losses[rows] < point).all(axis=1)]
    rows = inside if len(inside) else rows
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(np.int64))]


def _spread_pool(pool: Pool, point: Floats) -> NDArray[np.int64]:
    """Rows of a pool from which changes are tried: its front, or what violates the constraints least."""
    fulfilling = np.flatnonzero(pool.violation <= 0)
    if not len(fulfilling):
        return np.argsort(pool.violation, kind="stable")[:MEMBERS]
    return fulfilling[spread(pool.losses[fulfilling], point)]


def _order(pool: Pool, front: Floats, point: Floats) -> NDArray[np.int64]:
    """The rows of a pool, the most promising first: what fulfils the constraints and gains most, what fulfils them and
    is closest to the front, what violates them least."""
    fulfilling = np.flatnonzero(pool.violation <= 0)
    others = np.flatnonzero(pool.violation > 0)
    others = others[np.argsort(pool.violation[others], kind="stable")]
    losses = pool.losses[fulfilling]
    gained = gains(front, point, losses)
    # Nothing gained within the focus is worth less than what is near the front there.
    order = np.lexsort((_behind(front, point, losses), -gained))
    return np.concatenate([fulfilling[order], others])


def _behind(front: Floats, point: Floats, losses: Floats) -> Floats:
    """How far candidates are behind the front, or behind the reference point, whichever is more."""
    behind = distances(front, losses) if len(front) else np.zeros(len(losses))
    extent = np.where(np.isfinite(point) & (point != 0), np.abs(point), 1.0)
    result: Floats = np.maximum(behind, ((losses - point) / extent).max(axis=1))
    return result


def _chosen(
    pool: Pool, outcomes: Callable[[], Sequence[Floats]], front: Floats, point: Floats, n: int
) -> NDArray[np.int64]:
    """Rows of up to `n` candidates, one after the other: each adds most to the front and those before it."""
    able = pool.violation <= 0
    taken: list[int] = []
    # Where nothing is gained by the mean, the expected gain decides.
    for losses_of in (lambda: [pool.losses], outcomes):
        possible = losses_of() if len(taken) < n else []
        while len(taken) < n:
            gained = np.mean([gains(front, point, losses) for losses in possible], axis=0)
            gained = np.where(able, gained, 0.0)
            gained[taken] = 0.0
            best = int(np.argmax(gained))
            if gained[best] <= 0:
                break
            taken.append(best)
            front = np.concatenate([front, pool.losses[best : best + 1]])
    rest = np.setdiff1d(np.arange(len(pool.losses)), taken)[: n - len(taken)]
    return np.concatenate([np.array(taken, dtype=np.int64), rest])
