"""The loop of a search: initial candidates → propose → drop the known → evaluate in blocks → store → tell → stop rules.

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
from bitfront.pareto import Front
from bitfront.spaces.base import Codes, Space
from bitfront.strategies.base import History, Strategy, unseen_neighbours

if TYPE_CHECKING:
    from bitfront.engine.evaluation.interface import BatchMetrics
    from bitfront.engine.planning.feasibility import Feasibility
    from bitfront.objectives import Objectives

Values = NDArray[np.float64]

StopReason = Literal["space exhausted", "n_trials reached", "timeout", "interrupted", "nothing feasible found"]
#: Known proposals in a row after which the loop takes neighbours of the front itself.
PATIENCE = 3
#: A search whose first so many candidates all fail is broken.
HOPELESS = 20
#: So many candidates in a row that violate the constraints end a search.
FRUITLESS = 50_000
#: Small blocks are written together: what was evaluated waits about so long, at most, until it is durable.
COMMIT_SECONDS = 0.1


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
    initial: Codes,
    objectives: Objectives,
    store: TrialSink,
    evaluator: BlockEvaluator,
    limits: Limits,
    seed: int,
    on_progress: Callable[[Progress], None] = lambda _: None,
    feasibility: Feasibility | None = None,
) -> StopReason:
    """Search until a stop rule applies; every trial is in the store as soon as it is told.

    Candidates that are known to violate the constraints are told without being evaluated: they are no trials, and do
    not count against the budget.

    Args:
        initial: candidates to begin with, before the strategy is asked, shape (candidates, parameters).
        seed: root of the random choices.
        feasibility: the constraints; None, or a false one: there are none.

    Raises:
        EvaluationError: the store cannot be written, a worker died, or nothing but failures comes out.
    """
    state = _State(space, strategy, objectives, store, evaluator, limits, on_progress, feasibility or None)
    try:
        if len(initial) and len(store) < state.total:
            state.settle(state.history.fresh(initial))
        step = 0
        while (reason := state.stop_reason()) is None:
            fresh = state.next_candidates(np.random.default_rng([seed, 1, step]))
            if len(fresh):
                state.settle(fresh)
            step += 1
        return reason
    except KeyboardInterrupt:
        return "interrupted"


class _State:
    """What the loop knows at a moment: what was told, the front, and counters for the stop rules."""

    def __init__(
        self,
        space: Space,
        strategy: Strategy,
        objectives: Objectives,
        store: TrialSink,
        evaluator: BlockEvaluator,
        limits: Limits,
        on_progress: Callable[[Progress], None],
        feasibility: Feasibility | None,
    ) -> None:
        self.space, self.strategy, self.objectives = space, strategy, objectives
        self.store, self.evaluator, self.feasibility = store, evaluator, feasibility
        self.limits, self.on_progress = limits, on_progress
        self.total = min(limits.n_trials, space.size)
        self.began = time.perf_counter()
        forgets = not strategy.looks_back
        self.history = History(len(space.parameters), strategy.objectives, space, forgets=forgets)
        self.front, self.writer = Front(strategy.objectives), Writer(store)
        self.before = len(store)
        self.failed = self.skipped = 0
        #: Candidates in a row that violate the constraints.
        self.fruitless = 0
        #: Proposals in a row that were all known.
        self.stalled = 0

    def late(self) -> bool:
        """Whether the time is up."""
        return self.limits.timeout is not None and time.perf_counter() - self.began >= self.limits.timeout

    def stop_reason(self) -> StopReason | None:
        """Why the search ends now; None if it goes on."""
        if max(len(self.store), len(self.history)) >= self.space.size:
            return "space exhausted"
        if len(self.store) >= self.total:
            return "n_trials reached"
        if self.late():
            return "timeout"
        if self.fruitless >= FRUITLESS and self.strategy.looks_back:
            return "nothing feasible found"
        return None

    def next_candidates(self, rng: np.random.Generator) -> Codes:
        """Unknown candidates: the strategy's, or, when it only proposes known ones, neighbours of the front."""
        history, strategy = self.history, self.strategy
        # The budget must not decide what a strategy proposes, but for one that does not look back it cannot.
        limited = not strategy.looks_back and self.feasibility is None
        wanted = min(strategy.batch, (self.total if limited else self.space.size) - len(history))
        proposed = strategy.propose(history, wanted, rng)
        fresh = history.fresh(proposed)
        self.stalled = 0 if len(fresh) else self.stalled + max(1, len(proposed))
        if len(fresh) or (self.stalled < PATIENCE and len(proposed)):
            return fresh
        self.stalled = 0
        rows = self.front.rows if strategy.looks_back else self.front.rows[:0]
        return unseen_neighbours(self.space, history, rows, wanted, rng)

    def settle(self, codes: Codes) -> None:
        """Answer from the store or evaluate, then tell in the proposed order. Stops early when time is up."""
        violation = self.feasibility.before(codes) if self.feasibility else None
        known, values = self._recall(codes, violation)
        try:
            self._evaluate(codes, known, values)
        finally:
            self.writer.write()
        if not known.all():
            codes, values = codes[known], {m: v[known] for m, v in values.items()}
            violation = None if violation is None else violation[known]
        self._tell(codes, values, violation)
        self._report()

    def _recall(self, codes: Codes, violation: Values | None) -> tuple[NDArray[np.bool_], dict[str, Values]]:
        """(which candidates need no evaluation, the metrics that are known of them; NaN for the others)."""
        if violation is None or not violation.any():
            known, recalled = self.store.recall(codes)
            return known, dict(recalled)
        inside = np.flatnonzero(violation == 0)
        known = violation > 0
        values = {m: np.full(len(codes), np.nan) for m in self.store.metrics}
        known[inside], recalled = self.store.recall(codes[inside])
        for name, column in recalled.items():
            values[name][inside] = column
        self.skipped += len(codes) - len(inside)
        self.fruitless = 0 if len(inside) else self.fruitless + len(codes)
        return known, values

    def _evaluate(self, codes: Codes, known: NDArray[np.bool_], values: dict[str, Values]) -> None:
        """Evaluate what is not known, as far as budget and time reach; fills in `known` and `values`."""
        new = np.flatnonzero(~known)[: max(0, self.total - len(self.store))]
        place = 0
        for block, metrics in self.evaluator.blocks(codes[new]) if len(new) else ():
            rows = new[place : place + len(block)]
            place += len(block)
            self.writer.add(block, metrics)
            known[rows] = True
            fine = np.array([not e for e in metrics.errors]) if any(metrics.errors) else np.bool_(True)
            for name, column in values.items():
                # What a failed candidate has of metrics is in the file, but must not look good to a strategy.
                column[rows] = np.where(fine, metrics.values[name], np.nan)
            self.failed += sum(map(bool, metrics.errors)) if not fine.all() else 0
            if self.failed >= HOPELESS and self.failed == len(self.store) + self.writer.waiting:
                raise EvaluationError(
                    f"the first {self.failed} candidates all failed; the last one with: {metrics.errors[-1]}"
                )
            self._report()
            if self.late():
                break

    def _tell(self, codes: Codes, values: Mapping[str, Values], violation: Values | None) -> None:
        losses = self.objectives.losses(values)
        if self.feasibility and violation is not None:
            violation = np.where(violation > 0, violation, self.feasibility.after(values))
            self.history.tell(codes, losses, violation)
            self.front.add(np.where((violation > 0)[:, None], np.nan, losses))
        else:
            self.history.tell(codes, losses)
            self.front.add(losses)

    def _report(self) -> None:
        done, seconds = len(self.store) + self.writer.waiting, time.perf_counter() - self.began
        self.on_progress(Progress(done, self.total, done - self.before, self.failed, self.skipped, seconds, self.front))


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
