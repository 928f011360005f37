"""Wilson intervals and McNemar's test against independent implementations."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from bitfront.engine.search.paired import RESOLUTION, compare, resolution, settled
from bitfront.metrics.base import SampleChoice
from bitfront.metrics.intervals import PairedCounts, wilson
from bitfront.tasks.classification import CLASSIFICATION
from bitfront.tasks.regression import Regression, RegressionSettings


@given(st.integers(0, 200), st.integers(1, 200))
def test_wilson_is_scipys(hits, more):
    samples = hits + more
    low, high = binomtest(hits, samples).proportion_ci(method="wilson")
    assert wilson(hits / samples, samples) == pytest.approx((low, high), abs=1e-12)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(first, second):
    paired = PairedCounts(first, second, 1000)
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert paired.p == pytest.approx(expected, abs=1e-9)
    assert paired.p == PairedCounts(second, first, 1000).p


@given(st.integers(0, 40_000), st.integers(-2_000, 2_000))
def test_mcnemar_of_very_many_samples(first, more):
    second = max(0, first + more)
    expected = min(1.0, 2 * binom.cdf(min(first, second), first + second, 0.5))
    # Below that SciPy's becomes 0 before ours does.
    assert PairedCounts(first, second, 100_000).p == pytest.approx(expected, rel=1e-7, abs=1e-250)


def test_mcnemars_published_example():
    # Agresti, Categorical Data Analysis: 150 against 86 of 236 discordant pairs, chi-square 17.36, p about 3e-5.
    assert PairedCounts(150, 86, 1600).p == pytest.approx(3.7e-5, rel=0.2)


def test_pairs_are_counted_from_answers():
    first = np.array([1, 1, 0, 0, 1], dtype=bool)
    second = np.array([1, 0, 1, 0, 0], dtype=bool)
    paired = PairedCounts.of(first, second)
    assert (paired.only_first, paired.only_second, paired.samples) == (2, 1, 5)
    assert paired.difference == pytest.approx(0.2)


def test_the_interval_of_a_difference_covers_it_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits, rounds = 0, 400
    for _ in range(rounds):
        draws = rng.choice(3, size=500, p=[0.85, 0.10, 0.05])
        paired = PairedCounts(int((draws == 1).sum()), int((draws == 2).sum()), 500)
        hits += abs(paired.difference - 0.05) <= paired.half_width
    assert 0.92 <= hits / rounds <= 0.98


def test_a_front_is_compared_from_the_most_accurate_down():
    answers = np.zeros((3, 100), dtype=bool)
    answers[0, :60], answers[1, :90], answers[2, :89] = True, True, True
    best, second, last = compare([7, 8, 9], answers)
    assert (best.number, best.above, best.p_best) == (8, None, 1.0)
    assert (second.number, second.above) == (9, 8)
    assert second.p_above == 1.0
    assert (last.number, last.above) == (7, 9)
    assert last.p_best < 1e-6


def test_an_order_is_settled_when_neighbours_differ_clearly_or_hardly():
    rng = np.random.default_rng(0)

    def candidates(samples):
        good = rng.random(samples) < 0.9
        return np.stack([good, good & (rng.random(samples) > 0.02), rng.random(samples) < 0.5])

    assert not settled(candidates(100))
    assert settled(candidates(20_000))
    # Two that are equally good and independent are settled once the difference is known to half a percent.
    coin = rng.random((2, 100_000)) < 0.9
    assert PairedCounts.of(*coin).half_width < RESOLUTION
    assert settled(coin)
    assert not settled(coin[:, :1000])


class Measured:
    """Stands in for an evaluator: candidates with the answers and squared errors that are given."""

    accuracy_samples = SampleChoice("val", None)

    def __init__(self, task, given):
        self.job, self.given = SimpleNamespace(task=task), given

    def answers(self, codes, split, start, stop):
        return self.given[codes[:, 0]]

    def results(self, codes, split, number):
        squared = self.given[codes[:, 0]]
        return [{"squared": row[:, None], "samples": np.ones(len(row))} for row in squared]


def test_the_resolution_is_half_the_interval_of_neighbours():
    rng = np.random.default_rng(0)
    codes = np.arange(4)[:, None]
    right = np.arange(400) < 300
    answers = np.stack([right, right, right, right])
    for row, (wrong, better) in enumerate([(0, 0), (9, 4), (20, 8), (60, 20)]):
        answers[row, :wrong] = False
        answers[row, 300 : 300 + better] = True
    # Neighbours differ in 9 + 4, 20 - 9 + 8 - 4 and 60 - 20 + 20 - 8 samples.
    half = [1.96 * np.sqrt(n - d * d / 400) / 400 for n, d in ((13, 5), (15, 7), (52, 28))]
    found = resolution(Measured(CLASSIFICATION, answers), codes, ["accuracy"])
    assert found == {"accuracy": pytest.approx(half[1], rel=0.05)}
    same = resolution(Measured(CLASSIFICATION, answers[:1].repeat(4, axis=0)), codes, ["accuracy"])
    assert same == {"accuracy": 1 / 400}
    squared = rng.exponential(size=(4, 600)) + np.arange(4)[:, None]
    found = resolution(Measured(Regression(RegressionSettings()), squared), codes, ["mse"])
    half = [1.96 * np.std(b - a) / np.sqrt(600) for a, b in itertools.pairwise(squared)]
    assert found == {"mse": pytest.approx(np.median(half), rel=0.15)}
