"""A comparison of strategies as text and data: the table with the remarks below it, the JSON file, and the tables that
the figures draw. Nothing is measured here.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitfront.engine.comparison import curves
from bitfront.engine.comparison.curves import Spread, Values
from bitfront.engine.comparison.results import (
    EXHAUSTIVE,
    LEVELS,
    Band,
    Comparison,
    CurveAxis,
    CurveKind,
    StrategyResult,
)
from bitfront.pareto import MARGIN
from bitfront.report.tables import Sheet, number
from bitfront.spaces.base import counted

RESULT = "compare.json"


# -- wording


def best_there_is(comparison: Comparison) -> str:
    """The front that all results are measured against: ``true`` or ``best known``."""
    return "true" if comparison.truth else "best known"


def of_volume(comparison: Comparison) -> str:
    """The hypervolume that shares refer to, for the end of a sentence."""
    return "of the true hypervolume" if comparison.truth else "of the best known hypervolume"


def measure(comparison: Comparison) -> tuple[str, float, float]:
    """How the leading objective is shown: (title, offset, factor). The value shown is offset + factor · loss.

    Accuracy without a scale is shown as the error, 1 − accuracy. Everything else is shown as it is.
    """
    name = comparison.objectives.names[comparison.leading]
    direction = comparison.objectives.directions[comparison.leading]
    scale = 1.0 if comparison.objectives.summed else comparison.objectives.parts[comparison.leading].scale
    if name == "accuracy" and direction == "maximize" and scale == 1.0:
        return "error (1 − accuracy)", 1.0, 1.0
    shown = name if scale == 1.0 else f"{name} × {scale:g}"
    return shown, 0.0, -1.0 if direction == "maximize" else 1.0


# -- the table


def sheet(comparison: Comparison) -> Sheet:
    """The table: one row per strategy, with medians over the seeds and quartiles in brackets."""
    several = len(comparison.objectives.directions) > 1
    levels = [f"{100 * level:.0f} %" for level in LEVELS]
    columns = ["strategy"]
    if several:
        columns += [f"evals to {level}" for level in levels] + [f"seconds to {levels[0]}"]
    else:
        columns += ["evals to the best"]
    at = f"at {comparison.budget:,}"
    columns += [f"regret {at}"] if several else []
    columns += [f"shortfall {at}", "seconds strategy + evaluating", "repeats"]
    rows = []
    for result in comparison.results:
        spent = result.spent.values
        cells = [result.strategy]
        if several:
            cells += [reached(s, spent) for s in result.evaluations]
            totals = [a + e for a, e in zip(result.asking.values, result.evaluating.values, strict=True)]
            cells += [reached(s, totals) for s in result.seconds[:1]]
        else:
            cells += [reached(result.to_best, spent)]
        cells += [spread(result.regret)] if result.regret is not None else []
        cells += [spread(result.shortfall), f"{_one(result.asking.median)} + {_one(result.evaluating.median)}"]
        cells += [f"{_one(result.repeats.median)} of {_one(result.proposals.median)}"]
        rows.append(cells)
    return Sheet(columns, rows, right=columns[1:], whole=columns[:1])


def spread(quartiles: Spread) -> str:
    """``median [lower quartile, upper quartile]``, or the median alone if both quartiles are equal."""
    return _bracketed(*map(_one, (quartiles.median, quartiles.low, quartiles.high)))


def reached(quartiles: Spread, spent: Sequence[float]) -> str:
    """Like ``spread``, for numbers that may be infinite: ``> 400, 3 of 5`` if only 3 of 5 seeds reached the level.

    Args:
        spent: what each run has spent: an infinite number exceeds it, and no more is known.
    """
    least = curves.spread([v if math.isfinite(v) else s for v, s in zip(quartiles.values, spent, strict=True)])
    cells, last = {}, 0.0
    for name in ("low", "median", "high"):
        value = getattr(quartiles, name)
        # What is known to exceed a quartile exceeds the ones below it too.
        last = value if math.isfinite(value) else max(last, getattr(least, name))
        cells[name] = _one(value) if math.isfinite(value) else f"> {_one(last)}"
    shown, count = _bracketed(cells["median"], cells["low"], cells["high"]), len(quartiles.values)
    return shown if quartiles.reached == count else f"{shown}, {quartiles.reached} of {count}"


def _bracketed(median: str, low: str, high: str) -> str:
    return median if low == high else f"{median} [{low}, {high}]"


def _one(value: float) -> str:
    if math.isinf(value):
        return "no result"
    return number(value if value == int(value) else float(f"{value:.{max(2, len(str(int(abs(value)))))}g}"))


def lines(comparison: Comparison) -> list[str]:
    """The remarks below the table: what its columns mean, and what the comparison was."""
    names, directions = comparison.objectives.names, comparison.objectives.directions
    several, seeds = len(directions) > 1, comparison.seeds
    directed = [f"{n} ({d})" for n, d in zip(names, directions, strict=True)]
    remarks = [
        "",
        f"objectives: {', '.join(directed)}; {counted(comparison.size)} candidates, {comparison.budget:,} distinct "
        f"evaluations per run, {f'seeds {seeds[0]} to {seeds[-1]}' if len(seeds) > 1 else f'seed {seeds[0]}'}"
        + (": median [quartiles] over seeds" if len(seeds) > 1 else ""),
    ]
    if len(seeds) == 1 and len(comparison.runs) > 1:
        remarks.append("one seed: what differs may be luck; --seeds 5 shows how much of it")
    if comparison.constraints:
        remarks.append(f"constraints: {', '.join(comparison.constraints)}; nothing else counts")
    if comparison.truth:
        remarks.append(
            "the true front is known: every candidate was evaluated, or cannot fulfil the constraints"
            if comparison.constraints
            else "the true front is known: every candidate was evaluated"
        )
    else:
        remarks.append("the true front is not known: everything is relative to the best of all results so far")
        if len(comparison.runs) == 1 and several and comparison.runs[0].volume[-1:].sum() == 1:
            remarks.append("these are those of this run alone: a regret of 0 says nothing; compare more strategies")
    if several:
        signs = np.array([-1.0 if d == "maximize" else 1.0 for d in directions])
        point = ", ".join(f"{n} {number(v)}" for n, v in zip(names, comparison.reference * signs, strict=True))
        remarks.append(
            f"evals, seconds: evaluations and time until a run reached 95 % or 99 % {of_volume(comparison)}; reference "
            f"point {point} (the worst of the {best_there_is(comparison)} front, and {100 * MARGIN:.0f} % of its "
            "extent beyond)"
        )
        remarks.append(f"regret: the part {of_volume(comparison)} that is missing at the end of the budget")
    best = "true best" if comparison.truth else "best known"
    remarks.append(f"shortfall: by how much the best {names[comparison.leading]} of a run is worse than the {best}")
    exhaustive = EXHAUSTIVE in comparison.strategies
    remarks.append(
        "seconds: time in the strategy, measured now, and the time that each of its candidates took when it was first "
        "evaluated" + (", in brute force's large blocks, the cheapest way" if exhaustive else "")
    )
    failed = sum(c.failed for c in comparison.runs)
    if failed:
        remarks.append(f"failed: {failed:,} of the candidates of all runs, which count for nothing; a search says why")
    remarks.append(
        "repeats: proposals that the run had evaluated before, of all its proposals; they cost no evaluation"
    )
    if exhaustive:
        remarks.append(
            f"brute_force evaluates all {counted(comparison.size)} in the order of the space, which is arbitrary; "
            "optuna:random takes them in a random order"
        )
    remarks.append(
        f"{comparison.evaluated:,} candidates evaluated now, {comparison.known:,} known from before; "
        f"saved in {comparison.folder}"
    )
    if can_draw():
        pictures = ["courses", *(["fronts"] if several else [])]
        remarks.append(f"see it: {', '.join(str(comparison.folder / 'figures' / f'{p}.png') for p in pictures)}")
    return remarks


# -- the tables that the figures draw


@dataclass(frozen=True, eq=False)
class Line:
    """The curve of one strategy, in the units of the axis. Only the points where it changes are kept.

    Attributes:
        x: evaluations or seconds.
        median, low, high: median and quartiles over the seeds at each `x`; NaN before the first result.
    """

    strategy: str
    x: Values
    median: Values
    low: Values
    high: Values


@dataclass(frozen=True, eq=False)
class Panel:
    """The curves of all strategies over one axis.

    Attributes:
        what: hypervolume or the best value of the leading objective.
        over: evaluations or seconds.
        lines: one per strategy.
        levels: (height, text) of the horizontal lines.
    """

    what: CurveKind
    over: CurveAxis
    x_title: str
    y_title: str
    lines: tuple[Line, ...]
    levels: tuple[tuple[float, str], ...]


def panels(comparison: Comparison) -> tuple[Panel, ...]:
    """Panels of the hypervolume (if there are several objectives) and of the leading objective; each over evaluations
    and over seconds."""
    title, offset, factor = measure(comparison)
    all_panels = []
    kinds: tuple[CurveKind, ...] = ("volume", "best") if len(comparison.objectives.directions) > 1 else ("best",)
    axes: tuple[tuple[CurveAxis, str], ...] = (
        ("evaluations", "distinct evaluations"),
        ("seconds", "seconds, in the strategy and evaluating"),
    )
    for kind in kinds:
        for over, x_title in axes:
            if kind == "volume":
                shift, turn, y_title = 0.0, 1.0, f"part {of_volume(comparison)}"
                best = f"{best_there_is(comparison)} front"
                levels = ((1.0, best), *((level, f"{100 * level:.0f} %") for level in LEVELS))
            else:
                shift, turn, y_title = offset, factor, f"best {title} so far"
                levels = ((offset + factor * comparison.best, "true best" if comparison.truth else "best known"),)
            curves = tuple(_line(s, comparison.curve(s, kind, over), shift, turn) for s in comparison.strategies)
            all_panels.append(Panel(kind, over, x_title, y_title, curves, levels))
    return tuple(all_panels)


def _line(strategy: str, band: Band, offset: float, factor: float) -> Line:
    table = np.stack([band.median, band.low, band.high])
    with np.errstate(invalid="ignore"):
        moves = (table[:, 1:] != table[:, :-1]).any(axis=0)
    kept = np.concatenate([[True], moves])[: len(band.x)]
    kept[-1:] = True
    shown = offset + factor * np.where(np.isfinite(table), table, np.nan)[:, kept]
    low, high = (shown[1], shown[2]) if factor > 0 else (shown[2], shown[1])
    return Line(strategy, band.x[kept], shown[0], low, high)


@dataclass(frozen=True, eq=False)
class Plane:
    """Fronts over one cost and the leading objective, in the units of the objectives.

    Attributes:
        better: the direction in which the cost is better.
        results: the distinct results of all runs, shape (results, 2): cost, leading objective.
        front: the front that all are measured against, shape (members, 2), sorted by cost.
        fronts: (strategy, seed, front at the end of the budget) of the run with the median regret, per strategy.
    """

    x_title: str
    y_title: str
    better: str
    results: Values
    front: Values
    fronts: tuple[tuple[str, int, Values], ...]


def planes(comparison: Comparison) -> tuple[Plane, ...]:
    """One plane for each objective but the leading one."""
    names, directions = comparison.objectives.names, comparison.objectives.directions
    signs = np.array([-1.0 if d == "maximize" else 1.0 for d in directions])
    results = np.unique(np.concatenate([c.losses for c in comparison.runs]), axis=0)
    results = results[~np.isnan(results).any(axis=1)]
    all_planes = []
    for column, name in enumerate(names):
        if column == comparison.leading:
            continue
        pair = [column, comparison.leading]

        def shown(losses: Values, pair: list[int] = pair) -> Values:
            values = (losses * signs)[:, pair]
            ordered: Values = values[np.lexsort(values.T[::-1])]
            return ordered

        fronts = []
        for strategy in comparison.strategies:
            runs = comparison.of(strategy)
            ends = [float(c.volume[: comparison.budget][-1]) if len(c) else 0.0 for c in runs]
            middle = runs[int(np.argsort(ends, kind="stable")[len(ends) // 2])]
            fronts.append((strategy, middle.seed, shown(middle.front(comparison.budget))))
        all_planes.append(
            Plane(
                name,
                names[comparison.leading],
                directions[column],
                shown(results),
                shown(comparison.front),
                tuple(fronts),
            )
        )
    return tuple(all_planes)


# -- files


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON, without the candidates. ``write_json`` turns infinity (level not reached) into null."""
    signs = np.array([-1.0 if d == "maximize" else 1.0 for d in comparison.objectives.directions])
    several = len(comparison.objectives.directions) > 1
    return {
        "folder": str(comparison.folder),
        "strategies": list(comparison.strategies),
        "seeds": list(comparison.seeds),
        "budget": comparison.budget,
        "space_size": comparison.size,
        "objectives": comparison.objectives.described(),
        "summed": comparison.objectives.summed,
        "constraints": list(comparison.constraints),
        "truth": comparison.truth,
        "relative_to": f"the {best_there_is(comparison)} front",
        "reference_point": (comparison.reference * signs).tolist() if several else None,
        "hypervolume": comparison.hypervolume,
        "front": (comparison.front * signs).tolist(),
        "evaluated": comparison.evaluated,
        "known": comparison.known,
        "levels": list(LEVELS),
        "standings": [_standing(result) for result in comparison.results],
        "courses": [
            {
                "strategy": c.strategy,
                "seed": c.seed,
                "stopped": c.stopped,
                "evaluations": len(c),
                "proposals": c.proposals,
                "repeats": c.repeats,
                "failed": c.failed,
                "strategy_seconds": c.asked,
                "evaluating_seconds": float(c.evaluating.sum()),
                **({"volume": _steps(c.volume, c.seconds)} if several else {}),
                "best": _steps(c.best * signs[comparison.leading], c.seconds),
            }
            for c in comparison.runs
        ],
    }


def _standing(result: StrategyResult) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for name, value in vars(result).items():
        if isinstance(value, Spread):
            shown[name] = _spread(value)
        elif isinstance(value, tuple):
            shown[name] = [_spread(v) for v in value]
        else:
            shown[name] = value
    return shown


def _spread(quartiles: Spread) -> dict[str, Any]:
    return {**vars(quartiles), "values": list(quartiles.values), "reached": quartiles.reached}


def _steps(curve: Values, seconds: Values) -> dict[str, list[float]]:
    """The points where a curve changes: evaluations, seconds, and the new value."""
    rows = np.flatnonzero(np.concatenate([[True], curve[1:] != curve[:-1]])[: len(curve)])
    return {
        "evaluations": (rows + 1).tolist(),
        "seconds": seconds[rows].tolist(),
        "value": curve[rows].tolist(),
    }


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None
