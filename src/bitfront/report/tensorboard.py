"""Logs a search for TensorBoard while it runs: ``tensorboard --logdir RUN/tensorboard``.

The log is written from the stored trials, and the step is the number of a trial. So a resumed search, or one that began
without a log, continues with the first trial that is not in the log, and no trial is logged twice.

- ``objectives/``, ``metrics/``: of the first 2,000 trials, then of trials that joined the front.
- ``best/``, ``front/size``, ``front/hypervolume``: after every trial up to 100, then after every tenth up to 1,000, and
  so on; and at the end. So the log of a million trials has a few thousand steps.

The reference point of the hypervolume is fixed: the worst value of each objective among the float model and the first
20 trials.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bitfront.constraints import fulfilled
from bitfront.engine.storage import store as stores
from bitfront.engine.storage.folder import STORE
from bitfront.engine.storage.run import Run
from bitfront.errors import require
from bitfront.events import Events, several
from bitfront.pareto import Front, hypervolume
from bitfront.report.data import SLICED

if TYPE_CHECKING:
    from bitfront.engine.planning.plan import Plan
    from bitfront.engine.search.loop import Progress
    from bitfront.engine.storage.trials import TrialColumns

FOLDER = "tensorboard"
#: So many trials are all logged; of later ones, those that joined the front.
SINGLE = 2000
#: Number of trials that the reference point of the hypervolume is taken from.
FIRST = 20
#: Least number of seconds between two reads of the store.
REFRESH = 1.0


@contextmanager
def logged(folder: Path, events: Events) -> Iterator[Events]:
    """Log a search: the events to search with. Leaving the context logs the trials that are still missing.

    Args:
        folder: the run folder; the search may create it later.
        events: receives the same events.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """
    require("tensorboard", "tensorboard", "tensorboard=True", arguments=["tensorboard=True"])
    follower = _StoreFollower(folder)
    try:
        yield several(events, follower)
    finally:
        follower.end()


class _StoreFollower(Events):
    """Updates the log from time to time while a search runs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log: Log | None = None
        self._begun = False
        self._next = 0.0

    def planned(self, plan: Plan, seconds: float) -> None:  # noqa: ARG002
        """Note that the search has begun: from now on the store exists."""
        self._begun = True

    def progress(self, progress: Progress, plan: Plan) -> None:  # noqa: ARG002
        """Log the new trials in the store, at most once per ``REFRESH`` seconds."""
        if time.monotonic() >= self._next:
            self._log = self._log or Log(self._folder)
            self._log.catch_up()
            self._next = time.monotonic() + REFRESH

    def end(self) -> None:
        """Log the remaining trials; all trials if the search had nothing left to evaluate."""
        if self._begun:
            self._log = self._log or Log(self._folder)
            self._log.close()


class Log:
    """The log of a run, new or continued."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import FileWriter

        run = Run.load(folder)
        self._objectives, self._constraints = run.objectives, run.constraints
        self._names = [re.sub(r"\W+", "_", name) for name in run.objectives.names]
        self._beside = [m for m in run.columns.metrics if m not in run.objectives.unscaled]
        self._signs = [-1.0 if d == "maximize" else 1.0 for d in run.objectives.directions]
        self._store = stores.read(folder / STORE)
        self._logged = last_step(folder / FOLDER)
        self._writer = FileWriter(str(folder / FOLDER))
        self._held: tuple[int, dict[str, float]] = -1, {}
        self._next = 0
        self._front = Front(len(self._signs))
        self._best = np.full(len(self._signs), np.nan)
        reference = {m: np.array([np.nan if v is None else v]) for m, v in run.reference.items()}
        self._worst = self._objectives.losses(reference)[0]

    def catch_up(self) -> None:
        """Log the trials that were stored since the last call."""
        self._add(self._store.trials(self._next))
        self._writer.flush()

    def close(self) -> None:
        """Log the remaining trials and the final front, and close the files."""
        with closing(self._store), closing(self._writer):
            self._add(self._store.trials(self._next))
            if self._next:
                self._note(self._next - 1, self._front_scalars())
            self._write()

    def _add(self, trials: TrialColumns) -> None:
        """Add trials in order. Trials that are in the log are not written again, but count for the front."""
        metrics = trials.metrics
        values, losses = self._objectives.values(metrics), self._objectives.losses(metrics)
        fine = trials.complete & ~np.isnan(losses).any(axis=1)
        if self._constraints and len(trials):
            fine &= fulfilled(self._constraints, metrics)
        losses[~fine] = np.nan
        numbers = trials.number
        early = numbers < FIRST
        self._worst = np.fmax(self._worst, np.fmax.reduce(losses[early], axis=0, initial=-np.inf))
        start, ends = 0, (np.flatnonzero(moments(numbers)) + 1).tolist()
        for end in dict.fromkeys([*ends, len(numbers)]):
            part, before = losses[start:end], self._front.count
            self._front.add(part)
            self._best = np.fmin(self._best, np.fmin.reduce(part, axis=0, initial=np.inf))
            joined = self._front.rows[self._front.rows >= before] - before + start
            single = start + np.flatnonzero((numbers[start:end] < SINGLE) & trials.complete[start:end])
            for row in np.union1d(joined, single).tolist():
                point = {f"objectives/{t}": float(v) for t, v in zip(self._names, values[row], strict=True)}
                self._note(int(numbers[row]), point | {f"metrics/{m}": float(metrics[m][row]) for m in self._beside})
            if end in ends:
                self._note(int(numbers[end - 1]), self._front_scalars())
            start = end
        if len(numbers):
            self._next = int(numbers[-1]) + 1

    def _front_scalars(self) -> dict[str, float]:
        """The scalars of the front so far: its size, the best values, and the hypervolume."""
        scalars = {"front/size": float(len(self._front))}
        scalars |= {f"best/{t}": s * float(b) for t, s, b in zip(self._names, self._signs, self._best, strict=True)}
        small = len(self._signs) in (2, 3) or len(self._front) <= SLICED
        if self._front.count >= FIRST and len(self._signs) > 1 and small and np.isfinite(self._worst).all():
            scalars["front/hypervolume"] = hypervolume(self._front.losses, self._worst)
        return scalars

    def _note(self, number: int, point: Mapping[str, float]) -> None:
        """Collect scalars of a trial. They are written as one record when the next trial comes, so a kill leaves all
        of them or none."""
        if number != self._held[0]:
            self._write()
            self._held = number, {}
        self._held[1].update(point)

    def _write(self) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        number, point = self._held
        known = {tag: value for tag, value in point.items() if np.isfinite(value)}
        if known and number > self._logged:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in known.items()]
            self._writer.add_summary(Summary(value=values), number)
            self._logged = number


def moments(numbers: np.ndarray[tuple[int], np.dtype[np.int64]]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Whether the front is logged after a trial, per number of a trial: the same in every session."""
    step = 10 ** np.maximum(0, np.floor(np.log10(np.maximum(numbers, 1))).astype(np.int64) - 1)
    return np.asarray(numbers % step == 0)


def last_step(folder: Path) -> int:
    """The last step in the logs of a folder; -1 if there are none. Incomplete records do not count."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    last = -1
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            if event.HasField("summary"):
                last = max(last, event.step)
    return last
