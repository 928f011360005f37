"""What a search does for classification works for other tasks: corrections, rounding, widths, sums, resuming."""

import numpy as np
import pytest
import torch
from torch import nn

import bitfront as bf
from bitfront.data.arrays import from_arrays
from bitfront.engine.storage.run import Run

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


def test_widths_are_searched_and_trained(tmp_path):
    runners = {"basic_train": {"max_epochs": 2, "float_epochs": 1}, "basic_evaluation": {}}
    strategy = {"name": "brute_force", "sw_runner": runners, "hw_runner": {"basic_computation": {}}}
    run = searched(tmp_path, space=WIDTHS, strategy={**strategy, "metrics": {"mse": {}, "total_flops": {}}})
    assert len(run) == 3
    assert rebuilt(run, tmp_path)


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
