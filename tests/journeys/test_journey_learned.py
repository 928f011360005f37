"""A training with learned bits, killed at any moment and started again, ends with the bytes of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitfront import checkpoints
from bitfront.engine.storage.run import Run

pytestmark = pytest.mark.journey

#: Small enough to end within seconds, long enough to be killed on the way.
FILE = """
model = "digits-mlp"
dataset = "digits"
project = "learned"
max_epochs = 5
[search.strategy]
name = "learned_bits"
[search.strategy.setup]
cycles = 6
epochs = 15
networks = 3
members = 2
float_epochs = 5
teacher = "self"
"""


CONSTRAINT = """
[search.constraints]
accuracy_drop = "<= 1 %"
"""
TIMED = """
model = "digits-mlp"
dataset = "digits"
project = "learned"
max_epochs = 5
[search.strategy]
name = "learned_bits"
[search.strategy.setup]
weight = "channel"
data_in = "layer"
weight_width = [4, 8]
data_in_width = [8]
networks = 3
timeout = 6
[search.strategy.sw_runner.basic_evaluation]
data_loader = "val_dataloader"
[search.strategy.hw_runner.model_size]
[search.strategy.metrics]
accuracy.direction = "maximize"
model_size.direction = "minimize"
[search.constraints]
model_size = "<= 2 kB"
"""


def started(folder, text=FILE):
    (folder / "file.toml").write_text(text)
    command = [sys.executable, "-m", "bitfront", "search", "file.toml"]
    with (folder / "printed").open("w") as printed:
        return subprocess.Popen(command, cwd=folder, stdout=printed, stderr=subprocess.STDOUT)


def outcome(folder):
    """Everything that a run folder says of its trials, but for times."""
    run = folder / "runs" / "learned"
    cycles = sorted((run / "checkpoints").glob("cycle-*.pt"))
    return (run / "best.json").read_bytes(), [(path.name, path.read_bytes()) for path in cycles]


@pytest.mark.long
@pytest.mark.parametrize(("text", "times"), [(FILE, 10), (FILE + CONSTRAINT, 3)], ids=["free", "constraint"])
def test_killed_many_times_the_front_is_the_same_to_the_byte(text, times, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    begin = time.perf_counter()
    alone = started(whole, text)
    assert alone.wait(120) == 0, (whole / "printed").read_text()
    seconds = time.perf_counter() - begin
    chance, kills = random.Random(0), 0
    while kills < times:
        process = started(killed, text)
        try:
            process.wait(chance.uniform(0.3, 1.0) * seconds * 0.9)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        # It ended before it was killed; the next one begins anew.
        assert process.returncode == 0, (killed / "printed").read_text()
        for file in (killed / "runs" / "learned").rglob("*"):
            if file.is_file():
                file.unlink()
    last = started(killed, text)
    assert last.wait(240) == 0, (killed / "printed").read_text()
    assert outcome(killed) == outcome(whole)
    assert len(list(Path(killed, "runs", "learned", "checkpoints").glob("cycle-*.pt"))) == 6


def cycles_of(folder):
    files = (folder / "runs" / "learned" / "checkpoints").glob("cycle-*.pt")
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.long
def test_a_timeout_covers_the_range_and_what_was_trained_stays(tmp_path):
    """For a processor with two widths, killed once on the way."""
    first = started(tmp_path, TIMED)
    while len(cycles_of(tmp_path)) < 4 and first.poll() is None:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    before = cycles_of(tmp_path)
    text = (tmp_path / "printed").read_text()
    assert "the timeout of 6 s is spent on" in text
    again = started(tmp_path, TIMED)
    assert again.wait(120) == 0, (tmp_path / "printed").read_text()
    printed = (tmp_path / "printed").read_text()
    assert "trials are known from earlier sessions" in printed
    assert "is spent on" not in printed
    after = cycles_of(tmp_path)
    assert 4 <= len(before) < len(after)
    assert {name: after[name] for name in before} == before
    run = Run.load(tmp_path / "runs" / "learned")
    assert run.columns.metrics["model_size"][run.front_rows].max() <= 2000
    for file in (run.folder / "checkpoints").glob("cycle-*.pt"):
        tensors = checkpoints.read_tensors(file)
        # Without the sign of weights; the network's input has none, as the rest after a ReLU.
        assert {int(bits) for n, t in tensors.items() if n.endswith("weight_bits") for bits in t.unique()} <= {0, 3, 7}
        assert {int(bits) for n, t in tensors.items() if n.endswith("data_bits") for bits in t.unique()} <= {7, 8}
