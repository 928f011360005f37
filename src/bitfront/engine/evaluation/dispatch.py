"""The dispatcher cuts candidates into blocks and has them evaluated, in this process or by workers.

The size of a block depends on the clock. The metrics of a candidate do not depend on its block.
"""

from __future__ import annotations

import math
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitfront import interrupts
from bitfront.engine.evaluation.interface import BatchMetrics, Evaluator, joined
from bitfront.engine.evaluation.members import MembersElsewhere
from bitfront.engine.evaluation.range_loss import RangeLosses, merged
from bitfront.engine.evaluation.workers import LETHAL, Workers, failed
from bitfront.engine.evaluation.workers import merged as in_order
from bitfront.engine.storage.inflight import InFlight, key_of
from bitfront.errors import EvaluationError, UserError
from bitfront.executors.base import Launcher, LauncherSettings
from bitfront.executors.crew import DEATHS, Status
from bitfront.executors.processes import Processes
from bitfront.spaces.base import Codes

#: The target time of a block: short enough for the progress bar, the timeout and the store, and long enough that their
#: work is a small part of it.
BLOCK_SECONDS = 0.25
#: Blocks per second of all workers together that this process can hand out without being what they wait for.
BLOCKS_PER_SECOND = 200.0
#: Number of candidates in the first block.
FIRST_BLOCK = 16
#: The same for candidates that are trained. A few together are trained much faster than each alone.
TRAINED_BLOCK = 8
#: Largest number of candidates in a block.
LARGEST_BLOCK = 1 << 16


class Dispatcher:
    """Evaluates blocks of candidates, in this process or in `n_jobs` workers; results come in order.

    A context manager: leaving it ends the workers.

    Args:
        evaluator: evaluates the blocks. Each worker builds an evaluator from its job.
        n_jobs: number of workers, 1 or more.
        seconds: how long one candidate may take. With it a worker process evaluates also where `n_jobs` is 1: only a
            process can be ended whatever it does.
        in_flight: what earlier sessions left, and where this one notes what it evaluates in this process.
        launcher: starts the workers, and evaluates also where `n_jobs` is 1; None: worker processes by need.
        folder: where what workers need is written, and what they note, for a while; None: it travels to each.
        heard: called with how the workers stand.

    Attributes:
        lethal: key of a candidate → why it must not be evaluated: it ends its process, or takes too long.
        inexact, plain, losses, above_limit: as in ``BatchMetrics``, of all candidates so far.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        n_jobs: int = 1,
        seconds: float | None = None,
        in_flight: InFlight | None = None,
        launcher: Launcher | None = None,
        folder: Path | None = None,
        heard: Callable[[Status], None] = lambda _: None,
    ) -> None:
        self.evaluator, self.n_jobs, self.seconds = evaluator, n_jobs, seconds
        self.launcher, self._folder, self._heard = launcher, folder, heard
        self.in_flight = in_flight or InFlight()
        self.lethal: dict[bytes, str] = {}
        self._members: MembersElsewhere | None = None
        self._tried: set[bytes] = set()
        self._pool: Workers | None = None
        self._sends_model, self._warned = True, False
        training = evaluator.job.training
        #: With halving, a block is a cohort, so that its size does not depend on the clock; 0 without halving.
        self._cohort = training.halving.cohort if training and training.halving else 0
        self._block = self._cohort or (TRAINED_BLOCK if training else FIRST_BLOCK if seconds is None else 1)
        #: The target time of a block: well below what one candidate may take.
        self._target = max(BLOCK_SECONDS, n_jobs / BLOCKS_PER_SECOND)
        self._target = min(self._target, seconds / 4) if seconds else self._target
        self._least = TRAINED_BLOCK if training else 1
        self.inexact: dict[str, str] = {}
        self.plain = ""
        self.losses: RangeLosses = {}
        self.above_limit = 0

    @property
    def isolated(self) -> bool:
        """Whether candidates are evaluated by workers only: several, or those of an executor, or with a time limit, or
        because some were found to end their process."""
        if self.evaluator.job.learning is not None:
            return False  # these networks come out of one training; its members are trained by workers
        return self.launcher is not None or self.n_jobs > 1 or self.seconds is not None or self._warned

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
        taken: deque[Codes] = deque()

        def parts() -> Iterator[Codes]:
            start = 0
            while start < len(codes):
                part = codes[start : start + self._size(len(codes) - start)]
                taken.append(part)
                start += len(part)
                yield part

        for metrics in self._map(parts()):
            part = taken.popleft()
            self.inexact.update(metrics.inexact)
            self.plain = self.plain or metrics.plain
            self.losses = merged([self.losses, metrics.losses])
            self.above_limit = max(self.above_limit, metrics.above_limit)
            self._pace(len(part), sum(metrics.seconds))
            yield part, metrics

    def _size(self, left: int) -> int:
        """How many of the last `left` candidates the next block has. At the end all workers have something to do."""
        if self._cohort:
            return self._cohort
        if not self.isolated:
            return self._block
        # The last ones are smaller, so that all workers end at about the same time. Of networks that are trained
        # together each takes much less than one alone, so that their blocks stay.
        return max(min(self._least, self._block), min(self._block, math.ceil(left / (2 * self._workers().capacity))))

    def expect(self, seconds: float) -> None:
        """Begin with blocks for candidates that take so many seconds on one worker."""
        if self.isolated and not self._cohort and seconds > 0:
            self._block = max(min(self._least, self._block), min(self._block, int(self._target / seconds)))

    def _pace(self, count: int, seconds: float) -> None:
        """Choose the size of the next blocks, after one of `count` candidates."""
        if self._cohort:
            return
        # Larger blocks share more work, so a block that took very little time grows by more than a factor of 2. Only a
        # block of the present size tells something.
        if seconds < self._target and count == self._block:
            self._block = min(LARGEST_BLOCK, self._block * (8 if seconds < self._target / 16 else 2))
        elif seconds > 2 * self._target and count <= self._block:
            self._block = max(self._least, min(self._block, count) // 2)

    def _map(self, parts: Iterator[Codes]) -> Iterator[BatchMetrics]:
        """The metrics of each part, in order. Candidates that are known to be lethal are not evaluated."""
        if not self.isolated:
            yield from map(self._allowed_here, parts)
            return
        asked: deque[tuple[Codes, NDArray[np.bool_]]] = deque()

        def allowed() -> Iterator[Codes]:
            for part in parts:
                rows = self._not_lethal(part)
                asked.append((part, rows))
                if rows.any():
                    yield part[rows]

        def without_any() -> Iterator[BatchMetrics]:
            while asked and not asked[0][1].any():
                yield self._with_lethal(*asked.popleft(), None)

        for metrics in self._workers().evaluate(allowed(), apart=bool(self._cohort)):
            yield from without_any()
            yield self._with_lethal(*asked.popleft(), metrics)
        yield from without_any()

    def _with_lethal(self, part: Codes, rows: NDArray[np.bool_], metrics: BatchMetrics | None) -> BatchMetrics:
        """The metrics of a part of which the candidates at `rows` were evaluated, and no other one."""
        if metrics is not None:
            metrics = self._noted(part[rows], metrics)
            if rows.all():
                return metrics
        texts = [self.lethal[key_of(code)] for code in part[~rows]]
        pieces = [(np.flatnonzero(~rows), failed(self.evaluator.metrics, texts))]
        return in_order([*pieces, *([] if metrics is None else [(np.flatnonzero(rows), metrics)])])

    def _not_lethal(self, codes: Codes) -> NDArray[np.bool_]:
        if not self.lethal:
            return np.ones(len(codes), dtype=bool)
        return np.array([key_of(code) not in self.lethal for code in codes], dtype=bool)

    def _allowed_here(self, part: Codes) -> BatchMetrics:
        rows = self._not_lethal(part)
        return self._with_lethal(part, rows, self._here(part[rows]) if rows.any() else None)

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
        return in_order([(rows[0], self._alone(part[rows[0]])), (rows[1], self._here(part[rows[1]]))])

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
        return self._not_lethal(codes)

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
                self.lethal[key] = f"{LETHAL} it ended its worker, {suspects[key]} times"

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
        if self.launcher is not None:
            raise EvaluationError(
                f"{self.launcher.title}: its workers measure another {different[0]} than this process; their results "
                "would not be those of the deployed model. Evaluate without an executor, or on machines like this one"
            )
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

    def elsewhere(self) -> MembersElsewhere | None:
        """What has the members of a training with learned bits trained by workers; None: this process trains them."""
        if self.launcher is None:
            return None
        job, folder = self.evaluator.job, self._folder
        self._members = MembersElsewhere(job, self.launcher, self.n_jobs, folder, self._heard)
        return self._members

    def _workers(self) -> Workers:
        if self._pool is None:
            launcher = self.launcher or Processes(LauncherSettings())
            self._pool = Workers(
                self.evaluator.job,
                launcher,
                self.n_jobs,
                self.seconds,
                self.evaluator.metrics,
                self._folder,
                self._heard,
            )
        return self._pool

    def close(self) -> None:
        """End the workers, and delete what was written for them."""
        if self._members is not None:
            self._members.close()
            self._members = None
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
