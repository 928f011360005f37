"""Results with formats of their own (``data_out_*``): rounded after everything that a site computes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.engine.evaluation.interface import EvaluationJob
from bitfront.export.integer import obstacle
from bitfront.graph import capture
from bitfront.metrics.configured import configured_runner
from bitfront.population import why_alone
from bitfront.scoring import evaluate
from bitfront.spaces.quantize import QuantizationSpace
from bitfront.spaces.request import SpaceRequest

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


@pytest.mark.parametrize("function", [F.relu, torch.relu_, lambda x: x.mul_(0.5)])
def test_what_changes_its_argument_writes_the_rounded_result(function):
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 3)

        def forward(self, x):
            h = self.fc(x.flatten(1))
            return function(h) + h

    torch.manual_seed(0)
    net, x = Changing().eval(), samples()
    graph = capture(net, x[:2])
    sites = [s.name for s in graph.sites if s.op in ("relu", "mul")]
    if not sites:
        pytest.skip("a product with a number is no site")
    from bitfront.formats.integer import Integer
    from bitfront.transforms import quantize

    out = quantize(graph, {sites[0]: {"data_out": Integer(6, 2)}})(x)
    with torch.no_grad():
        h = net.fc(x.flatten(1))
        result = fixed(torch.relu(h))
        assert torch.equal(out, result + (h if function is F.relu else result))
