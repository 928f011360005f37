"""A run's trials as named columns, for tools that read tables: what was chosen, in words, and what was measured."""

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
    """What trials chose for one parameter of the space.

    Attributes:
        index: per trial the place of its label among the parameter's.
        counts: per trial whether the parameter had an effect: whether the branch that it belongs to was taken.
    """

    parameter: Parameter
    index: Rows
    counts: NDArray[np.bool_]


def kept(run: Run, limit: int | None) -> Rows:
    """All rows of a run, or of a longer one those of the front and of every n-th trial.

    What is kept of a run that goes on stays kept, but for the front: whole numbers of trials are left out in between.
    """
    if limit is None or len(run) <= limit:
        return np.arange(len(run))
    every = np.flatnonzero(run.columns.number % -(-len(run) // limit) == 0)
    found: Rows = np.union1d(run.front_rows, every)
    return found


def choices(run: Run, rows: Rows) -> tuple[Chosen, ...]:
    """What trials chose, parameter by parameter of the space."""
    codes = run.columns.codes(rows)
    return tuple(Chosen(p, codes[:, c], active(run.space, c, codes)) for c, p in enumerate(run.space.parameters))


def measured(run: Run, rows: Rows) -> dict[str, Values]:
    """Name → values, NaN where there is none: metrics; ``test:`` what the test split said of the front; ``finetuned:``
    what training made of a trial."""
    found = {m: v[rows] for m, v in run.columns.metrics.items()}
    place = {int(n): i for i, n in enumerate(run.columns.number[rows])}
    later: dict[str, Mapping[int, Mapping[str, float | None]]] = {
        "test": run.test_results,
        "finetuned": {n: f.metrics for n, f in run.finetuned.items()},
    }
    for kind, results in later.items():
        for number, metrics in results.items():
            for metric, value in metrics.items():
                column = found.setdefault(f"{kind}:{metric}", np.full(len(rows), np.nan))
                if number in place and value is not None:
                    column[place[number]] = value
    return found


def table(run: Run, rows: Rows) -> dict[str, NDArray[Any]]:
    """Trials as columns: number, state, whether it is on the front (and fulfils the constraints), what was chosen,
    metrics, scaled metrics, seconds, error. Texts are objects, None where a parameter had no effect."""
    own = run.columns
    metrics = {m: v[rows] for m, v in own.metrics.items()}
    found: dict[str, NDArray[Any]] = {
        "number": own.number[rows],
        "state": np.where(own.complete[rows], "complete", "failed").astype(object),
        "front": np.isin(rows, run.front_rows),
    }
    if run.constraints:
        found["fulfils"] = fulfilled(run.constraints, metrics) & own.complete[rows]
    for chosen in choices(run, rows):
        labels = np.array(chosen.parameter.labels, dtype=object)[chosen.index]
        labels[~chosen.counts] = None
        found[chosen.parameter.name] = labels
    found |= measured(run, rows)
    found |= {f"scaled:{m}": v for m, v in run.objectives.scaled(metrics).items()}
    found["duration"] = own.duration[rows]
    found["error"] = np.array([own.errors.get(n) for n in own.number[rows].tolist()], dtype=object)
    return found
