"""The arithmetic of a comparison, against the simplest computation of each figure."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitfront.engine.comparison import curves
from bitfront.pareto import hypervolume, reference_point


def losses(seed, count, objectives, failing=0.2):
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 9, (count, objectives)).astype(np.float64)
    table[rng.random(count) < failing] = np.nan
    return table


@given(st.integers(0, 2**32), st.integers(1, 120), st.integers(2, 4))
def test_volumes_are_the_hypervolume_of_every_prefix(seed, count, objectives):
    table = losses(seed, count, objectives)
    reference = np.full(objectives, 7.5)
    volumes = curves.volumes(table, reference)
    for end in range(1, count + 1):
        assert volumes[end - 1] == pytest.approx(hypervolume(table[:end], reference), abs=1e-9)


def test_volumes_of_a_long_run_and_by_hand():
    table = losses(1, 20_000, 2)
    assert curves.volumes(table, np.full(2, 8.5))[-1] == hypervolume(table, np.full(2, 8.5))
    steps = np.array([[2, 2], [np.nan, 0], [9, 0], [1, 3], [2, 2], [0, 0]], dtype=float)
    assert curves.volumes(steps, np.array([4.0, 4.0])).tolist() == [4, 4, 4, 5, 5, 16]


def test_nothing_counts_beyond_the_reference_point():
    assert curves.volumes(np.array([[5.0, 1.0], [4.0, 4.0], [np.inf, 0.0]]), np.array([4.0, 4.0])).tolist() == [0, 0, 0]


@given(st.integers(0, 2**32), st.integers(1, 50))
def test_the_best_so_far_is_the_least_of_every_prefix(seed, count):
    column = losses(seed, count, 1, failing=0.5)[:, 0]
    for end, best in enumerate(curves.best_so_far(column), 1):
        known = [v for v in column[:end].tolist() if not math.isnan(v)]
        assert best == min(known, default=math.inf)


@given(st.lists(st.one_of(st.floats(0, 1000), st.just(math.inf)), min_size=2, max_size=9))
def test_medians_and_quartiles(values):
    spread = curves.spread(values)
    assert spread.values == tuple(values)
    assert spread.reached == sum(map(math.isfinite, values))
    if spread.reached == len(values):
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        assert (spread.low, spread.median, spread.high) == pytest.approx((low, median, high))
    else:
        # Infinity counts as larger than every finite value; by how much does not matter.
        large = [min(v, 1e12) for v in values]
        low, median, high = statistics.quantiles(large, n=4, method="inclusive")
        for value, expected in ((spread.low, low), (spread.median, median), (spread.high, high)):
            assert value == math.inf if expected > 1e9 else value == pytest.approx(expected)


def test_the_median_of_one_seed_is_its_value():
    assert curves.spread([3.0]) == curves.Spread((3.0,), 3.0, 3.0, 3.0)


@given(st.integers(0, 2**32), st.integers(1, 40), st.floats(0, 1))
def test_evaluations_until_a_level(seed, count, level):
    curve = np.sort(np.random.default_rng(seed).random(count))
    reached = [n for n in range(1, count + 1) if curve[n - 1] >= level]
    assert curves.first_reaching(curve, level) == (reached[0] if reached else math.inf)


def test_a_level_missed_by_rounding_counts_as_reached():
    assert curves.first_reaching(np.array([0.5, 0.1 + 0.2 + 0.6]), 0.9) == 2.0


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([[0, 10], [1, 6], [2, 5], [9, 9]], [2 + 0.2, 10 + 0.5]),  # worst of the front, a tenth of its extent beyond
        ([[1, 1], [3, 5]], [1 + 0.2, 1 + 0.4]),  # a front of one: a tenth of the extent of all
        ([[2, -4]], [2.2, -4 + 0.4]),  # one result
        ([[0, 0], [np.nan, 7]], [0.1, 0.1]),  # what failed does not count
    ],
)
def test_the_reference_point(results, expected):
    assert reference_point(np.array(results, dtype=float)) == pytest.approx(np.array(expected))


def test_curves_at_evaluations_and_at_moments():
    runs = [np.array([1.0, 2.0, 3.0]), np.array([5.0]), np.zeros(0)]
    assert curves.at_evaluations(runs, 4, before=-1.0).tolist() == [[1, 2, 3, 3], [5, 5, 5, 5], [-1] * 4]
    seconds = [np.array([0.5, 1.0, 4.0]), np.array([2.0]), np.zeros(0)]
    rows = curves.at_moments(runs, seconds, np.array([0.4, 0.5, 2.0, 9.0]), before=-1.0)
    assert rows.tolist() == [[-1, 1, 2, 3], [-1, -1, 5, 5], [-1] * 4]
