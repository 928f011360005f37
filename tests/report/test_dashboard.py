"""The dashboard: what it serves, to whom, and that new trials appear."""

import json
import shutil
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest

from bitfront.engine.storage.folder import STORE
from bitfront.engine.storage.run import Run
from bitfront.engine.storage.store import Store
from bitfront.errors import ConfigError, MissingExtraError, RunError, UserError
from bitfront.report import dashboard, study
from bitfront.report.dashboard import for_this_computer, served
from synthetic_runs import write

pytest.importorskip("optuna_dashboard")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of what the dashboard imports
PATIENCE = 60


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Looks at the run often, and keeps its files where a test can see them."""
    monkeypatch.setattr(dashboard, "REFRESH", 0.05)
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))


@contextmanager
def running(folder, **options):
    """(address, function that asks the dashboard's JSON API)."""
    with served(folder, 0, **options) as server:
        thread = threading.Thread(target=server.wait, daemon=True)
        thread.start()
        root = server.address.split("/dashboard")[0]

        def ask(path):
            with urllib.request.urlopen(root + path, timeout=PATIENCE) as answer:
                return json.loads(answer.read())

        yield server, ask
    thread.join(PATIENCE)
    assert not thread.is_alive(), "it ends with the block"


def add(folder, codes, accuracy):
    store = Store.open(folder / STORE, ["accuracy", "average_bitwidth"], 2, {"parameters": [0, 1]})
    store.add(
        np.array(codes), {"accuracy": np.array(accuracy), "average_bitwidth": np.ones(len(codes))}, [""] * len(codes), [0.1] * len(codes)
    )  # fmt: skip
    store.close()


def numbers(ask, study=1):
    return [t["number"] for t in ask(f"/api/studies/{study}?after=0")["trials"]]


def wait_for(ask, wanted, study=1):
    """The dashboard reads its storage every two seconds."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if numbers(ask, study) == wanted:
            return
        time.sleep(0.1)
    pytest.fail(f"there are {numbers(ask, study)}, not {wanted}")


@pytest.mark.parametrize("layout", [study.SCHEMA, -1], ids=["known", "unknown"])
def test_it_serves_the_trials_and_those_that_arrive_later(six, tmp_path, monkeypatch, layout):
    """Also where the layout of Optuna's tables is not known, so that Optuna has to write."""
    monkeypatch.setattr(study, "SCHEMA", layout)
    folder = shutil.copytree(six.folder, tmp_path / "six")
    with running(folder) as (server, ask):
        assert server.address.startswith("http://127.0.0.1:")
        assert (server.trials, server.total) == (6, 6)
        with urllib.request.urlopen(server.address, timeout=PATIENCE) as page:
            assert b"<html" in page.read().lower()
        assert [s["study_name"] for s in ask("/api/studies")["study_summaries"]] == ["six"]
        first = ask("/api/studies/1?after=0")["trials"][0]
        assert {p["name"]: p["param_external_value"] for p in first["params"]} == {
            "fc1/data_in": "int4.auto",
            "fc1/weight": "int2.auto",
        }
        assert first["values"] == list(six.trial(0).values)
        assert numbers(ask) == list(range(6))
        add(folder, [[0, 0], [1, 1]], [0.5, 0.6])
        wait_for(ask, list(range(8)))
        assert list((tmp_path / "temp").iterdir())
    assert not list((tmp_path / "temp").iterdir())
    assert [t.number for t in Run.load(folder).trials] == list(range(8))


def test_a_run_begun_again_is_another_study(six, tmp_path):
    folder = shutil.copytree(six.folder, tmp_path / "six")
    with running(folder) as (_, ask):
        assert numbers(ask) == list(range(6))
        shutil.rmtree(folder)
        write(folder, [[0, 1], [1, 1]], {"accuracy": [0.1, 0.2], "average_bitwidth": [1.0, 2.0]})
        end = time.monotonic() + PATIENCE
        while len(ask("/api/studies")["study_summaries"]) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        assert [s["study_name"] for s in ask("/api/studies")["study_summaries"]] == ["six", "six (2)"]
        wait_for(ask, [0, 1], study=2)
        assert numbers(ask) == list(range(6))


def test_of_a_longer_run_a_sample_that_only_grows(tmp_path):
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, 2, 100), rng.integers(0, 3, 100)], axis=1)
    run = write(tmp_path / "long", codes, {"accuracy": rng.random(100), "average_bitwidth": rng.random(100)})
    with running(run.folder, trials=10) as (server, ask):
        before = numbers(ask)
        assert before == sorted({*range(0, 100, 10), *run.columns.number[run.front_rows].tolist()})
        assert (server.trials, server.total) == (len(before), 100)
        add(run.folder, [[0, 0]] * 11, [2.0, *[0.0] * 10])
        wait_for(ask, [*before, 100, 108])  # 100 is on the front, 108 one of every 12


def test_only_this_computer_can_see_it(six):
    with served(six.folder, 0) as server:
        port = int(server.address.split(":")[2].split("/")[0])
        with socket.socket() as other:
            other.settimeout(5)
            # The whole of 127.0.0.0/8 is this computer; whoever listened on all addresses would answer here too.
            assert other.connect_ex(("127.0.0.2", port)) != 0
        with socket.socket() as loopback:
            assert loopback.connect_ex(("127.0.0.1", port)) == 0
        taken = rf"port {port} is in use; port=\.\.\. names another, port=0 takes any that is free"
        with pytest.raises(UserError, match=taken), served(six.folder, port):
            pass


def test_mistakes(six, tmp_path, monkeypatch):
    for options, error, message in (
        ({"run": six.folder, "port": 70000}, ConfigError, "port: 70000 is not possible: 0 .* to 65535"),
        ({"run": six.folder, "trials": 0}, ConfigError, "trials: 0 is not possible"),
        ({"run": tmp_path / "nothing"}, RunError, "there is no such run folder"),
    ):
        with pytest.raises(error, match=message), served(**options):
            pass
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    missing = r"needs optuna_dashboard.*pip install 'bitfront\[dashboard\]'"
    with pytest.raises(MissingExtraError, match=missing), served(six.folder):
        pass


def answered(host, port):
    """(status, body) of what a guarded application says to a request that names `host`."""
    said = []
    app = for_this_computer(lambda environ, start: start("200 OK", []) or [b"a study"], port)
    environ = {} if host is None else {"HTTP_HOST": host}
    return b"".join(app(environ, lambda status, headers: said.append((status, dict(headers))))), *said


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost:8080", "LocalHost:8080", "[::1]:8080"])
def test_requests_that_name_this_computer_are_answered(host):
    assert answered(host, 8080) == (b"a study", ("200 OK", {}))
    assert answered(host.removesuffix(":8080"), 80)[0] == b"a study"


@pytest.mark.parametrize(
    "host",
    ["evil.example:8080", "localhost.evil.example:8080", "127.0.0.1.evil:8080", "127.0.0.1:80", "localhost", "", None],
)
def test_requests_that_name_another_computer_are_refused(host):
    """A name of another site that points here would let that site read the run."""
    body, (status, headers) = answered(host, 8080)
    assert status == "403 Forbidden"
    assert headers["Content-Type"].startswith("text/plain")
    assert body == b"The dashboard is for this computer only: open http://127.0.0.1:8080/\n"


def test_a_foreign_name_is_refused_by_the_server(six):
    with running(six.folder) as (server, ask):
        request = urllib.request.Request(server.address, headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(request, timeout=PATIENCE)
        assert numbers(ask) == [0, 1, 2, 3, 4, 5]
