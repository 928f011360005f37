"""A run for other tools, as a user types it: convert, dashboard, --tensorboard."""

import csv
import json
import os
import signal
import socket
import time
import urllib.request

import pytest
from journey import PATIENCE, Typed, rows, wait_for_rows

pytestmark = pytest.mark.journey


def test_convert_writes_what_it_says(searched):
    typed = searched("convert", "small", "--to", "csv")
    assert typed.out == "runs/small/trials.csv\n"
    assert typed.err == "36 trials\n"
    with (searched.folder / "runs/small/trials.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 36
    typed = searched("convert", "runs/small", "--to", "csv", code=2)
    assert typed.err == "error: runs/small/trials.csv exists; --force overwrites it, --output names another file\n"
    assert typed.out == ""
    typed = searched("convert", "small", "--to", "optuna", "-o", "mine.db", "--json")
    assert json.loads(typed.out) == {"file": "mine.db", "format": "optuna", "trials": 36, "total": 36}
    assert typed.err == ""
    program = (
        "import optuna, sys; s = optuna.load_study(study_name='small', storage='sqlite:///mine.db'); "
        "print(len(s.trials), len(s.best_trials) > 0, sorted(s.trials[0].params))"
    )
    assert searched.python(program) == (
        "36 True ['fc1/data_in', 'fc1/weight', 'fc2/data_in', 'fc2/weight']\n"  # as `bitfront plan --json` names them
    )
    typed = searched("convert", "small", "--to", "csv", "--force", "--quiet", "--trials", 5)
    assert (typed.out, typed.err) == ("runs/small/trials.csv\n", "")


def test_mistakes_of_convert(searched):
    typed = searched("convert", "small", "--to", "excel", code=2)
    assert typed.err == "error: there is no format 'excel' to convert to; allowed: csv, parquet, optuna.\n"
    typed = searched("convert", "smal", "--to", "csv", code=2)
    assert "smal: there is no such run folder" in typed.err
    assert "Missing option '--to'" in searched("convert", "small", code=2).err


def get(address, path=""):
    with urllib.request.urlopen(address.split("/dashboard")[0] + path, timeout=PATIENCE) as answer:
        return json.loads(answer.read())


def test_the_dashboard_until_it_is_interrupted(searched):
    temp = searched.folder / "temp"
    temp.mkdir()
    searched.env |= {"TMPDIR": str(temp)}
    process = searched.start("dashboard", "small", "--port", 0, "--no-browser")
    address = process.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:")
    assert len(get(address, "/api/studies/1")["trials"]) == 36
    assert list(temp.iterdir())
    port = address.split(":")[2].split("/")[0]
    typed = searched("dashboard", "small", "--port", port, "--no-browser", code=2)
    assert typed.err == f"error: port {port} is in use; --port names another, --port 0 takes any that is free\n"
    process.send_signal(signal.SIGINT)
    typed = searched.finish(process, code=0)
    assert typed.err == "36 trials; new ones appear as they arrive; Ctrl-C ends it\n"
    assert not list(temp.iterdir())
    with socket.socket() as nobody:
        assert nobody.connect_ex(("127.0.0.1", int(port))) != 0


def test_the_dashboard_of_a_search_that_goes_on(trained):
    """Trials that are found while it is shown appear; a search that is killed does not matter to it."""
    search = ("search", "--config", "small.toml", "--sampler", "tpe")
    trained(*search, "--n-trials", 10)
    process = trained.start("dashboard", "small", "--port", 0, "--json", "--no-browser")
    text = ""
    while not text.endswith("}\n"):
        text += process.stdout.readline()
    address = json.loads(text)["address"]
    assert len(get(address, "/api/studies/1")["trials"]) == 10
    trained(*search, "--n-trials", 30, "--quiet")
    end = time.monotonic() + PATIENCE
    while len(get(address, "/api/studies/1")["trials"]) < 30 and time.monotonic() < end:
        time.sleep(0.2)
    assert [t["number"] for t in get(address, "/api/studies/1")["trials"]] == list(range(30))
    process.send_signal(signal.SIGTERM)
    trained.finish(process, code=0)


@pytest.mark.filterwarnings("ignore")
def test_a_killed_search_logs_every_trial_once(trained):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    search = ("search", "--config", "small.toml", "--sampler", "tpe", "--tensorboard", "--n-trials", 36)
    process = trained.start(*search)
    wait_for_rows(trained.folder / "runs/small/trials.sqlite", 5, trained, process)
    os.killpg(process.pid, signal.SIGKILL)
    trained.finish(process, code=None)
    typed: Typed = trained(*search, "--json")
    assert json.loads(typed.out)["trials"] == 36
    found = accumulator.EventAccumulator(str(trained.folder / "runs/small/tensorboard"), {"scalars": 0})
    found.Reload()
    stored = rows(trained.folder / "runs/small/trials.sqlite")
    assert [e.step for e in found.Scalars("objectives/accuracy")] == [row[0] for row in stored] == list(range(36))
    assert found.Scalars("front/size")[-1].step == 35
