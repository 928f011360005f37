"""Searches that are killed again and again in the middle of the loop, and end as one that was left alone.

Half of the kills hit the search itself, half one of its workers. ``BITFRONT_KILLS`` says how many there are (``make fuzz``:
40), and ``BITFRONT_KILLS_SEED`` draws the same moments again.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from journey import PATIENCE, SLOW_NET, Shell, rows, settings, wait_for_rows

pytestmark = [pytest.mark.journey, pytest.mark.slow, *([] if "BITFRONT_KILLS" in os.environ else [pytest.mark.long])]

KILLS = int(os.environ.get("BITFRONT_KILLS", "4"))
SEED = int(os.environ.get("BITFRONT_KILLS_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)
#: Slow enough for a kill to land in a block, and quick enough for many of them.
SLOWLY = {"SLOW_SECONDS": "0.02"}
STORE = "runs/slow/trials.sqlite"
CANDIDATES = 100


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data, warm, kernels):
    """A folder with ``slow.toml``, trained weights for it, and the search that nobody kills in ``runs/whole``."""
    shell = Shell(tmp_path_factory.mktemp("slow"), warm, kernels)
    shell.write("slow_net.py", SLOW_NET)
    options = {"model": "slow_net:net", "project": "slow", "weights": "[2, 3, 4, 6, 8]", "top": "max_steps = 200"}
    shell.write("slow.toml", settings(data, **options))
    shell("train", "--config", "slow.toml")
    shutil.copytree(shell.folder / "runs/slow", shell.folder / "runs/whole")
    shell("search", "--config", "slow.toml", "--project", "whole")
    return shell.folder


def workers(process):
    """Process ids of the workers of a search."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it has just ended
        if parent == process.pid and b"spawn_main" in command:
            found.append(int(folder.name))
    return found


def killed_until_whole(shell, kills, of_workers, rng):
    """Search, and kill at random moments until there were `kills` kills or the search was done; how many there were."""
    flags = ["--n-jobs", 2] if of_workers else []
    done = 0
    process = shell.start("search", "--config", "slow.toml", *flags, **SLOWLY)
    while done < kills:
        before = rows(shell.folder / STORE)
        if len(before) >= CANDIDATES - 1:
            break
        wait_for_rows(shell.folder / STORE, max(1, len(before)), shell, process)
        time.sleep(rng.uniform(0.0, 0.4))
        if process.poll() is not None or len(rows(shell.folder / STORE)) >= CANDIDATES - 1:
            break
        if of_workers:
            there = workers(process)
            if not there:
                continue  # they have just been killed
            os.kill(rng.choice(there), signal.SIGKILL)
            done += 1
            more = min(CANDIDATES, len(rows(shell.folder / STORE)) + 1)
            wait_for_rows(shell.folder / STORE, more, shell, process)
        else:
            process.kill()
            process.communicate()
            done += 1
            kept = rows(shell.folder / STORE)
            assert kept[: len(before)] == before, "a trial that was there is lost"
            process = shell.start("search", "--config", "slow.toml", *flags, **SLOWLY)
            started = time.monotonic()
            while len(rows(shell.folder / STORE)) == len(kept) and process.poll() is None:
                assert time.monotonic() - started < PATIENCE
                time.sleep(0.01)
    shell.finish(process)
    return done


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for workers in /proc")
@pytest.mark.parametrize("of_workers", [False, True], ids=["the search", "its workers"])
def test_kills_in_the_middle_of_the_loop_change_nothing(shell, whole, of_workers):
    print(f"BITFRONT_KILLS_SEED={SEED}")
    rng, left = random.Random(SEED + of_workers), KILLS // 2
    expected = rows(whole / "runs/whole/trials.sqlite")
    while left > 0:
        shutil.rmtree(shell.folder / "runs", ignore_errors=True)
        shutil.copytree(whole, shell.folder, dirs_exist_ok=True)
        left -= killed_until_whole(shell, left, of_workers, rng)
        assert rows(shell.folder / STORE) == expected  # nothing lost, nothing twice, nothing else
        assert (shell.folder / "runs/slow/best.json").read_bytes() == (whole / "runs/whole/best.json").read_bytes()
        assert not list((shell.folder / "runs/slow").glob("trials.sqlite-*"))
