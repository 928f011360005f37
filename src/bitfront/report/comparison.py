"""A comparison of strategies, for people and machines: the table, what to know beside it, JSON, and the tables that its
figures are drawn from. Nothing is measured here.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitfront.engine.comparison.curves import MARGIN, Spread, Values
from bitfront.engine.comparison.results import EXHAUSTIVE, LEVELS, Band, Comparison, CurveAxis, CurveKind
from bitfront.report.tables import Sheet, number

RESULT = "compare.json"


# -- words


def best_there_is(own: Comparison) -> str:
    """What everything is measured against."""
    return "true" if own.truth else "best known"


def of_volume(own: Comparison) -> str:
    """What a part of the hypervolume is a part of."""
    return "of the true hypervolume" if own.truth else "of the best known hypervolume"


def measure(own: Comparison) -> tuple[str, float, float]:
    """How the leading objective is shown: (title, offset, factor); shown is offset + factor · loss.

    Accuracy is shown as the error, 1 − accuracy, where it is not scaled; anything else as it is.
    """
    name = own.objectives.names[own.leading]
    direction = own.objectives.directions[own.leading]
    scale = 1.0 if own.objectives.summed else own.objectives.parts[own.leading].scale
    if name == "accuracy" and direction == "maximize" and scale == 1.0:
        return "error (1 − accuracy)", 1.0, 1.0
    shown = name if scale == 1.0 else f"{name} × {scale:g}"
    return shown, 0.0, -1.0 if direction == "maximize" else 1.0


# -- the table


def sheet(own: Comparison) -> Sheet:
    """A row per strategy: median over seeds, and quartiles in brackets."""
    several = len(own.objectives.directions) > 1
    levels = [f"{100 * level:.0f} %" for level in LEVELS]
    columns = ["strategy"]
    if several:
        columns += [f"evals to {level}" for level in levels] + [f"seconds to {levels[0]}"]
    else:
        columns += ["evals to the best"]
    at = f"at {own.budget:,}"
    columns += [f"regret {at}"] if several else []
    columns += [f"shortfall {at}", "seconds own + evaluating", "repeats"]
    rows = []
    for one in own.results:
        spent = int(one.spent.median)
        cells = [one.strategy]
        if several:
            cells += [reached(s, spent) for s in one.evaluations]
            totals = [a + e for a, e in zip(one.asking.values, one.evaluating.values, strict=True)]
            cells += [reached(s, max(totals)) for s in one.seconds[:1]]
        else:
            cells += [reached(one.to_best, spent)]
        cells += [spread(one.regret)] if one.regret is not None else []
        cells += [spread(one.shortfall), f"{_one(one.asking.median)} + {_one(one.evaluating.median)}"]
        cells += [f"{_one(one.repeats.median)} of {_one(one.proposals.median)}"]
        rows.append(cells)
    return Sheet(columns, rows, right=columns[1:], whole=columns[:1])


def spread(own: Spread) -> str:
    """``median [lower quartile, upper quartile]``; what is the same for all seeds stands alone."""
    return _bracketed(*map(_one, (own.median, own.low, own.high)))


def reached(own: Spread, limit: float) -> str:
    """The same where something may not have been reached: ``> 400``, and by how many of the seeds it was."""
    text = f"> {_one(limit)}"
    cells = [text if math.isinf(v) else _one(v) for v in (own.median, own.low, own.high)]
    shown, count = _bracketed(*cells), len(own.values)
    return shown if own.reached == count else f"{shown}, {own.reached} of {count}"


def _bracketed(median: str, low: str, high: str) -> str:
    return median if low == high else f"{median} [{low}, {high}]"


def _one(value: float) -> str:
    if math.isinf(value):
        return "nothing found"
    return number(value if value == int(value) else float(f"{value:.{max(2, len(str(int(abs(value)))))}g}"))


def lines(own: Comparison) -> list[str]:
    """What to know beside the table, a line each."""
    several, count = len(own.objectives.directions) > 1, len(own.seeds)
    directed = [f"{n} ({d})" for n, d in zip(own.objectives.names, own.objectives.directions, strict=True)]
    said = [
        "",
        f"objectives: {', '.join(directed)}; {own.size:,} candidates, {own.budget:,} distinct "
        f"evaluations per run, {f'seeds {own.seeds[0]} to {own.seeds[-1]}' if count > 1 else f'seed {own.seeds[0]}'}"
        + (": median [quartiles] over seeds" if count > 1 else ""),
    ]
    if own.constraints:
        said.append(f"constraints: {', '.join(own.constraints)}; nothing else counts")
    if own.truth:
        said.append(
            "the true front is known: every candidate was evaluated, or cannot fulfil the constraints"
            if own.constraints
            else "the true front is known: every candidate was evaluated"
        )
    else:
        said.append("the true front is not known: everything is relative to the best that these runs found together")
    if several:
        signs = np.array([-1.0 if d == "maximize" else 1.0 for d in own.objectives.directions])
        point = ", ".join(f"{n} {number(v)}" for n, v in zip(own.objectives.names, own.reference * signs, strict=True))
        said.append(
            f"evals, seconds: evaluations and time until 95 % or 99 % {of_volume(own)} were found; reference point "
            f"{point} (the worst of the {best_there_is(own)} front, and {100 * MARGIN:.0f} % of its extent beyond)"
        )
        said.append(f"regret: the part {of_volume(own)} that is missing at the end of the budget")
    leading = own.objectives.names[own.leading]
    best = "true best" if own.truth else "best known"
    said.append(f"shortfall: by how much the best {leading} found is worse than the {best}")
    said.append(
        "seconds: the strategy's own, measured now, and those that evaluating its candidates took when each was "
        "evaluated first"
        + (", in brute force's large blocks, which is as cheap as it gets" if EXHAUSTIVE in own.strategies else "")
    )
    failed = sum(c.failed for c in own.runs)
    if failed:
        said.append(f"failed: {failed:,} of the candidates of all runs, which count for nothing; a search says why")
    said.append("repeats: proposals that the run knew already, of all it made; they cost no evaluation")
    if EXHAUSTIVE in own.strategies:
        said.append(
            f"brute_force goes through all {own.size:,}, in the space's own order, which is arbitrary; optuna:random "
            "takes them in a shuffled one"
        )
    said.append(f"{own.evaluated:,} candidates evaluated now, {own.known:,} known from before; saved in {own.folder}")
    if can_draw():
        names = ["courses", *(["fronts"] if several else [])]
        said.append(f"see it: {', '.join(str(own.folder / 'figures' / f'{name}.png') for name in names)}")
    return said


# -- what the figures show


@dataclass(frozen=True, eq=False)
class Line:
    """A strategy's curve, thinned to where it changes, in the units that are shown; NaN where nothing was found yet."""

    strategy: str
    x: Values
    median: Values
    low: Values
    high: Values


@dataclass(frozen=True, eq=False)
class Panel:
    """Curves of all strategies.

    Attributes:
        levels: (height, text) of the lines across.
    """

    what: CurveKind
    over: CurveAxis
    x_title: str
    y_title: str
    lines: tuple[Line, ...]
    levels: tuple[tuple[float, str], ...]


def panels(own: Comparison) -> tuple[Panel, ...]:
    """Hypervolume, where there is one, and the leading objective, over evaluations and over seconds."""
    title, offset, factor = measure(own)
    found = []
    whats: tuple[CurveKind, ...] = ("volume", "best") if len(own.objectives.directions) > 1 else ("best",)
    axes: tuple[tuple[CurveAxis, str], ...] = (
        ("evaluations", "distinct evaluations"),
        ("seconds", "seconds: the strategy's own, and of evaluating"),
    )
    for what in whats:
        for over, x_title in axes:
            if what == "volume":
                shift, turn, y_title = 0.0, 1.0, f"part {of_volume(own)}"
                levels = ((1.0, f"{best_there_is(own)} front"), *((level, f"{100 * level:.0f} %") for level in LEVELS))
            else:
                shift, turn, y_title = offset, factor, f"best {title} so far"
                levels = ((offset + factor * own.best, "true best" if own.truth else "best known"),)
            curves = tuple(_line(s, own.curve(s, what, over), shift, turn) for s in own.strategies)
            found.append(Panel(what, over, x_title, y_title, curves, levels))
    return tuple(found)


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
    """Fronts over a cost and the leading objective, in the objectives' own values.

    Attributes:
        results: every result of all runs, each once, shape (results, 2): cost, leading objective.
        front: of the best front there is, by cost.
        fronts: strategy → (seed, its front at the end of the budget), of the run whose regret is the median.
    """

    x_title: str
    y_title: str
    results: Values
    front: Values
    fronts: tuple[tuple[str, int, Values], ...]


def planes(own: Comparison) -> tuple[Plane, ...]:
    """One per objective beside the leading one."""
    names, directions = own.objectives.names, own.objectives.directions
    signs = np.array([-1.0 if d == "maximize" else 1.0 for d in directions])
    every = np.unique(np.concatenate([c.losses for c in own.runs]), axis=0)
    every = every[~np.isnan(every).any(axis=1)]
    found = []
    for column, name in enumerate(names):
        if column == own.leading:
            continue
        pair = [column, own.leading]

        def shown(losses: Values, pair: list[int] = pair) -> Values:
            values = (losses * signs)[:, pair]
            ordered: Values = values[np.lexsort(values.T[::-1])]
            return ordered

        fronts = []
        for strategy in own.strategies:
            runs = own.of(strategy)
            ends = [float(c.volume[: own.budget][-1]) if len(c) else 0.0 for c in runs]
            middle = runs[int(np.argsort(ends, kind="stable")[len(ends) // 2])]
            fronts.append((strategy, middle.seed, shown(middle.front(own.budget))))
        found.append(Plane(name, names[own.leading], shown(every), shown(own.front), tuple(fronts)))
    return tuple(found)


# -- files


def as_json(own: Comparison) -> dict[str, Any]:
    """Everything but the candidates themselves. Infinity (not reached, nothing found) becomes null."""
    signs = np.array([-1.0 if d == "maximize" else 1.0 for d in own.objectives.directions])
    several = len(own.objectives.directions) > 1
    return {
        "folder": str(own.folder),
        "strategies": list(own.strategies),
        "seeds": list(own.seeds),
        "budget": own.budget,
        "space_size": own.size,
        "objectives": own.objectives.described(),
        "summed": own.objectives.summed,
        "constraints": list(own.constraints),
        "truth": own.truth,
        "relative_to": f"the {best_there_is(own)} front",
        "reference_point": (own.reference * signs).tolist() if several else None,
        "hypervolume": own.hypervolume,
        "front": (own.front * signs).tolist(),
        "evaluated": own.evaluated,
        "known": own.known,
        "levels": list(LEVELS),
        "standings": [_standing(one) for one in own.results],
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
                "best": _steps(c.best * signs[own.leading], c.seconds),
            }
            for c in own.runs
        ],
    }


def _standing(one: Any) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for name, value in vars(one).items():
        if isinstance(value, Spread):
            shown[name] = _spread(value)
        elif isinstance(value, tuple):
            shown[name] = [_spread(v) for v in value]
        else:
            shown[name] = value
    return shown


def _spread(own: Spread) -> dict[str, Any]:
    return {**vars(own), "values": list(own.values), "reached": own.reached}


def _steps(curve: Values, seconds: Values) -> dict[str, list[float]]:
    """A curve where it changes: after how many evaluations, after how many seconds, to what."""
    rows = np.flatnonzero(np.concatenate([[True], curve[1:] != curve[:-1]])[: len(curve)])
    return {
        "evaluations": (rows + 1).tolist(),
        "seconds": seconds[rows].tolist(),
        "value": curve[rows].tolist(),
    }


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None
