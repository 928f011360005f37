"""How long a candidate takes, measured on a few before the search starts."""

from __future__ import annotations

import time

import numpy as np

from bitfront.engine.planning.plan import Plan
from bitfront.spaces.base import Codes

#: More than that is not spent on knowing better what a candidate costs.
PROBE_SECONDS = 0.25
#: A first training that takes longer than that is not repeated to know better.
WARM_SECONDS = 5.0
#: Candidates that tell it; many share work where all of the space will be evaluated, few where a strategy picks.
CONSECUTIVE, RANDOM = 1024, 32


def seconds_per_candidate(plan: Plan) -> float:
    """Measured on a few candidates, in this process: consecutive ones, which share most of the work, where every
    one of the space will be evaluated; else random ones."""
    count = CONSECUTIVE if plan.exhaustive else RANDOM

    def timed(some: Codes) -> float:
        begin = time.perf_counter()
        plan.evaluator.evaluate(some)
        return (time.perf_counter() - begin) / len(some)

    if plan.evaluator.job.training is not None:
        # Measured again a candidate would not be trained again, so another one says what it takes without what
        # happens once; unless that would take long itplan.
        middle = plan.space.size // 2
        first = timed(plan.space.numbered(middle, middle + 1))
        other = plan.space.numbered(middle + 1, middle + 2)
        return timed(other) if len(other) and first < WARM_SECONDS else first
    few = plan.space.numbered(0, count) if plan.exhaustive else plan.space.sample(count, np.random.default_rng(0))
    # The first one pays for what happens once, such as calibration.
    known, each = 1, timed(few[:1])
    spent = each
    if each < PROBE_SECONDS:
        each = timed(few[:1])
    # Eight times as many take less than eight times as long.
    while known < len(few) and spent < PROBE_SECONDS:
        known *= 8
        each = timed(few[:known])
        spent += each * known
    return each
