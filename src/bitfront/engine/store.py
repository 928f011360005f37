"""Where trials are kept: one SQLite file per run, durable as soon as a trial is told.

Tables: ``meta`` (key, JSON value), ``trials`` (one row per evaluated candidate: number, code as little-endian 64-bit
integers, state, duration in seconds, error, and one column ``m:<metric>`` per metric), ``test_results`` (number,
metric, value: what was measured once on the test split). The file carries a format version, and the identity of the
run it belongs to; another identity is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bitfront.errors import EvaluationError, RunError
from bitfront.spaces.base import Codes

FORMAT = 1
Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Trials:
    """Evaluated candidates, by number. Columns of equal length.

    Attributes:
        code: shape (trials, parameters).
        metrics: metric name → values; NaN where it could not be measured.
        complete: whether the trial has all its metrics.
        duration: seconds.
        error: why it failed, else empty.
    """

    number: NDArray[np.int64]
    code: Codes
    metrics: Mapping[str, Values]
    complete: NDArray[np.bool_]
    duration: Values
    error: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.number)

    def position(self, number: int) -> int | None:
        """Row of the trial of that number."""
        at = np.flatnonzero(self.number == number)
        return int(at[0]) if len(at) else None


class Store:
    """The SQLite file of one run.

    Args:
        path: the file; made if it does not exist.
        metrics: names of the metrics, which become columns.
        parameters: number of columns of a code.
    """

    def __init__(self, path: Path, metrics: Sequence[str], parameters: int) -> None:
        self.path, self.metrics, self.parameters = path, tuple(metrics), parameters
        self._db = _connect(path)
        columns = ", ".join(f'"m:{m}" REAL' for m in self.metrics)
        with self._writing():
            self._db.execute("CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS trials (number INTEGER PRIMARY KEY, code BLOB UNIQUE NOT NULL, "
                f"state TEXT NOT NULL, duration REAL NOT NULL, error TEXT NOT NULL{', ' if columns else ''}{columns})"
            )
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS test_results (number INTEGER, metric TEXT, value REAL, "
                "PRIMARY KEY (number, metric))"
            )
            if self.meta("format") is None:
                self.set_meta("format", FORMAT)
        self._numbers: dict[bytes, int] = {}
        self._rows: dict[bytes, tuple[float, ...]] = {}
        self._next = 0

    @classmethod
    def open(cls, path: Path, metrics: Sequence[str], parameters: int, identity: Mapping[str, Any]) -> Self:
        """The store of a run that is about to start or go on.

        Candidates that failed in an earlier session are forgotten, so that they are tried again.

        Raises:
            RunError: the file belongs to another configuration; the differences are listed.
        """
        if path.exists():
            check_identity(path, identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        store = cls(path, metrics, parameters)
        with store._writing():
            store.set_meta("identity", identity)
            store._db.execute("DELETE FROM trials WHERE state = 'failed'")
        columns = "".join(f', "m:{m}"' for m in store.metrics)
        for number, code, *values in store._db.execute(f"SELECT number, code{columns} FROM trials"):
            store._numbers[code] = number
            store._rows[code] = tuple(np.nan if v is None else v for v in values)
            store._next = max(store._next, number + 1)
        return store

    def __len__(self) -> int:
        return len(self._numbers)

    def known(self, codes: Codes) -> NDArray[np.bool_]:
        """Which of `codes` have been evaluated."""
        return np.array([c.tobytes() in self._numbers for c in codes], dtype=bool)

    def values(self, codes: Codes) -> Mapping[str, Values]:
        """The metrics of known candidates, NaN for failed ones. Raises KeyError for an unknown one."""
        rows = np.array([self._rows[c.tobytes()] for c in codes]).reshape(len(codes), len(self.metrics))
        return {m: rows[:, i] for i, m in enumerate(self.metrics)}

    def add(
        self, codes: Codes, values: Mapping[str, Values], errors: Sequence[str], durations: Sequence[float]
    ) -> NDArray[np.int64]:
        """Write evaluated candidates, in one durable transaction; gives their numbers.

        Raises:
            EvaluationError: the file cannot be written (disk full, permissions). What was written before stays.
        """
        numbers = np.arange(self._next, self._next + len(codes), dtype=np.int64)
        table = np.stack([values[m] for m in self.metrics], axis=1) if self.metrics else np.zeros((len(codes), 0))
        marks = ", ".join("?" * (5 + len(self.metrics)))
        rows = [
            (
                int(n),
                c.tobytes(),
                "failed" if e else "complete",
                float(d),
                e,
                *(None if np.isnan(v) else float(v) for v in t),
            )
            for n, c, e, d, t in zip(numbers, codes, errors, durations, table, strict=True)
        ]
        with self._writing():
            self._db.executemany(f"INSERT INTO trials VALUES ({marks})", rows)
        for number, code, own, error in zip(numbers, codes, table, errors, strict=True):
            self._numbers[code.tobytes()] = int(number)
            # What a failed candidate has of metrics is kept in the file, but it must not look good to a strategy.
            self._rows[code.tobytes()] = tuple(np.full(len(own), np.nan) if error else own)
        self._next += len(codes)
        return numbers

    def trials(self) -> Trials:
        """Everything in the file, by number."""
        columns = "".join(f', "m:{m}"' for m in self.metrics)
        rows = self._db.execute(
            f"SELECT number, code, state, duration, error{columns} FROM trials ORDER BY number"
        ).fetchall()
        codes = np.frombuffer(b"".join(r[1] for r in rows), dtype="<i8").reshape(len(rows), self.parameters)
        return Trials(
            number=np.array([r[0] for r in rows], dtype=np.int64),
            code=codes.astype(np.int64),
            metrics={
                m: np.array([np.nan if r[5 + i] is None else r[5 + i] for r in rows], dtype=np.float64)
                for i, m in enumerate(self.metrics)
            },
            complete=np.array([r[2] == "complete" for r in rows], dtype=bool),
            duration=np.array([r[3] for r in rows], dtype=np.float64),
            error=tuple(r[4] for r in rows),
        )

    def meta(self, key: str) -> Any:
        """A value by key; None if it is not there."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def set_meta(self, key: str, value: Any) -> None:
        """Keep a JSON value by key."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    def test_results(self) -> dict[int, dict[str, float]]:
        """Trial number → metric → value on the test split."""
        found: dict[int, dict[str, float]] = {}
        for number, metric, value in self._db.execute("SELECT number, metric, value FROM test_results"):
            found.setdefault(number, {})[metric] = value
        return found

    def add_test_results(self, results: Mapping[int, Mapping[str, float]]) -> None:
        """Keep what was measured on the test split, so that it is measured once."""
        with self._writing():
            self._db.executemany(
                "INSERT OR REPLACE INTO test_results VALUES (?, ?, ?)",
                [(n, m, v) for n, own in results.items() for m, v in own.items()],
            )

    def close(self) -> None:
        """Close the file; the write-ahead log is folded into it."""
        self._db.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise EvaluationError(
                f"{self.path}: cannot be written: {error}. All trials told so far are safe; make room or fix the "
                "permissions, then give the same command again"
            ) from None


def _connect(path: Path) -> sqlite3.Connection:
    try:
        # isolation_level None: transactions begin and end where the code says so.
        db = sqlite3.connect(path, isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
    except sqlite3.Error as error:
        raise RunError(f"{path}: not a store of trials that can be opened: {error}") from None
    return db


def read(path: Path) -> Store:
    """The store of a finished, or still running, search.

    Raises:
        RunError: there is none at `path`, or it is of another version.
    """
    if not path.exists():
        raise RunError(f"{path}: there is no such file; a search writes it into its run folder")
    db = _connect(path)
    try:
        columns = [row[1] for row in db.execute("PRAGMA table_info(trials)")]
        metrics = [c.removeprefix("m:") for c in columns if c.startswith("m:")]
        version = db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
        identity = db.execute("SELECT value FROM meta WHERE key = 'identity'").fetchone()
    except sqlite3.Error as error:
        raise RunError(f"{path}: not a store of trials: {error}") from None
    finally:
        db.close()
    if version is None or identity is None or int(version[0]) != FORMAT:
        found = version[0] if version else "none"
        raise RunError(f"{path}: its format is {found}, and this version of Bitfront reads {FORMAT}")
    return Store(path, metrics, len(json.loads(identity[0])["parameters"]))


def check_identity(path: Path, identity: Mapping[str, Any], *, ignore: Sequence[str] = ()) -> None:
    """Raises RunError if the store at `path` belongs to a run of another identity, and lists what differs."""
    with contextlib.closing(_connect(path)) as db:
        try:
            row = db.execute("SELECT value FROM meta WHERE key = 'identity'").fetchone()
        except sqlite3.Error:
            row = None
    if row is None:
        return
    before, now = json.loads(row[0]), json.loads(json.dumps(identity))
    differences = [line for key in now if key not in ignore for line in _differences(key, before.get(key), now[key])]
    if differences:
        shown = "\n  ".join(differences[:6] + (["..."] if len(differences) > 6 else []))
        raise RunError(
            f"{path.parent}: this run folder holds trials of another configuration:\n  {shown}\n"
            "Give --restart to throw them away, or choose another name with --project"
        )


def _differences(key: str, before: Any, now: Any) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [line for k in keys for line in _differences(f"{key}.{k}", before.get(k), now.get(k))]
    return [] if before == now else [f"{key}: it has {_brief(before)}, asked for is {_brief(now)}"]


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the run folder for one search at a time. Raises RunError if another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ModuleNotFoundError:  # not a POSIX system: SQLite's own locks are all there is
        yield
        return
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"{folder}: another search is running in this folder; wait for it, or choose another --project"
            ) from None
        yield
    finally:
        os.close(handle)
