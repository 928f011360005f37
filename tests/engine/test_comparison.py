"""Comparisons of strategies: runs are those of searches, every candidate is paid for once, numbers are what they say."""

import math
import time

import numpy as np
import pytest
import torch
from torch import nn

import bitfront as bf
from bitfront.engine.comparison import compare as compare_module
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
    """Figures are tested elsewhere, and take longer than all else here."""
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
    asked = {"space": SPACE, "metrics": METRICS, "project": "compared", "project_dir": str(folder), **given, **more}
    return bf.compare(**asked)


@pytest.fixture(scope="module")
def known(given, tmp_path_factory):
    """400 candidates, all of them known; three seeds of forty evaluations."""
    folder = tmp_path_factory.mktemp("known")
    strategies = ["optuna:tpe", "brute-force", "evolution", "optuna:random"]
    return compare(given, folder, space=LARGER, strategies=strategies, seeds=3, n_trials=40)


# --- runs are those of searches


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_run_is_that_of_a_search_with_this_strategy_and_seed(known, given, tmp_path, strategy):
    comparison = compare(given, tmp_path, space=LARGER, strategies=[strategy], seeds=2, n_trials=40, seed=1)
    assert comparison.seeds == (1, 2)
    for run in comparison.runs:
        search = bf.search(
            space=LARGER, metrics=METRICS, strategy=strategy, seed=run.seed, n_trials=40, project="alone",
            project_dir=str(tmp_path), restart=True, **given,
        )  # fmt: skip
        assert np.array_equal(run.codes, search.columns.code)
        assert np.array_equal(run.losses, search.objectives.losses(search.columns.metrics))
    if strategy in known.strategies:
        # And beside others, answered from what brute force has evaluated.
        (beside,) = [r for r in known.of(strategy) if r.seed == 1]
        (alone,) = [run for run in comparison.runs if run.seed == 1]
        assert np.array_equal(beside.codes, alone.codes)
        assert np.array_equal(beside.losses, alone.losses)
        assert (beside.proposals, beside.repeats) == (alone.proposals, alone.repeats)


def test_brute_force_comes_first_and_goes_through_the_whole_space(known, given, tmp_path):
    assert known.strategies == ("brute_force", "optuna:tpe", "evolution", "optuna:random")
    (run,) = known.of("brute_force")
    search = bf.search(
        space=LARGER, metrics=METRICS, strategy="brute_force", project="alone", project_dir=str(tmp_path), **given
    )
    assert np.array_equal(run.codes, search.columns.code)
    assert len(run) == known.size == 400
    assert known.truth
    assert (run.repeats, run.stopped) == (0, "space exhausted")
    signs = np.array([-1.0, 1.0])
    front = np.unique(np.array([t.values for t in search.front]) * signs, axis=0)
    assert np.array_equal(known.front, front)


def test_a_run_evaluates_each_candidate_once(known):
    for run in known.runs:
        assert len({c.tobytes() for c in run.codes}) == len(run)
    assert all(c.repeats == 0 for c in known.of("evolution"))


# --- everything is paid for once


@pytest.fixture
def measured(monkeypatch):
    """Codes of everything that is evaluated, one by one."""
    seen = []
    evaluate = fixed.FixedEvaluator.evaluate

    def measure(evaluator, codes):
        seen.extend(c.tobytes() for c in codes)
        return evaluate(evaluator, codes)

    monkeypatch.setattr(fixed.FixedEvaluator, "evaluate", measure)
    monkeypatch.setattr("bitfront.engine.comparison.compare.seconds_per_candidate", lambda *_: 1e-6)
    return seen


def test_every_candidate_is_evaluated_once_for_all(given, tmp_path, measured):
    comparison = compare(given, tmp_path, space=LARGER, strategies=STRATEGIES, seeds=2, n_trials=30)
    asked = {c.tobytes() for run in comparison.runs for c in run.codes}
    assert sorted(measured) == sorted([*asked, b""])  # and the float model
    assert comparison.evaluated == len(asked) < 8 * 30
    durations = {}
    for run in comparison.runs:
        assert len(run) == 30
        for code, seconds in zip(run.codes, run.evaluating, strict=True):
            assert durations.setdefault(code.tobytes(), seconds) == seconds, "the same for all"
    assert not comparison.truth

    again = compare(given, tmp_path, space=LARGER, strategies=STRATEGIES, seeds=2, n_trials=30)
    assert (again.evaluated, again.known) == (0, comparison.evaluated)
    assert all(np.array_equal(a.losses, b.losses) for a, b in zip(comparison.runs, again.runs, strict=True))
    assert all(np.array_equal(a.evaluating, b.evaluating) for a, b in zip(comparison.runs, again.runs, strict=True))
    more = compare(given, tmp_path, space=LARGER, strategies=["brute_force"], seeds=1)
    assert more.evaluated == 400 - comparison.evaluated
    # From here on the truth is known, also to strategies that are compared later.
    later = compare(given, tmp_path, space=LARGER, strategies=["evolution"], seeds=2, n_trials=30)
    assert (later.truth, later.evaluated) == (True, 0)
    assert np.array_equal(later.front, more.front)
    assert np.array_equal(later.reference, more.reference)
    shares = [hypervolume(run.losses, more.reference) / more.hypervolume for run in comparison.of("evolution")]
    assert later.results[0].regret.values == pytest.approx([1 - share for share in shares])
    assert compare(given, tmp_path, space=LARGER, strategies=["brute"], seeds=1, restart=True).evaluated == 400


def test_what_was_interrupted_goes_on(given, tmp_path, known):
    class Impatient(bf.Events):
        def progress(self, progress, plan):
            if plan.strategy.name == "evolution" and progress.done >= 20:
                raise KeyboardInterrupt

    asked = {"space": LARGER, "strategies": ["optuna:tpe", "evolution"], "seeds": 3, "n_trials": 40}
    with pytest.raises(KeyboardInterrupt):
        compare(given, tmp_path, events=Impatient(), **asked)
    comparison = compare(given, tmp_path, **asked)
    assert comparison.known >= 40, "what was durable before the interruption"
    assert comparison.evaluated + comparison.known == len({c.tobytes() for run in comparison.runs for c in run.codes})
    for run in comparison.runs:
        (before,) = [r for r in known.of(run.strategy) if r.seed == run.seed]
        assert np.array_equal(run.codes, before.codes)
        assert np.array_equal(run.losses, before.losses)


def test_a_candidate_that_failed_fails_for_all_and_is_tried_again_later(given, tmp_path, monkeypatch):
    evaluate = fixed.FixedEvaluator.evaluate

    def measure(evaluator, codes):
        block = evaluate(evaluator, codes)
        errors = tuple("RuntimeError: no" if c.sum() == 5 else e for c, e in zip(codes, block.errors, strict=True))
        return fixed.BatchMetrics(block.values, errors, block.seconds)

    asked = {"strategies": ["brute_force", "evolution"], "seeds": 2, "n_trials": 20}
    with monkeypatch.context() as patched:
        patched.setattr(fixed.FixedEvaluator, "evaluate", measure)
        broken = compare(given, tmp_path, **asked)
    for run in broken.runs:
        assert np.array_equal(np.isnan(run.losses).any(axis=1), run.codes.sum(axis=1) == 5)
        assert run.failed == (run.codes.sum(axis=1) == 5).sum()
    failed = int((broken.runs[0].codes.sum(axis=1) == 5).sum())
    assert failed > 0
    whole = compare(given, tmp_path, **asked)
    assert (whole.evaluated, whole.known) == (failed, 36 - failed)
    assert not np.isnan(whole.runs[0].losses).any()


# --- numbers are what they say


def test_results_against_a_plain_computation(known):
    truth = known.of("brute_force")[0].losses
    front = truth[non_dominated(truth)]
    reference = front.max(axis=0) + 0.1 * np.ptp(front, axis=0)
    assert known.reference == pytest.approx(reference)
    whole = hypervolume(truth, reference)
    assert known.hypervolume == pytest.approx(whole)
    for result in known.results:
        runs = known.of(result.strategy)
        assert len(runs) == (1 if result.strategy == "brute_force" else 3)
        for i, run in enumerate(runs):
            parts = [hypervolume(run.losses[: n + 1], reference) / whole for n in range(len(run))]
            assert run.volume == pytest.approx(parts)
            assert result.regret.values[i] == pytest.approx(1 - parts[39], abs=1e-12)
            for place, level in enumerate((0.95, 0.99)):
                there = [n for n, part in enumerate(parts, 1) if part >= level - 1e-12]
                expected = there[0] if there else math.inf
                assert result.evaluations[place].values[i] == expected
                clock = run.asking[expected - 1] + run.evaluating[:expected].sum() if there else math.inf
                assert result.seconds[place].values[i] == pytest.approx(clock)
            best = min(run.losses[:40, 0])
            assert result.shortfall.values[i] == pytest.approx(best - truth[:, 0].min())
            assert result.asking.values[i] == run.asked >= run.asking[-1]
        assert result.repeats.values == tuple(c.repeats for c in runs)
    (brute,) = [s for s in known.results if s.strategy == "brute_force"]
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
    for moment, median in zip(clock.x, clock.median, strict=True):
        done = [int((c.seconds <= moment).sum()) for c in runs]
        assert median == np.median([c.volume[n - 1] if n else 0.0 for c, n in zip(runs, done, strict=True)])
    (brute,) = known.of("brute_force")
    whole = known.curve("brute_force")
    assert whole.x.tolist() == list(range(1, 401))
    assert np.array_equal(whole.median, brute.volume)


def test_seconds_are_those_of_the_strategy_and_of_evaluating(known):
    for run in known.runs:
        assert run.seconds == pytest.approx(run.asking + np.cumsum(run.evaluating))
        assert (np.diff(run.seconds) > 0).all()
        assert 0 < run.asking[0] <= run.asking[-1] <= run.asked


def test_what_a_strategy_measures_beforehand_is_its_time(given, tmp_path, monkeypatch):
    def slowly(*_):
        time.sleep(0.3)
        return {"none": "here"}

    monkeypatch.setattr("bitfront.engine.search.knowledge._measured_margins", slowly)
    for _ in range(2):  # the second time it is known
        comparison = compare(given, tmp_path, strategies=["surrogate"], seeds=2, n_trials=10)
        for run in comparison.runs:
            assert run.asking[0] > 0.3
            assert run.asked >= run.asking[-1]
        monkeypatch.setattr("bitfront.engine.search.knowledge._measured_margins", None)


def test_without_the_truth_all_is_relative_to_the_best_known(given, tmp_path):
    comparison = compare(given, tmp_path, space=LARGER, strategies=["evolution", "optuna:random"], seeds=2, n_trials=30)
    assert not comparison.truth
    together = np.concatenate([run.losses for run in comparison.runs])
    assert np.array_equal(comparison.front, np.unique(together[non_dominated(together)], axis=0))
    whole = hypervolume(together, comparison.reference)
    for run in comparison.runs:
        assert run.volume[-1] == pytest.approx(hypervolume(run.losses, comparison.reference) / whole)


def test_one_objective_has_a_shortfall_and_no_volume(given, tmp_path):
    comparison = compare(
        given, tmp_path, metrics={"loss": "minimize"}, strategies=["brute_force", "optuna:tpe"], seeds=2, n_trials=10
    )
    brute, tpe = comparison.results
    assert brute.regret is None
    assert brute.evaluations == brute.seconds == ()
    assert brute.to_best.median == np.argmin(comparison.runs[0].losses[:, 0]) + 1
    truth = comparison.runs[0].losses.min()
    bests = [run.losses[:10].min() for run in comparison.of("optuna:tpe")]
    assert tpe.shortfall.values == pytest.approx([best - truth for best in bests], abs=1e-15)
    with pytest.raises(ConfigError, match="one objective has no hypervolume; ask for what = 'best'"):
        comparison.curve("optuna:tpe")
    best = comparison.curve("optuna:tpe", "best")
    assert best.x.tolist() == list(range(1, 11))
    runs = [np.minimum.accumulate(run.losses[:, 0]) for run in comparison.of("optuna:tpe")]
    assert best.median == pytest.approx(np.median(runs, axis=0))


def test_only_what_fulfils_the_constraints_counts(known, given, tmp_path):
    given = {**given, "search.constraints": {"average_bitwidth": "<= 5", "accuracy": ">= 0.3"}}
    comparison = compare(given, tmp_path, space=LARGER, strategies=["brute_force", "evolution"], seeds=2, n_trials=30)
    assert comparison.truth
    for run in comparison.runs:
        counted = ~np.isnan(run.losses).any(axis=1)
        assert counted.any()
        assert (run.losses[counted, 1] <= 5).all()
        assert (run.losses[counted, 0] <= -0.3).all()
    assert (comparison.front[:, 1] <= 5).all()
    assert comparison.constraints == ("average_bitwidth <= 5", "accuracy >= 0.3")
    # What the bits forbid was not even evaluated; of the rest everything was.
    (brute,) = known.of("brute_force")
    allowed = brute.losses[:, 1] <= 5
    assert np.array_equal(comparison.runs[0].codes, brute.codes[allowed])
    good = brute.losses[allowed & (brute.losses[:, 0] <= -0.3)]
    assert np.array_equal(comparison.front, np.unique(good[non_dominated(good)], axis=0))
    # Later, too; but not under other constraints, which allow what was not evaluated.
    later = compare(given, tmp_path, space=LARGER, strategies=["evolution"], seeds=1, n_trials=30)
    assert later.truth
    assert np.array_equal(later.front, comparison.front)
    given["search.constraints"] = {"average_bitwidth": "<= 6", "accuracy": ">= 0.3"}
    assert not compare(given, tmp_path, space=LARGER, strategies=["evolution"], seeds=1, n_trials=30).truth


def test_a_budget_beyond_the_space_is_the_space(given, tmp_path):
    comparison = compare(given, tmp_path, strategies=["optuna:random", "brute_force"], seeds=2)
    assert comparison.budget == comparison.size == 36
    assert {len(run) for run in comparison.runs} == {36}
    assert comparison.results[1].regret.median == 0.0
    assert {run.stopped for run in comparison.runs} == {"space exhausted"}
    # Then the truth is known without brute force.
    notes = []

    class Noting(bf.Events):
        def note(self, text):
            notes.append(text)

    asked = {"strategies": ["evolution"], "seeds": 1, "events": Noting()}
    assert compare(given, tmp_path, **asked).truth
    more = "n_trials = 37 is more than the space has: each run evaluates all of it"
    assert more not in notes
    compare(given, tmp_path, n_trials=37, **asked)
    assert more in notes


def test_brute_force_comes_along_where_it_finishes(given, tmp_path, monkeypatch):
    notes = []

    class Noting(bf.Events):
        def note(self, text):
            notes.append(text)

    assert compare(given, tmp_path / "a", seeds=1, n_trials=10).strategies == ("brute_force", *compare_module.DEFAULT)
    monkeypatch.setattr(compare_module, "EXHAUSTIVE_SECONDS", 0.0)
    comparison = compare(given, tmp_path / "b", seeds=1, n_trials=10, events=Noting())
    assert comparison.strategies == compare_module.DEFAULT
    assert any("brute force is not compared: for 36 candidates it would need" in note for note in notes)
    notes.clear()
    comparison = compare(given, tmp_path / "c", seeds=1, n_trials=10, max_size=20, events=Noting())
    assert comparison.strategies == compare_module.DEFAULT
    assert any("stops at max_size = 20" in note for note in notes)


# --- mistakes


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"strategies": ["brutal"]}, "strategies.brutal: there is no strategy called 'brutal'; allowed: brute_force, "),
        ({"strategies": ["optuna:tpee"]}, "there is no sampler 'tpee'; allowed: tpe, .* Did you mean 'tpe'?"),
        ({"strategies": ["evolution:tpe"]}, "strategy 'evolution' has no variants, so write its name without a colon"),
        ({"strategies": ["tpe"]}, "strategies.tpe: 'tpe' is a sampler of strategy 'optuna'; write optuna:tpe"),
        ({"strategies": ["brute"], "max_size": 0}, "search.strategy.setup.max_size: 0 is not possible: input"),
        ({"search.strategy.setup.n_trails": 3}, "setup.n_trails: unknown key; .* Did you mean 'n_trials'"),
        ({"strategies": ["optuna", "optuna:TPE"]}, "optuna:tpe is named twice"),
        ({"strategies": "brute", "max_size": 10}, "the space has 36 candidates, .* stops at max_size = 10"),
        ({"seeds": 0}, "seeds: 0 is not possible; allowed: 1 or more"),
    ],
)
def test_mistakes_are_reported_before_any_work(given, tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        compare(given, tmp_path, **more)
    assert not list(tmp_path.iterdir())


def test_halving_is_refused(given, tmp_path):
    halving = {"rungs": [1], "keep": 0.5}
    trained = {"name": "evolution", "sw_runner": {"basic_train": {"max_epochs": 2, "halving": halving}}}
    config = bf.Config.model_validate({"search": {"search_space": {}, "strategy": trained}})
    with pytest.raises(ConfigError, match="strategies cannot share results; remove it"):
        compare_module.prepared(config)


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
