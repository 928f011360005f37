"""Chains: convolutions and sums that one call of a kernel computes give what the steps give one by one, to the last bit;
and they are cut where something else comes."""

import numpy as np
import pytest
import torch
from test_tree import assert_as_alone, evaluator_of, job_of
from torch import nn

from bitfront.engine.evaluation.tree.chains import Chains
from bitfront.engine.evaluation.tree.scorer import WorkLimits
from bitfront.kernels import convolution

pytestmark = pytest.mark.skipif(not convolution.fast_bytes(), reason="this processor does not multiply bytes fast")
FORMS = {
    "integer": {"name": ["integer"], "data_in_width": [3, 8], "weight_width": [2, 4]},
    "affine": {"name": ["affine"], "data_in_width": [4, 8], "weight_width": [3, 8], "data_in_symmetric": [True, False]},
}


class Inner(nn.Module):
    """What `between` makes of the values of two convolutions lies between two others."""

    shape = (5, 6, 9)

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm1 = nn.Conv2d(5, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.deep, self.norm2 = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12)
        self.point, self.third = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 7, 3, stride=2)
        self.relu, self.relu6, self.drop = nn.ReLU(), nn.ReLU6(), nn.Dropout()
        self.flatten, self.fc = nn.Flatten(), nn.Linear(7 * 2 * 4, 4)
        self.between = between
        for norm in (self.norm1, self.norm2):
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        a = self.norm1(self.first(x))
        b = self.norm2(self.deep(self.relu(a)))
        return self.fc(self.flatten(self.third(self.between(self, a, b))))


#: What is between → how many convolutions and sums the longest chain has.
BETWEEN = {
    "nothing": (lambda _, a, b: b, 3),
    "a rectifier with a ceiling": (lambda s, a, b: s.drop(s.relu6(b)), 3),
    "another convolution": (lambda s, a, b: s.point(s.relu6(b)), 4),
    "a sum of two norms": (lambda s, a, b: a + b, 4),
    "a sum behind a rectifier": (lambda s, a, b: s.relu(a + s.relu(b)), 4),
    "twice the same": (lambda s, a, b: b + b, 4),
    "a value that is used later": (lambda s, a, b: s.relu(s.point(a + b) + a), 6),
    "a sum of what has a ceiling": (lambda s, a, b: a + s.relu6(b), 2),
    "another function": (lambda s, a, b: s.point(s.relu(b)).sigmoid() * a, 3),
}


@pytest.fixture
def lengths(monkeypatch):
    """How many convolutions and sums the chains had."""
    seen, run = [], Chains.run

    def noted(self, chain, *given):
        results = run(self, chain, *given)
        seen.append(len(chain.computed) if results is not None else 0)
        return results

    monkeypatch.setattr(Chains, "run", noted)
    return seen


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("few", [False, True], ids=["all samples at once", "one sample at once"])
def test_a_chain_has_the_numbers_of_its_steps(between, form, few, lengths, monkeypatch):
    if few:
        monkeypatch.setattr(convolution, "CHAIN_BYTES", 1)
    function, longest = BETWEEN[between]
    evaluator = evaluator_of(job_of(Inner(function).eval(), Inner.shape, {"conv2d": FORMS[form]}, by="type"))
    codes = evaluator.space.sample(20, np.random.default_rng(0))
    assert_as_alone(evaluator, codes)
    assert max(lengths) == longest
    # Consecutive candidates share their first states, and some are used by many.
    lengths.clear()
    assert_as_alone(evaluator, evaluator.space.numbered(5, 45))
    assert max(lengths) == longest


@pytest.mark.parametrize("limit", [1, 4000, 20_000])
def test_cut_candidates_have_the_same_numbers(limit, lengths):
    function, longest = BETWEEN["a value that is used later"]
    job = job_of(Inner(function).eval(), Inner.shape, {"conv2d": FORMS["affine"]}, by="type")
    evaluator = evaluator_of(job, {"samples": 4, "bytes": limit, "threads": 2})
    assert_as_alone(evaluator, evaluator.space.sample(20, np.random.default_rng(1)))
    assert max(lengths) == longest
    assert len(lengths) > len(evaluator.job.splits["val"][1]) // 4


def test_a_convolution_in_float_ends_a_chain(lengths):
    deep = {"name": ["integer", "NA"], "data_in_width": [4], "weight_width": [4]}
    seed = dict.fromkeys(("first", "point", "third"), FORMS["integer"]) | {"deep": deep}
    function, _ = BETWEEN["another convolution"]
    evaluator = evaluator_of(job_of(Inner(function).eval(), Inner.shape, seed))
    assert_as_alone(evaluator, evaluator.space.sample(30, np.random.default_rng(0)))
    assert set(lengths) == {2}  # what comes behind it


def test_no_number_in_a_sample_is_computed_step_by_step(lengths):
    x = torch.randn(9, *Inner.shape, generator=torch.Generator().manual_seed(0))
    x[4, 0, 1, 1] = torch.nan
    function, _ = BETWEEN["a sum of two norms"]
    evaluator = evaluator_of(job_of(Inner(function).eval(), Inner.shape, {"conv2d": FORMS["affine"]}, by="type", x=x))
    measured = assert_as_alone(evaluator, evaluator.space.sample(6, np.random.default_rng(0)))
    assert all(measured.errors)
    assert set(lengths) == {0}


def test_without_memory_for_the_chain_fewer_samples_are_taken(lengths, monkeypatch):
    chain, tried = convolution.chain, []

    def scarce(*given):
        tried.append(given[-1])
        if given[-1] > 4:
            raise MemoryError
        return chain(*given)

    monkeypatch.setattr(convolution, "chain", scarce)
    function, longest = BETWEEN["another convolution"]
    job = job_of(Inner(function).eval(), Inner.shape, {"conv2d": FORMS["integer"]}, by="type")
    evaluator = evaluator_of(job, vars(WorkLimits(15, 10**8, 1)))
    assert_as_alone(evaluator, evaluator.space.sample(6, np.random.default_rng(0)))
    assert max(tried) == 15
    assert max(lengths) == longest
