"""By how much a front looks better on the samples of its search than on others: against simulations and retold runs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bitfront as bf
from bitfront.engine.search.optimism import optimism, spread_of_answers, spread_of_results
from bitfront.engine.storage.records import Optimism
from bitfront.report import page_tables, remarks
from bitfront.report.remarks import optimistic
from bitfront.report.tables import as_json
from bitfront.tasks.base import TaskMetric

ACCURACY = TaskMetric(
    "accuracy", "", "maximize", "share of right answers", lambda r: float(r["right"].mean()), share=True
)
ERROR = TaskMetric("mse", "", "minimize", "mean of squares", lambda r: float(r["se"].sum() / r["samples"].sum()))


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(20, 400))
def test_the_spread_is_that_of_resampled_samples(seed, candidates, samples):
    rng = np.random.default_rng(seed)
    of_float = rng.random(samples) < 0.9
    answers = np.where(rng.random((candidates, samples)) < 0.8, of_float, rng.random((candidates, samples)) < 0.5)
    rows = rng.integers(samples, size=(4000, samples))
    drops = of_float[rows].mean(axis=1) - answers[:, rows].mean(axis=(0, 2))
    expected = np.hypot(drops.std(), 1 / samples)
    assert spread_of_answers(of_float, answers) == pytest.approx(expected, rel=0.08)


def test_equal_answers_on_few_samples_prove_nothing():
    """A trial that answers all 100 samples as the float model does, and one of 300 others not."""
    right = np.arange(100) > 10
    spread = spread_of_answers(right, right[None])
    found = optimism(ACCURACY, (0.89, 0.9), {0: 0.89}, {0: 0.9 - 1 / 300}, spread, (100, 300))
    assert found.value == pytest.approx(100 / 300)
    assert found.interval[0] < 0 < found.interval[1]


def test_the_spread_of_another_task_is_that_of_draws():
    rng = np.random.default_rng(0)
    base = rng.normal(size=900)
    results = [{"samples": np.ones(900), "se": (base + 0.1 * rng.normal(size=900)) ** 2} for _ in range(4)]
    of_float = {"samples": np.ones(900), "se": base**2}
    rows = rng.integers(900, size=(4000, 900))
    drops = np.mean([r["se"][rows].mean(axis=1) for r in results], axis=0) - of_float["se"][rows].mean(axis=1)
    assert spread_of_results(ERROR, of_float, results) == pytest.approx(drops.std(), rel=0.08)
    undefined = TaskMetric("mse", "", "minimize", "never defined", lambda r: float("nan"))
    assert spread_of_results(undefined, of_float, results) is None


def test_points_of_a_share_and_per_cent_of_another_metric():
    found = optimism(ACCURACY, (0.9, 0.8), {3: 0.88, 5: 0.86}, {3: 0.75, 5: 0.75, 9: 0.1}, 0.01, (100, 400))
    assert (found.members, found.searched, found.tested) == (2, pytest.approx(3.0), pytest.approx(5.0))
    assert found.value == pytest.approx(2.0)
    assert found.error == pytest.approx(100 * np.hypot(0.01, 0.01 / 2))
    assert found.interval == (
        pytest.approx(2 - 1.96 * found.error, abs=1e-3),
        pytest.approx(2 + 1.96 * found.error, abs=1e-3),
    )
    found = optimism(ERROR, (2.0, 4.0), {0: 2.2}, {0: 4.8}, 0.1, (100, 100))
    assert (found.searched, found.tested) == (pytest.approx(10.0), pytest.approx(20.0))
    assert found.error == pytest.approx(100 * np.hypot(0.1 / 2, 0.1 / 4))


@pytest.mark.parametrize(
    ("metric", "reference", "values", "tested"),
    [
        (ACCURACY, (0.9, 0.8), {1: 0.5}, {}),
        (ACCURACY, (0.9, 0.8), {1: float("nan")}, {1: 0.5}),
        (ACCURACY, (float("nan"), 0.8), {1: 0.5}, {1: 0.5}),
        (ERROR, (0.0, 1.0), {1: 0.5}, {1: 0.5}),
    ],
)
def test_nothing_is_said_without_numbers(metric, reference, values, tested):
    assert optimism(metric, reference, values, tested, 0.1, (10, 10)) is None


def simulated(rng, chosen, candidates=200, samples=500):
    """The optimism of candidates of equal accuracy: of the best five of many, or of any five."""
    of_float = [rng.random(samples) < 0.95 for _ in range(2)]
    answers = [f & (rng.random((candidates, samples)) > 0.04) for f in of_float]
    best = np.argsort(-answers[0].mean(axis=1))[:5] if chosen else np.arange(5)
    here, there = ({int(b): float(a[b].mean()) for b in best} for a in answers)
    spread = spread_of_answers(of_float[0], answers[0][best])
    reference = (float(of_float[0].mean()), float(of_float[1].mean()))
    return optimism(ACCURACY, reference, here, there, spread, (samples, samples))


def test_intervals_cover_what_is_not_chosen_and_show_what_is():
    rng = np.random.default_rng(1)
    any_five = [simulated(rng, chosen=False) for _ in range(300)]
    covered = np.mean([low <= 0 <= high for low, high in (o.interval for o in any_five)])
    assert 0.91 <= covered <= 0.99
    best = [simulated(rng, chosen=True) for _ in range(60)]
    assert np.mean([o.interval[0] > 0 for o in best]) > 0.95
    # The best five of 200 are some 2.2 deviations above the mean: of sqrt(0.95 · 0.04 · 0.96 / 500) or 0.85 points each.
    assert np.mean([o.value for o in best]) == pytest.approx(2.0, abs=0.4)


@pytest.fixture(scope="module")
def lucky(tmp_path_factory):
    """A search among many candidates on few samples, and its data."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(4200, 8)
    with torch.no_grad():
        y = (net(x) + 0.02 * torch.randn(4200, 4)).argmax(1)
    data = {"train": (x[:100], y[:100]), "val": (x[100:200], y[100:200]), "test": (x[200:], y[200:])}
    run = bf.search(
        model=net,
        data=data,
        space={"linear": {"name": "integer", "data_in_width": [3, 4], "weight_width": [2, 3, 4, 5]}},
        metrics={"accuracy": "maximize", "average_bitwidth": "minimize"},
        strategy="brute_force",
        project_dir=str(tmp_path_factory.mktemp("lucky")),
        project="run",
    )
    return run, net, data


def test_the_optimism_of_a_run_is_that_of_its_deployed_models(lucky):
    run, net, data = lucky
    right = {}
    with torch.no_grad():
        for split in ("val", "test"):
            x, y = data[split]
            models = {-1: net, **{t.number: run.model(t.number) for t in run.front}}
            right[split] = {n: (m(x).argmax(1) == y).double().numpy() for n, m in models.items()}
    worse = {s: r.pop(-1) - np.mean(list(r.values()), axis=0) for s, r in right.items()}
    found = run.optimism
    assert found.members == len(run.front)
    assert found.searched == pytest.approx(100 * worse["val"].mean())
    assert found.tested == pytest.approx(100 * worse["test"].mean())
    spread = np.hypot(worse["val"].std() / 10, 1 / 100)
    assert found.error == pytest.approx(100 * spread * np.sqrt(1 + 100 / 4000))


def test_what_is_said_of_a_front_that_was_lucky(lucky):
    run = replace(lucky[0], optimism=Optimism(25, 1.94, 2.75, 0.2))
    (text,) = optimistic(run)
    assert text.startswith(
        "the front looks 0.81 points better than it is (mean of 25 trials; 95 % interval 0.42 to 1.2): compared with "
        "the float model, its accuracy is 2.8 points worse on the test split, and 1.9 points worse on the samples"
    )
    assert text in page_tables.summary(run)[1]
    assert text in remarks.summary(run)
    assert json.loads(json.dumps(as_json(run)))["optimism"]["members"] == 25
    better = optimistic(replace(run, optimism=Optimism(1, -0.5, 0.5, 0.2)))
    assert "(one trial; " in better[0]
    assert "0.5 points worse on the test split, and 0.5 points better on" in better[0]


def test_nothing_is_said_of_what_may_be_chance(lucky):
    assert lucky[0].optimism.interval[0] < 0
    assert optimistic(lucky[0]) == optimistic(replace(lucky[0], optimism=None)) == []
