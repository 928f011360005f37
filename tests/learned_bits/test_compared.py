"""Learned bits beside searches of a space: on one picture, each network as in a search alone, nothing trained twice."""

import json
import sqlite3

import numpy as np
import pytest
import torch
from torch import nn

import bitfront as bf
from bitfront.errors import ConfigError, RunError
from bitfront.kernels import bits

pytestmark = pytest.mark.skipif(not bits.available(), reason="no compiled training of bits")

SPACE = {"linear": {"name": "integer", "data_in_width": [4, 8], "weight_width": [2, 4, 8], "weight_frac_width": "auto"}}
#: 12 networks of each training.
SETTINGS = {"cycles": 3, "epochs": 2.0, "networks": 4, "batch_size": 64}


@pytest.fixture
def given():
    """Arguments without a folder."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator)
    y = (x[:, 0] > x[:, 1]).long()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    data = {"train": (x[:300], y[:300]), "val": (x[300:], y[300:])}
    return {"model": model, "data": data, "metrics": ["accuracy", "ebops"], "accelerator": "cpu"}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr("bitfront.report.comparison.can_draw", lambda: False)


def compared(given, folder, strategies, **more):
    where = {"project": "compared", "project_dir": str(folder), "space": SPACE}
    return bf.compare(strategies=strategies, **where, **given, **{"n_trials": 12, **SETTINGS, **more})


def test_its_runs_are_those_of_searches_and_beside_others(given, tmp_path):
    training = {"search.strategy.sw_runner.basic_train.max_epochs": 1, "search.calibration.bias_correction": True}
    names = ["evolution", "learned_bits", "learned_bits:layer"]
    comparison = compared(given, tmp_path, names, seeds=2, **training)
    assert comparison.strategies == ("evolution", "learned_bits:element", "learned_bits:layer")
    assert not comparison.truth
    assert comparison.evaluated >= 4 * 12
    # Model and data are those of the first seed.
    alone = bf.search(
        **given, **SETTINGS, strategy="learned_bits:layer", project="alone", project_dir=str(tmp_path), seed=0
    )
    first, second = comparison.of("learned_bits:layer")
    assert np.array_equal(first.losses, alone.objectives.losses(alone.columns.metrics))
    assert not np.array_equal(first.losses, second.losses)
    (element, _) = comparison.of("learned_bits:element")
    assert not np.array_equal(first.losses, element.losses)
    assert all(len(run) == 12 for run in comparison.runs)
    assert json.loads((tmp_path / "compared" / "compare" / "compare.json").read_text())["strategies"] == [
        *("evolution", "learned_bits:element", "learned_bits:layer")
    ]
    # All networks of a training are not all candidates of the space.
    assert all(run.stopped == "space exhausted" for run in comparison.of("learned_bits:layer"))
    assert not compared(given, tmp_path, ["evolution"], seeds=1, **training).truth


def test_what_is_trained_is_kept_and_a_lost_cycle_is_trained_again(given, tmp_path):
    before = compared(given, tmp_path, ["learned_bits:channel"], seeds=1)
    folder = tmp_path / "compared" / "compare" / "learned_bits-channel-0"
    files = sorted(folder.glob("checkpoints/cycle-*.pt"))
    assert len(files) == 3
    again = compared(given, tmp_path, ["learned_bits:channel", "evolution"], seeds=1)
    assert (again.known, before.evaluated) == (12, 12)
    assert np.array_equal(before.runs[0].losses, again.runs[0].losses)
    # As after a kill in the last cycle.
    files[-1].unlink()
    (folder / "networks.sqlite").unlink()
    resumed = compared(given, tmp_path, ["learned_bits:channel"], seeds=1)
    assert (resumed.known, resumed.evaluated) == (12, 12)  # evolution's are known
    assert np.array_equal(before.runs[0].losses, resumed.runs[0].losses)
    fresh = compared(given, tmp_path, ["learned_bits:channel"], seeds=1, restart=True)
    assert fresh.known == 0
    assert np.array_equal(before.runs[0].losses, fresh.runs[0].losses)


def test_brute_force_beside_it_is_not_the_truth(given, tmp_path):
    comparison = compared(given, tmp_path, ["learned_bits", "brute_force"], seeds=1)
    assert comparison.strategies == ("brute_force", "learned_bits:element")
    assert len(comparison.of("brute_force")[0]) == comparison.size
    assert not comparison.truth


def test_a_time_limit_ends_runs_but_not_brute_force(given, tmp_path):
    comparison = compared(given, tmp_path, ["evolution", "brute_force"], seeds=1, timeout=1e-9)
    assert [run.stopped for run in comparison.runs] == ["space exhausted", "timeout"]
    assert len(comparison.of("evolution")[0]) < 12


def test_a_model_that_it_cannot_train_is_refused_before_any_work(given, tmp_path):
    layer = nn.Linear(6, 6)
    with pytest.raises(ConfigError, match=r"'learned_bits' has no layer here whose bits it could learn"):
        compared({**given, "model": nn.Sequential(layer, nn.ReLU(), layer)}, tmp_path, ["evolution", "learned_bits"])
    assert not list(tmp_path.rglob("*.sqlite"))


def meta(path):
    with sqlite3.connect(path) as store:
        return {row[0]: json.loads(row[1]) for row in store.execute("SELECT key, value FROM meta")}


def test_each_training_covers_the_range_within_the_time_limit_and_sessions_go_on_with_it(given, tmp_path):
    """The number of trials says how many networks there are, and the time how long their cycles are."""
    free = {"epochs": None, "cycles": None, "seeds": 2}
    comparison = compared(given, tmp_path, ["learned_bits:channel"], timeout=1.5, **free)
    folders = [tmp_path / "compared" / "compare" / f"learned_bits-channel-{seed}" for seed in range(2)]
    known = [meta(folder / "networks.sqlite") for folder in folders]
    files = [sorted(folder.glob("checkpoints/cycle-*.pt")) for folder in folders]
    before = [cycles[-1].read_bytes() for cycles in files]
    for entry, folder, cycles, run in zip(known, folders, files, comparison.runs, strict=True):
        assert entry["length"]["cycles"] <= 3
        assert set(map(int, entry["paces"])) >= set(range(len(cycles)))
        # Measuring comes out of the time of the run.
        assert run.evaluating[0] > entry["spent"] > 0
        cycles[-1].unlink()
        with sqlite3.connect(folder / "networks.sqlite") as store:
            store.execute("DELETE FROM blocks")
    again = compared(given, tmp_path, ["learned_bits:channel"], timeout=60.0, **free)
    assert [cycles[-1].read_bytes() for cycles in files] == before
    assert [meta(folder / "networks.sqlite")["length"] for folder in folders] == [entry["length"] for entry in known]
    assert all(len(run) >= len(first) for run, first in zip(again.runs, comparison.runs, strict=True))


def test_another_number_of_networks_is_another_training(given, tmp_path):
    compared(given, tmp_path, ["learned_bits"], seeds=1, cycles=None)
    with pytest.raises(RunError, match="cycles: it has 3, requested is 2"):
        compared(given, tmp_path, ["learned_bits"], seeds=1, cycles=None, n_trials=8)


def test_inputs_follow_the_weights_and_a_variant_takes_widths(given, tmp_path):
    widths = {"weight_width": [4, 8], "data_in_width": [8], "layers": {"0": {"data_in": "channel"}}}
    compared(given, tmp_path, ["learned_bits:layer"], seeds=1, **widths)
    path = tmp_path / "compared" / "compare" / "learned_bits-layer-0" / "checkpoints" / "cycle-0001.pt"
    (path,) = path.parent.glob("cycle-*1.pt")
    tensors = bf.checkpoints.read_tensors(path)
    assert tensors["0.0.0.data_bits"].numel() == 6
    assert tensors["0.0.1.data_bits"].unique().numel() == 1
    assert set(tensors["0.0.1.weight_bits"].unique().tolist()) <= {0, 3, 7}
