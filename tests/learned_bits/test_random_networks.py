"""Random small networks through a whole search with learned bits, by compiled steps and by torch: what is reported of
each trial is what whole numbers give, and what counting product by product gives."""

import math
import tempfile
from unittest import mock

import numpy as np
import pytest
import torch
from by_integers import Layer, bops, ebops, loss, stored_bits
from hypothesis import given
from hypothesis import strategies as st
from random_learning import networks

import bitfront as bf
from bitfront.api import dataset_of
from bitfront.kernels import bits
from properties import max_examples

GRANULARITIES = st.sampled_from(["element", "channel", "layer"])
METRICS = ["accuracy", "loss", "ebops", "bops", "model_size", "average_bitwidth", "sparsity"]
SIZES = {"train": 96, "val": 50, "test": 20}


@st.composite
def searches(draw):
    """(a network, the settings of a short search that takes many bits away)."""
    network = draw(networks())
    layers = [path for path, module in network.named_modules() if hasattr(module, "weight") and "norm" not in path]
    named = draw(st.dictionaries(st.sampled_from(layers), st.tuples(GRANULARITIES, GRANULARITIES), max_size=2))
    setup = {
        "weight": draw(GRANULARITIES),
        "data_in": draw(GRANULARITIES),
        "layers": {path: {"weight": weight, "data_in": data} for path, (weight, data) in named.items()},
        "cost": draw(st.sampled_from(["ebops", "bops", "model_size", "average_bitwidth"])),
        "cycles": draw(st.integers(1, 2)),
        "members": draw(st.integers(1, 2)),
        "networks": draw(st.integers(1, 2)),
        "epochs": 2.0,
        "patience": draw(st.integers(1, 2)),
        "batch_size": 32,
        "learning_rate": draw(st.sampled_from([3e-3, 3e-2, 0.3])),
        "first_pressure": draw(st.sampled_from([1e-5, 1e-3, 0.1])),
    }
    for operand in ("weight", "data_in"):
        if setup[operand] != "element" and not named:
            setup[f"{operand}_width"] = draw(st.sampled_from([None, [4, 8], [0, 2, 6]]))
    setup["data_in_rounding"] = draw(st.sampled_from(["even", "half_up", "floor"]))
    setup["bias_width"] = draw(st.sampled_from([None, [5, 12]]))
    convention = {
        "sign_bits": draw(st.booleans()),
        "count": draw(st.sampled_from(["width", "set_bits"])),
        "biases": draw(st.booleans()),
    }
    return network, setup, convention, draw(st.integers(0, 99))


def clusters(network, samples, seed):
    """Samples around a point per class: (x, y)."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(network.classes, (samples,), generator=generator)
    centres = torch.randn(network.classes, *network.shape, generator=torch.Generator().manual_seed(0))
    return centres[y] + torch.randn(samples, *network.shape, generator=generator), y


def layers_of(rebuilt):
    """Path → the layer in whole numbers, of a network that was rebuilt."""
    model, paths = rebuilt.model, {site: rebuilt.graph.site(site).path for site in rebuilt.formats}
    return {path: Layer(model.get_submodule(path), rebuilt.formats[site]) for site, path in paths.items()}


def check_costs(reported, layers, convention):
    """Costs by the bits and values of the layers alone."""
    assert reported["ebops"] == ebops(layers, **convention)
    assert reported["bops"] == pytest.approx(bops(layers), rel=1e-12)
    sizes, weights = [stored_bits(layer) for layer in layers], sum(layer.weight.size for layer in layers)
    assert reported["model_size"] == sum(math.ceil(weight / 8) + math.ceil(bias / 8) for weight, bias in sizes)
    assert reported["average_bitwidth"] == pytest.approx(sum(weight for weight, _ in sizes) / weights, rel=1e-12)
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
    assert reported["sparsity"] == pytest.approx(zeros / weights, rel=1e-12)


@pytest.mark.skipif(not bits.available(), reason="no compiled training of bits")
@max_examples(20, suite=6, shrink=False)
@given(searches())
def test_what_is_reported_is_what_whole_numbers_give(search):
    check_search(*search)


@pytest.mark.long
@max_examples(10, shrink=False)
@given(searches())
def test_in_torch_too(search):
    with mock.patch.object(bits, "available", return_value=False):
        check_search(*search)


def check_search(network, setup, convention, seed):
    """Every trial of a search, and the smaller network of the last one."""
    data = {split: clusters(network, size, place) for place, (split, size) in enumerate(SIZES.items())}
    x, y = (tensor.numpy() for tensor in data["val"])
    with tempfile.TemporaryDirectory() as folder:
        run = bf.search(
            model=network,
            data=data,
            metrics=METRICS,
            strategy={"name": "learned_bits", "setup": setup},
            project="run",
            project_dir=folder,
            seed=seed,
            **{f"search.strategy.hw_runner.ebops.{key}": value for key, value in convention.items()},
        )
        assert len(run.trials) == setup["cycles"] * setup["members"] * setup["networks"]
        for trial in run.trials:
            last = trial is run.trials[-1]
            arguments = {"check": True, "smaller": last, "data": dataset_of(data), "model": network}
            rebuilt = bf.transform_trial(run.folder, trial.number, **arguments)
            layers, reported = layers_of(rebuilt), trial.metrics
            logits = network.whole(layers, x)
            with torch.no_grad():
                assert np.array_equal(rebuilt.model(data["val"][0]).numpy(), logits)
            assert reported["accuracy"] == rebuilt.evaluation.accuracy == (logits.argmax(1) == y).sum() / len(y)
            assert reported["loss"] == rebuilt.evaluation.loss == pytest.approx(loss(logits, y), abs=6e-7, rel=1e-6)
            check_costs(reported, layers.values(), convention)
            if last:
                small = layers_of(rebuilt.smaller)
                assert rebuilt.smaller.samples == sum(SIZES.values())
                assert np.array_equal(network.whole(small, x), logits)
                check_costs(rebuilt.smaller_metrics, small.values(), convention)
