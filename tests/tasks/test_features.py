"""What a search does for classification works for other tasks: corrections, rounding, widths, sums, resuming."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import bitfront as bf
from bitfront.data.arrays import from_arrays
from bitfront.engine.evaluation import halving, trained
from bitfront.engine.planning.builder import make_plan
from bitfront.engine.search import paired
from bitfront.engine.storage.run import Run
from bitfront.report import page_tables, remarks
from bitfront.tasks.configured import named_task

rng = np.random.default_rng(0)
X = rng.normal(size=(300, 5)).astype(np.float32)
Y = np.sin(X[:, 0]) + X[:, 1] * X[:, 2]
FORMATS = {"linear": {"name": ["integer", "affine"], "data_in_width": [8], "weight_width": [3, 8], "bias_width": [8]}}
WIDTHS = {"name": "channel_size", "linear": {"name": ["output_only"], "channel_multiplier": [0.5, 1, 2]}}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 1)).eval()


def searched(folder, **settings):
    return bf.search(
        model=network(), data=(X, Y), task="regression", project_dir=str(folder), project="run", **settings
    )


def rebuilt(run, folder):
    """Every trial of the front alone: the same bits."""
    data = from_arrays(X, Y, targets="numbers")
    for trial in run.front:
        again = bf.transform_trial(folder / "run", trial.number, check=True, data=data, model=network())
        found = trial.metrics
        if trial.finetuned is not None and trial.finetuned.kept:
            found = trial.finetuned.metrics
        assert again.evaluation.values == {name: found[name] for name in again.evaluation.values}
    return run.front


def test_corrections_and_learned_rounding(tmp_path):
    corrections = {"bias_correction": True, "equalisation": True, "rounding": "adaptive", "rounding_iterations": 20}
    run = searched(
        tmp_path,
        space=FORMATS,
        metrics=["mse", "average_bitwidth"],
        strategy="brute_force",
        **{"search.calibration": corrections},
    )
    assert len(run) == 16
    front = rebuilt(run, tmp_path)
    # The learned rounding of three bits must be better than the nearest.
    plain = searched(tmp_path / "plain", space=FORMATS, metrics=["mse", "average_bitwidth"], strategy="brute_force")
    assert front[0].metrics["mse"] != plain.front[0].metrics["mse"]


@pytest.mark.long
def test_widths_are_searched_and_trained(tmp_path):
    runners = {"basic_train": {"max_epochs": 2, "float_epochs": 1}, "basic_evaluation": {}}
    strategy = {"name": "brute_force", "sw_runner": runners, "hw_runner": {"basic_computation": {}}}
    run = searched(tmp_path, space=WIDTHS, strategy={**strategy, "metrics": {"mse": {}, "total_flops": {}}})
    assert len(run) == 3
    assert rebuilt(run, tmp_path)


@pytest.mark.long
def test_the_number_of_samples_is_chosen_by_what_leads(tmp_path, monkeypatch):
    monkeypatch.setattr(paired, "FIRST_SAMPLES", 8)
    monkeypatch.setattr(paired, "RESOLUTION", 0.2)
    asked = {"sw_runner": {"basic_evaluation": {"num_samples": "auto"}}, "hw_runner": {"average_bitwidth": {}}}
    strategy = {"name": "brute_force", "metrics": {"mse": {}, "average_bitwidth": {}}, **asked}
    run = searched(tmp_path, space=FORMATS, strategy=strategy)
    assert 8 < run.samples < 45
    # Half as many do not settle it, these do.
    evaluator = make_plan(run.config, model=network(), dataset=from_arrays(X, Y, targets="numbers")).evaluator
    results = [evaluator.results(run.columns.codes(np.arange(16)), "val", n) for n in (run.samples // 2, run.samples)]
    assert [paired.settled_results(evaluator.job.task, of) for of in results] == [False, True]
    rebuilt(run, tmp_path)


def test_what_settles_an_order():
    task, generator = named_task("regression"), np.random.default_rng(0)

    def results(error):
        return {"squared": np.full((64, 1), error) * generator.uniform(0.5, 1.5, (64, 1)), "samples": np.ones(64)}

    assert paired.settled_results(task, [results(1.0), results(2.0)])
    assert not paired.settled_results(task, [results(1.0), results(1.0)])
    same = results(1.0)
    assert paired.settled_results(task, [same, same])


def test_weak_candidates_are_not_trained_to_the_end(tmp_path, monkeypatch):
    seen = []

    def going_on(losses, keep, violation):
        seen.append((losses, halving.going_on(losses, keep, violation)))
        return seen[-1][1]

    monkeypatch.setattr(trained, "going_on", going_on)
    stops = {"rungs": [1], "keep": 0.25, "cohort": 16}
    runners = {"basic_train": {"max_epochs": 3, "learning_rate": 0.01, "halving": stops}, "basic_evaluation": {}}
    strategy = {"name": "brute_force", "sw_runner": runners, "hw_runner": {"average_bitwidth": {}}}
    strategy["metrics"] = {"mse": {}, "average_bitwidth": {}}
    run = searched(tmp_path, space=FORMATS, strategy=strategy)
    columns = run.columns.metrics
    stopped = columns["trained_epochs"] == 1.0
    # They are compared by the metric that leads, and by bits; who stops is measured as it was then.
    ((losses, goes_on),) = [(of, kept) for of, kept in seen if len(of) == 16]
    assert np.array_equal(goes_on, ~stopped)
    assert 4 <= goes_on.sum() < 16
    assert np.array_equal(losses[stopped], np.stack([columns["mse"], columns["average_bitwidth"]], axis=1)[stopped])
    assert set(columns["trained_epochs"][goes_on]) == {3.0}
    rebuilt(run, tmp_path)


def test_one_number_instead_of_a_front_and_fine_tuning(tmp_path):
    setup = {"sum_scaled_metrics": True, "direction": "minimize", "n_trials": 6}
    strategy = {"name": "evolution", "setup": setup, "metrics": {"mae": {}, "average_bitwidth": {"scale": 0.1}}}
    runners = {"sw_runner": {"basic_evaluation": {}}, "hw_runner": {"average_bitwidth": {}}}
    tuned = {"trials": 1, "max_epochs": 3, "learning_rate": 0.01}
    run = searched(tmp_path, space=FORMATS, strategy={**strategy, **runners}, **{"search.finetune": tuned})
    (best,) = rebuilt(run, tmp_path)
    assert best.finetuned.kept == (best.finetuned.metrics["mse"] < best.metrics["mse"])
    assert best.finetuned.test.keys() == {"loss", "mse", "mae", "r2"}


def test_a_run_is_read_back_with_its_task(tmp_path):
    run = searched(tmp_path, space=FORMATS, metrics=["r2", "average_bitwidth"], strategy="brute_force")
    again = Run.load(tmp_path / "run")
    assert again.leading == "mse"
    assert set(again.qualities) == {"loss", "mse", "mae", "r2"}
    assert [trial.intervals for trial in again.front] == [trial.intervals for trial in run.front]
    assert all(set(trial.intervals) == {"mse", "mae", "r2"} for trial in again.front)
    assert [c.number for c in again.compared] == sorted(
        (t.number for t in again.front), key=lambda n: again.trial(n).metrics["mse"]
    )
    # A finished run is asked for other constraints, of any quality.
    reference = again.reference["mse"]
    best = again.best("mse_increase <= 5 %", minimize="average_bitwidth")
    assert best.metrics["mse"] <= 1.05 * reference
    with pytest.raises(bf.UserError, match="there is no 'accuracy_drop' here; allowed: loss_increase, mse_increase"):
        again.best("accuracy_drop <= 1 %")


def test_candidates_of_each_task_are_alone_the_same_as_in_a_batch(tmp_path):
    run = searched(tmp_path, space=FORMATS, metrics=["mse"], strategy="brute_force")
    other = searched(tmp_path / "b", space=FORMATS, metrics=["mse"], strategy="evolution", n_trials=16, seed=0)
    first = {trial.code: trial.metrics["mse"] for trial in run.trials}
    assert {trial.code: trial.metrics["mse"] for trial in other.trials} == first


class Interrupting(bf.Events):
    """Interrupts a search after some candidates."""

    def __init__(self, count):
        self.count = count

    def progress(self, progress, plan):
        if progress.done >= self.count:
            raise KeyboardInterrupt


def test_a_search_looks_near_the_float_model_and_stops_where_the_samples_tell_nothing_apart(tmp_path):
    widths = {"data_in_width": [4, 6, 8], "weight_width": [3, 4, 6, 8], "bias_width": [8]}
    more = {
        "space": {"linear": {"name": "integer", **widths}},
        "metrics": ["mse", "average_bitwidth"],
        "strategy": "surrogate",
        "search.strategy.setup": {"stop_early": True, "focus": 20.0},
    }
    whole = searched(tmp_path / "whole", **more)
    assert whole.stopped.startswith("nothing to gain: ")
    assert "of mse, which is what 45 samples tell apart" in whole.stopped
    assert len(whole) < 100
    (focus, early) = (note for note in whole.notes if note.startswith("surrogate"))
    assert "mse is at most 20 % above the float model's" in focus
    assert "stops before n_trials" in early
    records = [json.loads((whole.folder / name).read_text()) for name in ("best.json", "log.json")]
    assert {record["stopped"] for of in records for record in of.values()} == {whole.stopped}
    assert page_tables.summary(whole)[0]["state"] == whole.stopped
    assert whole.stopped in remarks.summary(whole)[-3]
    assert searched(tmp_path / "parts", events=Interrupting(len(whole) - 5), **more).stopped == "interrupted"
    parts = searched(tmp_path / "parts", **more)
    assert parts.stopped == whole.stopped
    np.testing.assert_array_equal(parts.columns.code, whole.columns.code)
    gap = whole.explain().gap
    assert gap.focus == 20.0
    limit = 1.2 * whole.reference["mse"]
    assert gap.at is None or gap.at.value.value <= limit
    # Without the setting it goes on from there.
    more["search.strategy.setup"] = {"focus": 20.0, "n_trials": len(whole) + 4}
    longer = searched(tmp_path / "parts", **more)
    assert longer.stopped == "n_trials reached"
    np.testing.assert_array_equal(longer.columns.code[: len(whole)], whole.columns.code)
