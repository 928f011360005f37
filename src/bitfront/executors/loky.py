"""Worker processes by loky, which joblib and scikit-learn use too."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from bitfront.errors import require
from bitfront.executors import EXECUTORS
from bitfront.executors.base import Launched, Launcher
from bitfront.executors.calls import begin_worker


@EXECUTORS.register("loky")
class Loky(Launcher):
    """Worker processes of this machine by loky, as joblib has them: `loky:8`."""

    local: ClassVar[bool] = True
    example: ClassVar[str] = "loky:8"

    def check(self, *, insecure: bool = False) -> None:  # noqa: ARG002
        """Raises MissingExtraError without loky."""
        require("loky", "loky", "the executor loky")

    def launch(self, workers: int, prepare: Callable[[], None] | None = None) -> Launched:
        """Start processes, each when there is work for it. A death breaks the executor, and it is launched again."""
        loky = require("loky", "loky", "the executor loky")
        # One of its own: what the user's other code gives to loky's shared executor is not touched.
        executor = loky.ProcessPoolExecutor(workers, initializer=prepare or begin_worker, timeout=None)
        return Launched(executor, lambda: workers, lambda: "", lambda: executor.shutdown(wait=True, kill_workers=True))
