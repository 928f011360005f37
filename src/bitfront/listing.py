"""What can be listed: the kinds of things that Bitfront knows by name, and the members of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitfront.data import DATASETS
from bitfront.data import sources as data_sources
from bitfront.errors import ConfigError, nearest, one_of
from bitfront.executors import EXECUTORS
from bitfront.exporters.targets import TARGETS
from bitfront.formats import FORMATS
from bitfront.metrics import RUNNERS
from bitfront.models import MODELS
from bitfront.models import sources as model_sources
from bitfront.operations import OPERATIONS
from bitfront.registry import Registry
from bitfront.spaces import SPACES
from bitfront.strategies import STRATEGIES
from bitfront.strategies.optuna import MEANINGS
from bitfront.tasks import TASKS
from bitfront.trackers import TRACKERS

#: Kind → what its members are.
ROOMS = {
    "models": "networks that Bitfront brings",
    "datasets": "data that Bitfront brings, and forms of data that it reads",
    "tasks": "what a sample is: its targets, metrics and loss",
    "formats": "number formats of operands",
    "operations": "layers and functions that can have formats",
    "metrics": "what is measured, modelled or estimated of a candidate",
    "strategies": "what decides which candidate is tried next",
    "samplers": "Optuna's samplers, for the strategy optuna",
    "spaces": "what may be chosen: formats, widths, or both",
    "targets": "forms in which a candidate leaves Bitfront",
    "executors": "what carries out evaluations: processes, other machines",
    "trackers": "tools in which a search is followed",
}


def members(what: str | None = None) -> tuple[list[str], list[tuple[str, ...]]]:
    """(column names, rows) of all members of a kind, or of all kinds. Raises ConfigError for an unknown kind."""
    if what is None:
        return ["kind", "what its members are"], list(ROOMS.items())
    if what == "samplers":
        return ["name", "what it is"], sorted(MEANINGS.items())
    if what == "metrics":
        rows: list[tuple[str, ...]] = [
            (m.name, name, runner.side, m.unit, m.direction, m.kind, m.meaning)
            for name in RUNNERS.names()
            for runner in [RUNNERS.get(name)]
            for m in runner.produces
        ]
        known = {row[0] for row in rows}
        rows += [
            (m.name, "basic_evaluation", "sw_runner", m.unit, m.direction, "measured", f"{m.meaning} (task {task})")
            for task in TASKS.names()
            for m in TASKS.get(task).metrics
            if m.name not in known
        ]
        return ["metric", "runner", "table", "unit", "direction", "kind", "meaning"], rows
    rooms: dict[str, Registry[Any]] = {
        "models": MODELS,
        "datasets": DATASETS,
        "tasks": TASKS,
        "formats": FORMATS,
        "operations": OPERATIONS,
        "strategies": STRATEGIES,
        "spaces": SPACES,
        "targets": TARGETS,
        "executors": EXECUTORS,
        "trackers": TRACKERS,
    }
    if what not in rooms:
        raise ConfigError(f"there is nothing called {what!r} to list; {one_of(ROOMS)}.{nearest(what, list(ROOMS))}")
    described: list[tuple[str, ...]]
    if what == "tasks":
        described = [(n, text, ", ".join(m.name for m in TASKS.get(n).metrics)) for n, text in TASKS.described()]
        return ["name", "what it is", "metrics beside the loss"], described
    if what == "formats":
        described = [(n, text, ", ".join(FORMATS.get(n).parameters)) for n, text in FORMATS.described()]
        return ["name", "what it is", "parameters of an operand"], described
    if what == "strategies":
        described = [
            (n, text, ", ".join(STRATEGIES.get(n).Settings.model_fields)) for n, text in STRATEGIES.described()
        ]
        return ["name", "what it is", "settings in [search.strategy.setup]"], described
    if what == "targets":
        described = [(n, text, ", ".join(TARGETS.get(n).Settings.model_fields)) for n, text in TARGETS.described()]
        return ["name", "what it is", "settings (--set KEY=VALUE)"], described
    if what == "executors":
        described = [(n, text, ", ".join(EXECUTORS.get(n).Settings.model_fields)) for n, text in EXECUTORS.described()]
        return ["name", "what it is", "settings in [search.strategy.executor]"], described
    if what == "trackers":
        described = [(n, text, ", ".join(TRACKERS.get(n).Settings.model_fields)) for n, text in TRACKERS.described()]
        return ["name", "what it is", "settings in [search.track.NAME]"], described
    if what == "operations":
        described = [(n, text, ", ".join(OPERATIONS.get(n).formatted)) for n, text in OPERATIONS.described()]
        return ["name", "what it is", "operands"], described
    named: list[tuple[str, ...]] = list(rooms[what].described())
    sources: Mapping[str, Registry[Any]] = {"models": model_sources.SOURCES, "datasets": data_sources.SOURCES}
    if what in sources:
        named += [(f"{prefix}:NAME", text) for prefix, text in sources[what].described()]
    if what == "datasets":
        named.append(("PATH", "a folder of images or of .npy files, or an .npz, .csv or .parquet file"))
    return ["name", "what it is"], named
