"""A run for other tools, as a user types it: convert, dashboard, --tensorboard."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from journey import PATIENCE, rows, wait_for_rows

pytestmark = pytest.mark.journey


def test_convert_writes_what_it_says(searched):
    lines = {
        "convert small --to csv": (0, "runs/small/trials.csv\n", "36 trials\n"),
        "convert runs/small --to csv": (
            2,
            "",
            "error: runs/small/trials.csv exists; --force overwrites it, --output names another file\n",
        ),
        "convert small --to csv --force --quiet --trials 5": (0, "runs/small/trials.csv\n", ""),
        "convert small --to optuna -o mine.db": (
            0,
            "mine.db\n",
            "36 trials\nsee it: optuna-dashboard sqlite:///mine.db\n",
        ),
        "convert small --to csv -o runs --force": (2, "", "error: runs is a folder; --output names a file\n"),
        "convert small --to excel": (
            2,
            "",
            "error: there is no format 'excel' to convert to; allowed: csv, parquet, optuna.\n",
        ),
    }
    lines["convert small --to parquet -o -"] = (
        2,
        "",
        "error: --output - is for --to csv without --json; give --output a file name for the others\n",
    )
    more = [
        "convert small --to parquet --json",
        "convert smal --to csv",
        "convert small",
        "convert small --to csv -o -",
    ]
    typed = searched.together(*lines, *more)
    for line, finished in zip(lines, typed, strict=False):
        assert finished == lines[line], line
    written, unknown, unsaid, printed = typed[len(lines) :]
    expected = {"file": "runs/small/trials.parquet", "format": "parquet", "trials": 36, "total": 36}
    assert json.loads(written[1]) == expected
    assert written[2] == ""
    assert unknown[0] == unsaid[0] == 2
    assert unknown[2] == "error: runs/smal: there is no such run folder; runs in runs: small\n"
    assert printed[2] == ""
    assert [int(row["number"]) for row in csv.DictReader(printed[1].splitlines())] == list(range(36))
    assert not (searched.folder / "-").exists()
    assert "Missing option '--to'" in unsaid[2]
    with (searched.folder / "runs/small/trials.csv").open(newline="") as file:
        numbers = [int(row["number"]) for row in csv.DictReader(file)]
    assert set(range(0, 36, 8)) <= set(numbers)  # 36 / 5, rounded up; and the front


def test_whoever_reads_a_table_may_have_enough(searched):
    words = f"{sys.executable} -m bitfront convert small --to csv --output -"
    done = subprocess.run(
        # The reader is gone before a word is written.
        ["bash", "-c", f"set -o pipefail; (sleep 0.3; exec {words}) | true"],
        cwd=searched.folder,
        env=searched.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def get(address, path=""):
    with urllib.request.urlopen(address.split("/dashboard")[0] + path, timeout=PATIENCE) as answer:
        return json.loads(answer.read())


def test_the_dashboard_while_a_search_goes_on_until_it_is_interrupted(trained):
    temp = trained.folder / "temp"
    temp.mkdir()
    trained.env |= {"TMPDIR": str(temp)}
    search = ("search", "--config", "small.toml", "--quiet")
    trained(*search, "--n-trials", 10)
    process = trained.start("dashboard", "small", "--port", 0, "--no-browser", cold=True)
    address = process.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:")
    assert len(get(address, "/api/studies/1")["trials"]) == 10
    assert list(temp.glob("bitfront-*-dashboard-*"))
    port = address.split(":")[2].split("/")[0]
    typed = trained("dashboard", "small", "--port", port, "--no-browser", code=2)
    assert typed.err == f"error: port {port} is in use; --port names another, --port 0 takes any that is free\n"
    trained(*search, "--n-trials", 30)
    end = time.monotonic() + PATIENCE
    while len(get(address, "/api/studies/1")["trials"]) < 30 and time.monotonic() < end:
        time.sleep(0.2)
    assert [t["number"] for t in get(address, "/api/studies/1")["trials"]] == list(range(30))
    process.send_signal(signal.SIGINT)
    typed = trained.finish(process, code=0)
    assert typed.err == "10 trials; new ones appear as they arrive; Ctrl-C ends it\n"
    assert not list(temp.glob("bitfront-*-dashboard-*"))
    with socket.socket() as nobody:
        assert nobody.connect_ex(("127.0.0.1", int(port))) != 0


@pytest.mark.filterwarnings("ignore")
def test_a_killed_search_logs_every_trial_once(trained):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    search = ("search", "--config", "small.toml", "--sampler", "tpe", "--tensorboard", "--n-trials", 36)
    process = trained.start(*search)
    wait_for_rows(trained.folder / "runs/small/trials.sqlite", 5, trained, process)
    os.killpg(process.pid, signal.SIGKILL)
    trained.finish(process, code=None)
    typed = trained(*search, "--json")
    assert json.loads(typed.out)["trials"] == 36
    events = accumulator.EventAccumulator(str(trained.folder / "runs/small/tensorboard"), {"scalars": 0})
    events.Reload()
    stored = rows(trained.folder / "runs/small/trials.sqlite")
    assert [e.step for e in events.Scalars("objectives/accuracy")] == [row[0] for row in stored] == list(range(36))
    assert events.Scalars("front/size")[-1].step == 35
