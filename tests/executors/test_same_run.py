"""One search on several executors: the same trials in the same order, the same front, the same bytes."""

import contextlib
import itertools
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from toys import HostileExecutor

import bitfront as bf
from bitfront.errors import ConfigError, EvaluationError, RunError

FORMATS = {"name": "integer", "weight_width": [2, 4, 8], "data_in_width": [4, 8], "bias_width": 8,
           "weight_frac_width": "auto", "data_in_frac_width": "auto", "bias_frac_width": "auto"}  # fmt: skip
METRICS = {"accuracy": "maximize", "average_bitwidth": "minimize"}
TRAIN = {"name": "brute_force", "sw_runner": {
    "basic_train": {"max_epochs": 2, "num_samples": 100, "halving": {"rungs": [1], "keep": 0.5, "cohort": 6}}}}  # fmt: skip
#: Strategy → what else is given.
SEARCHES = {
    "brute_force": {"strategy": "brute_force"},
    "evolution": {"strategy": "evolution", "n_trials": 40, "batch": 12},
    "surrogate": {"strategy": "surrogate", "n_trials": 40},
    "tpe": {"strategy": "optuna:tpe", "n_trials": 24},
    "trained": {"strategy": TRAIN, "n_trials": 48},
    "learned": {"strategy": "learned_bits", "space": None, "metrics": {"accuracy": {}, "ebops": {}},
                "cycles": 2, "epochs": 1, "networks": 2, "members": 2, "batch_size": 64},
}  # fmt: skip


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator)
    y = (x[:, 0] + x[:, 1] > 0).long()
    return {"train": (x[:200], y[:200]), "val": (x[200:250], y[200:250]), "test": (x[250:], y[250:])}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


def search(folder, **settings):
    given = {"space": {"linear": FORMATS}, "metrics": METRICS, **settings}
    return bf.search(model=network(), data=data(), project_dir=str(folder.parent), project=folder.name, **given)


def content(run):
    """Everything that must not depend on who has evaluated."""
    columns = run.columns
    metrics = {name: column.tobytes() for name, column in columns.metrics.items()}
    front = (run.folder / "best.json").read_text()
    return columns.codes(list(range(len(run)))).tobytes(), metrics, front


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    return {name: content(search(folder / name, **settings)) for name, settings in SEARCHES.items()}


HIT, SEEDS = set(), itertools.count()


def hostile():
    return HostileExecutor(next(SEEDS), HIT)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", SEARCHES)
def test_a_hostile_executor_changes_nothing(name, expected, tmp_path):
    assert content(search(tmp_path / name, executor=hostile, **SEARCHES[name])) == expected[name]


def test_an_executor_of_the_user_is_used_and_left_as_it_is(expected, tmp_path):
    with ThreadPoolExecutor(3) as pool:
        assert content(search(tmp_path / "threads", executor=pool, **SEARCHES["evolution"])) == expected["evolution"]
        assert pool.submit(abs, -1).result() == 1


def descendants(pid):
    """Processes that were started by a process, directly or not, with their command lines; the last ones have none."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [*descendants(child), (int(child), Path(f"/proc/{child}/cmdline").read_bytes())]
    return found


class Killer(bf.Events):
    """Kills a worker after the first block, while others are out."""

    def __init__(self):
        self.killed = []

    def progress(self, progress, plan):
        processes = [pid for pid, line in descendants(os.getpid()) if b"resource_tracker" not in line]
        if progress.new < progress.total and processes and not self.killed:
            with contextlib.suppress(OSError):  # it may have ended by itself
                os.kill(processes[0], signal.SIGKILL)
                self.killed.append(processes[0])


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["loky:2", pytest.param("slurm:local:2", marks=pytest.mark.long)])
def test_workers_that_are_killed_change_nothing(executor, expected, tmp_path):
    killer = Killer()
    assert (
        content(search(tmp_path / "killed", executor=executor, events=killer, **SEARCHES["trained"]))
        == expected["trained"]
    )
    assert killer.killed


def test_an_executor_that_breaks_and_cannot_be_made_again_ends_the_search_and_it_goes_on(expected, tmp_path):
    pool = HostileExecutor(1, set(), breaks=0.5)
    with pytest.raises(EvaluationError, match=r"HostileExecutor: it broke.*executor=lambda"):
        search(tmp_path / "broken", executor=pool, **SEARCHES["tpe"])
    assert content(search(tmp_path / "broken", **SEARCHES["tpe"])) == expected["tpe"]


def test_what_is_no_executor_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"executor is a int; allowed: a concurrent.futures.Executor, a function"):
        search(tmp_path / "none", executor=3, **SEARCHES["tpe"])


def test_a_time_limit_needs_an_executor_that_replaces_workers(tmp_path):
    with pytest.raises(ConfigError, match=r"candidate_timeout.*slurm does not replace it"):
        search(tmp_path / "none", executor="slurm:local:2", candidate_timeout=1.0, **SEARCHES["evolution"])


def test_another_batch_is_another_search(tmp_path):
    search(tmp_path / "one", **SEARCHES["evolution"])
    with pytest.raises(RunError, match="batch"):
        search(tmp_path / "one", **{**SEARCHES["evolution"], "batch": 13})
