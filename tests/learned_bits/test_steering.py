"""The pressure under constraints: against a made-up network whose accuracy and cost follow the pressure, and in
searches."""

import itertools

import numpy as np
import pytest
import torch
from test_trained import data, model

import bitfront as bf
from bitfront import checkpoints
from bitfront.checkpoints.cycles import cycle_file
from bitfront.learned_bits.steering import CLOSE, Rise, Target


def course(target, past_from, cycles=40, first=1e-7, last=2e-5):
    """The pressures of a course whose cycles are past the target from some pressure on."""
    usual = (last / first) ** (1 / (cycles // 2 - 1))
    rise, pressures = Rise(), []
    for _ in range(cycles):
        pressure = rise.next(first)
        pressures.append(pressure)
        rise, _ = rise.after(pressure, pressure >= past_from, usual, target)
    return pressures


@pytest.mark.parametrize("limit", [2e-7, 3e-6, 1e-5, 3e-5])
@pytest.mark.parametrize("target", [Target(least_right=100), Target(most_cost=1000), Target(100, 1000)])
def test_the_pressure_ends_near_the_limit(target, limit):
    pressures = course(target, limit)
    assert pressures[0] == 1e-7
    assert all(limit / CLOSE**3 <= p <= limit * CLOSE**3 for p in pressures[-8:])


def test_a_limit_below_the_first_pressure_is_reached_from_above():
    pressures = course(Target(least_right=100), 1e-9)
    assert all(1e-9 / CLOSE**3 <= p <= 1e-9 * CLOSE**3 for p in pressures[-8:])


def test_past_the_target():
    cheap, dear = (500.0, 90.0), (2000.0, 110.0)
    assert Target(least_right=100).past([cheap])
    assert not Target(least_right=100).past([cheap, dear])
    assert Target(most_cost=1000).past([cheap, dear])
    assert not Target(most_cost=1000).past([dear])
    assert not Target(100, 1000).past([dear])
    # The cheapest network within the accuracy may be far cheaper than it must be.
    assert not Target(100, 1000).past([cheap, (700.0, 105.0)])
    assert Target(100, 1000).past([cheap])
    assert Target(most_cost=1000).loose([cheap])
    assert not Target(most_cost=1000).loose([cheap, dear])
    assert not Target(100, 1000).loose([cheap])
    assert not Target()


def test_other_constraints_are_met_by_the_same_network():
    target = Target(most_cost=1000, others=("made up",))
    assert target.past([(500.0, 90.0), (900.0, 90.0)], [False, True])
    assert not target.past([(500.0, 90.0), (2000.0, 90.0)], [False, True])


def test_the_best_within_a_target_are_kept():
    networks = [(900.0, 100.0), (700.0, 95.0), (500.0, 90.0), (400.0, 89.0), (950.0, 100.0)]
    assert Target(least_right=90).best(networks) == [2, 0]
    assert Target(most_cost=700).best(networks) == [3, 1]
    assert Target(least_right=90, most_cost=700).best(networks) == [2, 1]
    assert Target(least_right=101).best(networks) == []
    assert Target().best(networks) == []


def harder():
    """Samples whose class depends on all features, so that a network needs many weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 6, generator=generator)
    y = (x.sum(1) + x[:, 0] * x[:, 1] - x[:, 2] * x[:, 3] > 0).long()
    return {"train": (x[:400], y[:400]), "val": (x[400:], y[400:])}


def searched(tmp_path, first_pressure=None, samples=data, **constraints):
    settings = {"cycles": 14, "epochs": 15, "networks": 2, "batch_size": 64, "strategy": "learned_bits"}
    settings["first_pressure"] = first_pressure
    where = {"project": "run", "project_dir": str(tmp_path), "metrics": ["accuracy", "ebops", "model_size"]}
    more = {f"search.constraints.{name}": text for name, text in constraints.items()}
    return bf.search(model=model(), data=samples(), **settings, **where, **more)


def pressures(run):
    files = [cycle_file(run.folder, cycle) for cycle in range(14)]
    return [checkpoints.read_meta(file)["networks"][0][-1]["pressure"] for file in files]


def test_a_bound_that_is_met_from_the_start_changes_nothing(tmp_path):
    free, bound = searched(tmp_path / "free"), searched(tmp_path / "bound", model_size="<= 1 kB", ebops="<= 100000")
    assert pressures(free) == pressures(bound)


def test_no_cycle_gives_the_networks_of_another_one(tmp_path):
    run = searched(tmp_path, first_pressure=1e-4, samples=harder, accuracy=">= 0.85")
    weights = [
        np.concatenate([t.numpy().ravel() for n, t in checkpoints.read_tensors(file).items() if n.endswith(".weight")])
        for file in (cycle_file(run.folder, cycle) for cycle in range(14))
    ]
    assert len(set(pressures(run))) < 14  # some cycles have the same pressure
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(weights, 2))


def test_a_metric_that_the_training_does_not_count_steers_it(tmp_path):
    """The training presses on EBOPs here, and bytes are counted by the metric."""
    free, bound = searched(tmp_path / "free"), searched(tmp_path / "bound", model_size="<= 30")
    sizes = bound.columns.metrics["model_size"]
    assert free.columns.metrics["model_size"].min() < 20 < 30 < sizes.max()
    assert sizes[bound.front_rows].max() <= 30
    # It stays where the bound just holds, and does not go on to networks that are much smaller.
    assert np.median(sizes[-8:]) > 20
    assert max(pressures(bound)) < max(pressures(free))
