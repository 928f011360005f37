"""Tables with a column that is the target: CSV and Parquet files, and tables that a library gives.

Columns of numbers are features, standardised with the training split's statistics. A column of words with few values
becomes one column of 0 and 1 per value. Where the model takes texts, the columns of words are texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from bitfront.config import settings_of
from bitfront.data import DATASETS
from bitfront.data.arrays import from_arrays, from_splits
from bitfront.data.base import DataRequest, Dataset, Split
from bitfront.data.npz import check_file
from bitfront.data.raw import Array
from bitfront.data.splitting import known_split
from bitfront.data.targets import CLASSES
from bitfront.data.texts import TextSettings, tokenised, tokenizer_of
from bitfront.errors import ConfigError, DataError, nearest, one_of, parsing, require

SETTINGS = ("dataset_settings",)
#: Names of a column that is taken as the target where the settings name none.
USUAL_TARGETS = ("target", "label", "labels", "class", "y")
#: A column of words with more values is no category.
MOST_VALUES = 100
Columns = Mapping[str, Array]


class TableSettings(TextSettings):
    """Settings of tables."""

    target_column: str | None = Field(
        None, description="the column that is the target; default: the only one called target, label, class or y"
    )
    drop_columns: list[str] = Field([], description="columns that are left out, such as identifiers")
    standardise: bool = Field(True, description="features get mean 0 and deviation 1, from the training split")


@DATASETS.register("csv", settings=TableSettings)
def csv(request: DataRequest) -> Dataset:
    """A CSV file with a header, one column of which is the target; or a folder with train.csv, val.csv, test.csv.

    Raises:
        DataError: there is no such file, or a column cannot be used.
        MissingExtraError: pyarrow is not installed.
    """
    return _of_files(request, "csv")


@DATASETS.register("parquet", settings=TableSettings)
def parquet(request: DataRequest) -> Dataset:
    """A Parquet file, one column of which is the target; or a folder with train.parquet, val.parquet, test.parquet.

    Raises: as ``csv``.
    """
    return _of_files(request, "parquet")


def _of_files(request: DataRequest, ending: str) -> Dataset:
    if request.path is None:
        raise DataError(f'dataset = "{ending}" needs dataset_path, the .{ending} file to read')
    settings = settings_of(TableSettings, request.settings, SETTINGS)
    files = _files(request.path, ending)
    size = sum(path.stat().st_size for path in files.values())
    if size > request.limit_bytes:
        raise DataError(f"{request.path} has {size:,} bytes, and limit_bytes is {request.limit_bytes:,}; raise it")
    tables = {split: _read(path, ending, settings) for split, path in files.items()}
    return table_dataset(tables, request, settings, name=request.path.stem, source=str(request.path))


def _files(path: Path, ending: str) -> dict[Split | None, Path]:
    """The file under None, or those of a folder by split. Raises DataError."""
    if not path.is_dir():
        check_file(path)
        return {None: path}
    found: dict[Split | None, Path] = {}
    for file in sorted(path.glob(f"*.{ending}")):
        if (split := known_split(file.stem)) is not None:
            found[split] = file
    if "train" not in found:
        raise DataError(f"{path} has no train.{ending}; name one file, or put train, val and test into the folder")
    return found


def _read(path: Path, ending: str, settings: TableSettings) -> dict[str, Array]:
    """The columns of a file. Raises DataError or MissingExtraError."""
    purpose = f"a .{ending} file"
    with parsing(DataError, f"{path} cannot be read as {ending.upper()}", "look at the line that it names"):
        if ending == "parquet":
            table = require("pyarrow.parquet", "parquet", purpose).read_table(path)
        else:
            arrow = require("pyarrow.csv", "parquet", purpose)
            # One block: the type of a column is decided by all of its rows.
            block = min(path.stat().st_size + 1, 2**31 - 1)
            table = arrow.read_csv(path, read_options=arrow.ReadOptions(block_size=block))
        names = [name for name in table.column_names if name not in settings.drop_columns]
        unknown = [name for name in settings.drop_columns if name not in table.column_names]
        if unknown:
            raise ConfigError(
                f"{path} has no column {unknown[0]!r}; {one_of(table.column_names)}.{nearest(unknown[0], names)}",
                key=(*SETTINGS, "drop_columns"),
            )
        if len(set(names)) != len(names):
            raise DataError(f"{path} has a column name twice among {', '.join(names)}; rename one of them")
        return {name: _column(table.column(name), name, path) for name in names}


def _column(column: Any, name: str, path: Path) -> Array:
    if column.null_count:
        row = next(i for i, valid in enumerate(column.is_valid().to_pylist()) if not valid)
        raise DataError(
            f"{path}: column {name!r} has no value in row {row} (the first of {column.null_count:,}); fill values in, "
            "leave the rows out, or leave the column out with drop_columns"
        )
    kind = str(column.type)
    if kind.startswith("dictionary"):
        return np.array(column.to_pylist())
    array: Array = column.to_numpy()
    return array.astype(str) if kind in ("string", "large_string") else array


def table_dataset(
    tables: Mapping[Split | None, Columns],
    request: DataRequest,
    settings: TableSettings,
    *,
    name: str,
    source: str,
    target: str | None = None,
    class_names: Sequence[str] = (),
) -> Dataset:
    """A dataset from columns by name.

    Args:
        tables: the columns by split, or all under None; texts are arrays of texts.
        request: seed, targets and what the model needs.
        settings: which column is the target, and what is done with the others.
        name, source: as in ``from_arrays``.
        target: the target's column where the settings name none.
        class_names: the names of classes, by index.

    Raises:
        DataError: a column is missing, or is neither numbers nor words with few values.
    """
    first = next(iter(tables.values()))
    column = _target(first, settings.target_column, target, source) if request.targets.given else settings.target_column
    features = [key for key in first if key != column and key not in settings.drop_columns]
    for split, table in tables.items():
        lacking = [key for key in first if key not in table]
        if lacking:
            raise DataError(f"{source}: the table of {split} has no column {lacking[0]!r}; every split needs the same")
    if not features:
        raise DataError(f"{source} has no column beside {column!r}; give one or more features")
    y = {split: _targets(table[column], request) if column else None for split, table in tables.items()}
    common: dict[str, Any] = {"name": name, "seed": request.seed, "source": source, "targets": request.targets}
    common["class_names"] = class_names
    notes = [f"target: column {column!r}"] if column else []
    if tokenizer_of(settings, request):
        words = settings.text_columns or [key for key in features if first[key].dtype.kind in "US"]
        texts = {split: [table[key] for key in words] for split, table in tables.items() if words}
        x, note = tokenised(texts, words, settings, request, source)
        return _built({split: (x[split], y[split]) for split in tables}, {**common, "notes": [*notes, note]})
    wide, names = _numbers(tables, features, source)
    if len(wide) != len(features):
        notes.append(f"{len(features)} columns became {len(names)} features: one of 0 and 1 per word")
    standardise = settings.standardise
    notes += [] if standardise else ["features are used as they are"]
    common |= {"feature_names": names, "standardise": standardise, "notes": notes}
    return _built({split: (wide[split], y[split]) for split in tables}, common)


def _built(pairs: Mapping[Split | None, tuple[Any, Any]], common: Mapping[str, Any]) -> Dataset:
    if None in pairs:
        return from_arrays(*pairs[None], **common)
    return from_splits({str(split): pair for split, pair in pairs.items()}, **common)


def _target(table: Columns, wanted: str | None, usual: str | None, source: str) -> str:
    """The column that is the target. Raises ConfigError where it is not clear."""
    if wanted is not None:
        if wanted not in table:
            raise ConfigError(
                f"{source} has no column {wanted!r}; {one_of(table)}.{nearest(wanted, table)}",
                key=(*SETTINGS, "target_column"),
            )
        return wanted
    if usual is not None:
        return usual
    known = [key for key in table if key.lower() in USUAL_TARGETS]
    if len(known) != 1:
        raise ConfigError(
            f"{source} has {'no column' if not known else 'several columns'} called "
            f"{', '.join(known or USUAL_TARGETS)}; name the target: target_column = ... ({one_of(table)})",
            key=(*SETTINGS, "target_column"),
        )
    return known[0]


def _targets(column: Array, request: DataRequest) -> Array:
    """The targets; numbers of classes that do not count from 0 are taken as their names."""
    if request.targets is not CLASSES or column.dtype.kind not in "iuf":
        return column
    values = np.unique(column)
    whole = bool((values == np.floor(values)).all())
    return (
        column if not whole or np.array_equal(values, np.arange(len(values))) else column.astype(np.int64).astype(str)
    )


def _numbers(
    tables: Mapping[Split | None, Columns], features: Sequence[str], source: str
) -> tuple[dict[Split | None, Array], list[str]]:
    """(float64 features by split, their names)."""
    columns: dict[Split | None, list[Array]] = {split: [] for split in tables}
    names: list[str] = []
    for key in features:
        of = {split: table[key] for split, table in tables.items()}
        if all(column.dtype.kind in "fiub" for column in of.values()):
            names.append(key)
            for split, column in of.items():
                columns[split].append(column.astype(np.float64))
            continue
        words = {split: column.astype(str) for split, column in of.items()}
        values = np.unique(np.concatenate(list(words.values()))).tolist()
        if len(values) > MOST_VALUES or not all(c.dtype.kind in "USOfiub" for c in of.values()):
            raise DataError(
                f"{source}: column {key!r} has {len(values):,} different words, and at most {MOST_VALUES} are taken as "
                "categories; leave it out with drop_columns, or, if it is a text, name a model of texts or a tokenizer"
            )
        for value in values:
            names.append(f"{key}={value}")
            for split, column in words.items():
                columns[split].append((column == value).astype(np.float64))
    return {split: np.stack(parts, axis=1) for split, parts in columns.items()}, names
