"""EBOPs, product by product: the metric against a count in Python's whole numbers, by every convention."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import bitfront as bf
from bitfront.data.arrays import from_arrays
from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.engine.evaluation.interface import EvaluationJob
from bitfront.engine.planning.plan import Plan
from bitfront.errors import RunError
from bitfront.formats.affine import Affine
from bitfront.formats.base import WEIGHT
from bitfront.formats.binary import Binary
from bitfront.formats.fixed_map import FixedMap
from bitfront.formats.integer import Integer
from bitfront.formats.log import Log
from bitfront.formats.nf4 import NormalFloat4
from bitfront.graph import capture
from bitfront.metrics import RUNNERS
from bitfront.metrics.effective_bits import BitCount, set_bits
from bitfront.spaces.quantize import QuantizationSpace

CONVENTIONS = [
    BitCount(sign, count, biases)
    for sign, count, biases in itertools.product((False, True), ("width", "set_bits"), (False, True))
]
LAYERS = {
    "linear": (nn.Linear(6, 4), (6,)),
    "no bias": (nn.Linear(5, 3, bias=False), (5,)),
    "padded": (nn.Conv2d(2, 3, 3, padding=1), (2, 5, 4)),
    "strided": (nn.Conv2d(4, 4, (3, 2), stride=2, padding=1, groups=2), (4, 6, 5)),
    "depthwise": (nn.Conv2d(3, 3, 3, padding=2, groups=3), (3, 4, 4)),
    "one dimension": (nn.Conv1d(2, 3, 3, padding=1, dilation=2), (2, 7)),
}


def span(code: int) -> int:
    """Bits from the highest to the lowest one that is set."""
    return len(bin(abs(code))[2:].rstrip("0")) if code else 0


def ebops_of(model, formats, shape, count):
    """What the metric says of a network with these formats."""
    graph = capture(model.eval(), torch.zeros(2, *shape))
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    job = EvaluationJob(
        model=model,
        sample=x[:2],
        space="graph/quantize/mixed_precision_ptq",
        by="name",
        choices={},
        runners=(),
        splits={"val": (x, torch.zeros(4, dtype=torch.long))},
        calibration=x,
    )
    named = {site.name: formats for site in graph.sites}
    evaluator = FixedEvaluator(job, QuantizationSpace.of_formats(graph, named))
    kind = RUNNERS.get("ebops")
    settings = kind.Settings(sign_bits=count.sign_bits, count=count.count, biases=count.biases)
    return kind(settings).measure(evaluator, np.zeros((1, 0), dtype=np.int64))["ebops"].tolist()[0]


def by_hand(layer, shape, weight_bits, data_bits, bias_bits):
    """Σ over the products of a layer, each found by its place; none with padding."""
    total = 0
    weight = layer.weight
    for place in itertools.product(*map(range, weight.shape)):
        one = torch.zeros_like(weight, dtype=torch.float64)
        one[place] = 1
        # The inputs that this value meets: the layer of every input alone, marked by its number.
        marks = torch.arange(1, data_bits.size + 1, dtype=torch.float64).reshape(1, *shape)
        call = layer._conv_forward if isinstance(layer, nn.modules.conv._ConvNd) else nn.functional.linear
        met = call(marks, one, None).flatten().long().tolist()
        total += sum(int(weight_bits[place]) * int(data_bits.flat[m - 1]) for m in met if m)
    if layer.bias is not None:
        outputs = layer(torch.zeros(1, *shape))[0]
        total += sum(int(bias_bits[channel]) * outputs[channel].numel() for channel in range(len(bias_bits)))
    return total


@pytest.mark.parametrize("count", CONVENTIONS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_with_one_format_counts_product_by_product(name, count):
    layer, shape = LAYERS[name]
    weight, data, bias = Integer(5, 4), Integer(6, 3, signed=False), Integer(4, 3)
    formats = {"weight": weight, "data_in": data} | ({} if layer.bias is None else {"bias": bias})

    def bits(form, values):
        codes = np.rint(form.round(values.detach()).double().numpy() / form.grid.step).astype(int)
        of = (
            (lambda c: span(c) + count.sign_bits)
            if count.count == "set_bits"
            else (lambda _: form.width - 1 + count.sign_bits)
        )
        return np.vectorize(lambda c: of(c) if c else 0)(codes)

    biases = bits(bias, layer.bias) * count.biases if layer.bias is not None else None
    wanted = by_hand(layer, shape, bits(weight, layer.weight), np.full(shape, 6), biases)
    assert wanted > 0
    assert ebops_of(nn.Sequential(layer), formats, shape, count) == wanted


@pytest.mark.sampled(5)
@pytest.mark.parametrize("count", CONVENTIONS, ids=str)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_values_with_bits_of_their_own_count_product_by_product(name, signed, count):
    layer, shape = LAYERS[name]
    rng = np.random.default_rng(len(name))
    codes = {"weight": rng.integers(-9, 10, tuple(layer.weight.shape))}
    if layer.bias is not None:
        codes["bias"] = rng.integers(-40, 41, tuple(layer.bias.shape))
    lengths = {operand: np.vectorize(lambda c: int(abs(c)).bit_length())(c) for operand, c in codes.items()}
    data = rng.integers(0, 6, shape)  # bits of magnitudes
    formats = {
        "data_in": FixedMap.of(
            (data + signed * (data > 0)).astype(np.int8), data.astype(np.int8), signed=signed, samples=True
        )
    }
    mine = nn.Sequential(layer)
    with torch.no_grad():
        for operand, values in codes.items():
            getattr(layer, operand).copy_(torch.from_numpy(values / 8))
            widths = (lengths[operand] + (lengths[operand] > 0)).astype(np.int8)
            formats[operand] = FixedMap.of(widths, np.full_like(widths, 3), signed=True, samples=False)
    counted = {
        operand: np.vectorize(span)(c) if count.count == "set_bits" else lengths[operand]
        for operand, c in codes.items()
    }
    counted = {operand: bits + (bits > 0) * count.sign_bits for operand, bits in counted.items()}
    bias = counted["bias"] * count.biases if "bias" in counted else None
    wanted = by_hand(layer, shape, counted["weight"], data + (data > 0) * (signed and count.sign_bits), bias)
    assert ebops_of(mine, formats, shape, count) == wanted


def test_the_span_of_set_bits():
    codes = [0, 1, -1, 2, 3, 4, 5, 6, 7, 8, -12, 2**40, 2**40 + 1]
    assert set_bits(torch.tensor(codes, dtype=torch.float64)).tolist() == [span(c) for c in codes]


def test_magnitudes_of_formats():
    without, with_signs = BitCount(), BitCount(sign_bits=True)
    symmetric, shifted = (Affine.parse({"width": 4, "symmetric": s}, WEIGHT) for s in (True, False))
    cases = [
        (None, 31, 32),
        (Integer(8, 4), 7, 8),
        (Integer(8, 4, signed=False), 8, 8),
        (Integer(1, 0), 1, 1),
        (symmetric, 3, 4),
        (shifted, 4, 4),
        (Binary.parse({"width": 1}, WEIGHT), 1, 1),
    ]
    for form, magnitude, width in cases:
        assert (without.of(form), with_signs.of(form)) == (magnitude, width), form


def test_values_without_a_common_step_count_their_width():
    values = torch.tensor([[0.0, 0.5, -2.0]])
    form = NormalFloat4.parse({}, WEIGHT).calibrated(values)
    rounded = form.round(values)
    assert form.grid_of(rounded) is None
    assert BitCount(count="set_bits").of_values(form, rounded).tolist() == [[0, 3, 3]]
    # A power of two has one set bit.
    powers = Log.parse({"width": 5}, WEIGHT)
    assert BitCount(count="set_bits").of_values(powers, powers.round(values)).tolist() == [[0, 1, 1]]


def test_trials_that_were_counted_otherwise_are_not_continued(tiny_mlp, tmp_path, monkeypatch):
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    data = from_arrays(x, (x.sum(1) > 0).long())

    def search():
        return bf.search(
            model=tiny_mlp,
            data=data,
            space={"by": "type", "linear": {"name": ["integer"], "weight_width": [3, 4], "data_in_width": [8]}},
            metrics={"accuracy": "maximize", "ebops": "minimize"},
            strategy="brute_force",
            project="counts",
            project_dir=str(tmp_path),
        )

    now = Plan.identity
    with monkeypatch.context() as earlier:
        earlier.setattr(Plan, "identity", lambda *a: {k: v for k, v in now(*a).items() if k != "ebops_count"})
        assert len(search()) == len(search()) == 4
    with pytest.raises(
        RunError, match=r'another configuration:\n  ebops_count: it has nothing, or the default, requested is "as HGQ2"'
    ):
        search()
