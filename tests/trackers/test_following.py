"""Trackers that fail do not end a search, and get later what they lack."""

import pytest

from bitfront.events import Events
from bitfront.trackers import TRACKERS, following
from bitfront.trackers.base import Tracker

pytestmark = pytest.mark.slow


class Notes(Events):
    """Remembers what a search says."""

    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)


@pytest.fixture
def server(monkeypatch):
    """A tracker called ``fake``: what it has, and ``down`` by the name of the method that fails."""
    TRACKERS.names()
    for table in ("_members", "_aliases", "_files"):
        monkeypatch.setattr(TRACKERS, table, dict(getattr(TRACKERS, table)))
    monkeypatch.setattr(following, "REFRESH", 0.0)
    monkeypatch.setattr(following, "PAUSE", 0.0)

    class Server:
        down = ""
        kept = {}  # noqa: RUF012
        outcomes = []  # noqa: RUF012
        failures = 0

        @classmethod
        def reach(cls, method):
            if cls.down == method:
                cls.failures += 1
                raise ConnectionError("the server does not answer")

    @TRACKERS.register("fake")
    class Fake(Tracker):
        """Remembers trials."""

        module, extra, takes_files = "json", "", False

        def begin(self, search):
            Server.reach("begin")
            self.trials = Server.kept.setdefault(search.id, {})
            self.place = "nowhere"

        def add(self, points):
            for point in points:
                Server.reach("add")
                if point.number not in self.trials:
                    self.trials[point.number] = point.metrics

        def end(self, outcome):
            Server.reach("end")
            Server.outcomes.append(outcome)

    Server.kind = Fake
    return Server


def test_what_a_search_gives_to_a_tracker(server, searched):
    server.kind.takes_files = True
    run = searched(track="fake")
    (trials,) = server.kept.values()
    assert list(trials) == run.columns.number.tolist()
    assert [values["objectives/accuracy"] for values in trials.values()] == run.columns.metrics["accuracy"].tolist()
    (outcome,) = server.outcomes
    assert {path.name for path in outcome.files} == {"config.toml", "report.html", "front.png"}
    assert [row[0] for row in outcome.rows] == [trial.number for trial in run.front]
    assert outcome.columns[0] == "number"
    assert outcome.columns[-1] == "config"


@pytest.mark.parametrize("method", ["begin", "add", "end"])
def test_a_server_that_is_down(server, searched, method):
    notes = Notes()
    server.down = method
    run = searched(track=["fake"], events=notes, n_trials=6)
    assert run.stopped == "n_trials reached"
    assert server.failures > 1 or method == "end"
    about = [text for text in notes.texts if text.startswith("tracker fake: the server does not answer")]
    assert about[-1].endswith("is sent when the same command is given again")
    assert len(about) == (1 if method == "end" else 2)
    server.down = ""
    notes.texts.clear()
    run = searched(track="fake", events=notes)
    (trials,) = server.kept.values()
    assert list(trials) == run.columns.number.tolist() == list(range(9))
    assert notes.texts[-1] == "tracked: nowhere"
    assert not [text for text in notes.texts if text.startswith("tracker fake")]


def test_a_search_that_starts_again_is_another_one(server, searched):
    searched(track="fake", n_trials=3)
    searched(track="fake", n_trials=3, restart=True)
    assert [list(trials) for trials in server.kept.values()] == [[0, 1, 2], [0, 1, 2]]


def test_an_error_of_the_search_closes_the_tracker(server, searched):
    class Broken(Events):
        def finishing(self):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        searched(track="fake", events=Broken())
    (trials,) = server.kept.values()
    assert list(trials) == list(range(9))
    assert server.outcomes == [None]
