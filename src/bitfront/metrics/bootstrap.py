"""Intervals and paired comparisons of any metric, from results per sample: the bootstrap (Efron 1979).

Samples are drawn again with replacement, and the metric is computed of each draw. An interval is that between the
2.5 % and the 97.5 % quantiles. Two candidates are compared on the same draws, so what they have in common does not
count. Draws are seeded: the same results give the same intervals.

The sums over samples of an additive metric are drawn, not the samples, so a draw costs little. Of many samples the sums
of groups are drawn: the spread of a mean is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bitfront.tasks.base import Results, TaskMetric

#: Number of draws; fewer for a metric that needs every sample of a draw.
DRAWS, DRAWS_OF_SAMPLES = 1000, 200
#: More samples than this are drawn in groups of equal size, as far as possible.
GROUPS = 2000

Values = NDArray[np.float64]


def draws(metric: TaskMetric, results: Results, seed: int = 0) -> Values:
    """The metric of each draw, float64, shape (draws,). The draws of one number of samples are always the same.

    Args:
        metric: what is computed.
        results: per sample, of one model.
        seed: random seed of the draws.
    """
    count = len(results["samples"])
    with np.errstate(all="ignore"):
        if not metric.additive:
            rng = np.random.default_rng(seed)
            rows = (rng.integers(count, size=count) for _ in range(DRAWS_OF_SAMPLES))
            return np.array([metric.value({name: r[drawn] for name, r in results.items()}) for drawn in rows])
        order, times = _drawn(count, seed)
        grouped, size = _grouped(results, order), times.shape[1]
        sums = {name: (times @ r.reshape(size, -1)).reshape(DRAWS, 1, *r.shape[1:]) for name, r in grouped.items()}
        return np.array([metric.value({name: s[d] for name, s in sums.items()}) for d in range(DRAWS)])


@lru_cache(maxsize=2)
def _drawn(count: int, seed: int) -> tuple[NDArray[np.int64], Values]:
    """(the samples in a random order, how often each draw has each group of them, shape (draws, groups)). Kept, as
    many candidates are drawn in the same way."""
    rng, size = np.random.default_rng(seed), min(count, GROUPS)
    order = rng.permutation(count) if count > GROUPS else np.arange(count)
    return order, rng.multinomial(size, np.full(size, 1 / size), size=DRAWS).astype(np.float64)


def _grouped(results: Results, order: NDArray[np.int64]) -> dict[str, Values]:
    """The results, as sums over groups of samples in this order if there are many."""
    count = len(order)
    if count <= GROUPS:
        return dict(results)
    edges = np.linspace(0, count, GROUPS + 1).astype(np.int64)[:-1]
    return {name: np.add.reduceat(r[order], edges, axis=0) for name, r in results.items()}


def interval(drawn: Values) -> tuple[float, float] | None:
    """The 95 % interval of a metric from its draws; None where some have no value."""
    if not np.isfinite(drawn).all():
        return None
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def p_value(first: Values, second: Values) -> float:
    """The two-sided p-value of the difference of two candidates, from their metrics on the same draws; 1 if they never
    differ. At least 2 / (draws + 1)."""
    difference = first - second
    if not np.isfinite(difference).all() or not difference.any():
        return 1.0
    fewer = min(int((difference <= 0).sum()), int((difference >= 0).sum()))
    return min(1.0, 2.0 * (fewer + 1) / (len(difference) + 1))


def ranked(metric: TaskMetric, results: Sequence[Results]) -> list[int]:
    """The places of some candidates, the best first; equally good ones in the given order."""
    sign = 1.0 if metric.direction == "minimize" else -1.0
    values = np.array([sign * metric.value(of) for of in results])
    return [int(place) for place in np.argsort(values, kind="stable")]
