"""Processes of an MPI program."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from bitfront.errors import require
from bitfront.executors import EXECUTORS
from bitfront.executors.base import Launched, Launcher

PURPOSE = "the executor mpi"


@EXECUTORS.register("mpi")
class Mpi(Launcher):
    """Processes of an MPI program, by mpi4py: `mpi:64`."""

    example: ClassVar[str] = "mpi:64"
    # MPI ends all processes when one dies. The search is continued by the same command.
    replaces: ClassVar[bool] = False
    survives: ClassVar[bool] = False

    def check(self, *, insecure: bool = False) -> None:  # noqa: ARG002
        """Raises MissingExtraError without mpi4py."""
        require("mpi4py", "mpi", PURPOSE)

    def launch(self, workers: int, prepare: Callable[[], None] | None = None) -> Launched:  # noqa: ARG002
        """Use the processes of this program, or start as many."""
        futures = require("mpi4py.futures", "mpi", PURPOSE)
        executor = futures.MPIPoolExecutor(max_workers=workers)
        count = workers

        def close() -> None:
            executor.shutdown(wait=False, cancel_futures=True)

        return Launched(executor, lambda: count, lambda: "", close)
