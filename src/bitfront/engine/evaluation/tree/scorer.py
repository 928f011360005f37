"""Many candidates through one graph, sharing whatever they share.

``TreeScorer`` computes every state that a batch of candidates needs (``schedule.py``) once: depth first, cutting
candidates and samples so that what is held at a time stays within ``WorkLimits.bytes``. All states and all weight
options of a site go through one product, wherever its sums are exact (``program.py``); convolutions of narrow operands
go through it as bytes. What is not exact is computed alone, with the call, shapes and samples of the deployed model.
Either way each candidate gets, to the last bit, the numbers that it gets alone.
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
from bitfront.engine.evaluation.tree.execution import Pass, Scored
from bitfront.engine.evaluation.tree.program import Program
from bitfront.engine.evaluation.tree.schedule import Schedule
from bitfront.graph import Graph
from bitfront.spaces.base import Codes

#: The largest activation of the samples that go through together: small enough for a cache, large enough for a call.
ACTIVATION_BYTES = 4 << 20
#: Activations that one step makes at a time: enough that calling it costs little beside them.
STACK_BYTES = 32 << 20
#: Less work than this is done by one thread: threads take turns at running Python, and lose more than they save.
THREAD_SECONDS = 0.1
#: What a core does with small matrices, and with one value in a pass over memory, for the estimate of the work.
OPERATIONS_PER_SECOND = 3e10
PASS_SECONDS = 1e-9


@dataclass(frozen=True)
class WorkLimits:
    """How work is cut. It decides about time and memory.

    Attributes:
        samples: how many go through the graph together. What is not exact depends on it in the last bits.
        bytes: activations that one step may make at a time, unless a single state needs more.
        threads: how many share the work.
    """

    samples: int
    bytes: int
    threads: int

    @classmethod
    def fitting(cls, graph: Graph, threads: int, device: str = "cpu") -> WorkLimits:
        """So that on a CPU the largest activation, and a few states of it, stay in the cache; on a GPU so that every
        kernel is large. The number of samples depends on the graph alone."""
        largest = max([int(np.prod(s)) for n in graph.nodes for s in (*n.inputs, n.output)], default=1) * 4
        if device != "cpu":
            return cls(8192, 1 << 30, 1)
        samples = 1 << max(4, min(11, int(np.log2(max(1, ACTIVATION_BYTES // max(1, largest))))))
        return cls(samples, STACK_BYTES, threads)


class TreeScorer:
    """Scores batches of candidates."""

    def __init__(self, program: Program, limits: WorkLimits) -> None:
        self.program, self.limits = program, limits
        self._pool: ThreadPoolExecutor | None = None

    def scores(self, options: Codes, x: Tensor, y: Tensor) -> tuple[NDArray[np.float64], Ints]:
        """Sum of losses, and number of right answers, of each candidate.

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
        # Threads that share out samples lose nothing; those that share out candidates do some of the work twice.
        pieces = _even(len(schedule), 1 if len(chunks) >= threads else threads)
        tasks = [(xs, ys, piece) for xs, ys in chunks for piece in pieces]
        done = self._map(schedule, tasks, threads)
        for _ in chunks:
            # A state that two pieces need was computed by both, and counts once.
            piece_loss, piece_correct = np.zeros(final.count), np.zeros(final.count, dtype=np.int64)
            for _ in pieces:
                for have, part_loss, part_correct in next(done):
                    piece_loss[have], piece_correct[have] = part_loss.cpu().numpy(), part_correct.cpu().numpy()
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
            # Kept: a thread's first tensor operation costs milliseconds.
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
                    return Pass(self.program, schedule, limits.bytes, x, y).run(piece)
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                if limits.bytes > 4096:
                    limits = replace(limits, bytes=limits.bytes // 2)
                    continue
            # A single state does not fit: fewer samples at a time.
            if len(y) == 1:
                raise MemoryError("one sample of one candidate does not fit into memory")
            half = len(y) // 2
            parts = [self._task(schedule, x[:half], y[:half], piece), self._task(schedule, x[half:], y[half:], piece)]
            return _added(parts)


def _added(parts: Sequence[list[Scored]]) -> list[Scored]:
    """The scores of several sets of samples as those of all of them."""
    losses: dict[int, Tensor] = {}
    hits: dict[int, Tensor] = {}
    for scored in parts:
        scores = {int(h): (a, b) for have, loss, right in scored for h, a, b in zip(have, loss, right, strict=True)}
        for h, (a, b) in scores.items():
            losses[h] = losses[h] + a if h in losses else a
            hits[h] = hits[h] + b if h in hits else b
    return [(np.array(list(losses)), torch.stack(list(losses.values())), torch.stack(list(hits.values())))]


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _even(count: int, parts: int) -> list[tuple[int, int]]:
    edges = np.linspace(0, count, min(parts, count) + 1).astype(int).tolist()
    return list(itertools.pairwise(edges))
