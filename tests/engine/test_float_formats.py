"""Floating-point formats in a search: the numbers of the deployed model, bits that are counted, formats that are mixed."""

import math

import numpy as np
import pytest
import torch
from networks import Chain, Clipped, Images, Normalised, ResidualImages, seeded_model
from test_tree import assert_as_alone, evaluator_of, job_of

import bitfront as bf
from bitfront.data.arrays import from_arrays
from bitfront.metrics import RUNNERS

NETS = pytest.mark.parametrize(
    "network", [Chain, Normalised, Images, Clipped, ResidualImages], ids=lambda n: n.__name__
)
MINIFLOAT = {
    "data_in_width": [4, 5],
    "data_in_exponent_width": 2,
    "weight_width": [4, 5],
    "weight_exponent_width": 2,
}
BIASED = {"bias_width": 6, "bias_exponent_width": 2}
STANDARD = {"data_in": [{}], "weight": [{}]}


def of_type(network, seed):
    return evaluator_of(job_of(seeded_model(network), network.shape, {"default": seed}, by="type"))


@pytest.mark.sampled(3)
@NETS
@pytest.mark.parametrize("family", ["minifloat_ieee", "minifloat_denorm"])
@pytest.mark.parametrize("exponents", [2, 3, 4])
def test_minifloats_have_the_numbers_of_the_deployed_model(network, family, exponents):
    data = {"data_in_width": [6, 8], "data_in_exponent_width": exponents, "data_in_frac_width": 3}
    weights = {"weight_width": [6, 7], "weight_exponent_width": exponents, "weight_exponent_bias": ["NA", "auto"]}
    evaluator = of_type(network, {"name": [family, "integer", "NA"], **data, **weights, "weight_frac_width": "auto"})
    assert_as_alone(evaluator, evaluator.space.sample(8, np.random.default_rng(0)))


@NETS
def test_standard_floats_have_the_numbers_of_the_deployed_model(network):
    evaluator = of_type(network, {"name": ["float16", "bfloat16", "float32", "NA"], **STANDARD})
    assert_as_alone(evaluator, evaluator.space.sample(8, np.random.default_rng(0)))


@pytest.mark.parametrize("family", ["minifloat_ieee", "minifloat_denorm"])
def test_products_of_narrow_minifloats_are_merged_exactly(family):
    evaluator = of_type(Chain, {"name": family, **MINIFLOAT, **BIASED})
    assert_as_alone(evaluator, evaluator.space.sample(8, np.random.default_rng(0)))
    assert not evaluator.inexact


def test_products_of_wide_minifloats_are_not_and_it_is_said():
    wide = {f"{o}_{k}": v for o in ("data_in", "weight", "bias") for k, v in (("width", 12), ("exponent_width", 5))}
    evaluator = of_type(Chain, {"name": "minifloat_ieee", **wide})
    assert_as_alone(evaluator, evaluator.space.numbered(0, 1))
    assert all("more than the 53 bits that float64 holds" in why for why in evaluator.inexact.values())
    assert evaluator.inexact


@pytest.mark.parametrize(
    ("seed", "data_bits", "weight_bits"),
    [
        ({"name": "minifloat_ieee", **MINIFLOAT, "data_in_width": 5, "weight_width": 4}, 5, 4),
        ({"name": "minifloat_denorm", **MINIFLOAT, "data_in_width": 4, "weight_width": 5}, 4, 5),
        ({"name": "float16", **STANDARD}, 16, 16),
        ({"name": "bfloat16", **STANDARD}, 16, 16),
        ({"name": "float32", **STANDARD}, 32, 32),
    ],
)
def test_metrics_count_their_bits(seed, data_bits, weight_bits, tiny_mlp):
    evaluator = evaluator_of(job_of(tiny_mlp, (4,), {"fc1": seed, "fc2": seed}))
    layers = {name: getattr(tiny_mlp, name) for name in ("fc1", "fc2")}

    def value(runner, metric):
        kind = RUNNERS.get(runner)
        codes = evaluator.space.numbered(0, 1)
        return float(np.asarray(kind(kind.Settings()).measure(evaluator, codes)[metric]).reshape(-1)[0])

    assert value("average_bitwidth", "average_bitwidth") == weight_bits
    # Each tensor in whole bytes; biases stay in float.
    sizes = [math.ceil(m.weight.numel() * weight_bits / 8) + 4 * m.bias.numel() for m in layers.values()]
    assert value("model_size", "model_size") == sum(sizes)
    model = evaluator.model(evaluator.space.numbered(0, 1)[0])
    rounded = [model.get_submodule(name).formats["weight"].round(m.weight) for name, m in layers.items()]
    nonzero = sum(int(w.count_nonzero()) for w in rounded)
    biases = sum(31 * len(layer.bias) for layer in layers.values())
    assert value("ebops", "ebops") == nonzero * (weight_bits - 1) * (data_bits - 1) + biases


def test_a_search_by_type_mixes_them_with_integers_and_rebuilds_them(tiny_mlp, tmp_path):
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    data = from_arrays(x, (x.sum(1) > 0).long())
    linear = {
        "name": ["minifloat_ieee", "integer", "float16"],
        **MINIFLOAT,
        "weight_exponent_bias": "auto",
        "weight_frac_width": "auto",
        "data_in_frac_width": "auto",
    }
    run = bf.search(
        model=tiny_mlp,
        data=data,
        space={"by": "type", "linear": linear},
        metrics={"accuracy": "maximize", "average_bitwidth": "minimize"},
        strategy="brute_force",
        project_dir=str(tmp_path),
    )
    assert len(run) == 9 * 9
    labels = set()
    for trial in run.front:
        rebuilt = bf.transform_trial(run.folder, trial.number, check=True, data=data, model=tiny_mlp)
        assert rebuilt.evaluation.loss == trial.metrics["loss"]
        labels |= {form.label for of_site in rebuilt.formats.values() for form in of_site.values()}
    assert labels
    assert not any("auto" in label for label in labels)


def test_networks_are_trained_in_them(tiny_mlp, tmp_path):
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    data = from_arrays(x, (x.sum(1) > 0).long())
    run = bf.search(
        model=tiny_mlp,
        data=data,
        space={"by": "type", "linear": {"name": ["minifloat_denorm", "bfloat16"], **MINIFLOAT}},
        metrics={"accuracy": "maximize", "average_bitwidth": "minimize"},
        strategy={"name": "brute_force", "sw_runner": {"basic_train": {"max_epochs": 2}, "basic_evaluation": {}}},
        n_trials=4,
        project_dir=str(tmp_path),
    )
    for trial in run.front:
        rebuilt = bf.transform_trial(run.folder, trial.number, check=True, data=data, model=tiny_mlp)
        assert rebuilt.evaluation.accuracy == trial.metrics["accuracy"]
