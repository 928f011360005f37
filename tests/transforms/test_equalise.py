"""Cross-layer equalisation: the float function to the bit, similar ranges, and less loss at few bits per tensor."""

import numpy as np
import pytest
import torch
from torch import nn

import bitfront as bf
from bitfront.api import dataset_of
from bitfront.engine.rebuild import transform_trial
from bitfront.errors import ConfigError
from bitfront.formats.affine import Affine
from bitfront.formats.base import WEIGHT
from bitfront.graph import capture
from bitfront.transforms import calibrate, quantize
from bitfront.transforms.equalise import equalised, pairs_of

SPACE = {
    "conv2d": {"name": "affine", "weight_width": [4], "weight_granularity": ["tensor"], "data_in_width": [8]},
    "linear": {"name": "affine", "weight_width": [8], "data_in_width": [8]},
}


class Net(nn.Module):
    """Conv, depthwise Conv, grouped Conv, Linear and Linear, with channels of very different sizes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, groups=8)
        self.c, self.d = nn.Conv2d(16, 6, 1, groups=2, bias=False), nn.Conv2d(6, 6, 1)
        self.e, self.f = nn.Linear(6, 12), nn.Linear(12, 4)
        for layer, after, groups in ((self.a, self.b, 8), (self.b, self.c, 2), (self.e, self.f, 1)):
            factors = torch.logspace(-2, 2, len(layer.weight), base=2.0)
            layer.weight.data *= factors.view(-1, *[1] * (layer.weight.dim() - 1))
            layer.bias.data *= factors
            shape = groups, len(after.weight) // groups, after.weight.shape[1], -1
            after.weight.data.view(shape).div_(factors.view(groups, 1, -1, 1))

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.a(x))))
        x = self.c(x)
        x = (self.d(x) + x).mean((2, 3))
        return self.f(torch.relu(self.e(x)))


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


X = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_float_function_is_the_same_to_the_bit_and_ranges_agree():
    graph = capture(network(), X[:2])
    before = {name: tensor.clone() for name, tensor in graph.model.state_dict().items()}
    assert list(pairs_of(graph)) == [("a", "b"), ("b", "c"), ("e", "f")]  # the output of c is used twice
    result = equalised(graph)
    assert torch.equal(result.model(X), graph.model(X))
    assert all(torch.equal(tensor, before[name]) for name, tensor in graph.model.state_dict().items())
    model = result.model
    out = model.a.weight.abs().amax((1, 2, 3))
    into = model.b.weight.view(8, 2, -1).abs().amax((1, 2))
    assert float((out / into).detach().log2().abs().max()) <= 1.001
    groups = model.c.weight.view(2, 3, 8).abs().amax(1).flatten()
    assert float((model.b.weight.abs().amax((1, 2, 3)) / groups).detach().log2().abs().max()) <= 1.001
    again = equalised(result).model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def search(folder, **more):
    return bf.search(
        model=network(), data=(X.numpy(), np.arange(60) % 4), space=SPACE, metrics=["loss", "average_bitwidth"],
        strategy="brute_force", project_dir=str(folder), project="run", **more,
    )  # fmt: skip


@pytest.mark.parametrize("width", [3, 4, 6])
def test_weights_with_one_scale_per_tensor_lose_less(width):
    graph = capture(network(), X[:2])
    form = Affine.parse({"width": width, "granularity": "tensor"}, WEIGHT)
    errors = []
    for g in (graph, equalised(graph)):
        formats = calibrate(g, {site.name: {"weight": form} for site in g.sites if site.weight}, X)
        errors.append(float((quantize(g, formats)(X) - graph.model(X)).detach().square().mean()))
    assert errors[1] < errors[0] / 2


def test_a_search_with_equalised_weights_is_resumed_and_rebuilt_to_the_same_numbers(tmp_path):
    key = {"search.calibration.equalisation": True}
    plain, run = search(tmp_path / "plain"), search(tmp_path, **key)
    loss = run.trial(0).metrics["loss"]
    assert loss != plain.trial(0).metrics["loss"]
    assert search(tmp_path, **key).trial(0).metrics == run.trial(0).metrics
    data = dataset_of((X.numpy(), np.arange(60) % 4))
    rebuilt = transform_trial(tmp_path / "run", 0, check=True, data=data, model=network())
    assert rebuilt.evaluation.loss == pytest.approx(loss, rel=1e-6)


def test_equalisation_and_other_widths_do_not_go_together(tmp_path):
    with pytest.raises(ConfigError, match="equalisation = true is for candidates that start from"):
        bf.search(
            model=nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(),
            data=(torch.randn(60, 6).numpy(), np.arange(60) % 3),
            space={"name": "channel_size", "_0": {"name": ["output_only"], "channel_multiplier": [1, 2]}, "by": "name"},
            metrics=["accuracy"], strategy="brute_force", project_dir=str(tmp_path), project="run",
            **{"search.calibration.equalisation": True},
        )  # fmt: skip
