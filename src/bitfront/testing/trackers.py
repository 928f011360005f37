"""The conformance suite of trackers: what every tracker must do. The tests of each tracker run it.

from bitfront.testing import check_tracker
check_tracker(MyTracker, run, read)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from pydantic import ValidationError

from bitfront.engine.storage import store as stores
from bitfront.engine.storage.folder import STORE
from bitfront.engine.storage.run import Run
from bitfront.trackers import TRACKERS
from bitfront.trackers.base import Outcome, Point, Search, Tracker, TrackerSettings, search_of
from bitfront.trackers.course import Course

#: What a tracker shows of each trial: its number, and its values by name. A trial that is there twice is twice in it.
Read = Callable[[Search], Iterable[tuple[int, Mapping[str, float]]]]


def check_tracker(
    kind: str | type[Tracker],
    run: Run,
    read: Read,
    *,
    settings: TrackerSettings | None = None,
    files: tuple[Path, ...] = (),
) -> Search:
    """Assert that a tracker keeps every trial once: in one session, in several, and after one that was cut short.

    Args:
        kind: the registered name of the tracker, or its class.
        run: a run of three trials or more, at most 100; every complete one must be shown.
        read: reads the trials back with the tool itself, without the tracker. It is called after a session has ended.
        settings: those of the tracker; None: its defaults.
        files: what is given to the tracker beside the front: a picture, a page.

    Returns:
        The search that was tracked, for further tests of what is there.

    Raises:
        AssertionError: a promise is broken; the message says which.
        MissingExtraError: the tool is not installed.
    """
    kind = TRACKERS.get(kind) if isinstance(kind, str) else kind
    _check_facts(kind)
    kind.require(kind.__name__)
    with contextlib.closing(stores.read(run.folder / STORE)) as store:
        search = search_of(run, store.meta("identity"))
        points = Course(run, store).rest()
    assert 3 <= len(points) <= 100, "the run needs three trials or more, and at most 100"
    outcome = Outcome(run, ("number",), tuple((t.number,) for t in run.front), files)
    half = len(points) // 2

    def session(*given: list[Point], ended: bool = True) -> None:
        tracker = kind(settings)
        tracker.begin(search)
        for some in given:
            tracker.add(some)
        if ended:
            tracker.end(outcome)

    session(points[:half], points[:half], ended=False)  # as if the process were killed now
    session(points)
    _compare(kind, points, read(search), "after a session that was cut short")
    session(points[:half], points, points)
    _compare(kind, points, read(search), "after a session with nothing new")
    failed = kind(settings)
    failed.begin(search)
    failed.end(None)
    _compare(kind, points, read(search), "after a search that failed")
    return search


def _check_facts(kind: type[Tracker]) -> None:
    title = kind.__name__
    assert (kind.__doc__ or "").strip(), f"{title} needs a docstring: `bitfront list trackers` shows its first line"
    try:
        kind.Settings.model_validate({"no_such_key": 1})
    except ValidationError:
        return
    raise AssertionError(f"{title}: an unknown key in its settings is no error")


def _compare(
    kind: type[Tracker], points: list[Point], shown: Iterable[tuple[int, Mapping[str, float]]], when: str
) -> None:
    title, listed = kind.__name__, list(shown)
    numbers = [number for number, _ in listed]
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    assert not twice, f"{title}: {when}, trials {twice} are there more than once"
    expected = {point.number: point for point in points if point.trial}
    missing = sorted(expected.keys() - set(numbers))
    assert not missing, f"{title}: {when}, trials {missing} are not there"
    for number, values in listed:
        for name, value in (expected[number].trial or {}).items() if number in expected else ():
            there = values.get(name, math.nan)
            assert math.isclose(there, value, rel_tol=1e-6), f"{title}: {name} of {number} is {there}, not {value}"
