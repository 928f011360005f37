"""The data of the pictures on the page, as JSON: trials, influences, the course of the search, lines.

To keep the page small, numbers are shortened, and parts that several candidates share are written once.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitfront.report import data, figures
from bitfront.report.importance import Effect, Importance, active

if TYPE_CHECKING:
    from bitfront.engine.storage.run import Run
    from bitfront.spaces.described import Size


def content(run: Run, influences: Sequence[Importance], limit: int = data.SHOWN) -> dict[str, Any]:
    """The data of the pictures on the page. NaN and infinity become null.

    A trial is referred to by its index among the trials that are in the data.

    Args:
        limit: the largest number of trials that are drawn.
    """
    cloud, lines = data.cloud(run, limit), data.parallel(run, influences)
    rows = np.union1d(cloud.rows, np.concatenate([cloud.front, lines.rows]))
    place = {row: i for i, row in enumerate(rows.tolist())}
    whole = {
        "command": f"bitfront transform --run {shlex.quote(str(run.folder))} --check --trial ",
        **_metrics(run),
        **_trials(run, rows),
        **_cloud(run, cloud, place),
        "influences": [_influence(run, one) for one in influences],
        "history": _history(run, data.history(run, limit)),
        "parallel": _parallel(lines, place),
    }
    return {key: _finite(value) for key, value in whole.items()}


def _metrics(run: Run) -> dict[str, Any]:
    names = data.metric_names(run)
    return {
        "metrics": {m: data.title(run, m) for m in names},
        "units": {m: run.units.get(m, "") for m in names},
        "better": {m: data.better(run, m) for m in names},
        "reference": {m: run.reference.get(m) for m in names},
        "bounds": [[c.metric, c.bound] for c in run.constraints],
    }


def _trials(run: Run, rows: NDArray[np.int64]) -> dict[str, Any]:
    """The choices of some trials (−1 for a choice without effect) and their metrics."""
    columns, codes = run.columns, run.columns.codes(rows)
    chosen = [np.where(active(run.space, c, codes), codes[:, c], -1) for c in range(codes.shape[1])]
    nodes, keys, roots = _interned(run.space.decode(code) for code in codes)
    return {
        "parameters": [{"name": p.name, "labels": p.labels} for p in run.space.parameters],
        "number": columns.number[rows].tolist(),
        "values": {m: _numbers(columns.metrics[m][rows]) for m in data.metric_names(run)},
        "choices": [c.tolist() for c in chosen],
        "config": {"nodes": nodes, "keys": keys, "roots": roots},
    }


def _cloud(run: Run, cloud: data.Cloud, place: Mapping[int, int]) -> dict[str, Any]:
    numbers = run.columns.number[cloud.front].tolist()
    return {
        "quality": cloud.quality,
        "costs": list(cloud.costs),
        "note": cloud.note,
        "drawn": [place[r] for r in cloud.rows.tolist()],
        "front": [place[r] for r in cloud.front.tolist()],
        "low": _numbers(cloud.low),
        "high": _numbers(cloud.high),
        "tested": run.leading,
        "test": [run.test_results.get(n, {}).get(run.leading) for n in numbers],
    }


def _influence(run: Run, one: Importance) -> dict[str, Any]:
    parameters = [
        {"name": p.parameter, "share": p.share, "effects": _effects(p.effects, run.space.sizes)}
        for p in one.parameters[: figures.CELLS]
    ]
    return {
        "metric": one.metric,
        "title": data.title(run, one.metric),
        "unit": run.units.get(one.metric, ""),
        "missing": one.missing,
        "rest": one.rest,
        "trials": one.trials,
        "parameters": parameters,
    }


def _effects(effects: Sequence[Effect], sizes: Mapping[str, Size]) -> list[dict[str, Any]]:
    brief = data.shortened([e.label for e in effects], sizes)
    return [{**vars(e), "short": text} for e, text in zip(effects, brief, strict=True)]


def _history(run: Run, history: data.SearchCourse) -> dict[str, Any]:
    return {
        "courses": [
            {
                "title": c.title,
                "unit": c.unit,
                "direction": c.direction,
                "trials": (c.rows + 1).tolist(),
                "numbers": run.columns.number[c.rows].tolist(),
                "seconds": _numbers(history.end_seconds[c.rows]),
                "values": _numbers(c.values),
                "steps": (c.steps + 1).tolist(),
                "step_seconds": _numbers(history.end_seconds[c.steps]),
                "best": _numbers(c.best),
            }
            for c in history.courses
        ],
        "end": [len(run), float(history.end_seconds[-1]) if len(run) else 0.0],
        "trials": history.trials.tolist(),
        "seconds": _numbers(history.seconds),
        "volume": _numbers(history.volume),
        "missing": history.missing,
    }


def _parallel(lines: data.Parallel, place: Mapping[int, int]) -> dict[str, Any]:
    return {
        "axes": [{"title": a.title, "ticks": figures.ticks(lines, i)} for i, a in enumerate(lines.axes)],
        "rows": [place[r] for r in lines.rows.tolist()],
        "front": lines.front.tolist(),
        "heights": [_numbers(h) for h in data.heights(lines)],
        "note": lines.note,
        "left_out": figures.left_out(lines),
    }


def _finite(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def _numbers(values: NDArray[np.float64]) -> list[float]:
    """Numbers with seven digits: more than a picture shows, in half the bytes."""
    return [float(f"{v:.7g}") for v in values.tolist()]


def _interned(configs: Iterable[Mapping[str, Any]]) -> tuple[list[Any], list[list[str]], list[int]]:
    """Configurations, with equal parts written once: (nodes, lists of keys, index of a node per candidate).

    A node is [value], or [index of a list of keys, indices of the nodes of their values].
    """
    nodes: dict[tuple[Any, ...], int] = {}
    keys: dict[tuple[str, ...], int] = {}
    known: dict[str, int] = {}

    def node(value: Any) -> int:
        # Most trials repeat the tables of others, so a table is taken apart once.
        text = json.dumps(value)
        if text not in known:
            known[text] = new(value, text)
        return known[text]

    def new(value: Any, text: str = "") -> int:
        if isinstance(value, Mapping):
            index = keys.setdefault(tuple(value), len(keys))
            key: tuple[Any, ...] = ("table", index, tuple(node(v) for v in value.values()))
        else:
            key = ("value", text)
        return nodes.setdefault(key, len(nodes))

    roots = [new(config) for config in configs]
    written = [[k[1], list(k[2])] if k[0] == "table" else [json.loads(k[1])] for k in nodes]
    return written, [list(k) for k in keys], roots
