"""A run folder as it is found: read-only, of an earlier version, edited, with leftovers, without its checkpoint."""

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bitfront as bf
from bitfront.api import dataset_of
from bitfront.checkpoints import load_checkpoint
from bitfront.engine.storage import database
from bitfront.engine.storage.run import UNCHECKED
from bitfront.errors import RunError, UserError
from bitfront.strategies.base import Strategy
from bitfront.strategies.surrogate import Surrogate

SPACE = {"linear": {"name": "integer", "data_in_width": [8], "weight_width": [2, 4, 8]}}
METRICS = {"accuracy": "maximize", "average_bitwidth": "minimize"}
DRAW = np.random.default_rng(0)
DATA = DRAW.normal(size=(60, 6)).astype("f4"), np.arange(60) % 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def search(folder, model=None, **more):
    return bf.search(
        model=model or network(), data=DATA, space=SPACE, metrics=METRICS, strategy="brute_force",
        project_dir=str(folder), project="run", **more,
    )  # fmt: skip


def values(run):
    return {name: column.tolist() for name, column in run.columns.metrics.items()}


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched")
    return search(folder), folder / "run"


@pytest.fixture
def folder(searched, tmp_path):
    shutil.copytree(searched[1], tmp_path / "run")
    return tmp_path / "run"


def without_checksums(folder):
    """The same run as an earlier version of Bitfront wrote it."""
    path = folder / "trials.sqlite"
    with database.reading(path) as db:
        tables = {name: list(database.select(db, path, name)) for name in database.TABLES}
    path.unlink()
    old = sqlite3.connect(path)
    for name, rows in tables.items():
        rows = [("format", "2") if row[0] == "format" else row for row in rows if row[0] != "config"]
        old.execute(f"CREATE TABLE {name} ({', '.join(database.TABLES[name])}{database._KEYS.get(name, '')})")
        old.executemany(f"INSERT INTO {name} VALUES ({', '.join('?' * len(database.TABLES[name]))})", rows)
    old.commit()
    old.execute("PRAGMA journal_mode = WAL")
    old.close()


def test_a_folder_of_an_earlier_version_is_read_and_says_what_is_not_checked(searched, folder):
    without_checksums(folder)
    run = bf.Run.load(folder)
    assert values(run) == values(searched[0])
    assert run.notes == (UNCHECKED,)
    again = search(folder.parent)
    assert again.stopped == "space exhausted"
    assert values(again) == values(searched[0])
    assert bf.Run.load(folder).notes == ()


@pytest.mark.parametrize("log", [False, True])
def test_a_folder_that_cannot_be_written_is_read(searched, folder, log, monkeypatch):
    """Root may write anywhere, so the system's answer is replaced; nothing in the folder changes."""
    if log:  # as a killed search leaves it
        script = (
            f"import sqlite3, os; db = sqlite3.connect({str(folder / 'trials.sqlite')!r}); "
            "db.execute('PRAGMA wal_autocheckpoint = 0'); db.execute(\"DELETE FROM meta WHERE key = 'nothing'\"); "
            'db.execute("CREATE TABLE more (x)"); db.commit(); os._exit(0)'
        )
        subprocess.run([sys.executable, "-c", script], check=True)
        assert (folder / "trials.sqlite-wal").stat().st_size
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert values(bf.Run.load(folder)) == values(searched[0])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_edited_configuration_is_not_taken_for_what_the_search_wrote(folder):
    path = folder / "config.toml"
    path.write_text(path.read_text().replace("seed = 0", "seed = 1"))
    with pytest.raises(RunError, match=r"config.toml is not what the search wrote.*writes it again"):
        bf.Run.load(folder)
    search(folder.parent)
    bf.Run.load(folder)


def test_a_format_of_the_future_and_a_format_that_lies(folder):
    path = folder / "trials.sqlite"
    for version, message in ((4, "its format is 4"), (2, "its format and its tables do not belong together")):
        db = sqlite3.connect(path)
        database.insert(db, "meta", ("format", str(version)))
        db.commit()
        db.close()
        with pytest.raises(RunError, match=message):
            bf.Run.load(folder)


def test_leftovers_of_dead_processes_are_deleted_and_those_of_others_stay(folder):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    scratch = Path(tempfile.gettempdir()) / f"bitfront-{dead.pid}-run-x"
    scratch.mkdir()
    leftovers = [
        folder / f".log.json.{dead.pid}.part",
        folder / "checkpoints" / f".searched.pt.{dead.pid}.part",
        folder / "checkpoints" / f".searched.pt.{'0' * 32}.tmp",
        scratch / "large",
    ]
    others = [folder / f".log.json.{os.getppid()}.part", folder / ".mine", folder / "notes.part"]
    for path in (*leftovers, *others):
        path.touch()
    search(folder.parent)
    assert not any(path.exists() for path in leftovers)
    assert not scratch.exists()
    assert all(path.exists() for path in others)


class Wanders(nn.Module):
    """Changes the working directory whenever it is called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        os.chdir("/")
        return self.two(torch.relu(self.one(x)))


def test_a_model_that_changes_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Wanders().eval()
    run = search("here", model)
    assert Path.cwd() == Path("/")
    assert sorted(p.name for p in (tmp_path / "here" / "run").iterdir() if not p.name.startswith(".")) == [
        "best.json", "calibration", "checkpoints", "config.toml", "log.json", "trials.sqlite",
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    number = run.front[0].number
    done = bf.transform_trial("here/run", number, model=model, data=dataset_of(DATA))
    assert (tmp_path / "here" / "run" / "transformed" / f"trial-{number}" / "model.pt").exists()
    assert done.trial.number == number


TOML = """
model = "jsc-tiny"
dataset = "npz"
dataset_path = "data.npz"
max_epochs = 1
project = "run"
[search.search_space]
setup.by = "type"
seed.linear.config = {name = "integer", data_in_width = [8], weight_width = [2, 4]}
[search.strategy]
name = "brute_force"
sw_runner.basic_evaluation = {}
metrics.accuracy.direction = "maximize"
"""


@pytest.mark.parametrize("source", ["trained", "load_name"])
def test_a_search_goes_on_with_nothing_but_the_weights_that_it_kept(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", X=DATA[0], y=DATA[1])
    Path("search.toml").write_text(TOML)
    more = {}
    if source == "load_name":
        torch.save(bf.train(bf.load_config("search.toml")).model.state_dict(), "mine.pt")
        shutil.rmtree("runs")
        more = {"load_name": "mine.pt"}
    first = bf.search("search.toml", **more)
    for path in [*Path("runs/run/checkpoints").glob("*"), *Path().glob("mine.pt")]:
        if not path.name.startswith("searched.pt"):
            path.unlink()
    second = bf.search("search.toml", **more)
    assert values(second) == values(first)
    assert not Path("runs/run/checkpoints/best.pt").exists(), "it was trained again"
    bf.transform_trial("runs/run", first.front[0].number, check=True)


def test_paths_with_every_kind_of_character(tmp_path):
    folder = tmp_path / "a [b] {c} ü ?#%20 'd'"
    run = search(folder)
    assert values(bf.Run.load(run.folder)) == values(run)
    with pytest.raises(RunError):
        bf.Run.load("nul\0here")
    with pytest.raises(RunError):
        bf.Run.load("x" * 5000)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
@pytest.mark.parametrize("name", ["trials.sqlite", "trials.sqlite-journal", "trials.sqlite-wal", "config.toml"])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(searched, folder, name):
    path = folder / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(UserError, match=rf"no {name}|{name}.*no regular file"):
        bf.transform_trial(folder, 0, model=network(), data=dataset_of(DATA))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_in_the_place_of_weights_or_beside_them_is_not_read(folder):
    path = folder / "checkpoints" / "searched.pt.json"
    path.unlink()
    os.mkfifo(path)
    weights = path.with_name("searched.pt")
    load_checkpoint(weights, network())
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(UserError, match=r"searched.pt is a pipe or a device"):
        load_checkpoint(weights, network())


def test_a_search_that_began_with_all_uniform_candidates_goes_on_as_it_began(tmp_path, monkeypatch):
    """An earlier version evaluated all of them, and what surrogate proposes depends on what it has seen."""
    widths = {"name": "integer", "data_in_width": [2, 4, 8], "weight_width": [2, 3, 4, 6, 8]}
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(6, 6), nn.ReLU())), nn.Linear(6, 3)).eval()

    def codes(project, n_trials):
        run = bf.search(
            model=model, data=DATA, space={"linear": widths}, metrics=METRICS, strategy="surrogate",
            n_trials=n_trials, project_dir=str(tmp_path), project=project,
        )  # fmt: skip
        return run.columns.code.tolist()

    fewer = codes("now", 30)
    with monkeypatch.context() as patch:
        patch.setattr(Surrogate, "promising", Strategy.promising)
        before = codes("before", 30)
        assert codes("resumed", 20) == before[:20] != fewer[:20]
    with closing(sqlite3.connect(tmp_path / "resumed" / "trials.sqlite")) as db, db:
        db.execute("DELETE FROM meta WHERE key = 'uniform'")
    assert codes("resumed", 30) == before
    assert codes("now", 20) == fewer
