"""Measures times on a machine that is not idle.

Runs are timed one by one. Several networks run in turns, in a new random order every round, so that a machine that
becomes slower slows all of them. Before that, each network runs until its times are stable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]
#: Runs one network once and returns the seconds that it took.
TimedRun = Callable[[], float]

#: Warm-up ends when the medians of two consecutive windows of this many runs differ by less than this fraction.
WINDOW, STABLE = 10, 0.05
#: Timed runs in a row in one turn; before them comes one that does not count, because the caches hold another network.
TURN = 5
#: More runs than this do not make a median more precise in practice.
MOST_RUNS = 2000
RESAMPLES = 1000


@dataclass(frozen=True)
class TimeSummary:
    """Statistics of many runs, in seconds.

    Attributes:
        median: of the runs.
        p90: their 90th percentile.
        low: lower end of the 95 % bootstrap interval of the median.
        high: its upper end.
    """

    median: float
    p90: float
    low: float
    high: float


def summarise(times: Times, seed: int = 0) -> TimeSummary:
    """Median, 90th percentile (linear interpolation), and the percentile-bootstrap interval of the median (Efron 1979).

    The bootstrap draws 1,000 resamples from `seed`.

    Args:
        times: seconds, shape (runs,), one or more. The interval assumes that they are independent; where the machine's
            speed drifts, it is too narrow.
    """
    rng = np.random.default_rng(seed)
    medians = np.array([np.median(rng.choice(times, len(times))) for _ in range(RESAMPLES)])
    low, high = np.percentile(medians, [2.5, 97.5])
    return TimeSummary(float(np.median(times)), float(np.percentile(times, 90)), float(low), float(high))


def warm_up(run: TimedRun, seconds: float) -> int:
    """Run until the times are stable, at least twice WINDOW runs, or until the runs have taken `seconds`.

    Returns:
        The number of runs.
    """
    times: list[float] = []
    while True:
        times.append(run())
        if len(times) % WINDOW or len(times) < 2 * WINDOW:
            if sum(times) >= seconds and len(times) >= 2:
                return len(times)
            continue
        before, after = np.median(times[-2 * WINDOW : -WINDOW]), np.median(times[-WINDOW:])
        if abs(after - before) <= STABLE * before or sum(times) >= seconds:
            return len(times)


def time_in_turns(runs: Sequence[TimedRun], seconds: float, repeats: int, seed: int = 0) -> list[Times]:
    """Time each of `runs` many times, in turns.

    Args:
        runs: the networks.
        seconds: for each of `runs`. The time for all of them together is limited to its multiple, once each has
            `repeats` runs.
        repeats: timed runs of each, at least.
        seed: of the order of the turns.

    Returns:
        For each of `runs` its times in seconds; the same number for all.
    """
    rng = np.random.default_rng(seed)
    for run in runs:
        warm_up(run, seconds)
    times: list[list[float]] = [[] for _ in runs]
    begin = time.perf_counter()
    while len(runs):
        for i in rng.permutation(len(runs)).tolist():
            runs[i]()
            times[i] += [runs[i]() for _ in range(TURN)]
        elapsed = time.perf_counter() - begin
        if len(times[0]) >= MOST_RUNS or (len(times[0]) >= repeats and elapsed >= seconds * len(runs)):
            break
    return [np.array(of_run) for of_run in times]
