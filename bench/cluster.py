"""How many workers one search can feed: workers that are simulated, with latency, deaths and stragglers.

Coordinator and store are those of a search: blocks, crew, pickled calls, answers in order, durable trials. Workers and
their time are simulated: a clock jumps to the next answer while the coordinator waits, and goes with the real one where
it works. So 1,024 workers with candidates of a minute take seconds on one core. A call travels for 5 ms each way; 1 in
1,000 candidates loses its worker, as a machine that fails does; one call in 100 takes five times as long.

workers, ms       how many workers, and how long a candidate takes on one
efficiency        candidates · time / (workers · time of the search); 1: no worker ever waits
busy              share of the time in which the coordinator works; from 0.5 on it begins to be what workers wait for
candidates/s      of the whole search
bytes             that travel per candidate, both ways
MB                memory that the coordinator holds beyond what it had at the start
"""

from __future__ import annotations

import heapq
import itertools
import pickle
import random
import resource
import tempfile
import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import CancelledError, Executor, Future, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from common import parser, report

from bitfront.engine.evaluation.dispatch import Dispatcher
from bitfront.engine.evaluation.interface import BatchMetrics
from bitfront.engine.search.loop import Writer
from bitfront.engine.storage.store import Store
from bitfront.executors import crew as crews
from bitfront.executors.base import Launched, Launcher, LauncherSettings
from bitfront.executors.calls import Answer
from bitfront.testing.strategies import toy_space

LATENCY, DEATHS, STRAGGLERS, SLOWER = 0.005, 1e-3, 1e-2, 5.0
WORKERS = (1, 4, 16, 64, 256, 1024)
SECONDS = (0.001, 0.01, 0.1, 1.0, 10.0, 60.0)
#: A search has so many candidates per worker at least, and takes so many seconds of each at least; and at most so many.
PER_WORKER, LEAST_SECONDS, MOST = 40, 5.0, 400_000
METRICS = ("accuracy", "loss", "average_bitwidth")


class Clock:
    """The real clock, and the time that was jumped over."""

    def __init__(self) -> None:
        self.real, self.jumped = time.perf_counter, 0.0

    def now(self) -> float:
        """Seconds."""
        return self.real() + self.jumped


class Simulated(Executor):
    """Workers that take the time that they would take."""

    def __init__(self, clock: Clock, workers: int, seconds: float) -> None:
        self.clock, self.free, self.seconds = clock, workers, seconds
        self.queue: deque[tuple[Future[Any], Any, int]] = deque()
        self.events: list[tuple[float, int, Future[Any], Any, int]] = []
        self.count, self.random, self.bytes = itertools.count(), random.Random(0), 0

    def submit(self, _: Callable[..., Any], call: Any) -> Future[Any]:  # type: ignore[override]
        """A call travels as bytes."""
        data = pickle.dumps(call)
        self.bytes += len(data)
        future: Future[Any] = Future()
        self.queue.append((future, call, len(data)))
        self.begin()
        return future

    def begin(self) -> None:
        """Free workers begin with what waits."""
        while self.free and self.queue:
            self.free -= 1
            future, call, size = self.queue.popleft()
            slower = SLOWER if self.random.random() < STRAGGLERS else 1.0
            end = self.clock.now() + 2 * LATENCY + self.seconds * len(call.argument) * slower
            heapq.heappush(self.events, (end, next(self.count), future, call, size))

    def wait(self, _: Collection[Future[Any]], limit: float, __: str) -> Any:
        """Go on to the next answer, and to all that came meanwhile."""
        done: set[Future[Any]] = set()
        if self.events and self.events[0][0] > self.clock.now():
            jump = self.events[0][0] - self.clock.now()
            if jump > limit:
                self.clock.jumped += limit
                return SimpleNamespace(done=done)
            self.clock.jumped += jump
        while self.events and self.events[0][0] <= self.clock.now():
            _, _, future, call, _ = heapq.heappop(self.events)
            self.free += 1
            self.begin()
            if future.cancelled():
                continue
            count = len(call.argument)
            if self.random.random() < DEATHS * count:
                future.set_exception(CancelledError("its machine failed"))
            else:
                values = {m: call.argument[:, i].astype(np.float64) for i, m in enumerate(METRICS)}
                metrics = BatchMetrics(values, ("",) * count, (self.seconds,) * count)
                data = pickle.dumps(Answer(metrics, "simulated", self.seconds * count))
                self.bytes += len(data)
                future.set_result(pickle.loads(data))  # noqa: S301 (these are our bytes)
            done.add(future)
        return SimpleNamespace(done=done)


class Simulating(Launcher):
    """Launches simulated workers. A machine that fails loses its own call."""

    apart = True
    title = "simulated"

    def __init__(self, executor: Simulated, workers: int) -> None:
        super().__init__(LauncherSettings(workers=workers, block_timeout=1e9))
        self.executor, self.workers = executor, workers

    def launch(self, workers: int, prepare: Callable[[], None] | None = None) -> Launched:  # noqa: ARG002
        """They are there."""
        return Launched(self.executor, lambda: self.workers, lambda: "", lambda: None)


class Measured(NamedTuple):
    """Of one search."""

    efficiency: float
    busy: float
    per_second: float
    bytes_each: float
    megabytes: float


def measured(workers: int, seconds: float, *, quick: bool) -> Measured:
    """A search with so many workers, whose candidates take so many seconds."""
    count = int(min(MOST, workers * max(PER_WORKER, LEAST_SECONDS / seconds)))
    count = min(count, 400) if quick else count
    space, clock = toy_space(8, 3), Clock()
    codes = space.numbered(0, count)
    executor = Simulated(clock, workers, seconds)
    job = SimpleNamespace(training=None, learning=None)
    evaluator: Any = SimpleNamespace(job=job, metrics=METRICS, space=space)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(crews.cf, "wait", executor.wait),
        mock.patch.object(crews.time, "perf_counter", clock.now),
        mock.patch("bitfront.engine.evaluation.workers.payload_of", return_value=b"the job"),
    ):
        store = Store.open(Path(folder) / "trials.sqlite", METRICS, len(space.parameters), {}, space.keys)
        writer = Writer(store, gathers=True)
        start, cpu = clock.now(), time.process_time()
        with Dispatcher(evaluator, workers, launcher=Simulating(executor, workers)) as dispatcher:
            dispatcher.expect(seconds)
            for block, metrics in dispatcher.blocks(codes):
                writer.add(block, metrics)
        writer.write()
        took, worked = clock.now() - start, time.process_time() - cpu
        stored = len(store)
        store.close()
    assert stored == count, f"{stored} of {count} candidates"
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Measured(
        count * seconds / (workers * took), worked / took, count / took, executor.bytes / count, (after - before) / 1024
    )


def main() -> None:
    """Measure all, print, write."""
    options = parser(__doc__ or "").parse_args()
    assert wait is crews.cf.wait
    sizes = [(w, s) for s in SECONDS for w in WORKERS]
    sizes = [(4, 0.001), (64, 1.0)] if options.quick else sizes
    rows, found = [], {}
    for workers, seconds in sizes:
        of = found[workers, seconds] = measured(workers, seconds, quick=options.quick)
        rows.append(
            {
                "workers": workers, "ms": 1000 * seconds, "efficiency": round(of.efficiency, 3),
                "busy": round(of.busy, 3), "candidates/s": round(of.per_second, 1), "bytes": round(of.bytes_each),
                "MB": round(of.megabytes, 1),
            }
        )  # fmt: skip
    fed = [w for w, s in sizes if s == 1.0 and found[w, s].efficiency >= 0.8]
    summary = {
        "most_candidates_per_second": max(of.per_second for of in found.values()),
        "workers_fed_at_1_s": float(max(fed, default=0)),
        "most_megabytes": max(of.megabytes for of in found.values()),
    }
    report("Workers that one search can feed (simulated workers, measured coordinator)", rows, summary, options.json)


if __name__ == "__main__":
    main()
