"""From metrics to what is optimised: scaled metrics, one value or several, and their direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront.errors import ConfigError, nearest, one_of
from bitfront.metrics.base import Direction, Metric

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Objective:
    """One metric that counts: its value times `scale`, better in `direction`."""

    metric: str
    scale: float
    direction: Direction


@dataclass(frozen=True)
class Objectives:
    """What a search optimises.

    Attributes:
        parts: the metrics that count, sorted by name.
        summed: None where each part is an objective; else the direction of the sum of the scaled metrics, which is
            then the only one.
    """

    parts: tuple[Objective, ...]
    summed: Direction | None = None

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Of each objective."""
        return (self.summed,) if self.summed else tuple(p.direction for p in self.parts)

    @property
    def names(self) -> tuple[str, ...]:
        """Of each objective."""
        return ("sum of scaled metrics",) if self.summed else tuple(p.metric for p in self.parts)

    @property
    def unscaled(self) -> frozenset[str]:
        """Metrics that are objectives as they were measured."""
        return frozenset(p.metric for p in self.parts if p.scale == 1 and not self.summed)

    def scaled(self, values: Mapping[str, Values]) -> dict[str, Values]:
        """Metric → scaled metric."""
        return {p.metric: p.scale * values[p.metric] for p in self.parts}

    def values(self, values: Mapping[str, Values]) -> Values:
        """The objectives' values, shape (candidates, objectives)."""
        scaled: Values = np.stack(list(self.scaled(values).values()), axis=1)
        return scaled.sum(axis=1, keepdims=True) if self.summed else scaled

    def losses(self, values: Mapping[str, Values]) -> Values:
        """The same with the maximised ones turned round, so that smaller is better everywhere."""
        signs = np.array([-1.0 if d == "maximize" else 1.0 for d in self.directions])
        losses: Values = self.values(values) * signs
        return losses

    def described(self) -> list[dict[str, Any]]:
        """As JSON, for the run folder."""
        return [{"metric": p.metric, "scale": p.scale, "direction": p.direction} for p in self.parts]


def choose(
    asked: Mapping[str, tuple[float, Direction | None]],
    metrics: Sequence[Metric],
    summed: Direction | None,
    where: tuple[str, ...] = ("search", "strategy", "metrics"),
) -> Objectives:
    """The objectives asked for.

    Args:
        asked: metric → (scale, direction or None for the metric's own).
        metrics: what the configured runners produce.

    Raises:
        ConfigError: no objective at all, or one that no runner produces.
    """
    produced = {m.name: m for m in metrics}
    if not asked:
        raise ConfigError(f"no metric is an objective; name at least one of {', '.join(produced)}", key=where)
    parts = []
    for name in sorted(asked):
        if name not in produced:
            raise ConfigError(
                f"no configured runner produces this metric; {one_of(produced)}.{nearest(name, produced)} "
                "Runners stand under [search.strategy.sw_runner.*] and hw_runner.*; `bitfront list metrics` shows all",
                key=(*where, name),
            )
        scale, direction = asked[name]
        if scale == 0:
            raise ConfigError("a scale of 0 makes every candidate equal", key=(*where, name, "scale"))
        parts.append(Objective(name, scale, direction or produced[name].direction))
    return Objectives(tuple(parts), summed)
