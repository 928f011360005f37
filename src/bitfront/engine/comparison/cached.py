"""What the runs of a comparison share, the evaluator with its cache, and what each has: its trials and a clock.

Every candidate is evaluated once, for the run that needs it first. Later runs get the same metrics and the same
duration from memory. Metrics do not depend on the run, so each run gives the same trials as it would alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bitfront.engine.evaluation.interface import BatchMetrics
from bitfront.engine.search.loop import BlockEvaluator, Writer
from bitfront.engine.storage.store import Store
from bitfront.spaces.base import Codes
from bitfront.spaces.index import Index, Keys
from bitfront.strategies.base import History, Strategy

Values = NDArray[np.float64]


class CachedEvaluator:
    """An evaluator with a cache in memory and in a file: known candidates are not evaluated again.

    Args:
        dispatcher: evaluates unknown candidates.
        store: the file; it has the results of earlier sessions.
        keys: from codes to keys that identify candidates, as ``Space.keys``.
    """

    def __init__(self, dispatcher: BlockEvaluator, store: Store, keys: Callable[[Codes], Keys]) -> None:
        self._evaluator, self._keys = dispatcher, keys
        self._writer, self.isolated = Writer(store, gathers=dispatcher.isolated), dispatcher.isolated
        earlier = store.trials()
        self._index: Index | None = None
        self._table = np.zeros((len(store.metrics) + 1, 0))
        self._errors: list[str] = []
        self._metrics = tuple(store.metrics)
        #: Number of candidates evaluated in this session.
        self.evaluated = 0
        if len(earlier):
            errors = [earlier.errors.get(n, "") for n in earlier.number.tolist()]
            self._keep(earlier.code, earlier.metrics, errors, earlier.duration)

    def __len__(self) -> int:
        return len(self._errors)

    def results(self) -> tuple[dict[str, Values], NDArray[np.bool_]]:
        """Of all candidates with a result, also of earlier sessions: metric → values, and whether each is complete; all
        of shape (candidates,)."""
        complete = np.array([not error for error in self._errors], dtype=bool)
        return dict(zip(self._metrics, self._table, strict=False)), complete

    def blocks(self, codes: Codes) -> Iterator[tuple[Codes, BatchMetrics]]:
        """The metrics of `codes`, block by block, in order.

        New results are written to the file within a fraction of a second, and at the latest at the end.

        Yields:
            (codes of a block, its metrics).
        """
        missing = np.flatnonzero(self._find(codes) < 0)
        given = done = 0
        try:
            for block, measured in self._evaluator.blocks(codes[missing]) if len(missing) else ():
                self._keep(block, measured.values, measured.errors, measured.seconds)
                self._writer.add(block, measured)
                self.evaluated += len(block)
                done += len(block)
                stop = int(missing[done]) if done < len(missing) else len(codes)
                yield self._answer(codes[given:stop])
                given = stop
        finally:
            self._writer.write()
        if given < len(codes):
            yield self._answer(codes[given:])

    def _find(self, codes: Codes) -> NDArray[np.int64]:
        if self._index is None:
            return np.full(len(codes), -1, dtype=np.int64)
        return self._index.find(self._keys(codes))

    def _keep(
        self, codes: Codes, values: Mapping[str, Values], errors: Sequence[str], seconds: Sequence[float] | Values
    ) -> None:
        keys = self._keys(codes)
        self._index = self._index or Index(keys.shape[1])
        self._index.add(keys)
        table = np.stack([*(values[m] for m in self._metrics), np.asarray(seconds, dtype=np.float64)])
        self._table = np.concatenate([self._table, table], axis=1)
        self._errors += errors

    def _answer(self, codes: Codes) -> tuple[Codes, BatchMetrics]:
        rows = self._find(codes)
        *values, seconds = self._table[:, rows]
        errors = tuple(self._errors[row] for row in rows.tolist())
        return codes, BatchMetrics(dict(zip(self._metrics, values, strict=True)), errors, tuple(seconds.tolist()))


class InMemoryTrials:
    """The trials of one run, in memory. There are no earlier sessions, and nothing is written to disk."""

    def __init__(self, metrics: Sequence[str]) -> None:
        self.metrics = tuple(metrics)
        self._count = 0
        #: Seconds that the trials took to evaluate.
        self.seconds = 0.0
        self._blocks: list[tuple[Codes, Values, NDArray[np.bool_], Values]] = []

    def __len__(self) -> int:
        return self._count

    def recall(self, codes: Codes) -> tuple[NDArray[np.bool_], Mapping[str, Values]]:
        """No candidate is known: (an array of False; metric → NaN), each of shape (candidates,)."""
        return np.zeros(len(codes), dtype=bool), {m: np.full(len(codes), np.nan) for m in self.metrics}

    def add(self, codes: Codes, values: Mapping[str, Values], errors: Sequence[str], durations: Values) -> None:
        """Store evaluated candidates. None of them may be stored already."""
        fine = np.array([not error for error in errors], dtype=bool)
        table = np.stack([values[m] for m in self.metrics])
        self._blocks.append((codes, table, fine, np.asarray(durations, dtype=np.float64)))
        self._count += len(codes)
        self.seconds += float(np.sum(durations))

    def columns(self, parameters: int) -> tuple[Codes, dict[str, Values], NDArray[np.bool_], Values]:
        """All trials, in order.

        Args:
            parameters: number of columns of a code.

        Returns:
            (codes, shape (trials, parameters); metric → values, whether each trial is complete, and its duration in
            seconds, each of shape (trials,)).
        """
        nothing = np.zeros((0, parameters), dtype=np.int64), np.zeros((len(self.metrics), 0)), np.zeros(0, bool)
        blocks = [(*nothing, np.zeros(0)), *self._blocks]
        table = np.concatenate([b[1] for b in blocks], axis=1)
        return (
            np.concatenate([b[0] for b in blocks]),
            dict(zip(self.metrics, table, strict=True)),
            np.concatenate([b[2] for b in blocks]),
            np.concatenate([b[3] for b in blocks]),
        )


class TimedStrategy(Strategy):
    """Wraps a strategy, with a clock and counters. Its proposals stay the same.

    Args:
        make: creates the strategy; the time for that counts.
        evaluated: gives the number of candidates evaluated so far.

    Attributes:
        seconds: time spent so far in creating the strategy and in its ``propose``.
        proposals: number of candidates it has proposed.
        repeats: number of proposals that were in the history already, or twice in one proposal.
    """

    def __init__(self, make: Callable[[], Strategy], evaluated: Callable[[], int]) -> None:
        begin = time.perf_counter()
        self._strategy, self._evaluated = make(), evaluated
        self.seconds = time.perf_counter() - begin
        super().__init__(self._strategy.space, self._strategy.objectives, self._strategy.seed, self._strategy.settings)
        self.batch, self.looks_back = self._strategy.batch, self._strategy.looks_back
        self.proposals = self.repeats = 0
        #: (number of candidates evaluated, seconds spent) after each call.
        self._spent = [(0, self.seconds)]

    def propose(self, history: History, n: int, rng: np.random.Generator) -> Codes:
        """The proposals of the strategy."""
        begin = time.perf_counter()
        proposed = self._strategy.propose(history, n, rng)
        self.seconds += time.perf_counter() - begin
        self.proposals += len(proposed)
        self.repeats += len(proposed) - len(history.fresh(proposed))
        self._spent.append((self._evaluated(), self.seconds))
        return proposed

    def promising(self, codes: Codes) -> NDArray[np.bool_]:
        """Those of the strategy."""
        return self._strategy.promising(codes)

    def enough(self, history: History, initial: int) -> str:
        """What the strategy says."""
        begin = time.perf_counter()
        why = self._strategy.enough(history, initial)
        self.seconds += time.perf_counter() - begin
        return why

    def asked(self, count: int) -> Values:
        """Seconds spent in the strategy before each of the evaluations 1, 2, ... `count`, shape (count,)."""
        before, seconds = np.array(self._spent).T
        spent: Values = seconds[np.searchsorted(before, np.arange(count), side="right") - 1]
        return spent
