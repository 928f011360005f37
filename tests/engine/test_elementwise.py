"""Activation functions that are no sites: applied to all states at once, in whatever layout these lie in memory, each
value has the bits of the deployed model."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.engine.evaluation.interface import EvaluationJob
from bitfront.engine.evaluation.tree import calls
from bitfront.metrics.configured import configured_runner
from bitfront.scoring import evaluate

FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu by tanh": nn.GELU(approximate="tanh"),
    "mish": nn.Mish(),
    "sigmoid": torch.sigmoid,
    "method": lambda x: x.sigmoid(),
    "tanh": torch.tanh,
    "elu": nn.ELU(0.7),
    "selu": nn.SELU(),
    "celu": nn.CELU(0.7),
    "softplus": nn.Softplus(),
    "logsigmoid": nn.LogSigmoid(),
    "tanhshrink": nn.Tanhshrink(),
    "leaky_relu": nn.LeakyReLU(0.3),
    "hardtanh": nn.Hardtanh(-0.4, 0.6),
    "hardswish": F.hardswish,
    "hardsigmoid": nn.Hardsigmoid(),
    "softsign": nn.Softsign(),
    "softshrink": nn.Softshrink(0.2),
    "threshold": nn.Threshold(0.1, 0.3),
}
#: These are plain arithmetic; the bits of the others differ behind the last full vector.
EXACT = ("leaky_relu", "hardtanh", "hardswish", "hardsigmoid", "softsign", "softshrink", "threshold")
SPACE = {"name": ["integer", "NA"], "data_in_width": [4], "weight_width": [3, 4], "bias_width": [8]}


class Vectors(nn.Module):
    """Rows of features, behind a ReLU and directly."""

    shape = (6,)

    def __init__(self, function, width):
        super().__init__()
        self.function = function
        self.first, self.second, self.last = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x):
        x = self.function(self.first(x))
        return self.last(self.function(torch.relu(self.second(x))))


class Images(nn.Module):
    """Channels after another, channels last, behind a norm and a maximum."""

    shape = (2, 5, 4)

    def __init__(self, function, width):
        super().__init__()
        self.function = function
        self.first, self.norm = nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width)
        self.alone, self.pool = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.MaxPool2d(2)
        self.last = nn.Linear(width * 4, 3)
        nn.init.uniform_(self.norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x):
        x = self.function(self.norm(self.first(x)))
        x = self.function(self.alone(x))
        return self.last(torch.flatten(self.function(self.pool(x)), 1))


def evaluator_of(network, samples):
    x = torch.randn(samples, *network.shape, generator=torch.Generator().manual_seed(1)) * 3
    y = torch.arange(samples) % 3
    job = EvaluationJob(
        model=network.eval(),
        sample=x[:2],
        space="graph/quantize/mixed_precision_ptq",
        by="name",
        choices={"default": SPACE},
        runners=(configured_runner("basic_evaluation"),),
        splits={"val": (x, y)},
        calibration=x,
    )
    return FixedEvaluator(job), x, y


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("network", "samples", "width", "threads"), [(Vectors, 64, 4, 1), (Images, 15, 7, 1), (Images, 64, 4, 1)]
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_each_candidate_has_the_bits_of_its_deployed_model(function, network, samples, width, threads, monkeypatch):
    torch.manual_seed(0)
    merged = []
    compute = calls.elementwise

    def counted(*given):
        result = compute(*given)
        merged.append(result is not None)
        return result

    monkeypatch.setattr(calls, "elementwise", counted)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        evaluator, x, y = evaluator_of(network(FUNCTIONS[function], width), samples)
        assert not evaluator.plain
        codes = evaluator.space.sample(12, np.random.default_rng(0))
        measured = evaluator.evaluate(codes).values["loss"]
        alone = [evaluate(evaluator.model(code), x, y, batch_size=evaluator.chunk).loss for code in codes]
    finally:
        torch.set_num_threads(before)
    assert measured.tolist() == alone
    # Nothing else of these networks is computed so; whole vectors, or functions that need none, are.
    assert len(merged) >= 2
    if function in EXACT or (samples == 64 and threads == 1):
        assert all(merged)


@pytest.mark.parametrize("function", ["silu", "tanh", "hardswish"])
def test_threads_that_share_a_tensor_are_no_matter(function, monkeypatch):
    test_each_candidate_has_the_bits_of_its_deployed_model(function, Images, 64, 16, 2, monkeypatch)


class InPlace(nn.Module):
    """Reads what a function has changed."""

    shape = (6,)

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.function(x))


@pytest.mark.parametrize(
    "function",
    [
        nn.Hardswish(inplace=True),
        nn.SiLU(inplace=True),
        lambda x: F.leaky_relu(x, inplace=True),
        lambda x: F.hardswish(x, True),
        torch.sigmoid_,
        lambda x: x.tanh_(),
    ],
    ids=["module", "module with exponentials", "keyword", "position", "function", "method"],
)
def test_a_function_that_changes_its_argument(function):
    torch.manual_seed(0)
    evaluator, x, y = evaluator_of(InPlace(function), 64)
    codes = evaluator.space.sample(8, np.random.default_rng(0))
    measured = evaluator.evaluate(codes).values["loss"]
    assert measured.tolist() == [
        evaluate(evaluator.model(code), x, y, batch_size=evaluator.chunk).loss for code in codes
    ]
