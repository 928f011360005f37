"""The conformance suite of executors: what every executor must do. The tests of each executor run it.

from bitfront.testing import check_executor
check_executor("loky")
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitfront.config import settings_of
from bitfront.executors import EXECUTORS
from bitfront.executors.base import WHERE, Launcher, LauncherSettings
from bitfront.executors.crew import DEATHS, Crew, Done, Work

#: What the workers share.
CONTENT = b"the content that the workers share"
#: How many pieces of work there are, and of how many numbers.
PIECES, NUMBERS = 6, 5


@dataclass(eq=False)
class Numbers(Work):
    """Numbers that a worker squares. A negative one ends it."""

    argument: list[int]
    method: str = "squared"

    def cut(self) -> Sequence[Numbers]:
        """Its two halves."""
        half = len(self.argument) // 2
        return [Numbers(part) for part in (self.argument[:half], self.argument[half:])] if half else []


class Squares:
    """What a worker opens."""

    def squared(self, numbers: Sequence[int]) -> list[int]:
        """The squares. A negative number ends the process, if it is a worker."""
        if any(n < 0 for n in numbers):
            os.kill(os.getpid(), signal.SIGKILL)
        return [n * n for n in numbers]


def opened(content: bytes) -> Squares:
    """The object that the workers share."""
    assert content == CONTENT, "what is shared has arrived with other bytes"
    return Squares()


def crew_of(launcher: Launcher, workers: int = 3, folder: Path | None = None) -> Crew:
    """A crew that squares numbers."""
    return Crew(launcher, workers, f"{__name__}:opened", lambda: CONTENT, folder)


def squares(crew: Crew, pieces: Sequence[Numbers]) -> tuple[list[int], list[int]]:
    """(the squares, sorted; the numbers whose worker died again and again, sorted)."""
    waiting = iter(pieces)
    done: list[int] = []
    lost: list[int] = []
    for outcome in crew.outcomes(lambda: next(waiting, None)):
        assert isinstance(outcome.work, Numbers)
        if isinstance(outcome, Done):
            assert outcome.value == [n * n for n in outcome.work.argument], f"{outcome.work.argument}: {outcome.value}"
            done += outcome.value
        else:
            assert outcome.deaths >= DEATHS, f"{outcome.work.argument} is given up after {outcome.deaths} deaths"
            lost += outcome.work.argument
    return sorted(done), sorted(lost)


def check_executor(
    name: str | Launcher, settings: Mapping[str, Any] | None = None, *, folder: Path | None = None
) -> None:
    """Assert that an executor keeps the contract of :class:`bitfront.executors.base.Launcher`. It is started with two
    workers, and one piece of work ends every worker that gets it.

    Args:
        name: the registered name of the executor, or its launcher.
        settings: as in ``[search.strategy.executor]``.
        folder: an empty folder that the workers see; None: what they share travels with the calls.

    Raises:
        AssertionError: a promise is broken; the message says which.
        MissingExtraError: a package that it needs is not installed.
    """
    launcher = name if isinstance(name, Launcher) else _of_name(name, settings or {})
    kind = type(launcher)
    assert (kind.__doc__ or "").strip(), f"{kind.__name__} needs a docstring: `bitfront list executors` shows its start"
    launcher.check()
    assert issubclass(kind.Settings, LauncherSettings), f"{kind.__name__}: Settings must extend LauncherSettings"
    pieces = [Numbers(list(range(i * NUMBERS, (i + 1) * NUMBERS))) for i in range(PIECES)]
    numbers = [n for piece in pieces for n in piece.argument]
    killing = launcher.survives
    if killing:
        pieces[PIECES // 2] = Numbers([*pieces[PIECES // 2].argument, -1])
    crew = crew_of(launcher, 2, folder)
    try:
        done, lost = squares(crew, pieces)
        assert done == sorted(n * n for n in numbers), f"{launcher.title}: pieces of work are lost or come twice"
        assert lost == ([-1] if killing else []), f"{launcher.title}: {lost} are blamed"
        assert squares(crew, [Numbers([7])]) == ([49], []), f"{launcher.title}: it takes no work after that"
        assert crew.status.out == 0, f"{launcher.title}: {crew.status.out} pieces are out at the end"
    finally:
        crew.close()


def _of_name(name: str, settings: Mapping[str, Any]) -> Launcher:
    kind = EXECUTORS.get(name)
    return kind(settings_of(kind.Settings, settings, WHERE))
