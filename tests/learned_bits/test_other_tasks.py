"""Learned bits for other tasks than plain classification: the loss and the choice of networks come from the task."""

import numpy as np
import pytest
import torch
from torch import nn

import bitfront as bf
from bitfront.api import dataset_of
from bitfront.engine.planning.builder import make_plan
from bitfront.engine.planning.learning import target_of
from bitfront.errors import ConfigError
from bitfront.learned_bits.steering import Hurry, Target
from bitfront.tasks.configured import named_task
from bitfront.tasks.distillation import without_labels
from random_networks import Pixels

SETTINGS = {"cycles": 2, "epochs": 4, "networks": 2, "strategy": "learned_bits"}
rng = np.random.default_rng(0)
X = rng.normal(size=(400, 4)).astype(np.float32)
NUMBERS = np.stack([X[:, 0] + np.abs(X[:, 1]), X[:, 2]], axis=1)
LABELS = np.stack([X[:, 0] > 0, X[:, 1] + X[:, 2] > 1], axis=1)


def network(y, loss, seed=0):
    """Trained well enough that bits have something to lose."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(120):
        optimizer.zero_grad()
        loss(model(torch.from_numpy(X)), torch.from_numpy(y)).backward()
        optimizer.step()
    return model.eval()


REGRESSION = network(NUMBERS, nn.functional.mse_loss)
MULTILABEL = network(LABELS.astype(np.float32), nn.functional.binary_cross_entropy_with_logits)


def searched(folder, model, y, x=X, **settings):
    data = x if y is None else (x, y)
    run = bf.search(model=model, data=data, project_dir=str(folder), project="run", **{**SETTINGS, **settings})
    targets = without_labels(named_task(run.config.task)).targets if y is None else named_task(run.config.task).targets
    for trial in run.front[:2]:
        again = bf.transform_trial(
            folder / "run", trial.number, check=True, data=dataset_of(data, targets=targets), model=model
        )
        assert again.evaluation.values == {name: trial.metrics[name] for name in again.evaluation.values}
    return run


def test_a_regression_loses_bits_and_not_its_answers(tmp_path):
    run = searched(tmp_path, REGRESSION, NUMBERS, task="regression", epochs=8)
    assert [part.metric for part in run.objectives.parts] == ["ebops", "mse"]
    bits, mse = run.columns.metrics["ebops"], run.columns.metrics["mse"]
    # Independent of the training: a float network of the mean has this error.
    constant = np.var(NUMBERS, axis=0).mean()
    assert mse.min() < 0.1 * constant
    assert bits.min() < 0.8 * bits.max()


def test_labels_are_learned_with_their_loss(tmp_path):
    run = searched(tmp_path, MULTILABEL, LABELS, task="multilabel")
    assert run.columns.metrics["micro_f1"].max() > 0.8
    assert run.leading == "micro_f1"


def test_without_labels_the_float_model_is_the_teacher(tmp_path):
    run = searched(tmp_path, MULTILABEL, None, labels=False)
    assert run.columns.metrics["agreement"].max() > 0.8
    assert run.reference["agreement"] == 1.0


def test_constraints_on_what_leads_steer(tmp_path):
    given = {"data": (X, NUMBERS), "model": REGRESSION, "task": "regression", "project_dir": str(tmp_path)}
    config = bf.search(**given, **SETTINGS, constraints={"mse": "<= 0.5"}, n_trials=2).config
    plan = make_plan(
        config, model=REGRESSION, dataset=dataset_of((X, NUMBERS), targets=named_task("regression").targets)
    )
    target = target_of(plan.evaluator, plan.constraints)
    assert target.least_right == pytest.approx(-0.5)
    # The loss is no cross entropy: the first pressure is in its unit.
    course = plan.evaluator._begin()
    val = torch.from_numpy(NUMBERS)[: len(course.train.y)]
    assert course.scale == pytest.approx(float(val.var(dim=0, correction=0).mean()), rel=0.3)
    # Smaller is better: −0.4 is within it, −0.6 past it.
    networks = [(10.0, -0.6), (20.0, -0.4), (30.0, -0.1)]
    assert target.best(networks) == [1, 2]
    assert target.past(networks[:1])
    assert not target.past(networks)
    assert Target(most_cost=25.0).best(networks) == [0, 1]
    first = Hurry().after(-0.4, 0.9)
    assert first.most_right == -0.4
    assert first.after(-0.401, 0.9).steps > first.steps
    assert first.after(-0.41, 0.9).steps == first.steps


def test_weights_of_classes_are_trained_for_and_teachers_are_refused(tmp_path):
    labels, shares = (X[:, 0] + rng.normal(size=400) > 0).astype(int), []
    for weights in ([9.0, 1.0], [1.0, 9.0]):
        folder = tmp_path / str(weights[0])
        settings = {"task_settings": {"class_weights": weights}, "search.strategy.setup.learning_rate": 0.02}
        run = searched(folder, MULTILABEL, labels, cycles=1, epochs=12, **settings)
        data = dataset_of((X, labels))
        best = bf.transform_trial(folder / "run", run.front[0].number, data=data, model=MULTILABEL).model
        shares.append(float(best(data.x["val"]).argmax(1).float().mean()))
    assert shares[1] > shares[0] + 0.3
    with pytest.raises(ConfigError, match=r"teacher = 'self': .*With labels = false the float model is the teacher"):
        searched(tmp_path / "b", REGRESSION, NUMBERS, task="regression", teacher="self")


def test_members_from_new_weights_are_trained_for_the_task(tmp_path):
    run = searched(tmp_path, REGRESSION, NUMBERS, task="regression", members=2, float_epochs=30, cycles=1)
    assert np.isfinite(run.columns.metrics["mse"]).all()
    assert run.columns.metrics["mse"].min() < 0.5


class Tokens(nn.Module):
    """A language model; with `tied` the last layer has the weight of the embedding."""

    def __init__(self, tied):
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        return self.head(x + torch.relu(self.mix(x)))


def untrained(task):
    """(a model with new weights, its data)."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    if task == "segmentation":
        y = rng.integers(0, 3, size=(60, 8, 8))
        return Pixels(), ((y[:, None] - 1.0 + 0.3 * rng.normal(size=(60, 1, 8, 8))).astype(np.float32), y)
    if task == "anomaly_detection":
        normal = rng.normal(size=(160, 2)) @ rng.normal(size=(2, 6))
        x = np.concatenate([normal, rng.normal(size=(40, 6))]).astype(np.float32)
        return nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 6)), (x, np.arange(200) >= 160)
    ids = (rng.integers(0, 9, size=(120, 1)) + np.arange(6)) % 9
    return Tokens(task == "tied"), (ids[:, :-1], ids[:, 1:])


@pytest.mark.parametrize("task", ["segmentation", "language_modelling", "tied", "anomaly_detection"])
def test_pixels_tokens_and_reconstructions_are_learned_with_their_loss(task, tmp_path):
    model, (x, y) = untrained(task)
    named = "language_modelling" if task == "tied" else task
    settings = {"epochs": 10, "search.strategy.setup.learning_rate": 0.02}
    # What is rebuilt and measured alone has the bits of the search: `searched` says so of the front.
    run = searched(tmp_path, model.eval(), y, x=x, task=named, **settings)
    loss, cost = run.columns.metrics["loss"], run.columns.metrics["ebops"]
    assert loss.min() < 0.8 * run.reference["loss"]
    assert cost.max() < run.reference["ebops"]
    assert len(np.unique(cost)) > 1


@pytest.mark.parametrize("task", ["segmentation", "language_modelling", "anomaly_detection"])
def test_a_teacher_is_refused_by_name_before_any_work(task, tmp_path):
    model, data = untrained(task)
    with pytest.raises(ConfigError, match=r"teacher = 'ensemble': .*this task has another one"):
        bf.search(model=model, data=data, task=task, project_dir=str(tmp_path), teacher="ensemble", **SETTINGS)
    assert not list(tmp_path.iterdir())
