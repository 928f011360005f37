"""Workers of a Dask cluster: one that runs, or one that is started on this machine."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from pydantic import Field

from bitfront import interrupts
from bitfront.errors import ConfigError, EvaluationError, described, require
from bitfront.executors import EXECUTORS
from bitfront.executors.base import WHERE, Launched, Launcher, LauncherSettings

#: How often the workers of a cluster on this machine are started, if they die meanwhile.
STARTS = 3
#: The address that stands for a cluster on this machine.
LOCAL = "local"
#: Seconds that a scheduler may take to answer at the start, and between two looks at its workers.
CONNECTING, LOOKING = 30.0, 1.0
#: What a cluster on this machine does otherwise: the crew gives again what was lost, because it knows better who is to
#: blame, and a worker that is being replaced is not given up, however long that takes.
OF_LOCAL = {"distributed.scheduler.allowed-failures": 0, "distributed.deploy.lost-worker-timeout": "1 hour"}
#: States of the connection in which the scheduler is there.
THERE = ("running", "newly-created")


class DaskSettings(LauncherSettings):
    """Settings of Dask."""

    address: str = Field(LOCAL, description='of the scheduler, `tls://host:8786`; `"local"` starts one on this machine')
    tls_ca_file: str = Field("", description="for `tls://`: the certificate authority, a PEM file")
    tls_cert: str = Field("", description="for `tls://`: the certificate of this client, a PEM file")
    tls_key: str = Field("", description="for `tls://`: its key, a PEM file")


@EXECUTORS.register("dask")
class Dask(Launcher):
    """Workers of a Dask cluster: `dask:local:8`, `dask:tls://host:8786`."""

    Settings: ClassVar[type[LauncherSettings]] = DaskSettings
    settings: DaskSettings
    example: ClassVar[str] = "dask:tls://host:8786"
    again: ClassVar[str] = "start the scheduler again, and give the same command to go on"

    @classmethod
    def of_text(cls, text: str) -> dict[str, Any]:
        """``local``, ``local:8``, or the address of a scheduler."""
        name, _, count = text.partition(":")
        if name != LOCAL:
            return {"address": text}
        return {"address": LOCAL, **(super().of_text(count) if count else {})}

    @property
    def lost(self) -> tuple[type[BaseException], ...]:
        """What a call ends with whose worker was lost."""
        distributed = require("distributed", "dask", "the executor dask")
        return (*super().lost, distributed.scheduler.KilledWorker, distributed.client.FutureCancelledError)

    def check(self, *, insecure: bool = False) -> None:
        """Raises MissingExtraError without Dask, and ConfigError for an address that others can reach unencrypted."""
        require("distributed", "dask", "the executor dask")
        address = self.settings.address
        if address == LOCAL:
            return
        parts = urlsplit(address if "://" in address else f"tcp://{address}")
        files = {key: getattr(self.settings, key) for key in ("tls_ca_file", "tls_cert", "tls_key")}
        if parts.scheme == "tls":
            for key, file in files.items():
                if file and not Path(file).is_file():
                    raise ConfigError(f"there is no file {file}", key=WHERE)
                if not file:
                    raise ConfigError(f"{address} needs {key}, a PEM file", key=WHERE)
        elif not insecure and not _loopback(parts.hostname or ""):
            raise ConfigError(
                f"{address} is not encrypted, and does not ask who connects: whoever reaches it can run code as you, "
                "here and on its workers. Use tls://, a scheduler on 127.0.0.1, or type --insecure-executor",
                key=WHERE,
                arguments=("insecure_executor",),
            )

    def launch(self, workers: int, prepare: Callable[[], None] | None = None) -> Launched:  # noqa: ARG002
        """Connect to the scheduler, or start one with workers. Raises EvaluationError."""
        distributed = require("distributed", "dask", "the executor dask")
        dask = require("dask", "dask", "the executor dask")
        local = self.settings.address == LOCAL
        with contextlib.ExitStack() as started:
            started.enter_context(dask.config.set(OF_LOCAL if local else {}))
            started.enter_context(_silenced())
            address = self.settings.address
            if local:
                cluster = self._cluster(workers)
                started.callback(_closed, cluster, 5)
                address = cluster.scheduler_address
            try:
                client = distributed.Client(
                    address, security=self._security(), timeout=CONNECTING, set_as_default=False
                )
            except (OSError, TimeoutError, ValueError) as error:
                raise EvaluationError(
                    f"dask: no scheduler answers at {address} ({error}); start one with `dask scheduler`, and workers "
                    "with `dask worker`"
                ) from None
            started.callback(_closed, client, 2)
            return of_client(client, started.pop_all().close)

    def _cluster(self, workers: int) -> Any:
        """A cluster on this machine. Raises EvaluationError if its workers die again and again while they start."""
        distributed = require("distributed", "dask", "the executor dask")
        why = ""
        for _ in range(STARTS):
            try:
                with interrupts.blocked():
                    return distributed.LocalCluster(
                        n_workers=workers,
                        threads_per_worker=1,
                        host="127.0.0.1",
                        dashboard_address=None,
                        silence_logs=logging.CRITICAL,
                    )
            except (OSError, RuntimeError, TimeoutError) as error:
                why = described(error)
        raise EvaluationError(f"dask: its workers cannot be started on this machine: {why}")

    def _security(self) -> Any:
        if not self.settings.address.startswith("tls://"):
            return None
        distributed = require("distributed", "dask", "the executor dask")
        return distributed.Security(
            require_encryption=True,
            tls_ca_file=self.settings.tls_ca_file,
            tls_client_cert=self.settings.tls_cert,
            tls_client_key=self.settings.tls_key,
        )


def of_client(client: Any, close: Callable[[], None] = lambda: None) -> Launched:
    """A client of Dask as an executor that runs.

    Args:
        client: a ``distributed.Client``.
        close: ends what was started.
    """
    executor: Executor = client.get_executor(pure=False, retries=0)
    address = client.scheduler.address
    seen = [0, -LOOKING]

    def gone() -> str:
        if client.status in THERE:
            return ""
        return f"there is no connection to the scheduler at {address} any more"

    def workers() -> int:
        if time.perf_counter() - seen[1] >= LOOKING and not gone():
            with contextlib.suppress(OSError):  # it has just gone, which is seen at the next look
                seen[:] = len(client.scheduler_info(n_workers=-1)["workers"]), time.perf_counter()
        return int(seen[0])

    return Launched(executor, workers, gone, close)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Within this, Dask writes no tracebacks where a connection is lost; what is wrong is said in one line."""
    logger = logging.getLogger("distributed")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _closed(what: Any, seconds: float) -> None:
    """Close a client or a cluster. What does not end in time ends with this process."""
    with contextlib.suppress(OSError):
        what.close(timeout=seconds)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
