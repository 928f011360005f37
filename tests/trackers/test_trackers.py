"""Every tracker keeps every trial once, read back with the tool itself."""

import contextlib
import os
import sys

import numpy as np
import pytest

import bitfront as bf
import tracked
from bitfront import config, listing
from bitfront.engine.storage import store as stores
from bitfront.engine.storage.folder import STORE, TRACKING
from bitfront.errors import ConfigError, MissingExtraError
from bitfront.registry import names_in_source
from bitfront.testing import check_tracker
from bitfront.trackers import TRACKERS
from bitfront.trackers.base import Outcome, search_of
from bitfront.trackers.configured import configured_trackers
from bitfront.trackers.course import Course
from bitfront.trackers.mlflow import MLflow, MLflowSettings
from bitfront.trackers.trackio import TrackioSettings
from synthetic_runs import drawn, write

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of what the tools import
ALL = list(range(12))


@pytest.fixture
def files(tmp_path, twelve):
    import matplotlib.image

    matplotlib.image.imsave(tmp_path / "front.png", np.zeros((4, 4)))
    (tmp_path / "report.html").write_text("<p>page</p>", encoding="utf-8")
    return twelve.folder / "config.toml", tmp_path / "report.html", tmp_path / "front.png"


def numbers(trials):
    return sorted(number for number, _ in trials)


def test_mlflow_steps(database, twelve, files, monkeypatch):
    pytest.importorskip("mlflow")
    search = check_tracker("mlflow", twelve, lambda s: tracked.mlflow_steps(twelve.folder, s.id), files=files)
    trials = dict(tracked.mlflow_steps(twelve.folder, search.id))
    assert list(trials) == ALL
    assert [number for number, values in trials.items() if values["failed"]] == [1]
    client, run = tracked.mlflow_run(twelve.folder, search.id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    assert run.data.params["model"] == "digits-mlp"
    assert run.data.params["search.strategy.name"] == "brute_force"
    assert run.data.tags["bitfront.fingerprint"] == search.fingerprint
    assert run.data.tags["version.torch"]
    assert run.info.status == "FAILED"  # the last session of the suite
    listed = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert listed == {"front.json", "config.toml", "report.html", "front.png"}
    table = client.load_table(run.info.experiment_id, "front.json", [run.info.run_id])
    assert table["number"].tolist() == [trial.number for trial in twelve.front]
    assert not (twelve.folder / "mlruns").exists()


def test_mlflow_child_runs(database, twelve, files):
    pytest.importorskip("mlflow")
    settings = MLflowSettings(trials="runs")
    read = lambda s: tracked.mlflow_children(twelve.folder, s.id)  # noqa: E731
    search = check_tracker("mlflow", twelve, read, settings=settings)
    assert numbers(read(search)) == ALL
    client, run = tracked.mlflow_run(twelve.folder, search.id)
    children = client.search_runs([run.info.experiment_id], "tags.`bitfront.trial` = '1'")
    assert [child.info.status for child in children] == ["FAILED"]
    assert children[0].data.params["fc1.config.name"] == "integer"
    assert max(m.step for m in client.get_metric_history(run.info.run_id, "front/size")) == 11


def test_a_changed_value_of_the_configuration_is_a_tag(database, twelve):
    pytest.importorskip("mlflow")
    search = check_tracker("mlflow", twelve, lambda s: tracked.mlflow_steps(twelve.folder, s.id))
    path = twelve.folder / "config.toml"
    path.write_text("seed = 7\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    check_tracker("mlflow", bf.Run.load(twelve.folder), lambda s: tracked.mlflow_steps(twelve.folder, s.id))
    _, run = tracked.mlflow_run(twelve.folder, search.id)
    assert (run.data.params["seed"], run.data.tags["bitfront.now.seed"]) == ("0", "7")


def test_trackio_steps(twelve, files):
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    search = check_tracker("trackio", twelve, lambda s: tracked.trackio_steps(s.id), files=files)
    assert numbers(tracked.trackio_steps(search.id)) == ALL
    described = storage.get_run_config("bitfront", search.name, run_id=search.id)
    assert described["model"] == "digits-mlp"
    assert described["bitfront.fingerprint"] == search.fingerprint
    fronts = [row for row in storage.get_logs("bitfront", run_id=search.id) if "front" in row]
    (front,) = fronts
    assert [row["number"] for row in front["front"]["_value"]] == [trial.number for trial in twelve.front]
    assert front["front/picture"]["_type"] == "trackio.image"
    (kept,) = [a for a in storage.get_artifacts("bitfront") if search.id[:8] in a["name"]]
    assert kept["type"] == "report"


def test_trackio_runs(twelve):
    pytest.importorskip("trackio")
    settings = TrackioSettings(project="many", trials="runs")
    read = lambda s: tracked.trackio_runs(s.id, "many")  # noqa: E731
    search = check_tracker("trackio", twelve, read, settings=settings)
    assert numbers(read(search)) == ALL


def test_tensorboard(twelve):
    pytest.importorskip("tensorboard")
    check_tracker("tensorboard", twelve, lambda s: tracked.tensorboard_steps(twelve.folder))


def test_wandb_in_files(twelve, files):
    pytest.importorskip("wandb")
    read = lambda s: tracked.wandb_steps(twelve.folder, s.id)  # noqa: E731
    search = check_tracker("wandb", twelve, read, files=files)
    assert numbers(read(search)) == ALL


class Killed(BaseException):
    """In place of the end of the process."""


@pytest.mark.parametrize(("trials", "read"), [("steps", tracked.mlflow_steps), ("runs", tracked.mlflow_children)])
def test_a_kill_after_any_request(database, tmp_path, monkeypatch, trials, read):
    """A session dies after its first request, another one after its second ...; each time the next session mends it."""
    client = pytest.importorskip("mlflow.tracking").MlflowClient
    run = write(tmp_path / "runs" / "two", *drawn(2), errors=["lost", ""])
    left = [0]

    def dying(request):
        def call(*arguments, **named):
            answer = request(*arguments, **named)
            left[0] -= 1
            if not left[0]:
                raise Killed
            return answer

        return call

    for name in ("create_experiment", "create_run", "update_run", "log_batch", "set_terminated", "log_dict", "set_tag"):
        monkeypatch.setattr(client, name, dying(getattr(client, name)))

    def session(requests):
        left[0] = requests
        tracker = MLflow(MLflowSettings(trials=trials))
        with contextlib.closing(stores.read(run.folder / STORE)) as store:
            search, course = search_of(run, store.meta("identity")), Course(run, store)
            tracker.begin(search)
            tracker.add(course.rest())
        tracker.end(Outcome(run, ("number",), ((0,),)))
        return search

    # After every third one; after every single one with make all.
    step = 1 if "BITFRONT_ALL" in os.environ else 3
    killed, whole = 0, False
    while not whole:
        (run.folder / TRACKING).unlink(missing_ok=True)  # as another search
        try:
            session(killed * step + 1)
            whole = True
        except Killed:
            killed += 1
            assert numbers(read(run.folder, session(-1).id)) == [0, 1]
    assert killed * step >= 8


def test_what_a_configuration_names(monkeypatch, tmp_path):
    file = tmp_path / "c.toml"

    def trackers(lines, **changes):
        file.write_text(f"[search]\n{lines}\n[search.strategy]\n", encoding="utf-8")
        loaded = config.load_config(file, {f"search.{key}": value for key, value in changes.items()})
        return {name: tracker.settings.model_dump() for name, tracker in configured_trackers(loaded).items()}

    for name in TRACKERS.names():
        monkeypatch.setattr(TRACKERS.get(name), "require", lambda *arguments: None)
    tensorboard, mlflow = {}, {"uri": None, "experiment": "bitfront", "trials": "steps"}
    assert trackers("") == {}
    assert trackers('track = "MLflow"') == {"mlflow": mlflow}
    assert trackers('track = ["mlflow", "tensorboard"]') == {"mlflow": mlflow, "tensorboard": tensorboard}
    table = '[search.track.mlflow]\ntrials = "runs"'
    assert trackers(table) == {"mlflow": {**mlflow, "trials": "runs"}}
    assert trackers(table, track=["tensorboard", "mlflow"]) == {
        "mlflow": {**mlflow, "trials": "runs"},
        "tensorboard": tensorboard,
    }
    assert trackers('track = "mlflow"', track="tensorboard") == {"mlflow": mlflow, "tensorboard": tensorboard}
    assert trackers("", track={"mlflow": {"trials": "runs"}}) == {"mlflow": {**mlflow, "trials": "runs"}}
    assert trackers("tensorboard = true", track="tensorboard") == {"tensorboard": tensorboard}
    with pytest.raises(ConfigError, match=r"c\.toml:3: search\.track\.mlflow\.trails: unknown key.*'trials'"):
        trackers('[search.track.mlflow]\ntrails = "runs"')
    with pytest.raises(
        ConfigError, match=r"c\.toml:2: search\.track\.mlfow: there is no tracker.*Did you mean 'mlflow'"
    ):
        trackers("[search.track.mlfow]")
    with pytest.raises(ConfigError, match=r"c\.toml:2: search\.track"):
        trackers("track = 3")


def test_without_the_extra_nothing_begins(searched, tmp_path, monkeypatch):
    for name in TRACKERS.names():
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(MissingExtraError, match=rf"track='{name}' needs {name}.*pip install 'bitfront\[{name}\]'"):
            searched(track=name)
    assert not (tmp_path / "runs").exists()


def test_names_are_known_without_an_import():
    assert names_in_source("bitfront.trackers") == TRACKERS.names() == ["mlflow", "tensorboard", "trackio", "wandb"]
    _, rows = listing.members("trackers")
    assert [row[0] for row in rows] == TRACKERS.names()
    assert all(row[1] for row in rows)
