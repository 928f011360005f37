"""By how much the front looks better on the samples of its search than on the test split.

A search evaluates many candidates on the same samples, and keeps those that are best there. Some of them are so by
chance: on other samples the front is worse than it looked. This difference is the *optimism* of the search (Efron 1983
has the word for the same effect of fitting). It is measured: how far below the float model the front is on the test
split, minus the same on the samples of the search. The float model is on both sides, so a split that is easier for all
networks does not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bitfront.engine.storage.records import Optimism
from bitfront.metrics import bootstrap
from bitfront.tasks.base import Results, TaskMetric


def spread_of_answers(of_float: NDArray[np.bool_], answers: NDArray[np.bool_]) -> float:
    """The standard error of how far candidates are below the float model on average, as a share.

    It is taken as if one more sample differed. Otherwise candidates that answer all samples as the float model does
    would be known without any error, and the first other sample that differs would look like a proof.

    Args:
        of_float: which samples the float model classifies correctly, shape (samples,).
        answers: the same of the candidates, shape (candidates, samples).
    """
    worse = of_float - answers.mean(axis=0)
    return float(np.hypot(worse.std() / np.sqrt(len(worse)), 1 / len(worse)))


def spread_of_results(metric: TaskMetric, of_float: Results, results: Sequence[Results]) -> float | None:
    """The same of the metric that leads in another task, in its unit, from the same draws of the samples; None where a
    draw has no value."""
    drawn = np.mean([bootstrap.draws(metric, of) for of in results], axis=0) - bootstrap.draws(metric, of_float)
    return float(np.std(drawn)) if np.isfinite(drawn).all() else None


def optimism(
    leading: TaskMetric,
    reference: tuple[float, float],
    values: Mapping[int, float],
    tested: Mapping[int, float],
    spread: float,
    samples: tuple[int, int],
) -> Optimism | None:
    """The optimism of a search.

    Args:
        leading: the metric of the task that leads.
        reference: of the float model, on the samples of the search and on the test split.
        values: number of a trial of the front → its value on the samples of the search.
        tested: the same on the test split; trials that have no value on both are left out.
        spread: standard error of the mean difference from the float model on the samples of the search.
        samples: numbers of samples of the search and of the test split. A difference on the test split is taken to have
            the same spread per sample.

    Returns:
        None where nothing was tested, and where the float model is 0 in a metric that is no share.
    """
    sign = -1.0 if leading.direction == "maximize" else 1.0
    both = [(value, tested[n]) for n, value in values.items() if n in tested and np.isfinite([value, tested[n]]).all()]
    units = [1.0, 1.0] if leading.share else [abs(value) for value in reference]
    if not both or not np.isfinite(reference).all() or min(units) <= 0:
        return None
    here, there = (
        100 * sign * float(np.mean(of_split) - of_float) / unit
        for of_split, of_float, unit in zip(zip(*both, strict=True), reference, units, strict=True)
    )
    error = 100 * spread * float(np.hypot(1 / units[0], np.sqrt(samples[0] / samples[1]) / units[1]))
    return Optimism(len(both), here, there, error)
