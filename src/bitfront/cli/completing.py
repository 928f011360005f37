"""Completes names for the shell. Their modules are not imported, because the user waits at every press of the key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

Complete = Callable[[str], list[str]]
#: Copies of names in modules that are too slow to import here; a test compares them with the originals.
SAMPLERS = ("tpe", "random", "nsgaii", "nsgaiii", "qmc", "gp")
GRANULARITIES = ("element", "channel", "layer")
ROOMS = (
    "models",
    "datasets",
    "tasks",
    "formats",
    "operations",
    "metrics",
    "strategies",
    "samplers",
    "spaces",
    "targets",
    "executors",
    "trackers",
)
FORMATS = ("csv", "parquet", "optuna")
SPLITS = ("train", "val", "test")
TARGETS = ("processor", "onnxruntime", "fpga", "microcontroller")


def words(allowed: Sequence[str]) -> Complete:
    """Completes the words `allowed`."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in allowed if word.startswith(incomplete)]

    return complete


def members(room: str) -> Complete:
    """Completes the registered names of a kind: ``models``, ``data``, ``strategies``."""

    def complete(incomplete: str) -> list[str]:
        from bitfront.registry import names_in_source

        return words(names_in_source(f"bitfront.{room}"))(incomplete)

    return complete


def compared_strategies(incomplete: str) -> list[str]:
    """Completes strategies as ``compare`` takes them: ``evolution``, ``optuna:tpe``, ``learned_bits:layer``."""
    plain = [name for name in members("strategies")("") if name != "optuna"]
    variants = [f"optuna:{name}" for name in SAMPLERS] + [f"learned_bits:{name}" for name in GRANULARITIES]
    return words([*plain, *variants])(incomplete)


def runs(incomplete: str) -> list[str]:
    """Completes the names of runs below ``runs``; the shell completes paths itself."""
    return words(sorted(path.parent.name for path in Path("runs").glob("*/trials.sqlite")))(incomplete)


def of_key(name: str, annotation: Any) -> Complete | None:
    """The completion for the flag of a configuration key; None if any text is allowed.

    Args:
        name: the name of the flag, e.g. ``n_trials``.
        annotation: the type of the key's field.
    """
    by_name = {
        "model": members("models"),
        "dataset": members("data"),
        "task": members("tasks"),
        "strategy": members("strategies"),
        "sampler": words(SAMPLERS),
        "track": members("trackers"),
    }
    if name in by_name:
        return by_name[name]
    allowed = [word for word in get_args(annotation) if isinstance(word, str)]
    return words(allowed) if allowed else None
