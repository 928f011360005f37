"""The dispatcher cuts candidates into blocks and has them evaluated, in this process or in several.

The size of a block depends on the clock. The metrics of a candidate do not depend on its block.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context, parent_process

import numpy as np

from bitfront.engine.evaluation.fixed import described
from bitfront.engine.evaluation.interface import BatchMetrics, EvaluationJob, Evaluator
from bitfront.engine.evaluation.range_loss import RangeLosses, merged
from bitfront.engine.evaluation.trained import open_evaluator
from bitfront.errors import EvaluationError, UserError
from bitfront.spaces.base import Codes

#: The target time of a block: short enough for the progress bar, the timeout and the store, and long enough that their
#: work is a small part of it.
BLOCK_SECONDS = 0.25
#: Number of candidates in the first block.
FIRST_BLOCK = 16
#: The same for candidates that are trained. A few together are trained much faster than each alone.
TRAINED_BLOCK = 8
#: Largest number of candidates in a block.
LARGEST_BLOCK = 1 << 16


class Dispatcher:
    """Evaluates blocks of candidates, in this process or in `n_jobs` worker processes; results come in order.

    A context manager: leaving it ends the workers.

    Args:
        evaluator: evaluates the blocks. With several processes each of them builds an evaluator from its job.
        n_jobs: number of processes, 1 or more.

    Attributes:
        inexact, plain, losses: as in ``BatchMetrics``, of all candidates so far.
    """

    def __init__(self, evaluator: Evaluator, n_jobs: int = 1) -> None:
        self.evaluator, self.n_jobs = evaluator, n_jobs
        self._pool: Executor | None = None
        training = evaluator.job.training
        #: With halving, a block is a cohort, so that its size does not depend on the clock; 0 without halving.
        self._cohort = training.halving.cohort if training and training.halving else 0
        self._block = self._cohort or (TRAINED_BLOCK if training else FIRST_BLOCK)
        self._least = TRAINED_BLOCK if training else 1
        self.inexact: dict[str, str] = {}
        self.plain = ""
        self.losses: RangeLosses = {}

    @property
    def remarks(self) -> list[str]:
        """What a user should know about how the candidates were evaluated, one text per remark."""
        remarks = []
        if self.plain:
            remarks.append(f"candidates were evaluated one by one as whole models, which is slow: {self.plain}")
        if self.inexact:
            site, why = next(iter(self.inexact.items()))
            which = site if len(self.inexact) == 1 else f"{len(self.inexact)} sites, first {site}"
            remarks.append(
                f"not every sum is exact in float32 ({which}: {why}). Such sums were computed one by one, as in the "
                "deployed model; on other machines the last digits may differ"
            )
        return remarks

    def __enter__(self) -> Dispatcher:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def blocks(self, codes: Codes) -> Iterator[tuple[Codes, BatchMetrics]]:
        """Evaluate `codes` block by block, in order. When the caller stops iterating, no further block is evaluated.

        Args:
            codes: candidates, int64, shape (candidates, parameters).

        Yields:
            (codes of the block, its metrics).

        Raises:
            EvaluationError: a worker process died.
            UserError: several processes were asked for, and the model cannot be pickled.
        """
        start = 0
        while start < len(codes):
            ahead = codes[start : start + self._block * self.n_jobs]
            if self._cohort:
                parts = [ahead[i : i + self._cohort] for i in range(0, len(ahead), self._cohort)]
            else:
                parts = [p for p in np.array_split(ahead, self.n_jobs) if len(p)]
            begin = time.perf_counter()
            for part, metrics in zip(parts, self._map(parts), strict=True):
                self.inexact.update(metrics.inexact)
                self.plain = self.plain or metrics.plain
                self.losses = merged([self.losses, metrics.losses])
                yield part, metrics
            seconds = time.perf_counter() - begin
            start += sum(map(len, parts))
            if self._cohort:
                continue
            if seconds < BLOCK_SECONDS and len(parts) == self.n_jobs:
                # Larger blocks share more work, so a block that took very little time grows by more than a factor of 2.
                factor = 8 if seconds < BLOCK_SECONDS / 16 else 2
                self._block = min(LARGEST_BLOCK, self._block * factor)
            elif seconds > 2 * BLOCK_SECONDS:
                self._block = max(self._least, self._block // 2)

    def _map(self, parts: Sequence[Codes]) -> Iterator[BatchMetrics]:
        if self.n_jobs == 1:
            yield from (self.evaluator.evaluate(p) for p in parts)
            return
        if self._pool is None:
            self._pool = _start_pool(self.evaluator.job, self.n_jobs)
        try:
            yield from self._pool.map(_evaluate_in_worker, parts)
        except BrokenProcessPool:
            raise EvaluationError(
                "a worker process died (out of memory?). All trials so far are stored; give the same command again, "
                "with a smaller n_jobs"
            ) from None


_EVALUATOR: list[Evaluator] = []


def _start_pool(job: EvaluationJob, n_jobs: int) -> Executor:
    import pickle

    try:
        # Each worker computes on one thread, as there are several of them.
        payload = pickle.dumps(replace(job, threads=1))
    except Exception as error:
        raise UserError(
            f"n_jobs = {n_jobs} needs a model that can be sent to other processes, and this one cannot be pickled "
            f"({described(error)}). Define its class and its hooks at the top level of a module, or use n_jobs = 1"
        ) from None
    # spawn, not fork: a forked child would inherit torch's threads in an undefined state.
    return ProcessPoolExecutor(n_jobs, mp_context=get_context("spawn"), initializer=_init_worker, initargs=(payload,))


def _init_worker(payload: bytes) -> None:
    import pickle
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The bytes come from the parent process, so that unpickling them is safe.
    _EVALUATOR[:] = [open_evaluator(pickle.loads(payload))]  # noqa: S301


def _end_with_parent() -> None:
    """End this worker when its parent has ended. A killed parent cannot do that, and the worker would wait forever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _evaluate_in_worker(codes: Codes) -> BatchMetrics:
    return _EVALUATOR[0].evaluate(codes)
