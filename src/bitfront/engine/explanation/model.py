"""The surrogate's model of one measured metric, fitted to the stored trials of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitfront.engine.explanation.results import Estimate
from bitfront.engine.storage.run import Run
from bitfront.spaces.base import Codes
from bitfront.spaces.described import DescribedSpace
from bitfront.spaces.index import Index
from bitfront.strategies.anova import Columns, Effects
from bitfront.strategies.elimination import quick_solve_with_determinant
from bitfront.strategies.evolution import select
from bitfront.strategies.prediction import Link
from bitfront.strategies.surrogate import FITTED, SCALED, most_likely
from bitfront.strategies.trends import known_trends

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

#: Deviations from the mean to each end of a 90 % interval.
WIDE = 1.645


@dataclass(frozen=True, eq=False)
class Model:
    """What is expected of the explained metric.

    Attributes:
        space: of the run.
        metric: the explained metric.
        sign: 1 where smaller is better, −1 where larger is: a loss is the metric times this.
        share: whether the metric is a share, 0 to 1.
        effects: the Gaussian process of transformed losses.
        link: the transformation.
    """

    space: DescribedSpace
    metric: str
    sign: float
    share: bool
    effects: Effects
    link: Link

    def losses(self, options: Codes) -> Floats:
        """Expected losses, shape (candidates,), for options of shape (candidates, groups)."""
        return self.link.inverse(self.effects.mean(options))

    def ends(self, options: Codes, *, noise: bool = True) -> tuple[Floats, Floats]:
        """The ends of the 90 % intervals of losses, each of shape (candidates,).

        Args:
            options: shape (candidates, groups).
            noise: whether they are of results, which have noise, or of what is behind them.
        """
        mean, deviation = self.effects.mean(options), self.effects.quick_deviation(options)
        wide = WIDE * np.hypot(deviation, self.effects.noise if noise else 0.0)
        return self.link.inverse(mean - wide), self.link.inverse(mean + wide)

    def chance(self, options: Codes, least: float, most: float) -> float:
        """The probability that the result of one candidate, of shape (groups,), is a metric from `least` to `most`."""
        mean = float(self.effects.mean(options[None])[0])
        deviation = float(np.hypot(self.effects.quick_deviation(options[None])[0], self.effects.noise))
        ends = (least, most) if self.sign > 0 else (-most, -least)
        # No result is below the floor of the transformation.
        at = [-np.inf if end <= self.link.floor else float(self.link.forward(np.array(end))) for end in ends]
        low, high = (math.erf((end - mean) / (deviation * math.sqrt(2))) for end in at)
        return (high - low) / 2

    def estimates(self, options: Codes) -> list[Estimate]:
        """The expected metric of candidates, with the interval of a result."""
        values = self.sign * self.losses(options)
        ends = [self._possible(self.sign * end) for end in self.ends(options)]
        return [
            Estimate(float(v), float(min(a, b)), float(max(a, b)))
            for v, a, b in zip(self._possible(values), *ends, strict=True)
        ]

    def _possible(self, values: Floats) -> Floats:
        """Values, but no share above 1 or below 0."""
        return np.clip(values, 0.0, 1.0) if self.share else values

    def contrasts(self, options: Codes, weights: Floats) -> list[Estimate]:
        """Weighted sums of the metric over candidates, with 90 % intervals of what measuring them would give.

        The intervals are of first order in the deviations (delta method).

        Args:
            options: shape (candidates, groups).
            weights: shape (sums, candidates).
        """
        # A candidate that is there twice is one measurement.
        options, place = np.unique(options, axis=0, return_inverse=True)
        weights = weights @ np.eye(len(options))[place.reshape(-1)]
        mean = self.effects.mean(options)
        losses = self.link.inverse(mean)
        slope = losses - self.link.floor if np.isfinite(self.link.floor) else np.ones_like(losses)
        along = weights * slope
        variance = ((along @ self.effects.covariance(options)) * along).sum(axis=1)
        variance += self.effects.noise**2 * (along * along).sum(axis=1)
        values, wide = self.sign * (weights @ losses), WIDE * np.sqrt(np.maximum(variance, 0.0))
        return [Estimate(float(v), float(v - w), float(v + w)) for v, w in zip(values, wide, strict=True)]


@dataclass(frozen=True, eq=False)
class Trials:
    """The trials that explain something: complete, with a value of the explained metric.

    Attributes:
        rows: their rows in the run's columns, in their order.
        numbers: their numbers.
        codes: shape (trials, parameters).
        options: shape (trials, groups).
        losses: of the explained metric, shape (trials,).
        index: of their keys.
    """

    rows: Rows
    numbers: NDArray[np.int64]
    codes: Codes
    options: Codes
    losses: Floats
    index: Index

    @staticmethod
    def of(run: Run, metric: str, sign: float) -> Trials:
        """Those of a run."""
        values = run.columns.metrics[metric]
        rows = np.flatnonzero(run.columns.complete & np.isfinite(values))
        codes = run.columns.codes(rows)
        keys = run.space.keys(codes)
        index = Index(keys.shape[1])
        index.add(keys)
        return Trials(rows, run.columns.number[rows], codes, run.space.options(codes), sign * values[rows], index)

    def find(self, space: DescribedSpace, options: Codes) -> Rows:
        """Per candidate its place among these trials, int64, shape (candidates,); −1: it was not evaluated."""
        return self.index.find(space.keys(space.codes(options)))


def fitted_model(
    run: Run,
    metric: str,
    sign: float,
    trials: Trials,
    among: Rows,
    costs: Floats | None,
    scaled: int = SCALED,
) -> Model:
    """The model of some trials.

    Args:
        run: the run.
        metric, sign: as in ``Model``.
        trials: all trials.
        among: which of them may be used.
        costs: of all of them; None where there are none. The model of many trials is fitted to those with the least
            losses and costs, and to an even sample of the others.
        scaled: to so many of them, at most, the scales of the kernel are fitted, which takes most of the time.
    """
    space, columns = run.space, Columns(run.space)
    if len(among) > FITTED:
        both = trials.losses[among][:, None] if costs is None else np.stack([trials.losses, costs], axis=1)[among]
        best = select(both, FITTED // 2, np.zeros(len(among)))[0]
        even = np.linspace(0, len(among) - 1, FITTED // 2).astype(np.int64)
        among = among[np.unique(np.concatenate([best, even]))]
    trends = known_trends(
        [np.array(noise) for noise in run.noise] if _fits(run) else None, run.margins if _fits(run) else None
    )
    places = [trend.places(trials.options) for trend in trends]
    few = among[np.unique(np.linspace(0, len(among) - 1, min(scaled, len(among))).astype(np.int64))]
    response = most_likely(
        columns,
        trials.codes[few],
        trials.losses[few],
        [of_trend[few] for of_trend in places],
        quick_solve_with_determinant,
    )
    link = Link.of(trials.losses[among], response.offset)
    results = link.forward(trials.losses[among])
    effects = Effects(space, columns, response.scales, trials.codes[among], results, trends)
    share = metric in run.qualities and run.qualities[metric].share
    return Model(space, metric, sign, share, effects, link)


def _fits(run: Run) -> bool:
    """Whether the run has an estimate of the noise of every option."""
    sizes: Sequence[int] = [group.size for group in run.space.groups]
    return bool(run.noise) and [len(noise) for noise in run.noise] == sizes
