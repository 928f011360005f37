"""A search that trains its candidates, killed and taken up again."""

import contextlib
import json
import os
import shutil
import signal

import pytest
from journey import Shell, rows, settings, wait_for_rows

from bitfront.engine.storage.store import read

pytestmark = pytest.mark.journey

TRAINED = """
[search.strategy.sw_runner.basic_train]
max_epochs = 30
learning_rate = 0.005
halving = {rungs = [4, 12], keep = 0.4, cohort = 8}
"""
TRIALS = 32


WIDTHS = """[search.search_space]
name = "joint"

[search.search_space.widths.seed.default.config]
name = ["output_only"]
channel_multiplier = [0.25, 0.5, 1, 1.5]

[search.search_space.quantize.setup]
"""


@pytest.fixture
def training(trained, data):
    text = settings(data, strategy='name = "evolution"').replace("[search.search_space.setup]\n", WIDTHS)
    text = text.replace("[search.search_space.seed", "[search.search_space.quantize.seed")
    trained.write("trained.toml", text + TRAINED)
    return trained


def epochs(shell):
    with contextlib.closing(read(shell.folder / "runs/small/trials.sqlite")) as store:
        return store.trials().metrics["trained_epochs"].tolist()


def best(shell):
    return json.loads((shell.folder / "runs/small/best.json").read_text())


@pytest.mark.long
def test_a_killed_search_that_trains_ends_as_if_it_had_not_been(training, tmp_path_factory):
    search = ["search", "--config", "trained.toml", "--n-trials", TRIALS, "--finetune", 1]
    whole = Shell(tmp_path_factory.mktemp("whole"))
    shutil.copytree(training.folder, whole.folder, dirs_exist_ok=True)

    store = training.folder / "runs/small/trials.sqlite"
    process = training.start(*search)
    wait_for_rows(store, 8, training, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = rows(store)
    assert len(before) < TRIALS, "it was to be killed in the middle"
    assert len(before) in (8, 9, 17, 25), "cohorts are whole: of the 9 uniform candidates, and of generations of 8"

    typed = training(*search)
    assert f"{len(before)} trials are known from earlier sessions" in typed.err
    after = rows(store)
    assert after[: len(before)] == before
    assert len({row[1] for row in after}) == len(after) == TRIALS
    assert set(epochs(training)) == {4, 12, 30}, "who is hopeless stops at a rung"

    whole(*search, "--n-jobs", 2)
    assert rows(whole.folder / "runs/small/trials.sqlite") == after
    assert best(whole) == best(training)
    assert any(entry["finetuned"]["metrics"] for entry in best(training).values() if "finetuned" in entry)
