"""The loop of a search: seeds → propose → drop what is known → evaluate in blocks → store → tell → stop rules.

It is deterministic: what is proposed depends on the seed and on what was told, in order. A search that was killed is
resumed by running the same loop again; whatever is in the store is answered from there, at no cost, until the loop
arrives where it was stopped.

Duplicates are the loop's business, never the sampler's: a candidate that is known is not evaluated again and does not
count; when a strategy only comes up with known ones, unseen neighbours of the front are taken instead; a space with
nothing unseen left ends the search. Budgets count distinct candidates.

A million candidates go through it as through a pipe: of what was told it keeps the front, and for strategies that look
back the codes and losses; everything else is in the store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from bitfront.errors import EvaluationError
from bitfront.pareto import Front, Losses
from bitfront.spaces.base import Codes, Space
from bitfront.strategies.base import History, Strategy, unseen_neighbours

if TYPE_CHECKING:
    from bitfront.engine.evaluation.interface import BatchMetrics

StopReason = Literal["space exhausted", "n_trials reached", "timeout", "interrupted", "nothing feasible found"]
#: Known proposals in a row after which the loop takes neighbours of the front itself.
PATIENCE = 3
#: A search whose first so many candidates all fail is broken.
HOPELESS = 20
#: So many candidates in a row that violate the constraints end a search.
FRUITLESS = 50_000
#: Small blocks are written together: what was evaluated waits about so long, at most, until it is durable.
COMMIT_SECONDS = 0.1


class Objectives(Protocol):
    """From metrics to what is minimised."""

    def losses(self, values: Mapping[str, NDArray[np.float64]]) -> Losses:
        """Shape (candidates, objectives); NaN in rows that failed."""
        ...


class Feasibility(Protocol):
    """What candidates must fulfil."""

    def __bool__(self) -> bool:
        """Whether there are constraints at all."""
        ...

    def before(self, codes: Codes) -> NDArray[np.float64]:
        """By how much candidates violate what is known without evaluating them; 0: they do not."""
        ...

    def after(self, values: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """By how much evaluated candidates violate the constraints."""
        ...


class TrialSink(Protocol):
    """Where trials go as they are told: the file of a run, or memory."""

    @property
    def metrics(self) -> Sequence[str]:
        """Names of the metrics."""
        ...

    def __len__(self) -> int:
        """How many trials there are, those of earlier sessions included."""
        ...

    def recall(self, codes: Codes) -> tuple[NDArray[np.bool_], Mapping[str, NDArray[np.float64]]]:
        """What earlier sessions found out about `codes`: (which of them are known, metrics with NaN for the others)."""
        ...

    def add(
        self,
        codes: Codes,
        values: Mapping[str, NDArray[np.float64]],
        errors: Sequence[str],
        durations: NDArray[np.float64],
    ) -> object:
        """Keep evaluated candidates, none of which is there yet."""
        ...


class BlockEvaluator(Protocol):
    """What evaluates candidates."""

    def blocks(self, codes: Codes) -> Iterator[tuple[Codes, BatchMetrics]]:
        """Evaluate `codes` block by block, in order."""
        ...


@dataclass(frozen=True)
class Progress:
    """Where the search is, for whoever shows it.

    Attributes:
        done: distinct candidates evaluated, earlier sessions included.
        total: how many there will be at most.
        new: how many of them in this session.
        failed: how many of these failed.
        skipped: candidates that were not evaluated, because they cannot fulfil the constraints.
        seconds: since this session began.
        front: the front of what was told so far. To be read, not to be kept: it changes.
    """

    done: int
    total: int
    new: int
    failed: int
    skipped: int
    seconds: float
    front: Front


@dataclass(frozen=True)
class Limits:
    """When to stop: `n_trials` counts distinct candidates over all sessions, `timeout` the seconds of this one."""

    n_trials: int
    timeout: float | None = None


def run(
    space: Space,
    strategy: Strategy,
    seeds: Codes,
    objectives: Objectives,
    store: TrialSink,
    dispatcher: BlockEvaluator,
    limits: Limits,
    seed: int,
    on_progress: Callable[[Progress], None] = lambda _: None,
    bounds: Feasibility | None = None,
) -> StopReason:
    """Search until a stop rule applies; every trial is in the store as soon as it is told.

    Candidates that are known to violate the constraints are told without being evaluated: they are no trials, and do
    not count against the budget.

    Raises:
        EvaluationError: the store cannot be written, a worker died, or nothing but failures comes out.
    """
    total = min(limits.n_trials, space.size)
    began = time.perf_counter()
    history = History(len(space.parameters), strategy.objectives, space, forgets=not strategy.looks_back)
    front, writer = Front(strategy.objectives), Writer(store)
    failed, before, skipped, fruitless = 0, len(store), 0, 0
    bounds = bounds or None

    def late() -> bool:
        return limits.timeout is not None and time.perf_counter() - began >= limits.timeout

    def progress() -> None:
        done = len(store) + writer.waiting
        on_progress(Progress(done, total, done - before, failed, skipped, time.perf_counter() - began, front))

    def settle(codes: Codes) -> None:
        """Answer from the store or evaluate, then tell in the proposed order. Stops early when time is up."""
        nonlocal failed, skipped, fruitless
        violation = bounds.before(codes) if bounds else None
        if violation is None or not violation.any():
            known, recalled = store.recall(codes)
            values = dict(recalled)
        else:
            inside = np.flatnonzero(violation == 0)
            known = violation > 0
            values = {m: np.full(len(codes), np.nan) for m in store.metrics}
            known[inside], recalled = store.recall(codes[inside])
            for name, column in recalled.items():
                values[name][inside] = column
            skipped += len(codes) - len(inside)
            fruitless = 0 if len(inside) else fruitless + len(codes)
        new = np.flatnonzero(~known)[: max(0, total - len(store))]
        place = 0
        try:
            for block, measured in dispatcher.blocks(codes[new]) if len(new) else ():
                rows = new[place : place + len(block)]
                place += len(block)
                writer.add(block, measured)
                known[rows] = True
                fine = np.array([not e for e in measured.errors]) if any(measured.errors) else np.bool_(True)
                for name, column in values.items():
                    # What a failed candidate has of metrics is in the file, but must not look good to a strategy.
                    column[rows] = np.where(fine, measured.values[name], np.nan)
                failed += sum(map(bool, measured.errors)) if not fine.all() else 0
                if failed >= HOPELESS and failed == len(store) + writer.waiting:
                    raise EvaluationError(
                        f"the first {failed} candidates all failed; the last one with: {measured.errors[-1]}"
                    )
                progress()
                if late():
                    break
        finally:
            writer.write()
        if not known.all():
            codes, values = codes[known], {m: v[known] for m, v in values.items()}
            violation = None if violation is None else violation[known]
        losses = objectives.losses(values)
        if bounds and violation is not None:
            violation = np.where(violation > 0, violation, bounds.after(values))
            history.tell(codes, losses, violation)
            front.add(np.where((violation > 0)[:, None], np.nan, losses))
        else:
            history.tell(codes, losses)
            front.add(losses)
        progress()

    try:
        step, stalled = 0, 0
        if len(seeds) and len(store) < total:
            settle(history.fresh(seeds))
        while True:
            if max(len(store), len(history)) >= space.size:
                return "space exhausted"
            if len(store) >= total:
                return "n_trials reached"
            if late():
                return "timeout"
            if fruitless >= FRUITLESS and strategy.looks_back:
                return "nothing feasible found"
            rng = np.random.default_rng([seed, 1, step])
            step += 1
            pending = np.zeros((0, len(space.parameters)), dtype=np.int64)
            # The budget must not decide what a strategy proposes, but for one that does not look back it cannot.
            limited = not strategy.looks_back and not bounds
            wanted = min(strategy.batch, (total if limited else space.size) - len(history))
            proposed = strategy.propose(history, pending, wanted, rng)
            fresh = history.fresh(proposed)
            stalled = 0 if len(fresh) else stalled + max(1, len(proposed))
            if not len(fresh) and (stalled >= PATIENCE or not len(proposed)):
                rows = front.rows if strategy.looks_back else front.rows[:0]
                fresh = unseen_neighbours(space, history, rows, wanted, rng)
                stalled = 0
            if len(fresh):
                settle(fresh)
    except KeyboardInterrupt:
        return "interrupted"


class Writer:
    """Gathers small blocks on their way into the store, so that a quick search does not wait for the disk."""

    def __init__(self, store: TrialSink) -> None:
        self._store = store
        self._blocks: list[tuple[Codes, BatchMetrics]] = []
        self._written = time.perf_counter()

    @property
    def waiting(self) -> int:
        """How many candidates are not written yet."""
        return sum(len(codes) for codes, _ in self._blocks)

    def add(self, codes: Codes, measured: BatchMetrics) -> None:
        """Take a block, and write what there is if the last time is long enough ago."""
        self._blocks.append((codes, measured))
        if time.perf_counter() - self._written >= COMMIT_SECONDS:
            self.write()

    def write(self) -> None:
        """Make everything durable. Raises EvaluationError if it cannot be written."""
        blocks, self._blocks = self._blocks, []  # never twice, whatever interrupts it
        if blocks:
            self._store.add(
                np.concatenate([codes for codes, _ in blocks]),
                {m: np.concatenate([own.values[m] for _, own in blocks]) for m in self._store.metrics},
                [error for _, own in blocks for error in own.errors],
                np.concatenate([own.seconds for _, own in blocks]),
            )
        self._written = time.perf_counter()
