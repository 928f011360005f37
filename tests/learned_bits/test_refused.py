"""What a training with learned bits cannot do is refused before any work, with the key, or said in a note."""

import pytest
import torch
from torch import nn

import bitfront as bf
from bitfront import tomlfile
from bitfront.api import dataset_of
from bitfront.config import from_document
from bitfront.engine.planning.builder import make_plan
from bitfront.engine.planning.learning import target_of
from bitfront.errors import ConfigError
from bitfront.events import Events

SETTINGS = {"cycles": 2, "epochs": 1, "networks": 2, "batch_size": 64, "strategy": "learned_bits"}


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator)
    y = (x[:, 0] > 0).long()
    return {"train": (x[:200], y[:200]), "val": (x[200:], y[200:])}


def given(tmp_path, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    return {"model": model, "data": data(), "project_dir": str(tmp_path), **SETTINGS, **settings}


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("search.strategy.setup.candidate_timeout", 5.0, "one training"),
        ("search.strategy.sw_runner.basic_train", {}, "a second time"),
        ("search.calibration.bias_correction", True, "learns what it corrects"),
        ("search.calibration.batch_norm", True, "folded"),
        ("search.calibration.rounding", "adaptive", "how weights are rounded"),
        ("search.finetune.trials", 2, "a second time"),
    ],
)
def test_what_would_have_no_effect_is_an_error(key, value, why, tmp_path):
    with pytest.raises(ConfigError, match=rf"{key}: this is not possible with strategy 'learned_bits': .*{why}"):
        bf.search(**given(tmp_path, **{key: value}))
    assert not list(tmp_path.rglob("*.sqlite"))


def test_a_cost_without_bits_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"needs a cost that depends on bits.*ebops"):
        bf.search(**given(tmp_path, metrics=["accuracy", "sparsity"]))


def test_a_layer_of_the_file_that_learns_no_bits_is_an_error(tmp_path):
    model = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 2))
    with pytest.raises(ConfigError, match=r"layers.1: the model has no layer '1' .*; allowed: 0, 2"):
        bf.search(**given(tmp_path, model=model, layers={"1": {"weight": "layer"}}))


def test_worker_processes_are_not_used_and_a_note_says_so(tmp_path):
    notes = []

    class Noted(Events):
        def note(self, text):
            notes.append(text)

    several = bf.search(**given(tmp_path, n_jobs=2, project="several"), events=Noted())
    assert any(note.startswith("n_jobs has no effect") for note in notes)
    one = bf.search(**given(tmp_path, project="one"))
    assert several.columns.metrics["ebops"].tolist() == one.columns.metrics["ebops"].tolist()


def test_a_space_is_not_used_and_a_note_says_so(tmp_path):
    space = {"linear": {"name": "integer", "weight_width": [2, 4]}}
    run = bf.search(**given(tmp_path, space=space))
    assert any("[search.search_space] has no effect" in note for note in run.notes)
    assert not any("[search.search_space]" in note for note in bf.search(**given(tmp_path, project="other")).notes)


def test_a_bound_on_a_cost_that_is_in_part_in_float_is_not_that_of_the_training(tmp_path):
    """The training does not count what is in float, so a network is counted as it is reported."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rec, self.fc = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(self.rec(x.reshape(-1, 2, 3))[0][:, -1])

    strategy = {"name": "learned_bits", "setup": {"cycles": 2}}
    search = {"strategy": strategy, "constraints": {"ebops": "<= 500000"}}
    config = from_document(tomlfile.Document("here", {"project_dir": str(tmp_path), "search": search}))
    plan = make_plan(config, model=Recurrent(), dataset=dataset_of(data()))
    target = target_of(plan.evaluator, plan.constraints)
    assert target.most_cost is None
    assert target.others == plan.constraints


@pytest.mark.parametrize(("settings", "steers"), [({}, True), ({"sign_bits": True}, False), ({"biases": False}, False)])
def test_a_cost_that_the_training_does_not_count_as_reported_steers_it_by_the_metric(settings, steers, tmp_path):
    setup = {key: value for key, value in SETTINGS.items() if key != "strategy"}
    strategy = {
        "name": "learned_bits",
        "setup": setup,
        "sw_runner": {"basic_evaluation": {"data_loader": "val_dataloader"}},
        "hw_runner": {"ebops": settings},
        "metrics": {"accuracy": {}, "ebops": {}},
    }
    search = {"strategy": strategy, "constraints": {"ebops": "<= 500"}}
    config = from_document(tomlfile.Document("here", {"project_dir": str(tmp_path), "search": search}))
    plan = make_plan(config, model=given(tmp_path)["model"], dataset=dataset_of(data()))
    target = target_of(plan.evaluator, plan.constraints)
    assert target.most_cost == (500 if steers else None)
    assert [c.metric for c in target.others] == ([] if steers else ["ebops"])
    assert target.bounds_cost
