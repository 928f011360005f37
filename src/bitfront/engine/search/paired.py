"""Paired comparisons of candidates: the members of the front, and the number of samples that a search needs.

Two candidates that are evaluated on the same samples give different answers on few of them. Only these samples count in
a paired test (McNemar), so it detects differences that are much smaller than the interval of either accuracy. Metrics
of other tasks are compared on the same draws of samples (``metrics/bootstrap.py``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from bitfront.engine.evaluation.interface import Evaluator
from bitfront.engine.planning.runners import FIRST_SAMPLES
from bitfront.engine.storage.records import PairedComparison
from bitfront.metrics import bootstrap
from bitfront.metrics.intervals import Z95, PairedCounts
from bitfront.spaces.base import Codes
from bitfront.tasks.base import Results, Task

#: Half width of the interval of an accuracy difference (as a share) below which more samples are not needed. Of a
#: metric that is no share, it is a part of its value.
RESOLUTION = 0.005
#: Number of uniform and of random candidates from which the number of samples is chosen.
UNIFORM, RANDOM = 32, 32
#: A p-value below which two candidates differ.
SIGNIFICANT = 0.05


def compare(numbers: Sequence[int], answers: NDArray[np.bool_]) -> tuple[PairedComparison, ...]:
    """Compare each trial with the next more accurate one and with the most accurate one.

    Args:
        numbers: the numbers of the trials.
        answers: whether each trial classifies each sample correctly, bool, shape (trials, samples).

    Returns:
        One comparison per trial, the most accurate first; equally accurate trials in the given order.
    """
    order = np.argsort(-answers.sum(axis=1), kind="stable")
    comparisons = []
    for place, row in enumerate(order):
        above = order[place - 1] if place else row
        comparisons.append(
            PairedComparison(
                number=numbers[row],
                above=numbers[above] if place else None,
                p_above=PairedCounts.of(answers[above], answers[row]).p,
                p_best=PairedCounts.of(answers[order[0]], answers[row]).p,
            )
        )
    return tuple(comparisons)


def compare_results(task: Task, trials: Sequence[tuple[int, Results]]) -> tuple[PairedComparison, ...]:
    """Compare each trial with the next better one and with the best one, in the metric that leads.

    Args:
        task: what the samples are.
        trials: (number of a trial, its results per sample).

    Returns:
        One comparison per trial, the best first.
    """
    order = [trials[place] for place in bootstrap.ranked(task.leading, [results for _, results in trials])]
    drawn = [bootstrap.draws(task.leading, results) for _, results in order]
    return tuple(
        PairedComparison(
            number=number,
            above=order[place - 1][0] if place else None,
            p_above=bootstrap.p_value(drawn[max(0, place - 1)], drawn[place]),
            p_best=bootstrap.p_value(drawn[0], drawn[place]),
        )
        for place, (number, _) in enumerate(order)
    )


def intervals(task: Task, results: Results) -> dict[str, tuple[float, float]]:
    """Metric of the task → its 95 % interval, for those that have one."""
    found = {m.name: bootstrap.interval(bootstrap.draws(m, results)) for m in task.measured}
    return {name: ends for name, ends in found.items() if ends is not None}


def resolution(evaluator: Evaluator, codes: Codes, names: Sequence[str]) -> dict[str, float]:
    """Metric of the task → the difference that the samples tell apart, in the metric's unit.

    It is half the width of the 95 % interval of a paired difference: the median over pairs of neighbours, when the
    candidates are ordered by the metric. It has two digits, so the order of sums does not matter.

    Args:
        evaluator: of the search.
        codes: candidates, int64, shape (candidates, parameters), such as some of a front.
        names: which metrics.
    """
    samples, task = evaluator.accuracy_samples, evaluator.job.task
    assert samples is not None, "metrics of the task are measured on samples"
    widths: dict[str, list[float]] = {name: [] for name in names}
    if "accuracy" in widths and task.classifies:
        answers = evaluator.answers(codes, samples.split, 0, samples.number)
        ranked = answers[np.argsort(-answers.sum(axis=1), kind="stable")]
        widths["accuracy"] = [PairedCounts.of(a, b).half_width for a, b in itertools.pairwise(ranked)]
        # No difference is smaller than one sample.
        widths["accuracy"] = [max(width, 1 / answers.shape[1]) for width in widths["accuracy"]]
    others = [metric for metric in task.all_metrics if metric.name in widths and not widths[metric.name]]
    of_samples = evaluator.results(codes, samples.split, samples.number) if others else []
    known = [results for results in of_samples if results is not None]
    for metric in others:
        drawn = [bootstrap.draws(metric, known[place]) for place in bootstrap.ranked(metric, known)]
        spreads = [float(np.std(a - b)) for a, b in itertools.pairwise(drawn)]
        widths[metric.name] = [Z95 * spread for spread in spreads if np.isfinite(spread)]
    return {name: float(f"{np.median(of):.2g}") if of else 0.0 for name, of in widths.items()}


def settled(answers: NDArray[np.bool_]) -> bool:
    """Whether the samples are enough to order the candidates by accuracy.

    They are if, for each candidate and the next more accurate one, the difference is significant or is known to within
    ``RESOLUTION``.

    Args:
        answers: whether each candidate classifies each sample correctly, bool, shape (candidates, samples).
    """
    ranked = answers[np.argsort(-answers.sum(axis=1), kind="stable")]
    pairs = [PairedCounts.of(first, second) for first, second in itertools.pairwise(ranked)]
    return all(pair.distinguishable or pair.half_width <= RESOLUTION for pair in pairs)


def settled_results(task: Task, candidates: Sequence[Results]) -> bool:
    """The same by the metric that leads, on the same draws of the samples.

    Args:
        task: what the samples are.
        candidates: the results per sample of each candidate.
    """
    metric = task.leading
    ranked = [candidates[place] for place in bootstrap.ranked(metric, candidates)]
    drawn = [bootstrap.draws(metric, results) for results in ranked]
    for better, (first, second) in zip(ranked, itertools.pairwise(drawn), strict=False):
        difference = first - second
        if not np.isfinite(difference).all() or bootstrap.p_value(first, second) < SIGNIFICANT:
            continue
        low, high = np.quantile(difference, [0.025, 0.975])
        if (high - low) / 2 > RESOLUTION * (1.0 if metric.share else abs(metric.value(better))):
            return False
    return True


def enough_samples(
    evaluator: Evaluator, split: str, seed: int, safe: Callable[[Codes], NDArray[np.bool_]] | None = None
) -> tuple[int, int]:
    """The number of samples that are enough to order typical candidates by accuracy, or by what leads in another task.

    The candidates are uniform ones and random ones of the space. The number of samples is doubled until it is enough,
    or the split has no more.

    Args:
        evaluator: of the search.
        split: the split whose samples are used.
        seed: random seed of the random candidates.
        safe: which of some candidates may be evaluated in this process; None: all.

    Returns:
        (number of samples, number of candidates that were evaluated).
    """
    space = evaluator.space
    codes: Codes = np.concatenate([space.uniform()[:UNIFORM], space.sample(RANDOM, np.random.default_rng(seed))])
    codes = codes[np.sort(np.unique(codes, axis=0, return_index=True)[1])] if codes.shape[1] else codes[:1]
    codes = codes if safe is None else codes[safe(codes)]
    available, task = len(evaluator.samples(split, None)[1]), evaluator.job.task
    used, answers = 0, np.zeros((len(codes), 0), dtype=bool)
    while used < available:
        more = min(available, max(FIRST_SAMPLES, 2 * used))
        if task.classifies:
            answers = np.concatenate([answers, evaluator.answers(codes, split, used, more)], axis=1)
            enough = settled(answers)
        else:
            results = evaluator.results(codes, split, more)
            enough = settled_results(task, [of for of in results if of is not None])
        used = more
        if enough:
            break
    return used, len(codes)
