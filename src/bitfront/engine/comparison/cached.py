"""What several runs of the loop on one space share, and how each of them is watched.

Every candidate is evaluated once, whoever asks for it first; whoever asks for it later is answered from memory, with
the same numbers and the same duration. Results do not depend on who asked, so each run finds what it would find alone.
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
    """In front of an evaluator: answers what is known, has the rest evaluated, and keeps it in a file.

    Args:
        store: where results of all runs go; those of earlier sessions are in it.
        keys: from codes to what tells candidates apart.
    """

    def __init__(self, dispatcher: BlockEvaluator, store: Store, keys: Callable[[Codes], Keys]) -> None:
        self._evaluator, self._keys, self._writer = dispatcher, keys, Writer(store)
        earlier = store.trials()
        self._index: Index | None = None
        self._table = np.zeros((len(store.metrics) + 1, 0))
        self._errors: list[str] = []
        self._metrics = tuple(store.metrics)
        #: How many candidates were evaluated in this session.
        self.evaluated = 0
        if len(earlier):
            errors = [earlier.errors.get(n, "") for n in earlier.number.tolist()]
            self._keep(earlier.code, earlier.metrics, errors, earlier.duration)

    def __len__(self) -> int:
        return len(self._errors)

    def blocks(self, codes: Codes) -> Iterator[tuple[Codes, BatchMetrics]]:
        """Results of `codes`, block by block, in order; what was evaluated is durable soon, and when this ends."""
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
    """The trials of one run, in memory: nothing is known from before, and nothing stays."""

    def __init__(self, metrics: Sequence[str]) -> None:
        self.metrics = tuple(metrics)
        self._count = 0
        self._blocks: list[tuple[Codes, Values, NDArray[np.bool_], Values]] = []

    def __len__(self) -> int:
        return self._count

    def recall(self, codes: Codes) -> tuple[NDArray[np.bool_], Mapping[str, Values]]:
        """Nothing is known."""
        return np.zeros(len(codes), dtype=bool), {m: np.full(len(codes), np.nan) for m in self.metrics}

    def add(self, codes: Codes, values: Mapping[str, Values], errors: Sequence[str], durations: Values) -> None:
        """Keep evaluated candidates, none of which is there yet."""
        fine = np.array([not error for error in errors], dtype=bool)
        table = np.stack([values[m] for m in self.metrics])
        self._blocks.append((codes, table, fine, np.asarray(durations, dtype=np.float64)))
        self._count += len(codes)

    def columns(self, parameters: int) -> tuple[Codes, dict[str, Values], NDArray[np.bool_], Values]:
        """(codes, metric → values, which are complete, seconds) of all of them, in order."""
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
    """A strategy as it is, with a clock and counters beside it.

    Args:
        make: gives the strategy; what making it takes counts.
        evaluated: how many candidates have been evaluated so far.

    Attributes:
        seconds: what making it, asking it and (as that happens in asking) telling it has taken so far.
        proposals: how many candidates it has proposed.
        repeats: how many of them were known to it already, or came twice in one proposal.
    """

    def __init__(self, make: Callable[[], Strategy], evaluated: Callable[[], int]) -> None:
        begin = time.perf_counter()
        self._own, self._evaluated = make(), evaluated
        self.seconds = time.perf_counter() - begin
        super().__init__(self._own.space, self._own.objectives, self._own.seed, self._own.settings)
        self.batch, self.looks_back = self._own.batch, self._own.looks_back
        self.proposals = self.repeats = 0
        self._asked = [(0, self.seconds)]

    def propose(self, history: History, n: int, rng: np.random.Generator) -> Codes:
        """What the strategy proposes."""
        begin = time.perf_counter()
        found = self._own.propose(history, n, rng)
        self.seconds += time.perf_counter() - begin
        self.proposals += len(found)
        self.repeats += len(found) - len(history.fresh(found))
        self._asked.append((self._evaluated(), self.seconds))
        return found

    def asked(self, count: int) -> Values:
        """What had been spent in the strategy when candidate 1, 2, ... `count` was about to be evaluated."""
        before, seconds = np.array(self._asked).T
        spent: Values = seconds[np.searchsorted(before, np.arange(count), side="right") - 1]
        return spent
