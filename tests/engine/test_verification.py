"""The check at the door: fast paths that are broken on purpose are noticed, switched off, and the numbers are true."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import bitfront as bf
from bitfront.engine.evaluation import verification
from bitfront.engine.evaluation.dispatch import Dispatcher
from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.engine.evaluation.interface import EvaluationJob
from bitfront.engine.evaluation.tree import calls
from bitfront.engine.evaluation.tree.execution import Pass
from bitfront.engine.evaluation.tree.multiplication import Multiplication
from bitfront.engine.evaluation.verification import spread, verify
from bitfront.engine.evaluation.workers import Workers
from bitfront.engine.storage.store import Store
from bitfront.errors import EvaluationError, RunError
from bitfront.metrics.configured import configured_runner
from bitfront.population.compiled import CpuTrainer

#: Each of them searches.
pytestmark = pytest.mark.slow
CLASSES = 3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(240, 6, generator=generator)
    y = (x @ torch.randn(6, CLASSES, generator=generator)).argmax(1)
    return {"train": (x[:120], y[:120]), "val": (x[120:180], y[120:180]), "test": (x[180:], y[180:])}


def net():
    torch.manual_seed(0)
    return Net().eval()


SPACE = {
    "linear": {
        "name": "integer",
        "data_in_width": [4, 8],
        "data_in_frac_width": "auto",
        "weight_width": [2, 3, 8],
        "weight_frac_width": "auto",
        "bias_width": [8],
        "bias_frac_width": "auto",
    }
}


class Notes(bf.Events):
    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)


def search(folder, model=None, **settings):
    notes = Notes()
    run = bf.search(
        model=net() if model is None else model,
        data=data(),
        **{
            "space": SPACE,
            "metrics": {"accuracy": "maximize", "loss": "minimize", "model_size": "minimize"},
            "strategy": "optuna:random",
            "n_trials": 20,
            "project_dir": folder,
            "project": "r",
            "events": notes,
            **settings,
        },
    )
    return run, notes.notes


def job():
    splits = data()
    return EvaluationJob(
        model=net(),
        sample=splits["train"][0][:2],
        space="graph/quantize/mixed_precision_ptq",
        by="type",
        choices=SPACE,
        runners=(configured_runner("basic_evaluation"),),
        splits={"val": splits["val"]},
        calibration=splits["train"][0],
    )


def rounded(values, form):
    """Fixed point, written out: shares no code with Bitfront."""
    if form is None:
        return values
    low, high = (-(2 ** (form.width - 1)), 2 ** (form.width - 1) - 1) if form.signed else (0, 2**form.width - 1)
    return torch.clamp(torch.round(values * 2.0**form.frac_width), low, high) / 2.0**form.frac_width


def loss_by_hand(run, number):
    """The loss of a trial, computed layer by layer from its formats."""
    model, (x, y) = net(), data()["val"]
    formats = bf.transform_trial(run.folder, number, model=model, data=bf.from_splits(data())).formats
    for place, name in enumerate(("first", "second", "last")):
        layer, chosen = getattr(model, name), formats.get(name, {})
        x = rounded(x if place == 0 else torch.relu(x), chosen.get("data_in"))
        x = nn.functional.linear(
            x, rounded(layer.weight, chosen.get("weight")), rounded(layer.bias, chosen.get("bias"))
        )
    return nn.functional.cross_entropy(x, y).item()


def assert_true(run):
    """Every other trial: each is rebuilt, which takes longer than its search."""
    for number in range(0, len(run), 2):
        assert run.trial(number).metrics["loss"] == pytest.approx(loss_by_hand(run, number), rel=1e-5)


def test_nothing_is_said_where_all_is_right(tmp_path):
    run, notes = search(tmp_path)
    assert not [n for n in notes if "differs" in n]
    assert_true(run)


def test_outputs_that_depend_on_the_batch_are_said(tmp_path):
    model = net()
    model.first = nn.Sequential(model.first, nn.BatchNorm1d(12, track_running_stats=False))
    _, notes = search(tmp_path, model)
    (note,) = [n for n in notes if "depend on the other samples" in n]
    assert "differ by up to" in note
    assert not [n for n in search(tmp_path / "other", net())[1] if "depend on the other samples" in n]


def test_a_spread_has_every_option_of_every_parameter():
    space = FixedEvaluator(job()).space
    codes = np.array(list(spread(space)))
    assert len(np.unique(codes, axis=0)) == len(codes)
    for column, count in zip(codes.T, space.cardinalities, strict=True):
        assert set(column) == set(range(count))


def test_a_wrong_product_is_named_and_not_used(tmp_path, monkeypatch):
    right = Multiplication._merged

    def wrong(self, i, *rest):
        out = right(self, i, *rest)
        return out + 0.01 if self.program.steps[i].site.name == "second" else out

    monkeypatch.setattr(Multiplication, "_merged", wrong)
    run, notes = search(tmp_path)
    (said,) = [n for n in notes if "differs from the deployed model" in n]
    assert "the fast evaluation of second differs" in said
    assert_true(run)


def test_two_wrong_products_are_not_used(tmp_path, monkeypatch):
    right = Multiplication._merged

    def wrong(self, i, *rest):
        out = right(self, i, *rest)
        return out * 1.25 if self.program.steps[i].site.name in ("first", "last") else out

    monkeypatch.setattr(Multiplication, "_merged", wrong)
    run, notes = search(tmp_path)
    assert [n for n in notes if "the fast evaluation of all layers differs" in n]
    assert_true(run)


def test_a_wrong_function_is_named_and_not_used(tmp_path, monkeypatch):
    right = Pass._relu
    monkeypatch.setattr(Pass, "_relu", lambda self, *rest: replaced(right(self, *rest)))
    space = {**SPACE, "relu": {"name": "integer", "data_in_width": [4, 8], "data_in_frac_width": "auto"}}
    run, notes = search(tmp_path, space=space)
    assert [n for n in notes if "the fast evaluation of" in n and "differs" in n]
    model, dataset = net(), bf.from_splits(data())
    x, y = data()["val"]
    for number in range(len(run)):
        rebuilt = bf.transform_trial(run.folder, number, model=model, data=dataset).model
        with torch.no_grad():
            loss = nn.functional.cross_entropy(rebuilt(x), y).item()
        assert run.trial(number).metrics["loss"] == pytest.approx(loss, rel=1e-5)


def replaced(activations):
    return replace(activations, parts=[part + 0.125 for part in activations.parts])


def test_where_nothing_helps_candidates_are_evaluated_whole(tmp_path, monkeypatch):
    right = calls.call
    monkeypatch.setattr(calls, "call", lambda *rest: right(*rest) + 0.5)
    right_merged = Multiplication._merged
    monkeypatch.setattr(Multiplication, "_merged", lambda self, *rest: right_merged(self, *rest) * 2)
    run, notes = search(tmp_path)
    assert [n for n in notes if "evaluated one by one as whole models" in n and "differs from its deployed model" in n]
    assert_true(run)


@pytest.mark.long
def test_several_processes_get_what_is_switched_off(tmp_path, monkeypatch):
    right = verification.verify
    difference = verification.Verification(unmerged=frozenset({"second"}), notes=("second differs",))
    monkeypatch.setattr("bitfront.engine.search.checking.verify", lambda *rest: difference if right(*rest) else None)
    run, notes = search(tmp_path, n_jobs=2)
    assert "second differs" in notes
    assert_true(run)


def trained(folder):
    return search(
        folder,
        n_trials=4,
        strategy={
            "name": "optuna",
            "setup": {"sampler": "random"},
            "sw_runner": {"basic_train": {"max_epochs": 1}, "basic_evaluation": {}},
            "hw_runner": {"model_size": {}},
        },
    )


def test_training_together_that_differs_is_not_used(tmp_path, monkeypatch):
    expected, notes = trained(tmp_path / "right")
    assert not [n for n in notes if "one by one" in n]
    right = CpuTrainer.state

    def wrong(self, member):
        state = right(self, member)
        return {k: v + 0.1 if k.endswith("bias") else v for k, v in state.items()}

    monkeypatch.setattr(CpuTrainer, "state", wrong)
    run, notes = trained(tmp_path / "wrong")
    assert [n for n in notes if "trained one by one" in n and "bias" in n]
    for number in range(len(run)):
        assert run.trial(number).metrics["loss"] == pytest.approx(expected.trial(number).metrics["loss"], rel=1e-3)


def test_a_forward_that_counts_its_calls_is_refused(tmp_path):
    class Counting(Net):
        calls = 0

        def forward(self, x):
            Counting.calls += 1
            return super().forward(x) * Counting.calls

    with pytest.raises(EvaluationError, match="the captured model does not compute what the model"):
        search(tmp_path, model=Counting().eval())


def test_the_front_is_evaluated_again_and_a_difference_names_the_trial(tmp_path, monkeypatch):
    right = Store.add

    def wrong(self, codes, values, errors, durations):
        return right(self, codes, {**values, "loss": values["loss"] - 0.01}, errors, durations)

    monkeypatch.setattr(Store, "add", wrong)
    with pytest.raises(EvaluationError, match=r"^trial \d+: the search measured loss .*, and the deployed model has"):
        search(tmp_path)
    assert not (tmp_path / "r" / "best.json").exists()


@pytest.mark.parametrize("change", ["activation", "scale", "dropout"])
def test_trials_of_a_forward_that_was_edited_are_not_shown(tmp_path, change):
    class Edited(Net):
        edited = False

        def forward(self, x):
            h = torch.relu(self.first(x))
            if self.edited and change == "activation":
                h = torch.sin(h)
            if self.edited and change == "dropout":
                h = nn.functional.dropout(h, 0.5, self.training)
            out = self.last(torch.relu(self.second(h)))
            return out * 2 if self.edited and change == "scale" else out

    torch.manual_seed(0)
    model = Edited().eval()
    run, _ = search(tmp_path, model=model)
    search(tmp_path, model=model)  # the same again: goes on
    other = copy.deepcopy(model)
    other.edited = True
    with pytest.raises(RunError, match="the code of the model changed"):
        search(tmp_path, model=other)
    with pytest.raises(RunError, match="the code of the model changed"):
        bf.transform_trial(run.folder, 0, model=other, data=bf.from_splits(data()))


def test_the_check_takes_its_share_of_the_time(monkeypatch):
    evaluator = FixedEvaluator(job())
    assert verify(evaluator, net()).candidates == verification.LEAST
    assert verify(evaluator, net(), 1e6).candidates == len(list(spread(evaluator.space)))


@pytest.mark.usefixtures("quick_workers")
def test_workers_that_differ_are_not_used(monkeypatch):
    evaluator = FixedEvaluator(job())
    codes = evaluator.space.numbered(0, 3)
    with Dispatcher(evaluator, 2) as dispatcher:
        assert dispatcher.verify_workers(codes) == ""
        assert dispatcher.n_jobs == 2
        right = evaluator.evaluate(codes)
        wrong = replace(right, values={**right.values, "loss": right.values["loss"] + 1e-6})
        monkeypatch.setattr(Workers, "evaluate", lambda *_, **__: iter([wrong]))
        assert "worker processes measure another loss" in dispatcher.verify_workers(codes)
        assert dispatcher.n_jobs == 1
        ((_, metrics),) = dispatcher.blocks(codes)
    assert np.array_equal(metrics.values["loss"], right.values["loss"])


def test_a_worker_that_differs_and_keeps_the_time_is_an_error(monkeypatch):
    evaluator = FixedEvaluator(job())
    codes = evaluator.space.numbered(0, 3)
    right = evaluator.evaluate(codes)
    wrong = replace(right, values={**right.values, "accuracy": right.values["accuracy"] / 2})
    monkeypatch.setattr(Workers, "evaluate", lambda *_, **__: iter([wrong]))
    with Dispatcher(evaluator, 1, seconds=60) as dispatcher, pytest.raises(EvaluationError, match="candidate_timeout"):
        dispatcher.verify_workers(codes)


def test_the_front_of_a_comparison_is_evaluated_again(tmp_path, monkeypatch):
    settings = {"space": SPACE, "metrics": {"accuracy": "maximize", "loss": "minimize", "model_size": "minimize"}}
    folder = {"project_dir": str(tmp_path), "n_trials": 12}
    bf.compare(model=net(), data=data(), strategies=["optuna:random"], seeds=1, project="right", **settings, **folder)
    right = Dispatcher.blocks

    def wrong(self, codes):
        for block, measured in right(self, codes):
            yield block, replace(measured, values={**measured.values, "loss": measured.values["loss"] - 0.01})

    monkeypatch.setattr(Dispatcher, "blocks", wrong)
    with pytest.raises(EvaluationError, match=r"candidate \[.*the search measured"):
        bf.compare(
            model=net(), data=data(), strategies=["optuna:random"], seeds=1, project="wrong", **settings, **folder
        )
