"""The objectives of a search: scaled metrics, each with a direction, or their sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront.config import Direction

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Objective:
    """One metric that is optimised: its value times `scale`, better in `direction`."""

    metric: str
    scale: float
    direction: Direction


@dataclass(frozen=True)
class Objectives:
    """All objectives of a search.

    Attributes:
        parts: the metrics that are optimised, sorted by name.
        summed: None where each part is an objective. Otherwise the direction of the sum of the scaled metrics, which is
            then the only objective.
    """

    parts: tuple[Objective, ...]
    summed: Direction | None = None

    @property
    def directions(self) -> tuple[Direction, ...]:
        """The direction of each objective."""
        return (self.summed,) if self.summed else tuple(p.direction for p in self.parts)

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each objective."""
        return ("sum of scaled metrics",) if self.summed else tuple(p.metric for p in self.parts)

    @property
    def unscaled(self) -> frozenset[str]:
        """Metrics that are objectives without a scale."""
        return frozenset(p.metric for p in self.parts if p.scale == 1 and not self.summed)

    def scaled(self, values: Mapping[str, Values]) -> dict[str, Values]:
        """Metric → its values times its scale, shape (candidates,); `values` may have other metrics too."""
        return {p.metric: p.scale * values[p.metric] for p in self.parts}

    def values(self, values: Mapping[str, Values]) -> Values:
        """The values of the objectives, shape (candidates, objectives), from metric → values."""
        scaled: Values = np.stack(list(self.scaled(values).values()), axis=1)
        return scaled.sum(axis=1, keepdims=True) if self.summed else scaled

    def losses(self, values: Mapping[str, Values]) -> Values:
        """The same with the maximised objectives negated, so that smaller is better for all."""
        signs = np.array([-1.0 if direction == "maximize" else 1.0 for direction in self.directions])
        losses: Values = self.values(values) * signs
        return losses

    def described(self) -> list[dict[str, Any]]:
        """As JSON, for the run folder."""
        return [{"metric": p.metric, "scale": p.scale, "direction": p.direction} for p in self.parts]
