"""What a search logs for TensorBoard: every step once, however often it is resumed, and few of many."""

import sys

import numpy as np
import pytest

import bitfront as bf
from bitfront.engine.storage import store as stores
from bitfront.engine.storage.folder import STORE
from bitfront.engine.storage.store import Store
from bitfront.errors import MissingExtraError
from bitfront.events import Events, several
from bitfront.pareto import hypervolume, non_dominated
from bitfront.trackers import course
from bitfront.trackers.base import Search
from bitfront.trackers.tensorboard import FOLDER, TensorBoard
from synthetic_runs import drawn, write

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of what tensorboard imports
accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

METRICS = ("accuracy", "average_bitwidth", "loss")


def read(folder):
    """Tag → [(step, value)], in the order in which TensorBoard has them."""
    events = accumulator.EventAccumulator(str(folder / FOLDER), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def steps(scalars, tag):
    return [step for step, _ in scalars[tag]]


def begin(folder):
    """(tracker that has begun, course) of the run in a folder."""
    run = bf.Run.load(folder)
    log = TensorBoard()
    log.begin(Search("0" * 32, run, ""))
    return log, course.Course(run, stores.read(folder / STORE))


def write_log(folder):
    log, trials = begin(folder)
    log.add(trials.news())
    log.add(trials.rest())
    log.end(None)


def go_on(folder, count, seed):
    """The search has stored more trials."""
    codes, metrics = drawn(count, seed)
    store = Store.open(folder / STORE, list(METRICS), 2, {"parameters": [0, 1]})
    store.add(codes, metrics, [""] * count, [0.1] * count)
    store.close()


def test_every_trial_and_how_good_the_front_is(tmp_path):
    codes, metrics = drawn(30)
    run = write(tmp_path / "run", codes, metrics, errors=["", "lost", *[""] * 28])
    write_log(run.folder)
    scalars = read(run.folder)
    assert set(scalars) == {
        "objectives/accuracy",
        "objectives/average_bitwidth",
        "metrics/loss",
        "best/accuracy",
        "best/average_bitwidth",
        "front/size",
        "front/hypervolume",
    }
    assert steps(scalars, "objectives/accuracy") == steps(scalars, "metrics/loss") == [0, *range(2, 30)]
    assert [v for _, v in scalars["metrics/loss"]] == pytest.approx(np.delete(metrics["loss"], 1))
    assert steps(scalars, "best/accuracy") == steps(scalars, "front/size") == list(range(30))
    assert steps(scalars, "front/hypervolume") == list(range(19, 30))

    losses = np.stack([-metrics["accuracy"], metrics["average_bitwidth"]], axis=1)
    losses[1] = np.nan
    worst = np.fmax([-0.97, 32.0], np.nanmax(losses[:20], axis=0))
    for row in (19, 24, 29):
        some = losses[: row + 1]
        assert dict(scalars["best/accuracy"])[row] == pytest.approx(-np.nanmin(some[:, 0]))
        assert dict(scalars["best/average_bitwidth"])[row] == pytest.approx(np.nanmin(some[:, 1]))
        assert dict(scalars["front/size"])[row] == len(non_dominated(some))
        assert dict(scalars["front/hypervolume"])[row] == pytest.approx(hypervolume(some, worst))


def test_what_breaks_a_constraint_is_not_the_best(tmp_path):
    over = [{"text": "loss <= 0.5", "metric": "loss", "comparison": "<=", "bound": 0.5}]
    metrics = {"accuracy": [0.5, 0.9], "average_bitwidth": [4, 2], "loss": [0.1, 0.9]}
    run = write(tmp_path / "run", [[0, 0], [0, 1]], metrics, constraints=over)
    write_log(run.folder)
    scalars = read(run.folder)
    assert scalars["best/accuracy"] == [(0, 0.5), (1, 0.5)]
    assert scalars["front/size"] == [(0, 1.0), (1, 1.0)]
    assert steps(scalars, "objectives/accuracy") == [0, 1]


def test_one_session_or_several_log_the_same(tmp_path):
    whole = write(tmp_path / "whole", *drawn(25))
    go_on(whole.folder, 30, 1)
    write_log(whole.folder)
    parts = write(tmp_path / "parts", *drawn(25))
    write_log(parts.folder)
    write_log(parts.folder)  # nothing new
    go_on(parts.folder, 30, 1)
    write_log(parts.folder)
    scalars = read(parts.folder)
    assert scalars == read(whole.folder)
    assert all(steps(scalars, tag) == sorted(set(steps(scalars, tag))) for tag in scalars)


def test_what_a_kill_cut_short_is_logged_again(tmp_path):
    whole = write(tmp_path / "whole", *drawn(40))
    write_log(whole.folder)
    parts = write(tmp_path / "parts", *drawn(40))
    log, trials = begin(parts.folder)
    log.add(trials.news())
    (path,) = (parts.folder / FOLDER).iterdir()
    path.write_bytes(path.read_bytes()[:-40])  # half a record
    write_log(parts.folder)
    assert read(parts.folder) == read(whole.folder)
    log.end(None)


def test_of_many_trials_the_log_stays_short(tmp_path, monkeypatch):
    monkeypatch.setattr(course, "SINGLE", 50)
    codes, metrics = drawn(20_000)
    run = write(tmp_path / "long", codes, metrics)
    write_log(run.folder)
    scalars = read(run.folder)
    single = steps(scalars, "objectives/accuracy")
    assert single[:50] == list(range(50))
    assert set(run.columns.number[run.front_rows]) <= set(single)
    assert len(single) < 200
    ends = steps(scalars, "front/size")
    assert {0, 99, 100, 110, 1000, 1100, 10_000, 11_000, 19_000, 19_999} <= set(ends)
    assert len(ends) == 100 + 90 + 90 + 10 + 1
    assert scalars["front/size"][-1][1] == len(run.front_rows)


def test_several_listeners_hear_the_same():
    heard = []

    class Listener(Events):
        def note(self, text):
            heard.append((self, text))

    first, second = Listener(), Listener()
    both = several(first, second)
    both.note("hello")
    both.finishing()
    assert heard == [(first, "hello"), (second, "hello")]


def test_a_search_logs_itself_on_request(searched):
    run = searched(n_trials=4)
    assert not (run.folder / FOLDER).exists()
    run = searched(n_trials=6, tensorboard=True)
    assert steps(read(run.folder), "objectives/accuracy") == list(range(6))
    run = searched(tensorboard=True)
    assert steps(read(run.folder), "objectives/accuracy") == list(range(9))
    assert searched(tensorboard=True).stopped == "space exhausted"
    assert steps(read(run.folder), "objectives/accuracy") == list(range(9))
    run = searched(n_trials=3, tensorboard=True, restart=True)
    scalars = read(run.folder)
    assert steps(scalars, "objectives/accuracy") == list(range(3))
    assert [v for _, v in scalars["objectives/accuracy"]] == pytest.approx(run.columns.metrics["accuracy"])


def test_a_finished_search_is_logged_afterwards(searched):
    searched()
    assert steps(read(searched(tensorboard=True).folder), "objectives/accuracy") == list(range(9))


def test_without_the_extra_nothing_is_evaluated(searched, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(
        MissingExtraError, match=r"tensorboard=True needs tensorboard.*pip install 'bitfront\[tensorboard\]'"
    ):
        searched(tensorboard=True)
    assert not (tmp_path / "runs").exists()
