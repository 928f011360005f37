"""Candidates that are evaluated by workers, which a candidate may end: parts of them in, their metrics out in order.

A crew (``executors.crew``) hands the parts out. Each worker builds its own evaluator from the job, once. When a worker
dies, or is late and is ended, its part is cut into smaller ones, until the candidate is alone that is to blame. It has
failed, the others are evaluated again.

With successive halving, the results of a part depend on which candidates it has. So what comes out of a cut one only
says who ends workers; then the others of the part are evaluated again, together.
"""

from __future__ import annotations

import math
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.nn.modules import module as _modules
from torch.utils.hooks import RemovableHandle

from bitfront import interrupts
from bitfront.engine.evaluation.interface import BatchMetrics, EvaluationJob, Evaluator, joined
from bitfront.engine.evaluation.trained import open_evaluator
from bitfront.errors import EvaluationError, UserError, described
from bitfront.executors.base import Launcher
from bitfront.executors.crew import Crew, Done, Lost, Status, Work
from bitfront.executors.versions import worker_name
from bitfront.spaces.base import Codes

#: How the error of a candidate begins that ends its worker, or whose worker was ended.
LETHAL = "the process of this candidate was ended:"
#: Parts of at most so many candidates are cut into single ones.
FEW = 16
#: Seconds that a new worker has for what happens once, such as calibration, until it is known how long that takes.
WARMING = 5.0
#: The same where it never becomes known, because the executor does not say which call is the first of a worker.
UNKNOWN_WARMING = 60.0
#: Several candidates are cut if they take so many times as long as expected, and longer than so many seconds.
LATE, LEAST_SECONDS = 8.0, 1.0
#: So many parts may be ahead of the first one that is not done, per part that can be out.
AHEAD = 4


@dataclass(eq=False)
class _Part(Work):
    """Candidates for one worker: `codes` are those of the part number `part` at the places `rows`.

    Attributes:
        whole: whether results depend on all candidates of the part.
        probes: whether it is only evaluated to find out who ends workers.
        limited: gives the limit in seconds of a number of candidates.
        warms: gives the seconds that a worker may take longer for its first part.
    """

    part: int
    rows: NDArray[np.int64]
    codes: Codes
    limited: Callable[[int], float | None]
    warms: Callable[[], float]
    whole: bool = False
    probes: bool = False
    method: str = "evaluate"

    @property
    def argument(self) -> Codes:
        """The codes."""
        return self.codes

    def cut(self) -> Sequence[_Part]:
        """Single candidates, or some larger pieces if there are many."""
        count = len(self.codes)
        if count == 1 and not self.whole:
            return ()
        size = 1 if self.whole or count <= FEW else math.isqrt(count)
        return [
            replace(
                self,
                rows=self.rows[i : i + size],
                codes=self.codes[i : i + size],
                whole=False,
                probes=self.whole or self.probes,
            )
            for i in range(0, count, size)
        ]

    def limit(self) -> float | None:
        """Seconds that it may take; None: as long as it wants."""
        return self.limited(len(self.codes))

    def warming(self) -> float:
        """Seconds that the first part of a worker may take longer."""
        return self.warms()


@dataclass(eq=False)
class _Collected:
    """What is known of one part.

    Attributes:
        codes: its candidates.
        pieces: (rows, metrics) of those that are done.
        probed: how many were evaluated only to find out who ends workers.
    """

    codes: Codes
    pieces: list[tuple[NDArray[np.int64], BatchMetrics]] = field(default_factory=list)
    probed: int = 0

    @property
    def done(self) -> bool:
        """Whether all of its candidates are."""
        return sum(len(rows) for rows, _ in self.pieces) == len(self.codes)


@dataclass(eq=False)
class Workers:
    """Workers for one job.

    Attributes:
        job: what they evaluate. Each computes on one thread.
        launcher: starts them.
        number: how many there are at most.
        seconds: how long one candidate may take; None: as long as it wants.
        metrics: names of all metrics, for candidates that fail.
        folder: where the job is written, and workers note what they begin; None: nowhere.
        heard: called with how the workers stand, some times a second.
    """

    job: EvaluationJob
    launcher: Launcher
    number: int
    seconds: float | None
    metrics: Sequence[str]
    folder: Path | None = None
    heard: Callable[[Status], None] = lambda _: None
    #: Seconds per candidate, as of the last result; None before the first.
    _each: float | None = None
    _warming: float = WARMING

    def __post_init__(self) -> None:
        def content() -> bytes:
            return payload_of(self.job, self.launcher, self.number)

        self._crew = Crew(self.launcher, self.number, f"{__name__}:opened", content, self.folder, self.heard)

    @property
    def capacity(self) -> int:
        """How many parts can be out at a time."""
        return self._crew.capacity

    def evaluate(self, parts: Iterable[Codes], *, apart: bool = False) -> Iterator[BatchMetrics]:
        """The metrics of each part, in order. When the caller stops iterating, what is not finished is dropped.

        Args:
            parts: candidates, each of shape (candidates, parameters). The next one is taken when there is room for it.
            apart: whether results of a part depend on all of its candidates.

        Raises:
            EvaluationError: workers cannot be started.
            UserError: the job cannot be sent to another process; or a runner refuses to go on.
        """
        source, collected = enumerate(parts), dict[int, _Collected]()
        again: deque[_Part] = deque()
        following = 0

        def next_work() -> _Part | None:
            if again:
                return again.popleft()
            if collected and max(collected) - following >= AHEAD * self.capacity:
                return None
            number, codes = next(source, (0, None))
            if codes is None:
                return None
            collected[number] = _Collected(codes)
            return _Part(number, np.arange(len(codes)), codes, self._limit, self._warms, whole=apart)

        for outcome in self._crew.outcomes(next_work):
            again.extend(self._noted(outcome, collected))
            while following in collected and collected[following].done:
                yield merged(collected.pop(following).pieces)
                following += 1

    def _noted(self, outcome: Done | Lost, collected: dict[int, _Collected]) -> Iterator[_Part]:
        """Note what became of a piece; gives what must be evaluated again."""
        piece = outcome.work
        assert isinstance(piece, _Part)
        into = collected[piece.part]
        if isinstance(outcome, Done):
            self._paced(outcome, len(piece.codes))
            if not piece.probes:
                into.pieces.append((piece.rows, outcome.value))
        else:
            text = f"it ended its worker, {outcome.deaths} times ({outcome.why})"
            if not outcome.why:
                text = f"it took longer than candidate_timeout = {self.seconds:g} s"
            lost = failed(self.metrics, [f"{LETHAL} {text}"] * len(piece.rows), outcome.seconds)
            into.pieces.append((piece.rows, lost))
        if not piece.probes:
            return
        into.probed += len(piece.rows)
        if into.probed == len(into.codes) and not into.done:
            lethal = np.concatenate([np.zeros(0, np.int64), *(rows for rows, _ in into.pieces)])
            rows = np.setdiff1d(np.arange(len(into.codes)), lethal)
            # Whoever ends a worker now does so only together with others; they are not cut a second time.
            yield replace(piece, rows=rows, codes=into.codes[rows], probes=False)

    def _warms(self) -> float:
        return self._warming if self.launcher.ends_late else UNKNOWN_WARMING

    def _paced(self, outcome: Done, count: int) -> None:
        if outcome.first:
            self._warming = max(LEAST_SECONDS, 4 * outcome.seconds)
        else:
            self._each = outcome.seconds / max(1, count)

    def _limit(self, count: int) -> float | None:
        if self.seconds is None:
            return None
        limit = self.seconds
        if count > 1 and self.job.training is not None:
            limit *= count
        elif count > 1 and self._each is not None:
            limit = min(limit, max(LEAST_SECONDS, LATE * self._each * count))
        return limit

    def start(self) -> None:
        """Start the workers, as far as that is done without work. Raises like ``evaluate``."""
        self._crew.start()

    def close(self) -> None:
        """End all workers."""
        self._crew.close()


def merged(pieces: Sequence[tuple[NDArray[np.int64], BatchMetrics]]) -> BatchMetrics:
    """The metrics of rows that were evaluated in several pieces, in the order of the rows."""
    if len(pieces) == 1:
        return pieces[0][1]
    whole = joined([metrics for _, metrics in pieces])
    back = np.argsort(np.concatenate([rows for rows, _ in pieces]))
    return replace(
        whole,
        values={m: v[back] for m, v in whole.values.items()},
        errors=tuple(whole.errors[i] for i in back),
        seconds=tuple(whole.seconds[i] for i in back),
    )


def failed(metrics: Sequence[str], errors: Sequence[str], seconds: float = 0.0) -> BatchMetrics:
    """The metrics of candidates that failed, for the reasons in `errors`."""
    count = len(errors)
    return BatchMetrics({m: np.full(count, np.nan) for m in metrics}, tuple(errors), (seconds,) * count)


def payload_of(job: EvaluationJob, launcher: Launcher, number: int) -> bytes:
    """A job, and the hooks that torch runs around all modules of this process, as bytes for another process, which
    computes on one thread. Raises UserError if that is impossible."""
    try:
        hooks = [list(held.values()) for held in (_modules._global_forward_pre_hooks, _modules._global_forward_hooks)]
        content = replace(job, threads=1), hooks, worker_name()
        return _by_value(content) if launcher.by_value else pickle.dumps(content)
    except Exception as error:
        why = f"n_jobs = {number}" if number > 1 else "candidate_timeout"
        instead = "use n_jobs = 1" if number > 1 else "leave candidate_timeout out"
        if launcher.title != "processes":
            why, instead = f"the executor {launcher.title}", "evaluate without an executor"
        raise UserError(
            f"{why} needs a model that can be sent to other processes, and this one cannot be pickled "
            f"({described(error)}). Define its class and its hooks at the top level of a module, or {instead}"
        ) from None


def _by_value(content: object) -> bytes:
    """With the code of what the user's script defines, which workers cannot import. Who needs cloudpickle brings it."""
    try:
        import cloudpickle
    except ModuleNotFoundError:
        return pickle.dumps(content)
    data: bytes = cloudpickle.dumps(content)
    return data


#: The hooks of the job that was opened last.
_HOOKS: list[RemovableHandle] = []


def _hook(before: Sequence[Callable[..., Any]], after: Sequence[Callable[..., Any]]) -> None:
    """Have this process run hooks around all modules, in place of those of an earlier job."""
    while _HOOKS:
        _HOOKS.pop().remove()
    _HOOKS.extend(_modules.register_module_forward_pre_hook(hook) for hook in before)
    _HOOKS.extend(_modules.register_module_forward_hook(hook) for hook in after)


def opened(content: bytes) -> Evaluator:
    """The evaluator of a job, in a worker.

    Args:
        content: from ``payload_of``; it comes from the process that gives out the work, so that unpickling it is safe.

    Raises:
        EvaluationError: the worker cannot be prepared.
    """
    try:
        with interrupts.contained():
            job, hooks, sender = pickle.loads(content)  # noqa: S301
            if sender != worker_name():  # a worker that is a thread of the sender has its hooks already
                _hook(*hooks)
            return open_evaluator(job)
    except Exception as error:
        raise EvaluationError(
            f"a worker process cannot be prepared: {described(error)}. If the model is the reason, define its "
            "class, its hooks and its functions at the top level of a module, or evaluate in one process "
            "(n_jobs = 1, no candidate_timeout)"
        ) from None
