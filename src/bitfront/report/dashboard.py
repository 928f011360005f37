"""Shows a run in optuna-dashboard, also while the search goes on. Only this computer can open the page.

The dashboard reads a temporary study (``study.py``), and new trials are written into it as they arrive. The run folder
is only read, so notes and other changes in the dashboard are lost when serving ends.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from bitfront.engine.storage.folder import STORE
from bitfront.engine.storage.run import Run
from bitfront.errors import BitfrontError, ConfigError, UserError, require
from bitfront.files import scratch
from bitfront.report import study
from bitfront.report.columns import kept

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

HOST = "127.0.0.1"
#: How a request may name this computer.
NAMES = (HOST, "localhost", "[::1]")
#: A request to this port does not name it.
HTTP_PORT = 80
PORT = 8080
#: Seconds between two checks of the run folder.
REFRESH = 1.0
#: Number of trials shown of a longer run: Optuna takes some milliseconds to read each, and the browser to draw it.
SHOWN = 2000


class _Server(ThreadingMixIn, WSGIServer):
    """Answers each request in a separate thread. Threads that are still running do not delay the end."""

    daemon_threads = True

    def server_bind(self) -> None:
        """Bind without asking the network for the name of this computer, which may take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]
        self.setup_environ()


class _Handler(WSGIRequestHandler):
    """Logs no requests."""

    def log_message(self, *_: object) -> None:
        pass


def for_this_computer(app: WSGIApplication, port: int) -> WSGIApplication:
    """`app` for requests that name this computer, and status 403 for all others.

    A page of another site can have its own name point to this computer, and then read what is served here. Such a
    request names the other site in its Host header.
    """
    allowed = {f"{name}:{port}" for name in NAMES} | ({*NAMES} if port == HTTP_PORT else set())

    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ.get("HTTP_HOST", "").lower() in allowed:
            return app(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"The dashboard is for this computer only: open http://{HOST}:{port}/\n".encode()]

    return guarded


@dataclass(frozen=True)
class Served:
    """A run that is being served.

    Attributes:
        address: the URL for a browser.
        trials: number of its trials that are shown at first.
        total: number of all its trials.
        wait: answers requests until it is interrupted, or until the block ends.
    """

    address: str
    trials: int
    total: int
    wait: Callable[[], None]


@contextmanager
def served(run: str | Path, port: int = PORT, trials: int = SHOWN) -> Iterator[Served]:
    """Serve a run folder on this computer until the block ends.

    Args:
        port: the port; 0 takes any that is free.
        trials: about how many trials to show: of a longer run, the front and every n-th trial.

    Raises:
        MissingExtraError: optuna-dashboard is not installed.
        ConfigError: there is no such port, or `trials` is not positive.
        RunError: there is no such run.
        UserError: the port is taken.
    """
    dashboard = require("optuna_dashboard", "dashboard", "the dashboard")
    if not 0 <= port < 2**16:
        raise ConfigError(f"{port} is not possible: 0 (any that is free) to {2**16 - 1}", key=("port",))
    if trials < 1:
        raise ConfigError(f"{trials} is not possible: at least 1", key=("trials",))
    first = Run.load(run)
    import optuna

    try:
        server = _Server((HOST, port), _Handler)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        why = "is in use" if error.errno == errno.EADDRINUSE else "may not be used by you"
        raise UserError(
            f"port {port} {why}; port=... names another, port=0 takes any that is free",
            arguments=["port=...", "port=0"],
        ) from None
    stop, answering = threading.Event(), threading.Event()

    def wait() -> None:
        try:
            answering.set()
            server.serve_forever()
        finally:
            answering.clear()

    with server, scratch("dashboard") as folder:
        followed = _Followed(first, folder / "optuna.db", trials)
        storage = optuna.storages.get_storage(study.address(followed.path))
        number = storage.get_study_id_from_name(followed.name)
        server.set_app(for_this_computer(dashboard.wsgi(storage), server.server_port))
        follower = threading.Thread(target=followed.follow, args=(stop,), daemon=True)
        follower.start()
        try:
            address = f"http://{HOST}:{server.server_port}/dashboard/studies/{number}"
            yield Served(address, followed.trials, len(first), wait)
        finally:
            stop.set()
            if answering.is_set():
                # In a thread it would go on with a closed socket for ever, at full speed.
                server.shutdown()
            follower.join()


class _Followed:
    """A run whose new trials are written into a study as they arrive."""

    def __init__(self, run: Run, path: Path, limit: int) -> None:
        self.folder, self.path, self.limit = run.folder, path, limit
        self.trials = self._names = 0
        self._seen = self._state()
        self._begin(run)

    def follow(self, stop: threading.Event) -> None:
        """Look for new trials every ``REFRESH`` seconds, until `stop` is set."""
        while not stop.wait(REFRESH):
            state = self._state()
            if state == self._seen:
                continue
            try:
                run = Run.load(self.folder)
            except BitfrontError:
                continue  # the run is being deleted or has been: what is shown stays
            self._seen = state
            if len(run) and run.columns.number[-1] < self._last:
                self._begin(run)  # a new search in this folder: its numbers mean other candidates
            else:
                self._add(run)

    def _begin(self, run: Run) -> None:
        self._names += 1
        name = run.folder.resolve().name
        self.name = study.create(self.path, run, name if self._names == 1 else f"{name} ({self._names})")
        self._began: datetime = study.began(run)
        self._last = -1
        self._add(run)

    def _add(self, run: Run) -> None:
        rows = kept(run, self.limit)
        rows = rows[run.columns.number[rows] > self._last]
        if len(rows):
            study.append(self.path, self.name, run, rows, self._began)
            self._last = int(run.columns.number[-1])
            self.trials += len(rows)

    def _state(self) -> tuple[Any, ...]:
        """(time of change, size) of the files of the store; it changes when trials are written."""
        state: list[tuple[int, int]] = []
        for name in (STORE, f"{STORE}-wal"):
            with suppress(OSError):
                status = (self.folder / name).stat()
                state.append((status.st_mtime_ns, status.st_size))
        return tuple(state)
