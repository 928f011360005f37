"""The length of a training under a timeout: against a made-up clock, and kept in the run folder."""

import json
import math
import sqlite3

import pytest
from test_trained import data, data_of, model

import bitfront as bf
from bitfront.checkpoints.cycles import cycle_file
from bitfront.engine.planning import pacing
from bitfront.engine.planning.pacing import PLANNED, fitting, pacemaker
from bitfront.learned_bits.course import Pace, Schedule

PLAN = Schedule(20, 24.0, 1, 6, 64, 3e-3, 2.0, 5, None, None, 0)


@pytest.mark.parametrize("epoch", [0.001, 0.05, 0.4])
@pytest.mark.parametrize("network", [0.0, 0.02])
def test_what_is_planned_fits_into_the_time(epoch, network):
    schedule = fitting(PLAN, 60, epoch, network)
    seconds = schedule.cycles * (schedule.epochs * epoch + 6 * network)
    assert PLANNED * 60 * 0.8 < seconds <= PLANNED * 60 * 1.01
    assert schedule.epochs >= 6
    assert schedule.cycles == 20 or schedule.epochs == 6


def test_too_little_time_leaves_a_cycle_at_each_end_of_the_range():
    schedule = fitting(PLAN, 1, 10, 1)
    assert (schedule.cycles, schedule.epochs) == (2, 6)


class Clock:
    """Time that passes only where it is said."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


def cycles_until(clock, pace, schedule, slower, end):
    """Train until time is up: (paces, when each cycle ended). An epoch takes `slower` times 0.1 s."""
    paces, ends = [], []
    for number in range(schedule.cycles):
        if clock.now >= end:
            break
        paces.append(pace(number))
        clock.now += 0.1 * slower(number) * paces[-1].epochs
        ends.append(clock.now)
    return paces, ends


@pytest.mark.parametrize("slower", [lambda _: 1, lambda _: 2.5, lambda n: 4 if n > 9 else 1, lambda _: 20])
def test_the_last_pressure_is_reached_in_time(slower, monkeypatch):
    clock, kept = Clock(), []
    monkeypatch.setattr(pacing, "time", clock)
    schedule = fitting(PLAN, 60, 0.1, 0.0)
    pace = pacemaker(schedule, clock.now + 60, {}, lambda known: kept.append(dict(known)))
    paces, ends = cycles_until(clock, pace, schedule, slower, 160)
    # The first cycle is as planned, and so are all of a machine that is as fast as it was.
    assert paces[0] == Pace(schedule.epochs, 20)
    if slower(0) == slower(19) == 1:
        assert paces == [Pace(schedule.epochs, 20 - n) for n in range(20)]
    # The cycle that reaches the last pressure ends in time, but for the length of one cycle.
    final = next(n for n, p in enumerate(paces) if p.left == 1)
    assert ends[final] <= 160 + max(b - a for a, b in zip([100, *ends], ends, strict=False))
    assert kept[-1] == dict(enumerate(paces))
    assert all(p.epochs <= schedule.epochs for p in paces)


def test_what_was_said_of_a_cycle_is_said_again(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(pacing, "time", clock)
    schedule = fitting(PLAN, 60, 0.1, 0.0)
    first = {}
    paces, _ = cycles_until(clock, pacemaker(schedule, 160, first, lambda _: None), schedule, lambda _: 5, 130)
    again = pacemaker(schedule, math.inf, dict(first), lambda _: pytest.fail("nothing is new"))
    for number, pace in enumerate(paces):
        clock.now += 1000
        assert again(number) == pace


def meta(folder):
    with sqlite3.connect(folder / "trials.sqlite") as store:
        return {row[0]: json.loads(row[1]) for row in store.execute("SELECT key, value FROM meta")}


def lose_all_but_the_clock(folder):
    """Delete everything that was trained. (What the run knows of its length, the files of its cycles, their bytes.)"""
    known = meta(folder)
    files = [cycle_file(folder, n) for n in range(known["length"]["cycles"]) if cycle_file(folder, n).exists()]
    assert files
    before = [path.read_bytes() for path in files]
    assert set(map(int, known["paces"])) >= set(range(len(files)))
    for path in files:
        path.unlink()
        path.with_name(f"{path.name}.json").unlink()
    with sqlite3.connect(folder / "trials.sqlite") as store:
        store.execute("DELETE FROM blocks")
        store.execute("DELETE FROM test_results")
    return known, files, before


def test_a_timeout_is_spread_over_the_range_and_the_same_after_a_resume(tmp_path):
    def searched(timeout):
        settings = {"networks": 2, "batch_size": 64, "strategy": "learned_bits", "timeout": timeout}
        return bf.search(model=model(), data=data(), project="run", project_dir=str(tmp_path), **settings)

    run = searched(1.0)
    folder = tmp_path / "run"
    # With other times the same comes out.
    known, files, before = lose_all_but_the_clock(folder)
    again = searched(30.0)
    assert [path.read_bytes() for path in files] == before
    assert meta(folder)["length"] == known["length"]
    assert len(again) >= len(run)
    # A trial is rebuilt with the schedule of the search, not with that of the file.
    rebuilt = bf.transform_trial(again.folder, len(again) - 1, check=True, data=data_of(), model=model())
    assert rebuilt.evaluation.accuracy == again.trials[-1].metrics["accuracy"]


@pytest.mark.parametrize("length", [{"cycles": 2}, {"epochs": 3}, {"n_trials": 4}])
def test_a_length_that_is_given_does_not_depend_on_the_clock(length, tmp_path):
    settings = {"networks": 2, "batch_size": 64, "strategy": "learned_bits", "timeout": 30.0, **length}
    bf.search(model=model(), data=data(), project="run", project_dir=str(tmp_path), **settings)
    known = meta(tmp_path / "run")
    assert "length" not in known
    assert "paces" not in known
