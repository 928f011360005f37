"""How long something takes, on a machine that does other things too.

Runs are timed one by one, those of several networks in turns whose order is drawn anew every round, so that a machine
that becomes slower meanwhile slows all of them. Before that each is run until its times have settled. Nothing here
knows what is run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float64]
#: Runs one network once and says how many seconds that took.
Timed = Callable[[], float]

#: Warm-up ends when the medians of two consecutive stretches of this many runs differ by less than this share.
STRETCH, SETTLED = 10, 0.05
#: Timed runs in a row in one turn, after one that does not count: it finds the caches as another network left them.
TURN = 5
#: More runs than that say nothing new about a median.
MOST_RUNS = 2000
RESAMPLES = 1000


@dataclass(frozen=True)
class Summary:
    """What many runs say, in seconds.

    Attributes:
        median, p90: of the runs.
        low, high: 95 % bootstrap interval of the median.
    """

    median: float
    p90: float
    low: float
    high: float


def summarise(samples: Samples, seed: int = 0) -> Summary:
    """Median, 90th percentile (linear interpolation) and the percentile-bootstrap interval of the median (Efron 1979)
    from 1,000 seeded resamples.

    Args:
        samples: seconds, shape (runs,), one or more. The interval takes them for independent; where the machine
            drifts it is too narrow.
    """
    rng = np.random.default_rng(seed)
    medians = np.array([np.median(rng.choice(samples, len(samples))) for _ in range(RESAMPLES)])
    low, high = np.percentile(medians, [2.5, 97.5])
    return Summary(float(np.median(samples)), float(np.percentile(samples, 90)), float(low), float(high))


def warm_up(run: Timed, seconds: float) -> int:
    """Run until times have settled, at least twice STRETCH runs, or until `seconds` have gone by in runs.

    Returns:
        How many runs that took.
    """
    times: list[float] = []
    while True:
        times.append(run())
        if len(times) % STRETCH or len(times) < 2 * STRETCH:
            if sum(times) >= seconds and len(times) >= 2:
                return len(times)
            continue
        before, after = np.median(times[-2 * STRETCH : -STRETCH]), np.median(times[-STRETCH:])
        if abs(after - before) <= SETTLED * before or sum(times) >= seconds:
            return len(times)


def interleaved(runs: Sequence[Timed], seconds: float, repeats: int, seed: int = 0) -> list[Samples]:
    """Time every run of `runs` often, in turns.

    Args:
        seconds: per entry of `runs`; what all of them take together is bounded by it once each has `repeats` runs.
        repeats: runs of each, at least.

    Returns:
        Per entry its times in seconds; as many for each.
    """
    rng = np.random.default_rng(seed)
    for run in runs:
        warm_up(run, seconds)
    samples: list[list[float]] = [[] for _ in runs]
    begin = time.perf_counter()
    while len(runs):
        for i in rng.permutation(len(runs)).tolist():
            runs[i]()
            samples[i] += [runs[i]() for _ in range(TURN)]
        spent = time.perf_counter() - begin
        if len(samples[0]) >= MOST_RUNS or (len(samples[0]) >= repeats and spent >= seconds * len(runs)):
            break
    return [np.array(s) for s in samples]
