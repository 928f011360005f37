"""What an executor is to Bitfront: a launcher starts it, and says how its workers die and what it may be asked.

The executor itself is a ``concurrent.futures.Executor``. Everything that this interface leaves open is here: how many
workers there are now, whether it will ever answer, and which exceptions mean that a worker was lost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, CancelledError, Executor
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from bitfront.config import ExecutorTable, Table, settings_of
from bitfront.errors import ConfigError
from bitfront.executors import EXECUTORS

#: Where the settings are in the TOML.
WHERE = ("search", "strategy", "executor")


class LauncherSettings(Table):
    """Settings that every executor has. Unknown keys are errors."""

    workers: int | None = Field(
        None, ge=1, le=4096, description="number of workers; default: `n_jobs`, or as many as the executor has"
    )
    worker_timeout: float = Field(
        300.0, gt=0, description="seconds without any worker after which the search ends; it can be continued"
    )
    block_timeout: float = Field(
        4 * 3600.0,
        gt=0,
        description="seconds after which a block of candidates without an answer ends the search, which can be "
        "continued; more where blocks take long: ten times the longest so far. Long before, other workers get it too. "
        "Not for `processes`, whose deaths are seen",
    )


@dataclass(frozen=True)
class Launched:
    """An executor that runs.

    Attributes:
        executor: takes calls.
        workers: how many workers there are now; 0: none yet, or none any more.
        gone: why no call will ever be answered; empty if that is not known.
        close: ends what was started, and nothing that was there before. It does not wait for calls.
    """

    executor: Executor
    workers: Callable[[], int]
    gone: Callable[[], str]
    close: Callable[[], None]


class Launcher(ABC):
    """Starts an executor, or connects to one.

    **What it does.** ``check`` says before any work why the executor cannot be used. ``launch`` starts it, or connects
    to it. It is called again after all workers were lost at once, if the executor breaks then.

    **What it may not do.** Use a package that its extra brings before ``check`` was called, or change anything that
    candidates depend on.

    Class attributes:
        Settings: its keys of ``[search.strategy.executor]``; they arrive as `settings`.
        example: how it is written on the command line, for messages.
        again: what a user does after the executor has gone, for messages.
        local: whether all workers are processes of this machine.
        apart: whether a lost worker loses its own call only. Otherwise other calls may be lost with it, and who is to
            blame is known only when a call runs alone.
        at_once: how many calls each worker is given at a time. 2 hides the time that a call travels.
        ends_late: whether the executor has ``end(future)``, which ends the worker of a call.
        replaces: whether a lost worker is replaced by a new one, so that a call may end its worker.
        survives: whether this process goes on when a worker dies.
        by_value: whether what the user's script defines must travel as code (cloudpickle): workers do not import it.
    """

    Settings: ClassVar[type[LauncherSettings]] = LauncherSettings
    example: ClassVar[str] = ""
    again: ClassVar[str] = "give the same command again to go on"
    local: ClassVar[bool] = False
    apart: ClassVar[bool] = False
    at_once: ClassVar[int] = 2
    ends_late: ClassVar[bool] = False
    replaces: ClassVar[bool] = True
    by_value: ClassVar[bool] = True
    survives: ClassVar[bool] = True

    def __init__(self, settings: LauncherSettings) -> None:
        self.settings = settings

    @classmethod
    def of_text(cls, text: str) -> dict[str, Any]:
        """The settings in what follows the name and a colon on the command line: ``8`` of ``loky:8``.

        Raises:
            ConfigError: it is no such text.
        """
        if not text.isdigit():
            raise ConfigError(f"{text!r} is no number of workers; it is written as in {cls.example!r}", key=WHERE)
        return {"workers": int(text)}

    def check(self, *, insecure: bool = False) -> None:  # noqa: ARG002
        """Say why the executor cannot be used, before any work.

        Args:
            insecure: whether the user has typed that connections need not be encrypted.

        Raises:
            MissingExtraError: a package is missing.
            ConfigError: a setting is wrong.
        """
        return

    @abstractmethod
    def launch(self, workers: int, prepare: Callable[[], None] | None = None) -> Launched:
        """Start the executor, or connect to it.

        Args:
            workers: how many workers are wanted.
            prepare: what a worker may do before its first call. It is picklable. Executors that have no place for it
                ignore it: what it does is done with the first call then.

        Raises:
            EvaluationError: that is impossible.
        """

    @property
    def lost(self) -> tuple[type[BaseException], ...]:
        """What a call ends with whose worker was lost."""
        return (*self.breaks, CancelledError)

    @property
    def breaks(self) -> tuple[type[BaseException], ...]:
        """Of these, what the executor does not survive; it is launched again then."""
        return (BrokenExecutor,)

    @property
    def title(self) -> str:
        """What notes and messages call it."""
        return EXECUTORS.name_of(type(self))


def configured_launcher(table: ExecutorTable | None) -> Launcher | None:
    """The launcher that ``[search.strategy.executor]``, or ``--executor``, describes; None without such a table.

    Raises:
        ConfigError: there is no such executor, or a setting is unknown or has a wrong value.
    """
    if table is None:
        return None
    try:
        kind = EXECUTORS.get(table.name)
    except ConfigError as error:
        error.key = (*WHERE, "name")
        raise
    given: Mapping[str, Any] = table.of_executor
    in_text = kind.of_text(table.at) if table.at else {}
    return kind(settings_of(kind.Settings, {**in_text, **given}, WHERE))
