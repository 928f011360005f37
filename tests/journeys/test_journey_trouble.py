"""Models that cannot be traced, weights that do not fit, data that is not there, candidates that fail, full disks."""

import json
import re

import pytest
import torch
from journey import rows, settings

from bitfront.models.base import build_model

pytestmark = pytest.mark.journey

MODELS = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(16, 12)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(12, 5)

    def forward(self, x):
        x = self.fc1(x)
        if x.sum() > 0:
            x = self.relu1(x)
        return self.fc2(x)


class Picky(Net):
    limit = 2.0

    def forward(self, x):
        exact = torch.addmm(self.fc1.bias, x, self.fc1.weight.t())
        if (self.fc1(x) - exact).abs().max() > self.limit:
            raise ValueError("fc1 is too coarse for me")
        return super().forward(x)


class Unhappy(Picky):
    limit = 1e-6
"""


@pytest.fixture
def with_models(shell, data):
    shell.write("my_model.py", MODELS)
    shell.write("by_type.toml", settings(data, model="my_model:Net"))
    shell.write("by_name.toml", settings(data, model="my_model:Net", project="named", by="name", sites="fc2"))
    return shell


def test_a_model_that_cannot_be_traced(with_models):
    for config, count in (("by_type.toml", 36), ("by_name.toml", 6)):
        typed = with_models("search", "--config", config)
        [line] = [line for line in typed.err.splitlines() if "cannot trace" in line]
        stopped = 1 + MODELS[: MODELS.index("if x.sum() > 0")].count("\n")
        assert line.endswith(f"my_model.py:{stopped}: if x.sum() > 0:")
        assert f"{count} of {count} candidates evaluated (space exhausted)" in typed.out
    entry = json.loads((with_models.folder / "runs/named/best.json").read_text())["0"]
    assert set(entry["sampled_config"]) == {"by", "default", "fc2"}


def test_candidates_that_fail_are_recorded_and_the_rest_goes_on(with_models):
    typed = with_models("search", "--config", "by_type.toml", "--model", "my_model:Picky")
    log = json.loads((with_models.folder / "runs/small/log.json").read_text()).values()
    failed = [entry for entry in log if entry["state"] == "FAILED"]
    assert 0 < len(failed) < 36 == len(log)
    assert {entry["error"] for entry in failed} == {"ValueError: fc1 is too coarse for me"}
    assert all(entry["software_metrics"]["accuracy"] is None for entry in failed)
    assert f"{len(failed)} candidates failed; the first with: ValueError: fc1 is too coarse for me" in typed.out
    best = json.loads((with_models.folder / "runs/small/best.json").read_text()).values()
    assert best
    assert not {e["number"] for e in best} & {e["number"] for e in failed}


def test_when_all_candidates_fail_the_reason_is_printed(with_models, data):
    typed = with_models("search", "--config", "by_type.toml", "--model", "my_model:Unhappy", code=1)
    reason = r"^error: the first \d\d candidates all failed; the last one with: ValueError: fc1 is too coarse for me$"
    assert re.search(reason, typed.err, re.MULTILINE), typed

    state = build_model("jsc-tiny", (16,), 5, 0).state_dict()
    torch.save(
        {k: v * float("nan") if v.is_floating_point() else v for k, v in state.items()}, with_models.folder / "nan.pt"
    )
    with_models.write("nan.toml", settings(data, model="jsc-tiny", top='load_name = "nan.pt"', project="nan"))
    typed = with_models("search", "--config", "nan.toml", "--json", code=2)
    assert "seq_blocks.0.weight holds NaN in " in typed.err
    assert "load weights from before they became NaN" in typed.err


def test_a_checkpoint_that_does_not_fit(trained, data):
    trained.write("other.toml", settings(data, model="jsc-tiny", project="other"))
    weights = "runs/small/checkpoints/best.pt"
    typed = trained("search", "--config", "other.toml", "--load-name", weights, code=2)
    assert f"{weights} does not fit" in typed.err
    assert "missing from the file: seq_blocks.0.weight" in typed.err
    assert "in the file, not in the model: fc1.weight" in typed.err
    typed = trained("search", "--config", "other.toml", "--load-name", "nowhere.pt", code=2)
    assert "nowhere.pt" in typed.err


def test_a_lightning_checkpoint_that_fits(trained):
    """As Lightning writes it: the state dict under its key, every name behind ``model.``, and all the rest."""
    state = torch.load(trained.folder / "runs/small/checkpoints/best.pt", weights_only=True)
    lightning = {
        "epoch": 2,
        "global_step": 64,
        "pytorch-lightning_version": "2.1.0",
        "state_dict": {f"model.{k}": v for k, v in state.items()},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.01}]}],
    }
    torch.save(lightning, trained.folder / "best.ckpt")
    flags = ["--load-name", "best.ckpt", "--load-type", "pl"]
    typed = trained("test", "--config", "small.toml", "--json", *flags)
    assert "weights from best.ckpt" in typed.err
    assert json.loads(typed.out) == json.loads(trained("test", "--config", "small.toml", "--json").out)


def test_a_dataset_that_is_not_there_without_a_network(shell, data):
    text = settings(data, model="jsc-tiny").replace('dataset = "npz"', 'dataset = "jsc"')
    shell.write("jsc.toml", "\n".join(line for line in text.splitlines() if "dataset_path" not in line))
    shell.env["BITFRONT_OPENML_URL"] = "http://127.0.0.1:9/nothing"
    [(code, _, err)] = shell.together(
        "search --config jsc.toml", before="import time; time.sleep = lambda seconds: None"
    )
    assert code == 2, "it waits between its attempts, which nobody needs to see here"
    assert "cannot download http://127.0.0.1:9/nothing" in err
    assert f"put it at {shell.folder}/cache/hls4ml_lhc_jets_hlf.arff" in err
    assert "dataset_path" in err
    assert "BITFRONT_DATA" in err


def test_a_run_folder_that_cannot_be_created(trained):
    trained.write("occupied", "a file")
    typed = trained("search", "--config", "small.toml", "--project-dir", "occupied", code=2)
    assert "error: occupied/small: Not a directory\n" in typed.err
    typed = trained("train", "--config", "small.toml", "--project-dir", "occupied", code=2)
    message = "occupied/small/checkpoints: the folder cannot be created: Not a directory; choose another project_dir"
    assert f"error: {message}\n" in typed.err
    assert "training:" not in typed.err


def test_a_full_disk(trained):
    """As far as a process notices it: no file may grow beyond some kilobytes."""
    store = trained.folder / "runs/small/trials.sqlite"
    search = ["search", "--config", "small.toml"]
    for kilobytes in (32, 48):
        # Python would cut off the bytecode that it stores, too.
        typed = trained(*search, before=f"export PYTHONDONTWRITEBYTECODE=1; ulimit -f {kilobytes}", code=1)
        assert "error: runs/small/" in typed.err
        assert "then give the same command again" in typed.err
    before = rows(store)
    typed = trained(*search)
    assert "36 of 36 candidates evaluated (space exhausted)" in typed.out
    assert rows(store)[: len(before)] == before
