"""The results of a comparison of strategies: every run as arrays, and the figures of each strategy over its runs.

The *reference front* is the front of all runs together and of all results of earlier comparisons in the folder. It is
the true front if the whole space was evaluated, as by brute force; then `truth` is true. All figures are relative to
it:

- volume: the hypervolume of a run's front, as a share of that of the reference front. All runs have the same
  reference point.
- regret: 1 − volume at the end of the budget; 0 if the run has the whole front.
- shortfall: the run's best value of the leading objective, minus the best value on the reference front, with the sign
  chosen so that it is never negative. The leading objective is accuracy if that is an objective, else the first one.

With a single objective there is no hypervolume, and the shortfall is the regret.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from bitfront.engine.comparison import curves
from bitfront.engine.comparison.curves import Spread, Values
from bitfront.errors import ConfigError, nearest, one_of, require
from bitfront.objectives import Objectives
from bitfront.pareto import non_dominated, reference_point
from bitfront.spaces.base import Codes

if TYPE_CHECKING:
    import pandas

CurveKind = Literal["volume", "best"]
CurveAxis = Literal["evaluations", "seconds"]
#: The strategy that evaluates the whole space, whatever the budget.
EXHAUSTIVE = "brute_force"
#: Shares of the hypervolume; a strategy's result says how long it took to reach each.
LEVELS = (0.95, 0.99)
#: Number of points of a curve over seconds.
MOMENTS = 400


@dataclass(frozen=True, eq=False)
class StrategyRun:
    """One run of one strategy.

    Attributes:
        seed: the random seed of the run.
        codes: candidates in the order of evaluation, each once, int64, shape (evaluations, parameters).
        losses: their objectives, smaller is better, float64, shape (evaluations, objectives). NaN for candidates that
            failed or violate a constraint.
        asking: seconds spent in the strategy up to each evaluation, shape (evaluations,). Measured in this run.
        evaluating: seconds that each evaluation took, shape (evaluations,). Measured when a candidate was evaluated
            first, in this run or another one.
        asked: seconds spent in the strategy in total.
        proposals: number of candidates that the strategy proposed.
        repeats: number of proposals that the run had evaluated already.
        failed: number of candidates that failed.
        stopped: why the run ended.
        volume: share of the reference front's hypervolume after each evaluation, 0 to 1, shape (evaluations,); empty
            for a single objective.
        best: least loss of the leading objective after each evaluation, shape (evaluations,); infinity before the
            first.
    """

    strategy: str
    seed: int
    codes: Codes
    losses: Values
    asking: Values
    evaluating: Values
    asked: float
    proposals: int
    repeats: int
    failed: int
    stopped: str
    volume: Values
    best: Values

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def seconds(self) -> Values:
        """Time at the end of each evaluation, shape (evaluations,): spent in the strategy and in evaluations so far."""
        total: Values = self.asking + np.cumsum(self.evaluating)
        return total

    def front(self, evaluations: int) -> Values:
        """Losses of the run's front after `evaluations` evaluations, shape (members, objectives), sorted."""
        losses = self.losses[:evaluations]
        return losses[non_dominated(losses)]


@dataclass(frozen=True)
class StrategyResult:
    """The figures of one strategy, over the random seeds of its runs. Infinity means not reached.

    Attributes:
        evaluations, seconds: evaluations and seconds until each of ``LEVELS`` was reached; empty for a single
            objective.
        to_best: evaluations until the leading objective had its best value on the reference front.
        regret: at the end of the budget; None for a single objective.
        shortfall: at the end of the budget, in the unit of the leading objective's loss.
        asking, evaluating: seconds spent in the strategy and in evaluations, in the whole run.
        proposals, repeats: their numbers in the whole run.
        spent: number of evaluations in the whole run.
    """

    strategy: str
    evaluations: tuple[Spread, ...]
    seconds: tuple[Spread, ...]
    to_best: Spread
    regret: Spread | None
    shortfall: Spread
    asking: Spread
    evaluating: Spread
    proposals: Spread
    repeats: Spread
    spent: Spread


@dataclass(frozen=True, eq=False)
class Band:
    """Median and quartiles of a curve over seeds, at each `x`; all of shape (points,).

    A run without a result so far counts as infinity in a curve of ``best``, and as 0 in one of ``volume``.
    """

    x: Values
    median: Values
    low: Values
    high: Values


@dataclass(frozen=True, eq=False)
class Comparison:
    """Several strategies on one space, with the same budget and the same random seeds.

    Attributes:
        folder: the folder that the comparison is stored in.
        strategies: their names, in the order of the request; brute force comes first.
        seeds: the random seeds; one run of each strategy per seed. Brute force runs once.
        budget: number of distinct evaluations per run. Brute force ignores it and evaluates the whole space.
        size: number of candidates in the space.
        objectives: what was optimised.
        constraints: conditions that a result must fulfil to count, as text.
        truth: whether the whole space was evaluated, in this comparison or an earlier one in the folder, as by brute
            force; then `front` is the true front.
        front: losses of the reference front, float64, shape (members, objectives).
        reference: reference point of all hypervolumes, as losses, float64, shape (objectives,).
        hypervolume: of the reference front; NaN for a single objective.
        runs: every run, strategy by strategy.
        evaluated: number of candidates evaluated in this session.
        known: number of candidates known from earlier sessions.
        notes: remarks for the user.
        quality: the metric of the task that leads.
    """

    folder: Path
    strategies: tuple[str, ...]
    seeds: tuple[int, ...]
    budget: int
    size: int
    objectives: Objectives
    constraints: tuple[str, ...]
    truth: bool
    front: Values
    reference: Values
    hypervolume: float
    runs: tuple[StrategyRun, ...]
    evaluated: int
    known: int
    notes: tuple[str, ...] = ()
    quality: str = "accuracy"

    def __repr__(self) -> str:
        which = ", ".join(self.strategies)
        return f"Comparison({str(self.folder)!r}: {which}; {len(self.seeds)} seeds, {self.budget:,} evaluations each)"

    @property
    def leading(self) -> int:
        """Column of the leading objective."""
        return leading(self.objectives, self.quality)

    @property
    def best(self) -> float:
        """Least loss of the leading objective on the reference front."""
        return float(self.front[:, self.leading].min())

    def of(self, strategy: str) -> tuple[StrategyRun, ...]:
        """The runs of a strategy, one per random seed; brute force has one.

        Raises:
            ConfigError: the strategy was not compared.
        """
        if strategy not in self.strategies:
            raise ConfigError(
                f"{strategy!r} was not compared; {one_of(self.strategies)}.{nearest(strategy, self.strategies)}"
            )
        return tuple(run for run in self.runs if run.strategy == strategy)

    @cached_property
    def results(self) -> tuple[StrategyResult, ...]:
        """The figures of each strategy, in the order of `strategies`."""
        return tuple(self._result(s) for s in self.strategies)

    @property
    def frame(self) -> pandas.DataFrame:
        """The runs as a pandas DataFrame, one row per run, for statistics and tables of your own.

        The index is ``strategy`` and ``seed``. The columns are ``evaluations`` (spent), with several objectives
        ``evaluations_to_95``, ``evaluations_to_99``, ``seconds_to_95``, ``seconds_to_99`` (infinity: not reached)
        and ``regret``; ``evaluations_to_best``, ``shortfall``, ``strategy_seconds``, ``evaluating_seconds``,
        ``proposals`` and ``repeats``. Regret and shortfall are those at the end of the budget.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        pandas = require("pandas", "pandas", "comparison.frame")
        tables = []
        for result in self.results:
            columns: dict[str, Spread | None] = {"evaluations": result.spent}
            for what in ("evaluations", "seconds"):
                for level, reached in zip(LEVELS, getattr(result, what), strict=False):
                    columns[f"{what}_to_{100 * level:.0f}"] = reached
            columns |= {"regret": result.regret, "evaluations_to_best": result.to_best, "shortfall": result.shortfall}
            columns |= {"strategy_seconds": result.asking, "evaluating_seconds": result.evaluating}
            columns |= {"proposals": result.proposals, "repeats": result.repeats}
            seeds = [run.seed for run in self.of(result.strategy)]
            rows = pandas.MultiIndex.from_product([[result.strategy], seeds], names=["strategy", "seed"])
            values = {name: column.values for name, column in columns.items() if column is not None}
            tables.append(pandas.DataFrame(values, index=rows))
        return pandas.concat(tables)

    def curve(self, strategy: str, what: CurveKind = "volume", over: CurveAxis = "evaluations") -> Band:
        """Median and quartiles over the random seeds of a strategy.

        Args:
            strategy: one of `strategies`.
            what: ``volume``, the share of the reference front's hypervolume; or ``best``, the least loss of the
                leading objective so far.
            over: ``evaluations``: x is 1, 2, ...; ``seconds``: x goes from the first evaluation to the last. After
                its end a run keeps its last value.

        Raises:
            ConfigError: the strategy was not compared, or ``volume`` was asked for with a single objective.
        """
        runs = self.of(strategy)
        if what == "volume" and len(self.objectives.directions) == 1:
            raise ConfigError("one objective has no hypervolume; ask for what = 'best'")
        values = [run.volume if what == "volume" else run.best for run in runs]
        before = 0.0 if what == "volume" else np.inf
        if over == "evaluations":
            length = max(map(len, runs))
            x = np.arange(1.0, length + 1)
            rows = curves.at_evaluations(values, length, before)
        else:
            times = [run.seconds for run in runs]
            every = np.concatenate(times)
            x = np.geomspace(every.min(), every.max(), MOMENTS) if len(every) else every
            x[-1:] = every.max(initial=0.0)  # geomspace may miss the end by its last digit
            rows = curves.at_moments(values, times, x, before)
        low, median, high = curves.quantiles(rows)
        return Band(x, median, low, high)

    def _result(self, strategy: str) -> StrategyResult:
        runs = self.of(strategy)
        several = len(self.objectives.directions) > 1
        reached = [[curves.first_reaching(run.volume, level) for run in runs] for level in LEVELS if several]
        missing = [1.0 - _end(run.volume, self.budget, 0.0) for run in runs] if several else []
        return StrategyResult(
            strategy=strategy,
            evaluations=tuple(curves.spread(counts) for counts in reached),
            seconds=tuple(
                curves.spread([_at(run.seconds, n) for run, n in zip(runs, counts, strict=True)]) for counts in reached
            ),
            to_best=curves.spread([curves.first_reaching(-run.best, -self.best) for run in runs]),
            regret=curves.spread([m if m > curves.ROUNDING else 0.0 for m in missing]) if several else None,
            shortfall=curves.spread([_end(run.best, self.budget, np.inf) - self.best for run in runs]),
            asking=curves.spread([run.asked for run in runs]),
            evaluating=curves.spread([float(run.evaluating.sum()) for run in runs]),
            proposals=curves.spread([run.proposals for run in runs]),
            repeats=curves.spread([run.repeats for run in runs]),
            spent=curves.spread([len(run) for run in runs]),
        )


def _at(seconds: Values, evaluations: float) -> float:
    return float(seconds[int(evaluations) - 1]) if np.isfinite(evaluations) else np.inf


def _end(curve: Values, budget: int, before: float) -> float:
    """The value of a curve at the end of the budget; `before` if the curve is empty."""
    return float(curve[:budget][-1]) if len(curve) else before


def leading(objectives: Objectives, quality: str = "accuracy") -> int:
    """Column of the leading objective: accuracy, or what leads in another task, if that is an objective, else the first
    one."""
    names = objectives.names
    return names.index(quality) if quality in names else 0


def add_curves(
    runs: Sequence[StrategyRun], objectives: Objectives, quality: str = "accuracy", stored: Values | None = None
) -> tuple[tuple[StrategyRun, ...], Values, Values, float]:
    """Compute the curves of all runs, relative to the front of all runs and stored results together.

    Args:
        runs: without curves; at least one result counts.
        objectives: of all of them.
        quality: the metric of the task that leads.
        stored: losses of more candidates, from earlier comparisons, shape (candidates, objectives); NaN where they do
            not count.

    Returns:
        (the runs with `volume` and `best`; losses of the reference front, shape (members, objectives); reference
        point, shape (objectives,); hypervolume of the reference front, NaN for a single objective).
    """
    together = np.concatenate([*(run.losses for run in runs), *([] if stored is None else [stored])])
    known = together[np.isfinite(together).all(axis=1)]
    # Candidates with equal results are one member of the front.
    front = np.unique(known[non_dominated(known)], axis=0)
    if len(objectives.directions) == 1:
        with_best = [replace(run, best=curves.best_so_far(run.losses[:, 0])) for run in runs]
        return tuple(with_best), front, front.max(axis=0), np.nan
    column = leading(objectives, quality)
    reference = reference_point(known)
    hypervolume = float(curves.volumes(front, reference)[-1])
    with_curves = [
        replace(
            run,
            best=curves.best_so_far(run.losses[:, column]),
            volume=np.minimum(1.0, curves.volumes(run.losses, reference) / hypervolume),
        )
        for run in runs
    ]
    return tuple(with_curves), front, reference, hypervolume
