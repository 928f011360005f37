"""Worker processes of this machine, which a call may end without harm to the others."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, parent_process, resource_tracker
from multiprocessing.context import SpawnProcess
from typing import Any, ClassVar

from bitfront import interrupts
from bitfront.errors import EvaluationError, described
from bitfront.executors import EXECUTORS
from bitfront.executors.base import Launched, Launcher
from bitfront.executors.calls import begin_worker

#: How often in a row a worker may die before it is ready.
STARTS = 5
#: Seconds that a process may take to end after it has closed its connection.
ENDING = 2.0


class WorkerDiedError(BrokenExecutor):
    """The process that carried out a call has ended; the text says how."""


class Running(Future[Any]):
    """A call of ``SpawnedExecutor``.

    Attributes:
        began: when its worker got it, by ``time.perf_counter``; None: not yet.
        first: whether it is the first call of its worker.
        dropped: whether nobody wants its answer any more.
    """

    began: float | None = None
    first: bool = True
    dropped: bool = False


@dataclass(eq=False)
class _Worker:
    """A process and the connection to it."""

    process: SpawnProcess
    pipe: connection.Connection[Any, Any]
    first: bool = True

    def stop(self, wait: float = 0.0) -> str:
        """Kill the process, unless it ends by itself within `wait` seconds, and say how it ended."""
        self.process.join(wait)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        if self.process.pid is not None:
            interrupts.remove_child(self.process.pid)
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"ended with exit code {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


@dataclass(eq=False)
class _Slot:
    """A place for a worker: its thread waits for the answers of one process, and replaces it when it has died."""

    thread: threading.Thread | None = None
    worker: _Worker | None = None
    future: Running | None = None


@dataclass(eq=False)
class SpawnedExecutor(Executor):
    """An executor of processes that are started by need, and replaced when they die.

    Args:
        workers: the largest number of processes.
        prepare: what each does before its first call; picklable.
    """

    workers: int
    prepare: Callable[[], None] | None = None
    _calls: queue.SimpleQueue[tuple[Running, Any] | None] = field(default_factory=queue.SimpleQueue)
    _slots: list[_Slot] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _open: int = 0
    _closed: bool = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Running:
        """A future of ``fn(*args, **kwargs)``; with ``WorkerDiedError`` if the process ends before it answers."""
        future = Running()
        with self._lock:
            if self._closed:
                raise RuntimeError("the executor is shut down")
            self._open += 1
            if self._open > len(self._slots) and len(self._slots) < self.workers:
                slot = _Slot()
                slot.thread = threading.Thread(target=self._serve, args=(slot,), daemon=True, name="bitfront worker")
                self._slots.append(slot)
                slot.thread.start()
        self._calls.put((future, (fn, args, kwargs)))
        return future

    def end(self, future: Future[Any]) -> None:
        """Kill the process that carries out a call."""
        with self._lock:
            if isinstance(future, Running):
                future.dropped = True
            for slot in self._slots:
                if slot.future is future and slot.worker is not None:
                    slot.worker.process.kill()

    @property
    def alive(self) -> int:
        """How many processes there are."""
        with self._lock:
            return sum(slot.worker is not None for slot in self._slots)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002
        """End all processes at once; calls that were not answered end with an error.

        Args:
            wait: for the threads that serve the processes.
            cancel_futures: without effect, as nothing goes on.
        """
        with self._lock:
            self._closed = True
            slots, workers = list(self._slots), [slot.worker for slot in self._slots]
        for worker in workers:
            if worker is not None:
                worker.process.kill()
        for _ in slots:
            self._calls.put(None)
        if wait:
            for slot in slots:
                if slot.thread is not None:
                    slot.thread.join()

    def _serve(self, slot: _Slot) -> None:
        """What the thread of a place does: one call after the other."""
        try:
            while (item := self._calls.get()) is not None:
                future, call = item
                if future.set_running_or_notify_cancel():
                    self._answer(slot, future, call)
                with self._lock:
                    self._open -= 1
        finally:
            if slot.worker is not None:
                slot.worker.stop()

    def _answer(self, slot: _Slot, future: Running, call: Any) -> None:
        with self._lock:
            slot.future = future
        try:
            worker = slot.worker or self._started(slot)
            if future.dropped:
                raise WorkerDiedError("it was ended before its worker was ready")
            future.first, worker.first, future.began = worker.first, False, time.perf_counter()
            worker.pipe.send(call)
            done, value = worker.pipe.recv()
        except (OSError, EOFError):
            future.set_exception(WorkerDiedError(self._lost(slot)))
        except Exception as error:  # it cannot be pickled, or processes cannot be started
            future.set_exception(error)
        else:
            if done:
                future.set_result(value)
            else:
                future.set_exception(value)
        finally:
            with self._lock:
                slot.future = None

    def _lost(self, slot: _Slot) -> str:
        with self._lock:
            worker, slot.worker = slot.worker, None
        return "its worker ended" if worker is None else worker.stop(ENDING)

    def _started(self, slot: _Slot) -> _Worker:
        """A new worker that is ready. Raises EvaluationError if it dies too often before."""
        why = ""
        for _ in range(STARTS):
            with self._lock:
                if self._closed:
                    raise OSError("closed")
                worker = slot.worker = _begun()
            try:
                # The process reads from now on, so that what is large does not wait in the pipe of a dead one.
                worker.pipe.recv()
                worker.pipe.send(self.prepare)
                worker.pipe.recv()
            except (OSError, EOFError):
                why = self._lost(slot)
            else:
                return worker
        raise EvaluationError(f"worker processes cannot be started: {why} before they were ready")


def _begun() -> _Worker:
    # spawn, not fork: a forked child would inherit torch's threads in an undefined state.
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), name="bitfront worker")
    resource_tracker.ensure_running()  # it would unblock the signal
    with interrupts.blocked():
        process.start()
    theirs.close()
    if process.pid is not None:
        interrupts.add_child(process.pid)
    return _Worker(process, ours)


def _work(pipe: connection.Connection[Any, Any]) -> None:
    """What a worker does until its parent process ends it."""
    begin_worker()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pipe.send(None)
    prepare = pipe.recv()
    if prepare is not None:
        prepare()
    pipe.send(None)
    while True:
        try:
            function, arguments, named = pipe.recv()
        except EOFError:
            return
        try:
            answer = True, function(*arguments, **named)
        except Exception as error:
            answer = False, error
        try:
            pipe.send(answer)
        except Exception as error:
            pipe.send((False, EvaluationError(f"what a worker computed cannot be sent: {described(error)}")))


def _end_with_parent() -> None:
    """End this worker when its parent has ended. A killed parent cannot do that, and the worker would wait forever."""
    parent = parent_process()
    if parent is not None:
        with contextlib.suppress(OSError):
            parent.join()
        os._exit(1)


@EXECUTORS.register("processes")
class Processes(Launcher):
    """Worker processes of this machine, watched by Bitfront: `processes:4`."""

    local: ClassVar[bool] = True
    example: ClassVar[str] = "processes:4"
    apart: ClassVar[bool] = True
    at_once: ClassVar[int] = 1
    ends_late: ClassVar[bool] = True
    # A spawned process imports the user's script.
    by_value: ClassVar[bool] = False

    def launch(self, workers: int, prepare: Callable[[], None] | None = None) -> Launched:
        """Start processes, each when there is work for it."""
        executor = SpawnedExecutor(workers, prepare)
        return Launched(executor, lambda: workers, lambda: "", executor.shutdown)
