"""Adaptive rounding: a weight on its format's grid, next to the float one, with less error in the layer's output."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitfront.formats import FORMATS
from bitfront.formats.base import WEIGHT, OperandKind
from bitfront.graph import capture
from bitfront.graph.capture import parameter
from bitfront.transforms import quantize
from bitfront.transforms.correct import Correction
from bitfront.transforms.rounding import adaptive_weight, has_two_sides, learns_rounding


class Function(nn.Module):
    """Layers as functions: a grouped convolution, a product with a view of a weight."""

    def __init__(self):
        super().__init__()
        self.k, self.w = nn.Parameter(torch.zeros(4, 2, 3)), nn.Parameter(torch.zeros(16, 3))

    def forward(self, x):
        return F.linear(F.conv1d(x, self.k, stride=2, padding=1, groups=2).flatten(1), self.w.t())


def seeded(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0, 0.5, generator=generator)
    return model.eval()


def samples(*shape, seed=0):
    """Inputs whose values depend on each other, with a mean, as behind a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator)
    return (torch.randn(*shape, generator=generator) + shared).relu()


LAYERS = {
    "linear": (nn.Linear(12, 5), (12,)),
    "few samples": (nn.Linear(90, 5), (90,)),
    "tokens": (nn.Linear(6, 5), (3, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (4, 7)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=2, stride=2, groups=2), (4, 7, 5)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), (6, 7, 5)),
    "conv3d": (nn.Conv3d(2, 3, 2), (2, 4, 4, 3)),
    "transposed": (nn.ConvTranspose2d(4, 3, 3, stride=2), (4, 4, 5)),
    "transposed groups": (nn.ConvTranspose1d(4, 6, 3, groups=2, output_padding=1, stride=2), (4, 5)),
}
FORMATS_WITH_GRID = {
    "fixed point": ("integer", {"width": 3, "frac_width": "auto"}),
    "fixed point, saturating": ("integer", {"width": 3, "frac_width": 3}),
    "per tensor": ("affine", {"width": 3, "granularity": "tensor"}),
    "per channel": ("affine", {"width": 3}),
    "zero points": ("affine", {"width": 3, "symmetric": False}),
    "groups": ("affine", {"width": 3, "group_size": 2}),
}


def calibrated(name, weight):
    kind, settings = FORMATS_WITH_GRID[name]
    return FORMATS.get(kind).parse(settings, WEIGHT).calibrated(weight)


def learned(layer, x, form_of, iterations=300):
    graph = capture(nn.Sequential(seeded(copy.deepcopy(layer)), nn.Flatten()), x[:2])
    (site,) = graph.sites
    weight = parameter(graph.model, site.weight)
    form = form_of(weight)
    return graph, site, form, weight, adaptive_weight(graph, site, form, [x], iterations)


@pytest.mark.parametrize("name", LAYERS)
def test_the_output_error_falls_and_the_weight_is_one_of_two_neighbours(name):
    layer, shape = LAYERS[name]
    x = samples(40, *shape)

    def form_of(weight):
        axis = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
        return (
            FORMATS.get("affine")
            .parse({"width": 3}, OperandKind("weight", samples=False, channel_axis=axis))
            .calibrated(weight)
        )

    graph, site, form, weight, rounded = learned(layer, x, form_of)
    assert torch.equal(form.round(rounded), rounded)
    step = form.grid.along(form.grid.step, weight)
    assert ((rounded - weight).abs() < step * 1.0001).all()
    nearest = form.round(weight)
    assert not torch.equal(rounded, nearest)
    module = graph.model.get_submodule(site.path)

    def error(candidate):
        other = copy.deepcopy(module)
        other.weight.data = candidate
        with torch.no_grad():
            return (other(x) - module(x)).double().square().mean()

    assert error(rounded) < 0.9 * error(nearest)


def test_the_error_is_nearly_that_of_the_best_of_all_roundings():
    x = samples(60, 10)
    _, _, form, weight, rounded = learned(nn.Linear(10, 6), x, lambda w: calibrated("per tensor", w), 1000)
    step, totals = form.grid.step, torch.zeros(3)
    up = torch.cartesian_prod(*[torch.arange(2.0)] * 10)  # all 2^10 ways to round a channel
    for channel in range(6):
        below = torch.floor(weight[channel] / step)
        ways = (torch.clamp(below + up, form.grid.low, form.grid.high)) * step
        errors, mine = (((w - weight[channel]) @ x.T).square().mean(-1) for w in (ways, rounded[channel]))
        nearest = ((form.round(weight)[channel] - weight[channel]) @ x.T).square().mean()
        totals += torch.stack([mine, errors.min(), nearest])
    mine, best, nearest = totals.tolist()
    assert best <= mine < best + 0.25 * (nearest - best)


@pytest.mark.parametrize("name", FORMATS_WITH_GRID)
def test_any_complete_grid_will_do(name):
    x = samples(40, 12)
    _, _, form, weight, rounded = learned(LAYERS["linear"][0], x, lambda w: calibrated(name, w))
    assert has_two_sides(form)
    assert torch.equal(form.round(rounded), rounded)
    errors = [((w - weight) @ x.T).double().square().mean() for w in (rounded, form.round(weight))]
    assert errors[0] < 0.8 * errors[1]
    low, high = form.bounds(weight)
    assert ((rounded >= low) & (rounded <= high)).all()


@pytest.mark.parametrize("kind", ["ternary", "binary", "nf4", "mx", "log"])
def test_formats_without_a_complete_grid_have_nothing_to_learn(kind):
    settings = {"log": {"width": 4}, "mx": {"element": "int8"}}
    form = FORMATS.get(kind)
    required = {n: p for n, p in form.parameters.items() if p.default is ...}
    given = {
        n: settings.get(kind, {}).get(n, p.low if p.low is not None else (p.words or [None])[0])
        for n, p in required.items()
    }
    assert not has_two_sides(form.parse(given, WEIGHT).calibrated(torch.randn(4, 64)))


def test_no_channel_gets_worse_and_constant_inputs_change_nothing():
    x = samples(40, 12)
    for iterations in (1, 7):
        _, _, form, weight, rounded = learned(LAYERS["linear"][0], x, lambda w: calibrated("per tensor", w), iterations)
        errors = [((w - weight) @ x.T).double().square().mean(1) for w in (rounded, form.round(weight))]
        assert (errors[0] <= errors[1]).all()
    for nothing in (torch.zeros(40, 12), torch.full((40, 12), torch.nan)):
        _, _, form, weight, rounded = learned(LAYERS["linear"][0], nothing, lambda w: calibrated("per tensor", w))
        assert torch.equal(rounded, form.round(weight))


def test_samples_that_are_not_finite_are_left_out():
    x = samples(40, 12)
    broken = torch.cat([x, torch.full((3, 12), torch.inf), torch.full((1, 12), torch.nan)])
    for layer, given, odd in ((LAYERS["linear"][0], x, broken),):
        first, second = (learned(layer, values, lambda w: calibrated("per tensor", w))[-1] for values in (given, odd))
        assert torch.equal(first, second)


def test_the_same_bits_every_time():
    x = samples(40, *LAYERS["conv2d"][1])
    first, second = (learned(LAYERS["conv2d"][0], x, lambda w: calibrated("per channel", w))[-1] for _ in range(2))
    assert torch.equal(first, second)


def test_a_weight_that_others_use_keeps_its_nearest_values():
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    shared = capture(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(6, 4)), torch.randn(2, 6))
    assert [site.name for site in shared.sites if learns_rounding(shared, site)] == ["_4"]
    functions = capture(seeded(Function()), torch.randn(2, 4, 8))
    assert [site.op for site in functions.sites if learns_rounding(functions, site)] == ["conv1d"]
    table = capture(nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3)), torch.zeros(2, 3).long())
    assert [site.op for site in table.sites if learns_rounding(table, site)] == ["linear"]


@pytest.mark.parametrize("name", ["module", "function"])
def test_a_model_deploys_exactly_the_learned_weight(name):
    model = Function() if name == "function" else nn.Sequential(nn.Conv1d(4, 4, 3, 2, 1, groups=2, bias=False))
    x = samples(30, 4, 8)
    graph = capture(seeded(model), x[:2])
    site = next(s for s in graph.sites if s.op == "conv1d")
    weight = parameter(graph.model, site.weight)
    form = calibrated("per tensor", weight)
    rounded = adaptive_weight(graph, site, form, [x], 300)
    assert not torch.equal(rounded, form.round(weight))
    loose, baked = (
        quantize(graph, {site.name: {"weight": form}}, corrections={site.name: Correction(weight=rounded)}, bake=b)
        for b in (False, True)
    )
    by_hand = F.conv1d(x, rounded, stride=2, padding=1, groups=2)
    expected = F.linear(by_hand.flatten(1), graph.model.w.t()) if name == "function" else by_hand
    for deployed in (loose, baked):
        assert torch.allclose(deployed(x), expected, atol=1e-5)
        assert any(t.shape == rounded.shape and torch.equal(t, rounded) for t in deployed.state_dict().values())
    assert torch.equal(loose(x), baked(x))
    assert torch.equal(parameter(graph.model, site.weight), weight)
