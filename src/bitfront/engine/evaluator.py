"""From a batch of codes to arrays of metrics.

``Workbench`` is what every evaluation needs, built from a plain, picklable ``Job``: the captured model, the space, the
samples and the runners. Its interface (a batch of codes in, arrays out) is what the loop knows; how a batch is
evaluated inside is nobody else's business. Here each candidate is rebuilt through ``transforms.quantize`` and run
whole, which is also the path that stays for models that cannot be traced.

One candidate's numbers depend on nothing but the candidate: the same samples in the same chunks, one thread (sums in
floating point depend on how many share them), no state from one batch to the next. Worker processes run the same code.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfront.errors import EvaluationError, UserError
from bitfront.formats.base import Format, Operand
from bitfront.graph import capture
from bitfront.metrics import RUNNERS
from bitfront.metrics.base import Runner, Scores, Side, Values
from bitfront.spaces import SPACES
from bitfront.spaces.base import Codes
from bitfront.spaces.quantize import QuantizationSpace
from bitfront.spaces.request import SpaceRequest
from bitfront.training import evaluate
from bitfront.transforms import calibrate, quantize

#: A block of candidates is made so large that it takes about this long: short enough for the progress bar, the
#: timeout and the store; long enough that none of them is what takes the time.
BLOCK_SECONDS = 0.25
LARGEST_BLOCK = 1024


@dataclass(frozen=True, eq=False)
class Job:
    """Everything an evaluation depends on. Picklable.

    Attributes:
        model: the trained float model.
        sample: two input samples, for capture.
        space: name of the space, and what it is built from.
        runners: (side, name, settings) of each metric runner.
        splits: split → (x, y): the samples to evaluate on, already chosen and in order.
        calibration: samples of the training split that formats learn their scales from.
        device: where to compute.
    """

    model: nn.Module
    sample: Tensor
    space: str
    by: str
    seed: Mapping[str, Mapping[str, object]]
    runners: tuple[tuple[Side, str, Mapping[str, Any]], ...]
    splits: Mapping[str, tuple[Tensor, Tensor]]
    calibration: Tensor
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class Measured:
    """The metrics of some candidates, in their order.

    Attributes:
        values: metric → values of shape (candidates,); NaN where it could not be measured.
        errors: why a candidate failed; empty where it did not.
        seconds: time per candidate.
    """

    values: Mapping[str, Values]
    errors: tuple[str, ...]
    seconds: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.errors)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Computes on one thread: on small work that is faster, and sums come out the same on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Workbench:
    """Evaluates candidates of one job. The model in it is never changed."""

    def __init__(self, job: Job, space: QuantizationSpace | None = None) -> None:
        self.job = job
        if space is None:
            graph = capture(job.model, job.sample)
            built = SPACES.get(job.space)(SpaceRequest(graph, job.by, job.seed))
            assert isinstance(built, QuantizationSpace)
            space = built
        self._space = space
        self.runners: tuple[Runner, ...] = tuple(
            RUNNERS.get(name)(RUNNERS.get(name).Settings(**settings)) for _, name, settings in job.runners
        )
        self.metrics = tuple(m.name for runner in self.runners for m in runner.produces)
        self._calibrated: dict[tuple[str, Operand, Format], Format] = {}
        self._resident: dict[tuple[str, int | None], tuple[Tensor, Tensor]] = {}

    @property
    def space(self) -> QuantizationSpace:
        """The space the codes belong to."""
        return self._space

    def of_float(self) -> Workbench:
        """A workbench whose only candidate, the empty code, is the float model."""
        return Workbench(self.job, QuantizationSpace.of_float(self.space.graph))

    def measure(self, codes: Codes) -> Measured:
        """All metrics of a batch of candidates.

        A candidate that fails is an entry in ``errors``, and does not touch the others.
        """
        start = time.perf_counter()
        try:
            values, errors = self._measure(codes)
        except (UserError, KeyboardInterrupt):
            raise
        except Exception as error:
            if len(codes) == 1:
                nothing = {m: np.full(1, np.nan) for m in self.metrics}
                return Measured(nothing, (_described(error),), (time.perf_counter() - start,))
            # Whoever is to blame is found one by one.
            return joined([self.measure(codes[i : i + 1]) for i in range(len(codes))])
        seconds = (time.perf_counter() - start) / max(1, len(codes))
        return Measured(values, errors, (seconds,) * len(codes))

    def _measure(self, codes: Codes) -> tuple[dict[str, Values], tuple[str, ...]]:
        values: dict[str, Values] = {}
        subject = _Subject(self)
        with one_thread():
            for runner in self.runners:
                values.update(runner.measure(subject, codes))
        errors = list(subject.errors) or [""] * len(codes)
        for name, column in values.items():
            for i in np.flatnonzero(~np.isfinite(column)):
                errors[i] = errors[i] or f"{name} is {column[i]}"
                column[i] = np.nan
        return values, tuple(errors)

    def formats(self, code: NDArray[np.int64]) -> dict[str, dict[Operand, Format]]:
        """Site → operand → calibrated format of one candidate."""
        wanted = self.space.formats(self.space.options(code[None])[0])
        missing = {
            name: {o: f for o, f in own.items() if f.calibrates and (name, o, f) not in self._calibrated}
            for name, own in wanted.items()
        }
        if any(missing.values()):
            learned = calibrate(self.space.graph, missing, self.job.calibration)
            for name, own in missing.items():
                for operand, before in own.items():
                    self._calibrated[name, operand, before] = learned[name][operand]
        return {
            name: {o: self._calibrated.get((name, o, f), f) for o, f in own.items()} for name, own in wanted.items()
        }

    def model(self, code: NDArray[np.int64], *, bake: bool = False) -> nn.Module:
        """The model of one candidate, in evaluation mode, with parameters of its own."""
        return quantize(self.space.graph, self.formats(code), bake=bake).to(self.job.device)

    def scores(self, codes: Codes, split: str, num_samples: int | None) -> Scores:
        """Loss and correct answers of each candidate on fixed samples of `split`."""
        x, y = self.samples(split, num_samples)
        loss = np.full(len(codes), np.nan)
        correct = np.zeros(len(codes), dtype=np.int64)
        errors = [""] * len(codes)
        for i, code in enumerate(codes):
            try:
                with one_thread():
                    result = evaluate(self.model(code), x, y)
            except UserError:
                raise
            except Exception as error:
                errors[i] = _described(error)
            else:
                loss[i], correct[i] = result.loss, result.correct
        return Scores(loss, correct, len(y), tuple(errors))

    def samples(self, split: str, num_samples: int | None) -> tuple[Tensor, Tensor]:
        """The samples (x, y) that ``scores`` uses."""
        key = (split, num_samples)
        if key not in self._resident:
            x, y = self.job.splits[split]
            self._resident[key] = (x[:num_samples].to(self.job.device), y[:num_samples].to(self.job.device))
        return self._resident[key]


class _Subject:
    """What the runners see of a workbench during one batch; forward passes asked for twice are made once."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._scores: dict[tuple[str, int | None], Scores] = {}

    @property
    def space(self) -> QuantizationSpace:
        return self._bench.space

    @property
    def errors(self) -> Sequence[str]:
        """Per candidate the first error of any forward pass."""
        columns = [s.errors for s in self._scores.values()]
        return [next((e for e in row if e), "") for row in zip(*columns, strict=True)]

    def scores(self, codes: Codes, split: str, num_samples: int | None) -> Scores:
        key = (split, num_samples)
        if key not in self._scores:
            self._scores[key] = self._bench.scores(codes, split, num_samples)
        return self._scores[key]


def joined(parts: Sequence[Measured]) -> Measured:
    """Several batches as one."""
    return Measured(
        values={m: np.concatenate([p.values[m] for p in parts]) for m in (parts[0].values if parts else ())},
        errors=tuple(e for p in parts for e in p.errors),
        seconds=tuple(s for p in parts for s in p.seconds),
    )


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().split("\n")[0]


# --- blocks, in this process or in others ----------------------------------------------------------------------------


class Evaluator:
    """Hands out blocks of candidates, to this process or to `n_jobs` worker processes, and gives results in order.

    A context manager: leaving it ends the workers.
    """

    def __init__(self, bench: Workbench, n_jobs: int = 1) -> None:
        self.bench, self.n_jobs = bench, n_jobs
        self._pool: Executor | None = None
        self._block = 1

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def blocks(self, codes: Codes) -> Iterator[tuple[Codes, Measured]]:
        """Evaluate `codes` block by block, in order; stop iterating to stop evaluating.

        Raises:
            EvaluationError: a worker process died.
        """
        start = 0
        while start < len(codes):
            parts = np.array_split(codes[start : start + self._block * self.n_jobs], self.n_jobs)
            parts = [p for p in parts if len(p)]
            begin = time.perf_counter()
            yield from zip(parts, self._map(parts), strict=True)
            seconds = time.perf_counter() - begin
            start += sum(map(len, parts))
            if seconds < BLOCK_SECONDS and len(parts) == self.n_jobs:
                self._block = min(LARGEST_BLOCK, self._block * 2)
            elif seconds > 2 * BLOCK_SECONDS:
                self._block = max(1, self._block // 2)

    def _map(self, parts: Sequence[Codes]) -> Iterator[Measured]:
        if self.n_jobs == 1:
            yield from (self.bench.measure(p) for p in parts)
            return
        if self._pool is None:
            self._pool = _start_pool(self.bench.job, self.n_jobs)
        try:
            yield from self._pool.map(_measure_in_worker, parts)
        except BrokenProcessPool:
            raise EvaluationError(
                "a worker process died (out of memory?). All trials told so far are safe; give the same command "
                "again, with a smaller n_jobs"
            ) from None


_BENCH: list[Workbench] = []


def _start_pool(job: Job, n_jobs: int) -> Executor:
    import pickle

    try:
        payload = pickle.dumps(job)
    except Exception as error:
        raise UserError(
            f"n_jobs = {n_jobs} needs a model that can be sent to other processes, and this one cannot be pickled "
            f"({_described(error)}). Define its class at the top level of a module, or use n_jobs = 1"
        ) from None
    # spawn, not fork: a forked child would inherit torch's threads in whatever state they are.
    return ProcessPoolExecutor(n_jobs, mp_context=get_context("spawn"), initializer=_init_worker, initargs=(payload,))


def _init_worker(payload: bytes) -> None:
    import pickle
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the coordinator's business
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The bytes come from the parent process, which is us.
    _BENCH[:] = [Workbench(pickle.loads(payload))]  # noqa: S301


def _end_with_parent() -> None:
    """A parent that was killed cannot end its workers: they would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _measure_in_worker(codes: Codes) -> Measured:
    return _BENCH[0].measure(codes)
