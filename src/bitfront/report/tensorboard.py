"""A search in TensorBoard, while it goes on: ``tensorboard --logdir RUN/tensorboard``.

What is logged is read from the stored trials, and steps are their numbers: so a search that goes on, or one that was
begun without a log, continues with the first trial that is not logged yet, and nothing is there twice.

- ``objectives/``, ``metrics/``: of each of the first 2,000 trials, then of those that joined the front.
- ``best/``, ``front/size``, ``front/hypervolume``: at every trial up to 100, then at every tenth up to 1,000, and so
  on; and at the end. So the log of a million trials has a few thousand steps.

The hypervolume is what the front dominates up to a fixed point: of each objective the worst among the float model and
the first 20 trials.
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
#: So many trials are logged one by one.
SINGLE = 2000
#: TrialColumns that the reference point of the hypervolume is taken from.
FIRST = 20
#: Seconds between two looks at the store.
REFRESH = 1.0


@contextmanager
def logged(folder: Path, events: Events) -> Iterator[Events]:
    """The events of a search, which is logged while they come, and to its end when they have.

    Args:
        folder: the run folder, which the search may have yet to make.
        events: who else listens.

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
    """Writes the log every now and then while a search goes on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log: Log | None = None
        self._begun = False
        self._next = 0.0

    def planned(self, plan: Plan, seconds: float) -> None:  # noqa: ARG002
        """From here on there are trials, or were before."""
        self._begun = True

    def progress(self, progress: Progress, plan: Plan) -> None:  # noqa: ARG002
        """Log what is stored, unless that was done a moment ago."""
        if time.monotonic() >= self._next:
            self._log = self._log or Log(self._folder)
            self._log.catch_up()
            self._next = time.monotonic() + REFRESH

    def end(self) -> None:
        """Log the rest; all of it if there was nothing left to search."""
        if self._begun:
            self._log = self._log or Log(self._folder)
            self._log.close()


class Log:
    """The log of a run, begun or gone on with."""

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
        own = {m: np.array([np.nan if v is None else v]) for m, v in run.reference.items()}
        self._worst = self._objectives.losses(own)[0]

    def catch_up(self) -> None:
        """Log what has been stored since the last time."""
        self._add(self._store.trials(self._next))
        self._writer.flush()

    def close(self) -> None:
        """Log what is left, and where it ended."""
        with closing(self._store), closing(self._writer):
            self._add(self._store.trials(self._next))
            if self._next:
                self._note(self._next - 1, self._standing())
            self._write()

    def _add(self, trials: TrialColumns) -> None:
        """Go through trials in order; what is logged of them already only counts for what comes after."""
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
            part, told = losses[start:end], self._front.told
            self._front.add(part)
            self._best = np.fmin(self._best, np.fmin.reduce(part, axis=0, initial=np.inf))
            joined = self._front.rows[self._front.rows >= told] - told + start
            single = start + np.flatnonzero((numbers[start:end] < SINGLE) & trials.complete[start:end])
            for row in np.union1d(joined, single).tolist():
                point = {f"objectives/{t}": float(v) for t, v in zip(self._names, values[row], strict=True)}
                self._note(int(numbers[row]), point | {f"metrics/{m}": float(metrics[m][row]) for m in self._beside})
            if end in ends:
                self._note(int(numbers[end - 1]), self._standing())
            start = end
        if len(numbers):
            self._next = int(numbers[-1]) + 1

    def _standing(self) -> dict[str, float]:
        """How good what has been found is."""
        found = {"front/size": float(len(self._front))}
        found |= {f"best/{t}": s * float(b) for t, s, b in zip(self._names, self._signs, self._best, strict=True)}
        small = len(self._signs) in (2, 3) or len(self._front) <= SLICED
        if self._front.told >= FIRST and len(self._signs) > 1 and small and np.isfinite(self._worst).all():
            found["front/hypervolume"] = hypervolume(self._front.losses, self._worst)
        return found

    def _note(self, number: int, point: Mapping[str, float]) -> None:
        """More about a trial. It is written when the next one comes: as one record, there whole or not at all."""
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
    """After which trials the standing is logged: by their numbers alone, so that every session has the same."""
    step = 10 ** np.maximum(0, np.floor(np.log10(np.maximum(numbers, 1))).astype(np.int64) - 1)
    return np.asarray(numbers % step == 0)


def last_step(folder: Path) -> int:
    """The last step in the logs of a folder; -1 if there are none. What a kill cut short does not count."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = -1
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            if event.HasField("summary"):
                found = max(found, event.step)
    return found
