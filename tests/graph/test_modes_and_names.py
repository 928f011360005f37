"""Models that do something else in training, and names that clash or are no identifiers: what is rebuilt trains as the
model does, and every layer is a site of its own."""

import copy
import keyword

import pytest
import torch
import torch.nn.functional as F
from small_net import Net, sample, wide
from torch import nn

from bitfront.formats import FORMATS
from bitfront.formats.base import WEIGHT
from bitfront.graph import capture
from bitfront.graph.checking import check_same
from bitfront.transforms import quantize


def bend(_module, _inputs, out):
    return torch.sin(3 * out)


# --- training ---------------------------------------------------------------------------------------------------------


class Dropping(Net):
    def middle(self, h):
        return F.dropout(h, 0.5, self.training)


class DroppingInPlace(Net):
    def middle(self, h):
        return F.dropout(h, p=0.5, training=self.training, inplace=True)


class DroppingByRate(Net):
    def middle(self, h):
        return F.dropout(h, 0.5 if self.training else 0.0)


class Normalising(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("variance", torch.ones(6))

    def middle(self, h):
        return F.batch_norm(h, self.mean, self.variance, training=self.training)


class SkippingAtRandom(Net):
    def middle(self, h):
        return h if self.training and torch.rand(1).item() < 0.5 else h * 2


class AddingNoise(Net):
    def middle(self, h):
        return h + torch.randn_like(h) if self.training else h


class KeepingANormStill(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def middle(self, h):
        return self.norm(h)


class WithoutGradients(Net):
    def middle(self, h):
        with torch.no_grad():
            return h * 2


class Counting(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(1))

    def middle(self, h):
        if self.training:
            self.steps.add_(1)
        return h * (1 + self.steps)


FOLLOWED = [Net, Dropping, DroppingInPlace, DroppingByRate, Normalising]
NOT_FOLLOWED = [SkippingAtRandom, AddingNoise, KeepingANormStill, WithoutGradients, Counting]


def outputs_in_training(model):
    found = []
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        found.append(model(sample()).detach())
    return found


@pytest.mark.parametrize("factory", FOLLOWED + NOT_FOLLOWED)
def test_what_is_rebuilt_trains_as_the_model_does(factory):
    model = factory()
    graph = capture(model, sample(), training=True)
    assert check_same(graph, model, sample()) == ""
    assert check_same(graph, model, sample(), training=True) == ""
    functions = [s.name for s in graph.sites if not s.path]
    assert functions == ([] if factory in NOT_FOLLOWED else ["add"])
    assert bool(graph.not_in_training) == (factory in NOT_FOLLOWED)
    rebuilt = quantize(graph, {s.name: {"data_in": wide()} for s in graph.sites})
    before = copy.deepcopy(model)
    for ours, theirs in zip(outputs_in_training(rebuilt.train()), outputs_in_training(before.train()), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    # And in evaluation again, whatever training has changed in buffers.
    assert torch.allclose(rebuilt.eval()(sample()), before.eval()(sample()), atol=1e-4)


class Adding(Dropping):
    def forward(self, x):
        h = F.relu(self.a(x))
        return self.b(F.dropout(h, 0.9, self.training) + h)


def test_dropout_as_a_function_is_active_in_a_rewritten_graph():
    graph = capture(Adding(), sample())
    rebuilt = quantize(graph, {name: {"data_in": wide()} for name in ("a", "relu", "add")}).train()
    one, two, _ = outputs_in_training(rebuilt)
    assert not torch.equal(one, two)
    assert [(s.node, s.in_training, s.in_evaluation) for s in graph.switches] == [("dropout", True, False)]


def test_a_difference_is_said():
    model, other = Net(), Net()
    graph = capture(model, sample())
    with torch.no_grad():
        other.act.register_forward_hook(bend)
    assert check_same(graph, other, sample()) == "the output of act is another one"
    model.a.weight.requires_grad_(False)
    assert check_same(graph, model, sample(), training=True) == "a.weight gets a gradient in training"


# --- names ------------------------------------------------------------------------------------------------------------


class Clashing(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Module()
        self.a.b = nn.Linear(8, 6)
        for name in ("a_b", "class", "my-layer 1", "my_layer_1", "0", "lambda"):
            self.add_module(name, nn.Linear(6, 6))

    def forward(self, x):
        h = self.a.b(x)
        for name in ("a_b", "class", "my-layer 1", "my_layer_1", "0", "lambda"):
            h = torch.relu(self._modules[name](h))
        return h


class ClashingTraced(Clashing):
    def forward(self, x):
        h = self.a.b(x)
        for name in ("a_b", "my-layer 1", "my_layer_1", "0"):
            h = torch.relu(self._modules[name](h))
        return h


class ClashingUntraced(Clashing):
    def forward(self, x):
        return super().forward(x) if x.sum() < 1e9 else x


@pytest.mark.parametrize("factory", [Clashing, ClashingTraced, ClashingUntraced])
def test_every_layer_is_a_site_with_a_name_of_its_own(factory):
    model = factory().eval()
    graph = capture(model, sample())
    assert (graph.fx_graph is not None) == (factory is ClashingTraced)
    names = [n.name for n in graph.nodes]
    assert len(set(names)) == len(names)
    linear = [s for s in graph.sites if s.op == "linear"]
    assert len({s.path for s in linear}) == len(linear) == (5 if factory is ClashingTraced else 7)
    assert all(s.macs == (48 if s.path == "a.b" else 36) for s in linear)
    if factory is Clashing:
        assert any(keyword.iskeyword(word) and word in graph.untraced for word in ("class", "lambda"))
    # Formats at one layer change that layer.
    coarse = FORMATS.get("integer").parse({"width": 3, "frac_width": 1}, WEIGHT)
    for site in linear:
        by_hand = copy.deepcopy(model)
        weight = by_hand.get_submodule(site.path).weight
        with torch.no_grad():
            weight.copy_((weight * 2).round().clamp(-4, 3) / 2)
        # Sums with an input in float are taken in float64 here, and by torch in float32.
        torch.testing.assert_close(quantize(graph, {site.name: {"weight": coarse}})(sample()), by_hand(sample()))
