"""What a tracker is: it keeps the trials of a search, and at the end the front, in another tool.

``following.py`` calls it. The trials are read from the store, so a tracker never hears of a trial that is not on disk.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from bitfront.config import Table
from bitfront.engine.storage.folder import TRACKING
from bitfront.engine.storage.run import Run
from bitfront.errors import require
from bitfront.files import write_text

#: How the trials of a search appear.
Trials = Literal["steps", "runs"]
#: Packages whose versions are tags of a tracked search.
VERSIONS = ("bitfront", "torch", "numpy", "optuna")


class TrackerSettings(Table):
    """Settings of a tracker, from ``[search.track.NAME]``; this class has none. Unknown keys are errors."""


@dataclass(frozen=True, eq=False)
class Point:
    """What is tracked at one trial: the trial, the front after it, or both.

    Attributes:
        number: the number of the trial; it is the step.
        trial: its objectives and metrics by name; empty if it failed, None if it is not tracked itself.
        front: ``front/size``, ``front/hypervolume`` and the best values so far; empty where they are not tracked.
        failed: whether it failed.
        code: its canonical code.
    """

    number: int
    trial: Mapping[str, float] | None = None
    front: Mapping[str, float] = field(default_factory=dict)
    failed: bool = False
    code: tuple[int, ...] = ()

    @property
    def metrics(self) -> dict[str, float]:
        """Everything that is known here, by name, and ``failed`` (0 or 1) for a trial that is tracked itself."""
        return {**self.of_trial, **_finite(self.front)}

    @property
    def of_trial(self) -> dict[str, float]:
        """The same without the front."""
        return {} if self.trial is None else {**_finite(self.trial), "failed": float(self.failed)}


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if np.isfinite(value)}


@dataclass(frozen=True, eq=False)
class Search:
    """The search that is tracked.

    Attributes:
        id: 32 hexadecimal digits, the same for all sessions of a search. Another search in the same folder has another.
        run: what is in the run folder when tracking begins; its last trials may be missing.
        fingerprint: of everything that the trials depend on; equal for two searches whose trials can be compared.
    """

    id: str
    run: Run
    fingerprint: str

    @property
    def name(self) -> str:
        """That of the run folder."""
        return self.run.config.run_name

    @property
    def configuration(self) -> dict[str, str]:
        """The configuration: dotted key → value as text."""
        return flattened(self.run.config.effective())

    @property
    def tags(self) -> dict[str, str]:
        """Versions of the software, the fingerprint, and the run folder."""
        tags = {"bitfront.fingerprint": self.fingerprint, "bitfront.folder": str(self.run.folder)}
        for package in VERSIONS:
            try:
                tags[f"version.{package}"] = version(package)
            except PackageNotFoundError:
                continue  # Bitfront runs from its source, or an optional package is not there
        return tags | {"version.python": platform.python_version()}

    def choices(self, code: tuple[int, ...]) -> dict[str, str]:
        """The candidate with that code spelled out: dotted key → value as text."""
        return flattened(self.run.space.decode(np.array(code, dtype=np.int64)))

    def kept(self, tracker: str) -> dict[str, Any]:
        """What a tracker has kept in the run folder for later sessions; empty at first."""
        found = _tracking(self.run.folder).get(tracker)
        return found if isinstance(found, dict) else {}

    def keep(self, tracker: str, values: Mapping[str, Any]) -> None:
        """Keep values of a tracker, which can be written as JSON, in the run folder."""
        _write_tracking(self.run.folder, {**_tracking(self.run.folder), tracker: dict(values)})


def search_of(run: Run, identity: object) -> Search:
    """The search of a run folder. Its id is written there first, so that a tracker can be asked for it after a kill.

    Raises:
        RunError: the id cannot be written.
    """
    values = _tracking(run.folder)
    known = values.get("id")
    if not isinstance(known, str) or not re.fullmatch("[0-9a-f]{32}", known):
        known = uuid.uuid4().hex
        _write_tracking(run.folder, {"id": known})
    text = json.dumps(identity, sort_keys=True, default=str)
    return Search(known, run, hashlib.sha256(text.encode()).hexdigest()[:16])


def _tracking(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / TRACKING).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there is none yet, or it is damaged: then a new one begins
        return {}
    return values if isinstance(values, dict) else {}


def _write_tracking(folder: Path, values: Mapping[str, Any]) -> None:
    write_text(folder / TRACKING, json.dumps(values, indent=2) + "\n")


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a session of a search ends with.

    Attributes:
        run: all trials.
        columns: names of the columns of `rows`.
        rows: the front, a row per trial: numbers, or text.
        files: the configuration, and where they could be written the picture of the front and the report's page.
        interrupted: whether the user ended the session.
    """

    run: Run
    columns: tuple[str, ...]
    rows: tuple[tuple[float | str | None, ...], ...]
    files: tuple[Path, ...] = ()
    interrupted: bool = False

    @property
    def pictures(self) -> tuple[Path, ...]:
        """Those of the files that are pictures."""
        return tuple(path for path in self.files if path.suffix == ".png")

    @property
    def last(self) -> int:
        """The number of the last trial; -1 if there is none."""
        return int(self.run.columns.number[-1]) if len(self.run) else -1


class Tracker(ABC):
    """Keeps the trials of a search in another tool.

    **What it does.** ``begin`` opens the tool's run for this search: the one that an earlier session has made, or a new
    one. ``add`` keeps points. ``end`` keeps the front and closes. After an error in one of them, ``begin`` is called
    again later, and all points are given to ``add`` anew.

    **What it promises.** A point is kept once, however often it is given, in this session or in another one, also if
    a process was killed at any time. When ``add`` returns, the points are where a kill of this process does not reach
    them, or will be given again in the next session. To know what is there, it asks the tool.

    **What it may not do.** Use a network that the user has not asked for, or wait for one for more than some seconds.

    Attributes:
        Settings: its settings, from ``[search.track.NAME]``; they arrive as `settings`.
        module: what must be importable, e.g. ``"mlflow"``.
        extra: the extra of Bitfront that installs it; empty if another package brings the tracker.
        place: where the tool keeps the search and what shows it, for a note; ``begin`` sets it.
        takes_files: whether ``end`` uses the files of the outcome; the report is not drawn for who does not.
    """

    Settings: ClassVar[type[TrackerSettings]] = TrackerSettings
    settings: TrackerSettings
    module: ClassVar[str]
    extra: ClassVar[str]
    takes_files: ClassVar[bool] = True
    place: str = ""

    def __init__(self, settings: TrackerSettings | None = None) -> None:
        self.settings = self.Settings() if settings is None else settings

    @classmethod
    def require(cls, purpose: str, arguments: Sequence[str] = ()) -> None:
        """Raises MissingExtraError if the tool is not installed; `purpose` begins the message."""
        require(cls.module, cls.extra, purpose, arguments=arguments)

    @abstractmethod
    def begin(self, search: Search) -> None:
        """Open the run of this search, new or continued."""

    @abstractmethod
    def add(self, points: Sequence[Point]) -> None:
        """Keep points, in ascending order of their numbers; those that are kept already are left out."""

    @abstractmethod
    def end(self, outcome: Outcome | None) -> None:
        """Keep the outcome, if there is one, in place of that of an earlier session, and close everything.

        It is called after ``begin``, once; also after an error, and then without an outcome.
        """


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested tables as one: dotted key → text; lists and numbers as JSON."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat
