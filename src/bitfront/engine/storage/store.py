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

Each row ends with a checksum of its values (``database.py``).
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bitfront.engine.storage import database
from bitfront.engine.storage.database import FORMAT
from bitfront.engine.storage.replay import ReplayCursor
from bitfront.engine.storage.trials import Chunk, TrialColumns, Values, packed
from bitfront.errors import EvaluationError, RunError, parsing
from bitfront.files import shown
from bitfront.spaces.base import Codes
from bitfront.spaces.index import Keys

__all__ = ["FORMAT", "Store", "check_identity", "locked", "read", "same_outputs"]

#: Number of trials that are read at a time.
CHUNK = 2**15


class Store:
    """The SQLite file of one run.

    Args:
        path: the file; created if it does not exist.
        metrics: names of the metrics.
        parameters: number of columns of a code.
        keys: from codes to keys that identify candidates, as ``Space.keys``; None to use the codes as keys.
        reading: closes the file at the end, where it is opened only for reading; the file must exist then.
    """

    def __init__(
        self,
        path: Path,
        metrics: Sequence[str],
        parameters: int,
        keys: Callable[[Codes], Keys] | None = None,
        *,
        reading: contextlib.ExitStack | None = None,
    ) -> None:
        self.path, self.metrics, self.parameters = path, tuple(metrics), parameters
        self._keys = keys or _codes_as_keys
        self._next = self._added = 0
        self._earlier: ReplayCursor | None = None
        self._opened = reading or contextlib.ExitStack()
        if reading is not None:
            self._db = database.open_to_read(path, reading)
            return
        self._db = database.open_to_write(path)
        self._opened.callback(self._db.close)
        with self._writing():
            database.make_tables(self._db)
            if self.meta("format") is None:
                self.set_meta("format", FORMAT)
                self.set_meta("metrics", self.metrics)

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
            failures = [(number, error, 1) for number, error, _ in store._select("failures")]
            database.insert(store._db, "failures", *failures)
        store._next = store.next_number
        count = store._next - len(failures)
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
        # An error's text may have been put together from bytes that are no text.
        failures = [(first + i, e.encode("utf-8", "replace").decode(), 0) for i, e in enumerate(errors) if e]
        with self._writing():
            database.insert(self._db, "blocks", block)
            if failures:
                database.insert(self._db, "failures", *failures)
        self._next += count
        self._added += count
        return np.arange(first, first + count, dtype=np.int64)

    def trials(self, start: int = 0) -> TrialColumns:
        """All trials from number `start` on that are not forgotten, by number."""
        self._db.execute("BEGIN")  # one state of the file, even if another process writes to it meanwhile
        try:
            failed = self._select("failures", "WHERE NOT forgotten AND number >= ? ORDER BY number", (start,))
            errors = {number: error for number, error, _ in failed}
            parts = [part.after(int(np.searchsorted(part.number, start))) for part in self._chunks(start)]
        finally:
            self._db.execute("COMMIT")
        number = np.concatenate([np.zeros(0, dtype=np.int64), *(p.number for p in parts)])
        table = np.concatenate([np.zeros((len(self.metrics), 0)), *(p.table for p in parts)], axis=1)
        complete = np.ones(len(number), dtype=bool)
        if errors and not np.isin(list(errors), number).all():
            raise database.damaged(self.path, "a trial that failed is not there")
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
        failures = [number for number, *_ in self._select("failures", "WHERE forgotten ORDER BY number")]
        block = self._db.execute("SELECT max(first) FROM blocks WHERE first <= ?", (start,)).fetchone()[0]
        return self._read(block or 0, self.next_number, np.array(failures, dtype=np.int64))

    def _read(self, start: int, stop: int, forgotten: NDArray[np.int64]) -> Iterator[Chunk]:
        while start < stop:
            begin, read = start, []
            blocks = self._select("blocks", "WHERE first >= ? AND first < ? ORDER BY first", (start, stop))
            # While it is open, SQLite cannot move the write-ahead log into the file.
            with contextlib.closing(blocks):
                for first, count, codes, metrics, durations in blocks:
                    if first != start or count < 1:
                        raise database.damaged(self.path, f"trial {start} is not there")
                    with parsing(RunError, f"{shown(self.path)} is damaged: trials {first} and on", database.REMEDY):
                        chunk = self._chunk(first, count, codes, metrics, durations)
                    low, high = np.searchsorted(forgotten, (first, first + count))
                    read.append(chunk.without(forgotten[low:high] - first) if high > low else chunk)
                    start = first + count
                    if start - begin >= CHUNK:
                        break
            if start == begin:
                raise database.damaged(self.path, f"trial {start} is not there")
            yield Chunk.joined(read)

    def _chunk(self, first: int, count: int, codes: bytes, metrics: bytes, durations: bytes) -> Chunk:
        width = len(codes) // (count * self.parameters) if self.parameters else 1
        return Chunk(
            number=np.arange(first, first + count, dtype=np.int64),
            packed=np.frombuffer(codes, dtype=f"<u{width}").reshape(count, self.parameters),
            table=np.frombuffer(metrics, dtype="<f8").reshape(len(self.metrics), count),
            duration=np.frombuffer(durations, dtype="<f8").reshape(count),
        )

    def _select(
        self, table: str, clause: str = "", arguments: database.Row = ()
    ) -> Generator[database.Row, None, None]:
        return database.select(self._db, self.path, table, clause, arguments)

    @property
    def has_checksums(self) -> bool:
        """Whether damage to what is stored is noticed; files of earlier versions of Bitfront have no checksums."""
        return database.has_checksums(self._db)

    def meta(self, key: str) -> Any:
        """The JSON value of a key; None if there is none."""
        row = next(self._select("meta", "NOT INDEXED WHERE key = ?", (key,)), None)
        if row is None:
            return None
        with parsing(RunError, f"{shown(self.path)} is damaged: {key!r} of its table 'meta'", database.REMEDY):
            return json.loads(row[1])

    def set_meta(self, key: str, value: Any) -> None:
        """Store a JSON value under a key."""
        database.insert(self._db, "meta", (key, json.dumps(value)))

    def test_results(self) -> dict[int, dict[str, float]]:
        """Trial number → metric → value on the test split."""
        results: dict[int, dict[str, float]] = {}
        for number, metric, value in self._select("test_results", "NOT INDEXED"):
            results.setdefault(number, {})[metric] = value
        return results

    def add_test_results(self, results: Mapping[int, Mapping[str, float]]) -> None:
        """Store results on the test split: trial number → metric → value."""
        with self._writing():
            rows = [(n, m, float(v)) for n, metrics in results.items() for m, v in metrics.items()]
            database.insert(self._db, "test_results", *rows)

    def close(self) -> None:
        """Close the file. SQLite moves the write-ahead log into it."""
        self._opened.close()

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
                f"{shown(self.path)}: cannot be written: {error}. All trials written before are safe; free disk space "
                "or fix the permissions, then give the same command again"
            ) from None


def _codes_as_keys(codes: Codes) -> Keys:
    return codes if codes.shape[1] else np.zeros((len(codes), 1), dtype=np.int64)


def read(path: Path) -> Store:
    """The store of a finished, or still running, search, for reading alone; its folder need not be writable.

    Raises:
        RunError: there is none at `path`, it is damaged, or of another version.
    """
    if not path.exists():
        raise RunError(f"{shown(path)}: there is no such file; a search writes it into its run folder")
    with contextlib.ExitStack() as stack:
        store = Store(path, (), 0, reading=stack)
        meta = _meta(store._db, path)
        if not meta or "identity" not in meta:
            raise RunError(f"{shown(path)}: the search stopped before its first trial; start it again")
        database.check_structure(store._db, path)
        with parsing(RunError, f"{shown(path)} is damaged: its table 'meta'", database.REMEDY):
            store.metrics, store.parameters = tuple(meta["metrics"]), len(meta["identity"]["parameters"])
        store._opened = stack.pop_all()
        return store


def _meta(db: sqlite3.Connection, path: Path) -> dict[str, Any]:
    """The table ``meta``; empty in a file without any table, which a killed process may leave."""
    with parsing(RunError, f"{shown(path)}: not a store of trials", database.REMEDY):
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return {}
    return database.meta_of(db, path)


def check_identity(path: Path, identity: Mapping[str, Any], *, ignore: Sequence[str] = ()) -> None:
    """Raises RunError if the store at `path` is damaged, of another format, or belongs to another run; lists
    differences."""
    with database.reading(path) as db:
        meta = _meta(db, path)
        if "identity" not in meta:
            return
        database.check_structure(db, path)
    before, now = meta["identity"], json.loads(json.dumps(identity))
    if not isinstance(before, dict):
        raise database.damaged(path, "its identity is no table")
    keys = [key for key in {**now, **before} if key not in (*ignore, "forward")]
    differences = [line for key in keys for line in _differences(key, before.get(key), now.get(key))]
    if "forward" in before and not same_outputs(before["forward"], now["forward"]):
        differences.append("forward: the code of the model changed; its outputs on the same samples differ")
    if differences:
        listed = "\n  ".join(differences[:6] + (["..."] if len(differences) > 6 else []))
        raise RunError(
            f"{shown(path.parent)}: this run folder holds trials of another configuration:\n  {listed}\n"
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
    text = "nothing, or the default" if value is None else json.dumps(value)
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
            f"{shown(folder)}: another search is running in this folder; wait for it, or choose another one with "
            "project=...",
            arguments=["project=..."],
        ) from None
    try:
        yield
    finally:
        lock.release()
