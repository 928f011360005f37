"""The tree evaluator: loss and metrics of many candidates, with each shared value computed once.

``TreeScorer`` computes each state that a batch of candidates needs (``schedule.py``) once, depth first. Candidates and
samples are cut into pieces, so that the activations of a step stay within ``WorkLimits.bytes``. All states and all
weight options of a site go through one product if its sums are exact (``program.py``); convolutions of narrow operands
are computed in bytes. What is not exact is computed state by state, with the call, shapes and samples of the deployed
model. Either way each candidate gets the same bits as if it were evaluated alone. What is made of the outputs
depends on the task (``ending.py``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfront.engine.evaluation.tree.activations import Ints
from bitfront.engine.evaluation.tree.convolution import Convolutions
from bitfront.engine.evaluation.tree.ending import CompiledScores, Ending, PerSample, output_itself
from bitfront.engine.evaluation.tree.execution import Pass
from bitfront.engine.evaluation.tree.products import Products
from bitfront.engine.evaluation.tree.program import Program
from bitfront.engine.evaluation.tree.schedule import Schedule, sorted_order
from bitfront.graph import Graph
from bitfront.scoring import TaskEvaluation, chunk_results, evaluation_of
from bitfront.spaces.base import Codes
from bitfront.tasks.base import Task, as_results

T = TypeVar("T")

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
#: The results per sample of a group of candidates may take so much memory. A first, small group says what they take.
RESULT_BYTES = 64 << 20
FIRST_GROUP = 16


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
        self._together = FIRST_GROUP

    def scores(self, options: Codes, x: Tensor, y: Tensor) -> tuple[NDArray[np.float64], Ints]:
        """(sum of losses, number of correct answers) of each candidate of a classification, of shape (candidates,).

        Args:
            options: shape (candidates, groups).
            x: samples, shape (samples, *features), on the program's device.
            y: labels, int32, shape (samples,).
        """
        schedule = Schedule(self.program, options)
        final = schedule.states[self.program.output]
        loss, correct = np.zeros(final.count), np.zeros(final.count, dtype=np.int64)
        for chunk in self._chunks(schedule, x, y, CompiledScores(self.program.graph.outputs)):
            # A state that two pieces need was computed by both. It counts once.
            piece_loss, piece_correct = np.zeros(final.count), np.zeros(final.count, dtype=np.int64)
            for states, part_loss, part_correct in chunk:
                piece_loss[states], piece_correct[states] = part_loss.cpu().numpy(), part_correct.cpu().numpy()
            loss += piece_loss
            correct += piece_correct
        at = schedule.final_states
        return loss[at], correct[at]

    def evaluations(self, options: Codes, x: Tensor, y: Tensor, task: Task) -> list[TaskEvaluation]:
        """The loss and the metrics of each candidate, for any task but a classification.

        A metric needs the results of all samples, so candidates are cut into groups, by the memory that these take.

        Args:
            options, x: as for ``scores``.
            y: targets of the task, one per sample.
            task: of the samples.

        Raises:
            EvaluationError: the outputs do not fit the targets.
        """
        order = sorted_order(options)
        evaluations: list[TaskEvaluation | None] = [None] * len(options)
        start = 0
        while start < len(order):
            group = order[start : start + self._together]
            for i, evaluation in zip(group.tolist(), self._measured(options[group], x, y, task), strict=True):
                evaluations[i] = evaluation
            start += len(group)
        return [evaluation for evaluation in evaluations if evaluation is not None]

    def outputs(self, options: Codes, x: Tensor) -> Tensor:
        """The outputs of each candidate, float32, shape (candidates, samples, ...).

        Args:
            options, x: as for ``scores``.

        Raises:
            TypeError: the model does not return one tensor.
        """
        schedule = Schedule(self.program, options)
        parts = self._per_sample(schedule, x, torch.zeros(len(x), dtype=torch.int32), PerSample(output_itself))
        of_states = [torch.cat([rows["output"] for rows in of_state]) for of_state in parts]
        return torch.stack([of_states[state] for state in schedule.final_states.tolist()])

    def _measured(self, options: Codes, x: Tensor, y: Tensor, task: Task) -> list[TaskEvaluation]:
        schedule = Schedule(self.program, options)
        results = PerSample(lambda output, targets: chunk_results(task, output, targets, self.program.graph.outputs))
        parts = self._per_sample(schedule, x, y, results)
        size = sum(t.numel() * t.element_size() for rows in parts[0] for t in rows.values())
        self._together = max(1, RESULT_BYTES // max(1, size))
        evaluations = [evaluation_of(task, as_results(part)) for part in parts]
        return [evaluations[state] for state in schedule.final_states.tolist()]

    def _per_sample(
        self, schedule: Schedule, x: Tensor, y: Tensor, ending: PerSample
    ) -> list[list[Mapping[str, Tensor]]]:
        """Per final state what the ending makes of it, chunk by chunk."""
        parts: list[list[Mapping[str, Tensor]]] = [[] for _ in range(schedule.states[self.program.output].count)]
        for chunk in self._chunks(schedule, x, y, ending):
            # A state that two pieces need was computed by both.
            for state, rows in {state: rows for piece in chunk for state, rows in piece.items()}.items():
                parts[state].append(rows)
        return parts

    def _chunks(self, schedule: Schedule, x: Tensor, y: Tensor, ending: Ending[T]) -> Iterator[list[T]]:
        """What the ending makes of all final states, for one chunk of samples after the other. A state may be in
        several of the list, with the same results."""
        chunks = list(zip(torch.split(x, self.limits.samples), torch.split(y, self.limits.samples), strict=True))
        threads = self._threads(schedule, len(y))
        # If threads share the samples, no work is done twice. If they share the candidates, some is.
        pieces = _even(len(schedule), 1 if len(chunks) >= threads else threads)
        tasks = [(xs, ys, piece) for xs, ys in chunks for piece in pieces]
        done = self._map(schedule, tasks, threads, ending)
        for _ in chunks:
            self.program.shelf.store.settle()
            yield [part for _ in pieces for part in next(done)]

    def _map(self, schedule: Schedule, tasks: Sequence[Any], threads: int, ending: Ending[T]) -> Iterator[list[T]]:
        if threads == 1 or len(tasks) == 1:
            yield from (self._task(schedule, ending, *t) for t in tasks)
            return
        if self._pool is None:
            # The pool stays open, because a thread's first tensor operation takes milliseconds.
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="bitfront")
        yield from self._pool.map(lambda t: self._task(schedule, ending, *t), tasks)

    def _threads(self, schedule: Schedule, samples: int) -> int:
        seconds = sum(
            states.count * samples * (step.operations / OPERATIONS_PER_SECOND + int(np.prod(step.shape)) * PASS_SECONDS)
            for step, states in zip(self.program.steps, schedule.states, strict=True)
        )
        return self.limits.threads if seconds > THREAD_SECONDS else 1

    def _task(self, schedule: Schedule, ending: Ending[T], x: Tensor, y: Tensor, piece: tuple[int, int]) -> list[T]:
        limits = self.limits
        while True:
            try:
                with torch.inference_mode():
                    how = self.program, self._products, self._convolutions
                    return Pass(*how, schedule, limits.bytes, x, y, ending.of).run(piece)
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
            sets = (x[:half], y[:half]), (x[half:], y[half:])
            return ending.joined([self._task(schedule, ending, *samples, piece) for samples in sets])


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _even(count: int, parts: int) -> list[tuple[int, int]]:
    """(start, stop) of `parts` ranges of about equal length."""
    edges = np.linspace(0, count, min(parts, count) + 1).astype(int).tolist()
    return list(itertools.pairwise(edges))
