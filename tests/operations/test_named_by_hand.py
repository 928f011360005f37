"""What is a site only where it is named, against torch's own module or function with its operands rounded by hand.

Rounding is written out here. A module is torch's, with rounded parameters put into it; a function is called with rounded
tensors. Nothing is shared with the ``call`` of the records.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitfront.formats import FORMATS
from bitfront.graph import capture
from bitfront.operations.lookup import of_class
from bitfront.transforms import quantize
from bitfront.transforms.observe import calibrate
from operations.test_operations import MODULES, example_of

KINDS = [k for k in MODULES if (o := of_class(k)).operands and not o.by_default]
#: Operand → (width, frac_width); all different, so that none can stand for another.
GRIDS = {"data_in": (5, 2), "data_in_2": (6, 3), "weight": (4, 2), "bias": (7, 4)}


def rounded(x, operand):
    width, frac = GRIDS[operand]
    return torch.clamp(torch.round(x * 2**frac), -(2 ** (width - 1)), 2 ** (width - 1) - 1) / 2**frac


def formats_of(site):
    return {
        o.name: FORMATS.get("integer").parse({"width": GRIDS[o.name][0], "frac_width": GRIDS[o.name][1]}, o.kind())
        for o in site.specs
    }


class Around(nn.Module):
    """A site, and the samples as rows."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.flatten(self.inner(x), 1)


def the_site(graph):
    (site,) = graph.nameable
    return site


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("single", [False, True])
def test_modules(kind, single):
    torch.manual_seed(0)
    example, x = example_of(kind)
    example.eval()
    graph = capture(Around(example), x[:2])
    site = the_site(graph)
    for chosen in [{o: f} for o, f in formats_of(site).items()] if single else [formats_of(site)]:
        by_hand = copy.deepcopy(example)
        for operand in chosen:
            if operand != "data_in":
                held = getattr(by_hand, operand)
                held.data = rounded(held.data, operand)
        expected = by_hand(rounded(x, "data_in") if "data_in" in chosen else x)
        model = quantize(graph, {site.name: chosen})
        assert torch.equal(model(x), torch.flatten(expected, 1))
        assert torch.equal(quantize(graph, {site.name: chosen}, bake=True)(x), torch.flatten(expected, 1))


W = torch.linspace(-1.3, 1.7, 6)
B = torch.linspace(0.9, -1.1, 6)
M, V = torch.linspace(-0.5, 0.5, 6), torch.linspace(0.3, 2, 6)
#: Function of (x, weight, bias, another tensor) → the shape of a sample, and the operands that it has.
FUNCTIONS = [
    (lambda x, w, b, y: F.batch_norm(x, M, V, w, b), (6, 3), ("data_in", "weight", "bias")),
    (lambda x, w, b, y: F.batch_norm(x, M, V, bias=b, weight=w), (6,), ("data_in", "weight", "bias")),
    (lambda x, w, b, y: F.instance_norm(x, weight=w, bias=b), (6, 4), ("data_in", "weight", "bias")),
    (lambda x, w, b, y: F.layer_norm(x, (6,), w, b, 1e-3), (2, 6), ("data_in", "weight", "bias")),
    (lambda x, w, b, y: torch.layer_norm(x, (6,), w), (2, 6), ("data_in", "weight")),
    (lambda x, w, b, y: F.group_norm(x, 2, bias=b), (6, 4), ("data_in", "bias")),
    (lambda x, w, b, y: F.rms_norm(x, (6,), w), (2, 6), ("data_in", "weight")),
    (lambda x, w, b, y: F.prelu(x, w), (6, 2), ("data_in", "weight")),
    (lambda x, w, b, y: x / y, (6,), ("data_in", "data_in_2")),
    (lambda x, w, b, y: torch.div(x, y, rounding_mode="floor"), (6,), ("data_in", "data_in_2")),
    (lambda x, w, b, y: x.div(y), (6,), ("data_in", "data_in_2")),
    (lambda x, w, b, y: torch.maximum(x, y), (6,), ("data_in", "data_in_2")),
    (lambda x, w, b, y: x.minimum(y), (6,), ("data_in", "data_in_2")),
    (lambda x, w, b, y: x.mean(1), (6, 3), ("data_in",)),
    (lambda x, w, b, y: torch.mean(x, (2, 3), keepdim=True), (6, 3, 3), ("data_in",)),
    (lambda x, w, b, y: F.avg_pool2d(x, 2, ceil_mode=True), (2, 5, 5), ("data_in",)),
    (lambda x, w, b, y: F.adaptive_avg_pool1d(x, 2), (2, 5), ("data_in",)),
    (lambda x, w, b, y: F.max_pool2d(x, kernel_size=2), (2, 4, 4), ("data_in",)),
    (lambda x, w, b, y: F.adaptive_max_pool2d(x, 2), (2, 5, 5), ("data_in",)),
    (lambda x, w, b, y: F.softmax(x, dim=-1), (2, 6), ("data_in",)),
    (lambda x, w, b, y: x.softmax(1), (6, 2), ("data_in",)),
    (lambda x, w, b, y: torch.special.softmax(x, 1), (6, 2), ("data_in",)),
    (lambda x, w, b, y: x.log_softmax(-1), (2, 6), ("data_in",)),
    (lambda x, w, b, y: F.gelu(input=x), (6,), ("data_in",)),
    (lambda x, w, b, y: F.silu(x), (6,), ("data_in",)),
    (lambda x, w, b, y: F.hardswish(x), (6,), ("data_in",)),
    (lambda x, w, b, y: F.hardsigmoid(x), (6,), ("data_in",)),
    (lambda x, w, b, y: torch.sigmoid(x), (6,), ("data_in",)),
    (lambda x, w, b, y: x.sigmoid(), (6,), ("data_in",)),
    (lambda x, w, b, y: x.tanh(), (6,), ("data_in",)),
    (lambda x, w, b, y: F.leaky_relu(x, 0.3), (6,), ("data_in",)),
    (lambda x, w, b, y: F.elu(x, 0.5), (6,), ("data_in",)),
    (lambda x, w, b, y: torch.selu(x), (6,), ("data_in",)),
    (lambda x, w, b, y: torch.celu(x, 0.5), (6,), ("data_in",)),
    (lambda x, w, b, y: F.relu6(4 * x), (6,), None),
    (lambda x, w, b, y: F.hardtanh(x, -0.3, 0.7), (6,), ("data_in",)),
    (lambda x, w, b, y: F.mish(x), (6,), ("data_in",)),
    (lambda x, w, b, y: F.softplus(x, 2, 3), (6,), ("data_in",)),
    (lambda x, w, b, y: F.softsign(x), (6,), ("data_in",)),
    (lambda x, w, b, y: F.tanhshrink(x), (6,), ("data_in",)),
    (lambda x, w, b, y: F.softshrink(x, 0.3), (6,), ("data_in",)),
    (lambda x, w, b, y: F.threshold(x, 0.1, -1), (6,), ("data_in",)),
    (lambda x, w, b, y: F.logsigmoid(x), (6,), ("data_in",)),
    (lambda x, w, b, y: F.glu(x, 1), (6,), ("data_in",)),
]


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.w, self.b = function, nn.Parameter(W.clone()), nn.Parameter(B.clone())

    def forward(self, x):
        return torch.flatten(self.function(x, self.w, self.b, torch.cos(x) + 2), 1)


@pytest.mark.parametrize("at", range(len(FUNCTIONS)))
def test_functions(at):
    function, shape, operands = FUNCTIONS[at]
    if operands is None:  # the product before it is computed in float
        operands, given = ("data_in",), lambda x: 4 * x
        inner = F.relu6
    else:
        given, inner = lambda x: x, None
    torch.manual_seed(at)
    x = torch.randn(8, *shape)
    graph = capture(Called(function), x[:2])
    site = the_site(graph)
    assert site.operands == operands
    model = quantize(graph, {site.name: formats_of(site)})
    if inner is not None:
        expected = inner(rounded(given(x), "data_in"))
    else:
        w, b = (rounded(v, o) if o in operands else v for v, o in ((W, "weight"), (B, "bias")))
        y = torch.cos(x) + 2
        y = rounded(y, "data_in_2") if "data_in_2" in operands else y
        expected = function(rounded(x, "data_in"), w, b, y)
    assert torch.equal(model(x), torch.flatten(expected, 1))


def test_formats_learn_from_the_samples():
    """A format that calibrates, at a norm and at a function: its scale is that of the values that arrive there."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Softmax(1)), torch.randn(64, 6)
    graph = capture(model, x[:2])
    affine = FORMATS.get("affine")
    table = {"width": 8, "symmetric": True, "granularity": "tensor"}
    given = {o.name: affine.parse(table, o.kind()) for o in graph.site("_1").specs}
    found = calibrate(graph, {"_1": given, "_2": {"data_in": given["data_in"]}}, x)
    with torch.no_grad():
        arrives = {"_1": model[0](x), "_2": model[1](model[0](x))}
    for name, values in arrives.items():
        assert found[name]["data_in"].scale[0] == pytest.approx(float(values.abs().max()) / 127, rel=1e-2)
    assert quantize(graph, found)(x).shape == (64, 6)
