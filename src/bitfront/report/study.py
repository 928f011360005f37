"""A run as a study of Optuna's, in an SQLite file that Optuna and optuna-dashboard read.

The tables are made, and the study is, by Optuna. The trials are written into the tables directly, in one transaction:
``study.add_trials`` takes a tenth of a second for each, and numbers them anew. The layout of the tables has a version,
which is checked.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import warnings
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitfront.engine.storage.folder import STORE
from bitfront.errors import RunError
from bitfront.report.columns import Rows, Values, choices, measured
from bitfront.report.data import objective_title
from bitfront.strategies.optuna import CONSTRAINTS

if TYPE_CHECKING:
    from bitfront.engine.storage.run import Run

#: The layout of Optuna's tables that is written here; Optuna 3.2 to 5 have it.
SCHEMA = 12


def create(path: Path, run: Run, name: str = "") -> str:
    """Make an empty study for a run, and the file if there is none; gives the study's name, that of the run.

    Raises:
        RunError: the installed Optuna lays out its tables in another way.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(address(path))
    try:
        made = optuna.create_study(
            storage=storage, study_name=name or run.folder.resolve().name, directions=run.objectives.directions
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            made.set_metric_names([objective_title(run, n) for n in run.objectives.names])
        made.set_user_attr("run", str(run.folder.resolve()))
        for metric, value in run.reference.items():
            made.set_user_attr(f"float model: {metric}", value)
    finally:
        storage.remove_session()
        storage.engine.dispose()
    with contextlib.closing(sqlite3.connect(path)) as db:
        found = db.execute("SELECT schema_version FROM version_info").fetchone()[0]
    if found != SCHEMA:
        raise RunError(
            f"Optuna {optuna.__version__} lays out studies as version {found}, and this version of Bitfront writes "
            f"{SCHEMA}; to='csv' and to='parquet' do not need it",
            arguments=["to='csv'", "to='parquet'"],
        )
    return made.study_name


def address(path: Path) -> str:
    """How Optuna calls a storage in that file."""
    return f"sqlite:///{path}"


def began(run: Run) -> datetime:
    """When a run would have begun, had it done nothing but evaluate, one trial after the other: so long before its last
    trial was written as all of them took. The times of day in a study follow from that and the durations."""
    seconds = float(np.nan_to_num(run.columns.duration).sum())
    last = (run.folder / STORE).stat().st_mtime
    return datetime.fromtimestamp(last - seconds, UTC)


def append(path: Path, name: str, run: Run, rows: Rows, began: datetime) -> None:
    """Write some trials of a run, under their own numbers, into its study.

    Raises:
        RunError: they cannot be written.
    """
    try:
        with contextlib.closing(sqlite3.connect(path)) as db, db:
            study = db.execute("SELECT study_id FROM studies WHERE study_name = ?", (name,)).fetchone()[0]
            first = db.execute("SELECT coalesce(max(trial_id), 0) + 1 FROM trials").fetchone()[0]
            ids = np.arange(first, first + len(rows))
            for columns, values in _tables(run, rows, ids, study, began):
                places = ", ".join("?" * (columns.count(",") + 1))
                db.executemany(f"INSERT INTO {columns} VALUES ({places})", values)
    except sqlite3.Error as error:
        raise RunError(f"{path}: cannot be written: {error}") from None


def _tables(run: Run, rows: Rows, ids: Rows, study: int, began: datetime) -> Iterator[tuple[str, Iterable[Any]]]:
    """(table with columns, rows) of everything that Optuna keeps of trials."""
    own = run.columns
    values = run.objectives.values({m: v[rows] for m, v in own.metrics.items()})
    unknown = np.asarray(np.isnan(values).any(axis=1))
    complete = own.complete[rows] & ~unknown  # of a complete trial Optuna wants all values

    states = np.where(complete, "COMPLETE", "FAIL").tolist()
    numbers = own.number[rows].tolist()
    end = np.cumsum(np.nan_to_num(own.duration))[rows]
    start = end - np.nan_to_num(own.duration[rows])
    yield (
        "trials (trial_id, number, study_id, state, datetime_start, datetime_complete)",
        zip(ids.tolist(), numbers, [study] * len(rows), states, _times(began, start), _times(began, end), strict=True),
    )
    for place in range(values.shape[1]):
        column, kinds = values[complete, place], {np.inf: "INF_POS", -np.inf: "INF_NEG"}
        yield (
            "trial_values (trial_id, objective, value, value_type)",
            (
                (i, place, None if v in kinds else v, kinds.get(v, "FINITE"))
                for i, v in zip(ids[complete].tolist(), column.tolist(), strict=True)
            ),
        )
    for chosen in choices(run, rows):
        # As Optuna writes a categorical distribution: the values are places in it.
        described = {"name": "CategoricalDistribution", "attributes": {"choices": chosen.parameter.labels}}
        text, counts = json.dumps(described), chosen.counts
        yield (
            "trial_params (trial_id, param_name, param_value, distribution_json)",
            (
                (i, chosen.parameter.name, float(index), text)
                for i, index in zip(ids[counts].tolist(), chosen.index[counts].tolist(), strict=True)
            ),
        )
    yield "trial_user_attributes (trial_id, key, value_json)", _attributes(run, rows, ids, unknown)
    if run.constraints:
        # What is not known is missed by all of it.
        over = np.nan_to_num([c.excess(own.metrics[c.metric][rows]) for c in run.constraints], nan=1.0, posinf=1e300)
        yield (
            "trial_system_attributes (trial_id, key, value_json)",
            ((i, CONSTRAINTS, json.dumps(v)) for i, v in zip(ids.tolist(), over.T.tolist(), strict=True)),
        )


def _attributes(run: Run, rows: Rows, ids: Rows, unknown: NDArray[np.bool_]) -> Iterator[tuple[int, str, str]]:
    """(trial, key, JSON): whatever was measured and is no objective as it is, and why a trial failed."""
    for name, column in measured(run, rows).items():
        known = ~np.isnan(column)
        if name not in run.objectives.unscaled:
            for i, value in zip(ids[known].tolist(), column[known].tolist(), strict=True):
                yield i, name, json.dumps(value)
    for i, number, missing in zip(ids.tolist(), run.columns.number[rows].tolist(), unknown.tolist(), strict=True):
        error = run.columns.errors.get(number) or ("an objective has no value" if missing else "")
        if error:
            yield i, "error", json.dumps(error)


def _times(began: datetime, seconds: Values) -> list[str]:
    """Moments so long after `began`, as SQLAlchemy writes them: UTC, without saying so."""
    first = np.datetime64(began.replace(tzinfo=None), "us")
    moments = first + (seconds * 1e6).astype("timedelta64[us]")
    return [text.replace("T", " ") for text in np.datetime_as_string(moments, "us").tolist()]
