"""``make fuzz`` prints a seed that draws the same examples again, keeps to its time, and fails where a property does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).with_name("fuzz.py")
PROPERTY = """
import pathlib
from hypothesis import given, settings, strategies as st

settings.register_profile("random", max_examples=20, derandomize=False, database=None)
settings.load_profile("random")

@given(st.integers(0, 10**9))
def test_it(number):
    with pathlib.Path("drawn.txt").open("a") as file:
        print(number, file=file)
    assert {holds}
"""


def fuzz(folder, holds, *words):
    """(exit code, output, what was drawn) of a property that `holds` says when it is true."""
    (folder / "test_property.py").write_text(PROPERTY.format(holds=holds))
    (folder / "drawn.txt").unlink(missing_ok=True)
    command = [sys.executable, FUZZ, *words, "--", "test_property.py", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    drawn = folder / "drawn.txt"
    return done.returncode, done.stdout, drawn.read_text().split() if drawn.exists() else []


@pytest.mark.long
@pytest.mark.journey
def test_a_failure_can_be_drawn_again(tmp_path):
    code, printed, drawn = fuzz(tmp_path, "number < 1000", "--seconds", "60")
    assert code == 1
    [seed] = re.findall(r"^round 1: seed (\d+), 60 s left$", printed, re.M)
    assert printed.endswith(f"failed with seed {seed}. The same examples again: make fuzz SEED={seed}\n")
    code, printed, again = fuzz(tmp_path, "number < 1000", "--seconds", "60", "--seed", seed)
    assert code == 1
    assert again == drawn


@pytest.mark.long
@pytest.mark.journey
def test_each_round_draws_others(tmp_path):
    code, printed, drawn = fuzz(tmp_path, "True", "--seconds", "600", "--rounds", "2")
    assert code == 0
    seeds = re.findall(r"^round \d: seed (\d+), ", printed, re.M)
    assert len(seeds) == len(set(seeds)) == 2
    assert set(drawn[:20]) != set(drawn[20:])
    assert printed.endswith("nothing failed in 2 rounds\n")


@pytest.mark.journey
def test_the_time_is_kept(tmp_path):
    code, printed, drawn = fuzz(tmp_path, "__import__('time').sleep(600) is None", "--seconds", "3")
    assert code == 0
    assert printed.endswith("the time is up in round 1; nothing failed\n")
    assert len(drawn) <= 1
