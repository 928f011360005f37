"""The loop of a search: initial candidates → propose → drop known ones → evaluate blocks → store → tell → stop rules.

The loop is deterministic: proposals depend on the random seed and on the history alone. A killed search is resumed by
running the same loop again. Candidates that are in the store are answered from there, until the loop arrives where it
was stopped.

The loop handles duplicates, so that strategies need not. A known candidate is not evaluated again and does not count.
If a strategy proposes only known candidates, unseen neighbours of the front are taken instead. The search ends when the
space has no unseen candidate. Budgets count distinct candidates.

For a million candidates the loop needs little memory: it keeps the front, and codes and losses for strategies that look
back. Everything else is in the store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from bitfront.engine.storage.records import ENOUGH
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
#: Why a search ended: one of these reasons, or ``ENOUGH`` and what the strategy says.
Ended = StopReason | str
#: Number of known proposals in a row after which the loop takes neighbours of the front.
PATIENCE = 3
#: If this many candidates fail, and none succeeds, the search ends with an error.
MAX_FAILURES = 20
#: If this many candidates in a row violate the constraints, the search ends.
MAX_INFEASIBLE = 50_000
#: Small blocks are written together, about this many seconds apart.
COMMIT_SECONDS = 0.1


class TrialSink(Protocol):
    """Stores the trials of a search: in the file of a run, or in memory."""

    @property
    def metrics(self) -> Sequence[str]:
        """Names of the metrics."""
        ...

    def __len__(self) -> int:
        """Number of trials, with those of earlier sessions."""
        ...

    def recall(self, codes: Codes) -> tuple[NDArray[np.bool_], Mapping[str, NDArray[np.float64]]]:
        """The metrics of candidates that earlier sessions evaluated.

        Returns:
            (whether each of `codes` is stored, bool, shape (candidates,); metric → values, shape (candidates,), NaN for
            candidates that are not stored).
        """
        ...

    def add(
        self,
        codes: Codes,
        values: Mapping[str, NDArray[np.float64]],
        errors: Sequence[str],
        durations: NDArray[np.float64],
    ) -> object:
        """Store evaluated candidates. None of them may be stored already."""
        ...


class BlockEvaluator(Protocol):
    """Evaluates candidates in blocks."""

    @property
    def isolated(self) -> bool:
        """Whether candidates are evaluated in worker processes, so that none can end or block this one."""
        ...

    def blocks(self, codes: Codes) -> Iterator[tuple[Codes, BatchMetrics]]:
        """Evaluate `codes` block by block, in order; yields (codes of a block, its metrics)."""
        ...


@dataclass(frozen=True)
class Progress:
    """The progress of a search, for display.

    Attributes:
        done: number of distinct candidates evaluated, with those of earlier sessions.
        total: the largest number of candidates that will be evaluated.
        new: number of candidates evaluated in this session.
        failed: number of candidates that failed in this session.
        skipped: number of candidates that were not evaluated, because they violate the constraints.
        seconds: time since this session began.
        front: the front so far. It changes while the search runs, so read it at once.
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
    """When to stop.

    Attributes:
        n_trials: number of distinct candidates over all sessions.
        timeout: seconds of this session; None for no limit.
        clock: gives the time, in seconds; None for that of the machine.
    """

    n_trials: int
    timeout: float | None = None
    clock: Callable[[], float] | None = None


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
) -> Ended:
    """Search until a stop rule applies. Every trial is in the store before the strategy learns of it.

    Candidates that are known to violate the constraints are not evaluated. The strategy learns of them, but they are
    not trials and do not count against the budget.

    Args:
        space: the space of the search.
        strategy: proposes candidates.
        initial: candidates that are evaluated before the strategy's, int64, shape (candidates, parameters).
        objectives: what is optimised.
        store: stores the trials; knows those of earlier sessions.
        evaluator: evaluates candidates.
        limits: when to stop.
        seed: root of the random choices.
        on_progress: called after each block.
        feasibility: the constraints; None or an empty one if there are none.

    Returns:
        Why the search ended.

    Raises:
        EvaluationError: the store cannot be written, a worker process died, or the first candidates all failed.
    """
    state = _State(space, strategy, objectives, store, evaluator, limits, on_progress, feasibility or None)
    try:
        if len(initial) and len(store) < state.total:
            state.settle(state.history.fresh(initial))
        state.initial = len(state.history)
        step = 0
        while (reason := state.stop_reason() or state.enough()) is None:
            fresh = state.next_candidates(np.random.default_rng([seed, 1, step]))
            if len(fresh):
                state.settle(fresh)
            step += 1
        return reason
    except KeyboardInterrupt:
        return "interrupted"


class _State:
    """The state of the loop: the history, the front, and counters for the stop rules."""

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
        self.clock = limits.clock or time.perf_counter
        self.clocked = self.clock()
        forgets = not strategy.looks_back
        self.history = History(len(space.parameters), strategy.objectives, space, forgets=forgets)
        self.front, self.writer = Front(strategy.objectives), Writer(store, gathers=evaluator.isolated)
        self.before = len(store)
        self.failed = self.skipped = 0
        #: Candidates in a row that violate the constraints.
        self.infeasible = 0
        #: Proposals in a row that were all known.
        self.stalled = 0
        #: Number of candidates in the history before the strategy was asked.
        self.initial = 0

    def late(self) -> bool:
        """Whether the time is up."""
        return self.limits.timeout is not None and self.clock() - self.clocked >= self.limits.timeout

    def stop_reason(self) -> StopReason | None:
        """Why the search ends now; None if it goes on."""
        if max(len(self.store), len(self.history)) >= self.space.size:
            return "space exhausted"
        if len(self.store) >= self.total:
            return "n_trials reached"
        if self.late():
            return "timeout"
        if self.infeasible >= MAX_INFEASIBLE and self.strategy.looks_back:
            return "nothing feasible found"
        return None

    def enough(self) -> str | None:
        """Why the strategy ends the search; None if it does not. What is in the store is replayed to its end first, so
        that a search that was continued beyond this point keeps its trials."""
        replays = len(self.history) - self.skipped < len(self.store)
        if replays or not self.strategy.looks_back:
            return None
        why = self.strategy.enough(self.history, self.initial)
        return f"{ENOUGH}: {why}" if why else None

    def next_candidates(self, rng: np.random.Generator) -> Codes:
        """Unknown candidates: proposed by the strategy, or neighbours of the front if it proposes only known ones."""
        history, strategy = self.history, self.strategy
        # The budget must not affect what a strategy proposes. It cannot, for a strategy that does not look back.
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
        """Look candidates up in the store, evaluate the others, and tell the history of all, in the proposed order.

        Ends early when time is up.
        """
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
        """(which candidates need no evaluation; metric → their known values, NaN for the others)."""
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
        self.infeasible = 0 if len(inside) else self.infeasible + len(codes)
        return known, values

    def _evaluate(self, codes: Codes, known: NDArray[np.bool_], values: dict[str, Values]) -> None:
        """Evaluate unknown candidates until budget or time is used up; fills in `known` and `values`."""
        new = np.flatnonzero(~known)[: max(0, self.total - len(self.store))]
        place = 0
        for block, metrics in self.evaluator.blocks(codes[new]) if len(new) else ():
            rows = new[place : place + len(block)]
            place += len(block)
            self.writer.add(block, metrics)
            known[rows] = True
            fine = np.array([not e for e in metrics.errors]) if any(metrics.errors) else np.bool_(True)
            for name, column in values.items():
                # A failed candidate may have some metrics. The store has them, but a strategy must not see them.
                column[rows] = np.where(fine, metrics.values[name], np.nan)
            self.failed += sum(map(bool, metrics.errors)) if not fine.all() else 0
            if self.failed >= MAX_FAILURES and self.failed == len(self.store) + self.writer.waiting:
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
            self.history.tell(codes, losses, violation, self.feasibility.margins(values))
            self.front.add(np.where((violation > 0)[:, None], np.nan, losses))
        else:
            self.history.tell(codes, losses)
            self.front.add(losses)

    def _report(self) -> None:
        done, seconds = len(self.store) + self.writer.waiting, time.perf_counter() - self.began
        self.on_progress(Progress(done, self.total, done - self.before, self.failed, self.skipped, seconds, self.front))


class Writer:
    """Writes blocks into the store.

    Args:
        gathers: whether small blocks are written together, so that several processes do not wait for the disk. Without,
            each block is durable before the next one is evaluated, which may end the process.
    """

    def __init__(self, store: TrialSink, *, gathers: bool) -> None:
        self._store, self._gathers = store, gathers
        self._blocks: list[tuple[Codes, BatchMetrics]] = []
        self._written = time.perf_counter()

    @property
    def waiting(self) -> int:
        """Number of candidates that are not written yet."""
        return sum(len(codes) for codes, _ in self._blocks)

    def add(self, codes: Codes, measured: BatchMetrics) -> None:
        """Add a block. All blocks are written if the last write is at least ``COMMIT_SECONDS`` ago."""
        self._blocks.append((codes, measured))
        if not self._gathers or time.perf_counter() - self._written >= COMMIT_SECONDS:
            self.write()

    def write(self) -> None:
        """Write all blocks to the store. Raises EvaluationError if that fails."""
        blocks, self._blocks = self._blocks, []  # before writing, so that no interrupt makes it write them twice
        if blocks:
            self._store.add(
                np.concatenate([codes for codes, _ in blocks]),
                {m: np.concatenate([measured.values[m] for _, measured in blocks]) for m in self._store.metrics},
                [error for _, measured in blocks for error in measured.errors],
                np.concatenate([measured.seconds for _, measured in blocks]),
            )
        self._written = time.perf_counter()
