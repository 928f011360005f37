"""From the objectives in a configuration to ``Objectives``, checked against the metrics that its runners produce."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitfront.config import Direction
from bitfront.errors import ConfigError, nearest, one_of
from bitfront.metrics.base import Metric
from bitfront.objectives import Objective, Objectives


def choose(
    requested: Mapping[str, tuple[float, Direction | None]],
    metrics: Sequence[Metric],
    summed: Direction | None,
    where: tuple[str, ...] = ("search", "strategy", "metrics"),
) -> Objectives:
    """Check the requested objectives and give each a direction.

    Args:
        requested: metric → (scale, direction; None for the direction that the metric declares).
        metrics: the metrics that the configured runners produce.
        summed: the direction of the sum of scaled metrics, if that is the only objective; None for several objectives.
        where: path of the table in the TOML, for messages.

    Raises:
        ConfigError: there is no objective, no configured runner produces it, or its scale is 0.
    """
    produced = {m.name: m for m in metrics}
    if not requested:
        raise ConfigError(f"no metric is an objective; name at least one of {', '.join(produced)}", key=where)
    parts = []
    for name in sorted(requested):
        if name not in produced:
            raise ConfigError(
                f"no configured runner produces this metric; {one_of(produced)}.{nearest(name, produced)} "
                "Configure runners under [search.strategy.sw_runner.*] and [search.strategy.hw_runner.*]; "
                "`bitfront list metrics` shows which runner produces which metric",
                key=(*where, name),
            )
        scale, direction = requested[name]
        if scale == 0:
            raise ConfigError(
                "a scale of 0 makes every candidate equal; allowed: any other number", key=(*where, name, "scale")
            )
        parts.append(Objective(name, scale, direction or produced[name].direction))
    return Objectives(tuple(parts), summed)
