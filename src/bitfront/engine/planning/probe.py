"""The time per candidate, measured on a few candidates before the search starts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitfront.engine.evaluation.verification import SAMPLES as CHECKED_SAMPLES
from bitfront.engine.evaluation.verification import Verification
from bitfront.engine.planning.plan import Plan
from bitfront.spaces.base import Codes

#: The measurement ends after about so many seconds.
PROBE_SECONDS = 0.25
#: If training the first candidate takes longer than this, a second one is not trained.
WARM_SECONDS = 5.0
#: What the first candidate does once is done so often again, for the options that it does not have.
OTHER_OPTIONS = 2
#: At the end of a search members of the front, at most so many, are run as they are deployed: once to be checked, once
#: to be compared.
ENDING_RUNS, CHECKED_MEMBERS = 2, 100
#: Number of candidates: consecutive ones where the whole space will be evaluated, random ones where a strategy chooses.
CONSECUTIVE, RANDOM = 1024, 32


def all_safe(codes: Codes) -> NDArray[np.bool_]:
    """Any candidate may be evaluated, shape (candidates,)."""
    return np.ones(len(codes), dtype=bool)


@dataclass(frozen=True)
class Timing:
    """How long candidates take.

    Attributes:
        each: seconds per candidate, beside that.
        once: seconds for what is computed once, such as rounded weights, and then known for all candidates.
    """

    each: float
    once: float = 0.0

    def mean(self, candidates: int) -> float:
        """Seconds per candidate, on average over so many."""
        return self.each + self.once / max(1, candidates)


def seconds_per_candidate(
    plan: Plan,
    safe: Callable[[Codes], NDArray[np.bool_]] = all_safe,
    allowed: Callable[[Codes], NDArray[np.bool_]] = all_safe,
) -> float:
    """Seconds that one candidate takes, on average over the search. Arguments as for ``timing``."""
    return timing(plan, safe, allowed).mean(plan.n_trials)


def timing(
    plan: Plan,
    safe: Callable[[Codes], NDArray[np.bool_]] = all_safe,
    allowed: Callable[[Codes], NDArray[np.bool_]] = all_safe,
) -> Timing:
    """How long candidates take, measured in this process.

    Where the whole space will be evaluated, the candidates are consecutive ones, which share most of their work;
    otherwise they are random ones. If candidates are trained, one or two of them are. Networks of a training with
    learned bits come out together: 0, as no candidate has a time of its own.

    Args:
        safe: which of some candidates may be evaluated in this process (``Dispatcher.safe``).
        allowed: which of some candidates the search may train; others are trained if none near the middle is.
    """
    if plan.evaluator.job.learning is not None:
        return Timing(0.0)
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
        return Timing(timed(near[1:2]) if len(near) > 1 and first < WARM_SECONDS else first)
    few = plan.space.numbered(0, count) if plan.exhaustive else plan.space.sample(count, np.random.default_rng(0))
    # The time of the first call includes what happens once, such as calibration.
    first, once, measured = timed(few[:1]), 0.0, 1
    if first >= PROBE_SECONDS and plan.exhaustive:
        measured = 8
    each = timed(few[:measured])
    if first >= PROBE_SECONDS:
        # What happened once, such as rounding weights, happens again for other options, and then no more.
        once = max(0.0, first - each) * OTHER_OPTIONS
        if not plan.exhaustive:
            return Timing(each, once)  # others would have other options, and take longer
    # The time per candidate falls with the size of the block, so blocks grow as long as there is time.
    spent = each * measured
    while measured < len(few) and spent < PROBE_SECONDS:
        measured *= 8
        each = timed(few[:measured])
        spent += each * measured
    return Timing(each, once)


def expected_seconds(plan: Plan, known: Timing, left: int, check: Verification) -> float:
    """About how long a search takes from its first candidate to its end.

    Args:
        plan: the plan.
        known: how long candidates take.
        left: number of candidates that are left to evaluate.
        check: the check before the search. Its candidates have all options, so what happens once happened in it too,
            but for calibration, which happens once for both.
    """
    samples, number = plan.evaluator.accuracy_samples, 1
    if samples is not None:
        number = len(plan.evaluator.samples(samples.split, samples.number)[1])
    share = max(1, number) / max(1, min(number, plan.evaluator.float_evaluator().chunk, CHECKED_SAMPLES))
    once = min(known.once, max(0.0, check.together - check.candidates * known.each / share))
    evaluation = once + known.each * left / plan.workers
    timeout = plan.settings.strategy.setup.timeout
    # How many members a front will have is not known; the more trials, the more.
    members = min(CHECKED_MEMBERS, math.sqrt(plan.n_trials))
    end = ENDING_RUNS * members * check.alone * share
    return (evaluation if timeout is None else min(timeout, evaluation)) + end
