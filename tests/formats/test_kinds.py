"""Formats of weights whose output channels are not dimension 0, and what operations say of their operands."""

import numpy as np
import pytest
import torch
from torch import nn

from bitfront.formats import FORMATS
from bitfront.formats.base import ACTIVATION, BIAS, FACTOR, WEIGHT, FormatError, OperandKind, dimension
from bitfront.formats.spelling import as_json, from_json
from bitfront.graph import capture
from bitfront.operations import OPERATIONS
from bitfront.operations.base import OperandSpec
from bitfront.testing import check_format
from bitfront.transforms import calibrate, quantize

#: Channels and sums of the weights of a Linear, a ConvTranspose and a matrix product.
AXES = [(0, None), (1, 0), (1, None), (-1, -2), (-1, None)]
BY_CHANNEL = {
    "affine": {"width": 4, "granularity": "channel", "range": "minmax"},
    "affine by mse": {"width": 3, "symmetric": False, "range": "mse"},
    "groups": {"width": 4, "group_size": 3, "symmetric": False},
    "groups by percentile": {"width": 4, "group_size": 5, "range": "percentile"},
    "binary": {"scaling_factor": True},
    "ternary": {},
    "binary_residual": {"levels": 2},
    "nf4": {"group_size": 3},
}
#: Where the channels lie (dimension 0) and the sums (1) in tensors of several ranks, for each kind.
LAYOUTS = [
    ((7, 6), (0, 1), (0, None)),
    ((6, 7), (1, 0), (1, 0)),
    ((6, 7), (1, 0), (-1, None)),
    ((6, 7, 3, 2), (1, 0), (1, None)),
    ((3, 6, 7), (2, 1), (-1, -2)),
    ((6, 2, 7), (2, 0), (-1, 0)),
]


def kind_of(channels, sums):
    return OperandKind("weight", samples=False, channel_axis=channels, summed_axis=sums)


def parsed(name, kind):
    family = {"affine by mse": "affine", "groups": "affine", "groups by percentile": "affine"}.get(name, name)
    return FORMATS.get(family).parse(BY_CHANNEL[name], kind)


@pytest.mark.parametrize("name", BY_CHANNEL)
@pytest.mark.parametrize(("shape", "places", "axes"), LAYOUTS, ids=str)
def test_a_weight_is_quantized_as_if_its_channels_came_first(name, shape, places, axes):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    first = x.movedim(places, (0, 1)).contiguous()
    form, plain = parsed(name, kind_of(*axes)), parsed(name, WEIGHT)
    assert form.overhead_bits(shape) == plain.overhead_bits(tuple(first.shape))
    form, plain = form.calibrated(x), plain.calibrated(first)
    assert torch.equal(form.round(x), plain.round(first).movedim((0, 1), places))
    assert form.overhead_bits(shape) == plain.overhead_bits(tuple(first.shape))
    assert from_json(as_json(form)) == form


@pytest.mark.parametrize(("axes", "place"), [((1, 0), 1), ((-1, -2), -1), ((-1, None), -1)])
def test_scales_are_those_of_the_output_channels(axes, place):
    x = np.random.default_rng(0).normal(0, 1, (5, 4)).astype(np.float32)
    form = parsed("affine", kind_of(*axes)).calibrated(torch.from_numpy(x))
    assert form.scale == pytest.approx(np.abs(x).max(axis=0) / 7)
    codes = np.clip(np.rint(x / np.float32(form.scale)), -8, 7)
    np.testing.assert_array_equal(form.round(torch.from_numpy(x)).numpy(), codes * np.float32(form.scale))


@pytest.mark.parametrize("axes", AXES[1:], ids=str)
def test_mx_shares_a_scale_along_the_sums(axes):
    x = torch.randn(70, 3, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(70)[:, None]
    form = FORMATS.get("mx").parse({"width": 4}, kind_of(*axes))
    plain = FORMATS.get("mx").parse({"width": 4}, WEIGHT)
    assert torch.equal(form.round(x), plain.round(x.T.contiguous()).T)
    assert form.overhead_bits((70, 3)) == plain.overhead_bits((3, 70)) == 3 * 3 * 8
    # An axis that is given counts as it is.
    given = FORMATS.get("mx").parse({"width": 4, "axis": 1}, kind_of(*axes))
    assert torch.equal(given.round(x), FORMATS.get("mx").parse({"width": 4, "axis": 1}, WEIGHT).round(x))


def test_mx_of_a_transposed_convolution():
    form = FORMATS.get("mx").parse({"width": 8}, kind_of(1, None))
    assert form.block((64, 5, 3, 3)) == (32, 1, 1, 1)
    assert FORMATS.get("mx").parse({"width": 8}, WEIGHT).block((5, 64, 3, 3)) == (1, 32, 1, 1)


@pytest.mark.parametrize("name", ["block_fp", "block_minifloat", "block_log"])
def test_a_block_size_means_the_same_for_every_layout(name):
    settings = {
        "block_fp": {"width": 6, "exponent_width": 8},
        "block_minifloat": {"width": 6, "exponent_width": 2, "exponent_bias_width": 8},
        "block_log": {"width": 4, "exponent_bias_width": 8},
    }[name]
    for kind in (kind_of(-1, -2), kind_of(1, 0)):
        form = FORMATS.get(name).parse({**settings, "block_size": [1, 16]}, kind)
        assert form.block((48, 20)) == (16, 1)
        assert form.block((48,)) == (16,)
    assert FORMATS.get(name).parse({**settings, "block_size": [1, 16]}, WEIGHT).block((20, 48)) == (1, 16)
    assert form.block((3, 48, 5, 5)) == FORMATS.get(name).parse({**settings, "block_size": [1, 16]}, WEIGHT).block(
        (48, 3, 5, 5)
    )


@pytest.mark.parametrize(
    ("name", "settings", "flags"),
    [
        ("affine", {"width": 4, "range": "mse"}, {}),
        ("affine", {"width": 4, "group_size": 60}, {"grouped": True}),
        ("nf4", {"group_size": 60}, {"grouped": True}),
        ("ternary", {}, {"nearest": False}),
        ("binary", {"scaling_factor": True}, {"mirrored": False}),
        ("binary_residual", {"levels": 2}, {"mirrored": False}),
    ],
)
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_formats_conform_along_every_axis(name, settings, flags, axes):
    check_format(name, settings, kind=kind_of(*axes), **flags)


def test_a_format_that_looks_at_fixed_dimensions_is_noticed():
    with pytest.raises(AssertionError, match=r"with channels along 1 of .*: rounds as if they lay elsewhere"):
        check_format("mx", {"width": 8, "axis": 1}, elementwise=False)


def test_an_operand_without_channels_has_one_scale():
    kind = OperandKind("weight", samples=False, channel_axis=None)
    for name in ("affine", "ternary", "binary_residual"):
        form = parsed(name, kind)
        assert form.granularity == "tensor"
        assert form == FORMATS.get(name).parse({**BY_CHANNEL[name], "granularity": "tensor"}, kind)
    with pytest.raises(FormatError, match="groups are for weights that have output channels"):
        parsed("nf4", kind)


@pytest.mark.parametrize(
    ("axis", "rank", "expected"),
    [(0, 1, 0), (1, 1, None), (-1, 1, None), (-1, 2, 1), (-2, 4, 2), (-3, 2, None), (None, 3, None), (0, 0, None)],
)
def test_which_dimension_an_axis_is(axis, rank, expected):
    assert dimension(axis, rank) == expected


def test_formats_of_older_run_folders_are_read():
    affine = {
        "format": "affine",
        "width": 4,
        "symmetric": True,
        "granularity": "group",
        "range": "minmax",
        "axis": 0,
        "scale": [1.0, 2.0, 4.0, 8.0],
        "zero_point": [0, 0, 0, 0],
        "group_size": 3,
        "shape": [2, 2],
    }
    x = torch.tensor([[1.0, 2, 3, 4], [4, 8, 12, 16]])
    assert from_json(affine).round(x).tolist() == [[1, 2, 3, 4], [4, 8, 12, 16]]
    assert from_json({"format": "nf4", "group_size": 4, "shape": [2, 1], "scale": [4.0, 16.0]}).round(x)[
        :, 3
    ].tolist() == [
        4,
        16,
    ]
    mx = from_json({"format": "mx", "width": 8, "samples": False, "exponent_width": 4, "axis": None})
    assert mx == FORMATS.get("mx").parse({"width": 8}, WEIGHT)
    block = {"format": "block_log", "width": 4, "samples": False, "block_size": [1, 4], "exponent_bias_width": 8}
    assert from_json(block).block((2, 8)) == (1, 4)


def test_what_operations_say_of_their_operands():
    linear, matmul, add = (OPERATIONS.get(name) for name in ("linear", "matmul", "add"))
    assert linear.operand("data_in").kind() == ACTIVATION
    assert linear.operand("weight").kind() == WEIGHT
    assert linear.operand("bias").kind() == BIAS
    assert add.operand("data_in_2").kind() == ACTIVATION
    assert matmul.operand("weight").kind() == kind_of(-1, -2)
    assert matmul.operand("weight").kind(from_samples=True) == FACTOR
    state = OperandSpec("state", "inner", channel_axis=-1).kind()
    assert state == OperandKind("activation", samples=True, channel_axis=-1)


class Projection(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return x @ self.factor


@pytest.mark.parametrize("settings", [{"granularity": "NA"}, {"group_size": 4}], ids=str)
def test_a_parameter_that_is_the_second_factor_computes_as_a_linear_layer(settings):
    model, x = Projection(), torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    linear = nn.Linear(6, 3, bias=False)
    linear.weight = nn.Parameter(model.factor.detach().T.contiguous())
    outputs = []
    for network in (model, nn.Sequential(linear)):
        graph = capture(network, x)
        (site,) = graph.sites
        form = FORMATS.get("affine").parse({"width": 3, **settings}, site.operation.operand("weight").kind())
        formats = calibrate(graph, {site.name: {"weight": form}}, x)
        outputs.append(quantize(graph, formats)(x).detach())
    torch.testing.assert_close(*outputs)
    assert not torch.equal(outputs[0], model(x))
