"""Candidates compared on the same samples: the front's members with each other, and how many samples that takes.

Two candidates that are evaluated on the same samples differ on few of them, and only those tell the two apart. So a
paired comparison sees differences that are far smaller than the interval of either accuracy.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bitfront.engine.evaluation.interface import Evaluator
from bitfront.engine.planning.runners import FIRST_SAMPLES
from bitfront.engine.storage.records import PairedComparison
from bitfront.metrics.intervals import Paired
from bitfront.spaces.base import Codes

#: A difference of accuracy that is known this well is known well enough.
RESOLUTION = 0.005
#: Candidates whose order is looked at: uniform ones and random ones.
UNIFORM, RANDOM = 32, 32


def compare(numbers: Sequence[int], answers: NDArray[np.bool_]) -> tuple[PairedComparison, ...]:
    """Each against the next better one, and against the best.

    Args:
        numbers: of the trials.
        answers: which samples each answers rightly, shape (trials, samples).

    Returns:
        Most accurate first; equally accurate ones in the order given.
    """
    order = np.argsort(-answers.sum(axis=1), kind="stable")
    found = []
    for place, row in enumerate(order):
        above = order[place - 1] if place else row
        found.append(
            PairedComparison(
                number=numbers[row],
                above=numbers[above] if place else None,
                p_above=Paired.of(answers[above], answers[row]).p,
                p_best=Paired.of(answers[order[0]], answers[row]).p,
            )
        )
    return tuple(found)


def settled(answers: NDArray[np.bool_]) -> bool:
    """Whether the order of some candidates is known: of each and the next better one it is either clear which is
    better, or that they differ by less than ``RESOLUTION``.

    Args:
        answers: which samples each answers rightly, shape (candidates, samples).
    """
    ranked = answers[np.argsort(-answers.sum(axis=1), kind="stable")]
    pairs = [Paired.of(first, second) for first, second in itertools.pairwise(ranked)]
    return all(pair.distinguishable or pair.half_width <= RESOLUTION for pair in pairs)


def enough_samples(evaluator: Evaluator, split: str, seed: int) -> tuple[int, int]:
    """(how many samples of a split settle the order of typical candidates, how many candidates were looked at).

    The candidates are uniform ones and random ones of the space; the samples are doubled until their order is settled,
    or all are used.
    """
    space = evaluator.space
    codes: Codes = np.concatenate([space.uniform()[:UNIFORM], space.sample(RANDOM, np.random.default_rng(seed))])
    codes = codes[np.sort(np.unique(codes, axis=0, return_index=True)[1])] if codes.shape[1] else codes[:1]
    there = len(evaluator.samples(split, None)[1])
    have, answers = 0, np.zeros((len(codes), 0), dtype=bool)
    while have < there:
        more = min(there, max(FIRST_SAMPLES, 2 * have))
        answers = np.concatenate([answers, evaluator.answers(codes, split, have, more)], axis=1)
        have = more
        if settled(answers):
            break
    return have, len(codes)
