"""Which dimensions change together: by hand, by torch_pruning's account, and what is fixed rather than guessed."""

import re

import pytest
import torch
import torch.nn.functional as F
import torch_pruning
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from bitfront.errors import CaptureError
from bitfront.graph import capture, channels
from bitfront.graph.segments import Variables
from bitfront.operations.base import extend
from bitfront.operations.channels import elementwise
from bitfront.operations.layout import repeated
from engine.networks import Dense, Functional, Images, SharedLayer, seeded_model
from properties import max_examples
from random_networks import (
    BLOCKS,
    Concatenating,
    Depthwise,
    Grouped,
    Inverted,
    Network,
    Overlapping,
    Squeezed,
    networks,
)


def of(model, *shape):
    return channels(capture(model, torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))))


def axes(structure, name):
    return [[(s.group, s.repeat) for s in axis] for axis in structure.tensors[name].axes]


def table(structure):
    return [(g.width, g.producers, g.consumers, g.fixed) for g in structure.groups]


INPUT, OUTPUT = "the model's input", "the model's output"


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_a_chain_of_convolutions_into_a_linear():
    structure = of(seeded_model(Images), *Images.shape)
    assert table(structure) == [
        (1, (), ("_0",), INPUT),
        (4, ("_0",), ("_4",), ""),
        (6, ("_4",), ("_7",), ""),
        (4, ("_7",), (), OUTPUT),
    ]
    assert axes(structure, "4.weight") == [[(2, 1)], [(1, 1)], [], []]
    assert axes(structure, "7.weight") == [[(3, 1)], [(2, 4)]]
    assert axes(structure, "1.running_var") == axes(structure, "1.bias") == [[(1, 1)]]
    assert "1.num_batches_tracked" not in structure.tensors
    assert structure.layer("_4") is structure.layer("4")


def test_a_concatenation_is_its_parts_in_order():
    structure = of(seeded_model(Dense), *Dense.shape)
    assert [(g.width, g.producers) for g in structure.groups] == [
        (6, ()),
        (3, ("a",)),
        (4, ("b",)),
        (2, ("c",)),
        (4, ("head",)),
    ]
    assert axes(structure, "head.weight") == [[(4, 1)], [(3, 1), (0, 1), (1, 1), (2, 1)]]
    assert [g.fixed for g in structure.groups] == [INPUT, "", "", "", OUTPUT]


def test_functions_of_parameters_are_layers_too():
    structure = of(seeded_model(Functional), *Functional.shape)
    assert table(structure)[1] == (5, ("linear",), ("matmul",), "")
    assert axes(structure, "matrix") == [[(1, 1)], [(2, 1)]]
    assert structure.tensors["matrix"].contracted == 0
    assert axes(structure, "gain") == [[(1, 1)]]


def test_two_calls_of_a_module_tie_its_dimensions():
    structure = of(seeded_model(SharedLayer), *SharedLayer.shape)
    assert table(structure)[0] == (6, ("fc", "fc_1"), ("fc", "fc_1", "head"), INPUT)


def plan(*blocks, flat=False):
    return of(Network(blocks, flat), *Network.shape)


def test_depthwise_convolutions_have_the_channels_of_their_input():
    structure = plan((Depthwise, 1))
    assert table(structure)[1] == (3, ("stem", "blocks_0_a_0"), ("blocks_0_a_0", "hidden"), "")
    assert axes(structure, "blocks.0.a.0.weight") == [[(1, 2)], [], [], []]
    assert structure.tensors["blocks.0.a.0.weight"].contracted is None
    assert axes(structure, "hidden.weight") == [[(2, 1)], [(1, 2)]]
    structure = plan((Inverted, 0))
    assert [g.producers for g in structure.groups if not g.fixed] == [
        ("stem", "blocks_0_c_0"),
        ("blocks_0_a_0", "blocks_0_b_0"),
        ("hidden",),
    ]


def test_grouped_convolutions_say_of_what_widths_must_be_multiples():
    structure = plan((Grouped, 1), flat=True)
    assert [(g.width, g.multiple, g.blocked_by) for g in structure.groups if not g.fixed] == [
        (3, 1, ()),
        (4, 2, ("blocks_0_b_0",)),
        (6, 2, ("blocks_0_b_0",)),
        (5, 1, ()),
    ]
    assert structure.tensors["blocks.0.b.0.weight"].blocks == 2
    # Two grouped convolutions one after the other: what suits both.
    model = nn.Sequential(nn.Conv2d(1, 12, 1), nn.Conv2d(12, 24, 1, groups=4), nn.GroupNorm(6, 24), nn.Flatten())
    structure = of(nn.Sequential(*model, nn.Linear(24, 2)), 1, 1, 1)
    assert [(g.width, g.multiple, g.mixed_by) for g in structure.groups[1:3]] == [(12, 4, ()), (24, 12, ("_2",))]


def test_squeeze_and_excitation_is_tied_to_what_it_multiplies():
    structure = plan((Squeezed, 1))
    assert table(structure)[1] == (3, ("stem", "blocks_0_b"), ("blocks_0_a", "hidden"), "")
    assert table(structure)[2] == (2, ("blocks_0_a",), ("blocks_0_b",), "")


def test_sums_of_concatenations_are_cut_wherever_one_of_them_is():
    structure = plan((Overlapping, 3))  # 4 + 3 beside 2 + 5
    layers = {layer.name: [(s.group, s.repeat) for s in layer.outputs] for layer in structure.layers}
    first, middle, last = (s.group for s in structure.layer("hidden").inputs)
    assert [structure.groups[g].width for g in (first, middle, last)] == [2, 2, 3]
    assert layers["blocks_0_a"] == [(first, 1), (middle, 1)]
    assert layers["blocks_0_b"] == [(last, 1)]
    assert layers["blocks_0_c"] == [(first, 1)]
    assert layers["blocks_0_d"] == [(middle, 1), (last, 1)]


def test_a_transposed_linear_is_followed():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.back, self.head = nn.Linear(4, 7), nn.Linear(7, 4), nn.Linear(3, 2)

        def forward(self, x):
            y = self.back(F.gelu(self.tokens(x.transpose(1, 2)))).permute(0, 2, 1)
            return self.head((x + y).mean(1))

    assert table(of(Mixer(), 4, 3))[2] == (7, ("tokens",), ("back",), "")


# --- by torch_pruning's account --------------------------------------------------------------------------------------


def theirs(model, module):
    """(module name, in or out) of everything that goes with the outputs of `module`."""
    graph = torch_pruning.DependencyGraph().build_dependency(model, torch.randn(2, *Network.shape))
    width = graph.get_out_channels(module)
    group = graph.get_pruning_group(module, graph.get_pruner_of_module(module).prune_out_channels, list(range(width)))
    names = {m: n for n, m in model.named_modules()}
    sides = set()
    for dep, _ in group:
        target = dep.target.module
        if target in names and type(target).__module__.startswith("torch.nn"):
            out = graph.is_out_channel_pruning_fn(dep.handler)
            sides.add((names[target], "out" if out else "in"))
            if isinstance(target, nn.Conv2d) and target.groups == target.in_channels > 1:
                sides |= {(names[target], "out"), (names[target], "in")}
    return sides


def ours(structure, layer):
    mine = {s.group for s in layer.outputs}
    sides = set()
    for other in structure.layers:
        for side, axis in (("in", other.inputs), ("out", other.outputs)):
            if mine & {s.group for s in axis}:
                sides.add((other.path, side))
    layers = {other.path for other in structure.layers}
    for path, sizes in structure.sizes.items():
        if path not in layers and any(mine & {s.group for s in axis} for axes in sizes.values() for axis in axes):
            sides.add((path, "out"))
    return sides


# Without what it treats otherwise: it prunes through grouped convolutions channel by channel, does not follow several
# outputs per depthwise channel, and goes on from a part of a layer's outputs to all of them. In a concatenation that
# is flattened it loses count, and names channels that layers do not have.
COMPARED = tuple(b for b in BLOCKS if b not in (Grouped, Depthwise, Overlapping))
FLAT = tuple(b for b in COMPARED if b is not Concatenating)


@pytest.mark.long
@max_examples(50)
@given(networks(COMPARED, flat=[False]) | networks(FLAT, flat=[True]))
def test_groups_are_those_of_torch_pruning(model):
    structure = of(model, *Network.shape)
    modules = dict(model.named_modules())
    compared = 0
    for layer in structure.layers:
        if len(layer.outputs) == 1 and not structure.groups[layer.outputs[0].group].fixed:
            assert ours(structure, layer) == theirs(model, modules[layer.path]), layer.name
            compared += 1
    assert compared >= 2


# --- fixed rather than guessed ---------------------------------------------------------------------------------------


def middle(after, width=6, features=None, before=None):
    """A network with `after` between a layer of 6 channels, (6, 2, 2) maps, and a Linear."""

    class Middle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.first = nn.Conv2d(1, width, 1), before or nn.Identity()
            self.parameter = nn.Parameter(torch.rand(width, 1, 1))
            with torch.no_grad():
                size = after(self, self.first(self.a(torch.zeros(3, 1, 2, 2)))).flatten(1).shape[1]
            self.head = nn.Linear(size, 2)

        def forward(self, x):
            return self.head(after(self, self.first(self.a(x))).flatten(1))

    return of(Middle(), 1, 2, 2)


FOLLOWED = {
    "view of all": lambda m, h: h.view(h.size(0), -1),
    "view of shape": lambda m, h: h.reshape(h.shape[0], h.shape[1], 4),
    "view of a shape": lambda m, h: h.relu().view(h.shape),
    "another tensor's size": lambda m, h: h.view(h.size(0), m.parameter.size(0), 4),
    "a parameter per channel": lambda m, h: h * m.parameter,
    "pooling": lambda m, h: F.adaptive_avg_pool2d(F.max_pool2d(h, 2), 1).squeeze(-1).squeeze(-1),
    "a global mean": lambda m, h: h.mean([-1, -2], keepdim=True),
    "a slice of samples and pixels": lambda m, h: h[:, :, 1:, 0],
    "a new dimension": lambda m, h: h.unsqueeze(2)[..., None],
    "up and around": lambda m, h: F.interpolate(h, scale_factor=2.0).movedim(1, -1).permute(0, 3, 1, 2),
    "a softmax over pixels": lambda m, h: h.flatten(2).softmax(-1),
    "a mask": lambda m, h: torch.where(h > 0, h, h * 0.5),
}


@pytest.mark.parametrize("after", FOLLOWED.values(), ids=FOLLOWED.keys())
def test_followed(after):
    group = middle(after).groups[1]
    assert (group.width, group.producers, group.consumers, group.fixed) == (6, ("a",), ("head",), "")


FIXED = {
    "a number in a view": (lambda m, h: h.view(-1, 24), "view.*names its size"),
    "a number for channels": (lambda m, h: h.view(-1, 6, 4), "view.*names its size"),
    "a computed number": (lambda m, h: h.view(h.size(0), h.size(1) * 4), "what mul.*is not known"),
    "a split": (lambda m, h: h.view(h.size(0), 2, 3, 4), "view.*splits it"),
    "channels last, flattened": (lambda m, h: h.permute(0, 2, 3, 1).flatten(1), "one dimension of it and others"),
    "its size as a number": (lambda m, h: h / h.size(1), "truediv.*computes with its size"),
    "halves": (lambda m, h: h.chunk(2, 1)[0], "what chunk.*is not known"),
    "some channels": (lambda m, h: h[:, :3], "takes some of it by number"),
    "one channel": (lambda m, h: h[:, 1], "takes some of it by number"),
    "a softmax over channels": (lambda m, h: F.softmax(h, dim=1), "mixes its channels"),
    "a mean over channels": (lambda m, h: h.mean(1), "mixes its channels"),
    "a maximum over everything": (lambda m, h: h + h.amax((1, 2, 3), keepdim=True), "mixes its channels"),
    "products of activations": (lambda m, h: h.flatten(2) @ h.flatten(2).transpose(1, 2), "what matmul.*not known"),
    "a function nobody knows": (lambda m, h: torch.roll(h, 1, 1), "what roll.*is not known"),
    "a computed dimension": (lambda m, h: h.transpose(1, h.dim() - 1), "what dim.*is not known"),
    "a computed part": (lambda m, h: h * h[:, : m.parameter.dim() - 2], "takes some of it by number"),
    "a computed view": (lambda m, h: h.view(h.size(0), m.parameter.dim() * 2, 4), "view.*names its size"),
    "channels in order": (lambda m, h: h.cumsum(1), "what cumsum.*is not known"),
    "a computed weight": (lambda m, h: F.conv2d(h, (m.parameter * 2).reshape(1, 6, 1, 1)), "what conv2d.*not known"),
}


@pytest.mark.parametrize(("after", "reason"), FIXED.values(), ids=FIXED.keys())
def test_fixed(after, reason):
    assert re.search(reason, middle(after).groups[1].fixed)


NARROW = {
    "repeated over others": (lambda m, h: m.first.other * h, "needs it to be 1, to repeat it"),
    "removed": (lambda m, h: h.squeeze(1), "needs it to be 1, to remove it"),
}


@pytest.mark.parametrize(("after", "reason"), NARROW.values(), ids=NARROW.keys())
def test_a_single_channel_is_not_taken_for_a_missing_one(after, reason):
    before = nn.Identity()
    before.other = nn.Parameter(torch.rand(5, 1, 1))
    group = middle(after, width=1, before=before).groups[1]
    assert group.producers == ("a",)
    assert reason in group.fixed


def hooked():
    module = nn.Identity()
    module.register_forward_hook(lambda module, args, out: out.roll(1, 1))
    return module


class Odd(nn.Conv2d):
    """A layer with another forward is traced through, and so is what it does to its weight."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


@pytest.mark.parametrize("before", [hooked(), Odd(6, 6, 1), nn.ConvTranspose2d(6, 6, 1), nn.PixelShuffle(1)])
def test_modules_that_are_not_what_they_seem(before):
    group = middle(lambda m, h: h, before=before).groups[1]
    assert group.producers == ("a",)
    assert "is not known" in group.fixed


def test_a_weight_that_is_computed_from_parameters_is_followed_as_what_it_is():
    group = middle(lambda m, h: h, before=weight_norm(nn.Conv2d(6, 6, 1))).groups[1]
    assert group.producers == ("a",)
    assert not group.fixed


@pytest.mark.usefixtures("operations")
def test_a_rule_that_says_other_sizes_fixes_what_it_meets():
    extend("glu", channels=elementwise)  # it halves its channels
    group = middle(lambda m, h: F.glu(h, 1)).groups[1]
    assert group.fixed == "the rule of glu (torch.nn.functional.glu) for channels says other sizes than it has"


def test_a_weight_that_is_used_in_two_ways_stays():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = self.a(x)
            return self.b(h).mean(1, keepdim=True) + self.head(h.unsqueeze(1) * self.b.weight).mean(1)

    assert of(Both(), 3).groups[1].fixed == "a weight that is summed over it is used in another way too"

    class OtherWayRound(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(torch.matmul(self.b(self.a(x)), self.b.weight))

    assert "the other way round" in of(OtherWayRound(), 3).groups[1].fixed


def test_a_grouped_convolution_of_a_concatenation_fixes_its_parts():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 4, 1)
            self.c, self.head = nn.Conv2d(6, 4, 1, groups=2), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.c(torch.cat([self.a(x), self.b(x)], 1)).flatten(1))

    groups = of(Cut(), 1, 1, 1).groups
    assert [g.fixed for g in groups[1:3]] == ["c divides it into 2 blocks, which do not match its channels"] * 2
    assert (groups[3].fixed, groups[3].multiple) == ("", 2)


def test_an_embedding_is_run_on_whole_numbers():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2))
    structure = channels(capture(model, torch.zeros(2, 3, dtype=torch.long)))
    embedded, merged = structure.layer("_1").inputs, structure.layer("_1").outputs
    assert structure.groups[embedded[0].group].fixed == "what _0 (Embedding) does to channels is not known"
    # Channels are the last dimension here, so flattening them with the tokens ends it.
    assert "makes one dimension of it and others" in structure.groups[merged[0].group].fixed


def test_a_model_that_needs_other_inputs_says_so():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x):
            return self.a(torch.linalg.inv(x))

    graph = capture(Picky(), torch.eye(3).repeat(2, 1, 1))
    with pytest.raises(CaptureError, match="fails on 3 samples of zeros"):
        channels(graph)


# --- the arithmetic --------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_sequences_of_equal_size_are_cut_alike(one, other):
    variables = Variables()
    one, other = (
        [*sizes, rest] if rest > 0 else sizes
        for sizes, rest in ((one, sum(other) - sum(one)), (other, sum(one) - sum(other)))
    )
    a, b = (sum((variables.new(size) for size in sizes), ()) for sizes in (one, other))
    variables.unify(a, b, "here")
    assert variables.same(a, b)
    assert variables.size(variables.resolve(a)) == sum(one)
    ends = lambda sizes: {sum(sizes[:i]) for i in range(len(sizes) + 1)}  # noqa: E731
    assert ends([variables.width(v) for v, _ in variables.resolve(a)]) == ends(one) | ends(other)
    assert not any(variables.reason(v) for v, _ in variables.resolve(a))


def test_a_fixed_part_stays_fixed_wherever_it_is_tied_to():
    variables = Variables()
    a, b, both = variables.new(2, "because"), variables.new(3), variables.new(5)
    variables.unify(both, a + b, "here")
    assert [variables.reason(v) for v, _ in variables.resolve(both)] == ["because", ""]
    variables.unify(b, variables.new(3, "too"), "here")
    assert variables.is_fixed(both)


@pytest.mark.parametrize(
    ("one", "other", "free"),
    [((2, 6), (12, 1), True), ((4, 2), (2, 4), True), ((2, 3), (3, 2), False), ((2, 2), (5, 1), False)],
)
def test_repeats_that_do_not_divide_each_other_fix_both(one, other, free):
    variables = Variables()
    a, b = (repeated(variables.new(width), times) for width, times in (one, other))
    variables.unify(a, b, "here")
    assert variables.same(a, b) == free
    assert variables.is_fixed(a + b) != free


def test_overlapping_rings_end_in_their_common_divisor():
    variables = Variables()
    a, b = variables.new(4), variables.new(6)
    variables.unify(a + b, b + a, "here")
    assert [variables.width(v) for v, _ in variables.resolve(a + b)] == [2] * 5
    assert len({v for v, _ in variables.resolve(a + b)}) == 1
