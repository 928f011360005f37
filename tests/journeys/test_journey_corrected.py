"""A search that trains its candidates and corrects them too: equalised, resumed, trained on, rebuilt, exported."""

import json

import pytest
from journey import rows, settings

import bitfront as bf

pytestmark = pytest.mark.journey

NET = """
from torch import nn

def net(sample_shape, num_classes):
    return nn.Sequential(
        nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, num_classes)
    )
"""
MORE = """
[search.strategy.sw_runner.basic_train]
max_epochs = 2
learning_rate = 0.003

[search.calibration]
equalisation = true
bias_correction = true
batch_norm = true

[search.finetune]
max_epochs = 2
trials = 1
"""
EXPORTING = """
from pathlib import Path
import sys
import bitfront as bf
from bitfront.data.base import DataRequest
from bitfront.exporters.written import write_onnx

rebuilt = bf.transform_trial("runs/small", int(sys.argv[1]))
x, _ = bf.load_dataset("npz", DataRequest(path=Path(sys.argv[2]))).split("val")
file = write_onnx(rebuilt.graph, rebuilt.formats, "net.onnx", x[:200], model=rebuilt.model)
print(file.alike, file.difference < 1e-4)
"""


def test_what_is_reported_is_what_is_deployed(shell, data):
    shell.write("net.py", NET)
    text = settings(data, model="net:net", weights="[2, 8]")
    shell.write("small.toml", text + MORE)
    shell("train", "--config", "small.toml")
    typed = shell("search", "--config", "small.toml", "--n-trials", 3, "--finetune", 0)
    assert "has no effect" not in typed.err
    store = shell.folder / "runs/small/trials.sqlite"
    before = rows(store)
    shell("search", "--config", "small.toml", "--n-trials", 16)
    after = rows(store)
    assert after[:3] == before
    assert len(after) > 3

    run = bf.Run.load(shell.folder / "runs/small")
    assert len(run.finetuned) == 1
    lines = [f"transform --run runs/small --trial {trial.number} --check --json" for trial in run.front]
    for trial, (code, out, err) in zip(run.front, shell.together(*lines), strict=True):
        assert code == 0, err
        answer = json.loads(out)
        tuned = trial.finetuned
        expected = tuned.metrics if tuned is not None and tuned.kept else trial.metrics
        assert (answer["accuracy"], answer["loss"]) == (expected["accuracy"], expected["loss"])

    # A trial whose weights were not stored is trained and corrected again, to the same bits.
    fronted = {trial.number for trial in run.front}
    other = next(trial for trial in run.trials if trial.number not in fronted)
    answer = json.loads(shell("transform", "--run", "runs/small", "--trial", other.number, "--check", "--json").out)
    assert answer["loss"] == other.metrics["loss"]

    assert shell.python(EXPORTING, run.front[0].number, data) == "200 True\n"


@pytest.mark.long
def test_any_number_of_processes_and_any_order_give_the_same(shell, data):
    shell.write("net.py", NET)
    text = settings(data, model="net:net", weights="[2, 8]") + MORE
    shell.write("small.toml", text)
    shell.write("two.toml", text.replace('project = "small"', 'project = "two"'))
    shell("search", "--config", "small.toml", "--n-trials", 3, "--finetune", 0)
    shell("search", "--config", "small.toml", "--finetune", 0)
    shell("search", "--config", "two.toml", "--n-jobs", 2, "--finetune", 0)
    # An exhaustive search goes in another order.
    one, two = (rows(shell.folder / f"runs/{name}/trials.sqlite") for name in ("small", "two"))
    assert {row[1:] for row in one} == {row[1:] for row in two}


def test_a_mistake_is_named_with_its_key(shell, data):
    shell.write("net.py", NET)
    text = settings(data, model="net:net") + MORE.replace("equalisation = true", 'rounding = "adaptive"')
    shell.write("small.toml", text)
    typed = shell("plan", "--config", "small.toml", code=2)
    assert "rounding = 'adaptive' is not possible if candidates are trained" in typed.err
    assert "search.calibration.rounding" in typed.err


def test_a_folded_search_from_the_command_line(shell, data):
    shell.write("net.py", NET)
    shell.write("small.toml", settings(data, model="net:net"))
    typed = shell("search", "--config", "small.toml", "--max-epochs", 1, "--n-trials", 2, "--fold-batch-norm")
    assert "and this network is searched and deployed: 3 into 2" in typed.err
    assert "the same up to float error" in typed.err
    trial = bf.Run.load(shell.folder / "runs/small").trial(1)
    answer = json.loads(shell("transform", "--run", "runs/small", "--trial", 1, "--check", "--json").out)
    assert answer["loss"] == trial.metrics["loss"]
    refused = shell("search", "--config", "small.toml", "--max-epochs", 1, "--n-trials", 2, code=2)
    assert "folded" in refused.err
