"""The loop of a search: seeds → propose → drop what is known → evaluate in blocks → store → tell → stop rules.

It is deterministic: what is proposed depends on the seed and on what was told, in order. A search that was killed is
resumed by running the same loop again; whatever is in the store is answered from there, at no cost, until the loop
arrives where it was stopped.

Duplicates are the loop's business, never the sampler's: a candidate that is known is not evaluated again and does not
count; when a strategy only comes up with known ones, unseen neighbours of the front are taken instead; a space with
nothing unseen left ends the search. Budgets count distinct candidates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from bitfront.engine.evaluator import Evaluator
from bitfront.engine.front import Losses, non_dominated
from bitfront.engine.store import Store
from bitfront.errors import EvaluationError
from bitfront.spaces.base import Codes, Space
from bitfront.strategies.base import History, Strategy, unseen_neighbours

StopReason = Literal["space exhausted", "n_trials reached", "timeout", "interrupted"]
#: Known proposals in a row after which the loop takes neighbours of the front itself.
PATIENCE = 3
#: A search whose first so many candidates all fail is broken.
HOPELESS = 20


class Objectives(Protocol):
    """From metrics to what is minimised."""

    def losses(self, values: Mapping[str, NDArray[np.float64]]) -> Losses:
        """Shape (candidates, objectives); NaN in rows that failed."""
        ...


@dataclass(frozen=True)
class Progress:
    """Where the search is, for whoever shows it.

    Attributes:
        done: distinct candidates evaluated, earlier sessions included.
        total: how many there will be at most.
        new: how many of them in this session.
        failed: how many of these failed.
        seconds: since this session began.
    """

    done: int
    total: int
    new: int
    failed: int
    seconds: float
    history: History


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
    store: Store,
    evaluator: Evaluator,
    limits: Limits,
    seed: int,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> StopReason:
    """Search until a stop rule applies; every trial is in the store as soon as it is told.

    Raises:
        EvaluationError: the store cannot be written, a worker died, or nothing but failures comes out.
    """
    total = min(limits.n_trials, space.size)
    began = time.perf_counter()
    history = History(len(space.parameters), strategy.objectives)
    failed, before = 0, len(store)

    def late() -> bool:
        return limits.timeout is not None and time.perf_counter() - began >= limits.timeout

    def progress() -> Progress:
        return Progress(len(store), total, len(store) - before, failed, time.perf_counter() - began, history)

    def settle(codes: Codes) -> None:
        """Answer from the store or evaluate, then tell in the proposed order. Stops early when time is up."""
        nonlocal failed
        new = codes[~store.known(codes)][: max(0, total - len(store))]
        if len(new):
            for block, measured in evaluator.blocks(new):
                store.add(block, measured.values, measured.errors, measured.seconds)
                failed += sum(map(bool, measured.errors))
                if failed >= HOPELESS and failed == len(store):
                    raise EvaluationError(
                        f"the first {failed} candidates all failed; the last one with: {measured.errors[-1]}"
                    )
                on_progress(progress())
                if late():
                    break
        codes = codes[store.known(codes)]
        history.tell(codes, objectives.losses(store.values(codes)))
        on_progress(progress())

    try:
        step, stalled = 0, 0
        if len(seeds) and len(store) < total:
            settle(_fresh(seeds, history))
        while True:
            if len(store) >= space.size:
                return "space exhausted"
            if len(store) >= total:
                return "n_trials reached"
            if late():
                return "timeout"
            rng = np.random.default_rng([seed, 1, step])
            step += 1
            pending = np.zeros((0, len(space.parameters)), dtype=np.int64)
            wanted = min(strategy.batch, space.size - len(history))
            proposed = strategy.propose(history, pending, wanted, rng)
            fresh = _fresh(proposed, history)
            stalled = 0 if len(fresh) else stalled + max(1, len(proposed))
            if not len(fresh) and (stalled >= PATIENCE or not len(proposed)):
                front = non_dominated(history.losses)
                fresh = unseen_neighbours(space, history, front, wanted, rng)
                stalled = 0
            if len(fresh):
                settle(fresh)
    except KeyboardInterrupt:
        return "interrupted"


def _fresh(codes: Codes, history: History) -> Codes:
    """`codes` without those that are known and without repeats, in their order."""
    first = {c.tobytes(): i for i, c in reversed(list(enumerate(codes)))}
    return codes[sorted(i for key, i in first.items() if key not in history.known)]
