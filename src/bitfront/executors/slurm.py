"""Workers that executorlib starts: as steps of a SLURM allocation, or as processes of this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field

from bitfront.errors import ConfigError, require
from bitfront.executors import EXECUTORS
from bitfront.executors.base import WHERE, Launched, Launcher, LauncherSettings

PURPOSE = "the executor slurm"


class SlurmSettings(LauncherSettings):
    """Settings of executorlib."""

    backend: Literal["job", "local"] = Field(
        "job", description='`"job"`: steps of the allocation that the command runs in; `"local"`: without SLURM'
    )
    resources: dict[str, Any] = Field(
        default={},
        description="what each worker gets, as executorlib's `resource_dict` has it, e.g. `{ threads_per_core = 1 }`",
    )


@EXECUTORS.register("slurm")
class Slurm(Launcher):
    """Steps of a SLURM allocation, by executorlib: `slurm:64`; `slurm:local:2` tries it without SLURM."""

    Settings: ClassVar[type[LauncherSettings]] = SlurmSettings
    settings: SlurmSettings
    example: ClassVar[str] = "slurm:64"
    # executorlib gives a call whose worker died to the next worker, until none is left.
    replaces: ClassVar[bool] = False
    at_once: ClassVar[int] = 1

    @classmethod
    def of_text(cls, text: str) -> dict[str, Any]:
        """``64``, ``job:64`` or ``local:2``."""
        backend, colon, count = text.rpartition(":")
        if colon and backend not in ("job", "local"):
            raise ConfigError(f"{backend!r} is no backend; allowed: job, local", key=WHERE)
        return {**super().of_text(count), **({"backend": backend} if backend else {})}

    @property
    def breaks(self) -> tuple[type[BaseException], ...]:
        """What the executor does not survive."""
        return (*super().breaks, require("executorlib.api", "slurm", PURPOSE).ExecutorlibSocketError)

    def check(self, *, insecure: bool = False) -> None:  # noqa: ARG002
        """Raises MissingExtraError without executorlib."""
        require("executorlib", "slurm", PURPOSE)

    def launch(self, workers: int, prepare: Callable[[], None] | None = None) -> Launched:  # noqa: ARG002
        """Start the workers."""
        executorlib = require("executorlib", "slurm", PURPOSE)
        kinds = {"job": executorlib.SlurmJobExecutor, "local": executorlib.SingleNodeExecutor}
        local = {"hostname_localhost": True} if self.settings.backend == "local" else {}
        executor = kinds[self.settings.backend](
            max_workers=workers,
            resource_dict={"cores": 1, **self.settings.resources},
            block_allocation=True,
            disable_dependencies=True,
            restart_limit=0,
            **local,
        )

        def close() -> None:
            executor.shutdown(wait=False, cancel_futures=True)

        return Launched(executor, lambda: workers, lambda: "", close)
