"""The time per candidate, measured on a few candidates before the search starts."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from bitfront.engine.evaluation.verification import SAMPLES as CHECKED_SAMPLES
from bitfront.engine.planning.plan import Plan
from bitfront.spaces.base import Codes

#: The measurement ends after about so many seconds.
PROBE_SECONDS = 0.25
#: If training the first candidate takes longer than this, a second one is not trained.
WARM_SECONDS = 5.0
#: What the first candidate does once is done so often again, for the options that it does not have.
OTHER_OPTIONS = 2
#: The end of a search takes about so much of the time of the check before it: each evaluates a few candidates as they
#: are deployed.
END_SHARE = 0.5
#: Number of candidates: consecutive ones where the whole space will be evaluated, random ones where a strategy chooses.
CONSECUTIVE, RANDOM = 1024, 32


def all_safe(codes: Codes) -> NDArray[np.bool_]:
    """Any candidate may be evaluated, shape (candidates,)."""
    return np.ones(len(codes), dtype=bool)


def seconds_per_candidate(
    plan: Plan,
    safe: Callable[[Codes], NDArray[np.bool_]] = all_safe,
    allowed: Callable[[Codes], NDArray[np.bool_]] = all_safe,
) -> float:
    """Seconds that one candidate takes, measured in this process.

    Where the whole space will be evaluated, the candidates are consecutive ones, which share most of their work;
    otherwise they are random ones. If candidates are trained, one or two of them are. Networks of a training with
    learned bits come out together: 0, as no candidate has a time of its own.

    Args:
        safe: which of some candidates may be evaluated in this process (``Dispatcher.safe``).
        allowed: which of some candidates the search may train; others are trained if none near the middle is.
    """
    if plan.evaluator.job.learning is not None:
        return 0.0
    count = CONSECUTIVE if plan.exhaustive else RANDOM

    def timed(codes: Codes) -> float:
        codes = codes[safe(codes)]
        begin = time.perf_counter()
        plan.evaluator.evaluate(codes)
        return (time.perf_counter() - begin) / max(1, len(codes))

    if plan.evaluator.job.training is not None:
        # The time of the first candidate includes what happens once. It would not be trained a second time, so
        # another candidate is measured, unless that takes too long.
        middle = plan.space.size // 2
        near = plan.space.numbered(middle, middle + RANDOM)
        good = allowed(near)
        near = near[good] if good.any() else near
        first = timed(near[:1])
        return timed(near[1:2]) if len(near) > 1 and first < WARM_SECONDS else first
    few = plan.space.numbered(0, count) if plan.exhaustive else plan.space.sample(count, np.random.default_rng(0))
    # The time of the first call includes what happens once, such as calibration.
    measured, each = 1, timed(few[:1])
    spent = each
    if each < PROBE_SECONDS:
        each = timed(few[:1])
    elif len(few):
        # What happened once, such as rounding weights, happens again for other options, and then no more.
        again = timed(few[:8] if plan.exhaustive else few[:1])
        return again + max(0.0, each - again) * OTHER_OPTIONS / plan.n_trials
    # The time per candidate falls with the size of the block, so blocks grow as long as there is time.
    while measured < len(few) and spent < PROBE_SECONDS:
        measured *= 8
        each = timed(few[:measured])
        spent += each * measured
    return each


def expected_seconds(plan: Plan, each: float, left: int, checked: float) -> float:
    """About how long a search takes from its first candidate to its end.

    Args:
        plan: the plan.
        each: seconds per candidate (``seconds_per_candidate``).
        left: number of candidates that are left to evaluate.
        checked: how long the check before the search took.
    """
    evaluation = each * left / plan.workers
    timeout = plan.settings.strategy.setup.timeout
    samples, number = plan.evaluator.accuracy_samples, 1
    if samples is not None:
        number = len(plan.evaluator.samples(samples.split, samples.number)[1])
    checked_on = min(number, plan.evaluator.float_evaluator().chunk, CHECKED_SAMPLES)
    end = END_SHARE * checked * number / max(1, checked_on)
    return (evaluation if timeout is None else min(timeout, evaluation)) + end
