"""Odd data and settings: a training with learned bits does what is right, or says what is wrong and what to do."""

import pytest
import torch
from torch import nn

import bitfront as bf
from bitfront.api import dataset_of
from bitfront.errors import DataError, EvaluationError
from bitfront.events import Events
from bitfront.kernels import bits

pytestmark = pytest.mark.skipif(not bits.available(), reason="no compiled training of bits")

SETUP = {"cycles": 2, "epochs": 3.0, "networks": 2, "batch_size": 64}


class Heard(Events):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def data(change=lambda x: x, train=200, val=50):
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    x = change(x.clone())
    return {
        "train": (x[:train], y[:train]),
        "val": (x[200 : 200 + val], y[200 : 200 + val]),
        "test": (x[250:], y[250:]),
    }


def model(classes=2, trained=True):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, classes))
    if trained:
        with torch.no_grad():
            net[0].weight[:2] = torch.eye(6)[:1] * torch.tensor([[4.0], [-4.0]])
            net[2].weight[:2, :2] = torch.tensor([[-4.0, 4.0], [4.0, -4.0]])
    return net.eval()


def searched(folder, events=None, net=None, samples=None, arguments=None, **setup):
    return bf.search(
        model=model() if net is None else net,
        data=data() if samples is None else samples,
        strategy={"name": "learned_bits", "setup": SETUP | setup},
        metrics=["accuracy", "loss", "ebops", "model_size"],
        project="run",
        project_dir=str(folder),
        events=events or Events(),
        **(arguments or {}),
    )


def check(run, samples=None, net=None):
    """The last trial is what it says when it is rebuilt, with and without the channels that do nothing."""
    trial, given = run.trials[-1], dataset_of(data() if samples is None else samples)
    arguments = {"check": True, "smaller": True, "data": given, "model": model() if net is None else net}
    rebuilt = bf.transform_trial(run.folder, trial.number, **arguments)
    assert rebuilt.evaluation.accuracy == trial.metrics["accuracy"]
    assert rebuilt.evaluation.loss == trial.metrics["loss"]
    assert rebuilt.smaller_metrics["ebops"] <= trial.metrics["ebops"]
    return rebuilt


@pytest.mark.parametrize("setup", [{"learning_rate": 1e6}, {"learning_rate": 1e38}, {"first_pressure": 1e300}])
def test_a_training_that_leaves_all_bounds_is_an_error(setup, tmp_path):
    with pytest.raises(
        EvaluationError, match=r"diverged within .* steps .* smaller learning_rate than .* less pressure"
    ):
        searched(tmp_path, **setup)


def test_a_training_that_ends_at_chance_is_said(tmp_path):
    heard = Heard()
    run = searched(tmp_path, heard, learning_rate=1e3)
    assert run.reference["accuracy"] > 0.9
    (note,) = [note for note in run.notes if note.startswith("no network of this training is better")]
    assert note in heard.notes
    assert "on 50 samples, that class 0.56" in note
    assert "so the training diverged: give a smaller learning_rate than 1000, a smaller first_pressure" in note
    check(run)


def test_a_training_that_did_not_learn_is_said(tmp_path):
    run = searched(tmp_path, net=model(trained=False), learning_rate=1e-9)
    assert any("The training did not learn" in note for note in run.notes)


def test_nothing_is_said_of_one_that_learned(tmp_path):
    run = searched(tmp_path)
    assert max(t.metrics["accuracy"] for t in run.trials) > 0.9
    assert not any("this training" in note for note in run.notes)
    check(run)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_named(value, tmp_path):
    def change(x):
        x[3, 2] = value
        return x

    with pytest.raises(DataError, match=r"x of train is (nan|inf) in row 3, feature 2"):
        searched(tmp_path, samples=data(change))


@pytest.mark.parametrize("factor", [1e8, 1e-8])
def test_values_beyond_the_bits_are_an_error(factor, tmp_path):
    with pytest.raises(DataError, match=r"largest value that '0' reads is .*e[+-]0[78], .* scale the data"):
        searched(tmp_path, samples=data(lambda x: x * factor))


def test_small_values_have_bits_from_the_start(tmp_path):
    """All of them would be 0 with the bits that others begin with."""
    net = model()
    net[0].weight.data *= 2**10
    samples = data(lambda x: x * 2.0**-10)
    run = searched(tmp_path, net=net, samples=samples, learning_rate=1e-4)
    assert run.trials[0].metrics["accuracy"] > 0.9
    check(run, samples, net)


@pytest.mark.parametrize("value", [0.0, 7.3])
def test_a_constant_feature(value, tmp_path):
    def change(x):
        x[:, 1] = value
        return x

    run = searched(tmp_path, samples=data(change))
    assert max(t.metrics["accuracy"] for t in run.trials) > 0.9
    check(run, data(change))


def test_a_class_without_samples(tmp_path):
    net = model(3)
    run = searched(tmp_path, net=net)
    check(run, net=net)
    labels = torch.arange(200) % 2 * 2
    missing = data() | {"train": (data()["train"][0], labels)}
    with pytest.raises(DataError, match="the train split has no sample of class 1"):
        searched(tmp_path, net=model(3), samples=missing)


def test_one_sample_to_choose_by(tmp_path):
    run = searched(tmp_path, samples=data(val=1))
    assert {t.metrics["accuracy"] for t in run.trials} <= {0.0, 1.0}
    check(run, data(val=1))


def test_one_sample_to_learn_from_is_an_error(tmp_path):
    with pytest.raises(DataError, match="the train split has no sample of class"):
        searched(tmp_path, samples=data(train=1))


def test_a_batch_larger_than_the_data(tmp_path):
    large = searched(tmp_path / "large", batch_size=4096)
    exact = searched(tmp_path / "exact", batch_size=200)
    assert [t.metrics for t in large.trials] == [t.metrics for t in exact.trials]


def test_one_cycle_with_one_network(tmp_path):
    run = searched(tmp_path, cycles=1, networks=1)
    assert len(run.trials) == 1
    check(run)


@pytest.mark.parametrize(("weight", "cost"), [("element", "ebops"), ("channel", "model_size"), ("layer", "bops")])
def test_everything_pruned_at_once(weight, cost, tmp_path):
    setup = {"weight": weight, "data_in": "channel", "cost": cost, "first_pressure": 1e3, "patience": 1}
    run = searched(tmp_path, epochs=20, learning_rate=0.1, **setup)
    assert run.trials[-1].metrics["loss"] == pytest.approx(0.6931, abs=0.05)
    outputs = check(run).model(data()["val"][0])
    assert torch.equal(outputs, outputs[:1].expand_as(outputs))


def test_settings_of_the_float_training_are_not_those_of_the_bits(tmp_path):
    run = searched(tmp_path, arguments={"learning_rate": 0.5})
    assert [note for note in run.notes if "learning_rate = 0.5 has no effect" in note]
    assert not any("batch_size = " in note for note in run.notes)
