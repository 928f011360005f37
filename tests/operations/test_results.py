"""Results with formats of their own (``data_out_*``): rounded after everything that a site computes."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitfront.engine.analysis import describe
from bitfront.engine.evaluation.calibration import Corrections
from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.engine.evaluation.interface import EvaluationJob
from bitfront.errors import ConfigError, ExportError
from bitfront.exporters.integer import obstacle
from bitfront.exporters.onnx import INPUT, onnx_model
from bitfront.formats import FORMATS
from bitfront.formats.base import ACTIVATION
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.metrics.configured import configured_runner
from bitfront.population import why_alone
from bitfront.scoring import evaluate
from bitfront.spaces.quantize import QuantizationSpace
from bitfront.spaces.request import SpaceRequest
from bitfront.transforms import quantize
from bitfront.transforms.learned import frozen, learning_model
from bitfront.transforms.observe import calibrate

ROUNDED = {"name": ["integer"], "data_out_width": [4, 6], "data_out_frac_width": [2, "auto"]}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc, self.weight = nn.Linear(64, 5), nn.Parameter(torch.randn(5, 3))

    def forward(self, x):
        h = torch.relu(self.norm(self.conv(x)))
        h = h + torch.tanh(h)
        h = self.fc(h.flatten(1))
        h += 0.5 * h
        return h @ self.weight


def samples():
    return torch.randn(40, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def model():
    torch.manual_seed(0)
    return Net().eval()


def job(choices, by="type"):
    x = samples()
    return EvaluationJob(
        model=model(),
        sample=x[:2],
        space="graph/quantize/mixed_precision_ptq",
        by=by,
        choices=choices,
        runners=(configured_runner("basic_evaluation"),),
        splits={"val": (x, torch.arange(len(x)) % 3)},
        calibration=x,
    )


def fixed(x, frac=2, width=6):
    return torch.clamp(torch.round(x * 2**frac), -(2 ** (width - 1)), 2 ** (width - 1) - 1) / 2**frac


def test_results_are_rounded_by_hand():
    table = {"name": ["integer"], "data_out_width": [6], "data_out_frac_width": [2]}
    evaluator = FixedEvaluator(job(dict.fromkeys(("conv2d", "relu", "add", "linear", "matmul"), table)))
    net, x = model(), samples()
    with torch.no_grad():
        h = fixed(torch.relu(net.norm(fixed(net.conv(x)))))
        h = fixed(h + torch.tanh(h))
        h = fixed(net.fc(h.flatten(1)))
        h = fixed(h + 0.5 * h)
        assert torch.equal(evaluator.model(evaluator.space.numbered(0, 1)[0])(x), fixed(h @ net.weight))


def test_candidates_together_are_those_alone():
    both = {**ROUNDED, "data_in_width": [3, 8], "weight_width": [4, 8]}
    choices = {"conv2d": both, "relu": ROUNDED, "add": ROUNDED, "linear": both, "matmul": both}
    evaluator = FixedEvaluator(job(choices))
    codes = evaluator.space.sample(30, np.random.default_rng(0))
    measured = evaluator.evaluate(codes)
    assert not evaluator.plain
    x, y = evaluator.job.splits["val"]
    for i, code in enumerate(codes):
        alone = evaluate(evaluator.model(code), x, y, batch_size=evaluator.chunk)
        assert (measured.values["loss"][i], measured.values["accuracy"][i]) == (alone.loss, alone.accuracy)


def test_a_space_has_them_only_where_a_key_says_so():
    graph = capture(model(), samples()[:2])
    plain = {"name": ["integer"], "weight_width": [4, 8]}
    space = QuantizationSpace(SpaceRequest(graph, "type", {"linear": plain}))
    assert all("data_out" not in dict(a.operands) for s in space.assignments for a in s.alternatives)
    assert QuantizationSpace(SpaceRequest(graph, "type", {"linear": {**plain, **ROUNDED}})).size == 2 * 4


def test_what_cannot_compute_them_says_so():
    evaluator = FixedEvaluator(job({"linear": {**ROUNDED, "data_in_width": [8], "weight_width": [8]}}))
    code = evaluator.space.numbered(0, 1)[0]
    graph = evaluator.space.graph
    assert "leave it out, or write ONNX" in obstacle(graph, graph.site("fc"), evaluator.formats(code)["fc"])
    net = nn.Sequential(nn.Flatten(), nn.Linear(32, 3)).eval()
    x = samples()
    alone = FixedEvaluator(
        EvaluationJob(
            model=net,
            sample=x[:2],
            space="graph/quantize/mixed_precision_ptq",
            by="type",
            choices={"linear": {**ROUNDED, "data_in_width": [8], "data_in_frac_width": [4]}},
            runners=(configured_runner("basic_evaluation"),),
            splits={"val": (x, torch.arange(len(x)) % 3)},
            calibration=x,
        )
    )
    assert "result" in why_alone(alone.model(alone.space.numbered(0, 1)[0]), (2, 4, 4))


class Changing(nn.Module):
    """Reads a tensor that a function may have changed."""

    def __init__(self, function):
        super().__init__()
        self.fc, self.function = nn.Linear(32, 3), function

    def forward(self, x):
        h = self.fc(x.flatten(1))
        return self.function(h) + h


@pytest.mark.parametrize(
    ("function", "of", "changes"),
    [
        (F.relu, torch.relu, False),
        (torch.relu_, torch.relu, True),
        (partial(F.relu, inplace=True), torch.relu, True),
        (lambda h: h.add_(h), lambda h: h + h, True),
    ],
)
@pytest.mark.parametrize("also", [{}, {"data_in": Integer(8, 5)}])
def test_what_changes_its_argument_writes_the_rounded_result(function, of, changes, also):
    torch.manual_seed(0)
    net, x = Changing(function).eval(), samples()
    graph = capture(net, x[:2])
    (site, *_) = [s.name for s in (*graph.sites, *graph.nameable) if s.op in ("relu", "add")]
    out = quantize(graph, {site: {**also, "data_out": Integer(6, 2)}})(x)
    with torch.no_grad():
        h = net.fc(x.flatten(1))
        first = also["data_in"].quantize(h) if also else h
        result = fixed(first + h if of(h).equal(h + h) else of(first))
    assert torch.equal(out, result + (result if changes else h))


def test_a_module_that_changes_its_input_does_too():
    torch.manual_seed(0)
    net, x = Changing(nn.ReLU(inplace=True)).eval(), samples()
    graph = capture(net, x[:2])
    out = quantize(graph, {"function": {"data_out": Integer(6, 2)}})(x)
    with torch.no_grad():
        assert torch.equal(out, 2 * fixed(torch.relu(net.fc(x.flatten(1)))))


class Several(nn.Module):
    """Layers that return several tensors."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 4, 2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        steps, (state, cell) = self.lstm(x.transpose(0, 1))
        out, scores = self.attention(*[steps.transpose(0, 1)] * 3)
        return torch.cat([out.mean(1), state[-1], cell[-1], scores.mean(1)], 1)


def test_of_several_tensors_the_first_is_rounded():
    torch.manual_seed(0)
    net, x = Several().eval(), torch.randn(20, 5, 4)
    graph = capture(net, x[:2])
    form = Integer(6, 4)
    model = quantize(graph, {"lstm": {"data_out": form}, "attention": {"data_out": form}})
    with torch.no_grad():
        steps, (state, cell) = net.lstm(x.transpose(0, 1))
        out, scores = net.attention(*[fixed(steps, 4).transpose(0, 1)] * 3)
        assert torch.equal(model(x), torch.cat([fixed(out, 4).mean(1), state[-1], cell[-1], scores.mean(1)], 1))


def test_blocks_of_a_result_follow_its_samples():
    torch.manual_seed(0)
    net, x = Several().eval(), torch.randn(20, 5, 4)
    graph = capture(net, x[:2])
    kind = graph.site("lstm").operand("data_out").kind()
    form = FORMATS.get("block_fp").parse({"width": 4, "exponent_width": 8, "block_size": [1, 4]}, kind)
    model = quantize(graph, {"lstm": {"data_out": form}})
    torch.testing.assert_close(model(x)[:3], model(x[:3]))
    with torch.no_grad():
        steps, (state, cell) = net.lstm(x.transpose(0, 1))
        out, scores = net.attention(*[form.quantize(steps.transpose(0, 1))] * 3)
        assert torch.equal(model(x), torch.cat([out.mean(1), state[-1], cell[-1], scores.mean(1)], 1))


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(32, 6)

    def forward(self, x):
        h = self.fc(x.flatten(1))
        if h.sum() > -1e9:
            h = torch.matmul(h.unsqueeze(2), h.unsqueeze(1)).flatten(1)[:, :6]
        return F.scaled_dot_product_attention(h.unsqueeze(1), h.unsqueeze(1), h.unsqueeze(1))[:, 0]


def test_models_that_are_not_traced():
    torch.manual_seed(0)
    net, x = Untraceable().eval(), samples()
    choices = {"default": {**ROUNDED, "data_in_width": [6], "data_in_frac_width": [3]}}
    evaluator = FixedEvaluator(replace(job(choices), model=net))
    assert evaluator.space.graph.untraced
    codes = evaluator.space.sample(20, np.random.default_rng(0))
    measured = evaluator.evaluate(codes)
    x, y = evaluator.job.splits["val"]
    for i, code in enumerate(codes):
        assert measured.values["loss"][i] == evaluate(evaluator.model(code), x, y, batch_size=evaluator.chunk).loss
    form = {"data_out": Integer(6, 2)}
    model = quantize(evaluator.space.graph, {s.name: form for s in evaluator.space.sites})
    with torch.no_grad():
        h = fixed(net.fc(x.flatten(1)))
        h = fixed(torch.matmul(h.unsqueeze(2), h.unsqueeze(1))).flatten(1)[:, :6]
        assert torch.equal(model(x), fixed(F.scaled_dot_product_attention(*[h.unsqueeze(1)] * 3))[:, 0])


# --- what may be chosen ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "key", "sites"),
    [
        ("name", "default", {"conv", "relu", "add", "add_1", "fc", "matmul"}),
        ("name", "fc", {"fc"}),
        ("type", "relu", {"relu"}),
        ("regex_name", "conv|norm|fc", {"conv", "fc"}),
        ("regex_name", "norm", {"norm"}),
    ],
)
def test_every_key_can_name_them(by, key, sites):
    graph = capture(model(), samples()[:2])
    space = QuantizationSpace(SpaceRequest(graph, by, {key: ROUNDED}))
    offered = {s.name for s, options in zip(space.sites, space.site_formats, strict=True) if any(options)}
    names = {"iadd": "add_1"}
    assert {names.get(name, name) for name in offered} == sites


def test_one_setting_is_float():
    graph = capture(model(), samples()[:2])
    table = {"name": ["integer", "NA"], "data_out_width": [4, "NA"], "data_out_frac_width": [2], "weight_width": [4]}
    space = QuantizationSpace(SpaceRequest(graph, "name", {"fc": table}))
    (options,) = [f for s, f in zip(space.sites, space.site_formats, strict=True) if s.name == "fc"]
    assert [sorted(o) for o in options] == [["data_out", "weight"], ["weight"], []]
    for code in space.numbered(0, space.size):
        assert np.array_equal(space.encode(space.decode(code)), code)


def test_uniform_candidates_have_every_width():
    graph = capture(model(), samples()[:2])
    space = QuantizationSpace(SpaceRequest(graph, "name", {"default": ROUNDED}))
    bits = [{f.bits for o in space.formats(row).values() for f in o.values()} for row in space.options(space.uniform())]
    assert bits == [{4}, {6}]


def test_a_mistake_names_them():
    graph = capture(model(), samples()[:2])
    with pytest.raises(ConfigError, match="weight, bias, data_out"):
        QuantizationSpace(SpaceRequest(graph, "name", {"fc": {"name": ["integer"], "data_uot_width": [4]}}))
    table = {"name": ["integer"], "data_out_width": [40], "data_out_frac_width": [5]}
    with pytest.raises(ConfigError, match="data_out"):
        QuantizationSpace(SpaceRequest(graph, "name", {"fc": table}))


# --- what is learned, counted, trained and exported ----------------------------------------------------------------------


def test_formats_learn_from_results():
    graph, x = capture(model(), samples()[:2]), samples()
    form = FORMATS.get("affine").parse({"width": 8, "range": "minmax"}, graph.site("fc").operand("data_out").kind())
    learned = calibrate(graph, {"fc": {"data_out": form}, "matmul": {"data_out": form}}, x)
    with torch.no_grad():
        h = torch.relu(model().norm(model().conv(x)))
        h = model().fc((h + torch.tanh(h)).flatten(1))
    step = (h.max() - h.min()) / 255
    assert float(learned["fc"]["data_out"].grid.step) == pytest.approx(float(step), rel=1e-3)
    assert learned["matmul"]["data_out"] != learned["fc"]["data_out"]


def test_statistics_are_those_behind_the_rounded_result():
    both = {**ROUNDED, "data_in_width": [8], "weight_width": [3]}
    wanted = replace(job({"conv2d": both, "linear": both}), corrections=Corrections(bias=True, batch_norm=True))
    evaluator = FixedEvaluator(wanted)
    codes = evaluator.space.sample(8, np.random.default_rng(0))
    measured = evaluator.evaluate(codes)
    assert not evaluator.plain
    x, y = evaluator.job.splits["val"]
    for i, code in enumerate(codes):
        twin = evaluator.model(code)
        assert measured.values["loss"][i] == evaluate(twin, x, y, batch_size=evaluator.chunk).loss
        with torch.no_grad():
            behind = twin.norm(twin.conv(x)).mean((0, 2, 3))
            torch.testing.assert_close(behind, model().norm(model().conv(x)).mean((0, 2, 3)), rtol=0, atol=1e-4)


def test_training_goes_straight_through():
    graph, x = capture(model(), samples()[:2]), samples()
    twin = quantize(graph, {"conv": {"data_out": Integer(8, 5)}, "matmul": {"data_out": Integer(8, 4)}}).train()
    twin(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (twin.conv.weight, twin.fc.weight, twin.weight))
    learned, rounds = learning_model(
        graph, {"conv": {"data_out": Integer(8, 5)}, "matmul": {"data_out": Integer(8, 4)}}, {}
    )
    learned(x).square().sum().backward()
    ranges = [p.grad for each in rounds.values() for p in each["data_out"].parameters()]
    assert len(ranges) == 2
    assert all(grad is not None for grad in ranges)
    assert {site: o["data_out"].bits for site, o in frozen(rounds).items()} == {"conv": 8, "matmul": 8}


def test_a_result_is_stored_in_its_format():
    graph = capture(nn.Sequential(nn.Flatten(), nn.Linear(32, 8), nn.Tanh()).eval(), samples()[:2])
    config = {"by": "type", "linear": {"config": {"name": "integer", "data_out_width": 4, "data_out_frac_width": 2}}}
    assert [row.output_bytes for row in describe(graph, config=config).rows][:3] == [128, 4, 32]
    assert [row.output_bytes for row in describe(graph).rows][:3] == [128, 32, 32]
    peaks = []
    for choices in ({**ROUNDED}, {"name": ["integer"], "weight_width": [4]}):
        evaluator = FixedEvaluator(
            replace(
                job({"linear": choices}),
                model=graph.model,
                runners=(configured_runner("basic_evaluation"), configured_runner("peak_memory")),
            )
        )
        codes = evaluator.space.numbered(0, evaluator.space.size)
        peaks.append(sorted({*evaluator.evaluate(codes).values["peak_memory"].tolist()}))
    assert peaks == [[128 + 8 * 4 / 8, 128 + 8 * 6 / 8], [128 + 8 * 4]]


@pytest.mark.parametrize("form", ["qdq", "integer"])
def test_onnx_models_round_them(form):
    ort = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), samples()
    graph = capture(net, x[:2])
    eight = {"data_in": Integer(8, 4), "weight": Integer(8, 6), "bias": Integer(8, 6)}
    formats = {"_1": {**eight, "data_out": Integer(6, 3)}, "_2": {"data_out": Integer(4, 2)}, "_3": eight}
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    written = onnx_model(graph, formats, form).SerializeToString()
    session = ort.InferenceSession(written, options, providers=["CPUExecutionProvider"])
    (computed,) = session.run(None, {INPUT: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(computed), quantize(graph, formats)(x).detach(), rtol=0, atol=1e-5)
    refused = {"_1": {"data_out": FORMATS.get("log").parse({"width": 4, "exponent_bias": 3}, ACTIVATION)}}
    with pytest.raises(ExportError, match="data_out is"):
        onnx_model(graph, refused, form)
