"""The store of trials: one SQLite file per run. A trial is on disk before the strategy learns of it.

Trials are written in the blocks in which they are evaluated, one row per block. For a million trials that is faster
than a row each, and they can be read as arrays. Tables:

- ``meta``: key, JSON value. Among them are the format's version, the names of the metrics, and the identity of the run
  that the file belongs to; a run with another identity is refused.
- ``blocks``: the number of the ``first`` trial, the number of trials (``count``), and three little-endian arrays:
  ``codes`` (count × parameters, unsigned integers of 1, 2, 4 or 8 bytes: ``length / count / parameters``),
  ``metrics`` (metrics × count, float64, NaN where a metric could not be measured) and ``durations`` in seconds (count,
  float64).
- ``failures``: ``number`` of a failed trial, its ``error``, and whether it is ``forgotten``, because the candidate was
  tried again under a new number when the run was resumed.
- ``test_results``: number of a trial, metric, value on the test split.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bitfront.engine.storage.replay import ReplayCursor
from bitfront.engine.storage.trials import Chunk, TrialColumns, Values, packed
from bitfront.errors import EvaluationError, RunError
from bitfront.spaces.base import Codes
from bitfront.spaces.index import Keys

FORMAT = 2
#: Number of trials that are read at a time.
CHUNK = 2**15


class Store:
    """The SQLite file of one run.

    Args:
        path: the file; created if it does not exist.
        metrics: names of the metrics.
        parameters: number of columns of a code.
        keys: from codes to keys that identify candidates, as ``Space.keys``; None to use the codes as keys.
    """

    def __init__(
        self, path: Path, metrics: Sequence[str], parameters: int, keys: Callable[[Codes], Keys] | None = None
    ) -> None:
        self.path, self.metrics, self.parameters = path, tuple(metrics), parameters
        self._keys = keys or _codes_as_keys
        self._db = _connect(path)
        with self._writing():
            for table in (
                "meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
                "blocks (first INTEGER PRIMARY KEY, count INTEGER NOT NULL, codes BLOB NOT NULL, "
                "metrics BLOB NOT NULL, durations BLOB NOT NULL)",
                "failures (number INTEGER PRIMARY KEY, error TEXT NOT NULL, forgotten INTEGER NOT NULL DEFAULT 0)",
                "test_results (number INTEGER, metric TEXT, value REAL, PRIMARY KEY (number, metric))",
            ):
                self._db.execute(f"CREATE TABLE IF NOT EXISTS {table}")
            if self.meta("format") is None:
                self.set_meta("format", FORMAT)
                self.set_meta("metrics", self.metrics)
        self._next = self._added = 0
        self._earlier: ReplayCursor | None = None

    @classmethod
    def open(
        cls,
        path: Path,
        metrics: Sequence[str],
        parameters: int,
        identity: Mapping[str, Any],
        keys: Callable[[Codes], Keys] | None = None,
    ) -> Self:
        """The store of a run that starts or is resumed.

        Candidates that failed in an earlier session are forgotten, so that they are tried again.

        Args:
            path, metrics, parameters, keys: as for the class.
            identity: everything that trials of this run depend on.

        Raises:
            RunError: the file belongs to another configuration (the message lists the differences), or was written by
                another version.
        """
        if path.exists():
            check_identity(path, identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        store = cls(path, metrics, parameters, keys)
        with store._writing():
            store.set_meta("identity", identity)
            store._db.execute("UPDATE failures SET forgotten = 1")
        store._next = store.next_number
        failed = store._db.execute("SELECT count(*) FROM failures").fetchone()[0]
        count = store._db.execute("SELECT coalesce(sum(count), 0) FROM blocks").fetchone()[0] - failed
        store._earlier = ReplayCursor(store._chunks(), count, len(store.metrics), store._keys)
        return store

    def __len__(self) -> int:
        return self._added + (len(self._earlier) if self._earlier else 0)

    def recall(self, codes: Codes) -> tuple[NDArray[np.bool_], Mapping[str, Values]]:
        """The metrics of candidates that earlier sessions evaluated.

        This is fast if the candidates come in the order in which they are stored, as in a resumed run.

        Args:
            codes: candidates, int64, shape (candidates, parameters).

        Returns:
            (whether each candidate is stored, bool, shape (candidates,); metric → values, float64, shape
            (candidates,), NaN for candidates that are not stored).
        """
        if self._earlier is None:
            return np.zeros(len(codes), dtype=bool), {m: np.full(len(codes), np.nan) for m in self.metrics}
        known, table = self._earlier.recall(codes)
        return known, dict(zip(self.metrics, table, strict=True))

    def add(
        self, codes: Codes, values: Mapping[str, Values], errors: Sequence[str], durations: Sequence[float] | Values
    ) -> NDArray[np.int64]:
        """Write evaluated candidates in one transaction. None of them may be in the store.

        Args:
            codes: int64, shape (candidates, parameters).
            values: metric → values, float64, shape (candidates,); NaN where one could not be measured.
            errors: why each candidate failed; empty for one that did not.
            durations: time of each evaluation in seconds, shape (candidates,).

        Returns:
            The numbers of the new trials, int64, shape (candidates,).

        Raises:
            EvaluationError: the file cannot be written (disk full, permissions). Earlier trials stay in it.
        """
        first, count = self._next, len(codes)
        if not count:
            return np.zeros(0, dtype=np.int64)
        table = np.stack([values[m] for m in self.metrics]) if self.metrics else np.zeros((0, count))
        block = (
            first,
            count,
            packed(codes).tobytes(),
            table.astype("<f8", copy=False).tobytes(),
            np.asarray(durations, dtype="<f8").tobytes(),
        )
        failures = [(first + i, error) for i, error in enumerate(errors) if error] if any(errors) else []
        with self._writing():
            self._db.execute("INSERT INTO blocks VALUES (?, ?, ?, ?, ?)", block)
            if failures:
                self._db.executemany("INSERT INTO failures (number, error) VALUES (?, ?)", failures)
        self._next += count
        self._added += count
        return np.arange(first, first + count, dtype=np.int64)

    def trials(self, start: int = 0) -> TrialColumns:
        """All trials from number `start` on that are not forgotten, by number."""
        self._db.execute("BEGIN")  # one state of the file, even if another process writes to it meanwhile
        try:
            failed = "SELECT number, error FROM failures WHERE NOT forgotten AND number >= ? ORDER BY number"
            errors = dict(self._db.execute(failed, (start,)))
            parts = [part.after(int(np.searchsorted(part.number, start))) for part in self._chunks(start)]
        finally:
            self._db.execute("COMMIT")
        number = np.concatenate([np.zeros(0, dtype=np.int64), *(p.number for p in parts)])
        table = np.concatenate([np.zeros((len(self.metrics), 0)), *(p.table for p in parts)], axis=1)
        complete = np.ones(len(number), dtype=bool)
        complete[np.searchsorted(number, list(errors))] = False
        return TrialColumns(
            number=number,
            packed=np.concatenate([np.zeros((0, self.parameters), dtype="<u1"), *(p.packed for p in parts)]),
            metrics=dict(zip(self.metrics, table, strict=True)),
            complete=complete,
            duration=np.concatenate([np.zeros(0), *(p.duration for p in parts)]),
            errors=errors,
        )

    @property
    def next_number(self) -> int:
        """The number of the next trial: the number of all trials in the file, with those that are forgotten."""
        last = self._db.execute("SELECT first + count FROM blocks ORDER BY first DESC LIMIT 1").fetchone()
        return int(last[0]) if last else 0

    def _chunks(self, start: int = 0) -> Iterator[Chunk]:
        """The trials that are now in the file and not forgotten, by number, some tens of thousands at a time. The first
        block is the one that contains trial number `start`."""
        failures = self._db.execute("SELECT number FROM failures WHERE forgotten ORDER BY number").fetchall()
        block = self._db.execute("SELECT max(first) FROM blocks WHERE first <= ?", (start,)).fetchone()[0]
        return self._read(block or 0, self.next_number, np.array(failures, dtype=np.int64).ravel())

    def _read(self, start: int, stop: int, forgotten: NDArray[np.int64]) -> Iterator[Chunk]:
        while start < stop:
            begin, read = start, []
            blocks = self._db.execute(
                "SELECT * FROM blocks WHERE first >= ? AND first < ? ORDER BY first", (start, stop)
            )
            for first, count, codes, metrics, durations in blocks:
                width = len(codes) // (count * self.parameters) if self.parameters else 1
                chunk = Chunk(
                    number=np.arange(first, first + count, dtype=np.int64),
                    packed=np.frombuffer(codes, dtype=f"<u{width}").reshape(count, self.parameters),
                    table=np.frombuffer(metrics, dtype="<f8").reshape(len(self.metrics), count),
                    duration=np.frombuffer(durations, dtype="<f8"),
                )
                low, high = np.searchsorted(forgotten, (first, first + count))
                read.append(chunk.without(forgotten[low:high] - first) if high > low else chunk)
                start = first + count
                if start - begin >= CHUNK:
                    break
            blocks.close()  # while it is open, SQLite cannot move the write-ahead log into the file
            yield Chunk.joined(read)

    def meta(self, key: str) -> Any:
        """The JSON value of a key; None if there is none."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def set_meta(self, key: str, value: Any) -> None:
        """Store a JSON value under a key."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    def test_results(self) -> dict[int, dict[str, float]]:
        """Trial number → metric → value on the test split."""
        results: dict[int, dict[str, float]] = {}
        for number, metric, value in self._db.execute("SELECT number, metric, value FROM test_results"):
            results.setdefault(number, {})[metric] = value
        return results

    def add_test_results(self, results: Mapping[int, Mapping[str, float]]) -> None:
        """Store results on the test split: trial number → metric → value."""
        with self._writing():
            self._db.executemany(
                "INSERT OR REPLACE INTO test_results VALUES (?, ?, ?)",
                [(number, m, v) for number, metrics in results.items() for m, v in metrics.items()],
            )

    def close(self) -> None:
        """Close the file. SQLite moves the write-ahead log into it."""
        self._db.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except BaseException as error:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            if not isinstance(error, sqlite3.Error):
                raise
            raise EvaluationError(
                f"{self.path}: cannot be written: {error}. All trials written before are safe; free disk space or fix "
                "the permissions, then give the same command again"
            ) from None


def _codes_as_keys(codes: Codes) -> Keys:
    return codes if codes.shape[1] else np.zeros((len(codes), 1), dtype=np.int64)


def _connect(path: Path) -> sqlite3.Connection:
    try:
        # isolation_level None: transactions begin and end only where this code says so.
        db = sqlite3.connect(path, isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
    except sqlite3.Error as error:
        raise RunError(f"{path}: cannot be opened as a store of trials: {error}") from None
    return db


def read(path: Path) -> Store:
    """The store of a finished or running search.

    Raises:
        RunError: there is no store at `path`, or it was written by another version.
    """
    if not path.exists():
        raise RunError(f"{path}: there is no such file; a search writes it into its run folder")
    with contextlib.closing(_connect(path)) as db:
        try:
            meta = {key: json.loads(value) for key, value in db.execute("SELECT key, value FROM meta")}
        except sqlite3.Error as error:
            raise RunError(f"{path}: this is not a store of trials: {error}") from None
    _check_format(path, meta.get("format"))
    if "identity" not in meta:
        raise RunError(f"{path}: the search stopped before its first trial; start it again")
    return Store(path, meta["metrics"], len(meta["identity"]["parameters"]))


def _check_format(path: Path, version: Any) -> None:
    if version != FORMAT:
        raise RunError(
            f"{path}: its format is {version or 'none'}, and this version of Bitfront reads {FORMAT}. Read it with the "
            "version that wrote it, or give restart=True to delete it",
            arguments=["restart=True"],
        )


def check_identity(path: Path, identity: Mapping[str, Any], *, ignore: Sequence[str] = ()) -> None:
    """Check that the store at `path` belongs to the run with this identity.

    Args:
        path: the file.
        identity: everything that trials of the run depend on.
        ignore: keys of `identity` that are not compared.

    Raises:
        RunError: the store has another format, or another identity; the message lists the differences.
    """
    with contextlib.closing(_connect(path)) as db:
        try:
            meta = {key: json.loads(value) for key, value in db.execute("SELECT key, value FROM meta")}
        except sqlite3.Error:
            return
    if "identity" not in meta:
        return
    _check_format(path, meta.get("format"))
    before, now = meta["identity"], json.loads(json.dumps(identity))
    keys = [key for key in {**now, **before} if key not in (*ignore, "forward")]
    differences = [line for key in keys for line in _differences(key, before.get(key), now.get(key))]
    if "forward" in before and not same_outputs(before["forward"], now["forward"]):
        differences.append("forward: the code of the model changed; its outputs on the same samples differ")
    if differences:
        shown = "\n  ".join(differences[:6] + (["..."] if len(differences) > 6 else []))
        raise RunError(
            f"{path.parent}: this run folder holds trials of another configuration:\n  {shown}\n"
            "Give restart=True to delete them, or choose another name with project=...",
            arguments=["restart=True", "project=..."],
        )


def same_outputs(before: object, now: object) -> bool:
    """Whether two forward fingerprints are equal, except for last digits, which depend on the machine."""
    if not (isinstance(before, list) and isinstance(now, list) and len(before) == len(now)):
        return False
    a, b = np.array(before, dtype=float), np.array(now, dtype=float)
    return bool(np.allclose(a, b, rtol=1e-3, atol=1e-3 * float(np.abs(a).max(initial=0.0))))


def _differences(key: str, before: Any, now: Any) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [line for k in keys for line in _differences(f"{key}.{k}", before.get(k), now.get(k))]
    return [] if before == now else [f"{key}: it has {_brief(before)}, requested is {_brief(now)}"]


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the run folder, so that one search at a time uses it. The system releases the lock of a killed process.

    Raises:
        RunError: another process has locked it.
        OSError: the folder cannot be written.
    """
    from filelock import FileLock, Timeout  # imported here, because reading a run needs no lock

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(
            f"{folder}: another search is running in this folder; wait for it, or choose another one with project=...",
            arguments=["project=..."],
        ) from None
    try:
        yield
    finally:
        lock.release()
