"""``integer_bias``: each bias is a multiple of the step of the sums, in the evaluator, the deployed model and its graph."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import Normalised, seeded_model
from test_calibration import job
from test_memory import X, search
from torch import nn

import bitfront as bf
from bitfront.api import dataset_of
from bitfront.engine.evaluation.calibration import Corrections
from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.engine.rebuild import transform_trial
from bitfront.errors import ConfigError
from bitfront.transforms import quantize

FORMATS = {"name": ["affine"], "data_in_width": [4], "weight_width": [2, 3]}
KEY = {"search.calibration.integer_bias": True}


def evaluator(formats, **corrections):
    corrections = Corrections(**({"integer_bias": True} | corrections))
    return FixedEvaluator(job(seeded_model(Normalised), X, torch.arange(40) % 4, X, {"linear": formats}, corrections))


def check_biases(of, code):
    graph, formats, _ = of.parts(code)
    model = of.model(code, bake=True)
    for site in (s for s in graph.sites if s.name in formats and s.bias):
        steps = float(formats[site.name]["data_in"].grid.step) * torch.as_tensor(formats[site.name]["weight"].grid.step)
        codes = model.get_submodule(site.path).bias.double() / steps.reshape(-1)
        assert torch.allclose(codes, codes.round(), atol=1e-3)
        assert not torch.equal(model.get_submodule(site.path).bias, graph.model.get_submodule(site.path).bias)


@pytest.mark.parametrize("more", [{}, {"bias": True, "batch_norm": True}])
def test_the_tree_and_the_deployed_model_have_these_biases(more):
    of = evaluator(FORMATS, **more)
    codes = of.space.numbered(0, of.space.size)
    tree = of.evaluate(codes).values
    assert of.plain == ""
    whole = FixedEvaluator(replace(of.job, whole="to compare"))
    assert np.array_equal(tree["loss"], whole.evaluate(codes).values["loss"])
    plain = evaluator(FORMATS, **(more | {"integer_bias": False})).evaluate(codes).values
    assert not np.array_equal(tree["loss"], plain["loss"])
    for code in codes[:3]:
        check_biases(of, code)


def test_with_several_formats_of_an_input_candidates_are_evaluated_whole():
    of = evaluator(FORMATS | {"data_in_width": [3, 4]})
    codes = of.space.numbered(0, 6)
    assert not any(of.evaluate(codes).errors)
    assert "depends on the format of its input" in of.plain
    for code in codes:
        check_biases(of, code)


def test_a_bias_with_a_format_keeps_it():
    both = FORMATS | {"bias_width": [6]}
    changed, plain = evaluator(both), evaluator(both, integer_bias=False)
    codes = changed.space.numbered(0, 4)
    assert np.array_equal(changed.evaluate(codes).values["loss"], plain.evaluate(codes).values["loss"])


def test_the_graph_of_a_rebuilt_trial_has_what_was_corrected(tmp_path):
    run = search(tmp_path, **KEY)  # with bias_correction and batch_norm
    assert not any("integer_bias" in note for note in run.notes)
    x = X[:8]
    data = dataset_of((X.numpy(), np.arange(40) % 4))
    for number in (0, 3):
        rebuilt = transform_trial(tmp_path / "run", number, data=data, model=seeded_model(Normalised), check=True)
        assert rebuilt.evaluation.loss == run.trial(number).metrics["loss"]
        with torch.no_grad():
            assert torch.equal(quantize(rebuilt.graph, rebuilt.formats)(x), rebuilt.model(x))


def test_training_would_change_them(tmp_path):
    with pytest.raises(ConfigError, match="no training changes afterwards"):
        search(tmp_path, **KEY, **{"search.finetune.trials": 1})


@pytest.mark.parametrize("key", ["integer_bias", "bias_correction"])
def test_a_file_has_what_was_corrected(tmp_path, key):
    torch.manual_seed(0)
    run = bf.search(
        model=nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)),
        data=(torch.randn(80, 4), torch.arange(80) % 4),
        space={"linear": FORMATS},
        metrics=["loss", "average_bitwidth"],
        strategy="brute_force",
        project_dir=str(tmp_path),
        **{f"search.calibration.{key}": True},
    )
    exported = bf.export(run.trial(0), to="onnx")
    assert (exported.samples, exported.differing) == (12, 0)
