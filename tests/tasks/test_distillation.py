"""Searches without labels: what is measured, what is trained, what data is read, and the same numbers alone."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import bitfront as bf
from bitfront.api import dataset_of
from bitfront.data.arrays import from_arrays
from bitfront.data.base import DataRequest
from bitfront.data.loading import load_dataset
from bitfront.data.targets import OUTPUTS
from bitfront.errors import ConfigError, DataError
from bitfront.scoring import measure
from bitfront.tasks.configured import named_task
from bitfront.tasks.distillation import without_labels
from bitfront.testing import check_task

generator = torch.Generator().manual_seed(0)
rng = np.random.default_rng(0)
X = rng.normal(size=(160, 5)).astype(np.float32)
FORMATS = {"linear": {"name": ["integer"], "data_in_width": [4, 8], "weight_width": [2, 8], "bias_width": [8]}}


def near(wanted, by=0.5):
    return wanted + by * torch.randn(wanted.shape, generator=generator)


@pytest.mark.parametrize(("task", "shape"), [("classification", (40, 5)), ("segmentation", (12, 4, 3, 5))])
@pytest.mark.parametrize("ends", ["logits", "probabilities", "log_probabilities"])
def test_one_of_several_classes(task, shape, ends):
    logits = torch.randn(shape, generator=generator)
    given = near(logits)
    shown = {"logits": lambda z: z, "probabilities": lambda z: z.softmax(1)}.get(ends, lambda z: z.log_softmax(1))
    distilled = without_labels(named_task(task))
    values = check_task(distilled, {}, shown(given), shown(logits), ends)
    p, q = (functional.log_softmax(z.double(), 1) for z in (logits, given))
    # Independent: torch's divergence.
    theirs = functional.kl_div(q, p, log_target=True, reduction="none").sum(1).mean()
    assert values["loss"] == pytest.approx(float(theirs), rel=1e-4)
    assert values["agreement"] == pytest.approx(float((given.argmax(1) == logits.argmax(1)).double().mean()))
    trained = distilled.training_loss(shown(given), shown(logits), ends)
    assert float(trained) == pytest.approx(float(theirs), rel=1e-4)
    itself = measure(distilled, nn.Identity(), shown(logits), shown(logits), outputs=ends).values
    assert itself == {"loss": 0.0, "agreement": 1.0}


def test_tokens():
    logits = torch.randn(10, 6, 9, generator=generator)
    given = near(logits)
    values = check_task(without_labels(named_task("language_modelling")), {}, given, logits)
    p, q = (functional.log_softmax(z.double(), 2) for z in (logits, given))
    assert values["loss"] == pytest.approx(float(functional.kl_div(q, p, log_target=True, reduction="sum")) / 60)
    assert values["agreement"] == pytest.approx(float((given.argmax(2) == logits.argmax(2)).double().mean()))


@pytest.mark.parametrize("ends", ["logits", "class_probabilities", "class_log_probabilities"])
def test_labels_that_are_there_or_not(ends):
    logits = torch.randn(40, 3, generator=generator)
    given = near(logits)
    shown = {"logits": lambda z: z, "class_probabilities": torch.sigmoid}.get(ends, functional.logsigmoid)
    settings = {"threshold": 0.7}
    values = check_task(without_labels(named_task("multilabel", settings)), settings, shown(given), shown(logits), ends)
    p, q = (torch.distributions.Bernoulli(logits=z.double()) for z in (logits, given))
    assert values["loss"] == pytest.approx(float(torch.distributions.kl_divergence(p, q).mean()), rel=1e-4)
    same = (given.sigmoid() > 0.7) == (logits.sigmoid() > 0.7)
    assert values["agreement"] == pytest.approx(float(same.double().mean()))


def test_certain_outputs_have_finite_gradients():
    certain = torch.tensor([[0.0, 1.0, 0.5]] * 8)
    for task, ends in (("multilabel", "class_probabilities"), ("classification", "probabilities")):
        given = certain.clone().requires_grad_()
        loss = without_labels(named_task(task)).training_loss(given, certain.flip(1), ends)
        (gradient,) = torch.autograd.grad(loss, given)
        assert bool(gradient.isfinite().all())
        assert float(loss.detach()) > 10


def test_numbers():
    wanted = torch.randn(40, 2, generator=generator) + torch.tensor([0.0, 100.0])
    values = check_task(without_labels(named_task("regression")), {}, near(wanted, 0.1), wanted)
    assert 0.9 < values["agreement"] < 1.0
    exact = measure(without_labels(named_task("regression")), nn.Identity(), wanted, wanted).values
    assert exact == {"loss": 0.0, "agreement": 1.0}


def network(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, outputs)).eval()


def checked(run, folder, data, model):
    """Every trial of the front alone: the same bits."""
    for trial in run.front:
        again = bf.transform_trial(folder / "run", trial.number, check=True, data=data, model=model)
        expected = trial.metrics if trial.finetuned is None or not trial.finetuned.kept else trial.finetuned.metrics
        assert again.evaluation.values == {name: expected[name] for name in again.evaluation.values}


def test_features_alone_are_enough_for_a_search(tmp_path):
    model = network()
    run = bf.search(
        model=model,
        data=X,
        labels=False,
        space=FORMATS,
        metrics=["agreement", "average_bitwidth"],
        strategy="brute_force",
        constraints={"agreement_drop": "<= 50 %"},
        project_dir=str(tmp_path),
        project="run",
    )
    assert len(run) == 16
    assert run.leading == "agreement"
    assert run.reference["agreement"] == 1.0
    assert run.reference["loss"] == 0.0
    # Independent: how often a rebuilt model and the user's model answer the same.
    data = dataset_of(X, targets=OUTPUTS)
    x = data.x["val"]
    for trial in run.front:
        rebuilt = bf.transform_trial(tmp_path / "run", trial.number, data=data, model=model).model
        with torch.no_grad():
            same = (rebuilt(x).argmax(1) == model(x).argmax(1)).double().mean()
        assert trial.metrics["agreement"] == pytest.approx(float(same))
        low, high = trial.intervals["agreement"]
        assert low <= trial.metrics["agreement"] <= high
    checked(run, tmp_path, data, model)


@pytest.mark.long
def test_training_in_the_search_goes_towards_the_float_model(tmp_path):
    model = network(1)
    runners = {"basic_train": {"max_epochs": 4, "learning_rate": 0.01, "batch_size": 16}, "basic_evaluation": {}}
    common = {"model": model, "data": {"train": X, "val": X + 1}, "labels": False, "task": "regression"}
    common |= {"space": FORMATS, "project": "run"}
    strategy = {"name": "brute_force", "metrics": {"agreement": {}, "average_bitwidth": {}}}
    strategy["hw_runner"] = {"average_bitwidth": {}}
    plain = bf.search(
        strategy={**strategy, "sw_runner": {"basic_evaluation": {}}}, project_dir=str(tmp_path / "plain"), **common
    )
    run = bf.search(
        strategy={**strategy, "sw_runner": runners},
        project_dir=str(tmp_path),
        **{"search.finetune": {"trials": 1, "max_epochs": 1}},
        **common,
    )
    # Two bits need training; it is towards outputs that no label says.
    assert np.median(run.columns.metrics["loss"]) < np.median(plain.columns.metrics["loss"])
    checked(run, tmp_path, dataset_of(common["data"], targets=OUTPUTS), model)


def test_data_without_labels_is_read(tmp_path):
    labels = rng.integers(0, 3, size=160)
    tensors = torch.from_numpy(X)
    with_labels = TensorDataset(tensors, torch.from_numpy(labels))
    found = [
        dataset_of(given, targets=OUTPUTS)
        for given in (X, (X, labels), (X, None), TensorDataset(tensors), with_labels, DataLoader(with_labels, 32))
    ]
    assert len({data.fingerprint for data in found}) == 1
    assert all(data.y["train"].shape == (112, 0) for data in found)
    assert dataset_of({"train": X, "test": X + 1}, targets=OUTPUTS).splits == ("train", "val", "test")
    several = dataset_of({"ids": labels[:, None], "x": X}, targets=OUTPUTS)
    assert [one.name for one in several.inputs] == ["ids", "x"]
    with pytest.raises(DataError, match="allowed without labels: x, where x may be several inputs"):
        dataset_of(b"abc", targets=OUTPUTS)
    for arrays in ({"X": X}, {"X": X, "y": labels}):
        np.savez(tmp_path / "data.npz", **arrays)
        data = load_dataset("npz", DataRequest(path=tmp_path / "data.npz", targets=OUTPUTS))
        assert data.num_classes == 0
        assert data.y["test"].shape == (24, 0)


def test_what_needs_labels_is_refused(tmp_path):
    settings = {"space": FORMATS, "metrics": ["agreement"], "project_dir": str(tmp_path), "labels": False}
    with pytest.raises(ConfigError, match="labels = false, and the float model would have to be trained"):
        bf.search(model="digits-cnn", data="digits", **settings)
    with pytest.raises(ConfigError, match="data without labels does not say how many; set num_outputs"):
        bf.search(model="digits-cnn", data=X[:, None, None], **settings)
    data, broken = from_arrays(X, np.arange(160) % 3), network()
    torch.nn.init.constant_(broken[2].bias, torch.inf)
    with pytest.raises(ConfigError, match=r"the float model's loss is 0, and so is every part .*'loss <= 0.05'"):
        bf.search(model=network(), data=X, constraints={"loss_increase": "<= 5 %"}, project="r", **settings)
    shutil.rmtree(tmp_path / "r")
    with pytest.raises(ConfigError, match=r"task_settings.label_smoothing: label_smoothing is about labels"):
        bf.search(model=network(), data=X, task_settings={"label_smoothing": 0.1}, **settings)
    with pytest.raises(DataError, match="are numbers, and this task needs ids; name another task"):
        bf.search(model=network(), data=data, task="language_modelling", **settings)
    with pytest.raises(DataError, match="not finite for some samples"):
        bf.search(model=broken, data=X, **settings)
    assert not list(tmp_path.iterdir())
