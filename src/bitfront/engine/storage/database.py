"""The SQLite file of a run: opened for writing or only for reading, with a checksum in every row.

SQLite notices damage to the structure of its file, and not to the values in it: a single wrong bit would change a
result. So each row ends with the CRC-32 of its values. Files of format 2 have no checksums; they are read as they are,
and get them when a search goes on in them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bitfront.errors import RunError, parsing
from bitfront.files import scratch, shown

FORMAT = 3
#: The format that has no checksums.
WITHOUT_CHECKSUMS = 2
#: Table → its columns; a column ``checksum`` follows them.
TABLES = {
    "meta": ("key TEXT PRIMARY KEY", "value TEXT NOT NULL"),
    "blocks": (
        "first INTEGER PRIMARY KEY",
        "count INTEGER NOT NULL",
        "codes BLOB NOT NULL",
        "metrics BLOB NOT NULL",
        "durations BLOB NOT NULL",
    ),
    "failures": ("number INTEGER PRIMARY KEY", "error TEXT NOT NULL", "forgotten INTEGER NOT NULL DEFAULT 0"),
    "test_results": ("number INTEGER", "metric TEXT", "value REAL"),
}
_KEYS = {"test_results": ", PRIMARY KEY (number, metric)"}
REMEDY = "restore the run folder from a copy, or give restart=True to search again"
Row = tuple[Any, ...]


def columns(table: str) -> str:
    """The names of a table's columns, the checksum excepted."""
    return ", ".join(column.split()[0] for column in TABLES[table])


def checksum(*values: Any) -> int:
    """CRC-32 over the values of a row, each with its type and length."""
    crc = 0
    for value in values:
        data = value if isinstance(value, bytes) else repr(value).encode()
        crc = zlib.crc32(data, zlib.crc32(f"{type(value).__name__}{len(data)}:".encode(), crc))
    return crc


def insert(db: sqlite3.Connection, table: str, *rows: Row) -> None:
    """Write rows with their checksums; those with the same key are replaced."""
    places = ", ".join("?" * (len(TABLES[table]) + 1))
    statement = f"INSERT OR REPLACE INTO {table} ({columns(table)}, checksum) VALUES ({places})"
    db.executemany(statement, [(*row, checksum(*row)) for row in rows])


def select(
    db: sqlite3.Connection, path: Path, table: str, clause: str = "", arguments: Row = ()
) -> Generator[Row, None, None]:
    """Rows of a table, once their checksums are right; `clause` is what follows the name of the table.

    Raises:
        RunError: a row is damaged.
    """
    with parsing(RunError, f"{shown(path)} is damaged", REMEDY):
        stored = ", checksum" if has_checksums(db) else ""
        with contextlib.closing(
            db.execute(f"SELECT {columns(table)}{stored} FROM {table} {clause}", arguments)
        ) as rows:
            for row in rows:
                if stored and checksum(*row[:-1]) != row[-1]:
                    raise damaged(path, f"a row of its table {table!r} differs from its checksum")
                yield row[:-1] if stored else row


def damaged(path: Path, what: str) -> RunError:
    """The error for a file whose content cannot be true."""
    return RunError(f"{shown(path)} is damaged: {what}; {REMEDY}", arguments=["restart=True"])


def has_checksums(db: sqlite3.Connection) -> bool:
    """Whether the rows of this file have checksums."""
    return any(name == "checksum" for _, name, *_ in db.execute("PRAGMA table_info(meta)"))


def meta_of(db: sqlite3.Connection, path: Path) -> dict[str, Any]:
    """Everything in the table ``meta``. Raises RunError where it is damaged, or of a format that is not known."""
    with parsing(RunError, f"{shown(path)} is damaged", REMEDY):
        # By the rows, and not by their index, in which damage would hide a row.
        found = {key: json.loads(value) for key, value in select(db, path, "meta", "NOT INDEXED")}
    version = found.get("format")
    if found and version not in (FORMAT, WITHOUT_CHECKSUMS):
        raise RunError(
            f"{shown(path)}: its format is {version or 'none'}, and this version of Bitfront reads "
            f"{FORMAT} and {WITHOUT_CHECKSUMS}. Read it with the version that wrote it, or give restart=True to "
            "delete it",
            arguments=["restart=True"],
        )
    if found and has_checksums(db) != (version == FORMAT):
        raise damaged(path, "its format and its tables do not belong together")
    return found


def check_structure(db: sqlite3.Connection, path: Path) -> None:
    """Raises RunError where SQLite finds the structure of the file damaged: rows might be missing."""
    with parsing(RunError, f"{shown(path)} is damaged", REMEDY):
        (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise damaged(path, found.splitlines()[-1])


def open_to_write(path: Path) -> sqlite3.Connection:
    """The file, made where it does not exist, with the tables of this format.

    Raises:
        RunError: it is no such file.
        sqlite3.Error: it cannot be written.
    """
    with parsing(RunError, f"{shown(path)}: not a store of trials that can be opened", REMEDY):
        _check_files(path)
        # isolation_level None: transactions begin and end where the code says so.
        db = sqlite3.connect(path, isolation_level=None)
    try:
        with parsing(RunError, f"{shown(path)}: not a store of trials that can be opened", REMEDY):
            db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        return db
    except BaseException:
        db.close()
        raise


def _check_files(path: Path) -> None:
    """Raises RunError where SQLite would open what is no file: a pipe never answers, and a device never ends."""
    for beside in ("", "-journal", "-wal", "-shm"):
        file = path.with_name(path.name + beside)
        if file.exists() and not file.is_file():
            raise damaged(file, "it is no regular file")


def make_tables(db: sqlite3.Connection) -> None:
    """Make the tables that are missing, and give checksums to rows that have none; within a transaction."""
    for table, own in TABLES.items():
        places = f"{', '.join(own)}, checksum INTEGER NOT NULL DEFAULT 0{_KEYS.get(table, '')}"
        db.execute(f"CREATE TABLE IF NOT EXISTS {table} ({places})")
    if not has_checksums(db):
        db.create_function("checksum_of", -1, checksum, deterministic=True)
        for table in TABLES:
            db.execute(f"ALTER TABLE {table} ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0")
            if table == "meta":
                db.execute("UPDATE meta SET value = ? WHERE key = 'format'", (json.dumps(FORMAT),))
            db.execute(f"UPDATE {table} SET checksum = checksum_of({columns(table)})")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """As :func:`open_to_read`, for as long as the context lasts."""
    with contextlib.ExitStack() as stack:
        yield open_to_read(path, stack)


def open_to_read(path: Path, stack: contextlib.ExitStack) -> sqlite3.Connection:
    """The file, for reading alone; closed by `stack`. The folder need not be writable, and a search may go on in it.

    Raises:
        RunError: it cannot be opened.
    """
    log = path.with_name(f"{path.name}-wal")
    writable = os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)
    with parsing(RunError, f"{shown(path)}: not a store of trials that can be opened", REMEDY):
        _check_files(path)
        if not writable and log.is_file() and log.stat().st_size:
            # What was written last is in the log, which SQLite reads only where it may write beside it.
            copy = stack.enter_context(scratch("run")) / path.name
            shutil.copyfile(path, copy)
            shutil.copyfile(log, copy.with_name(log.name))
            path, writable = copy, True
        place = f"file:{quote(os.fsencode(path.absolute()))}"
        mode = "mode=rw" if writable else "mode=ro&immutable=1"
        db = sqlite3.connect(f"{place}?{mode}", uri=True, isolation_level=None)
        stack.callback(db.close)
        db.execute("PRAGMA query_only = 1")
        db.execute("PRAGMA cell_size_check = 1")
        db.execute("PRAGMA trusted_schema = 0")
        db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return db
