"""What a comparison of strategies found: its runs as arrays, and how each strategy stands.

*The best there is* is the best of all runs together: the truth, where one of them went through the whole space, as
brute force always does; else `truth` is false. Everything is measured against it:

- hypervolume: what a run's front dominates, up to one reference point for all runs, as a part of what the best front
  there is dominates;
- regret: 1 − hypervolume, at the end of the budget; 0 for whoever has found the whole front;
- shortfall: the best value of the leading objective that a run found, minus the best there is, turned so that it is
  never negative. The leading objective is accuracy, where that is one; else the first.

With a single objective there is no volume, and the shortfall is the regret.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from bitfront.engine.comparison import curves
from bitfront.engine.comparison.curves import Spread, Values
from bitfront.errors import ConfigError, nearest, one_of
from bitfront.objectives import Objectives
from bitfront.pareto import non_dominated
from bitfront.spaces.base import Codes

What = Literal["volume", "best"]
Over = Literal["evaluations", "seconds"]
#: The strategy that goes through the whole space, whatever the budget.
EXHAUSTIVE = "brute_force"
#: Parts of the hypervolume whose time is told.
LEVELS = (0.95, 0.99)
#: Moments at which curves over seconds are taken.
MOMENTS = 400


@dataclass(frozen=True, eq=False)
class StrategyRun:
    """One run of one strategy.

    Attributes:
        codes: candidates in the order of evaluation, each once, shape (evaluations, parameters).
        losses: their objectives, turned so that smaller is better, shape (evaluations, objectives); NaN for those that
            failed or violate a constraint.
        asking: seconds spent in the strategy until each of them was evaluated, shape (evaluations,); measured now.
        evaluating: seconds that evaluating each of them took when it was evaluated first, by whatever run.
        asked: seconds spent in the strategy in all.
        proposals: how many candidates the strategy proposed in all.
        repeats: how many of these it knew already.
        failed: how many candidates failed.
        stopped: why the run ended.
        volume: part of the best hypervolume there is after each evaluation; empty for a single objective.
        best: the leading objective's least loss after each evaluation; infinity before there is any.
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
        """When each evaluation was done: the strategy's own time, and that of all evaluations so far."""
        total: Values = self.asking + np.cumsum(self.evaluating)
        return total

    def front(self, evaluations: int) -> Values:
        """Losses of its front after so many evaluations, shape (members, objectives), sorted by the objectives."""
        losses = self.losses[:evaluations]
        return losses[non_dominated(losses)]


@dataclass(frozen=True)
class StrategyResult:
    """How a strategy stands, over its seeds. Infinity: not reached.

    Attributes:
        evaluations, seconds: what it took to reach each of ``LEVELS``; empty for a single objective.
        to_best: evaluations until the leading objective was at the best there is.
        regret: at the end of the budget; None for a single objective.
        shortfall: at the end of the budget.
        asking, evaluating: seconds of the whole run.
        proposals, repeats: of the whole run.
        spent: evaluations of the whole run.
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
    """A curve over seeds: median and quartiles at each `x`, all of shape (points,). Infinity: nothing found yet."""

    x: Values
    median: Values
    low: Values
    high: Values


@dataclass(frozen=True, eq=False)
class Comparison:
    """Several strategies on one space, with the same budget and the same seeds.

    Attributes:
        folder: where it is kept.
        strategies: in the order asked for, brute force first.
        seeds: of the runs of every strategy but brute force, which has none.
        budget: distinct evaluations of every run but that of brute force, which goes through the whole space.
        size: candidates of the space.
        objectives: what was optimised.
        constraints: what results had to fulfil, as it was asked for.
        truth: whether a run went through the whole space, as that of brute force always does.
        front: losses of the best front there is, shape (members, objectives).
        reference: up to where volumes are taken, as losses, shape (objectives,).
        whole: hypervolume of the best front there is; NaN for a single objective.
        courses: every run, strategy by strategy.
        evaluated: candidates evaluated in this session; `known` those that were known from earlier ones.
        notes: remarks for the user.
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
    whole: float
    courses: tuple[StrategyRun, ...]
    evaluated: int
    known: int
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        which = ", ".join(self.strategies)
        return f"Comparison({str(self.folder)!r}: {which}; {len(self.seeds)} seeds, {self.budget:,} evaluations each)"

    @property
    def leading(self) -> int:
        """Column of the leading objective."""
        return leading(self.objectives)

    @property
    def best(self) -> float:
        """The least loss of the leading objective there is."""
        return float(self.front[:, self.leading].min())

    def of(self, strategy: str) -> tuple[StrategyRun, ...]:
        """The runs of a strategy, one per seed; brute force has one.

        Raises:
            ConfigError: it was not compared.
        """
        if strategy not in self.strategies:
            raise ConfigError(
                f"{strategy!r} was not compared; {one_of(self.strategies)}.{nearest(strategy, self.strategies)}"
            )
        return tuple(c for c in self.courses if c.strategy == strategy)

    @cached_property
    def standings(self) -> tuple[StrategyResult, ...]:
        """How each strategy stands, in the order of `strategies`."""
        return tuple(self._standing(s) for s in self.strategies)

    def curve(self, strategy: str, what: What = "volume", over: Over = "evaluations") -> Band:
        """Median and quartiles over the seeds of a strategy.

        Args:
            what: ``volume``, the part of the best hypervolume there is, or ``best``, the least loss of the leading
                objective so far.
            over: ``evaluations`` 1, 2, ...; or ``seconds``, at moments from the first evaluation to the last. A run
                that is over stays where it ended.

        Raises:
            ConfigError: the strategy was not compared, or there is no volume with a single objective.
        """
        runs = self.of(strategy)
        if what == "volume" and len(self.objectives.directions) == 1:
            raise ConfigError("one objective has no hypervolume; ask for what = 'best'")
        own = [c.volume if what == "volume" else c.best for c in runs]
        before = 0.0 if what == "volume" else np.inf
        if over == "evaluations":
            length = max(map(len, runs))
            x = np.arange(1.0, length + 1)
            rows = curves.at_evaluations(own, length, before)
        else:
            times = [c.seconds for c in runs]
            every = np.concatenate(times)
            x = np.geomspace(every.min(), every.max(), MOMENTS) if len(every) else every
            x[-1:] = every.max(initial=0.0)  # to the last digit
            rows = curves.at_moments(own, times, x, before)
        low, median, high = curves.quantiles(rows)
        return Band(x, median, low, high)

    def _standing(self, strategy: str) -> StrategyResult:
        runs = self.of(strategy)
        several = len(self.objectives.directions) > 1
        reached = [[curves.first_reaching(c.volume, level) for c in runs] for level in LEVELS if several]
        missing = [1.0 - _end(c.volume, self.budget, 0.0) for c in runs] if several else []
        return StrategyResult(
            strategy=strategy,
            evaluations=tuple(curves.spread(r) for r in reached),
            seconds=tuple(
                curves.spread([_at(c.seconds, n) for c, n in zip(runs, own, strict=True)]) for own in reached
            ),
            to_best=curves.spread([curves.first_reaching(-c.best, -self.best) for c in runs]),
            regret=curves.spread([m if m > curves.ROUNDING else 0.0 for m in missing]) if several else None,
            shortfall=curves.spread([_end(c.best, self.budget, np.inf) - self.best for c in runs]),
            asking=curves.spread([c.asked for c in runs]),
            evaluating=curves.spread([float(c.evaluating.sum()) for c in runs]),
            proposals=curves.spread([c.proposals for c in runs]),
            repeats=curves.spread([c.repeats for c in runs]),
            spent=curves.spread([len(c) for c in runs]),
        )


def _at(seconds: Values, evaluations: float) -> float:
    return float(seconds[int(evaluations) - 1]) if np.isfinite(evaluations) else np.inf


def _end(curve: Values, budget: int, before: float) -> float:
    """A curve at the end of the budget."""
    return float(curve[:budget][-1]) if len(curve) else before


def leading(objectives: Objectives) -> int:
    """Column of the objective that stands for quality: accuracy, or else the first."""
    names = objectives.names
    return names.index("accuracy") if "accuracy" in names else 0


def measured(
    courses: Sequence[StrategyRun], objectives: Objectives
) -> tuple[tuple[StrategyRun, ...], Values, Values, float]:
    """(the runs with their curves, losses of the best front there is, reference point, its hypervolume).

    Args:
        courses: runs without curves; the best there is is taken of all of them together, which is the truth as soon as
            one of them went through the whole space.
    """
    together = np.concatenate([c.losses for c in courses])
    known = together[np.isfinite(together).all(axis=1)]
    # Equal results stand for one member, whoever found them.
    front = np.unique(known[non_dominated(known)], axis=0)
    column, whole = leading(objectives), np.nan
    if len(objectives.directions) == 1:
        reference = front.max(axis=0)
        found = [replace(c, best=curves.best_so_far(c.losses[:, 0])) for c in courses]
        return tuple(found), front, reference, whole
    reference = curves.reference_point(known)
    whole = float(curves.volumes(front, reference)[-1])
    found = [
        replace(
            c,
            best=curves.best_so_far(c.losses[:, column]),
            volume=np.minimum(1.0, curves.volumes(c.losses, reference) / whole),
        )
        for c in courses
    ]
    return tuple(found), front, reference, whole
