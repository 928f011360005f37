"""The objectives that a configuration asks for, checked against the metrics that its runners produce."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitfront.config import Direction
from bitfront.errors import ConfigError, nearest, one_of
from bitfront.metrics.base import Metric
from bitfront.objectives import Objective, Objectives


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
