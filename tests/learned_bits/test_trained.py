"""What a course gave is kept in the run folder: read again with the same bits, and never taken from another training."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bitfront as bf
from bitfront.checkpoints import read_meta
from bitfront.checkpoints.cycles import cycle_file, learned_network
from bitfront.engine.search import session
from bitfront.errors import CheckpointError
from bitfront.learned_bits.course import Pace
from bitfront.report.remarks import summary

SETTINGS = {"cycles": 3, "epochs": 2, "networks": 2, "batch_size": 64, "strategy": "learned_bits"}


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 6, generator=generator)
    return {"train": (x[:400], (x[:400, 0] > 0).long()), "val": (x[400:], (x[400:, 0] > 0).long())}


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def searched(folder, project, **settings):
    where = {"project": project, "project_dir": str(folder)}
    return bf.search(model=model(), data=data(), **{**SETTINGS, **where, **settings})


def same(a, b):
    return all(np.array_equal(a.columns.metrics[name], b.columns.metrics[name]) for name in a.columns.metrics)


def test_a_search_goes_on_behind_the_last_complete_cycle(tmp_path):
    whole = searched(tmp_path, "whole")
    part = searched(tmp_path, "part")
    # As after a kill in the last cycle: its file and its trials are not there.
    for cycle in (1, 2):
        for file in Path(part.folder, "checkpoints").glob(f"cycle-{cycle + 1}.pt*"):
            file.unlink()
    shutil.copytree(tmp_path / "part", tmp_path / "again")
    (tmp_path / "again" / "trials.sqlite").unlink()
    again = searched(tmp_path, "again")
    assert same(whole, again)
    for cycle in range(3):
        files = [cycle_file(tmp_path / name, cycle).read_bytes() for name in ("whole", "again")]
        assert files[0] == files[1]


def test_a_kill_between_a_cycles_file_and_its_facts_trains_the_cycle_again(tmp_path):
    whole = searched(tmp_path, "whole")
    files = [cycle_file(Path(whole.folder), cycle) for cycle in range(3)]
    before = [path.read_bytes() for path in files]
    Path(f"{files[2]}.json").unlink()
    (tmp_path / "whole" / "trials.sqlite").unlink()
    assert same(whole, searched(tmp_path, "whole"))
    assert [path.read_bytes() for path in files] == before
    assert read_meta(files[2])["cycle"] == 2


def test_what_was_learned_is_told_of_the_network_that_is_rebuilt(tmp_path):
    run = searched(tmp_path, "told")
    records = json.loads((tmp_path / "told" / "log.json").read_text())
    lines = [line for line in summary(run) if line.startswith("  ")]
    assert not any("-/-" in line for line in lines)
    for trial in run.trials:
        network = learned_network(Path(run.folder), trial.config)
        rebuilt = bf.transform_trial(run.folder, trial.number, data=data_of(), model=model())
        assert [layer.path for layer in network.layers] == ["0", "2"]
        for layer in network.layers:
            weight = rebuilt.model.get_submodule(layer.path).weight
            assert layer.pruned == pytest.approx(float((weight == 0).double().mean()))
            told = records[str(trial.number)]["learned_bits"][layer.path]
            assert told == {
                "weight_bits": round(float(layer.weight[layer.weight > 0].mean()), 4),
                "pruned": round(layer.pruned, 4),
                "data_in_bits": round(float(layer.data_in[layer.data_in > 0].mean()), 4),
            }
    for line in lines:
        number, text = line.strip().split(": ", 1)
        layers = learned_network(Path(run.folder), run.trial(int(number)).config).layers
        assert text == ", ".join(f"{e.path} {e.weight_bits:.1f}/{e.pruned:.0%}/{e.data_in_bits:.1f}" for e in layers)


def test_every_trial_is_rebuilt_from_its_file(tmp_path):
    run = searched(tmp_path, "run")
    for trial in run.trials:
        rebuilt = bf.transform_trial(run.folder, trial.number, check=True, data=data_of(), model=model())
        assert rebuilt.evaluation.accuracy == trial.metrics["accuracy"]


def data_of():
    from bitfront.api import dataset_of

    return dataset_of(data())


def test_a_file_of_another_cycle_or_training_is_refused(tmp_path):
    run, other = searched(tmp_path, "run"), searched(tmp_path, "other", learning_rate=1e-3, seed=1)
    for source in (cycle_file(Path(run.folder), 1), cycle_file(Path(other.folder), 0)):
        target = cycle_file(Path(run.folder), 0)
        shutil.copy(source, target)
        shutil.copy(f"{source}.json", f"{target}.json")
        with pytest.raises(CheckpointError, match=r"belongs to another training.*--restart"):
            bf.transform_trial(run.folder, 0, data=data_of(), model=model())


def test_networks_are_read_where_another_would_train_and_the_training_does_not_go_on(tmp_path, monkeypatch):
    """As on a machine without a compiler, or without the GPU that trained them."""
    run = searched(tmp_path, "run")
    assert read_meta(cycle_file(Path(run.folder), 0))["origin"]
    monkeypatch.setattr("bitfront.kernels.native.bits_library", lambda: None)
    for trial in run.trials:
        rebuilt = bf.transform_trial(run.folder, trial.number, check=True, data=data_of(), model=model())
        assert rebuilt.evaluation.accuracy == trial.metrics["accuracy"]
    last = cycle_file(Path(run.folder), 2)
    last.unlink()
    Path(f"{last}.json").unlink()
    (tmp_path / "run" / "trials.sqlite").unlink()
    with pytest.raises(CheckpointError, match=r"cycle-2\.pt was trained on another device, or with compiled steps"):
        searched(tmp_path, "run")


def test_a_damaged_file_is_refused(tmp_path):
    run = searched(tmp_path, "run")
    path = cycle_file(Path(run.folder), 0)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError):
        bf.transform_trial(run.folder, 0, data=data_of(), model=model())


def test_members_beside_each_other_are_as_alone(tmp_path):
    torch.set_num_threads(1)
    one = searched(tmp_path, "one", members=2, float_epochs=1)
    torch.set_num_threads(2)
    try:
        two = searched(tmp_path, "two", members=2, float_epochs=1)
    finally:
        torch.set_num_threads(1)
    assert same(one, two)


def test_the_pressure_rises_further_where_accuracy_hardly_suffers_and_a_kill_changes_nothing(tmp_path):
    settings = {"cycles": 8, "epochs": 1, "networks": 1}
    searched(tmp_path, "easy", **settings)
    metas = [read_meta(cycle_file(tmp_path / "easy", cycle)) for cycle in range(8)]
    pressures = [meta["positions"][0]["pressure"] for meta in metas]
    assert metas[4]["hurry"]["steps"] == 0
    step = 200 ** (1 / 7)
    assert pressures[4] == pytest.approx(pressures[0] * step**4)
    best = [meta["hurry"]["most_right"] for meta in metas]
    right = [meta["networks"][0][0]["right"] for meta in metas]
    for cycle in (5, 6):
        kept = right[cycle] > 0.9875 * best[cycle]
        hurry = metas[cycle]["hurry"]
        assert hurry["before"] == metas[cycle - 1]["hurry"]["steps"]
        added = hurry["steps"]
        assert added == hurry["before"] + 3 * kept
        assert pressures[cycle + 1] == pytest.approx(pressures[0] * step ** (cycle + 1 + added))
    assert metas[-1]["hurry"]["steps"] > 0
    last = cycle_file(tmp_path / "easy", 7)
    before = last.read_bytes()
    last.unlink()
    (tmp_path / "easy" / "trials.sqlite").unlink()
    searched(tmp_path, "easy", **settings)
    assert last.read_bytes() == before


def test_a_pressure_that_is_given_is_the_last_one(tmp_path):
    searched(tmp_path, "given", cycles=8, epochs=1, networks=1, last_pressure=1e-4)
    meta = read_meta(cycle_file(tmp_path / "given", 7))
    assert meta["hurry"]["steps"] == 0
    assert meta["positions"][0]["pressure"] == pytest.approx(1e-4)


@pytest.mark.parametrize("constraints", [{"ebops": "<= 1e9"}, {"accuracy": ">= 0.1"}])
def test_only_a_course_that_no_constraint_steers_hurries(tmp_path, constraints):
    """A bound on the cost that is met from the start does not steer; one on the accuracy does."""
    searched(tmp_path, "bound", cycles=8, epochs=1, networks=1, constraints=constraints)
    meta = read_meta(cycle_file(tmp_path / "bound", 7))
    assert (meta["hurry"]["steps"] > 0) == meta["rise"]["free"] == ("ebops" in constraints)


def test_a_course_with_too_little_time_ends_at_the_last_pressure(tmp_path, monkeypatch):
    """After six of eight cycles there is time for one more."""

    def measured(plan, timeout):
        return replace(plan.evaluator.learning.schedule, cycles=8, epochs=1.0), 0.1

    monkeypatch.setattr(session, "measured_schedule", measured)
    monkeypatch.setattr(session, "pacemaker", lambda *_: lambda number: Pace(1.0, 8 - number if number < 6 else 1))
    searched(tmp_path, "late", cycles=None, epochs=None, networks=1, timeout=1000)
    metas = [read_meta(cycle_file(tmp_path / "late", cycle)) for cycle in range(8)]
    pressures = [meta["positions"][0]["pressure"] for meta in metas]
    added = metas[5]["hurry"]["steps"]
    assert metas[6]["hurry"]["steps"] == added > 0
    assert pressures[6:] == pytest.approx([pressures[0] * 200 ** ((7 + added) / 7)] * 2)


@pytest.mark.parametrize(("shared", "rise"), [("element", 200), ("channel", 2000), ("layer", 2000)])
def test_shared_bits_have_a_longer_range_where_no_constraint_steers(tmp_path, shared, rise):
    searched(tmp_path, "free", cycles=2, epochs=1, networks=1, weight=shared)
    first, last = (read_meta(cycle_file(tmp_path / "free", c))["positions"][0]["pressure"] for c in range(2))
    assert last == pytest.approx(rise * first)
    bound = {"accuracy": ">= 0.1"}
    searched(tmp_path, "steered", cycles=6, epochs=1, networks=1, weight=shared, constraints=bound)
    first, second = (read_meta(cycle_file(tmp_path / "steered", c))["positions"][0]["pressure"] for c in range(2))
    assert second == pytest.approx(200**0.5 * first)
