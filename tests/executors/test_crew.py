"""A crew on executors that do their worst: every piece of work comes back once, and only the guilty are lost."""

from concurrent.futures import BrokenExecutor, Future
from dataclasses import replace
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Hostile

from bitfront.errors import EvaluationError
from bitfront.executors import calls
from bitfront.executors.base import Launched, Launcher, LauncherSettings
from bitfront.executors.crew import Done, Lost
from bitfront.executors.versions import of_this_process
from bitfront.testing.executors import Numbers, crew_of, squares


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), sizes=st.lists(st.integers(1, 9), max_size=12), bad=st.sets(st.integers(0, 40)))
def test_every_piece_comes_back_once_and_only_the_guilty_are_lost(seed, sizes, bad):
    pieces, start = [], 0
    for size in sizes:
        pieces.append(Numbers([-n - 1 if n in bad else n for n in range(start, start + size)]))
        start += size
    numbers = [n for piece in pieces for n in piece.argument]
    some = crew_of(Hostile(seed))
    with mock.patch("bitfront.executors.crew.LAUNCHES", 1000):  # all of them may be bad
        done, lost = squares(some, pieces)
    assert done == sorted(n * n for n in numbers if n >= 0)
    assert lost == sorted(n for n in numbers if n < 0)
    assert some.status.out == 0


def test_a_piece_without_an_answer_goes_to_another_worker(monkeypatch):
    monkeypatch.setattr("bitfront.executors.crew.OVERDUE", 0.3)
    some = crew_of(Hostile(3, breaks=0.0, loses=0.0, hangs=0.3))
    assert squares(some, [Numbers([n]) for n in range(30)])[0] == [n * n for n in range(30)]


class Deaf(Hostile):
    """Its first executor never answers."""

    def launch(self, workers, prepare=None):
        self.shares["hangs"] = 0.0 if self.launches else 1.0
        return super().launch(workers, prepare)


def test_an_executor_without_any_answer_is_launched_again(monkeypatch):
    monkeypatch.setattr("bitfront.executors.crew.OVERDUE", 0.1)
    deaf = Deaf(0, breaks=0.0, loses=0.0)
    some = crew_of(deaf)
    some._longest = 0.001  # as if there had been an answer before
    assert squares(some, [Numbers([n]) for n in range(9)])[0] == [n * n for n in range(9)]
    assert deaf.launches == 2


class Early(Launcher):
    """The first `deaths` calls lose their worker before it begins."""

    title = "early"

    def __init__(self, deaths):
        super().__init__(LauncherSettings())
        self.deaths = deaths

    def launch(self, workers, prepare=None):
        return Launched(self, lambda: workers, lambda: "", lambda: None)

    def submit(self, function, call):
        future, self.deaths = Future(), self.deaths - 1
        if self.deaths >= 0:
            future.set_exception(BrokenExecutor("killed"))
        else:
            future.set_result(function(call))
        return future


@pytest.mark.parametrize(("deaths", "marked", "lost"), [(6, True, []), (8, True, []), (9, True, [7]), (4, False, [7])])
def test_a_worker_that_dies_before_it_begins_did_not_die_of_its_work(tmp_path, deaths, marked, lost):
    some = crew_of(Early(deaths), folder=tmp_path if marked else None)
    with mock.patch("bitfront.executors.crew.LAUNCHES", 1000):
        assert squares(some, [Numbers([7])]) == ([] if lost else [49], lost)


def test_where_nobody_answers_the_search_ends():
    some = crew_of(Hostile(0, LauncherSettings(block_timeout=0.1), breaks=0.0, loses=0.0, hangs=1.0))
    with pytest.raises(
        EvaluationError, match=r"hostile: a block .* no answer after \d s \(block_timeout\).*to 1 workers"
    ):
        squares(some, [Numbers([1])])


def test_an_executor_that_always_breaks_ends_the_search():
    with pytest.raises(EvaluationError, match=r"it broke 8 times before a worker answered, the last time with"):
        squares(crew_of(Hostile(breaks=1.0)), [Numbers([n]) for n in range(40)])


class Empty(Hostile):
    """Has no worker."""

    def launch(self, workers, prepare=None):
        return Launched(super().launch(workers).executor, lambda: 0, lambda: "", lambda: None)


def test_without_workers_the_search_ends():
    none = Empty(0, LauncherSettings(worker_timeout=0.2), breaks=0.0, loses=0.0, hangs=1.0)
    with pytest.raises(EvaluationError, match=r"no worker for 0\.2 s \(worker_timeout\).*start workers"):
        squares(crew_of(none), [Numbers([1])])


class Gone(Hostile):
    """Its scheduler has ended."""

    def launch(self, workers, prepare=None):
        return replace(super().launch(workers), gone=lambda: "the scheduler is gone")


def test_a_scheduler_that_vanishes_ends_the_search():
    with pytest.raises(EvaluationError, match=r"hostile: the scheduler is gone\. Everything so far is stored"):
        squares(crew_of(Gone(breaks=0.0, loses=0.0, hangs=1.0)), [Numbers([1])])


@pytest.mark.parametrize("lost", [False, True])
def test_what_is_shared_is_sent_to_who_cannot_read_it(tmp_path, lost, monkeypatch):
    monkeypatch.setattr(calls, "_OPENED", type(calls._OPENED)())
    some = crew_of(Hostile(breaks=0.0, loses=0.0), folder=tmp_path / "shared")
    if lost:
        monkeypatch.setattr(calls.Path, "read_bytes", lambda _: b"something else")
    assert squares(some, [Numbers([2])]) == ([4], [])
    (file,) = (tmp_path / "shared").iterdir()
    assert file.suffix == ".job"


def test_a_worker_of_another_version_gets_no_work(monkeypatch):
    other = replace(of_this_process(), torch="1.0", source="ab")
    monkeypatch.setattr(calls, "of_this_process", lambda: other)
    with pytest.raises(EvaluationError) as caught:
        squares(crew_of(Hostile(breaks=0.0, loses=0.0)), [Numbers([1])])
    text = str(caught.value)
    assert f"the worker {calls.worker_name()} could compute other bits" in text
    assert f"torch: {of_this_process().torch!r} here, '1.0' there; source files of bitfront" in text


def test_when_the_caller_stops_nothing_is_out():
    some, waiting = crew_of(Hostile(1)), iter([Numbers([n]) for n in range(20)])
    for outcome in some.outcomes(lambda: next(waiting, None)):
        assert isinstance(outcome, Done | Lost)
        break
    assert some.status.out == 0
    assert squares(some, [Numbers([3])]) == ([9], [])
