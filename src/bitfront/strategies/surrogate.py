"""The front in few evaluations: a model of the results, its exact front, and evaluations of that.

A Gaussian process of main effects and pairwise interactions (``anova.py``) is fitted to the results so far. What is
known in closed form, such as sizes, is not modelled. The predicted front is computed, by enumeration where the space is
small, and else exactly for the main effects (``separable.py``) and then improved by all changes of one group, twice.
The candidates with the largest expected gain of hypervolume are evaluated, and the model is fitted again. Expected
means *by the mean of the model*: a bonus for what is uncertain only cost evaluations. If nothing is expected to gain,
the candidates that are closest to the front are evaluated.

Everything is a function of the arguments of ``propose`` and of ``knowledge``. Sums do not use BLAS, so a search that is
resumed with another number of threads continues exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bitfront.pareto import non_dominated
from bitfront.spaces.base import Codes, Space
from bitfront.strategies import STRATEGIES
from bitfront.strategies.anova import Columns, Effects, Scales, fitted
from bitfront.strategies.base import History, Strategy, StrategySettings, latin_hypercube, unseen_neighbours
from bitfront.strategies.elimination import Solver, solve_with_determinant
from bitfront.strategies.evolution import select
from bitfront.strategies.gains import gains, reference
from bitfront.strategies.prediction import PARTIAL, Link, Modelled, Prediction, cost_tables, front_rows, spread
from bitfront.strategies.separable import front as separable_front
from bitfront.strategies.trends import LENGTH, Trend, known_trends, length_of

if TYPE_CHECKING:
    from bitfront.tasks.base import TaskMetric

Floats = NDArray[np.float64]

#: Candidates before the model is used; the loop's initial candidates count. If the noise of options is known, fewer.
START, INFORMED = 16, 4
#: Initial candidates with one level everywhere.
LEVELS = 5
#: Candidates per proposal: at least so many, and this share of the history.
LEAST, SHARE = 8, 1 / 16
#: Results that the model is fitted to, at most: the best ones. And those that its scales are fitted to.
FITTED, SCALED = 400, 160
#: Scales are fitted again whenever the history has grown by this factor.
GROWTH = 1.5
#: Failed candidates that the model is fitted to, at most.
FAILURES = 32
#: The latest results that must have gained nothing before a search stops early, and members of the front between which
#: the resolution of the samples is measured.
LATEST, COMPARED = 16, 8
#: How results are modelled: log(result − least + offset · extent) for each of these offsets, or unchanged (infinity).
OFFSETS = (0.01, 0.1, float("inf"))


class SurrogateSettings(StrategySettings):
    """The surrogate's keys of ``[search.strategy.setup]``."""

    focus: float | None = Field(
        10.0,
        gt=0,
        le=100,
        description="without constraints: accuracies that are lower than the float model's by more points than this do "
        "not matter; of other tasks the metric that leads, and where it is no share, per cent of the float model's "
        "value. Nor does what is above the float model's, unless candidates are trained; 100: all matter",
    )
    stop_early: bool = Field(
        False,
        exclude=True,
        description="stop before `n_trials` where no candidate is likely to be better than the front by more than "
        "the samples tell apart, in a paired comparison, and the latest results were not",
    )

    @property
    def _looks(self) -> bool:
        """Whether it looks somewhere, and not everywhere."""
        return self.focus is not None and self.focus < 100

    def remarks(
        self, objectives: Sequence[str], constrained: bool, leading: TaskMetric, *, trained: bool
    ) -> Sequence[str]:
        """Where the search looks, if that is not everywhere, and that it may end early."""
        remarks, where = [], []
        rises = leading.direction == "maximize"
        if self._looks and not constrained and leading.name in objectives:
            points = "points" if leading.share else "%"
            where.append(f"at most {self.focus:g} {points} {'below' if rises else 'above'} the float model's")
        if self._looks and not trained and leading.name in objectives and len(objectives) > 1:
            better = f"no {'higher' if rises else 'lower'}"
            where.append(f"{better} (that is mostly chance)" if where else f"{better} than the float model's")
        if where:
            remarks.append(
                f"surrogate looks where {leading.name} is {' and '.join(where)}: setup.focus; with 100 it looks "
                "everywhere"
            )
        if self.stop_early:
            remarks.append(
                "surrogate stops before n_trials if nothing is likely to gain what the samples tell apart: "
                "setup.stop_early"
            )
        return remarks


@dataclass(frozen=True)
class Response:
    """How one result is modelled.

    Attributes:
        scales: of the Gaussian process.
        offset: of the logarithm, as a share of the extent of the results; infinity: results are modelled as they are.
    """

    scales: Scales
    offset: float


@STRATEGIES.register("surrogate")
class Surrogate(Strategy):
    """A model of effects and interactions, its exact front, verified: the fewest evaluations."""

    Settings = SurrogateSettings
    batch = 256
    uses_noise = True

    def __init__(self, space: Space, objectives: int, seed: int, settings: StrategySettings | None = None) -> None:
        super().__init__(space, objectives, seed, settings)
        self._columns = Columns(space)
        self._width = settings.focus if isinstance(settings, SurrogateSettings) else SurrogateSettings().focus
        # A cache: length of the history's beginning → what was fitted to it.
        self._fitted: tuple[int, tuple[Response, ...]] = (0, ())
        # Another: its length → what it predicts.
        self._predictions: tuple[int, Prediction] | None = None

    def promising(self, codes: Codes) -> NDArray[np.bool_]:
        """Those that no other one beats both in noise and in all that is known in closed form; all if noise or costs
        are unknown."""
        noise, costs = self.knowledge.noise, self.knowledge.costs
        if noise is None or not costs:
            return super().promising(codes)
        options = self.space.options(codes)
        total = np.sum([of_group[options[:, g]] for g, of_group in enumerate(noise)], axis=0)
        chosen = np.zeros(len(codes), dtype=bool)
        chosen[non_dominated(np.column_stack([total, *(cost(codes) for cost in costs.values())]))] = True
        return chosen

    def propose(self, history: History, n: int, rng: np.random.Generator) -> Codes:
        """Up to `n` candidates that are not in the history, the most promising first.

        Returns:
            Codes, shape (candidates, parameters). Empty only if no candidate is left.
        """
        trials = len(history)
        known = int(np.isfinite(history.losses).all(axis=1).sum())
        n = min(n, max(LEAST, int(trials * SHARE), self._start - trials))
        if trials < self._start or known < 2 or not self.space.parameters:
            return self._filled(history.fresh(self._initial(2 * n, rng))[:n], history, n, rng)
        return self._filled(self._predicted(history).best(n), history, n, rng)

    def enough(self, history: History, initial: int) -> str:
        """What to say where neither the latest results nor anything predicted beats the front by the resolution."""
        settings, measured = self.settings, self.knowledge.resolution
        stops = isinstance(settings, SurrogateSettings) and settings.stop_early
        latest = len(history) - LATEST
        if not stops or measured is None or latest < max(initial, self._start) or not self.space.parameters:
            return ""
        before, focus = front_rows(history, latest), self._focus(history)
        # The resolution takes evaluations, so it is measured near the front of a few lengths of the history alone.
        members = front_rows(history, self._step(latest))
        if not len(members):
            return ""
        point = reference(history.losses[front_rows(history, len(history))], focus)
        few = members[spread(history.losses[members], point, COMPARED)]
        resolution = measured(history.codes[few])
        later = latest + np.flatnonzero(history.violation[latest:] == 0)
        later = later[np.isfinite(history.losses[later]).all(axis=1)]
        gained = gains(history.losses[before], point, history.losses[later] + resolution.losses)
        if (gained > 0).any() or self._predicted(history).gains_more(resolution.losses):
            return ""
        return (
            f"as the model has it, no candidate has a chance of 10 % to beat the front by {resolution.text}; none of "
            f"the last {LATEST} results did"
        )

    def _initial(self, n: int, rng: np.random.Generator) -> Codes:
        """`n` candidates before there is a model, and a few of one level everywhere.

        They are of the exact front of noise and costs, if these are known; otherwise a Latin hypercube, in which the
        options of every group occur equally often.
        """
        levels = np.linspace(0.0, 1.0, LEVELS)[:, None] * (self.space.cardinalities - 1)
        even = self.space.canonical(np.rint(levels).astype(np.int64))
        if self.knowledge.noise is not None and self.knowledge.costs:
            cost = next(iter(self.knowledge.costs.values()))
            solved = separable_front(self.knowledge.noise, cost_tables(self.space, cost), PARTIAL)
            if len(solved.values):
                rows = np.linspace(0, len(solved.values) - 1, n).astype(np.int64)
                return np.concatenate([even, self.space.codes(rng.permutation(solved.options[rows]))])
        return np.concatenate([even, latin_hypercube(self.space, n, rng)])

    def _filled(self, codes: Codes, history: History, n: int, rng: np.random.Generator) -> Codes:
        """`codes`, and where these are fewer than `n`, other candidates that are not in the history."""
        if len(codes) == n:
            return codes
        others = unseen_neighbours(self.space, history, np.zeros(0, dtype=np.int64), n, rng)
        return history.fresh(np.concatenate([codes, others]))[:n]

    def _step(self, length: int) -> int:
        """The largest step of a ladder of lengths that is not above `length`; its first step is above 0."""
        step = self._start
        while int(step * GROWTH) <= length:
            step = int(step * GROWTH)
        return step

    @property
    def _start(self) -> int:
        """The number of results that the model needs."""
        return START if self.knowledge.noise is None else INFORMED

    @cached_property
    def _trends(self) -> list[Trend]:
        return known_trends(self.knowledge.noise, self.knowledge.margins)

    def _places(self, codes: Codes) -> list[Floats]:
        """The places of candidates on each trend."""
        options = self.space.options(codes)
        return [trend.places(options) for trend in self._trends]

    def _predicted(self, history: History) -> Prediction:
        """What is expected of all candidates, given the history. It is kept for the next call with the same one."""
        if self._predictions is not None and self._predictions[0] == len(history):
            prediction = self._predictions[1]
            if prediction.history is history:
                return prediction
        rows = _rows(history, len(history), FITTED)
        outputs = self._outputs(history)
        responses = self._responses(history, len(outputs))
        codes = history.codes[rows]
        models = []
        for (objective, results), response in zip(outputs, responses, strict=True):
            target = _finite(results[rows])
            link = Link.of(target, response.offset)
            effects = Effects(self.space, self._columns, response.scales, codes, link.forward(target), self._trends)
            models.append(Modelled(objective, effects, link))
        everywhere = self._width is None or self._width >= 100
        prediction = Prediction(
            self.space, history, self.knowledge, tuple(models), self.objectives, self._focus(history),
            None if everywhere else self.knowledge.sufficient,
        )  # fmt: skip
        self._predictions = len(history), prediction
        return prediction

    def _focus(self, history: History) -> Floats | None:
        """The largest losses that matter; None if all do."""
        known, width = self.knowledge, self._width
        if width is None or width >= 100 or history.constrained or known.float_losses is None or known.points is None:
            return None
        limits = known.float_losses + width * known.points
        return None if np.isnan(limits).all() else np.where(np.isnan(limits), np.inf, limits)

    def _outputs(self, history: History) -> list[tuple[int | None, Floats]]:
        """What is modelled: (the objective, or None for a margin; its values over the history)."""
        outputs: list[tuple[int | None, Floats]] = [
            (o, history.losses[:, o]) for o in range(self.objectives) if o not in self.knowledge.costs
        ]
        if history.margins.shape[1]:
            outputs += [(None, margin) for margin in history.margins.T]
        elif self.knowledge.violation is None and history.violation.any():
            outputs.append((None, np.log1p(history.violation)))
        return outputs

    def _responses(self, history: History, count: int) -> tuple[Response, ...]:
        """How the outputs are modelled: fitted to the beginning of the history, whose length is a step of a ladder."""
        length = self._step(len(history))
        if self._fitted[0] != length or len(self._fitted[1]) != count:
            rows = _rows(history, length, SCALED)
            codes = history.codes[rows]
            responses = tuple(
                most_likely(
                    self._columns, codes, _finite(results[rows]), self._places(codes), length=length_of(self.seed)
                )
                for _, results in self._outputs(history)
            )
            self._fitted = (length, responses)
        return self._fitted[1]


def most_likely(
    columns: Columns,
    codes: Codes,
    results: Floats,
    places: Sequence[Floats],
    solver: Solver = solve_with_determinant,
    length: float = LENGTH,
) -> Response:
    """The most likely model of results, among the ``OFFSETS``.

    Args:
        columns: of the space.
        codes: candidates, shape (candidates, parameters).
        results: smaller is better, shape (candidates,), finite.
        places: of the candidates on each trend, shape (candidates,).
        solver: of linear systems.
        length: of the kernel along the trends.
    """
    best: Response | None = None
    score = -np.inf
    for offset in OFFSETS:
        link = Link.of(results, offset)
        transformed = link.forward(results)
        scales = fitted(columns, codes, transformed, places, solver, length)
        # The density of the results themselves, not of their logarithms.
        density = scales.score + float(np.log(link.slope(results)).sum())
        density -= len(results) * float(np.log(max(transformed.std(), 1e-300)))
        if best is None or density > score:
            best, score = Response(scales, offset), density
    assert best is not None
    return best


def _rows(history: History, length: int, most: int) -> NDArray[np.int64]:
    """The rows that a model is fitted to: the best and the failed ones of the first `length`, in their order."""
    losses, violation = history.losses[:length], history.violation[:length]
    evaluated: NDArray[np.bool_] = np.asarray(np.isfinite(losses).all(axis=1))
    failed = np.flatnonzero(np.isnan(losses).any(axis=1) & (violation == 0))[-FAILURES:]
    best, _ = select(np.where(evaluated[:, None], losses, np.nan), most, np.where(evaluated, violation, 0.0))
    return np.sort(np.concatenate([best, failed]))


def _finite(results: Floats) -> Floats:
    """Results with the worst one in place of those that are missing: failed candidates."""
    worst = np.max(results, where=np.isfinite(results), initial=-np.inf)
    return np.where(np.isfinite(results), results, worst if np.isfinite(worst) else 0.0)
