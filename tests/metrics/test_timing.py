"""Statistics exactly, and turns that are fair; nothing about how fast this machine is."""

import numpy as np
import pytest

from bitfront.metrics.timing import MOST_RUNS, TURN, WINDOW, summarise, time_in_turns, warm_up


def test_median_and_percentile_of_given_samples():
    summary = summarise(np.array([5.0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 100]))
    assert (summary.median, summary.p90) == (6, 10)
    assert summarise(np.array([1.0, 2])).p90 == pytest.approx(1.9)


def test_the_interval_is_that_of_seeded_resamples():
    samples = np.random.default_rng(3).gamma(2.0, 1.0, 200)
    summary = summarise(samples, seed=7)
    rng = np.random.default_rng(7)
    medians = [np.median(samples[rng.integers(0, 200, 200)]) for _ in range(1000)]
    assert (summary.low, summary.high) == pytest.approx(tuple(np.percentile(medians, [2.5, 97.5])), abs=0.05)
    assert summary.low < summary.median < summary.high
    assert summarise(samples, seed=7) == summary
    assert summarise(np.full(9, 2.0)) == summarise(np.full(3, 2.0))


@pytest.mark.long
@pytest.mark.slow
def test_the_interval_covers_the_median_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [f.low <= 1.0 <= f.high for f in (summarise(rng.normal(1.0, 1.0, 60)) for _ in range(100))]
    assert 86 <= sum(hits) <= 100


def fake(times):
    """A run that takes the next of the given times; the last one for ever."""
    queue = list(times)
    return lambda: queue.pop(0) if len(queue) > 1 else queue[0]


def test_warm_up_ends_when_times_have_settled():
    assert warm_up(fake([1.0]), 1e9) == 2 * WINDOW
    assert warm_up(fake([10.0] * WINDOW + [1.0]), 1e9) == 3 * WINDOW
    falling = [2.0**-i for i in range(400)]
    assert warm_up(fake(falling), 1.99) < 2 * WINDOW  # a cap, not for ever
    assert warm_up(fake([5.0]), 0.1) == 2


def test_everybody_has_as_many_runs_in_turns_of_random_order():
    order = []

    def run(i):
        order.append(i)
        return float(i)

    times = time_in_turns([lambda i=i: run(i) for i in range(3)], 1e-9, 4 * TURN)
    assert [len(s) for s in times] == [4 * TURN] * 3
    assert [set(s) for s in times] == [{0.0}, {1.0}, {2.0}]
    turns = order[-4 * 3 * (TURN + 1) :: TURN + 1]
    assert [sorted(turns[i : i + 3]) for i in range(0, 12, 3)] == [[0, 1, 2]] * 4
    assert len({tuple(turns[i : i + 3]) for i in range(0, 12, 3)}) > 1


def test_runs_are_bounded_and_nothing_is_timed_where_there_is_nothing():
    assert MOST_RUNS <= len(time_in_turns([lambda: 1.0], 1e9, 1)[0]) < MOST_RUNS + TURN
    assert time_in_turns([], 1.0, 5) == []


def test_on_a_machine_that_slows_down_the_slower_one_still_loses():
    """Its speed falls by a factor of three while they are measured: one after the other would turn them round."""
    ticks = iter(range(10**9))
    drift = lambda: 1 + 2 * min(1.0, next(ticks) / 4000)  # noqa: E731
    fast, slow = time_in_turns([lambda: 1.0 * drift(), lambda: 1.1 * drift()], 1e-9, 1500)
    assert summarise(fast).median < summarise(slow).median
