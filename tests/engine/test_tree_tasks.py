"""Every task in the tree: many candidates together have the bits of each alone, as a whole model and as deployed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from bitfront.data.targets import NO_LABEL
from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.engine.evaluation.interface import EvaluationJob
from bitfront.engine.evaluation.tree import scorer
from bitfront.engine.evaluation.tree.scorer import WorkLimits
from bitfront.engine.evaluation.verification import deployed_score, verify
from bitfront.metrics.configured import configured_runner
from bitfront.tasks.configured import named_task
from bitfront.tasks.distillation import without_labels
from random_networks import Pixels

CHOICES = {"default": {"name": ["integer"], "data_in_width": [4, 8], "weight_width": [3, 8], "bias_width": [8]}}
SAMPLES = 70


class Tokens(nn.Module):
    """A language model without a past: token → next token."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)

    def forward(self, ids):
        x = self.embedding(ids.long())
        return self.head(x + torch.relu(self.mix(x)))


def dense(outputs, *ending):
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, outputs), *ending)


def job_of(name):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 6, generator=generator)
    torch.manual_seed(0)
    if name == "segmentation":
        model, x = Pixels(), torch.randn(SAMPLES, 1, 6, 6, generator=generator)
        y = torch.randint(-1, 3, (SAMPLES, 6, 6), generator=generator)
        y[y < 0] = NO_LABEL
    elif name == "language_modelling":
        model, x = Tokens(), torch.randint(9, (SAMPLES, 5), generator=generator).float()
        y = torch.randint(9, (SAMPLES, 5), generator=generator)
    elif name == "multilabel":
        model, y = dense(2, nn.Sigmoid()), torch.randint(2, (SAMPLES, 2), generator=generator).float()
    elif name == "more metrics":
        model, y = dense(7), torch.arange(SAMPLES) % 7
    elif name == "anomaly_detection":
        model, y = dense(6), torch.cat([(torch.arange(SAMPLES) % 5 == 0).float()[:, None], x], dim=1)
    else:
        model, y = dense(2), torch.randn(SAMPLES, 2, generator=generator)
    if name == "more metrics":
        named = named_task("classification", {"more_metrics": ["top5_accuracy", "macro_f1"]})
    elif name == "distillation":
        named = without_labels(named_task("classification"))
    else:
        named = named_task(name)
    return EvaluationJob(
        model=model.eval(),
        sample=x[:2],
        space="graph/quantize/mixed_precision_ptq",
        by="name",
        choices=CHOICES,
        runners=(configured_runner("basic_evaluation", task=named),),
        splits={"val": (x, y)},
        calibration=x,
        task=named,
    )


TASKS = (
    "regression",
    "multilabel",
    "segmentation",
    "language_modelling",
    "anomaly_detection",
    "distillation",
    "more metrics",
)


@pytest.fixture(scope="module")
def expected():
    """Task → (job, codes, what each candidate gives as a whole model); computed once for all tests."""
    known = {}
    for name in TASKS:
        job = job_of(name)
        whole = FixedEvaluator(replace(job, whole="to compare"), limits=WorkLimits(32, 1 << 20, 1))
        codes = whole.space.sample(24, np.random.default_rng(0))
        known[name] = job, codes, whole.evaluate(codes)
        assert known[name][2].plain == "to compare"
    return known


def same(measured, reference):
    assert measured.values.keys() == reference.values.keys()
    for metric, column in reference.values.items():
        assert np.isfinite(column).all()
        assert np.array_equal(measured.values[metric], column), metric
        assert len(np.unique(column)) > 1, f"{metric} is the same for all, so it would show nothing"


@pytest.mark.parametrize("name", TASKS)
def test_candidates_together_have_the_bits_of_each_alone(name, expected):
    job, codes, reference = expected[name]
    evaluator = FixedEvaluator(job, limits=WorkLimits(32, 1 << 20, 1))
    measured = evaluator.evaluate(codes)
    assert measured.plain == ""
    same(measured, reference)
    for row in (0, 7):
        alone = deployed_score(evaluator, codes[row], "val")
        assert alone == {metric: reference.values[metric][row] for metric in alone}


@pytest.mark.parametrize("cut", ["candidates", "memory for results", "threads", "samples"])
def test_the_bits_do_not_depend_on_how_work_is_cut(cut, expected, monkeypatch):
    job, codes, reference = expected["segmentation"]
    limits = WorkLimits(32, 20_000 if cut == "candidates" else 1 << 20, 2 if cut == "threads" else 1)
    if cut == "threads":
        monkeypatch.setattr(scorer, "THREAD_SECONDS", 0.0)
    if cut == "memory for results":
        monkeypatch.setattr(scorer, "RESULT_BYTES", 3 * SAMPLES * 80)
    evaluator = FixedEvaluator(job, limits=limits)
    if cut == "samples":
        real = scorer.Pass.run

        def short(self, piece):
            if self.samples > 8:
                raise MemoryError("no room")
            return real(self, piece)

        monkeypatch.setattr(scorer.Pass, "run", short)
    same(evaluator.evaluate(codes), reference)


def test_groups_are_as_large_as_results_leave_room(expected, monkeypatch):
    job, codes, reference = expected["language_modelling"]
    sizes, real = [], scorer.TreeScorer._measured

    def noted(self, options, *given):
        sizes.append(len(options))
        return real(self, options, *given)

    monkeypatch.setattr(scorer.TreeScorer, "_measured", noted)
    # Three sums per sample, in float64.
    monkeypatch.setattr(scorer, "RESULT_BYTES", 5 * 3 * 8 * SAMPLES)
    same(FixedEvaluator(job).evaluate(codes), reference)
    assert sizes == [16, 5, 3]


def test_outputs_that_do_not_fit_fail_with_the_reason(expected):
    job, codes, _ = expected["regression"]
    x, y = job.splits["val"]
    other = FixedEvaluator(replace(job, splits={"val": (x, y[:, :1])}))
    failed = other.evaluate(codes[:3])
    assert all("one number per target is needed" in text for text in failed.errors)


def test_a_tree_that_differs_is_switched_off(expected, monkeypatch):
    job, _, _ = expected["regression"]
    real = scorer.TreeScorer.evaluations

    def wrong(self, options, *given):
        return [replace(e, loss=e.loss * (1 + 1e-15)) for e in real(self, options, *given)]

    evaluator = FixedEvaluator(job)
    assert verify(evaluator, job.model).passed
    monkeypatch.setattr(scorer.TreeScorer, "evaluations", wrong)
    found = verify(FixedEvaluator(job), job.model)
    assert "differs from its deployed model" in found.whole
