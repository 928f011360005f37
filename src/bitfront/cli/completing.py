"""What the shell completes: names, looked up without importing what they name: each press of the key waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

Complete = Callable[[str], list[str]]
#: What a test compares with the code that is too slow to be imported here.
SAMPLERS = ("tpe", "random", "nsgaii", "nsgaiii", "qmc", "gp")
ROOMS = ("models", "datasets", "formats", "metrics", "strategies", "samplers", "spaces")
FORMATS = ("csv", "parquet", "optuna")
SPLITS = ("train", "val", "test")


def words(allowed: Sequence[str]) -> Complete:
    """Some words."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in allowed if word.startswith(incomplete)]

    return complete


def members(room: str) -> Complete:
    """What is registered in a room: ``models``, ``data``, ``strategies``."""

    def complete(incomplete: str) -> list[str]:
        from bitfront.registry import names_in_source

        return words(names_in_source(f"bitfront.{room}"))(incomplete)

    return complete


def competitors(incomplete: str) -> list[str]:
    """Strategies as ``compare`` takes them: ``evolution``, ``optuna:tpe``."""
    plain = [name for name in members("strategies")("") if name != "optuna"]
    return words([*plain, *(f"optuna:{name}" for name in SAMPLERS)])(incomplete)


def runs(incomplete: str) -> list[str]:
    """The runs below ``runs``; of paths the shell knows more."""
    return words(sorted(path.parent.name for path in Path("runs").glob("*/trials.sqlite")))(incomplete)


def of_key(name: str, annotation: Any) -> Complete | None:
    """For the flag of a key of the configuration; None where only the user knows."""
    named = {
        "model": members("models"),
        "dataset": members("data"),
        "strategy": members("strategies"),
        "sampler": words(SAMPLERS),
    }
    if name in named:
        return named[name]
    allowed = [word for word in get_args(annotation) if isinstance(word, str)]
    return words(allowed) if allowed else None
