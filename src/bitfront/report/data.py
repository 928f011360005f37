"""The tables behind the report: each function takes a run and returns frozen arrays. Nothing is drawn or measured here.

The static figures and the page draw the same tables. The tests check the tables instead of pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bitfront.pareto import Front, hypervolume
from bitfront.report.importance import Importance, active, importance
from bitfront.spaces.base import Space
from bitfront.spaces.described import Size

if TYPE_CHECKING:
    from bitfront.engine.storage.run import Run

Values = NDArray[np.float64]
Rows = NDArray[np.int64]
#: Up to so many trials are all drawn; of more, one per cell of a grid over the figure.
SHOWN = 2000
#: Trials of the front that figures and tables have room for; best.json has all.
FRONT = 200
#: Number of points at which the hypervolume is computed.
MOMENTS = 200
#: Parameters that parallel coordinates have room for.
COORDINATES = 10
#: With more than three objectives, the largest front whose hypervolume is computed: the time grows as a power of it.
SLICED = 40


def metric_names(run: Run) -> tuple[str, ...]:
    """The metrics with at least one finite value, without the ends of intervals."""
    metrics = run.columns.metrics
    ends = {f"{name}{end}" for name in metrics for end in ("_low", "_high")}
    return tuple(m for m, v in metrics.items() if m not in ends and np.isfinite(v).any())


def title(run: Run, metric: str) -> str:
    """A metric with its unit, as the title of an axis. Its kind follows if it is not the usual one."""
    unit = run.units.get(metric, "")
    kind, why = run.kinds.get(metric, ("", ""))
    return metric + (f" [{unit}]" if unit else "") + (f" ({kind})" if why else "")


def quality(run: Run) -> str:
    """The metric on the vertical axis of the front: accuracy, or what leads in another task, if it is there and no
    other metric of the task is an objective instead; otherwise the first objective."""
    objectives = [part.metric for part in run.objectives.parts]
    of_task = [name for name in objectives if name in run.qualities]
    if run.leading in run.columns.metrics and (run.leading == "accuracy" or run.leading in objectives or not of_task):
        return run.leading
    return next(iter(of_task), objectives[0])


def costs(run: Run) -> tuple[str, ...]:
    """The metrics on the horizontal axes: the other objectives, or the hardware metrics if there are no others."""
    others = [p.metric for p in run.objectives.parts if p.metric != quality(run)]
    return tuple(others or [m for m in metric_names(run) if run.sides[m] == "hw_runner"])


def better(run: Run, metric: str) -> str:
    """The direction in which a metric is better, ``maximize`` or ``minimize``; empty if it is no objective.

    A negative scale turns the direction of the objective around.
    """
    for part in run.objectives.parts:
        if part.metric == metric:
            direction = run.objectives.summed or part.direction
            if part.scale > 0:
                return direction
            return "minimize" if direction == "maximize" else "maximize"
    return ""


@dataclass(frozen=True, eq=False)
class Cloud:
    """The trials as points.

    Attributes:
        quality, costs: the metrics on the vertical axis and on the horizontal axes.
        rows: the rows of ``run.columns`` that are drawn, with those of the front.
        front: the rows of the front that are drawn, best first.
        on_front: number of trials on the front.
        complete: number of trials that did not fail.
        low, high: per row of `front`, the ends of the 95 % interval of the quality; NaN if it has none.
    """

    quality: str
    costs: tuple[str, ...]
    rows: Rows
    front: Rows
    on_front: int
    complete: int
    low: Values
    high: Values

    @property
    def note(self) -> str:
        """A sentence for the reader: how many trials are drawn, of how many."""
        if len(self.rows) == self.complete:
            return f"{self.complete:,} trials, {self.on_front:,} on the front"
        shown = "all" if len(self.front) == self.on_front else f"{len(self.front):,}"
        return (
            f"{len(self.rows):,} of {self.complete:,} trials are drawn, spread over where there are any; "
            f"{shown} of {self.on_front:,} on the front"
        )


def cloud(run: Run, limit: int = SHOWN) -> Cloud:
    """The trials to draw: all up to `limit`, otherwise the front and one trial per cell of a grid over the first cost
    and the quality."""
    upright, against = quality(run), costs(run)
    columns = run.columns
    front = run.front_rows[:: max(1, -(-len(run.front_rows) // FRONT))]
    complete = np.flatnonzero(columns.complete)
    drawn = complete
    if len(complete) > limit:
        flat = [columns.metrics[m][complete] for m in (*against[:1], upright)]
        drawn = np.union1d(complete[_spread(flat, limit - min(len(front), limit // 2))], front)
    number = columns.number
    ends = [
        run.intervals({m: float(v[r]) for m, v in columns.metrics.items()}, str(number[r])).get(upright) for r in front
    ]
    low, high = (np.array([e[i] if e else np.nan for e in ends], dtype=np.float64) for i in (0, 1))
    return Cloud(upright, against, drawn, front, len(run.front_rows), len(complete), low, high)


def _spread(columns: Sequence[Values], limit: int) -> Rows:
    """The first row in each cell of a grid of about `limit` cells, and evenly spaced rows up to `limit`."""
    count = len(columns[0])
    side = max(1, int(limit ** (1 / len(columns)) * 0.9))
    cell = np.zeros(count, dtype=np.int64)
    for column in columns:
        rank = np.nan_to_num((column - np.nanmin(column)) / max(float(np.nanmax(column) - np.nanmin(column)), 1e-300))
        cell = cell * (side + 1) + (rank * side).astype(np.int64)
    first = np.unique(cell, return_index=True)[1]
    rest = np.linspace(0, count - 1, max(0, limit - len(first))).astype(np.int64)
    rows: Rows = np.union1d(first[:limit], rest)
    return rows


@dataclass(frozen=True)
class LayerMap:
    """The choices of the trials on the front, site by site.

    Attributes:
        places: ``site/operand`` of everything with more than one choice, in the order of the model.
        numbers: numbers of the trials, in the order of the front.
        labels: per place and trial, the label of the choice.
        short: the same labels, shortened for small cells.
        shades: per place and trial, the bits or the width as a share of the largest in the whole space, float64, shape
            (places, trials), 0 to 1; NaN if the choice has no size.
    """

    places: tuple[str, ...]
    numbers: tuple[int, ...]
    labels: tuple[tuple[str, ...], ...]
    short: tuple[tuple[str, ...], ...]
    shades: Values


def layer_map(run: Run, rows: Rows) -> LayerMap:
    """The choices of the trials in some rows of ``run.columns``."""
    space, codes = run.space, run.columns.codes(rows)
    options = space.options(codes)
    places: list[str] = []
    labels: list[tuple[str, ...]] = []
    for g, group in enumerate(space.groups):
        if group.size == 1:
            continue
        for name in dict.fromkeys(c.name for b in group.branches for c in b.choices) or ["name"]:
            offered = {_chosen(space, g, o, name) for o in range(group.size)} if group.size <= 4096 else {"", "-"}
            if len(offered) > 1:
                places.append(f"{group.name}/{name}")
                labels.append(tuple(_chosen(space, g, o, name) for o in options[:, g].tolist()))
    largest: dict[str, float] = {}
    for size in (space.sizes.get(label) for p in space.parameters for label in p.labels):
        if size is not None:
            largest[size.kind] = max(size.amount, largest.get(size.kind, 0.0))
    shades = np.full((len(places), len(rows)), np.nan)
    for i, choices in enumerate(labels):
        for j, size in enumerate(map(space.sizes.get, choices)):
            if size is not None and largest.get(size.kind):
                shades[i, j] = min(1.0, size.amount / largest[size.kind])
    numbers = tuple(run.columns.number[rows].tolist())
    short = tuple(shortened(choices, space.sizes) for choices in labels)
    return LayerMap(tuple(places), numbers, tuple(labels), short, shades)


def _chosen(space: Space, group: int, option: int, name: str) -> str:
    """The label that an option of a group chooses for an operand, or the label of its branch if it chooses none."""
    index, picks = space.groups[group].picks(option)
    branch = space.groups[group].branches[index]
    for choice, pick in zip(branch.choices, picks, strict=True):
        if choice.name == name:
            return choice.labels[pick]
    return "float" if branch.label == "NA" else branch.label


def shortened(labels: Sequence[str], sizes: Mapping[str, Size]) -> tuple[str, ...]:
    """Labels for small cells: only the bits of a format, if no two formats have the same bits."""
    brief = {
        label: f"{size.amount:g}" if (size := sizes.get(label)) and size.kind == "bits" and label != "float" else label
        for label in labels
    }
    return tuple(brief[label] if len(set(brief.values())) == len(brief) else label for label in labels)


@dataclass(frozen=True, eq=False)
class ObjectiveCourse:
    """One objective over the trials, in the order of their evaluation.

    Attributes:
        unit: of the metric; empty for a sum.
        rows, values: the trials that are drawn as points, and their values.
        steps: rows at which the best value so far changed.
        best: the best value from each of these rows on.
    """

    name: str
    title: str
    unit: str
    direction: str
    rows: Rows
    values: Values
    steps: Rows
    best: Values


@dataclass(frozen=True, eq=False)
class SearchCourse:
    """The course of a search.

    Attributes:
        courses: one per objective.
        trials: number of trials evaluated, at each point of `volume`.
        seconds: sum of the durations of these trials.
        volume: hypervolume of the front, as a share of the box between the best and the worst value of every
            objective, 0 to 1.
        missing: why there is no volume; empty if there is one.
        end_seconds: per row of ``run.columns``, the sum of the durations up to and including it.
    """

    courses: tuple[ObjectiveCourse, ...]
    trials: Rows
    seconds: Values
    volume: Values
    missing: str
    end_seconds: Values


def history(run: Run, limit: int = SHOWN) -> SearchCourse:
    """Objectives and hypervolume over trials and seconds. Trials that break a constraint do not count."""
    columns = run.columns
    values = run.objectives.values(columns.metrics)
    losses = counted(run)
    names, directions = run.objectives.names, run.objectives.directions
    courses = []
    for column, (name, direction) in enumerate(zip(names, directions, strict=True)):
        known = np.flatnonzero(np.isfinite(values[:, column]) & columns.complete)
        rows = known[_spread([known.astype(np.float64), values[known, column]], limit)] if len(known) > limit else known
        best = np.fmin.accumulate(losses[:, column]) if len(columns) else losses[:, column]
        before = np.concatenate([[np.nan], best[:-1]])
        steps = np.flatnonzero(~np.isnan(best) & (np.isnan(before) | (best < before)))
        label = objective_title(run, name)
        sign = -1 if direction == "maximize" else 1
        unit = run.units.get(name, "") if label == title(run, name) else ""
        course = ObjectiveCourse(name, label, unit, direction, rows, values[rows, column], steps, sign * best[steps])
        courses.append(course)
    end = np.cumsum(np.nan_to_num(columns.duration))
    return SearchCourse(tuple(courses), *_volumes(losses, end), end)


def counted(run: Run) -> Values:
    """Losses of the trials, float64, shape (trials, objectives); NaN for those that failed or break a constraint."""
    losses = np.full((len(run), len(run.objectives.directions)), np.nan)
    ranked = run.ranked_rows
    losses[ranked] = run.objectives.losses(run.columns.metrics)[ranked]
    return losses


def objective_title(run: Run, name: str) -> str:
    """An objective as the title of an axis: the metric with its unit, or with its scale if that is not 1."""
    scale = next((p.scale for p in run.objectives.parts if p.metric == name), None)
    if scale is None:
        return name  # the sum of all
    return title(run, name) if scale == 1 else f"{name} × {scale:g}"


def _volumes(losses: Values, seconds: Values) -> tuple[Rows, Values, Values, str]:
    nothing = np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0)
    fine = ~np.isnan(losses).any(axis=1)
    objectives = losses.shape[1]
    if objectives == 1:
        return *nothing, "one objective has no volume; its course says the same"
    if fine.sum() < 2:
        return *nothing, "fewer than two trials count"
    low, high = losses[fine].min(axis=0), losses[fine].max(axis=0)
    if not np.isfinite([low, high]).all() or (high == low).any():
        return *nothing, "an objective is infinite, or the same for all trials"
    scaled = (losses - low) / (high - low)
    ends = np.unique(np.linspace(1, len(losses), min(len(losses), MOMENTS)).round().astype(np.int64))
    front, start = Front(objectives), 0
    volume: list[float] = []
    for end in ends.tolist():
        before = front.rows
        front.add(scaled[start:end])
        if volume and np.array_equal(before, front.rows):
            start = end
            volume.append(volume[-1])
            continue
        if objectives > 3 and len(front) > SLICED:
            return *nothing, f"the volume of {len(front)} trials in {objectives} dimensions takes too long"
        start = end
        volume.append(hypervolume(front.losses, np.ones(objectives)))
    return ends, seconds[ends - 1], np.array(volume), ""


@dataclass(frozen=True)
class Coordinate:
    """One axis of the parallel coordinates: a parameter with its labels, or an objective, which has no labels."""

    name: str
    title: str
    labels: tuple[str, ...] = ()
    short: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Parallel:
    """Trials as lines over axes.

    Attributes:
        rows: the rows of ``run.columns`` that are drawn.
        front: per row, whether the trial is on the front.
        values: per axis and row, the index of the label or the value of the metric, float64, shape (axes, rows); NaN
            if the parameter has no effect.
        left_out: number of parameters without room.
        ranked: whether these matter least for the first objective; otherwise that is not known, and they are the last.
        complete: number of trials that did not fail.
    """

    axes: tuple[Coordinate, ...]
    rows: Rows
    front: NDArray[np.bool_]
    values: Values
    left_out: int
    ranked: bool
    complete: int

    @property
    def note(self) -> str:
        """For the reader: how many trials are drawn, of how many."""
        drawn, complete = len(self.rows), self.complete
        return f"{complete:,} trials" if drawn == complete else f"{drawn:,} of {complete:,} trials"


def parallel(run: Run, mattering: Sequence[Importance], limit: int = 300) -> Parallel:
    """Lines of the trials that ``cloud`` selects, over the parameters that matter most and the objectives.

    Args:
        mattering: the importances of the parameters; the first counts.
    """
    space, metrics = run.space, run.columns.metrics
    order = [i.parameter for i in mattering[0].parameters] if mattering else []
    names = order or [p.name for p in space.parameters]
    kept = set(names[:COORDINATES])
    columns = [c for c, p in enumerate(space.parameters) if p.name in kept]
    drawn = cloud(run, limit)
    codes = run.columns.codes(drawn.rows)
    axes = [
        Coordinate(p.name, p.name, p.labels, shortened(p.labels, space.sizes))
        for p in (space.parameters[c] for c in columns)
    ]
    values = []
    for c in columns:
        indices = codes[:, c].astype(np.float64)
        indices[~active(space, c, codes)] = np.nan
        values.append(indices)
    for part in run.objectives.parts:
        axes.append(Coordinate(part.metric, title(run, part.metric)))
        values.append(metrics[part.metric][drawn.rows])
    table = np.array(values).reshape(len(axes), len(drawn.rows))
    return Parallel(
        tuple(axes),
        drawn.rows,
        np.isin(drawn.rows, drawn.front),
        table,
        len(space.parameters) - len(columns),
        bool(order),
        drawn.complete,
    )


@dataclass(frozen=True)
class Failure:
    """A reason why trials failed: the error, the number of trials that had it, and the number of the first one."""

    error: str
    count: int
    first: int


def failures(run: Run) -> tuple[Failure, ...]:
    """The errors of the trials, the most frequent first."""
    first: dict[str, int] = {}
    for number, error in run.columns.errors.items():
        first.setdefault(error, number)
    return tuple(Failure(e, n, first[e]) for e, n in Counter(run.columns.errors.values()).most_common())


def influences(run: Run) -> tuple[Importance, ...]:
    """The importance of every parameter, for the metric of each objective."""
    columns = run.columns
    codes = columns.code
    finite: Iterable[tuple[str, Values]] = ((p.metric, columns.metrics[p.metric]) for p in run.objectives.parts)
    return tuple(importance(run.space, m, codes, np.where(columns.complete, v, np.nan)) for m, v in finite)


def undefined(run: Run) -> Mapping[str, int]:
    """Metric → number of complete trials without a value of it; without metrics that all of them have."""
    columns = run.columns
    counts = {m: int((np.isnan(v) & columns.complete).sum()) for m, v in columns.metrics.items()}
    return {m: n for m, n in counts.items() if n}


def heights(coordinates: Parallel) -> Values:
    """Per axis and trial, the height at which the line crosses the axis, 0 to 1; shape of ``coordinates.values``.

    Labels divide an axis into equal parts and lie in their middle. A metric spans its axis from its smallest to its
    largest value.
    """
    up = np.full(coordinates.values.shape, np.nan)
    for i, (axis, values) in enumerate(zip(coordinates.axes, coordinates.values, strict=True)):
        known = values[np.isfinite(values)]
        if axis.labels:
            up[i] = (values + 0.5) / len(axis.labels)
        elif len(known):
            low, high = known.min(), known.max()
            up[i] = (
                0.02 + 0.96 * (values - low) / (high - low) if high > low else np.where(np.isnan(values), np.nan, 0.5)
            )
    return up
