"""Wider models compute the same, narrower ones what the kept channels give; the captured model never changes."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bitfront.errors import CaptureError, ConfigError
from bitfront.graph import capture, channels
from bitfront.operations.base import extend
from bitfront.operations.layout import Layout
from bitfront.transforms import group_widths, multiplied, widen
from engine.networks import NETWORKS, Stubborn, seeded_model
from properties import max_examples
from random_networks import BLOCKS, Network, Normed, networks

TRACED = [n for n in NETWORKS if not n.__name__.startswith("Stubborn")]


def inputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def captured(model, shape):
    return capture(model, inputs(2, *shape))


def free(graph):
    return [g for g in channels(graph).groups if not g.fixed]


def state(model):
    return {k: t.clone() for k, t in model.state_dict().items()}


def same_state(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(t, before[k]) for k, t in now.items())


def close(a, b):
    # Relative to the size of what is computed: the maps of random networks can grow.
    return (a - b).abs().max() <= 1e-5 * max(1, b.abs().max())


@st.composite
def changes(draw, graph, up, whole=False):
    """Widths for some of the free groups: all at least as wide as they are, or all at most."""
    widths = {}
    times = draw(st.integers(2, 3))
    for g in free(graph):
        blocks = g.width // g.multiple
        if whole:
            widths[g.index] = g.width * times
        elif draw(st.booleans()):
            widths[g.index] = g.multiple * draw(st.integers(blocks, 3 * blocks) if up else st.integers(1, blocks))
    return widths


# --- wider -----------------------------------------------------------------------------------------------------------


@max_examples(25, suite=6)
@given(st.data())
def test_a_wider_network_computes_the_same(data):
    graph = captured(data.draw(networks()), Network.shape)
    widths = data.draw(changes(graph, up=True))
    x = inputs(5, *Network.shape, seed=1)
    wider = widen(graph, widths)
    assert close(wider(x), graph.model(x))
    again = channels(capture(wider, x))
    assert [g.width for g in again.groups] == [widths.get(g.index, g.width) for g in channels(graph).groups]


@pytest.mark.slow
@max_examples(25, suite=6)
@given(st.data())
def test_a_norm_over_channels_needs_one_whole_factor_for_all_of_them(data):
    graph = captured(data.draw(networks((*BLOCKS, Normed, Normed))), Network.shape)
    widths = data.draw(changes(graph, up=True, whole=True))
    x = inputs(5, *Network.shape, seed=1)
    assert close(widen(graph, widths)(x), graph.model(x))


def outputs(structure, widths):
    """Layer → how many channels it makes, where groups have other widths."""
    width = {g.index: widths.get(g.index, g.width) for g in structure.groups}
    return {layer.name: sum(width[s.group] * s.repeat for s in layer.outputs) for layer in structure.layers}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("network", TRACED, ids=lambda n: n.__name__)
def test_every_way_of_putting_a_model_together_can_be_widened_and_narrowed(network):
    graph = captured(seeded_model(network), network.shape)
    x = inputs(5, *network.shape, seed=1)
    wider = widen(graph, {g.index: 2 * g.width for g in free(graph)})
    assert close(wider(x), graph.model(x))
    assert type(wider) is network
    least = {g.index: g.multiple for g in free(graph)}
    narrow = widen(graph, least)
    assert narrow(x).shape == graph.model(x).shape
    assert outputs(channels(capture(narrow, x)), {}) == outputs(channels(graph), least)


@pytest.mark.slow
@max_examples(25, suite=6)
@given(st.data())
def test_widening_is_deterministic_and_leaves_the_captured_model_unchanged(data):
    graph = captured(data.draw(networks()), Network.shape)
    widths = data.draw(changes(graph, up=data.draw(st.booleans())))
    before = state(graph.model)
    one = widen(graph, widths, noise=0.1, seed=3)
    assert same_state(widen(graph, widths, noise=0.1, seed=3), one.state_dict())
    assert same_state(graph.model, before)
    identity = {g.index: g.width for g in channels(graph).groups}
    assert same_state(widen(graph, identity), before)
    assert same_state(widen(graph, {}), before)
    for parameter in one.parameters():
        parameter.data.fill_(0)
    assert same_state(graph.model, before)


def test_copies_in_turn_and_their_shares_by_hand():
    model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
    graph = captured(model, (1,))
    wider = widen(graph, {"0": 5})
    a, b = model[0].weight[:, 0].tolist(), model[1].weight[0].tolist()
    assert wider[0].weight[:, 0].tolist() == [a[0], a[1], a[0], a[1], a[0]]
    assert wider[1].weight[0].tolist() == pytest.approx([b[0] / 3, b[1] / 2, b[0] / 3, b[1] / 2, b[0] / 3])


def test_noise_moves_the_copies_alone():
    graph = captured(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (3,))
    plain, noisy = widen(graph, {"0": 6}), widen(graph, {"0": 6}, noise=0.01)
    assert torch.equal(plain[0].weight[:4], noisy[0].weight[:4])
    moved = (plain[0].weight[4:] - noisy[0].weight[4:]).abs()
    assert moved.min() > 0
    assert moved.max() < 0.1
    assert torch.equal(plain[2].weight, noisy[2].weight)
    assert not torch.equal(noisy[0].weight, widen(graph, {"0": 6}, noise=0.01, seed=1)[0].weight)


class Between(nn.Module):
    """A function of maps (batch, 4, 6, 6) between two layers."""

    def __init__(self, function):
        super().__init__()
        self.a, self.function = nn.Conv2d(1, 4, 3), function
        self.head = nn.Linear(function(self.a(torch.zeros(1, 1, 8, 8))).flatten(1).shape[1], 2)

    def forward(self, x):
        return self.head(self.function(self.a(x)).flatten(1))


BETWEEN = {
    **{type(m).__name__: m for m in (nn.Threshold(0.1, 2.0), nn.Softshrink(0.1), nn.Softsign(), nn.Softmax2d())},
    **{type(m).__name__: m for m in (nn.ZeroPad2d(1), nn.CircularPad2d(1), nn.LPPool2d(2, 2), nn.AdaptiveMaxPool2d(2))},
    "adaptive_max_pool2d": lambda h: nn.functional.adaptive_max_pool2d(h, 2),
    "clip": lambda h: h.clip(-0.1, 0.1),
    "lerp": lambda h: torch.lerp(h, h.relu(), 0.3),
    "addcmul": lambda h: torch.addcmul(h, h, h.sigmoid()),
    "logsumexp": lambda h: h.logsumexp((2, 3), keepdim=True),
    "prod": lambda h: h.prod(-1),
    "type_as": lambda h: h.double().type_as(h.mean((2, 3))),
    "cumsum": lambda h: h.cumsum(-1),
    "outer": lambda h: torch.outer(h.flatten(), h.flatten()[:2]).view(h.size(0), -1),
}
FIXED = ("Softmax2d", "cumsum", "outer")


@pytest.mark.parametrize("name", BETWEEN)
def test_what_lies_between_two_layers_is_followed_or_fixes_them(name):
    graph = captured(Between(BETWEEN[name]), (1, 8, 8))
    x = inputs(3, 1, 8, 8, seed=1)
    assert bool(channels(graph).groups[1].fixed) == (name in FIXED)
    for g in free(graph):
        assert close(widen(graph, {g.index: 7})(x), graph.model(x))
        assert widen(graph, {g.index: 3})(x).shape == (3, 2)


@pytest.mark.usefixtures("operations")
def test_the_widths_of_a_layer_follow_by_its_record_alone():
    def normed(flow, call):
        last = call.tensor.dims[-1]
        flow.unify(flow.hold_values(call.held()["weight"]).dims[0], last)
        flow.take_statistics([last])
        flow.remember("normalized_shape", last)
        return Layout(call.tensor.dims)

    model = nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Linear(4, 2))
    nn.init.uniform_(model[1].weight)
    extend("rms_norm", channels=None)
    assert channels(captured(model, (3,))).groups[1].fixed == "what _1 (RMSNorm) does to channels is not known"
    extend("rms_norm", channels=normed)
    graph = captured(model, (3,))
    wider, x = widen(graph, {"_0": 8}), inputs(5, 3, seed=1)
    assert (wider[1].weight.shape, wider[1].normalized_shape, model[1].normalized_shape) == ((8,), (8,), (4,))
    assert close(wider(x), model(x))
    assert channels(graph).groups[1].mixed_by == ("_1",)


# --- narrower --------------------------------------------------------------------------------------------------------


def kept_by_hand(importance, width, multiple):
    """The most important of each block, ties to the first."""
    block = len(importance) // multiple
    kept = []
    for start in range(0, len(importance), block):
        order = sorted(range(start, start + block), key=lambda i: (-importance[i], i))
        kept += sorted(order[: width // multiple])
    return kept


@max_examples(25, suite=6)
@given(st.data())
def test_a_narrower_network_computes_what_the_kept_channels_give(data):
    """The original, with the weights that take in removed channels at 0, computes the same."""
    graph = captured(data.draw(networks()), Network.shape)
    structure = channels(graph)
    widths = data.draw(changes(graph, up=False))
    masked = copy.deepcopy(graph.model)
    tensors = dict(masked.named_parameters())
    kept = {}
    for g in structure.groups:
        importance = [0.0] * g.width
        for layer in structure.layers:
            weight = tensors[layer.weight].detach().double()
            position = 0
            for s in layer.outputs:
                for c in range(structure.groups[s.group].width):
                    for _ in range(s.repeat):
                        if s.group == g.index:
                            importance[c] += weight[position].abs().sum().item()
                        position += 1
        kept[g.index] = set(kept_by_hand(importance, widths.get(g.index, g.width), g.multiple))
    for layer in structure.layers:
        described = structure.tensors[layer.weight]
        if described.contracted is None:
            continue
        flags = [
            c in kept[s.group]
            for s in layer.inputs
            for c in range(structure.groups[s.group].width)
            for _ in range(s.repeat)
        ]
        with torch.no_grad():
            blocks = described.blocks
            rows, inner = tensors[layer.weight].shape[0] // blocks, len(flags) // blocks
            for b in range(blocks):
                mask = torch.tensor(flags[b * inner : (b + 1) * inner])
                tensors[layer.weight][b * rows : (b + 1) * rows][:, ~mask] = 0
    x = inputs(5, *Network.shape, seed=1)
    assert close(widen(graph, widths)(x), masked(x))


def test_ties_keep_the_first_channels_in_their_order():
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0], [2, 0], [0, 1], [0, -2]]))
    narrow = widen(captured(model, (2,)), {"0": 3})
    assert narrow[0].weight.tolist() == [[1, 0], [2, 0], [0, -2]]
    # Short lists may be sorted stably by chance.
    model = nn.Sequential(nn.Linear(1, 3000, bias=False), nn.Linear(3000, 1))
    nn.init.ones_(model[0].weight)
    graph = captured(model, (1,))
    assert torch.equal(widen(graph, {"0": 1000})[1].weight, graph.model[1].weight[:, :1000])


# --- what stays ------------------------------------------------------------------------------------------------------


def test_everything_but_the_sizes_stays():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=2, dilation=2, padding_mode="reflect", bias=False),
        nn.BatchNorm2d(4, eps=1e-3, momentum=0.3),
        nn.PReLU(4),
        nn.Conv2d(4, 4, 3, padding="same", groups=4),
        nn.Conv2d(4, 6, 1, groups=2),
        nn.GroupNorm(2, 6, eps=1e-2, affine=False),
        nn.InstanceNorm2d(6),
        nn.Flatten(2),
        nn.Conv1d(6, 3, 1),
        nn.Flatten(),
        nn.LayerNorm(48, elementwise_affine=False),
        nn.Linear(48, 3, bias=False),
    ).double()
    model[0].weight.requires_grad_(False)
    graph = capture(model, inputs(2, 2, 8, 8).double())
    wider = widen(graph, {"0": 8, "4": 12, "8": 6})
    x = inputs(3, 2, 8, 8).double()
    assert torch.allclose(wider(x), graph.model(x), atol=1e-9)
    for attribute in ("stride", "padding", "dilation", "padding_mode", "bias", "kernel_size"):
        assert getattr(wider[0], attribute) == getattr(model[0], attribute)
    assert (wider[0].in_channels, wider[0].out_channels, wider[0].groups) == (2, 8, 1)
    assert (wider[1].num_features, wider[1].eps, wider[1].momentum) == (8, 1e-3, 0.3)
    assert wider[2].num_parameters == 8
    assert (wider[3].in_channels, wider[3].out_channels, wider[3].groups) == (8, 8, 8)
    assert (wider[4].in_channels, wider[4].out_channels, wider[4].groups) == (8, 12, 2)
    assert (wider[5].num_channels, wider[5].num_groups, wider[5].eps) == (12, 2, 1e-2)
    assert wider[6].num_features == 12
    assert (wider[8].in_channels, wider[8].out_channels) == (12, 6)
    assert wider[10].normalized_shape == (96,)
    assert (wider[11].in_features, wider[11].out_features, wider[11].bias) == (96, 3, None)
    assert not wider[0].weight.requires_grad
    assert wider[3].weight.requires_grad
    assert {t.dtype for t in wider.parameters()} == {torch.float64}
    assert not any(m.training for m in wider.modules())


def test_a_shared_weight_stays_shared():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.head(self.b(torch.relu(self.a(self.stem(x)))))

    graph = captured(Tied(), (3,))
    wider = widen(graph, {"stem": 7})
    x = inputs(5, 3)
    assert close(wider(x), graph.model(x))
    assert wider.a.weight is wider.b.weight
    assert wider.b.in_features == wider.a.out_features == 7


def test_fresh_parameters_follow_the_seed_and_leave_the_global_one_alone():
    graph = captured(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), (3,))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two, other = (widen(graph, {"0": 6}, init="fresh", seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert same_state(one, two.state_dict())
    assert not torch.equal(one[0].weight, other[0].weight)
    assert not torch.equal(one[0].weight[:4], graph.model[0].weight)
    torch.manual_seed(1)
    assert torch.equal(nn.Linear(3, 6).weight, one[0].weight)


# --- mistakes --------------------------------------------------------------------------------------------------------

GROUPED = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 1, groups=2), nn.Flatten(), nn.Linear(6, 2))


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(3, 2), nn.Linear(3, 4), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.cat([self.a(x), self.b(x)], 1) + self.c(x))


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"0": 5}, "'0' cannot be 5: _2 must cut it into equal groups, so it must be a multiple of 2"),
        ({"_0": 0}, "'_0' is 0; allowed: whole numbers from 1"),
        ({"_0": True}, "'_0' is True"),
        ({"_4": 3}, "'_4' is 2 and cannot be 3: it is fixed \\(the model's output\\)"),
        ({0: 2}, "fixed \\(the model's input\\)"),
        ({9: 2}, "no channel group 9; allowed: 0 to 3"),
        ({"_1": 2}, "no layer '_1' has a width.*: _0, _2, _4"),
        ({1: 4, "_0": 8}, "1 and '_0' share their channels, but are given different widths: 4 and 8"),
    ],
)
def test_impossible_widths_say_why(widths, message):
    with pytest.raises(ConfigError, match=message):
        widen(captured(GROUPED, (1, 1, 1)), widths)


def test_a_layer_of_several_groups_asks_for_these():
    graph = captured(Joined(), (3,))
    with pytest.raises(ConfigError, match=r"'c' is part of a concatenation.*: 1, 2"):
        widen(graph, {"c": 12})
    assert widen(graph, {"a": 3}).c.out_features == 7
    with pytest.raises(ConfigError, match="init is 'new'"):
        widen(graph, {}, init="new")


def test_untraced_models_are_refused_with_the_line_that_stopped_the_tracer():
    with pytest.raises(CaptureError, match=r"torch.fx can trace.*networks.py:\d+: return self.b"):
        widen(captured(seeded_model(Stubborn), Stubborn.shape), {})


# --- multipliers -----------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 10), nn.Linear(10, 2)

    def forward(self, x):
        return self.head(self.c(self.a(x) + self.b(x)))


@pytest.mark.parametrize(
    ("multipliers", "divisor", "expected"),
    [
        ({"a": 2, "b": 1}, 1, {1: 12}),
        ({"b": 2, "c": 1.5}, 1, {1: 12, 2: 15}),
        ({"a": 2, "b": 2, "head": 1}, 1, {1: 12}),
        ({"c": 0.75}, 1, {2: 8}),
        ({"c": 2}, 8, {2: 24}),
        ({"a": 0.01, "c": 0.1}, 4, {1: 4, 2: 4}),
        ({"a": 1}, 4, {}),
    ],
)
def test_multipliers_become_widths(multipliers, divisor, expected):
    graph = captured(Pair(), (3,))
    assert multiplied(graph, multipliers, divisor) == expected
    assert group_widths(channels(graph), expected) == {g: w for g, w in expected.items() if w != {1: 6, 2: 10}[g]}
    widen(graph, expected)(inputs(2, 3))


def test_multipliers_round_to_what_grouped_convolutions_take():
    graph = captured(GROUPED, (1, 1, 1))
    assert multiplied(graph, {"0": 1.25}) == {1: 6}
    assert multiplied(graph, {"0": 1.25, "2": 2}, divisor=3) == {1: 6, 2: 12}


def test_a_layer_of_several_groups_multiplies_them_all():
    assert multiplied(captured(Joined(), (3,)), {"c": 2}) == {1: 4, 2: 8}


@pytest.mark.parametrize(
    ("multipliers", "divisor", "message"),
    [
        ({"a": 2, "b": 3}, 1, "'a' and 'b' share their channels, but have different multipliers: 2 and 3"),
        ({"head": 2}, 1, "'head' cannot be multiplied by 2: it is fixed \\(the model's output\\)"),
        ({"d": 2}, 1, "no layer 'd' has a width"),
        ({"hea": 2}, 1, "Did you mean 'head'"),
        ({"a": 0}, 1, "'a' is 0; allowed: numbers above 0"),
        ({"a": float("inf")}, 1, "'a' is inf"),
        ({"a": 2}, 0, "divisor is 0"),
    ],
)
def test_impossible_multipliers_say_why(multipliers, divisor, message):
    with pytest.raises(ConfigError, match=message):
        multiplied(captured(Pair(), (3,)), multipliers, divisor)
