"""A training with learned bits, killed at any moment and started again, ends with the bytes of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
epochs = 30
networks = 3
members = 2
float_epochs = 5
teacher = "self"
"""


def started(folder):
    (folder / "file.toml").write_text(FILE)
    command = [sys.executable, "-m", "bitfront", "search", "file.toml"]
    with (folder / "printed").open("w") as printed:
        return subprocess.Popen(command, cwd=folder, stdout=printed, stderr=subprocess.STDOUT)


def outcome(folder):
    """Everything that a run folder says of its trials, but for times."""
    run = folder / "runs" / "learned"
    cycles = sorted((run / "checkpoints").glob("cycle-*.pt"))
    return (run / "best.json").read_bytes(), [(path.name, path.read_bytes()) for path in cycles]


@pytest.mark.slow
def test_killed_ten_times_the_front_is_the_same_to_the_byte(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    begin = time.perf_counter()
    alone = started(whole)
    assert alone.wait(120) == 0, (whole / "printed").read_text()
    seconds = time.perf_counter() - begin
    chance, kills = random.Random(0), 0
    while kills < 10:
        process = started(killed)
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
    last = started(killed)
    assert last.wait(240) == 0, (killed / "printed").read_text()
    assert outcome(killed) == outcome(whole)
    assert len(list(Path(killed, "runs", "learned", "checkpoints").glob("cycle-*.pt"))) == 6
