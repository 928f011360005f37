"""Terms of a summed objective that cannot change which candidate is better, because another term's steps are larger.

A scale that is a little too small makes a search for one metric of what should be a compromise, and nothing in its
results says so.
"""

from __future__ import annotations

import numpy as np

from bitfront.engine.evaluation.interface import Evaluator
from bitfront.learned_bits.space import LearnedBitsSpace
from bitfront.objectives import Objectives

#: Candidates whose costs are looked at, besides those with one precision everywhere.
CANDIDATES = 256


def outweighed(evaluator: Evaluator, objectives: Objectives) -> list[str]:
    """A remark on each term whose whole range is smaller than the smallest step of another term.

    Looked at are metrics in closed form that do not depend on the values of weights, over some candidates of the space,
    and the accuracy, whose steps follow from the number of samples.

    Args:
        evaluator: of the search.
        objectives: of the search; where they are not summed, there is nothing to say.
    """
    if not objectives.summed or isinstance(evaluator.space, LearnedBitsSpace):
        return []
    costs = _costs(evaluator, objectives)
    ranges = {name: _range(values) for name, values in costs.items()}
    scales = {part.metric: abs(part.scale) for part in objectives.parts}
    leading, samples = evaluator.job.task.leading.name, evaluator.accuracy_samples
    what = {name: f"the smallest step of {name} among {len(values)} candidates" for name, values in costs.items()}
    if evaluator.job.task.classifies and leading in scales and samples is not None and not samples.auto:
        number = len(evaluator.samples(samples.split, samples.number)[1])
        ranges[leading] = (1.0, 1.0 / number)
        what[leading] = f"one sample of {number:,} in {leading}"
    notes = []
    for name, (width, _) in ranges.items():
        for other, (_, step) in ranges.items():
            scaled, theirs = width * scales[name], step * scales[other]
            if name != other and 0 < scaled < theirs:
                notes.append(
                    f"{name} hardly counts in the sum: scaled, it changes by {scaled:.2g} at most, less than "
                    f"{what[other]}, {theirs:.2g}. It decides between candidates that are equal there. To make it "
                    f"count, multiply metrics.{name}.scale by more than {theirs / scaled:.2g}"
                )
    return notes


def _costs(evaluator: Evaluator, objectives: Objectives) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Metric in closed form → its values over some candidates."""
    space = evaluator.space
    wanted = {part.metric for part in objectives.parts} & (evaluator.closed_form - evaluator.of_weights)
    if not wanted:
        return {}
    codes = space.uniform()
    if not space.changes_widths:  # each of other widths would be a network to build
        codes = np.concatenate([codes, space.sample(CANDIDATES, np.random.default_rng(0))])
    return {name: np.asarray(values) for name, values in evaluator.closed_form_values(codes, wanted).items()}


def _range(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, float]:
    """(largest minus smallest, smallest difference of two that differ) of finite values; (0, 0) of fewer than two."""
    distinct = np.unique(values[np.isfinite(values)])
    if len(distinct) < 2:
        return 0.0, 0.0
    return float(distinct[-1] - distinct[0]), float(np.diff(distinct).min())
