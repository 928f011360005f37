"""The course of a search as points: which trials are tracked, and when the front is.

It is read from the stored trials, and the step is the number of a trial. So a resumed search, or one that began without
a tracker, gives the same points as a search in one session.

- ``objectives/``, ``metrics/``: of the first 2,000 trials, then of trials that joined the front.
- ``best/``, ``front/size``, ``front/hypervolume``: after every trial up to 100, then after every tenth up to 1,000, and
  so on; and at the end. So the course of a million trials has a few thousand points.

The reference point of the hypervolume is fixed: the worst value of each objective among the float model and the first
20 trials.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from bitfront.constraints import fulfilled
from bitfront.engine.storage.run import Run
from bitfront.engine.storage.store import Store
from bitfront.pareto import Front, hypervolume
from bitfront.report.data import SLICED
from bitfront.trackers.base import Point

if TYPE_CHECKING:
    from bitfront.engine.storage.trials import TrialColumns

#: So many trials are all tracked; of later ones, those that joined the front.
SINGLE = 2000
#: Number of trials that the reference point of the hypervolume is taken from.
FIRST = 20


class Course:
    """The points of a search, as its trials come.

    The newest point is held back until the next trial comes or the search ends, because at the end it has the front
    too, and a point is given once.

    Args:
        run: the run when tracking begins.
        store: where its trials come from.
    """

    def __init__(self, run: Run, store: Store) -> None:
        self._objectives, self._constraints = run.objectives, run.constraints
        self._names = [re.sub(r"\W+", "_", name) for name in run.objectives.names]
        self._beside = [m for m in run.columns.metrics if m not in run.objectives.unscaled]
        self._signs = [-1.0 if d == "maximize" else 1.0 for d in run.objectives.directions]
        self._store = store
        self._held: Point | None = None
        self._next = 0
        self._front = Front(len(self._signs))
        self._best = np.full(len(self._signs), np.nan)
        reference = {m: np.array([np.nan if v is None else v]) for m, v in run.reference.items()}
        self._worst = self._objectives.losses(reference)[0]

    def news(self) -> list[Point]:
        """The points of trials that were stored since the last call, but for the newest."""
        return [point for found in self._points(self._store.trials(self._next)) for point in self._merged(found)]

    def rest(self) -> list[Point]:
        """All points that are left; the last one has the front as it is now."""
        points = self.news()
        if self._next:
            points += self._merged(Point(self._next - 1, front=self._front_now()))
        if self._held is not None:
            points.append(self._held)
            self._held = None
        return points

    def _merged(self, point: Point) -> list[Point]:
        """Hold `point`, together with the held one if it is of the same trial. Returns what need not be held more."""
        held, self._held = self._held, point
        if held is None:
            return []
        if held.number != point.number:
            return [held]
        self._held = replace(held, front={**held.front, **point.front})  # a trial comes before the front after it
        return []

    def _points(self, trials: TrialColumns) -> Iterator[Point]:
        """The points of trials, in order."""
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
            single = start + np.flatnonzero(numbers[start:end] < SINGLE)
            for row in np.union1d(joined, single).tolist():
                code = tuple(trials.codes([row])[0].tolist())
                if not trials.complete[row]:
                    yield Point(int(numbers[row]), {}, failed=True, code=code)
                    continue
                known = {f"objectives/{t}": float(v) for t, v in zip(self._names, values[row], strict=True)}
                known |= {f"metrics/{m}": float(metrics[m][row]) for m in self._beside}
                yield Point(int(numbers[row]), known, code=code)
            if end in ends:
                yield Point(int(numbers[end - 1]), front=self._front_now())
            start = end
        if len(numbers):
            self._next = int(numbers[-1]) + 1

    def _front_now(self) -> dict[str, float]:
        """The scalars of the front so far: its size, the best values, and the hypervolume."""
        scalars = {"front/size": float(len(self._front))}
        scalars |= {f"best/{t}": s * float(b) for t, s, b in zip(self._names, self._signs, self._best, strict=True)}
        small = len(self._signs) in (2, 3) or len(self._front) <= SLICED
        if self._front.count >= FIRST and len(self._signs) > 1 and small and np.isfinite(self._worst).all():
            scalars["front/hypervolume"] = hypervolume(self._front.losses, self._worst)
        return scalars


def moments(numbers: np.ndarray[tuple[int], np.dtype[np.int64]]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Whether the front is tracked after a trial, per number of a trial: the same in every session."""
    step = 10 ** np.maximum(0, np.floor(np.log10(np.maximum(numbers, 1))).astype(np.int64) - 1)
    return np.asarray(numbers % step == 0)
