"""Corrections: the output of a corrected site, compared with the same computation by hand."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.transforms import quantize
from bitfront.transforms.correct import (
    Correction,
    corrected_bias,
    has_bias,
    norms_behind,
    output_statistics,
    rescaled_statistics,
)

COARSE, DATA = Integer(3, 1), Integer(5, 2)


def inputs(*shape, seed=0):
    return 1.0 + 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def initialised(model, seed=0):
    """`model` with weights and statistics from a seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.3, 2, generator=generator)
            elif tensor.is_floating_point():
                tensor.normal_(0, 0.5, generator=generator)
    return model.eval()


def coarse(graph, site):
    return COARSE.round(graph.model.state_dict()[site.weight])


class Function(nn.Module):
    """A strided, grouped convolution as a function, with an argument by name."""

    def __init__(self):
        super().__init__()
        self.k, self.b = nn.Parameter(torch.zeros(4, 2, 3)), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return F.conv1d(x, self.k, bias=self.b, stride=2, padding=1, groups=2).flatten(1)


MODELS = {
    "linear": (nn.Sequential(nn.Linear(6, 5)), (6,)),
    "tokens": (nn.Sequential(nn.Linear(6, 5), nn.Flatten()), (3, 6)),
    "conv1d": (nn.Sequential(nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), nn.Flatten()), (4, 7)),
    "conv2d": (nn.Sequential(nn.Conv2d(4, 6, 3, padding=2, stride=2, groups=2), nn.Flatten()), (4, 7, 5)),
    "function": (Function(), (4, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_corrected_bias_leaves_the_mean_output_where_it_was(name):
    model, shape = MODELS[name]
    model, x = initialised(copy.deepcopy(model)), inputs(64, *shape)
    graph = capture(model, x[:2])
    (site,) = graph.sites
    assert has_bias(graph, site)
    before = copy.deepcopy(graph.model.state_dict())
    bias = corrected_bias(graph, site, coarse(graph, site), [x])
    floating = model(x).detach()
    formats = {site.name: {"weight": COARSE}}
    plain = quantize(graph, formats)(x).detach()
    corrected = quantize(graph, formats, corrections={site.name: Correction(bias)})(x).detach()
    # Channels are the last dimension of a linear layer, the second of a convolution, and flattened with positions.
    groups = len(bias)
    parts = [
        t.view(len(x), -1, groups).flatten(0, 1) if site.op == "linear" else t.view(len(x), groups, -1).movedim(1, 2)
        for t in (floating, plain, corrected)
    ]
    floating, plain, corrected = (p.reshape(-1, groups).double().mean(0) for p in parts)
    assert (plain - floating).abs().max() > 0.05
    assert (corrected - floating).abs().max() < 1e-5
    assert all(torch.equal(t, before[k]) for k, t in graph.model.state_dict().items())


def test_the_expectation_is_over_all_calls_of_a_site():
    graph = capture(initialised(nn.Sequential(nn.Linear(6, 5))), inputs(2, 6))
    x = inputs(60, 6)
    site = graph.sites[0]
    whole = corrected_bias(graph, site, coarse(graph, site), [x])
    parts = corrected_bias(graph, site, coarse(graph, site), [x[:10], x[10:].view(5, 10, 6)])
    assert torch.allclose(whole, parts, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "function"])
@pytest.mark.parametrize("form", [None, Integer(6, 3)], ids=["float", "quantized"])
def test_a_corrected_model_has_the_bias_in_its_state_and_bakes_to_the_same(name, form):
    model, shape = MODELS[name]
    graph = capture(initialised(copy.deepcopy(model)), inputs(2, *shape))
    (site,) = graph.sites
    bias = torch.arange(len(graph.model.state_dict()[site.bias])) / 7
    formats = {site.name: {"weight": COARSE, **({"bias": form} if form else {})}}
    corrections = {site.name: Correction(bias)}
    x = inputs(9, *shape)
    loose, baked = (quantize(graph, formats, corrections=corrections, bake=b) for b in (False, True))
    assert torch.equal(loose(x), baked(x))
    held = form.round(bias) if form else bias
    weight = COARSE.round(graph.model.state_dict()[site.weight])
    if name == "linear":
        assert torch.equal(loose(x), F.linear(x.double(), weight.double()).float() + held)
    else:
        assert torch.equal(loose(x), F.conv1d(x, weight, held, stride=2, padding=1, groups=2).flatten(1))
    assert any(torch.equal(t, bias) for t in loose.state_dict().values())
    if name == "linear":
        assert torch.equal(baked.state_dict()[site.bias], held)
        assert list(baked.state_dict()) == list(graph.model.state_dict())


class Norms(nn.Module):
    """Two batch norms behind one convolution, one that is called twice, one behind a sum, one without statistics."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(2, 2, 1) for _ in range(3))
        self.one, self.other, self.twice, self.sum = (nn.BatchNorm2d(2) for _ in range(4))
        self.without = nn.BatchNorm2d(2, track_running_stats=False)

    def forward(self, x):
        h = self.a(x)
        h = self.one(h) + self.other(h) + self.twice(self.b(x))
        return (self.twice(self.sum(h)) + self.without(self.c(x))).flatten(1)


def test_batch_norms_right_behind_a_site_are_listed_and_no_others():
    graph = capture(initialised(Norms()), inputs(2, 2, 3, 3))
    norms = {s.name: norms_behind(graph, s) for s in graph.sites}
    assert norms.pop("a") == ("one", "other")
    assert set(norms.values()) == {()}


def statistics(t):
    rows = t.detach().double().movedim(1, 0).flatten(1)
    return rows.mean(1), rows.var(1, correction=0)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), (6,)),
        (nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(3), nn.Flatten()), (3, 6)),
        (nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False), nn.Flatten()), (2, 5, 5)),
    ],
    ids=["linear", "tokens", "conv2d"],
)
def test_a_batch_norm_with_new_statistics_sends_on_what_it_sent_before(model, shape):
    graph = capture(initialised(copy.deepcopy(model)), inputs(2, *shape))
    x = inputs(200, *shape)
    site, norm = graph.sites[0], graph.model.get_submodule("1")
    formats = {"data_in": DATA, "weight": COARSE}
    sides = [output_statistics(graph, site, f, {}, x) for f in ({}, formats)]
    assert torch.allclose(sides[0][0], statistics(graph.model[0](x))[0])
    assert torch.allclose(sides[0][1], statistics(graph.model[0](x))[1])
    correction = Correction(None, {"1": rescaled_statistics(norm, *sides)})
    new = quantize(graph, {site.name: formats}, corrections={site.name: correction})
    plain = quantize(graph, {site.name: formats})
    (mean, variance), (wanted_mean, wanted_variance) = statistics(new[:2](x)), statistics(graph.model[:2](x))
    assert torch.allclose(mean, wanted_mean, atol=1e-5)
    assert torch.allclose(variance, wanted_variance, rtol=1e-3)
    assert not torch.allclose(statistics(plain[:2](x))[0], wanted_mean, atol=1e-2)


def test_a_channel_that_quantizing_makes_constant_keeps_its_variance():
    model = initialised(nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)))
    with torch.no_grad():
        model[0].weight[1] = 0.01  # rounds to zero
        model[0].weight[2] = 0.0  # is constant as it is
    graph, x = capture(model, inputs(2, 6)), inputs(200, 6)
    sides = [output_statistics(graph, graph.sites[0], f, {}, x) for f in ({}, {"weight": COARSE})]
    mean, variance = rescaled_statistics(model[1], *sides)
    assert torch.equal(variance[1:], model[1].running_var[1:])
    assert mean[2] == model[1].running_mean[2]
    correction = Correction(None, {"1": (mean, variance)})
    out = quantize(graph, {"_0": {"weight": COARSE}}, corrections={"_0": correction})(x)
    assert torch.allclose(statistics(out)[0], statistics(model(x))[0], atol=1e-5)


def test_unchanged_statistics_change_nothing():
    norm = initialised(nn.BatchNorm1d(4))
    same = (torch.tensor([1.0, -2.0, 0.0, 3.0]).double(), torch.tensor([1.0, 0.5, 0.0, 7.0]).double())
    mean, variance = rescaled_statistics(norm, same, same)
    assert torch.equal(mean, norm.running_mean)
    assert torch.equal(variance, norm.running_var)


def test_the_bias_counts_in_the_statistics():
    graph, x = capture(initialised(nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))), inputs(2, 6)), inputs(50, 6)
    site = graph.sites[0]
    plain = output_statistics(graph, site, {}, {}, x)
    shifted = output_statistics(graph, site, {}, {"bias": graph.model[0].bias.detach() + 2}, x)
    assert torch.allclose(shifted[0], plain[0] + 2)
    coarse = output_statistics(graph, site, {"bias": replace(COARSE, frac_width=-1)}, {}, x)
    assert not torch.allclose(coarse[0], plain[0])
