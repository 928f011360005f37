"""An executor that the user's program brings: any ``concurrent.futures.Executor``, or a function that makes one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from bitfront.errors import ConfigError, EvaluationError
from bitfront.executors.base import Launched, Launcher, LauncherSettings


class Given(Launcher):
    """An executor of the user's program.

    Args:
        given: an executor, which is not shut down; a Dask client; or a function that makes an executor, which may be
            called again, after all its workers were lost.

    Raises:
        ConfigError: it is none of these.
    """

    again = "make a new executor, and call the search again to go on"

    def __init__(self, given: Any) -> None:
        super().__init__(LauncherSettings())
        client = getattr(given, "_client", given)
        self._client = client if hasattr(client, "get_executor") and hasattr(client, "scheduler_info") else None
        if self._client is None and not isinstance(given, Executor) and not callable(given):
            raise ConfigError(
                f"executor is a {type(given).__name__}; allowed: a concurrent.futures.Executor, a function that makes "
                "one, a Dask client, or a text such as 'loky:8'",
                key=("executor",),
            )
        self._given = given
        self._launched = False

    @property
    def title(self) -> str:
        """The name of its type."""
        return "dask" if self._client is not None else getattr(self._given, "__name__", type(self._given).__name__)

    @property
    def lost(self) -> tuple[type[BaseException], ...]:
        """What a call ends with whose worker was lost."""
        if self._client is None:
            return super().lost
        from bitfront.executors.dask import Dask, DaskSettings

        return Dask(DaskSettings()).lost

    def launch(self, workers: int, prepare: Callable[[], None] | None = None) -> Launched:  # noqa: ARG002
        """Use it, or make one. Raises EvaluationError if it has broken and cannot be made again."""
        if self._client is not None:
            from bitfront.executors.dask import of_client

            return of_client(self._client)
        if isinstance(self._given, Executor):
            if self._launched:
                raise EvaluationError(
                    f"{self.title}: it broke, because a worker died. Everything so far is stored; give a function that "
                    "makes an executor, executor=lambda: ..., then it is made again where that happens"
                )
            executor, close = self._given, _nothing
        else:
            executor = self._given()
            close = _shutdown(executor)
        self._launched = True
        count = int(getattr(executor, "_max_workers", 0) or workers)
        return Launched(executor, lambda: count, lambda: "", close)


def _nothing() -> None:
    """What is the user's is left as it is."""


def _shutdown(executor: Executor) -> Callable[[], None]:
    return lambda: executor.shutdown(wait=False, cancel_futures=True)
