"""Bootstrap intervals and paired comparisons, against theory and SciPy."""

from functools import partial

import numpy as np
import pytest
from scipy.stats import bootstrap as scipys
from scipy.stats import norm, rankdata

from bitfront.metrics.bootstrap import GROUPS, draws, interval, p_value, ranked
from bitfront.tasks.base import TaskMetric, mean

MEAN = TaskMetric("error", "", "minimize", "mean", partial(mean, name="error"))


def results(values):
    return {"error": np.asarray(values, dtype=np.float64), "samples": np.ones(len(values))}


@pytest.mark.parametrize("count", [200, 5 * GROUPS + 7])
def test_the_interval_of_a_mean_is_that_of_theory(count):
    values = np.random.default_rng(1).exponential(size=count)
    low, high = interval(draws(MEAN, results(values)))
    half = norm.ppf(0.975) * values.std() / np.sqrt(count)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)


def test_so_it_is_scipys():
    values = np.random.default_rng(2).exponential(size=300)
    low, high = interval(draws(MEAN, results(values)))
    theirs = scipys((values,), np.mean, n_resamples=4000, method="percentile", rng=0).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_a_metric_of_all_samples_is_drawn_too():
    def auc(of):
        score, positive = of["error"], of["positive"] > 0
        ranks = rankdata(score)
        ahead = ranks[positive].sum() - positive.sum() * (positive.sum() + 1) / 2
        return float(ahead / (positive.sum() * (~positive).sum()))

    metric = TaskMetric("auc", "", "maximize", "area", auc, share=True, additive=False)
    rng = np.random.default_rng(3)
    positive = np.arange(400) % 2
    given = {**results(rng.normal(size=400) + positive), "positive": positive.astype(float)}
    low, high = interval(draws(metric, given))
    assert low < auc(given) < high
    assert 0.05 < high - low < 0.15


def test_draws_are_the_same_again_and_pairs_share_them():
    rng = np.random.default_rng(4)
    common = rng.normal(size=500)
    one, two = results(common + 10.0), results(common + 10.0 + 0.01 * rng.normal(size=500) + 0.004)
    first, second = draws(MEAN, one), draws(MEAN, two)
    assert np.array_equal(first, draws(MEAN, one))
    # Alone their intervals are the same; in pairs a difference of 0.4 % of their spread is certain.
    assert interval(first)[0] < interval(second)[0] < interval(first)[1]
    assert p_value(first, second) < 0.01
    assert p_value(first, second) == p_value(second, first)
    assert p_value(first, first) == 1.0
    assert ranked(MEAN, [two, one, one]) == [1, 2, 0]


def test_equal_candidates_differ_by_chance_only():
    rng = np.random.default_rng(5)
    ps = [p_value(*(draws(MEAN, results(rng.normal(size=100))) for _ in range(2))) for _ in range(100)]
    assert 0 <= np.mean(np.array(ps) < 0.05) <= 0.13


def test_what_has_no_value_has_no_interval():
    broken = draws(MEAN, results([1.0, np.nan, 2.0]))
    assert interval(broken) is None
    assert p_value(broken, broken + 1) == 1.0
