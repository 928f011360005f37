"""``bitfront transform --smaller``: a network with learned bits, and the same one without the channels that do nothing."""

import json

import pytest
import torch
from journey import Shell

pytestmark = pytest.mark.journey

SETTINGS = {"cycles": 2, "epochs": 20, "networks": 2, "first_pressure": 1e-3, "learning_rate": 1e-2, "patience": 2}
SEARCH = f"""
model = "digits-mlp"
dataset = "digits"
project = "learned"
max_epochs = 2
[search.strategy]
name = "learned_bits"
[search.strategy.setup]
{chr(10).join(f"{key} = {value}" for key, value in SETTINGS.items())}
"""
TRIAL = ("transform", "--run", "learned", "--trial", 2)


@pytest.fixture(scope="module")
def learned(tmp_path_factory, warm, kernels):
    shell = Shell(tmp_path_factory.mktemp("learned"), warm, kernels)
    (shell.folder / "file.toml").write_text(SEARCH)
    shell("search", "--config", "file.toml")
    return shell


def test_the_smaller_network_is_saved_and_said(learned):
    typed = learned(*TRIAL, "--smaller")
    assert "its outputs are equal to the bit on all 1,797 samples" in typed.out
    assert "| fc1" in typed.out
    assert "32 → " in typed.out
    said = json.loads(learned(*TRIAL, "--smaller", "--check", "--json").out)
    state = torch.load(learned.folder / "runs/learned/transformed/trial-2/smaller/model.pt")
    for path, shapes in said["smaller"]["weights"].items():
        assert list(state[f"{path}.weight"].shape) == shapes["now"]
    assert said["smaller"]["weights"]["fc1"]["now"][0] < 32 == said["smaller"]["weights"]["fc1"]["before"][0]
    assert said["smaller"]["metrics"]["ebops"] <= said["trial_metrics"]["ebops"]
    assert said["accuracy"] == said["trial_metrics"]["accuracy"]


def test_without_the_flag_there_is_none(learned):
    assert "smaller" not in json.loads(learned(*TRIAL[:-1], 3, "--json").out)
    assert not (learned.folder / "runs/learned/transformed/trial-3/smaller").exists()


def test_other_trials_are_refused(searched, learned):
    typed = searched("transform", "--run", "small", "--trial", 0, "--smaller", code=2)
    assert "only where bits were learned (strategy 'learned_bits')" in typed.err
    typed = learned("transform", "--config", "file.toml", "--smaller", code=2)
    assert "give --run RUN --trial N with it" in typed.err
