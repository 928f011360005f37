"""Ctrl-C by the user, told apart from what the user's code raises, and a second Ctrl-C that ends everything.

The code of models and metrics may call ``sys.exit()`` or raise ``KeyboardInterrupt``. That is a failure of this code,
and no wish of the user's. So while a search runs, a handler of SIGINT notes that the user pressed Ctrl-C (``guarded``),
and what leaves the user's code otherwise becomes an ordinary error (``contained``).

The first Ctrl-C raises ``KeyboardInterrupt``: the search stops, and writes what it has. If the process is stuck in the
user's code, nobody sees that. So a thread, which a signal wakes even then, ends the process and its workers after the
second one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

from bitfront.errors import EvaluationError

#: What a shell makes of SIGINT.
EXIT_CODE = 130
#: Seconds that a search has to end by itself after the second Ctrl-C.
GRACE = 1.0


@dataclass
class _State:
    """Of this process.

    Attributes:
        guarded: whether SIGINT is noted, so that a ``KeyboardInterrupt`` without one is the code's own.
        pressed: how often the user pressed Ctrl-C since then.
        children: process ids of the workers.
    """

    guarded: bool = False
    pressed: int = 0
    children: set[int] = field(default_factory=set)


_STATE = _State()


class CodeExitError(EvaluationError):
    """The code of a model or metric raised what is no ``Exception``: SystemExit, KeyboardInterrupt, GeneratorExit.

    Attributes:
        what: the name of the exception, with its text.
    """

    def __init__(self, error: BaseException) -> None:
        text = str(error)
        self.what = f"{type(error).__name__}: {text}" if text else type(error).__name__
        super().__init__(f"the code of a model or metric raised {self.what}, which would end the program; remove that")


class contained:  # noqa: N801 - used like a function
    """A context for the user's code: what would end the program becomes ``CodeExitError``, except for Ctrl-C.

    A process that this code has forked ends where the context ends. It would go on with the search otherwise, a second
    time.
    """

    def __enter__(self) -> None:
        self._process = os.getpid()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if os.getpid() != self._process:
            os._exit(0 if error is None else 1)
        if error is None or isinstance(error, Exception) or _STATE.pressed:
            return
        if _STATE.guarded or not isinstance(error, KeyboardInterrupt):
            raise CodeExitError(error) from None


def check() -> None:
    """Raises KeyboardInterrupt if the user pressed Ctrl-C: the user's code may have caught the first one."""
    if _STATE.pressed:
        raise KeyboardInterrupt


def ignore() -> None:
    """For worker processes: SIGINT is ignored, since the process that gives them work handles it. Only the main thread
    can do that."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    _STATE.guarded = True


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Within this, SIGINT waits. A process that is started here does not get it, not even before it can ignore it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def add_child(pid: int) -> None:
    """A worker process has begun; it is killed if the user presses Ctrl-C twice."""
    _STATE.children.add(pid)


def remove_child(pid: int) -> None:
    """A worker process has ended."""
    _STATE.children.discard(pid)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Within this, Ctrl-C by the user is known as such, and a second one ends the process and its workers.

    Without effect inside another one, and outside the main thread, where no signal arrives.
    """
    if _STATE.guarded or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if not callable(before):  # ignored, as in the background of a shell
        yield
        return

    def handle(number: int, frame: FrameType | None) -> Any:
        _STATE.pressed += 1
        before(number, frame)

    signal.signal(signal.SIGINT, handle)
    _STATE.guarded, _STATE.pressed = True, 0
    stop = _watch_signals()
    try:
        yield
    finally:
        stop()
        _STATE.guarded, _STATE.pressed = False, 0
        signal.signal(signal.SIGINT, before)


def _watch_signals() -> Callable[[], None]:
    """Begin to count SIGINT in a thread; gives the function that ends it."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    if before != -1:  # somebody else, such as an event loop, needs it
        signal.set_wakeup_fd(before)
        os.close(read)
        os.close(write)
        return lambda: None
    ended = threading.Event()
    thread = threading.Thread(target=_end_after_the_second, args=(read, ended), daemon=True)
    thread.start()

    def stop() -> None:
        ended.set()
        signal.set_wakeup_fd(-1)
        os.write(write, b"\0")
        thread.join()
        os.close(read)
        os.close(write)

    return stop


def _end_after_the_second(read: int, ended: threading.Event) -> None:
    count = 0
    while count < 2:
        numbers = os.read(read, 64)
        if ended.is_set():
            return
        count += numbers.count(signal.SIGINT)
    if not ended.wait(GRACE):
        _end_at_once()


def _end_at_once() -> None:
    for pid in tuple(_STATE.children):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.write(2, b"\ninterrupted twice: ended at once; give the same command again to go on\n")
    os._exit(EXIT_CODE)
