"""Comparisons of strategies: runs are those of searches, every candidate is paid for once, numbers are what they say."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import bitfront as bf
from bitfront.engine.comparison import compare as contest
from bitfront.engine.evaluation import fixed
from bitfront.errors import ConfigError, RunError
from bitfront.pareto import hypervolume, non_dominated

#: 36 candidates.
SPACE = {
    "linear": {
        "name": ["integer"],
        "data_in_width": [4, 8],
        "data_in_frac_width": ["auto"],
        "weight_width": [2, 4, 8],
        "weight_frac_width": ["auto"],
    }
}
LARGER = {"linear": {**SPACE["linear"], "data_in_width": [3, 4, 6, 8], "weight_width": [2, 3, 4, 6, 8]}}
METRICS = {"accuracy": "maximize", "average_bitwidth": "minimize"}
STRATEGIES = ["evolution", "optuna:tpe", "optuna:nsgaii", "optuna:random"]


class Net(nn.Module):
    """8-6-3: the sites fc1, relu, fc2."""

    def __init__(self):
        super().__init__()
        self.fc1, self.relu, self.fc2 = nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc2(self.relu(self.fc1(x)))


@pytest.fixture(scope="module", autouse=True)
def undrawn():
    """Pictures have tests of their own, and take longer than all else here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("bitfront.report.comparison.can_draw", lambda: False)
        yield


@pytest.fixture(scope="module")
def given():
    """A model and its data. Little of it, so that no seed decides which samples are used."""
    rng = np.random.default_rng(0)
    y = np.arange(400) % 3
    x = (rng.normal(size=(3, 8))[y] * 1.5 + rng.normal(size=(400, 8))).astype(np.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
    return {"model": net, "data": {"train": (x[:200], y[:200]), "val": (x[200:], y[200:])}, "accelerator": "cpu"}


def compare(given, folder, **more):
    asked = {"space": SPACE, "metrics": METRICS, "project": "own", "project_dir": str(folder), **given, **more}
    return bf.compare(**asked)


@pytest.fixture(scope="module")
def known(given, tmp_path_factory):
    """400 candidates, all of them known; three seeds of forty evaluations."""
    folder = tmp_path_factory.mktemp("known")
    strategies = ["optuna:tpe", "brute-force", "evolution", "optuna:random"]
    return compare(given, folder, space=LARGER, strategies=strategies, seeds=3, n_trials=40)


# --- runs are those of searches


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_run_is_that_of_a_search_with_this_strategy_and_seed(known, given, tmp_path, strategy):
    own = compare(given, tmp_path, space=LARGER, strategies=[strategy], seeds=2, n_trials=40, seed=1)
    assert own.seeds == (1, 2)
    for course in own.courses:
        run = bf.search(
            space=LARGER, metrics=METRICS, strategy=strategy, seed=course.seed, n_trials=40, project="alone",
            project_dir=str(tmp_path), restart=True, **given,
        )  # fmt: skip
        assert np.array_equal(course.codes, run.columns.code)
        assert np.array_equal(course.losses, run.objectives.losses(run.columns.metrics))
    if strategy in known.strategies:
        # And beside others, answered from what brute force has evaluated.
        (beside,) = [c for c in known.of(strategy) if c.seed == 1]
        (alone,) = [c for c in own.courses if c.seed == 1]
        assert np.array_equal(beside.codes, alone.codes)
        assert np.array_equal(beside.losses, alone.losses)
        assert (beside.proposals, beside.repeats) == (alone.proposals, alone.repeats)


def test_brute_force_comes_first_and_goes_through_the_whole_space(known, given, tmp_path):
    assert known.strategies == ("brute_force", "optuna:tpe", "evolution", "optuna:random")
    (course,) = known.of("brute_force")
    run = bf.search(
        space=LARGER, metrics=METRICS, strategy="brute_force", project="alone", project_dir=str(tmp_path), **given
    )
    assert np.array_equal(course.codes, run.columns.code)
    assert len(course) == known.size == 400
    assert known.truth
    assert (course.repeats, course.stopped) == (0, "space exhausted")
    signs = np.array([-1.0, 1.0])
    front = np.unique(np.array([t.values for t in run.front]) * signs, axis=0)
    assert np.array_equal(known.front, front)


def test_a_run_evaluates_each_candidate_once(known):
    for course in known.courses:
        assert len({c.tobytes() for c in course.codes}) == len(course)
    assert all(c.repeats == 0 for c in known.of("evolution"))


# --- everything is paid for once


@pytest.fixture
def measured(monkeypatch):
    """Codes of everything that is evaluated, one by one."""
    seen = []
    own = fixed.FixedEvaluator.evaluate

    def measure(evaluator, codes):
        seen.extend(c.tobytes() for c in codes)
        return own(evaluator, codes)

    monkeypatch.setattr(fixed.FixedEvaluator, "evaluate", measure)
    monkeypatch.setattr("bitfront.engine.comparison.compare.seconds_per_candidate", lambda _: 1e-6)
    return seen


def test_every_candidate_is_evaluated_once_for_all(given, tmp_path, measured):
    own = compare(given, tmp_path, space=LARGER, strategies=STRATEGIES, seeds=2, n_trials=30)
    asked = {c.tobytes() for course in own.courses for c in course.codes}
    assert sorted(measured) == sorted([*asked, b""])  # and the float model
    assert own.evaluated == len(asked) < 8 * 30
    durations = {}
    for course in own.courses:
        assert len(course) == 30
        for code, seconds in zip(course.codes, course.evaluating, strict=True):
            assert durations.setdefault(code.tobytes(), seconds) == seconds, "the same for all"
    assert not own.truth

    again = compare(given, tmp_path, space=LARGER, strategies=STRATEGIES, seeds=2, n_trials=30)
    assert (again.evaluated, again.known) == (0, own.evaluated)
    assert all(np.array_equal(a.losses, b.losses) for a, b in zip(own.courses, again.courses, strict=True))
    assert all(np.array_equal(a.evaluating, b.evaluating) for a, b in zip(own.courses, again.courses, strict=True))
    more = compare(given, tmp_path, space=LARGER, strategies=["brute_force"], seeds=1)
    assert more.evaluated == 400 - own.evaluated
    assert compare(given, tmp_path, space=LARGER, strategies=["brute"], seeds=1, restart=True).evaluated == 400


def test_what_was_interrupted_goes_on(given, tmp_path, known):
    class Impatient(bf.Events):
        def progress(self, progress, plan):
            if plan.strategy == "evolution" and progress.done >= 20:
                raise KeyboardInterrupt

    asked = {"space": LARGER, "strategies": ["optuna:tpe", "evolution"], "seeds": 3, "n_trials": 40}
    with pytest.raises(KeyboardInterrupt):
        compare(given, tmp_path, events=Impatient(), **asked)
    own = compare(given, tmp_path, **asked)
    assert own.known >= 40
    assert own.evaluated + own.known == len({c.tobytes() for course in own.courses for c in course.codes})
    for course in own.courses:
        (before,) = [c for c in known.of(course.strategy) if c.seed == course.seed]
        assert np.array_equal(course.codes, before.codes)
        assert np.array_equal(course.losses, before.losses)


def test_a_candidate_that_failed_fails_for_all_and_is_tried_again_later(given, tmp_path, monkeypatch):
    own = fixed.FixedEvaluator.evaluate

    def measure(evaluator, codes):
        found = own(evaluator, codes)
        errors = tuple("RuntimeError: no" if c.sum() == 5 else e for c, e in zip(codes, found.errors, strict=True))
        return fixed.BatchMetrics(found.values, errors, found.seconds)

    asked = {"strategies": ["brute_force", "evolution"], "seeds": 2, "n_trials": 20}
    with monkeypatch.context() as patched:
        patched.setattr(fixed.FixedEvaluator, "evaluate", measure)
        broken = compare(given, tmp_path, **asked)
    for course in broken.courses:
        assert np.array_equal(np.isnan(course.losses).any(axis=1), course.codes.sum(axis=1) == 5)
        assert course.failed == (course.codes.sum(axis=1) == 5).sum()
    failed = int((broken.courses[0].codes.sum(axis=1) == 5).sum())
    assert failed > 0
    whole = compare(given, tmp_path, **asked)
    assert (whole.evaluated, whole.known) == (failed, 36 - failed)
    assert not np.isnan(whole.courses[0].losses).any()


# --- numbers are what they say


def test_standings_against_a_plain_computation(known):
    truth = known.of("brute_force")[0].losses
    front = truth[non_dominated(truth)]
    reference = front.max(axis=0) + 0.1 * np.ptp(front, axis=0)
    assert known.reference == pytest.approx(reference)
    whole = hypervolume(truth, reference)
    assert known.whole == pytest.approx(whole)
    for standing in known.standings:
        runs = known.of(standing.strategy)
        assert len(runs) == (1 if standing.strategy == "brute_force" else 3)
        for i, course in enumerate(runs):
            parts = [hypervolume(course.losses[: n + 1], reference) / whole for n in range(len(course))]
            assert course.volume == pytest.approx(parts)
            assert standing.regret.values[i] == pytest.approx(1 - parts[39], abs=1e-12)
            for place, level in enumerate((0.95, 0.99)):
                there = [n for n, part in enumerate(parts, 1) if part >= level - 1e-12]
                expected = there[0] if there else math.inf
                assert standing.evaluations[place].values[i] == expected
                clock = course.asking[expected - 1] + course.evaluating[:expected].sum() if there else math.inf
                assert standing.seconds[place].values[i] == pytest.approx(clock)
            best = min(course.losses[:40, 0])
            assert standing.shortfall.values[i] == pytest.approx(best - truth[:, 0].min())
            assert standing.asking.values[i] == course.asked >= course.asking[-1]
        assert standing.repeats.values == tuple(c.repeats for c in runs)
    (brute,) = [s for s in known.standings if s.strategy == "brute_force"]
    assert known.of("brute_force")[0].volume[-1] == 1.0
    assert math.isfinite(brute.evaluations[1].median)


def test_curves_are_medians_over_seeds(known):
    runs = known.of("evolution")
    band = known.curve("evolution")
    assert band.x.tolist() == list(range(1, 41))
    table = np.sort([c.volume for c in runs], axis=0)
    assert np.array_equal(band.median, table[1])
    assert band.low == pytest.approx((table[0] + table[1]) / 2)
    assert band.high == pytest.approx((table[1] + table[2]) / 2)
    best = known.curve("evolution", "best")
    assert np.array_equal(best.median, np.median([np.minimum.accumulate(c.losses[:, 0]) for c in runs], axis=0))
    clock = known.curve("evolution", "volume", "seconds")
    assert clock.x[-1] == max(c.seconds[-1] for c in runs)
    assert clock.median[-1] == band.median[-1]
    assert (np.diff(clock.median) >= 0).all()
    assert len(known.curve("brute_force").x) == 400


def test_seconds_are_the_strategys_own_and_those_of_evaluating(known):
    for course in known.courses:
        assert course.seconds == pytest.approx(course.asking + np.cumsum(course.evaluating))
        assert (np.diff(course.seconds) > 0).all()
        assert 0 < course.asking[0] <= course.asking[-1] <= course.asked


def test_without_the_truth_all_is_relative_to_the_best_known(given, tmp_path):
    own = compare(given, tmp_path, space=LARGER, strategies=["evolution", "optuna:random"], seeds=2, n_trials=30)
    assert not own.truth
    together = np.concatenate([c.losses for c in own.courses])
    assert np.array_equal(own.front, np.unique(together[non_dominated(together)], axis=0))
    assert all(c.volume[-1] <= 1.0 for c in own.courses)


def test_one_objective_has_a_shortfall_and_no_volume(given, tmp_path):
    own = compare(
        given, tmp_path, metrics={"loss": "minimize"}, strategies=["brute_force", "optuna:tpe"], seeds=2, n_trials=10
    )
    brute, tpe = own.standings
    assert brute.regret is None
    assert brute.evaluations == brute.seconds == ()
    assert brute.to_best.median == np.argmin(own.courses[0].losses[:, 0]) + 1
    assert min(tpe.shortfall.values) >= 0
    with pytest.raises(ConfigError, match="one objective has no hypervolume; ask for what = 'best'"):
        own.curve("optuna:tpe")
    assert len(own.curve("optuna:tpe", "best").x) == 10


def test_only_what_fulfils_the_constraints_counts(given, tmp_path):
    given = {**given, "search.constraints": {"average_bitwidth": "<= 5", "accuracy": ">= 0.3"}}
    own = compare(given, tmp_path, space=LARGER, strategies=["brute_force", "evolution"], seeds=2, n_trials=30)
    assert own.truth
    for course in own.courses:
        counted = ~np.isnan(course.losses).any(axis=1)
        assert counted.any()
        assert (course.losses[counted, 1] <= 5).all()
        assert (course.losses[counted, 0] <= -0.3).all()
    assert (own.front[:, 1] <= 5).all()
    assert own.constraints == ("average_bitwidth <= 5", "accuracy >= 0.3")
    # What the bits forbid was not even evaluated.
    assert len(own.courses[0]) < 400


def test_a_budget_beyond_the_space_is_the_space(given, tmp_path):
    own = compare(given, tmp_path, strategies=["optuna:random", "brute_force"], seeds=2)
    assert own.budget == own.size == 36
    assert {len(c) for c in own.courses} == {36}
    assert own.standings[1].regret.median == 0.0
    assert {c.stopped for c in own.courses} == {"space exhausted"}
    # Then the truth is known without brute force.
    assert compare(given, tmp_path, strategies=["evolution"], seeds=1).truth


def test_brute_force_comes_along_where_it_finishes(given, tmp_path, monkeypatch):
    notes = []

    class Noting(bf.Events):
        def note(self, text):
            notes.append(text)

    assert compare(given, tmp_path / "a", seeds=1, n_trials=10).strategies == ("brute_force", *contest.DEFAULT)
    monkeypatch.setattr(contest, "FINISHES", 0.0)
    own = compare(given, tmp_path / "b", seeds=1, n_trials=10, events=Noting())
    assert own.strategies == contest.DEFAULT
    assert any("brute force is not among them: for 36 candidates it would need" in note for note in notes)
    notes.clear()
    own = compare(given, tmp_path / "c", seeds=1, n_trials=10, max_size=20, events=Noting())
    assert own.strategies == contest.DEFAULT
    assert any("stops at max_size = 20" in note for note in notes)


# --- mistakes


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"strategies": ["brutal"]}, "--strategy brutal: there is no strategy called 'brutal'; allowed: brute_force, "),
        ({"strategies": ["optuna:tpee"]}, "there is no sampler 'tpee'; allowed: tpe, .* Did you mean 'tpe'?"),
        ({"strategies": ["evolution:tpe"]}, "a sampler belongs to strategy 'optuna', and this one is 'evolution'"),
        ({"strategies": ["optuna", "optuna:TPE"]}, "optuna:tpe is named twice"),
        ({"strategies": "brute", "max_size": 10}, "the space has 36 candidates, .* stops at max_size = 10"),
        ({"seeds": 0}, "--seeds: 0 is not possible; allowed: 1 or more"),
    ],
)
def test_mistakes_are_told_before_any_work(given, tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        compare(given, tmp_path, **more)
    assert not list(tmp_path.iterdir())


def test_halving_is_refused(given, tmp_path):
    halving = {"rungs": [1], "keep": 0.5}
    trained = {"name": "evolution", "sw_runner": {"basic_train": {"max_epochs": 2, "halving": halving}}}
    config = bf.Config.model_validate({"search": {"search_space": {}, "strategy": trained}})
    with pytest.raises(ConfigError, match="strategies cannot share results; leave it out"):
        contest.prepared(config)


def test_results_of_another_configuration_are_not_used(given, tmp_path):
    compare(given, tmp_path, strategies=["evolution"], seeds=1, n_trials=10)
    # For other objectives they are.
    metrics = {"loss": "minimize", "accuracy": "maximize", "average_bitwidth": "minimize"}
    assert compare(given, tmp_path, metrics=metrics, strategies=["evolution"], seeds=1, n_trials=10).known >= 10
    with pytest.raises(RunError, match="compare: this run folder holds trials of another configuration"):
        compare(given, tmp_path, space=LARGER, strategies=["evolution"], seeds=1)


def test_a_strategy_that_was_not_compared(known):
    with pytest.raises(ConfigError, match=r"'optuna:tp' was not compared; allowed: .* Did you mean 'optuna:tpe'?"):
        known.of("optuna:tp")
    assert repr(known).endswith("brute_force, optuna:tpe, evolution, optuna:random; 3 seeds, 40 evaluations each)")
