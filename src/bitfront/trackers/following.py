"""Follows a search with trackers. They read the stored trials, from time to time while it runs and at the end.

A tracker that fails does not end the search. A note says so once; later the tracker is opened anew and gets every
trial again, of which it keeps those that it lacks. What it lacks at the end, it gets when the search is resumed.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bitfront.engine.storage import store as stores
from bitfront.engine.storage.folder import STORE
from bitfront.engine.storage.run import Run
from bitfront.engine.storage.trial import Trial
from bitfront.errors import BitfrontError, MissingExtraError, cause
from bitfront.events import Events, several
from bitfront.files import scratch
from bitfront.trackers.base import Outcome, Tracker, search_of
from bitfront.trackers.course import Course

if TYPE_CHECKING:
    from bitfront.engine.planning.plan import Plan
    from bitfront.engine.search.loop import Progress
    from bitfront.engine.storage.store import Store

#: Least number of seconds between two reads of the store.
REFRESH = 1.0
#: Seconds until a tracker that has failed is tried again; twice as many after each further time.
PAUSE = 30.0


@contextlib.contextmanager
def followed(folder: Path, trackers: Mapping[str, Tracker], events: Events) -> Iterator[Events]:
    """Follow a search: the events to search with. Leaving the context gives the trackers what they still lack.

    Args:
        folder: the run folder; the search may create it later.
        trackers: by name.
        events: receives the same events, and notes about trackers that fail.
    """
    follower = _Follower(folder, trackers, events)
    try:
        yield several(events, follower)
    except BaseException:
        follower.end(searched=False)
        raise
    follower.end(searched=True)


class _Follower(Events):
    """Gives new trials to trackers while a search runs."""

    def __init__(self, folder: Path, trackers: Mapping[str, Tracker], events: Events) -> None:
        self._folder, self._note = folder, events.note
        self._lines = [_Line(name, tracker, folder, events.note) for name, tracker in trackers.items()]
        self._begun = False

    def planned(self, plan: Plan, seconds: float) -> None:  # noqa: ARG002
        """Note that the search has begun: from now on the store exists."""
        self._begun = True

    def progress(self, progress: Progress, plan: Plan) -> None:  # noqa: ARG002
        """Track the new trials in the store."""
        for line in self._lines:
            line.catch_up()

    def end(self, searched: bool) -> None:
        """Track the remaining trials; all trials if the search had nothing left to evaluate. Never raises.

        Args:
            searched: whether the search ended without an error, so that there is an outcome.
        """
        if not self._begun:
            return
        with contextlib.ExitStack() as stack:
            outcome = None
            if searched:
                drawn = any(line.takes_files for line in self._lines)
                try:
                    outcome = _outcome(self._folder, stack.enter_context(scratch("report")), drawn, self._note)
                except (BitfrontError, OSError) as error:
                    self._note(f"trackers get no front: {cause(error)}")
            for line in self._lines:
                line.end(outcome)


class _Line:
    """One tracker, and how far it is."""

    def __init__(self, name: str, tracker: Tracker, folder: Path, note: Callable[[str], None]) -> None:
        self._name, self._tracker, self._folder, self._note = name, tracker, folder, note
        self._store: Store | None = None
        self._course: Course | None = None
        self._next, self._failures = 0.0, 0

    @property
    def takes_files(self) -> bool:
        """Whether the tracker uses the files of the outcome."""
        return self._tracker.takes_files

    def catch_up(self) -> None:
        """Track the trials that were stored since the last call, at most once per ``REFRESH`` seconds."""
        if time.monotonic() < self._next:
            return
        try:
            self._tracker.add(self._opened().news())
            self._next = time.monotonic() + REFRESH
        except Exception as error:  # somebody else's tool, with somebody else's server
            if not self._failures:
                self._note(
                    f"tracker {self._name}: {cause(error)}; the search goes on, and what is missing is sent later"
                )
            self._drop()
            self._next = time.monotonic() + PAUSE * 2**self._failures
            self._failures += 1

    def end(self, outcome: Outcome | None) -> None:
        """Track what is left, and close."""
        try:
            course = self._opened()
            self._tracker.add(course.rest())
            self._tracker.end(outcome)
            self._course = None
            if self._tracker.place:
                self._note(f"tracked: {self._tracker.place}")
        except Exception as error:
            self._note(
                f"tracker {self._name}: {cause(error)}; what it lacks is in the run folder, and is sent when the same "
                "command is given again"
            )
        self._drop()

    def _opened(self) -> Course:
        if self._course is None:
            run = Run.load(self._folder)
            self._store = stores.read(self._folder / STORE)
            search = search_of(run, self._store.meta("identity"))
            self._tracker.begin(search)
            self._course = Course(run, self._store)
        return self._course

    def _drop(self) -> None:
        """Close everything; the next attempt begins anew."""
        if self._store is not None:
            self._store.close()
        if self._course is not None:
            with contextlib.suppress(Exception):  # it has failed before, and the user knows
                self._tracker.end(None)
        self._store = self._course = None


def _outcome(folder: Path, output: Path, drawn: bool, note: Callable[[str], None]) -> Outcome:
    """What the session ended with; with `drawn`, the picture of the front and the report's page are written."""
    run = Run.load(folder)
    interrupted = run.stopped == "interrupted"
    files = [folder / "config.toml"]
    if drawn and not interrupted and run.front:
        from bitfront.report.writing import write_report

        try:
            report = write_report(run, output)
            files += [report.page, *(p for p in report.figures if p.name == "front.png")]
        except MissingExtraError as error:
            note(f"trackers get no picture and no page: {error}")
    metrics = list(run.columns.metrics)
    tests = list(dict.fromkeys(name for trial in run.front for name in trial.test_metrics))
    columns = ("number", *metrics, *(f"test_{name}" for name in tests), "config")
    rows = tuple(_row(trial, metrics, tests) for trial in run.front)
    return Outcome(run, columns, rows, tuple(files), interrupted)


def _row(trial: Trial, metrics: list[str], tests: list[str]) -> tuple[float | str | None, ...]:
    values = [trial.metrics.get(name) for name in metrics] + [trial.test_metrics.get(name) for name in tests]
    known = (None if value is None or value != value else value for value in values)  # NaN is not equal to itself
    return trial.number, *known, json.dumps(trial.config)
