"""Processes that evaluate candidates, and that a candidate may end.

Each worker builds its own evaluator from the job, and evaluates one part of the candidates after the other. When one
dies, or is late and is killed, the part that it had is cut into smaller ones, until the candidate is alone that is to
blame; that one has failed, the others are evaluated again. A candidate that died alone is tried once more: somebody
else may have killed its process.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import connection, get_context, parent_process, resource_tracker
from multiprocessing.context import SpawnProcess
from typing import Any

import numpy as np
from torch.nn.modules import module as _modules

from bitfront import interrupts
from bitfront.engine.evaluation.interface import BatchMetrics, EvaluationJob, joined
from bitfront.engine.evaluation.trained import open_evaluator
from bitfront.errors import EvaluationError, UserError, described
from bitfront.spaces.base import Codes

#: How often in a row workers may die before they are ready.
STARTS = 5
#: So often a candidate may end a process that evaluates it alone.
DEATHS = 2
#: How the error of a candidate begins that ends its process, or whose process was ended.
LETHAL = "the process of this candidate was ended:"
#: Parts of at most so many candidates are cut into single ones.
FEW = 16
#: Seconds that a new worker has for what happens once, such as calibration, until it is known how long that takes.
WARMING = 5.0
#: Seconds that a process may take to end after it has closed its connection.
ENDING = 2.0
#: Several candidates are cut if they take so many times as long as expected, and longer than so many seconds.
LATE, LEAST_SECONDS = 8.0, 1.0


@dataclass(frozen=True, eq=False)
class _Task:
    """Candidates for one worker: `codes` are those of the part number `part` from place `start` on."""

    part: int
    start: int
    codes: Codes
    deaths: int = 0

    def cut(self, apart: bool) -> list[_Task]:
        count = len(self.codes)
        size = 1 if apart or count <= FEW else math.isqrt(count)
        return [_Task(self.part, self.start + i, self.codes[i : i + size]) for i in range(0, count, size)]


@dataclass(eq=False)
class _Worker:
    process: SpawnProcess
    connection: connection.Connection[Any, Any]
    #: Whether the job was sent. It waits until the process reads: it may be large, and the process may die before.
    has_job: bool = False
    ready: bool = False
    fresh: bool = True
    task: _Task | None = None
    since: float = 0.0
    limit: float | None = None


@dataclass(eq=False)
class Workers:
    """Worker processes for one job.

    Attributes:
        job: what they evaluate. Each computes on one thread.
        number: how many there are at most.
        seconds: how long one candidate may take; None: as long as it wants.
        metrics: names of all metrics, for candidates that fail.
    """

    job: EvaluationJob
    number: int
    seconds: float | None
    metrics: Sequence[str]
    _payload: bytes = b""
    _workers: list[_Worker] = field(default_factory=list)
    _failed_starts: int = 0
    #: Seconds per candidate, as of the last result; None before the first.
    _each: float | None = None
    _warming: float = WARMING

    def evaluate(self, parts: Sequence[Codes], *, apart: bool = False) -> Iterator[BatchMetrics]:
        """The metrics of each part, in order. When the caller stops iterating, what is not finished is dropped.

        Args:
            parts: candidates, each of shape (candidates, parameters).
            apart: whether a part whose worker died is cut into single candidates at once.

        Raises:
            EvaluationError: workers cannot be started.
            UserError: the job cannot be sent to another process; or a runner refuses to go on.
        """
        waiting = deque(_Task(i, 0, codes) for i, codes in enumerate(parts))
        done: list[list[tuple[int, BatchMetrics]]] = [[] for _ in parts]
        missing = [len(codes) for codes in parts]
        following = 0
        try:
            while following < len(parts):
                if not missing[following]:
                    yield joined([metrics for _, metrics in sorted(done[following], key=lambda piece: piece[0])])
                    following += 1
                    continue
                self._assign(waiting)
                for task, metrics in self._events(waiting, apart):
                    done[task.part].append((task.start, metrics))
                    missing[task.part] -= len(task.codes)
        finally:
            for worker in [w for w in self._workers if w.task is not None]:
                self._end(worker)

    def start(self) -> None:
        """Start one worker and wait until it is ready. Raises like ``evaluate``."""
        if not self._workers:
            self._begin()
        while not self._workers[0].ready:
            list(self._events(deque(), apart=False))
            if not self._workers:
                self._begin()

    def close(self) -> None:
        """End all workers."""
        for worker in list(self._workers):
            self._end(worker)

    def _assign(self, waiting: deque[_Task]) -> None:
        """Give idle workers something to do, and start as many as there is work for."""
        for worker in self._workers:
            if waiting and worker.ready and worker.task is None:
                task = waiting.popleft()
                worker.limit = self._limit(len(task.codes), worker.fresh)
                try:
                    worker.connection.send(task.codes)
                except OSError:
                    waiting.appendleft(task)  # it has just died; its end is noticed next
                else:
                    worker.task, worker.since = task, time.perf_counter()
        idle = sum(worker.task is None for worker in self._workers)
        for _ in range(min(self.number - len(self._workers), len(waiting) - idle)):
            self._begin()

    def _events(self, waiting: deque[_Task], apart: bool) -> Iterator[tuple[_Task, BatchMetrics]]:
        """Wait until something happens; gives what was evaluated, and puts what must be tried again into `waiting`."""
        now = time.perf_counter()
        left = [w.since + w.limit - now for w in self._workers if w.task is not None and w.limit is not None]
        handles = {w.connection: w for w in self._workers}
        ready = connection.wait(list(handles), max(0.0, min(left)) if left else None)
        for worker in [handles[c] for c in ready if isinstance(c, connection.Connection)]:
            try:
                message = worker.connection.recv()
            except (OSError, EOFError):
                yield from self._died(worker, waiting, apart)
                continue
            if isinstance(message, BaseException):
                raise message
            task, worker.task = worker.task, None
            if task is None:
                worker.ready, worker.has_job = worker.has_job, True
                if worker.ready:
                    self._failed_starts = 0
                    continue
                try:
                    worker.connection.send_bytes(self._payload)
                except OSError:
                    yield from self._died(worker, waiting, apart)
                continue
            seconds = time.perf_counter() - worker.since
            if worker.fresh:
                self._warming, worker.fresh = max(LEAST_SECONDS, 4 * seconds), False
            else:
                self._each = seconds / max(1, len(task.codes))
            yield task, message
        now = time.perf_counter()
        late = [w for w in self._workers if w.task is not None and w.limit is not None and now - w.since >= w.limit]
        for worker in late:
            yield from self._late(worker, waiting, apart)

    def _limit(self, count: int, fresh: bool) -> float | None:
        if self.seconds is None:
            return None
        limit = self.seconds
        if count > 1 and self.job.training is not None:
            limit *= count
        elif count > 1 and self._each is not None:
            limit = min(limit, max(LEAST_SECONDS, LATE * self._each * count))
        return limit + (self._warming if fresh else 0.0)

    def _late(self, worker: _Worker, waiting: deque[_Task], apart: bool) -> Iterator[tuple[_Task, BatchMetrics]]:
        task, limit = worker.task, worker.limit
        assert task is not None
        assert limit is not None
        self._end(worker)
        if len(task.codes) == 1:
            yield task, self._failure(f"{LETHAL} it took longer than candidate_timeout = {self.seconds:g} s", limit)
        else:
            waiting.extendleft(reversed(task.cut(apart)))

    def _died(self, worker: _Worker, waiting: deque[_Task], apart: bool) -> Iterator[tuple[_Task, BatchMetrics]]:
        task, why = worker.task, self._end(worker, wait=ENDING)
        if task is None:
            if not worker.ready:
                self._failed_starts += 1
                if self._failed_starts >= STARTS:
                    raise EvaluationError(f"worker processes cannot be started: {why} before they were ready")
        elif len(task.codes) > 1:
            waiting.extendleft(reversed(task.cut(apart)))
        elif task.deaths + 1 < DEATHS:
            waiting.appendleft(replace(task, deaths=task.deaths + 1))
        else:
            yield task, self._failure(f"{LETHAL} it ended itself, {DEATHS} times of {DEATHS} ({why})", 0.0)

    def _failure(self, text: str, seconds: float) -> BatchMetrics:
        return failed(self.metrics, [text], seconds)

    def _begin(self) -> None:
        self._payload = self._payload or payload_of(self.job, self.number)
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
        self._workers.append(_Worker(process, ours))

    def _end(self, worker: _Worker, wait: float = 0.0) -> str:
        """Kill a worker, unless it ends by itself within `wait` seconds, and say how it ended."""
        self._workers.remove(worker)
        worker.process.join(wait)
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        code = worker.process.exitcode
        if worker.process.pid is not None:
            interrupts.remove_child(worker.process.pid)
        if code is None or code >= 0:
            return f"ended with exit code {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def failed(metrics: Sequence[str], errors: Sequence[str], seconds: float = 0.0) -> BatchMetrics:
    """The metrics of candidates that failed, for the reasons in `errors`."""
    count = len(errors)
    return BatchMetrics({m: np.full(count, np.nan) for m in metrics}, tuple(errors), (seconds,) * count)


def payload_of(job: EvaluationJob, number: int) -> bytes:
    """A job, and the hooks that torch runs around all modules of this process, as bytes for another process, which
    computes on one thread. Raises UserError if that is impossible."""
    try:
        hooks = [list(held.values()) for held in (_modules._global_forward_pre_hooks, _modules._global_forward_hooks)]
        return pickle.dumps((replace(job, threads=1), hooks))
    except Exception as error:
        why = f"n_jobs = {number}" if number > 1 else "candidate_timeout"
        instead = "use n_jobs = 1" if number > 1 else "leave candidate_timeout out"
        raise UserError(
            f"{why} needs a model that can be sent to other processes, and this one cannot be pickled "
            f"({described(error)}). Define its class and its hooks at the top level of a module, or {instead}"
        ) from None


def _work(pipe: connection.Connection[Any, Any]) -> None:
    """What a worker does until its parent process ends it."""
    interrupts.ignore()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pipe.send(None)
    payload = pipe.recv_bytes()
    try:
        with interrupts.contained():
            # The bytes come from the parent process, so that unpickling them is safe.
            job, (before, after) = pickle.loads(payload)  # noqa: S301
            for hook in before:
                _modules.register_module_forward_pre_hook(hook)
            for hook in after:
                _modules.register_module_forward_hook(hook)
            evaluator = open_evaluator(job)
    except Exception as error:
        pipe.send(
            EvaluationError(
                f"a worker process cannot be prepared: {described(error)}. If the model is the reason, define its "
                "class, its hooks and its functions at the top level of a module, or evaluate in one process "
                "(n_jobs = 1, no candidate_timeout)"
            )
        )
        return
    pipe.send(None)
    while True:
        try:
            codes = pipe.recv()
        except EOFError:
            return
        try:
            answer: object = evaluator.evaluate(codes)
        except UserError as error:
            answer = UserError(str(error), arguments=error.arguments)
        pipe.send(answer)


def _end_with_parent() -> None:
    """End this worker when its parent has ended. A killed parent cannot do that, and the worker would wait forever."""
    parent = parent_process()
    if parent is not None:
        with contextlib.suppress(OSError):
            parent.join()
        os._exit(1)
