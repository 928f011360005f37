"""The dispatcher cuts candidates into blocks and has them evaluated, in this process or in several.

The size of a block depends on the clock. The metrics of a candidate do not depend on its block.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bitfront import interrupts
from bitfront.engine.evaluation.interface import BatchMetrics, Evaluator, joined
from bitfront.engine.evaluation.range_loss import RangeLosses, merged
from bitfront.engine.evaluation.workers import DEATHS, LETHAL, Workers, failed
from bitfront.engine.storage.inflight import InFlight, key_of
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
        seconds: how long one candidate may take. With it a worker process evaluates also where `n_jobs` is 1: only a
            process can be ended whatever it does.
        in_flight: what earlier sessions left, and where this one notes what it evaluates in this process.

    Attributes:
        lethal: key of a candidate → why it must not be evaluated: it ends its process, or takes too long.
        inexact, plain, losses, above_limit: as in ``BatchMetrics``, of all candidates so far.
    """

    def __init__(
        self, evaluator: Evaluator, n_jobs: int = 1, seconds: float | None = None, in_flight: InFlight | None = None
    ) -> None:
        self.evaluator, self.n_jobs, self.seconds = evaluator, n_jobs, seconds
        self.in_flight = in_flight or InFlight()
        self.lethal: dict[bytes, str] = {}
        self._tried: set[bytes] = set()
        self._pool: Workers | None = None
        self._sends_model, self._warned = True, False
        training = evaluator.job.training
        #: With halving, a block is a cohort, so that its size does not depend on the clock; 0 without halving.
        self._cohort = training.halving.cohort if training and training.halving else 0
        self._block = self._cohort or (TRAINED_BLOCK if training else FIRST_BLOCK if seconds is None else 1)
        #: The target time of a block: well below what one candidate may take.
        self._target = min(BLOCK_SECONDS, seconds / 4) if seconds else BLOCK_SECONDS
        self._least = TRAINED_BLOCK if training else 1
        self.inexact: dict[str, str] = {}
        self.plain = ""
        self.losses: RangeLosses = {}
        self.above_limit = 0

    @property
    def isolated(self) -> bool:
        """Whether candidates are evaluated in worker processes only: several, or with a time limit, or because some
        were found to end their process."""
        return self.n_jobs > 1 or self.seconds is not None or self._warned

    @property
    def remarks(self) -> list[str]:
        """What a user should know about how the candidates were evaluated, one text per remark."""
        remarks = []
        if self.plain:
            remarks.append(f"candidates were evaluated one by one as whole models, which is slow: {self.plain}")
        allowed = self.evaluator.job.weights.process
        if self.above_limit and allowed:
            remarks.append(
                f"memory_limit was exceeded: after some candidates, a process took {self.above_limit / 1e9:.2f} GB, of "
                f"which {allowed / 1e9:.2f} GB are allowed, although what was kept was forgotten. Results do not "
                "depend on it; with a smaller n_jobs, or fewer samples, less is taken"
            )
        if self.inexact:
            site, why = next(iter(self.inexact.items()))
            which = site if len(self.inexact) == 1 else f"{len(self.inexact)} sites, first {site}"
            remarks.append(
                f"not every sum is one of whole numbers ({which}: {why}). Such sums are taken in float64, in one "
                "order, as in the deployed model; a runtime that sums in another order may give other last digits"
            )
        return remarks

    def __enter__(self) -> Dispatcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self.in_flight.forget([key for key in self.in_flight.suspects if key not in self.lethal])
        self.in_flight.close()

    def blocks(self, codes: Codes) -> Iterator[tuple[Codes, BatchMetrics]]:
        """Evaluate `codes` block by block, in order. When the caller stops iterating, no further block is evaluated.

        Args:
            codes: candidates, int64, shape (candidates, parameters).

        Yields:
            (codes of the block, its metrics).

        Raises:
            EvaluationError: worker processes cannot be started.
            UserError: worker processes are needed, and the model cannot be pickled.
        """
        try:
            yield from self._blocks(codes)
        finally:
            self.in_flight.end()

    def _blocks(self, codes: Codes) -> Iterator[tuple[Codes, BatchMetrics]]:
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
                self.above_limit = max(self.above_limit, metrics.above_limit)
                yield part, metrics
            seconds = time.perf_counter() - begin
            start += sum(map(len, parts))
            if self._cohort:
                continue
            if seconds < self._target and len(parts) == self.n_jobs:
                # Larger blocks share more work, so a block that took very little time grows by more than a factor of 2.
                factor = 8 if seconds < self._target / 16 else 2
                self._block = min(LARGEST_BLOCK, self._block * factor)
            elif seconds > 2 * self._target:
                self._block = max(self._least, self._block // 2)

    def _map(self, parts: Sequence[Codes]) -> Iterator[BatchMetrics]:
        """The metrics of each part, in order. Candidates that are known to be lethal are not evaluated."""
        if not self.lethal:
            yield from map(self._noted, parts, self._evaluated(parts))
            return
        allowed = [np.array([key_of(code) not in self.lethal for code in part], dtype=bool) for part in parts]
        if all(rows.all() for rows in allowed):
            yield from map(self._noted, parts, self._evaluated(parts))
            return
        evaluated = self._evaluated([part[rows] for part, rows in zip(parts, allowed, strict=True) if rows.any()])
        for part, rows in zip(parts, allowed, strict=True):
            texts = [self.lethal[key_of(code)] for code in part[~rows]]
            pieces = [(np.flatnonzero(~rows), failed(self.evaluator.metrics, texts))]
            if rows.any():
                pieces.append((np.flatnonzero(rows), self._noted(part[rows], next(evaluated))))
            yield _merged(pieces)

    def _evaluated(self, parts: Sequence[Codes]) -> Iterator[BatchMetrics]:
        if self.isolated:
            return self._workers().evaluate(parts, apart=bool(self._cohort))
        return map(self._here, parts)

    def _noted(self, codes: Codes, metrics: BatchMetrics) -> BatchMetrics:
        """The same, after noting which candidates turned out to be lethal."""
        if not any(metrics.errors):
            return metrics
        errors = {key_of(codes[row]): text for row, text in enumerate(metrics.errors) if text.startswith(LETHAL)}
        if errors:
            self.lethal.update(errors)
            for key in errors:
                self.in_flight.suspects.setdefault(key, 0)
            self.in_flight.save()
        return metrics

    def _here(self, part: Codes) -> BatchMetrics:
        """Evaluate in this process, but suspects in another one."""
        suspect = np.zeros(len(part), dtype=bool)
        if self.in_flight.suspects:
            suspect[:] = [key_of(code) in self.in_flight.suspects for code in part]
        if not suspect.any():
            self.in_flight.begin(part)
            metrics = self.evaluator.evaluate(part)
            interrupts.check()
            return metrics
        if self._cohort or suspect.all():
            return self._alone(part)
        rows = np.flatnonzero(suspect), np.flatnonzero(~suspect)
        return _merged([(rows[0], self._alone(part[rows[0]])), (rows[1], self._here(part[rows[1]]))])

    def _alone(self, part: Codes) -> BatchMetrics:
        """Evaluate in worker processes; where there can be none, one by one in this process."""
        if self._sends_model:
            return next(self._workers().evaluate([part], apart=bool(self._cohort)))
        pieces = []
        for row in range(len(part)):
            code = part[row : row + 1]
            self.in_flight.begin(code)
            pieces.append(self.evaluator.evaluate(code))
            interrupts.check()
        return joined(pieces)

    def safe(self, codes: Codes) -> NDArray[np.bool_]:
        """Which of some candidates may be evaluated in this process before the search: shape (candidates,).

        With worker processes that is tried out in one of them, unless candidates are trained and nothing limits their
        time. Without, the candidates are noted to be in flight.
        """
        if self.isolated and (self.seconds is not None or self.evaluator.job.training is None):
            unknown = np.array([key_of(code) not in self._tried for code in codes], dtype=bool)
            self._try_out(codes[unknown])
        else:
            self.in_flight.begin(codes)
        return np.array([key_of(code) not in self.lethal for code in codes], dtype=bool)

    def try_suspects(self) -> None:
        """Find out which suspects end the process that evaluates them. To be called before anything is evaluated."""
        suspects = self.in_flight.suspects
        if not suspects:
            return
        parameters = len(self.evaluator.space.parameters)
        codes = np.array([np.frombuffer(key, dtype=np.int64) for key in suspects], dtype=np.int64)
        codes = codes.reshape(len(suspects), parameters)
        try:
            self._workers().start()
            self._try_out(codes)
            self._warned = bool(self.lethal)  # where there is one there may be others
        except (UserError, EvaluationError):  # it cannot be sent to another process, or none can be started
            self.close()
            self._sends_model = False
            for key in [key for key, deaths in suspects.items() if deaths >= DEATHS]:
                self.lethal[key] = f"{LETHAL} it ended itself, {suspects[key]} times"

    def _try_out(self, codes: Codes) -> None:
        if len(codes):
            self._noted(codes, next(self._workers().evaluate([codes])))
            self._tried.update(map(key_of, codes))

    def verify_workers(self, codes: Codes) -> str:
        """Compare worker processes with this process. Where they differ, this process evaluates from now on.

        Args:
            codes: candidates that may be evaluated in this process, a few.

        Returns:
            A note for the user; empty if nothing differs, or if candidates are trained, or if there are no workers.

        Raises:
            EvaluationError: they differ, and only workers can keep the time limit of a candidate.
        """
        if not self.isolated or self.evaluator.job.training is not None or not len(codes):
            return ""
        there, here = next(self._workers().evaluate([codes])), self.evaluator.evaluate(codes)
        both = np.array([not a and not b for a, b in zip(there.errors, here.errors, strict=True)], dtype=bool)
        names = [m.name for m in self.evaluator.job.task.all_metrics if m.name in here.values]
        different = [m for m in names if not np.array_equal(there.values[m][both], here.values[m][both])]
        if not different:
            return ""
        text = f"worker processes measure another {different[0]} than this process"
        if self.n_jobs == 1:
            raise EvaluationError(f"{text}; leave candidate_timeout out, then this process evaluates all candidates")
        self.close()
        self.n_jobs = 1
        return f"{text}; this process evaluates all candidates, which is slower"

    def use(self, evaluator: Evaluator) -> None:
        """From now on evaluate with another evaluator of the same candidates."""
        if evaluator is not self.evaluator:
            self.close()
            self.evaluator = evaluator

    def _workers(self) -> Workers:
        if self._pool is None:
            self._pool = Workers(self.evaluator.job, self.n_jobs, self.seconds, self.evaluator.metrics)
        return self._pool

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def _merged(pieces: Sequence[tuple[NDArray[np.int64], BatchMetrics]]) -> BatchMetrics:
    """The metrics of rows that were evaluated in several pieces, in the order of the rows."""
    whole = joined([metrics for _, metrics in pieces])
    back = np.argsort(np.concatenate([rows for rows, _ in pieces]))
    return replace(
        whole,
        values={m: v[back] for m, v in whole.values.items()},
        errors=tuple(whole.errors[i] for i in back),
        seconds=tuple(whole.seconds[i] for i in back),
    )
