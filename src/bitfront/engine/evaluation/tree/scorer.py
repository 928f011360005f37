"""The tree evaluator: loss and accuracy of many candidates, with each shared value computed once.

``TreeScorer`` computes each state that a batch of candidates needs (``schedule.py``) once, depth first. Candidates and
samples are cut into pieces, so that the activations of a step stay within ``WorkLimits.bytes``. All states and all
weight options of a site go through one product if its sums are exact (``program.py``); convolutions of narrow operands
are computed in bytes. What is not exact is computed state by state, with the call, shapes and samples of the deployed
model. Either way each candidate gets the same bits as if it were evaluated alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfront.engine.evaluation.tree import activations as activations
from bitfront.engine.evaluation.tree.activations import Ints
from bitfront.engine.evaluation.tree.convolution import Convolutions
from bitfront.engine.evaluation.tree.execution import Pass, Scored
from bitfront.engine.evaluation.tree.products import Products
from bitfront.engine.evaluation.tree.program import Program
from bitfront.engine.evaluation.tree.schedule import Schedule
from bitfront.graph import Graph
from bitfront.spaces.base import Codes

#: Size of the largest activation of a chunk of samples: small enough for the cache, large enough that the cost of a
#: call does not matter.
ACTIVATION_BYTES = 4 << 20
#: Size of the activations that one step computes at a time: large enough that the cost of a call does not matter.
STEP_BYTES = 32 << 20
#: Less work than this, in seconds, is done by one thread. Python runs one thread at a time, so several would be slower.
THREAD_SECONDS = 0.1
#: For the estimate of the work: speed of a core with small matrices, and its time per value in a pass over memory.
OPERATIONS_PER_SECOND = 3e10
PASS_SECONDS = 1e-9


@dataclass(frozen=True)
class WorkLimits:
    """How work is cut, which decides its time and memory.

    Attributes:
        samples: number of samples that go through the graph together. Sums that are not exact depend on it in the
            last bits.
        bytes: size of the activations that one step may compute at a time, unless a single state needs more.
        threads: number of threads that share the work.
    """

    samples: int
    bytes: int
    threads: int

    @classmethod
    def fitting(cls, graph: Graph, threads: int, device: str = "cpu") -> WorkLimits:
        """Limits for a graph and a device.

        On a CPU the largest activation stays in the cache; on a GPU every kernel is large. On the CPU the number of
        samples depends on the graph alone.
        """
        largest = max([int(np.prod(s)) for n in graph.nodes for s in (*n.inputs, n.output)], default=1) * 4
        if device != "cpu":
            return cls(8192, 1 << 30, 1)
        samples = 1 << max(4, min(11, int(np.log2(max(1, ACTIVATION_BYTES // max(1, largest))))))
        return cls(samples, STEP_BYTES, threads)


class TreeScorer:
    """Scores batches of candidates."""

    def __init__(self, program: Program, limits: WorkLimits) -> None:
        self._products = Products(program)
        self._convolutions = Convolutions(program, self._products)
        self.program, self.limits = program, limits
        self._pool: ThreadPoolExecutor | None = None

    def scores(self, options: Codes, x: Tensor, y: Tensor) -> tuple[NDArray[np.float64], Ints]:
        """(sum of losses, number of correct answers) of each candidate, each of shape (candidates,).

        Args:
            options: shape (candidates, groups).
            x: samples, shape (samples, *features), on the program's device.
            y: labels, int32, shape (samples,).
        """
        schedule = Schedule(self.program, options)
        final = schedule.states[self.program.output]
        loss, correct = np.zeros(final.count), np.zeros(final.count, dtype=np.int64)
        chunks = list(zip(torch.split(x, self.limits.samples), torch.split(y, self.limits.samples), strict=True))
        threads = self._threads(schedule, len(y))
        # If threads share the samples, no work is done twice. If they share the candidates, some is.
        pieces = _even(len(schedule), 1 if len(chunks) >= threads else threads)
        tasks = [(xs, ys, piece) for xs, ys in chunks for piece in pieces]
        done = self._map(schedule, tasks, threads)
        for _ in chunks:
            # A state that two pieces need was computed by both. It counts once.
            piece_loss, piece_correct = np.zeros(final.count), np.zeros(final.count, dtype=np.int64)
            self.program.shelf.store.settle()
            for _ in pieces:
                for states, part_loss, part_correct in next(done):
                    piece_loss[states], piece_correct[states] = part_loss.cpu().numpy(), part_correct.cpu().numpy()
            loss += piece_loss
            correct += piece_correct
        at = np.empty(len(schedule), dtype=np.int64)
        at[schedule.order] = final.of
        return loss[at], correct[at]

    def _map(self, schedule: Schedule, tasks: Sequence[Any], threads: int) -> Iterator[list[Scored]]:
        if threads == 1 or len(tasks) == 1:
            yield from (self._task(schedule, *t) for t in tasks)
            return
        if self._pool is None:
            # The pool stays open, because a thread's first tensor operation takes milliseconds.
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="bitfront")
        yield from self._pool.map(lambda t: self._task(schedule, *t), tasks)

    def _threads(self, schedule: Schedule, samples: int) -> int:
        seconds = sum(
            states.count * samples * (step.operations / OPERATIONS_PER_SECOND + int(np.prod(step.shape)) * PASS_SECONDS)
            for step, states in zip(self.program.steps, schedule.states, strict=True)
        )
        return self.limits.threads if seconds > THREAD_SECONDS else 1

    def _task(self, schedule: Schedule, x: Tensor, y: Tensor, piece: tuple[int, int]) -> list[Scored]:
        limits = self.limits
        while True:
            try:
                with torch.inference_mode():
                    how = self.program, self._products, self._convolutions
                    return Pass(*how, schedule, limits.bytes, x, y).run(piece)
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                if limits.bytes > 4096:
                    limits = replace(limits, bytes=limits.bytes // 2)
                    continue
            # A single state does not fit into memory, so take fewer samples at a time.
            if len(y) == 1:
                raise MemoryError("one sample of one candidate does not fit into memory")
            half = len(y) // 2
            parts = [self._task(schedule, x[:half], y[:half], piece), self._task(schedule, x[half:], y[half:], piece)]
            return _added(parts)


def _added(parts: Sequence[list[Scored]]) -> list[Scored]:
    """The sum of the scores of several sets of samples, per state."""
    losses: dict[int, Tensor] = {}
    hits: dict[int, Tensor] = {}
    for scored in parts:
        scores = {int(s): (a, b) for states, loss, hit in scored for s, a, b in zip(states, loss, hit, strict=True)}
        for s, (a, b) in scores.items():
            losses[s] = losses[s] + a if s in losses else a
            hits[s] = hits[s] + b if s in hits else b
    return [(np.array(list(losses)), torch.stack(list(losses.values())), torch.stack(list(hits.values())))]


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _even(count: int, parts: int) -> list[tuple[int, int]]:
    """(start, stop) of `parts` ranges of about equal length."""
    edges = np.linspace(0, count, min(parts, count) + 1).astype(int).tolist()
    return list(itertools.pairwise(edges))
