"""Costs as the logic of an FPGA: the tool's arithmetic against NumPy, the metric against the whole network laid out."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from bitfront.engine.evaluation.fixed import EvaluationJob, FixedEvaluator
from bitfront.errors import ConfigError
from bitfront.exporters import circuit
from bitfront.exporters.lowering import lowered
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.metrics import RUNNERS
from bitfront.metrics.fpga import signed_digits
from bitfront.metrics.logic_steps import obstacle, steps_of
from bitfront.spaces.quantize import QuantizationSpace
from bitfront.testing.metrics import check_runner

CHOICES = {"name": ["integer"], "data_in_width": [3, 4], "weight_width": [2, 3], "bias_width": [5]}


@pytest.fixture(scope="module")
def fabric():
    pytest.importorskip("alkaid")
    from bitfront.exporters import fabric as module

    return module


def evaluator(model, shape, choices=CHOICES):
    x = torch.randn(40, *shape, generator=torch.Generator().manual_seed(0))
    job = EvaluationJob(
        model=model.eval(),
        sample=x[:2],
        space="graph/quantize/mixed_precision_ptq",
        by="type",
        choices=choices,
        runners=(),
        splits={"val": (x, torch.zeros(40, dtype=torch.long))},
        calibration=x,
    )
    return FixedEvaluator(job)


def mlp(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), *more)


class Residual(nn.Module):
    """A branch that is added to its input and subtracted again, and a mean of two places."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner = nn.Conv1d(2, 4, 1), nn.Conv1d(4, 4, 1)
        self.mean, self.flat, self.last = nn.AvgPool1d(2), nn.Flatten(), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        y = self.inner(x)
        return self.last(self.flat(self.mean(torch.relu(torch.relu(x + y) - y))))


class Branches(nn.Module):
    """Its input and a layer's result, put together."""

    def __init__(self, together):
        super().__init__()
        self.layer, self.together = nn.Linear(4, 4), together

    def forward(self, x):
        return self.together(x, self.layer(x))


def runner(name):
    kind = RUNNERS.get(name)
    return kind(kind.Settings())


# --- the proxy


def test_signed_digits_are_the_fewest():
    numbers = torch.arange(-130, 131).double()
    fewest = {0: 0}
    for count in range(1, 6):  # all sums of so many powers of two with signs
        for total, shift, sign in itertools.product(
            [n for n, c in fewest.items() if c == count - 1], range(9), (1, -1)
        ):
            fewest.setdefault(total + sign * 2**shift, count)
    assert signed_digits(numbers).tolist() == [fewest[int(n)] for n in numbers]


def test_adder_bits_by_hand():
    layer = nn.Conv1d(2, 1, 2, padding=1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[[3.0, -1.75], [0.0, 0.5]]]))  # codes 12, −7, 0, 2
    model = nn.Sequential(layer)
    graph = capture(model.eval(), torch.zeros(2, 2, 3))
    formats = {"data_in": Integer(6, 3), "weight": Integer(5, 2), "bias": Integer(4, 2)}
    (site,) = graph.sites
    context = evaluator(model, (2, 3), {"conv1d": CHOICES})
    context = FixedEvaluator(context.job, QuantizationSpace.of_formats(graph, {site.name: formats}))
    measured = runner("adder_bits").measure(context, np.zeros((1, 0), dtype=np.int64))["adder_bits"]
    # 12 = 16 − 4 and 7 = 8 − 1 have two digits; each value meets 3 of the 4 places, the other one is padding.
    assert measured.tolist() == [6 * 3 * (2 + 2 + 0 + 1)]


def test_a_learned_binary_point_is_known_when_bits_of_weights_are_counted():
    choices = {"linear": {**CHOICES, "weight_frac_width": ["auto"]}}
    context = evaluator(mlp(), (4,), choices)
    codes = context.space.numbered(0, context.space.size)
    kind = RUNNERS.get("ebops")
    spans = kind(kind.Settings(count="set_bits")).measure(context, codes)["ebops"]
    widths = kind(kind.Settings()).measure(context, codes)["ebops"]
    assert (spans <= widths).all()
    assert (spans < widths).any()


@pytest.mark.parametrize("name", ["adder_bits", "lut"])
def test_runners_conform(name, fabric):
    context = evaluator(mlp(), (4,), {"linear": CHOICES})
    metrics = check_runner(name, {}, context, context.space.numbered(0, 6))
    assert all((values > 0).all() for values in metrics.values())


# --- the tool


def test_logic_computes_what_numpy_computes(fabric):
    """Products, ReLU, rounding half to even, saturation and maxima, for ranges of every kind."""
    rng = np.random.default_rng(0)
    for _ in range(150):
        step = 2.0 ** rng.integers(-6, 3, 3)
        first = rng.integers(-20, 8, 3)
        low, high = first * step, (first + rng.integers(0, 24, 3)) * step
        weight = rng.integers(-9, 10, (3, 2)) * 2.0 ** rng.integers(-4, 2)
        weight[:, 1] *= rng.random() < 0.7
        bias = rng.integers(-30, 30, 2) * 2.0 ** int(rng.integers(-5, 3))
        grain = 2.0 ** int(rng.integers(-6, 6))
        ends = int(rng.integers(-40, 1)) * grain, int(rng.integers(0, 40)) * grain
        signals = fabric.inputs(low, high, step)
        sums = fabric.product(signals, weight, bias)
        results = [fabric.rounded(fabric.rectified(sums[0]), *ends, grain), fabric.rounded(sums[1], *ends, grain)]
        results = np.array([*results, fabric.largest(list(sums))], dtype=object)
        x = np.stack(
            [rng.integers(round(a / s), round(b / s) + 1, 50) * s for a, b, s in zip(low, high, step, strict=True)],
            axis=1,
        )
        exact = x @ weight + bias
        rectified = np.maximum(exact * [1, 1], [0, -np.inf])
        expected = np.clip(np.round(rectified / grain) * grain, *ends)
        expected = np.concatenate([expected, exact.max(axis=1, keepdims=True)], axis=1)
        assert np.array_equal(fabric.traced(signals, results).predict(x), expected)
        least, most, _ = fabric.intervals(results)
        assert (expected >= least).all()
        assert (expected <= most).all()


def laid_out_whole(fabric, context, code):
    """The cost of a candidate as one piece of logic, as it is exported."""
    program = lowered(context.space.graph, context.formats(code))
    return fabric.cost_of(circuit.laid_out(program))


def test_the_sum_over_layers_is_near_the_whole(fabric):
    torch.manual_seed(0)
    auto = {f"{operand}_frac_width": ["auto"] for operand in ("data_in", "weight", "bias")}
    choices = {"linear": {**CHOICES, "data_in_width": [4, 6], "weight_width": [3, 6], **auto}}
    context = evaluator(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)), (8,), choices)
    codes = context.space.numbered(0, context.space.size)[::5]
    measured = runner("lut").measure(context, codes)
    whole = [laid_out_whole(fabric, context, code) for code in codes]
    assert measured["lut"] == pytest.approx([cost.luts for cost in whole], rel=0.1)
    assert measured["adder_depth"] == pytest.approx([cost.levels for cost in whole], rel=0.25)


@pytest.mark.parametrize("rounding", ["even", "half_up", "floor"])
@pytest.mark.parametrize("overflow", ["saturate", "wrap"])
def test_branches_means_and_every_rounding_are_near_the_whole(fabric, rounding, overflow):
    auto = {f"{operand}_frac_width": ["auto"] for operand in ("data_in", "weight", "bias")}
    way = {"data_in_rounding": [rounding], "data_in_overflow": [overflow]}
    layer = {**CHOICES, "data_in_width": [5], "weight_width": [4], **auto, **way}
    adding = {"name": ["integer", "NA"], "data_in_width": [5], "data_in_frac_width": ["auto"], **way}
    context = evaluator(Residual(), (2, 4), {"conv1d": layer, "linear": layer, "add": adding})
    codes = context.space.numbered(0, 2)
    assert not obstacle(context.space)
    measured = runner("lut").measure(context, codes)
    whole = [laid_out_whole(fabric, context, code) for code in codes]
    # A layer of the whole network takes fewer values than its format has.
    assert measured["lut"] == pytest.approx([cost.luts for cost in whole], rel=0.2)
    assert measured["adder_depth"] == pytest.approx([cost.levels for cost in whole], rel=0.25)
    assert measured["lut"][0] != measured["lut"][1]  # with and without a rounding in front of the sum


def test_a_rounding_costs_what_its_circuit_costs(fabric):
    """One layer, whose input is rounded by the layer before it."""
    costs = {}
    for rounding, overflow in itertools.product(("even", "half_up", "floor"), ("saturate", "wrap")):
        way = {"data_in_rounding": [rounding], "data_in_overflow": [overflow]}
        context = evaluator(mlp(), (4,), {"linear": {**CHOICES, **way}})
        costs[rounding, overflow] = runner("lut").measure(context, context.space.numbered(0, 1))["lut"][0]
    assert costs["even", "saturate"] > costs["half_up", "saturate"] > costs["floor", "saturate"]
    assert costs["even", "saturate"] > costs["even", "wrap"]


def test_equal_layers_are_laid_out_once(fabric, monkeypatch):
    context = evaluator(mlp(), (4,), {"linear": CHOICES})
    codes, metric, calls = context.space.numbered(0, 4), runner("lut"), []
    traced = fabric.traced
    monkeypatch.setattr(fabric, "traced", lambda *a: calls.append(a) or traced(*a))
    first = metric.measure(context, codes)
    assert calls
    calls.clear()
    assert metric.measure(context, codes)["lut"].tolist() == first["lut"].tolist()
    again = evaluator(mlp(), (4,), {"linear": CHOICES})
    assert metric.measure(again, codes)["lut"].tolist() == first["lut"].tolist()
    assert not calls


# --- steps


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (
            nn.Sequential(nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2), groups=2), nn.Flatten()),
            (4, 7, 6),
        ),
        (nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.MaxPool1d(2, padding=1), nn.Flatten()), (2, 7)),
        (nn.Sequential(nn.Unflatten(1, (3, 4)), nn.Linear(4, 2), nn.Flatten()), (12,)),
        (nn.Sequential(nn.AvgPool2d((2, 1)), nn.AdaptiveAvgPool2d((1, None)), nn.Flatten()), (2, 4, 3)),
    ],
    ids=["conv2d", "conv1d, pool", "rows", "means"],
)
def test_a_step_reads_what_its_node_reads(model, shape):
    graph = capture(model.eval(), torch.zeros(2, *shape))
    steps = steps_of(QuantizationSpace.of_float(graph))
    x = torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(1)).double()
    model = model.double()
    value, values = x.numpy(), {}
    for step in steps:
        layer = dict(model.named_modules()).get(step.name.removeprefix("_"))
        padded = np.append(value.ravel(), -np.inf if step.kind == "pools" else 0.0)
        if step.kind == "moves":
            value = value.ravel()[step.index]
        elif step.kind == "pools":
            value = padded[step.index].max(axis=1).reshape(step.shape)
        elif step.kind == "means":
            value = padded[step.index].mean(axis=1).reshape(step.shape)
        elif step.kind == "sums":
            groups, _, terms = step.index.shape
            weight = layer.weight.detach().numpy().reshape(groups, -1, terms)
            sums = np.einsum("gpt,got->gpo", padded[step.index], weight)
            order = (1, 0, 2) if step.channels_last else (0, 2, 1)
            bias = layer.bias.detach().numpy()
            sums = sums.transpose(order).reshape(step.shape)
            value = sums + (bias if step.channels_last else bias.reshape(-1, *[1] * (len(step.shape) - 1)))
        values[step.name] = value
    assert value == pytest.approx(model(x[None])[0].detach().numpy())


# --- refusals


@pytest.mark.parametrize(
    ("model", "choices", "message"),
    [
        (
            mlp(),
            {"linear": {**CHOICES, "name": ["integer", "NA"]}},
            r"_0 \(Linear\): data_in stays in float in an option",
        ),
        (mlp(), {"linear": {**CHOICES, "bias_width": ["NA"]}}, r"_0 \(Linear\): bias stays in float"),
        (
            mlp(),
            {"linear": {**CHOICES, "name": ["affine"]}},
            r"_0 \(Linear\): \w+ is .*, whose values are no multiples",
        ),
        (mlp(nn.Softmax(1)), {"linear": CHOICES}, r"_3 \(Softmax\) cannot be laid out as logic; possible are Linear"),
        (
            nn.Sequential(nn.MaxPool1d(2), nn.Flatten(), nn.Linear(2, 2)),
            {"linear": CHOICES},
            r"_0: its input stays in f",
        ),
        (
            nn.Sequential(nn.Conv1d(1, 1, 1), nn.AvgPool1d(3), nn.Flatten(), nn.Linear(1, 2)),
            {"linear": CHOICES, "conv1d": CHOICES},
            r"_1 \(AvgPool1d\) cannot be laid out as logic; possible are .*windows of a power of two",
        ),
        (Branches(lambda x, y: x + y), {"linear": CHOICES}, "add: its first input stays in float"),
        (Branches(lambda x, y: y - y.unsqueeze(1)), {"linear": CHOICES}, "sub: of sums and differences, those of two"),
    ],
    ids=["NA", "bias", "affine", "softmax", "pool", "mean of three", "float branch", "broadcast"],
)
def test_what_cannot_be_modelled_is_refused_by_name(model, choices, message):
    first = next(m for m in model.modules() if not list(m.children()))
    context = evaluator(model, (4,) if isinstance(first, nn.Linear) else (1, 4), choices)
    with pytest.raises(ConfigError, match=message) as caught:
        runner("lut").kinds(context)
    assert caught.value.key == ("search", "strategy", "hw_runner", "lut")


def test_without_the_tool_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "alkaid.trace", None)
    with pytest.raises(ConfigError, match=r"the metric lut needs alkaid, which is not installed: .*bitfront\[fpga\]"):
        runner("lut").ready("cpu")


def test_the_float_model_has_no_logic():
    context = evaluator(mlp(), (4,), {"linear": CHOICES}).float_evaluator()
    values = runner("lut").measure(context, np.zeros((1, 0), dtype=np.int64))
    assert np.isnan(values["lut"]).all()
