"""Products and tables under formats are those of torch's own modules, with operands that are rounded by hand; and what a
space, a table of costs and a training make of them."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitfront as bf
from bitfront.formats import FORMATS
from bitfront.graph import capture
from bitfront.spaces.quantize import QuantizationSpace
from bitfront.spaces.request import SpaceRequest
from bitfront.transforms import quantize

WIDTH, FRAC = 6, 3


def by_hand(x):
    """Whole multiples of 1/8 from −4 to 31/8."""
    codes = torch.round(x.detach().double() * 2**FRAC).clamp(-(2 ** (WIDTH - 1)), 2 ** (WIDTH - 1) - 1)
    return (codes / 2**FRAC).float()


class Of(nn.Module):
    """A module, or a function of (weight, bias, x), on samples that `before` makes of the input."""

    def __init__(self, inner, weight=None, bias=None, before=None):
        super().__init__()
        self.inner, self.before = inner, before
        for name, shape in (("weight", weight), ("bias", bias)):
            if shape is not None:
                setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        given = x if self.before is None else self.before(x)
        given = given if isinstance(given, tuple) else (given,)
        if isinstance(self.inner, nn.Module):
            return self.inner(*given).flatten(1)
        return self.inner(self.weight, getattr(self, "bias", None), *given).flatten(1)


def ids(x):
    return torch.sigmoid(x).mul(9).long()


def bags(x):
    flat = ids(x).flatten()
    return flat, torch.arange(0, flat.numel(), x[0].numel()), torch.sigmoid(x).flatten()


def ends(x):
    flat = ids(x).flatten()
    return flat, torch.arange(0, flat.numel() + 1, x[0].numel())


SHAPES = {1: (4, 6), 2: (4, 5, 5), 3: (4, 3, 3, 3)}
CASES = {
    # name: (operation, model, sample shape, whether the activations have formats)
    **{
        f"conv_transpose{d}d {more}": (
            f"conv_transpose{d}d", lambda d=d, more=more: Of(getattr(nn, f"ConvTranspose{d}d")(4, 6, 3, **more)), SHAPES[d], True,
        )
        for d in (1, 2, 3)
        for more in ({}, {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}, {"dilation": 2, "bias": False})
    },
    "conv_transpose2d of a size": (
        "conv_transpose2d", lambda: Of(nn.ConvTranspose2d(4, 6, 3, stride=2), before=lambda x: (x, [12, 11])), SHAPES[2], True,
    ),
    **{
        f"conv3d {more}": ("conv3d", lambda more=more: Of(nn.Conv3d(4, 6, 2, **more)), SHAPES[3], True)
        for more in ({}, {"padding": 1, "padding_mode": "circular", "groups": 2, "bias": False}, {"stride": 2, "padding": "valid"})
    },
    "bilinear": ("bilinear", lambda: Of(nn.Bilinear(5, 5, 3), before=lambda x: (x, x.tanh())), (5,), True),
    "embedding": ("embedding", lambda: Of(nn.Embedding(10, 3, padding_idx=2), before=ids), (5,), False),
    "sparse embedding": ("embedding", lambda: Of(nn.Embedding(10, 3, sparse=True, scale_grad_by_freq=True), before=ids), (5,), False),
    **{f"embedding_bag {mode}": ("embedding_bag", lambda mode=mode: Of(nn.EmbeddingBag(10, 3, mode=mode, padding_idx=1), before=ids), (5,), False) for mode in ("sum", "mean", "max")},
    "weighted bags": ("embedding_bag", lambda: Of(nn.EmbeddingBag(10, 3, mode="sum"), before=bags), (5,), False),
    "bags with their ends": ("embedding_bag", lambda: Of(nn.EmbeddingBag(10, 3, include_last_offset=True), before=ends), (5,), False),
    "F.conv3d": ("conv3d", lambda: Of(lambda w, b, x: F.conv3d(x, w, b, 2), (6, 4, 2, 2, 2), (6,)), SHAPES[3], True),
    **{f"F.conv_transpose{d}d": (
        f"conv_transpose{d}d", lambda d=d: Of(lambda w, b, x: getattr(F, f"conv_transpose{d}d")(x, w, b, groups=2), (4, 3, *[2] * d), (6,)), SHAPES[d], True,
    ) for d in (1, 2, 3)},
    "F.embedding": ("embedding", lambda: Of(lambda w, b, x: F.embedding(x, w, 2), (10, 3), before=ids), (5,), False),
    "F.embedding_bag": ("embedding_bag", lambda: Of(lambda w, b, x: F.embedding_bag(x, w, mode="max"), (10, 3), before=ids), (5,), False),
    "F.bilinear": ("bilinear", lambda: Of(lambda w, b, x: F.bilinear(x, x, w, b), (3, 5, 5), (3,)), (5,), True),
    "mm": ("mm", lambda: Of(lambda w, b, x: torch.mm(x, mat2=w), (5, 3)), (5,), True),
    "mv": ("mv", lambda: Of(lambda w, b, x: x.mv(w)[:, None], (5,)), (5,), True),
    "addmm": ("addmm", lambda: Of(lambda w, b, x: torch.addmm(b, x, w, beta=0.5, alpha=2), (5, 3), (3,)), (5,), True),
    "addmm of rows": ("addmm", lambda: Of(lambda w, b, x: b.addmm(mat1=x, mat2=w), (5, 3), (1, 3)), (5,), True),
    "baddbmm": ("baddbmm", lambda: Of(lambda w, b, x: torch.baddbmm(b, x, w.expand(x.size(0), 4, 3)), (1, 4, 3), (3,)), (2, 4), True),
    "einsum": ("einsum", lambda: Of(lambda w, b, x: torch.einsum("b c i, o i -> b o c", x, w), (3, 5), ), (2, 5), True),
}  # fmt: skip


def expected(model, x, activations):
    """`model` with rounded parameters, on a rounded input; the second input of two is rounded after it is computed."""
    hand = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in hand.parameters():
            parameter.copy_(by_hand(parameter))
        if isinstance(hand.inner, nn.Bilinear):
            return hand.inner(by_hand(x), by_hand(x.tanh()))
        return hand(by_hand(x) if activations else x)


def formats_of(site):
    table = {"width": WIDTH, "frac_width": FRAC}
    kinds = {o: site.operation.operand(o).kind(from_samples=site.flows(o)) for o in site.operands}
    return {o: FORMATS.get("integer").parse(table, kind, signed=True) for o, kind in kinds.items()}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_layer_of_torch_with_rounded_operands(name):
    op, build, shape, activations = CASES[name]
    torch.manual_seed(0)
    model, x = build().eval(), 2 * torch.randn(9, *shape)
    graph = capture(model, x[:2])
    (site,) = (site for site in graph.sites if site.op == op)
    for bake in (False, True):
        with torch.no_grad():
            out = quantize(graph, {site.name: formats_of(site)}, bake=bake)(x)
        assert torch.equal(out, expected(model, x, activations))
    assert not torch.equal(out, model(x))


@pytest.mark.parametrize("name", CASES)
def test_every_way_to_name_it_gives_it_the_formats(name):
    op, build, shape, activations = CASES[name]
    torch.manual_seed(0)
    graph = capture(build(), torch.randn(2, *shape))
    (site,) = (site for site in graph.sites if site.op == op)
    table = {"name": "integer", "weight_width": [4], "data_in_width": [6]}
    keys = [("name", "default"), ("name", site.name), ("type", op), ("regex_name", f"{site.name[:3]}.*")]
    keys += [("name", site.path), ("type", site.type)] if site.path else []
    for by, key in keys:
        space = QuantizationSpace(SpaceRequest(graph, by, {key: table}))
        (option,) = dict(zip((s.name for s in space.sites), space.site_formats, strict=True))[site.name]
        assert option["weight"].bits == 4
        assert ("data_in" in option) == activations
    left = QuantizationSpace(SpaceRequest(graph, "type", {op: {"name": "NA"}}, float_only=True))
    assert left.site_formats == (({},),) * len(graph.sites)


def test_a_table_that_changes_its_rows_stays_in_float():
    x = torch.randn(12, 5)
    for model in (
        Of(nn.Embedding(10, 3, max_norm=1.0), before=ids),
        Of(nn.EmbeddingBag(10, 3, max_norm=1.0), before=ids),
        Of(lambda w, b, x: F.embedding(x, w.detach().clone(), max_norm=1.0), (10, 3), before=ids),
        Of(lambda w, b, x: F.embedding_bag(x, w.detach().clone(), max_norm=1.0), (10, 3), before=ids),
    ):
        graph = capture(model, x)
        assert not graph.sites
        if isinstance(model.inner, nn.Module):
            (layer,) = graph.left_out
            assert (layer.path, layer.weights) == ("inner", 30)
            assert "max_norm" in layer.why
        else:
            assert not graph.left_out


def test_an_einsum_of_three_is_no_site():
    model = Of(lambda w, b, x: torch.einsum("bi,io,o->bo", x, w, b), (5, 3), (3,))
    assert not capture(model, torch.randn(2, 5)).sites
    assert not capture(Of(lambda w, b, x: torch.einsum(x, [0, 1], w, [1, 2]), (5, 3)), torch.randn(2, 5)).sites


def counts(name):
    _, build, shape, _ = CASES[name]
    model = nn.Sequential(build())
    return model, bf.analyze(model, torch.randn(2, *shape))


def test_counts_of_bags_and_tables():
    _, table = counts("embedding")
    (row,) = (r for r in table.rows if r.type == "Embedding")
    assert (row.operations, row.input_bytes, row.parameters, row.weight_bits) == (0, 5 * 4, 30, 32)
    bag = {name: counts(name)[1] for name in ("embedding_bag sum", "embedding_bag mean", "weighted bags")}
    of = {name: next(r for r in a.rows if r.type == "EmbeddingBag") for name, a in bag.items()}
    assert [(r.operations, r.macs) for r in of.values()] == [(15, 0), (18, 0), (15, 15)]


def test_products_per_output_value():
    for name, shape, each in (
        ("conv_transpose2d {}", SHAPES[2], 4 * 9 * 25 // 49),
        ("bilinear", (5,), 25),
        ("mm", (5,), 5),
    ):
        graph = capture(CASES[name][1](), torch.randn(2, *shape))
        (site,) = (s for s in graph.sites if s.macs)
        assert [p.fan_in for p in site.products] == [each]
    model = Of(nn.ConvTranspose1d(1, 1, 1, stride=4))
    (site,) = capture(model, torch.randn(2, 1, 5)).sites
    assert [p.fan_in for p in site.products] == [1]


class Text(nn.Module):
    """Token ids to classes; the head may be the table."""

    def __init__(self, tied):
        super().__init__()
        self.table, self.mid = nn.Embedding(12, 8, padding_idx=0), nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.mid(self.table(ids.long()).mean(1))))


def size_by_hand(model, formats):
    """Bytes of the weights: per table of values once for each format, or once in float."""
    held = {}
    for site, operands in {"table": "weight", "mid": "weight bias", "head": "weight"}.items():
        for operand in operands.split():
            tensor = getattr(model.get_submodule(site), operand)
            held.setdefault(tensor, set()).add(formats.get(site, {}).get(operand))
    return sum(
        tensor.numel() * 4
        if None in forms
        else min(4 * tensor.numel(), sum(-(-tensor.numel() * f.bits // 8) for f in forms))
        for tensor, forms in held.items()
    )


@pytest.mark.sampled(3)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_a_search_over_token_ids(tmp_path, tied, trains):
    torch.manual_seed(0)
    x = np.random.default_rng(0).integers(0, 12, (300, 6))
    data, model = (x, x[:, 0]), Text(tied)
    table = {"name": ["integer", "NA"], "weight_width": [3, 8], "weight_frac_width": [2], "data_in_width": [6]}
    runners = {"basic_evaluation": {}, **({"basic_train": {"max_epochs": 2}} if trains else {})}
    run = bf.search(
        model=model,
        data=data,
        space={"embedding": table, "linear": {**table, "name": "integer", "data_in_frac_width": "auto"}},
        metrics={"loss": "minimize", "average_bitwidth": "minimize", "model_size": "minimize"},
        strategy={"name": "brute_force", "sw_runner": runners},
        project_dir=str(tmp_path),
        project="text",
        learning_rate=0.05,
        batch_size=32,
    )
    assert len(run) == 3 * 2 * 2
    for number in range(len(run)):
        trial = run.trial(number)
        rebuilt = bf.transform_trial(run.folder, number, model=model, data=bf.from_arrays(*data), check=True)
        assert rebuilt.evaluation.loss == trial.metrics["loss"]
        assert trial.metrics["model_size"] == size_by_hand(model, rebuilt.formats)
        formats, state = rebuilt.formats.get("table", {}), rebuilt.model.state_dict()
        if not trains:
            weight = model.table.weight.detach()
            assert torch.equal(state["table.weight"], formats["weight"].quantize(weight) if formats else weight)


@pytest.mark.parametrize("build", [
    lambda: Of(nn.Embedding(10, 3, padding_idx=2), before=ids),
    lambda: Of(nn.EmbeddingBag(10, 3), before=ids),
    lambda: Of(nn.ConvTranspose1d(5, 3, 2), before=lambda x: x[:, :, None]),
    lambda: Of(nn.Bilinear(5, 5, 3), before=lambda x: (x, x.tanh())),
    lambda: Of(lambda w, b, x: torch.addmm(b, x, w), (5, 3), (3,)),
    lambda: Of(lambda w, b, x: F.embedding(x, w), (10, 3), before=ids),
])  # fmt: skip
def test_gradients_of_a_weight_pass_its_rounding(build):
    torch.manual_seed(0)
    model, x = build(), torch.randn(9, 5)
    graph = capture(model, x[:2])
    (site,) = (site for site in graph.sites if site.weight)
    twin = quantize(graph, {site.name: {"weight": formats_of(site)["weight"]}}).train()
    hand = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in hand.named_parameters():
            if name.endswith("weight"):
                parameter.copy_(by_hand(parameter))
    for each in (twin, hand):
        each(x).square().sum().backward()
    # The loss of a function of the rounded weight has the gradient of that weight.
    for (name, one), (_, other) in zip(twin.named_parameters(), hand.named_parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
        assert one.grad.abs().sum() > 0


def test_ids_as_floats_get_a_hint():
    model = nn.Sequential(nn.Embedding(10, 3), nn.Flatten())
    with pytest.raises(bf.BitfrontError, match=r"an embedding takes whole numbers: write embedding\(x\.long\(\)\)"):
        capture(model, torch.zeros(2, 5))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_may_have_a_scale_per_output_channel(groups):
    torch.manual_seed(0)
    layer, x = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups), torch.randn(9, 4, 5, 5)
    graph = capture(Of(layer), x[:2])
    (site,) = graph.sites
    # A scale for each index of the second dimension: of the output channels of a group.
    weight = FORMATS.get("affine").parse({"width": 8}, site.operation.operand("weight").kind())
    weight = weight.calibrated(layer.weight.detach())
    formats = {**formats_of(site), "weight": weight}
    out = quantize(graph, {site.name: formats})(x)
    hand = copy.deepcopy(layer).double()
    step = layer.weight.detach().abs().amax((0, 2, 3), keepdim=True).double() / 127
    with torch.no_grad():
        hand.weight.copy_(torch.round(layer.weight.double() / step) * step)
        hand.bias.copy_(by_hand(layer.bias))
        expected = hand(by_hand(x).double())
    assert step.numel() == 6 // groups
    torch.testing.assert_close(out.double(), expected.flatten(1), rtol=1e-5, atol=1e-5)
