"""The reference models: their published sizes, the names of their sites, and the shapes they take."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from bitfront.errors import ConfigError, UnknownNameError, UserError
from bitfront.models import MODELS
from bitfront.models.base import build_model
from bitfront.testing.models import check_model

FLAT = ["jsc-tiny", "jsc-toy", "jsc-new", "jsc-s", "jsc-three-linear-layers", "jsc-three-linears", "jsc-mlp"]
FLAT += ["digits-mlp", "toy", "toy-tiny"]
SPECTROGRAMS = ["ds-cnn", "ds-cnn-small"]


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize(("features", "classes"), [(16, 5), (16, 10), (7, 2)])
def test_flat_models_conform(name, features, classes):
    report = check_model(MODELS.get(name), (features,), classes)
    assert report.not_traceable is None


@pytest.mark.parametrize("name", ["digits-mlp", "digits-cnn"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 9)])
def test_image_models_conform(name, shape):
    assert check_model(MODELS.get(name), shape, 10).not_traceable is None


def test_every_registered_model_is_checked_here():
    assert set(MODELS.names()) == {*FLAT, *SPECTROGRAMS, "digits-cnn", "vgg7"}


@pytest.mark.parametrize("name", SPECTROGRAMS)
@pytest.mark.parametrize("size", [(49, 10), (20, 9)])
def test_keyword_spotters_conform(name, size):
    report = check_model(MODELS.get(name), (1, *size), 12)
    assert report.not_traceable is None
    # MLPerf Tiny's has 22,604 parameters once its norms are folded.
    expected = 2624 + 4 * (640 + 4160) + 780 if name == "ds-cnn" else 656 + 2 * (160 + 272) + 204
    assert report.parameters == expected


def test_keyword_spotters_refuse_other_samples():
    with pytest.raises(ConfigError, match=r"takes spectrograms.*\(3, 49, 10\).*synthetic-keywords"):
        build_model("ds-cnn", (3, 49, 10), 12, seed=0)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("jsc-tiny", 117),
        ("jsc-toy", 327),
        ("jsc-new", 327),
        ("jsc-s", 32 + 1088 + 128 + 2080 + 1056 + 1056 + 165 + 10),
        ("jsc-three-linear-layers", 32 + 272 + 272 + 85),
        ("jsc-three-linears", 32 + 272 + 272 + 85),
        ("jsc-mlp", 1088 + 2080 + 1056 + 165),
    ],
)
def test_published_parameter_counts(name, parameters):
    assert check_model(MODELS.get(name), (16,), 5).parameters == parameters


def test_digits_cnn_has_four_weight_layers_and_stays_small():
    model = build_model("digits-cnn", (1, 8, 8), 10, seed=0)
    assert [n for n, m in model.named_modules() if hasattr(m, "weight")] == ["conv1", "conv2", "fc1", "fc2"]
    assert sum(p.numel() for p in model.parameters()) == 13_706


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("jsc-tiny", "bn relu linear relu"),
        ("jsc-toy", "bn relu" + " linear bn relu" * 3),
        ("jsc-new", "bn relu" + " linear bn relu" * 3),
        ("jsc-s", "bn relu linear bn relu linear relu linear relu linear relu linear bn relu"),
        ("jsc-three-linear-layers", "bn relu" + " linear relu" * 3),
        ("jsc-three-linears", "bn relu linear linear linear relu"),
        ("jsc-mlp", "linear relu linear relu linear relu linear"),
    ],
)
def test_fx_names_the_sites_as_mase_does(name, kinds):
    short = {"BatchNorm1d": "bn", "ReLU": "relu", "Linear": "linear"}
    traced = fx.symbolic_trace(build_model(name, (16,), 5, seed=0))
    nodes = list(traced.graph.nodes)
    assert nodes[0].name == "x"
    assert nodes[-1].name == "output"
    assert [n.name for n in nodes[1:-1]] == [f"seq_blocks_{i}" for i in range(len(nodes) - 2)]
    modules = [type(traced.get_submodule(n.target)).__name__ for n in nodes[1:-1]]
    assert [short[m] for m in modules] == kinds.split()


def test_fx_names_of_mase_on_images():
    assert check_model(MODELS.get("toy"), (1, 2, 2), 2).parameters == 5 * 8 + 9 * 8 + 9 * 2
    assert check_model(MODELS.get("toy-tiny"), (1, 2, 2), 2).sites[-4:] == ("l1", "relu_1", "l2", "relu_2")
    with torch.device("meta"):
        vgg = fx.symbolic_trace(MODELS.get("vgg7")((3, 32, 32), 10))
        assert vgg(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    weights = {n: tuple(p.shape) for n, p in vgg.named_parameters() if p.dim() > 1}
    convolutions = [f"feature_layers.{i}.weight" for i in (0, 3, 7, 10, 14, 17)]
    assert list(weights) == [*convolutions, "classifier.0.weight", "classifier.2.weight", "last_layer.weight"]
    assert weights["classifier.0.weight"] == (1024, 8192)
    with pytest.raises(ConfigError, match=r"'vgg7' takes images.*have shape \(16,\)"):
        build_model("vgg7", (16,), 5, seed=0)


def test_fx_names_of_digits_cnn():
    sites = check_model(MODELS.get("digits-cnn"), (1, 8, 8), 10).sites
    assert sites == ("conv1", "relu1", "pool1", "conv2", "relu2", "pool2", "flatten", "fc1", "relu3", "fc2")


@pytest.mark.parametrize("name", [n for n in FLAT if n.startswith("jsc")])
def test_jsc_models_refuse_images(name):
    with pytest.raises(UserError, match=rf"'{name}' takes flat samples.*\(1, 8, 8\).*digits-cnn"):
        build_model(name, (1, 8, 8), 10, seed=0)


@pytest.mark.parametrize("shape", [(16,), (1, 3, 8), (8, 8)])
def test_digits_cnn_refuses_samples_that_are_not_images(shape):
    with pytest.raises(ConfigError, match=r"takes images.*have shape \("):
        build_model("digits-cnn", shape, 10, seed=0)


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match=r"'jsc-tinny'.*Did you mean 'jsc-tiny'"):
        build_model("jsc-tinny", (16,), 5, seed=0)


def test_check_model_reports_what_cannot_be_traced_and_catches_faults():
    class Branching(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > -1e9 else x

    report = check_model(lambda shape, classes: Branching(shape[0], classes), (4,), 3)
    assert report.sites == ()
    assert "control flow" in report.not_traceable

    class Noisy(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.randn(())

    with pytest.raises(AssertionError, match="two passes over the same samples differ"):
        check_model(lambda shape, classes: Noisy(shape[0], classes), (4,), 3)
    with pytest.raises(AssertionError, match=r"logits are \(8, 7\), not \(8, 3\)"):
        check_model(lambda shape, classes: torch.nn.Linear(shape[0], 7), (4,), 3)
