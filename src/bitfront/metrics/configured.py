"""A metric runner as a search is configured with it: which one, in which table, with which settings.

The tables of the TOML are parsed into this once; whoever plans, evaluates or reads results asks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitfront.config import settings_of
from bitfront.errors import ConfigError
from bitfront.metrics import RUNNERS
from bitfront.metrics.base import Metric, Runner, RunnerSettings, Side
from bitfront.tasks.base import Task
from bitfront.tasks.classification import CLASSIFICATION


@dataclass(frozen=True)
class ConfiguredRunner:
    """A metric runner with its settings. Picklable, if its class can be imported.

    Attributes:
        name: as it is registered.
        side: the table that it stands in, under which its metrics are reported.
        kind: its class.
        settings: checked; an instance of ``kind.Settings``.
        task: what the samples are.
    """

    name: str
    side: Side
    kind: type[Runner]
    settings: RunnerSettings
    task: Task = CLASSIFICATION

    @property
    def produces(self) -> tuple[Metric, ...]:
        """The metrics that it measures."""
        return self.kind.of_task(self.task)

    @property
    def where(self) -> tuple[str, ...]:
        """The path of its table in the TOML, for messages."""
        return ("search", "strategy", self.side, self.name)

    def make(self) -> Runner:
        """The runner itself, fresh."""
        runner = self.kind(self.settings)
        runner.produces = self.produces
        return runner


def configured_runner(
    name: str, given: Mapping[str, Any] | None = None, side: Side | None = None, task: Task = CLASSIFICATION
) -> ConfiguredRunner:
    """The runner called `name` with the keys of its table.

    Args:
        given: key → value; without them the defaults.
        side: the table that it stands in; None: the one it belongs in.
        task: what the samples are.

    Raises:
        ConfigError: there is no such runner, or a key is wrong; ``key`` is its path.
    """
    where = ("search", "strategy", *([side] if side else []), name)
    try:
        kind, official = RUNNERS.get(name), RUNNERS.official(name)
    except ConfigError as error:
        error.key = where
        raise
    return ConfiguredRunner(official, side or kind.side, kind, settings_of(kind.Settings, given or {}, where), task)
