"""The time that a search says before its first candidate."""

from types import SimpleNamespace

import pytest

from bitfront.engine.evaluation.verification import Verification
from bitfront.engine.planning.probe import Timing, expected_seconds


def plan_of(samples=16, n_trials=25, n_jobs=1, timeout=None):
    setup = SimpleNamespace(n_jobs=n_jobs, timeout=timeout)
    evaluator = SimpleNamespace(
        accuracy_samples=SimpleNamespace(split="val", number=None),
        samples=lambda split, number: (None, range(samples)),
        float_evaluator=lambda: SimpleNamespace(chunk=2048),
    )
    settings = SimpleNamespace(strategy=SimpleNamespace(setup=setup))
    return SimpleNamespace(evaluator=evaluator, settings=settings, n_trials=n_trials, workers=n_jobs)


def test_what_happens_once_is_no_more_than_what_the_check_took_for_it():
    check = Verification(candidates=8, together=10.0)
    # The first candidate was slow for another reason: with all options, eight candidates took 10 s, of 1 s each.
    assert expected_seconds(plan_of(), Timing(1.0, 30.0), 20, check) == pytest.approx(2.0 + 20.0)
    assert expected_seconds(plan_of(), Timing(1.0, 0.5), 20, check) == pytest.approx(0.5 + 20.0)
    assert expected_seconds(plan_of(), Timing(2.0, 30.0), 20, check) == pytest.approx(40.0)
    # The check had 64 of 128 samples.
    assert expected_seconds(plan_of(128), Timing(2.0, 30.0), 20, check) == pytest.approx(2.0 + 40.0)


def test_the_end_is_that_of_a_front_whose_members_run_twice():
    check = Verification(candidates=8, alone=0.5)
    assert expected_seconds(plan_of(), Timing(0.0), 0, check) == pytest.approx(2 * 5 * 0.5)
    assert expected_seconds(plan_of(128), Timing(0.0), 0, check) == pytest.approx(2 * 2 * 5 * 0.5)
    # No more than 100 members are checked, and a timeout ends what is before them.
    assert expected_seconds(plan_of(n_trials=10**6, timeout=7.0), Timing(1.0), 10**6, check) == pytest.approx(107.0)
    assert expected_seconds(plan_of(n_jobs=2), Timing(1.0), 10, Verification()) == pytest.approx(5.0)
