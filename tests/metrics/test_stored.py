"""What several use is stored once: sizes are counted here by hand, from the model alone."""

import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from test_metrics import evaluator, measure
from torch import nn
from torch.nn import functional

from bitfront.engine.planning.notes import _sharing_notes
from bitfront.formats.fixed_map import FixedMap
from bitfront.graph import capture
from bitfront.graph.memory import stored_tensors
from bitfront.metrics.stored import stored_forms
from bitfront.spaces.quantize import QuantizationSpace
from bitfront.transforms import quantize

INTEGER = {"name": ["integer"], "weight_width": [4], "bias_width": [8]}


class TiedEmbedding(nn.Module):
    """A table of 40 rows of 16 that is the head's weight too; a layer of 16 · 16 + 16 between."""

    def __init__(self, traceable=True):
        super().__init__()
        self.emb, self.mid, self.head = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
        self.head.weight = self.emb.weight
        self.traceable = traceable

    def forward(self, x):
        if not self.traceable and x.sum() < -1e9:
            x = -x
        return self.head(torch.tanh(self.mid(self.emb(x.abs().long()).mean(1))))


class FunctionalHead(TiedEmbedding):
    """The head is a function that is given the table itself, or a transpose of it."""

    def __init__(self, end):
        super().__init__()
        del self.head
        self.end = end

    def forward(self, x):
        return self.end(self.mid(self.emb(x.abs().long()).mean(1)), self.emb.weight)


class Arithmetic(nn.Module):
    """The layer's weight is a penalty too, in float."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.fc(x) * (1 + self.fc.weight.square().mean())


class Transposed(nn.Module):
    """Nobody uses the weight but the site, through a view."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return functional.linear(x, self.w.t())


class Rows(nn.Module):
    """A weight of a site that is a part of another's."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(8, 4))
        self.last = nn.Linear(8, 3, bias=False)

    def forward(self, x):
        return self.last(functional.linear(x, self.a)) + functional.linear(x, self.a[:3])


class Buffers(nn.Module):
    """A buffer that is a view of a weight and is used in float, one that is repeated, and one of its own."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)
        self.register_buffer("first", self.fc.weight.detach()[:2])
        self.register_buffer("ones", torch.ones(1).expand(1000))
        self.register_buffer("own", torch.ones(4))

    def forward(self, x):
        return self.fc(x) + self.own + self.ones.sum() + self.first.sum()


class Flat(nn.Module):
    """Two layers whose weights are two parts of one flat tensor, and a third that has the first part once more."""

    def __init__(self):
        super().__init__()
        flat = torch.randn(32)
        self.fc1, self.fc2, self.fc3 = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.fc1.weight = nn.Parameter(flat[:16].view(4, 4))
        self.fc2.weight = nn.Parameter(flat[16:].view(4, 4))
        self.fc3.weight = nn.Parameter(flat[:16].view(4, 4).t())

    def forward(self, x):
        return self.fc3(self.fc2(self.fc1(x)))


class Aliased(nn.Module):
    """A weight with a second name that nobody calls."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)
        self.weights = nn.ParameterList([self.fc.weight])

    def forward(self, x):
        return self.fc(x)


class FrozenWeight(nn.Module):
    """The weight is a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("w", torch.randn(3, 4))

    def forward(self, x):
        return functional.linear(x, self.w)


class Expanded(nn.Module):
    """A weight of one value, repeated."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, 4))

    def forward(self, x):
        return functional.linear(x, self.w.expand(3, 4))


MID = 256 // 2 + 16
CASES = {
    # name: (model, sample shape, formats by site, bytes, mean bits of a weight)
    "tied": (TiedEmbedding, (4,), {"head": 4, "mid": 4}, 640 * 4 + MID, (640 * 32 + 256 * 4) / 896),
    "tied, not traced": (
        lambda: TiedEmbedding(traceable=False),
        (4,),
        {"head": 4, "mid": 4},
        640 * 4 + MID,
        (640 * 32 + 256 * 4) / 896,
    ),
    "function": (
        lambda: FunctionalHead(functional.linear),
        (4,),
        {"linear": 4, "mid": 4},
        640 * 4 + MID,
        (640 * 32 + 256 * 4) / 896,
    ),
    "function, transposed": (
        lambda: FunctionalHead(lambda x, w: torch.matmul(x, w.t())),
        (4,),
        {"mid": 4},
        640 * 4 + MID,
        (640 * 32 + 256 * 4) / 896,
    ),
    "arithmetic": (Arithmetic, (4,), {"fc": 4}, 16 * 4, 32.0),
    "a view for its only user": (Transposed, (4,), {"linear": 4}, 12 // 2, 4.0),
    "tied, one format": (TiedEmbedding, (4,), {"emb": 4, "head": 4, "mid": 4}, 640 // 2 + MID, 4.0),
    "tied, two formats": (
        TiedEmbedding,
        (4,),
        {"emb": 4, "head": 8, "mid": 4},
        640 // 2 + 640 + MID,
        (640 * 12 + 256 * 4) / 896,
    ),
    "tied, more bits than float": (
        TiedEmbedding,
        (4,),
        {"emb": 15, "head": 18, "mid": 4},
        640 * 4 + MID,
        (640 * 32 + 256 * 4) / 896,
    ),
    "function, one format": (
        lambda: FunctionalHead(functional.linear),
        (4,),
        {"emb": 4, "linear": 4, "mid": 4},
        640 // 2 + MID,
        4.0,
    ),
    "function, transposed, two formats": (
        lambda: FunctionalHead(lambda x, w: torch.matmul(x, w.t())),
        (4,),
        {"emb": 4, "matmul": 2, "mid": 4},
        640 // 2 + 640 // 4 + MID,
        (640 * 6 + 256 * 4) / 896,
    ),
    "a part at 8 bits": (
        Rows,
        (4,),
        {"linear": 4, "linear_1": 8, "last": 4},
        32 // 2 + 12 + 24 // 2,
        (32 * 4 + 12 * 8 + 24 * 4) / 56,
    ),
    "a part in float": (Rows, (4,), {"linear": 4, "last": 4}, 32 * 4 + 24 // 2, (32 * 32 + 24 * 4) / 56),
    "buffers": (Buffers, (4,), {"fc": 4}, 16 * 4 + 4 + 4 * 4, 32.0),
    "parts of one": (
        Flat,
        (4,),
        {"fc1": 4, "fc2": 2, "fc3": 6},
        16 * (4 + 6 + 2) // 8,
        16 * (4 + 6 + 2) / 32,
    ),
    "repeated": (Expanded, (4,), {"linear": 4}, 2, 4.0),
    "an alias": (Aliased, (4,), {"fc": 4}, 16 // 2, 4.0),
    "a buffer as weight": (FrozenWeight, (4,), {"linear": 4}, 12 // 2, 4.0),
}


def subject_of(name):
    factory, shape, widths, *_ = CASES[name]
    torch.manual_seed(0)
    seed = {site: {**INTEGER, "weight_width": [bits]} for site, bits in widths.items()}
    return evaluator(factory(), shape, seed)


@pytest.mark.parametrize("name", CASES)
def test_what_is_shared_is_stored_once_per_format(name):
    *_, size, bits = CASES[name]
    subject = subject_of(name)
    assert measure("model_size", {}, subject)["model_size"].tolist() == [size]
    assert measure("average_bitwidth", {}, subject)["average_bitwidth"].tolist() == pytest.approx([bits])


@pytest.mark.parametrize(("granularity", "points"), [("tensor", (0, 0)), ("channel", (5, 5)), ("element", (15, 5))])
def test_binary_points_are_stored_bytes_and_no_factors(granularity, points):
    of = {"width": [4], "frac_width": ["auto"], "granularity": [granularity]}
    seed = {"fc": {"name": ["integer"], **{f"{o}_{k}": v for o in ("weight", "bias") for k, v in of.items()}}}
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(fc=nn.Linear(3, 5)))
    subject = evaluator(model, (3,), seed)
    assert measure("model_size", {}, subject)["model_size"].tolist() == [8 + points[0] + 3 + points[1]]
    average = measure("average_bitwidth", {}, subject)
    assert average["average_bitwidth"].tolist() == [(15 * 4 + 8 * points[0]) / 15]
    assert average["memory_density"].tolist() == [32 * 15 / (15 * 4 + 8 * points[0])]
    (code,) = subject.space.numbered(0, 1)
    formats = subject.formats(code)["fc"]
    alive = {o: int((formats[o].round(getattr(model.fc, o)) != 0).sum()) for o in ("weight", "bias")}
    counts = measure("ebops", {}, subject)["ebops"].tolist()
    assert counts == pytest.approx([alive["weight"] * 3 * 31 + alive["bias"] * 3])


@pytest.mark.parametrize("name", ["tied", "buffers", "parts of one"])
def test_a_copy_in_another_process_counts_the_same(name):
    subject = subject_of(name)
    model = pickle.loads(pickle.dumps(subject.space.graph.model))  # noqa: S301
    assert stored_tensors(capture(model, subject.sample)) == stored_tensors(subject.space.graph)


def test_what_shared_memory_counts_apart_once_its_values_differ():
    subject = subject_of("parts of one")
    model = subject.space.graph.model
    with torch.no_grad():
        model.fc3.weight += 1
    names = {tensor.names for tensor in stored_tensors(capture(model, subject.job.sample))}
    assert names == {("fc1.weight",), ("fc2.weight",), ("fc3.weight",)}


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.other(self.fc(self.fc(x)))


@pytest.mark.parametrize("widths", [(2, 8), (8, 2), (2, 2)])
def test_weights_that_are_used_twice_count_once_among_zeros_and_twice_among_products(widths):
    torch.manual_seed(0)
    seed = {
        site: {**INTEGER, "data_in_width": [8], "weight_width": [bits], "weight_frac_width": ["auto"]}
        for site, bits in zip(("fc", "fc_1", "other"), (*widths, 4), strict=True)
    }
    subject = evaluator(Twice(), (4,), seed)
    code = subject.space.numbered(0, 1)
    formats = subject.formats(code[0])
    model = subject.job.model
    kept = {s: formats[s]["weight"].quantize(w) for s, w in (("fc", model.fc.weight), ("fc_1", model.fc.weight))}
    kept["other"] = formats["other"]["weight"].quantize(model.other.weight)
    nonzero = {s: int((w != 0).sum()) for s, w in kept.items()}
    wide = "fc" if widths[0] >= widths[1] else "fc_1"
    sparsity = 1 - (nonzero[wide] + nonzero["other"]) / 32
    assert measure("sparsity", {}, subject)["sparsity"].tolist() == pytest.approx([sparsity])
    products = 7 * (nonzero["fc"] * (widths[0] - 1) + nonzero["fc_1"] * (widths[1] - 1) + nonzero["other"] * 3)
    assert measure("ebops", {}, subject)["ebops"].tolist() == [products]


def test_zeros_of_a_weight_that_is_stored_in_float_are_those_of_the_float_values():
    subject = subject_of("arithmetic")
    with torch.no_grad():
        subject.space.graph.model.fc.weight[0] = 0.0
    assert measure("sparsity", {}, subject)["sparsity"].tolist() == [0.25]


def test_a_note_names_what_is_shared_with_somebody_in_float():
    (note,) = _sharing_notes(subject_of("tied").space)
    assert "emb.weight = head.weight" in note
    assert "by head in a format and by emb in float" in note
    assert not _sharing_notes(subject_of("an alias").space)
    assert not _sharing_notes(subject_of("tied, one format").space)


def test_a_note_says_what_two_formats_of_one_weight_cost():
    (note,) = _sharing_notes(subject_of("tied, two formats").space)
    assert "emb.weight = head.weight is used by emb and head, and each rounds" in note
    assert "stored once in each of them" in note


@pytest.mark.parametrize("name", ["tied, one format", "tied, two formats"])
def test_deployed_weights_are_shared_where_their_formats_are_equal(name):
    subject = subject_of(name)
    formats = subject.formats(subject.space.numbered(0, 1)[0])
    weight, state = (
        subject.job.model.emb.weight.detach(),
        quantize(subject.space.graph, formats, bake=True).state_dict(),
    )
    for site in ("emb", "head"):
        assert torch.equal(state[f"{site}.weight"], formats[site]["weight"].quantize(weight))
    once = state["emb.weight"].data_ptr() == state["head.weight"].data_ptr()
    assert once == (name == "tied, one format")


def test_values_with_bits_of_their_own_are_added_up_exactly():
    """916 bits of 208 values have a mean of which 208 are a little less than 916."""
    graph = capture(nn.Sequential(nn.Linear(208, 1, bias=False)), torch.zeros(2, 208))
    for total in range(900, 930):
        widths = np.full(208, total // 208, dtype=np.int8)
        widths[: total % 208] += 1
        form = FixedMap.of(widths[None], 0 * widths[None], signed=True, samples=False)
        space = QuantizationSpace.of_formats(graph, {graph.sites[0].name: {"weight": form}})
        (stored,) = stored_forms(space)
        option = np.zeros((1, len(space.groups)), dtype=np.int64)
        assert (stored.stored_bits(option), stored.stored_bytes(option)) == (total, -(-total // 8))
