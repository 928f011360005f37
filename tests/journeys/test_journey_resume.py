"""Stopped by whatever, a search goes on where it was, and ends where it would have ended."""

import json
import os
import shutil
import signal
import time

import pytest
from journey import SLOW_NET, SLOWLY, Shell, rows, settings, wait_for_rows

pytestmark = pytest.mark.journey

#: Flags of a search that can take seconds: 100 candidates, of which the samplers try 60.
SEARCHES = {
    "brute_force": ["--strategy", "brute_force", "--n-trials", 100],
    "tpe": ["--strategy", "optuna", "--sampler", "tpe", "--n-trials", 60],
    "nsgaii": ["--strategy", "optuna", "--sampler", "nsgaii", "--n-trials", 60],
}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, data, warm, kernels):
    """A folder with ``slow.toml`` and trained weights for it."""
    shell = Shell(tmp_path_factory.mktemp("slow"), warm, kernels)
    shell.write("slow_net.py", SLOW_NET)
    slow_settings = {"model": "slow_net:net", "project": "slow", "weights": "[2, 3, 4, 6, 8]", "top": "max_steps = 200"}
    shell.write("slow.toml", settings(data, **slow_settings))
    shell("train", "--config", "slow.toml")
    return shell.folder


@pytest.fixture
def slow(shell, prepared):
    shutil.copytree(prepared, shell.folder, dirs_exist_ok=True)
    return shell


def of(name):
    return ["search", "--config", "slow.toml", *SEARCHES[name]]


def read(shell, name):
    return (shell.folder / f"runs/slow/{name}").read_bytes()


def trials_without_time(shell):
    """Everything about the trials that does not depend on the clock."""
    log = json.loads(read(shell, "log.json"))
    return [{k: v for k, v in entry.items() if k != "duration"} for entry in log.values()]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name != "brute_force" else []) for name in SEARCHES]
)
def test_a_killed_search_goes_on_and_ends_the_same(name, slow, prepared, tmp_path_factory):
    store = slow.folder / "runs/slow/trials.sqlite"
    process = slow.start(*of(name), **SLOWLY)
    wait_for_rows(store, 10, slow, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = rows(store)
    assert 10 <= len(before) < SEARCHES[name][-1], "it was to be killed in the middle"

    typed = slow(*of(name))
    assert f"{len(before)} trials are known from earlier sessions" in typed.err
    after = rows(store)
    assert after[: len(before)] == before
    codes = [row[1] for row in after]
    assert len(set(codes)) == len(codes) == SEARCHES[name][-1]

    whole = Shell(tmp_path_factory.mktemp("whole"), slow.warm)
    shutil.copytree(prepared, whole.folder, dirs_exist_ok=True)
    # In a process of other hashes; and two processes find the same as one.
    whole(*of(name), *(["--n-jobs", 2] if name == "nsgaii" else []), cold=True)
    assert rows(whole.folder / "runs/slow/trials.sqlite") == after
    assert trials_without_time(whole) == trials_without_time(slow)
    assert read(whole, "best.json") == read(slow, "best.json")

    if name == "tpe":
        whole(*of(name), "--n-jobs", 2, "--restart")
        assert rows(whole.folder / "runs/slow/trials.sqlite") == after
        assert read(whole, "best.json") == read(slow, "best.json")


@pytest.mark.long
def test_workers_end_with_a_search_that_is_killed(slow):
    process = slow.start(*of("brute_force"), "--n-jobs", 2, **SLOWLY)
    wait_for_rows(slow.folder / "runs/slow/trials.sqlite", 10, slow, process)
    process.kill()  # it alone, as by the kernel when memory runs out; its workers are in the same group
    process.wait()
    for _ in range(200):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("workers still run 20 s after their coordinator was killed")


def test_interrupted_with_ctrl_c(slow):
    store = slow.folder / "runs/slow/trials.sqlite"
    search = ["search", "--config", "slow.toml"]
    process = slow.start(*search, **SLOWLY)
    wait_for_rows(store, 10, slow, process)
    os.killpg(process.pid, signal.SIGSTOP)  # held, so that it cannot end meanwhile
    typed = slow(*search, code=2)
    assert "runs/slow: another search is running in this folder" in typed.err
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGCONT)
    typed = slow.finish(process, code=130)
    number = len(rows(store))
    assert number < 100, "it was to be interrupted in the middle"
    assert f"{number} of 100 candidates evaluated (interrupted)" in typed.out
    assert typed.out.startswith("| number")
    assert len(trials_without_time(slow)) == number
    best = json.loads(read(slow, "best.json"))
    assert best
    assert not any("test_metrics" in entry for entry in best.values())

    typed = slow(*search)
    assert f"{number} trials are known from earlier sessions" in typed.err
    assert "100 of 100 candidates evaluated (space exhausted)" in typed.out
    assert all("test_metrics" in entry for entry in json.loads(read(slow, "best.json")).values())


def test_a_finished_search_evaluates_nothing_again(searched, searched_once):
    store = searched.folder / "runs/small/trials.sqlite"
    log, before = (searched.folder / "runs/small/log.json").read_bytes(), rows(store)
    second = searched("search", "--config", "small.toml")
    assert second.out == searched_once[1].out
    assert "36 trials are known from earlier sessions" in second.err
    assert (searched.folder / "runs/small/log.json").read_bytes() == log  # with the times of the first
    assert rows(store) == before


def test_another_configuration_is_refused_before_training(searched):
    text = (searched.folder / "small.toml").read_text()
    searched.write("other.toml", text.replace("weight_width = [2, 4, 8]", "weight_width = [2, 4]"))
    typed = searched("search", "--config", "other.toml", "--max-epochs", 3, code=2)
    assert "training:" not in typed.err
    assert "runs/small: this run folder holds trials of another configuration:" in typed.err
    assert "training.max_epochs: it has 2, requested is 3" in typed.err
    assert "weight_width: it has [2, 4, 8], requested is [2, 4]" in typed.err
    assert "--restart" in typed.err
    typed = searched("search", "--config", "other.toml", "--restart")
    assert "16 of 16 candidates evaluated" in typed.out
    assert len(rows(searched.folder / "runs/small/trials.sqlite")) == 16


def test_a_larger_budget_goes_on(trained):
    flags = ["--strategy", "optuna", "--sampler", "random"]
    typed = trained("search", "--config", "small.toml", *flags, "--n-trials", 10)
    assert "10 of 36 candidates evaluated (n_trials reached)" in typed.out
    before = rows(trained.folder / "runs/small/trials.sqlite")
    typed = trained("search", "--config", "small.toml", *flags, "--n-trials", 20)
    assert "20 of 36 candidates evaluated (n_trials reached)" in typed.out
    after = rows(trained.folder / "runs/small/trials.sqlite")
    assert after[:10] == before
    assert len({row[1] for row in after}) == len(after) == 20


def test_a_timeout_ends_it(slow):
    typed = slow.finish(slow.start("search", "--config", "slow.toml", "--timeout", 0.2, **SLOWLY))
    number = len(rows(slow.folder / "runs/slow/trials.sqlite"))
    assert 0 < number < 100
    assert f"{number} of 100 candidates evaluated (timeout)" in typed.out
