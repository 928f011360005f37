"""A run as an Optuna study: an SQLite file that Optuna and optuna-dashboard read.

Optuna creates the tables and the study. The trials are written directly into the tables, in one transaction. Optuna's
functions would take tens of milliseconds per trial and would number the trials anew. The layout of the tables is not
part of Optuna's public API, so it is checked first. If it is an unknown one, Optuna's functions write the trials.
"""

from __future__ import annotations

import contextlib
import functools
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

if TYPE_CHECKING:
    from bitfront.engine.storage.run import Run

#: The version of the layout of Optuna's tables that this file can write; Optuna 3.2 to 5 have it.
SCHEMA = 12
#: The columns that are written: table → columns.
TABLES = {
    "trials": ("trial_id", "number", "study_id", "state", "datetime_start", "datetime_complete"),
    "trial_values": ("trial_id", "objective", "value", "value_type"),
    "trial_params": ("trial_id", "param_name", "param_value", "distribution_json"),
    "trial_user_attributes": ("trial_id", "key", "value_json"),
    "trial_system_attributes": ("trial_id", "key", "value_json"),
}
#: Infinite value → its value_type.
INFINITE = {np.inf: "INF_POS", -np.inf: "INF_NEG"}
#: The key for how far a trial exceeds its constraints. optuna-dashboard does not read Optuna's newer way.
CONSTRAINTS = "constraints"


def create(path: Path, run: Run, name: str = "") -> str:
    """Create an empty study for a run, and the file if there is none. Returns the name of the study."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with _storage(path) as storage:
        study = optuna.create_study(
            storage=storage, study_name=name or run.folder.resolve().name, directions=run.objectives.directions
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([objective_title(run, n) for n in run.objectives.names])
        study.set_user_attr("run", str(run.folder.resolve()))
        for metric, value in run.reference.items():
            study.set_user_attr(f"float model: {metric}", value)
    return study.study_name


@contextlib.contextmanager
def _storage(path: Path) -> Iterator[Any]:
    import optuna

    storage = optuna.storages.RDBStorage(address(path))
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def address(path: Path) -> str:
    """The URL by which Optuna opens this file."""
    return f"sqlite:///{path}"


def began(run: Run) -> datetime:
    """The start of a run, as if its trials had been evaluated one after the other without a pause.

    It is the time of the last trial minus the durations of all trials. The times of the trials in a study are computed
    from it and from the durations.
    """
    seconds = float(np.nan_to_num(run.columns.duration).sum())
    last = (run.folder / STORE).stat().st_mtime
    return datetime.fromtimestamp(last - seconds, UTC)


def append(path: Path, name: str, run: Run, rows: Rows, began: datetime) -> None:
    """Write some trials of a run into its study.

    They keep their numbers if the layout of Optuna's tables is known. Otherwise Optuna numbers them, and the number in
    the run is the user attribute ``trial``.

    Raises:
        RunError: they cannot be written.
    """
    try:
        with contextlib.closing(sqlite3.connect(path)) as db, db:
            if known_layout(db):
                _write(db, name, run, rows, began)
                return
    except sqlite3.Error as error:
        raise RunError(f"{path}: cannot be written: {error}") from None
    _add(path, name, run, rows, began)


def known_layout(db: sqlite3.Connection) -> bool:
    """Whether the tables of an Optuna study have the known layout."""
    try:
        for table, columns in TABLES.items():
            db.execute(f"SELECT {', '.join(columns)} FROM {table} LIMIT 0")
        return db.execute("SELECT schema_version FROM version_info").fetchall() == [(SCHEMA,)]
    except sqlite3.OperationalError:
        return False


def _write(db: sqlite3.Connection, name: str, run: Run, rows: Rows, began: datetime) -> None:
    study = db.execute("SELECT study_id FROM studies WHERE study_name = ?", (name,)).fetchone()[0]
    first = db.execute("SELECT coalesce(max(trial_id), 0) + 1 FROM trials").fetchone()[0]
    for table, values in _tables(run, rows, np.arange(first, first + len(rows)), study, began):
        columns = TABLES[table]
        places = ", ".join("?" * len(columns))
        db.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places})", values)


def _add(path: Path, name: str, run: Run, rows: Rows, began: datetime) -> None:
    """Write the same trials by Optuna's functions."""
    import optuna

    trials: dict[int, Any] = {}
    distribution = functools.cache(optuna.distributions.json_to_distribution)
    infinite = {kind: value for value, kind in INFINITE.items()}
    for table, values in _tables(run, rows, np.arange(len(rows)), 0, began):
        for i, *row in values:
            match table, row:
                case "trials", (number, _, state, start, end):
                    trials[i] = optuna.trial.FrozenTrial(
                        number=number,
                        state=optuna.trial.TrialState[state],
                        value=None,
                        datetime_start=datetime.fromisoformat(start),
                        datetime_complete=datetime.fromisoformat(end),
                        params={},
                        distributions={},
                        user_attrs={"trial": number},
                        system_attrs={},
                        intermediate_values={},
                        trial_id=i,
                    )
                case "trial_values", (_, value, kind):
                    trials[i].values = [*(trials[i].values or ()), infinite.get(kind, value)]
                case "trial_params", (parameter, place, text):
                    trials[i].distributions[parameter] = distribution(text)
                    trials[i].params[parameter] = distribution(text).to_external_repr(place)
                case "trial_user_attributes", (key, text):
                    trials[i].set_user_attr(key, json.loads(text))
                case "trial_system_attributes", (key, text):
                    trials[i].system_attrs[key] = json.loads(text)
    try:
        with _storage(path) as storage:
            optuna.load_study(study_name=name, storage=storage).add_trials(trials.values())
    except optuna.exceptions.OptunaError as error:
        raise RunError(f"{path}: cannot be written by Optuna {optuna.__version__}: {error}") from None


def _tables(run: Run, rows: Rows, ids: Rows, study: int, began: datetime) -> Iterator[tuple[str, Iterable[Any]]]:
    """(table, rows) of the trials in each of Optuna's tables; a row has the columns in ``TABLES``."""
    from optuna.distributions import CategoricalDistribution, distribution_to_json

    columns = run.columns
    values = run.objectives.values({m: v[rows] for m, v in columns.metrics.items()})
    unknown = np.asarray(np.isnan(values).any(axis=1))
    complete = columns.complete[rows] & ~unknown  # Optuna requires all values of a complete trial

    states = np.where(complete, "COMPLETE", "FAIL").tolist()
    numbers = columns.number[rows].tolist()
    end = np.cumsum(np.nan_to_num(columns.duration))[rows]
    start = end - np.nan_to_num(columns.duration[rows])
    yield (
        "trials",
        zip(ids.tolist(), numbers, [study] * len(rows), states, _times(began, start), _times(began, end), strict=True),
    )
    for place in range(values.shape[1]):
        column = values[complete, place]
        yield (
            "trial_values",
            (
                (i, place, None if v in INFINITE else v, INFINITE.get(v, "FINITE"))
                for i, v in zip(ids[complete].tolist(), column.tolist(), strict=True)
            ),
        )
    for chosen in choices(run, rows):
        # The values are indices into its labels.
        text, counts = distribution_to_json(CategoricalDistribution(chosen.parameter.labels)), chosen.counts
        yield (
            "trial_params",
            (
                (i, chosen.parameter.name, float(index), text)
                for i, index in zip(ids[counts].tolist(), chosen.index[counts].tolist(), strict=True)
            ),
        )
    yield "trial_user_attributes", _attributes(run, rows, ids, unknown)
    if run.constraints:
        # A constraint on an unknown value counts as not fulfilled.
        over = np.nan_to_num(
            [c.excess(columns.metrics[c.metric][rows]) for c in run.constraints], nan=1.0, posinf=1e300
        )
        yield (
            "trial_system_attributes",
            ((i, CONSTRAINTS, json.dumps(v)) for i, v in zip(ids.tolist(), over.T.tolist(), strict=True)),
        )


def _attributes(run: Run, rows: Rows, ids: Rows, unknown: NDArray[np.bool_]) -> Iterator[tuple[int, str, str]]:
    """(trial, key, JSON): the metrics that are no objectives without a scale, and the errors of failed trials."""
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
    """The times `seconds` after `began`, in the form of SQLAlchemy: UTC, without a time zone."""
    first = np.datetime64(began.replace(tzinfo=None), "us")
    moments = first + (seconds * 1e6).astype("timedelta64[us]")
    return [text.replace("T", " ") for text in np.datetime_as_string(moments, "us").tolist()]
