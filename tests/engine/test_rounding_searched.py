"""Adaptive rounding in a search: the tree, the deployed model and a resumed run use one and the same learned weight."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import Normalised, seeded_model
from test_calibration import digits as digits
from test_calibration import job, trained
from test_memory import X, counted, files, search, values
from torch import nn

import bitfront as bf
from bitfront.api import dataset_of
from bitfront.engine.evaluation.calibration import Corrections
from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.engine.rebuild import transform_trial
from bitfront.errors import ConfigError, RunError
from bitfront.models.base import build_model

ADAPTIVE = {"search.calibration.rounding": "adaptive", "search.calibration.rounding_iterations": 60}
ALL = Corrections(bias=True, batch_norm=True, rounding=60)
FORMATS = {"name": ["affine", "NA"], "data_in_width": [4], "weight_width": [2, 3], "bias_width": [6]}


def normalised(corrections):
    return job(seeded_model(Normalised), X, torch.arange(40) % 4, X, {"linear": FORMATS}, corrections)


@pytest.mark.parametrize("corrections", [Corrections(rounding=60), ALL], ids=["rounding", "all"])
def test_what_the_tree_computes_is_what_is_deployed_to_the_bit(corrections):
    evaluator = FixedEvaluator(normalised(corrections))
    codes = evaluator.space.numbered(0, evaluator.space.size)
    tree = evaluator.evaluate(codes).values
    assert evaluator.plain == ""
    whole = FixedEvaluator(replace(normalised(corrections), whole="to compare")).evaluate(codes).values
    nearest = FixedEvaluator(normalised(replace(corrections, rounding=0))).evaluate(codes).values
    assert np.array_equal(tree["loss"], whole["loss"])
    assert not np.array_equal(tree["loss"], nearest["loss"])
    for code in codes[:3]:
        graph, formats, learned = evaluator.parts(code)
        model = evaluator.model(code, bake=True)
        for name, correction in learned.items():
            weight = model.get_submodule(graph.site(name).path).weight
            assert torch.equal(weight, correction.weight)
            assert torch.equal(formats[name]["weight"].round(weight), weight)


def test_metrics_count_the_zeros_of_learned_weights():
    evaluator = FixedEvaluator(normalised(ALL))
    space = evaluator.space
    for code in space.sample(6, np.random.default_rng(0)):
        model, options = evaluator.model(code, bake=True), space.options(code[None])[0]
        for g, site in ((g, site) for g, site in enumerate(space.sites) if site.weight):
            assert evaluator.nonzero(g)[options[g]] == int(torch.count_nonzero(model.get_submodule(site.path).weight))


def test_a_resumed_search_learns_no_rounding_again_and_transforms_to_the_same(tmp_path, monkeypatch):
    whole = search(tmp_path / "whole", **ADAPTIVE)
    calls = counted(monkeypatch, "adaptive_weight")
    search(tmp_path, n_trials=5, **ADAPTIVE)
    assert files(tmp_path)
    before = len(calls)
    run = search(tmp_path, **ADAPTIVE)
    assert values(run) == values(whole)
    # Each weight in each format once, in both sessions together: three layers in three widths.
    assert 0 < before <= len(calls) == 9
    data = dataset_of((X.numpy(), np.arange(40) % 4))
    for number in range(4):
        rebuilt = transform_trial(tmp_path / "run", number, data=data, model=seeded_model(Normalised), check=True)
        assert rebuilt.evaluation.loss == run.trial(number).metrics["loss"]
    assert len(calls) == 9
    with pytest.raises(RunError, match=r"calibration\.rounding_iterations: it has"):
        search(tmp_path, **{**ADAPTIVE, "search.calibration.rounding_iterations": 61})
    with pytest.raises(RunError, match=r"calibration\.rounding"):
        search(tmp_path)


@pytest.mark.long
def test_worker_processes_learn_the_same_weights(tmp_path):
    assert values(search(tmp_path / "a", n_jobs=2, **ADAPTIVE)) == values(search(tmp_path / "b", **ADAPTIVE))


def notes(folder, space, **more):
    """The notes of a search of one candidate."""
    run = bf.search(
        model=nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)),
        data=(X.numpy(), np.arange(40) % 4), space=space, metrics=["accuracy"], strategy="optuna:random", n_trials=1,
        project_dir=str(folder), project="run", **{**ADAPTIVE, **more},
    )  # fmt: skip
    return "\n".join(run.notes)


def test_a_plan_says_what_keeps_nearest_rounding_and_how_long_learning_takes(tmp_path):
    said = notes(tmp_path / "a", {"linear": {"name": ["affine", "nf4"], "weight_width": [4]}})
    assert "is rounded to nearest: nf4" in said
    assert "rounding is learned for 2 pairs of a weight and a format, each once: about 1 s in all" in said
    assert "rounding = 'adaptive' has no effect" in notes(
        tmp_path / "b", {"linear": {"name": "nf4", "weight_width": [4]}}
    )
    assert "rounding" not in notes(tmp_path / "c", {"linear": FORMATS}, **{"search.calibration.rounding": "nearest"})


def test_formats_without_a_grid_keep_their_nearest_values():
    seed = {"linear": {"name": "nf4", "weight_width": [4]}}
    x = (X, torch.arange(40) % 4, X, seed)
    learned, nearest = (
        FixedEvaluator(job(seeded_model(Normalised), *x, c)) for c in (Corrections(rounding=9), Corrections())
    )
    codes = learned.space.numbered(0, learned.space.size)
    assert np.array_equal(learned.evaluate(codes).values["loss"], nearest.evaluate(codes).values["loss"])


def test_training_candidates_and_learning_their_rounding_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="rounding = 'adaptive' is not possible if candidates are trained"):
        notes(tmp_path, {"linear": FORMATS}, **{"search.strategy.sw_runner.basic_train": {"max_epochs": 1}})


@pytest.mark.sampled(2)
@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_it_gives_back_accuracy_at_low_precision(digits, granularity):
    x, y = digits
    model = trained(build_model("digits-cnn", (1, 8, 8), 10, seed=0), digits)
    settings = {
        "name": "affine", "data_in_width": 8, "weight_width": [2, 3, 4], "weight_granularity": granularity,
        "bias_width": 8,
    }  # fmt: skip
    loss, accuracy = {}, {}
    for name, corrections in {"nearest": Corrections(), "adaptive": Corrections(rounding=500)}.items():
        evaluator = FixedEvaluator(job(model, x[1200:], y[1200:], x[:512], {"default": settings}, corrections))
        codes = evaluator.space.uniform()
        measured = evaluator.evaluate(codes).values
        widths = [evaluator.formats(code)["conv2"]["weight"].bits for code in codes]
        loss[name], accuracy[name] = (dict(zip(widths, measured[k], strict=True)) for k in ("loss", "accuracy"))
    assert loss["adaptive"][3] < 0.9 * loss["nearest"][3]
    assert accuracy["adaptive"][3] > accuracy["nearest"][3]
    assert accuracy["adaptive"][2] > accuracy["nearest"][2] + 0.3
    layers = {name: model.get_submodule(name) for name in ("conv1", "conv2", "fc1", "fc2")}
    seen = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, given, out, name=name: seen.update({name: (given[0], out)}))
    with torch.no_grad():
        model(x[:512])
    for code in codes:
        _, formats, corrections = evaluator.parts(code)
        for name, (given, out) in list(seen.items()):
            nearest = formats[name]["weight"].round(layers[name].weight.detach())
            errors = [error(layers[name], weight, given, out) for weight in (corrections[name].weight, nearest)]
            assert errors[0] < 0.75 * errors[1]


def error(layer, weight, given, out):
    other = copy.deepcopy(layer)
    other._forward_hooks.clear()
    other.weight.data = weight
    with torch.no_grad():
        return (other(given) - out).double().square().mean()
