"""The trials of a run as named columns, for tools that read tables: the choices as labels, and the metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitfront.constraints import fulfilled
from bitfront.report.importance import active

if TYPE_CHECKING:
    from bitfront.engine.storage.run import Run
    from bitfront.spaces.base import Parameter

Rows = NDArray[np.int64]
Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Chosen:
    """The choices of the trials for one parameter of the space.

    Attributes:
        index: per trial, the index of its label among the labels of the parameter.
        counts: per trial, whether the parameter has an effect, that is, whether the trial takes its branch.
    """

    parameter: Parameter
    index: Rows
    counts: NDArray[np.bool_]


def kept(run: Run, limit: int | None) -> Rows:
    """All rows of a run with at most `limit` trials; of a longer run, the front and every n-th trial.

    n is a whole number. While it stays the same, a growing run keeps all its rows but those that leave the front.
    """
    if limit is None or len(run) <= limit:
        return np.arange(len(run))
    every = np.flatnonzero(run.columns.number % -(-len(run) // limit) == 0)
    rows: Rows = np.union1d(run.front_rows, every)
    return rows


def choices(run: Run, rows: Rows) -> tuple[Chosen, ...]:
    """The choices of the trials in `rows`, one item per parameter of the space."""
    codes = run.columns.codes(rows)
    return tuple(Chosen(p, codes[:, c], active(run.space, c, codes)) for c, p in enumerate(run.space.parameters))


def measured(run: Run, rows: Rows) -> dict[str, Values]:
    """Name → values of the trials in `rows`, NaN without a value.

    The names are the metrics; ``test:`` with a metric, for the test split, of trials on the front; and ``finetuned:``
    with a metric, after fine-tuning.
    """
    columns = {m: v[rows] for m, v in run.columns.metrics.items()}
    place = {int(n): i for i, n in enumerate(run.columns.number[rows])}
    later: dict[str, Mapping[int, Mapping[str, float | None]]] = {
        "test": run.test_results,
        "finetuned": {n: f.metrics for n, f in run.finetuned.items()},
    }
    for kind, results in later.items():
        for number, metrics in results.items():
            for metric, value in metrics.items():
                column = columns.setdefault(f"{kind}:{metric}", np.full(len(rows), np.nan))
                if number in place and value is not None:
                    column[place[number]] = value
    return columns


def table(run: Run, rows: Rows) -> dict[str, NDArray[Any]]:
    """Trials as columns: number, state, whether the trial is on the front (and fulfils the constraints), choices,
    metrics, scaled metrics, duration in seconds, error.

    Texts are arrays of objects. A choice is None if the parameter has no effect.
    """
    trials = run.columns
    metrics = {m: v[rows] for m, v in trials.metrics.items()}
    columns: dict[str, NDArray[Any]] = {
        "number": trials.number[rows],
        "state": np.where(trials.complete[rows], "complete", "failed").astype(object),
        "front": np.isin(rows, run.front_rows),
    }
    if run.constraints:
        columns["fulfils"] = fulfilled(run.constraints, metrics) & trials.complete[rows]
    for chosen in choices(run, rows):
        labels = np.array(chosen.parameter.labels, dtype=object)[chosen.index]
        labels[~chosen.counts] = None
        columns[chosen.parameter.name] = labels
    columns |= measured(run, rows)
    columns |= {f"scaled:{m}": v for m, v in run.objectives.scaled(metrics).items()}
    columns["duration"] = trials.duration[rows]
    columns["error"] = np.array([trials.errors.get(n) for n in trials.number[rows].tolist()], dtype=object)
    return columns
