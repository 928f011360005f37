"""Evaluating candidates: a candidate's numbers depend on nothing but the candidate."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

from bitfront.engine.evaluation.dispatch import Dispatcher
from bitfront.engine.evaluation.fixed import EvaluationJob, FixedEvaluator, joined
from bitfront.errors import UserError
from bitfront.formats.integer import Integer
from bitfront.metrics.configured import configured_runner
from bitfront.models.base import build_model

INT = {"name": ["integer", "NA"], "data_in_width": [3, 8], "weight_width": [2, 4], "weight_frac_width": ["auto", "NA"]}
RUNNERS = tuple(map(configured_runner, ("basic_evaluation", "model_size", "average_bitwidth")))


def job(model, shape, seed=None):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, *shape, generator=generator)
    y = torch.randint(5, (150,), generator=generator)
    return EvaluationJob(
        model=model,
        sample=x[:2],
        space="graph/quantize/mixed_precision_ptq",
        by="name",
        choices=seed or {"default": INT},
        runners=RUNNERS,
        splits={"val": (x, y)},
        calibration=x[:64],
    )


class Stubborn(nn.Module):
    """Cannot be traced."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.fc, self.out = nn.Linear(16, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.out(self.fc(x)) if x.sum() > -1e9 else x


MODELS = {
    "traced": lambda: job(build_model("jsc-tiny", (16,), 5, seed=0), (16,)),
    "images": lambda: job(build_model("digits-cnn", (1, 8, 8), 5, seed=0), (1, 8, 8)),
    "untraced": lambda: job(Stubborn(), (16,)),
}


def same(one, other):
    return one.errors == other.errors and all(
        np.array_equal(one.values[m], other.values[m], equal_nan=True) for m in one.values
    )


def reordered(measured, order):
    return {m: v[order] for m, v in measured.values.items()}


@pytest.mark.parametrize("name", MODELS)
def test_numbers_depend_neither_on_order_nor_batch_nor_what_came_before(name):
    evaluator = FixedEvaluator(MODELS[name]())
    rng = np.random.default_rng(0)
    codes = evaluator.space.sample(12, rng)
    whole = evaluator.evaluate(codes)
    assert set(whole.values) == {"loss", "accuracy", "model_size", "average_bitwidth", "memory_density"}
    assert whole.errors == ("",) * 12
    assert len(set(whole.values["loss"])) > 3
    order = rng.permutation(12)
    shuffled = evaluator.evaluate(codes[order])
    for metric, values in reordered(whole, order).items():
        assert np.array_equal(shuffled.values[metric], values)
    assert same(joined([evaluator.evaluate(codes[i : i + 1]) for i in range(12)]), whole)
    assert same(FixedEvaluator(MODELS[name]()).evaluate(codes), whole)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_not_changed_and_a_candidates_model_shares_nothing_with_it(name):
    job = MODELS[name]()
    evaluator = FixedEvaluator(job)
    before, captured = copy.deepcopy(job.model.state_dict()), copy.deepcopy(evaluator.space.graph.model.state_dict())
    codes = evaluator.space.sample(4, np.random.default_rng(0))
    first = evaluator.evaluate(codes)
    with torch.no_grad():
        for p in evaluator.model(codes[0]).parameters():
            p.zero_()
    assert same(evaluator.evaluate(codes), first)
    assert all(torch.equal(t, before[k]) for k, t in job.model.state_dict().items())
    assert all(torch.equal(t, captured[k]) for k, t in evaluator.space.graph.model.state_dict().items())


def test_the_float_model_is_a_candidate_too():
    evaluator = FixedEvaluator(MODELS["traced"]())
    alone = evaluator.float_evaluator()
    measured = alone.evaluate(alone.space.numbered(0, 1))
    x, y = evaluator.job.splits["val"]
    with torch.inference_mode():
        expected = evaluator.job.model.eval()(x).argmax(1)
    assert measured.values["accuracy"][0] == (expected == y).double().mean()
    assert measured.values["average_bitwidth"].tolist() == [32.0]
    # The candidate that leaves every site in float is the same thing.
    code = evaluator.space.codes(np.array([[g.size - 1 for g in evaluator.space.groups]]))
    assert same(evaluator.evaluate(code), measured)


@pytest.mark.parametrize("how", ["raises", "no number"])
def test_a_candidate_that_fails_does_not_touch_the_others(how, monkeypatch):
    evaluator = FixedEvaluator(MODELS["traced"]())
    codes = evaluator.space.sample(20, np.random.default_rng(0))
    fine = evaluator.evaluate(codes)
    narrow = np.array(
        [
            any(f.width == 3 for operands in evaluator.space.formats(o).values() for f in operands.values())
            for o in evaluator.space.options(codes)
        ]
    )
    assert 0 < narrow.sum() < 20
    whole = Integer.round

    def fragile(self, x):
        if self.width == 3 and how == "raises":
            raise RuntimeError("three bits are too few")
        return whole(self, x) * (np.nan if self.width == 3 else 1)

    grid = Integer.grid.fget
    monkeypatch.setattr(Integer, "round", fragile)
    # The kernels round what has a grid; these formats shall be asked themselves.
    monkeypatch.setattr(Integer, "grid", property(lambda self: None if self.width == 3 else grid(self)))
    measured = FixedEvaluator(MODELS["traced"]()).evaluate(codes)
    for metric in ("loss", "accuracy"):
        assert np.array_equal(measured.values[metric][~narrow], fine.values[metric][~narrow])
    assert np.isnan(measured.values["loss"][narrow]).all()
    assert [bool(e) for e in measured.errors] == narrow.tolist()
    expected = "RuntimeError: three bits are too few" if how == "raises" else "loss is nan"
    assert {e for e in measured.errors if e} == {expected}


def test_formats_are_calibrated_once_and_do_not_depend_on_the_other_sites():
    evaluator, fresh = FixedEvaluator(MODELS["images"]()), FixedEvaluator(MODELS["images"]())
    codes = evaluator.space.sample(30, np.random.default_rng(1))
    many = [evaluator.formats(c) for c in codes]
    assert many[::-1] == [fresh.formats(c) for c in codes[::-1]]
    assert not any(f.calibrates for sites in many for operands in sites.values() for f in operands.values())


@pytest.mark.parametrize("n_jobs", [1, 3])
def test_blocks_come_back_in_order_whatever_their_size(n_jobs, monkeypatch):
    evaluator = FixedEvaluator(MODELS["traced"]())
    codes = evaluator.space.sample(23, np.random.default_rng(0))
    dispatcher = Dispatcher(evaluator, n_jobs)
    if n_jobs > 1:
        monkeypatch.setattr(dispatcher, "_map", lambda parts: (evaluator.evaluate(p) for p in parts))
    with dispatcher:
        blocks, measured = zip(*dispatcher.blocks(codes), strict=True)
        assert list(dispatcher.blocks(codes[:0])) == []
    assert np.array_equal(np.concatenate(blocks), codes)
    assert same(joined(measured), evaluator.evaluate(codes))


@pytest.mark.slow
def test_worker_processes_give_the_same_numbers_to_the_last_bit():
    evaluator = FixedEvaluator(MODELS["traced"]())
    codes = evaluator.space.sample(9, np.random.default_rng(0))
    with Dispatcher(evaluator, n_jobs=2) as dispatcher:
        blocks, measured = zip(*dispatcher.blocks(codes), strict=True)
    assert np.array_equal(np.concatenate(blocks), codes)
    assert same(joined(measured), evaluator.evaluate(codes))


def test_a_model_that_cannot_be_sent_to_workers_says_so():
    class Local(nn.Linear):
        pass

    evaluator = FixedEvaluator(job(nn.Sequential(Local(16, 5)), (16,)))
    with (
        Dispatcher(evaluator, n_jobs=2) as dispatcher,
        pytest.raises(
            UserError, match=r"n_jobs = 2 needs a model that can be sent .*top level of a module, or use n_jobs = 1"
        ),
    ):
        list(dispatcher.blocks(evaluator.space.numbered(0, 2)))


EXACT = {"name": ["integer"], "data_in_width": [3, 8], "weight_width": [2, 4], "bias_width": [8]}


@pytest.mark.slow
@pytest.mark.parametrize(
    # From worker processes both kinds of remark come once: they bring back why, not the sentence.
    ("model", "seed", "said", "n_jobs"),
    [
        (lambda: build_model("digits-mlp", (1, 8, 8), 5, seed=0), {"default": EXACT}, None, 1),
        (
            lambda: build_model("digits-mlp", (1, 8, 8), 5, seed=0),
            {"default": EXACT, "fc2": {"name": "affine", "data_in_width": 8}},
            r"not every sum is one of whole numbers \(fc2 \(Linear\): an operand is left in float\)",
            2,
        ),
        (
            lambda: build_model("digits-mlp", (1, 8, 8), 5, seed=0),
            {"default": EXACT, "fc2": {"name": "affine", "data_in_width": 8}},
            r"not every sum is one of whole numbers \(fc2 \(Linear\): an operand is left in float\)",
            1,
        ),
        (
            lambda: build_model("digits-mlp", (1, 8, 8), 5, seed=0),
            {"default": {"name": "float16", "data_in": [{}], "weight": [{}], "bias": [{}]}},
            r"\(2 sites, first fc1 \(Linear\): a format whose values have no common step\)",
            1,
        ),
        (
            Stubborn,
            {"default": EXACT},
            r"evaluated one by one as whole models, which is slow: the model cannot be traced",
            1,
        ),
        (
            Stubborn,
            {"default": EXACT},
            r"evaluated one by one as whole models, which is slow: the model cannot be traced",
            2,
        ),
    ],
)
@pytest.mark.usefixtures("quick_workers")
def test_what_is_not_exact_or_slow_is_said(model, seed, said, n_jobs):
    shape = (16,) if model is Stubborn else (1, 8, 8)
    with Dispatcher(FixedEvaluator(job(model(), shape, seed)), n_jobs) as dispatcher:
        for _ in dispatcher.blocks(dispatcher.evaluator.space.numbered(0, 4)):
            pass
        remarks = dispatcher.remarks
    if said is None:
        assert remarks == []
    else:
        (remark,) = remarks
        assert re.search(said, remark)
