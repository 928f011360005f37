"""Converts a run for other tools: CSV, Parquet, an Optuna study. It reads the stored trials and measures nothing."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from numpy.typing import NDArray

from bitfront.engine.storage.folder import STORE
from bitfront.engine.storage.run import Run
from bitfront.errors import ConfigError, RunError, nearest, one_of, parsing, require
from bitfront.files import shown, whole
from bitfront.report import study
from bitfront.report.columns import Rows, kept, table

#: Files of a search in its run folder, which a conversion never overwrites, not even with ``force``.
RUN_FILES = (STORE, "config.toml", "best.json", "log.json")


@dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    Attributes:
        path: the file.
        format: its format, a key of ``FORMATS``.
        trials: number of trials in the file.
        total: number of trials in the run.
    """

    path: Path
    format: str
    trials: int
    total: int


def convert(
    run: Run | str | Path,
    to: str,
    output: str | Path | None = None,
    *,
    force: bool = False,
    trials: int | None = None,
) -> Converted:
    """Write a run, finished or still running, as a file for other tools.

    Args:
        run: the run, or its folder.
        to: ``csv`` or ``parquet``: a row per trial; ``optuna``: an SQLite file that ``optuna.load_study`` and
            optuna-dashboard read.
        output: the file; default: ``trials.csv``, ``trials.parquet`` or ``optuna.db`` in the run folder.
        force: overwrite the file if it exists.
        trials: about how many trials to write: of a longer run, the front and every n-th trial. Default: all, or
            10,000 for an Optuna study, which takes 3 kB per trial and is slow to read.

    Raises:
        ConfigError: there is no such format, or `trials` is not positive.
        RunError: there is no such run, the file exists, or it cannot be written.
        MissingExtraError: the package that writes the format is not installed.
    """
    if to not in FORMATS:
        raise ConfigError(f"there is no format {to!r} to convert to; {one_of(FORMATS)}.{nearest(to, FORMATS)}")
    wanted = FORMATS[to]
    limit = _allowed(trials) or wanted.limit
    if wanted.module:
        require(wanted.module, to, f"to={to!r}", arguments=[f"to={to!r}"])
    folder = run.folder if isinstance(run, Run) else Path(run)
    path = Path(output) if output is not None else folder / wanted.file
    if path.name in RUN_FILES and path.parent.resolve() == folder.resolve():
        raise RunError(f"{path}: this belongs to the run; output=... names another file", arguments=["output=..."])
    if folder.is_dir() and not path.parent.is_dir():
        raise RunError(f"{path}: there is no folder {path.parent} to write it in")
    if path.is_dir():
        raise RunError(f"{path} is a folder; output=... names a file", arguments=["output=..."])
    if path.exists() and not force:
        raise RunError(
            f"{path} exists; force=True overwrites it, output=... names another file",
            arguments=["force=True", "output=..."],
        )
    if not isinstance(run, Run):
        run = Run.load(folder)
    rows = kept(run, limit)
    # Whatever the libraries for a format raise where the disk is full.
    with whole(path) as part, parsing(RunError, f"{shown(path)}: cannot be written", "free disk space and try again"):
        wanted.write(part, run, rows)
    return Converted(path, to, len(rows), len(run))


def write_csv(file: TextIO, run: Run | str | Path, trials: int | None = None) -> None:
    """Write a run as CSV into an open file: a header, then one row per trial.

    Cells without a value are empty. Numbers have all their digits.

    Args:
        trials: as in ``convert``.

    Raises:
        ConfigError: `trials` is not positive.
        RunError: there is no such run.
    """
    if not isinstance(run, Run):
        run = Run.load(run)
    _csv(file, run, kept(run, _allowed(trials)))


def _allowed(trials: int | None) -> int | None:
    if trials is not None and trials < 1:
        raise ConfigError(f"{trials} is not possible: at least 1", key=("trials",))
    return trials


def _write_csv(path: Path, run: Run, rows: Rows) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        _csv(file, run, rows)


def _csv(file: TextIO, run: Run, rows: Rows) -> None:
    columns = table(run, rows)
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*(_cells(column) for column in columns.values()), strict=True))


def _cells(column: NDArray[Any]) -> list[Any]:
    cells = column.tolist()
    if column.dtype.kind == "b":
        return ["true" if cell else "false" for cell in cells]
    return ["" if cell != cell else cell for cell in cells] if column.dtype.kind == "f" else cells


def _write_parquet(path: Path, run: Run, rows: Rows) -> None:
    """Write the same columns as Parquet: texts as dictionaries, null without a value. The metadata has the units."""
    import pyarrow
    from pyarrow import parquet

    arrays = {}
    for name, column in table(run, rows).items():
        if column.dtype.kind == "O":
            arrays[name] = pyarrow.array(column, pyarrow.string()).dictionary_encode()
        else:
            arrays[name] = pyarrow.array(column, from_pandas=True)  # NaN becomes null
    plain_table = pyarrow.table(arrays)
    fields = [f.with_metadata({"unit": run.units[f.name]}) if run.units.get(f.name) else f for f in plain_table.schema]
    parquet.write_table(plain_table.cast(pyarrow.schema(fields)), path)


def _write_study(path: Path, run: Run, rows: Rows) -> None:
    study.append(path, study.create(path, run), run, rows, study.began(run))


@dataclass(frozen=True)
class FileFormat:
    """A file format that a run can be converted to.

    Attributes:
        file: the default name, in the run folder.
        write: writes some rows of a run into a file.
        module: the module that writes it, from the extra with the name of the format; empty if none is needed.
        limit: the default of ``convert(trials=...)``; None: all trials.
    """

    file: str
    write: Callable[[Path, Run, Rows], None]
    module: str = ""
    limit: int | None = None


FORMATS: Mapping[str, FileFormat] = {
    "csv": FileFormat("trials.csv", _write_csv),
    "parquet": FileFormat("trials.parquet", _write_parquet, "pyarrow"),
    "optuna": FileFormat("optuna.db", _write_study, limit=10_000),
}
