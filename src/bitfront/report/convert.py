"""A run for other tools: CSV, Parquet, an Optuna study. Reads what is stored; nothing is measured again."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from numpy.typing import NDArray

from bitfront.engine.storage.folder import STORE
from bitfront.engine.storage.run import Run, whole
from bitfront.errors import ConfigError, RunError, nearest, one_of, require
from bitfront.report import study
from bitfront.report.columns import Rows, kept, table

#: What a search writes into its folder, and a conversion must not overwrite even if asked to.
OWN = (STORE, "config.toml", "best.json", "log.json")


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        trials: how many trials are in it.
        total: how many the run has.
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
    """Write a run, finished or still running, as a file that other tools read.

    Args:
        run: the run, or its folder.
        to: ``csv`` or ``parquet``: a row per trial; ``optuna``: an SQLite file that ``optuna.load_study`` and
            optuna-dashboard read.
        output: the file; default: ``trials.csv``, ``trials.parquet`` or ``optuna.db`` in the run folder.
        force: overwrite it if it is there.
        trials: of a longer run the front and every n-th trial, about so many in all; default: all, or 10,000 of an
            Optuna study, which takes 3 kB per trial and is read slowly.

    Raises:
        ConfigError: there is no such format, or `trials` is not positive.
        RunError: there is no such run, the file is there already, or it cannot be written.
        MissingExtraError: what writes the format is not installed.
    """
    if to not in FORMATS:
        raise ConfigError(f"there is no format {to!r} to convert to; {one_of(FORMATS)}.{nearest(to, FORMATS)}")
    wanted = FORMATS[to]
    limit = _allowed(trials) or wanted.limit
    if wanted.module:
        require(wanted.module, to, f"to={to!r}", arguments=[f"to={to!r}"])
    folder = run.folder if isinstance(run, Run) else Path(run)
    path = Path(output) if output is not None else folder / wanted.file
    if path.name in OWN and path.parent.resolve() == folder.resolve():
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
    own = run if isinstance(run, Run) else Run.load(folder)
    rows = kept(own, limit)
    with whole(path) as part:
        wanted.write(part, own, rows)
    return Converted(path, to, len(rows), len(own))


def write_csv(file: TextIO, run: Run | str | Path, trials: int | None = None) -> None:
    """Write a run as CSV into an open file: a header, then a row per trial. Cells without a value are empty, numbers
    have all their digits.

    Args:
        trials: as ``convert`` takes it.

    Raises:
        ConfigError: `trials` is not positive.
        RunError: there is no such run.
    """
    own = run if isinstance(run, Run) else Run.load(run)
    _csv(file, own, kept(own, _allowed(trials)))


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
    """The same columns; texts as dictionaries, no value as null. The schema's metadata has the units."""
    import pyarrow
    from pyarrow import parquet

    arrays = {}
    for name, column in table(run, rows).items():
        if column.dtype.kind == "O":
            arrays[name] = pyarrow.array(column, pyarrow.string()).dictionary_encode()
        else:
            arrays[name] = pyarrow.array(column, from_pandas=True)  # NaN becomes null
    made = pyarrow.table(arrays)
    fields = [f.with_metadata({"unit": run.units[f.name]}) if run.units.get(f.name) else f for f in made.schema]
    parquet.write_table(made.cast(pyarrow.schema(fields)), path)


def _write_study(path: Path, run: Run, rows: Rows) -> None:
    study.append(path, study.create(path, run), run, rows, study.began(run))


@dataclass(frozen=True)
class FileFormat:
    """A kind of file that a run becomes.

    Attributes:
        file: its name in the run folder.
        module: what writes it, of the extra of the format's name; empty where nothing is needed.
        limit: so many trials unless told otherwise.
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
