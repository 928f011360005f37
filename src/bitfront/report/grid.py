"""A metric over two parameters, as a grid: a heatmap with the values in its cells, and three-dimensional bars.

If other parameters vary too, a cell is the mean of its trials. A cell without a trial, and a cell whose trials all
failed, look different from every value, also from zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitfront.errors import ConfigError, nearest, one_of
from bitfront.report.data import metric_names, title
from bitfront.report.importance import active
from bitfront.report.layout import lay_out, wide_text
from bitfront.report.tables import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bitfront.engine.storage.run import Run

Values = NDArray[np.float64]
COLOURS = "cividis"
#: Size of the labels of a heatmap, in points.
LABEL = 9
#: Names that an axis of three-dimensional bars has room for; of long ones half as many.
TICKS = 8
#: Vertical axes begin at zero, unless all values are above this share of the largest: they would all look the same.
FLAT = 0.7


@dataclass(frozen=True, eq=False)
class CellGrid:
    """A metric over two parameters.

    Attributes:
        title: the metric with its unit.
        x, y: the names of the parameters.
        columns, rows: labels of `x` and of `y`.
        values: mean per cell, float64, shape (rows, columns); NaN for a cell without a value.
        trials: number of complete trials with a finite value, per cell.
        failed: number of the other trials, per cell.
    """

    metric: str
    title: str
    x: str
    y: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: Values
    trials: NDArray[np.int64]
    failed: NDArray[np.int64]

    @property
    def note(self) -> str:
        """What a cell shows, as text; empty if every cell has at most one trial."""
        most = int(self.trials.max(initial=0))
        return "" if most <= 1 else f"mean of up to {most:,} trials per cell"

    def text(self, row: int, column: int) -> str:
        """The text in a cell: the value, ``failed``, or a dash if there is no trial."""
        if self.trials[row, column]:
            return number(float(self.values[row, column]))
        return "failed" if self.failed[row, column] else "–"


def grids(run: Run, x: str | None = None, y: str | None = None, metrics: Sequence[str] = ()) -> tuple[CellGrid, ...]:
    """One grid per metric.

    Args:
        x, y: names of parameters. Without them, a space with two parameters is drawn over these; other spaces have no
            grid.
        metrics: names of metrics; empty: all that have values.

    Raises:
        ConfigError: there is no such parameter or metric, only one parameter is given, or both are the same.
    """
    parameters = [p.name for p in run.space.parameters]
    if x is None and y is None:
        if metrics and len(parameters) != 2:
            raise ConfigError(f"a grid needs two parameters, x and y; {one_of(parameters)}", key=("metrics",))
        if len(parameters) != 2:
            return ()
        x, y = parameters
    if x is None or y is None:
        missing = "x" if x is None else "y"
        raise ConfigError(f"missing, and a grid needs two parameters; {one_of(parameters)}", key=(missing,))
    known = metric_names(run)
    for argument, name, allowed in (
        ("x", x, parameters),
        ("y", y, parameters),
        *(("metrics", m, known) for m in metrics),
    ):
        if name not in allowed:
            what = "metric with a value" if argument == "metrics" else "parameter that varies"
            raise ConfigError(
                f"this run has no {what} {name!r}; {one_of(allowed)}.{nearest(name, allowed)}", key=(argument,)
            )
    if x == y:
        raise ConfigError(f"{y!r} is x already; a grid needs two parameters", key=("y",))
    return tuple(grid(run, x, y, metric) for metric in metrics or known)


def grid(run: Run, x: str, y: str, metric: str) -> CellGrid:
    """One metric over two parameters of the space."""
    space, columns = run.space, run.columns
    x_column, y_column = (next(c for c, p in enumerate(space.parameters) if p.name == name) for name in (x, y))
    across, up = space.parameters[x_column], space.parameters[y_column]
    shape = len(up.labels), len(across.labels)
    codes, values = columns.code, columns.metrics[metric]
    counts = active(space, x_column, codes) & active(space, y_column, codes)
    fine = counts & columns.complete & np.isfinite(values)

    def per_cell(rows: NDArray[np.bool_], weights: Values | None = None) -> Values:
        cell = codes[rows, y_column] * shape[1] + codes[rows, x_column]
        return np.bincount(cell, weights, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)

    trials = per_cell(fine)
    means = np.where(trials > 0, per_cell(fine, values[fine]) / np.maximum(trials, 1), np.nan)
    return CellGrid(
        metric,
        title(run, metric),
        x,
        y,
        across.labels,
        up.labels,
        means,
        trials.astype(np.int64),
        per_cell(counts & ~fine).astype(np.int64),
    )


def heatmap(cells: CellGrid) -> Figure:
    """Draw the cells in colour, with their values. Cells without a value are hatched."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    rows, columns = cells.values.shape
    # A column has room for its label up to some length; longer labels are slanted.
    longest = max(wide_text(label, LABEL) for label in cells.columns) + 8
    across, beside = min(max(68.0, longest), 100.0), max(wide_text(label, LABEL) for label in cells.rows)
    slanted = longest > across
    figure = _figure(1.6 + (beside + across * columns) / 72, 1.4 + 0.55 * rows + (longest / 110 if slanted else 0))
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_invalid(cells.values), cmap=COLOURS, origin="lower", aspect="auto")
    size = 9 if max(rows, columns) <= 10 else 7
    span = colormaps[COLOURS]
    for r in range(rows):
        for c in range(columns):
            there = bool(cells.trials[r, c])
            if not there:
                hatch = "xx" if cells.failed[r, c] else "///"
                axes.add_patch(
                    Rectangle((c - 0.5, r - 0.5), 1, 1, facecolor="#f4f4f4", edgecolor="#b0b0b0", hatch=hatch, lw=0)
                )
            colour = readable(span(image.norm(cells.values[r, c]))) if there else "#333333"
            box = None if there else {"facecolor": "#f4f4f4", "edgecolor": "none", "pad": 1.5}
            axes.text(c, r, cells.text(r, c), ha="center", va="center", fontsize=size, color=colour, bbox=box)
    slant: Any = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(range(columns), cells.columns, fontsize=LABEL, **slant)
    axes.set_yticks(range(rows), cells.rows, fontsize=LABEL)
    axes.set_xlabel(cells.x)
    axes.set_ylabel(cells.y)
    axes.set_title("\n".join(filter(None, [cells.title, cells.note])), fontsize=10)
    if cells.trials.any():
        figure.colorbar(image, ax=axes, label=cells.title)
    return figure


def bars(cells: CellGrid) -> Figure:
    """Draw the cells as three-dimensional bars. Cells without a value are a cross on the floor.

    A bar has its value where it is in sight and there is room; all values are in the heatmap.
    """
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    rows, columns = cells.values.shape
    figure = _figure(7.0, 5.2)
    axes: Any = figure.add_subplot(projection="3d")
    known = cells.values[np.isfinite(cells.values)]
    floor, low, high = base(known)
    norm = Normalize(low, high if high > low else low + 1)
    colours = colormaps[COLOURS]
    # Far bars first, so that near ones cover them.
    for r in range(rows - 1, -1, -1):
        for c in range(columns):
            if cells.trials[r, c]:
                _bar(axes, c, r, floor, cells.values[r, c] - floor, colours(norm(cells.values[r, c])))
            else:
                _cross(axes, c, r, floor)
    for ticks, labels in ((axes.set_xticks, cells.columns), (axes.set_yticks, cells.rows)):
        room = TICKS if max(wide_text(label, 8) for label in labels) < 40 else TICKS // 2
        every = -(-len(labels) // room)
        ticks(range(0, len(labels), every), labels[::every], fontsize=8)
    axes.tick_params(axis="z", pad=6)
    axes.zaxis.set_major_formatter(lambda value, _: number(value))
    # If all values are zero, there is no height to show, and the axis still needs one.
    axes.set_zlim(floor, high + 0.1 * (high - floor) if high > floor else floor + 1)
    axes.set_xlabel(cells.x, labelpad=8)
    # The labels of this axis reach as far as they are long, and its name stands beyond them.
    axes.set_ylabel(cells.y, labelpad=8 + 0.6 * max(0.0, max(wide_text(label, 8) for label in cells.rows) - 30))
    axes.set_zlabel(cells.title, labelpad=13)
    cut = f"the upright axis begins at {number(floor)}" if floor else ""
    axes.set_title("\n".join(filter(None, [cells.title, cells.note, cut])), fontsize=10)
    axes.view_init(elev=28, azim=-58)
    axes.set_box_aspect((1, 1, 0.75), zoom=0.95)
    lay_out(figure)
    _write_values(axes, cells, floor)
    return figure


def _write_values(axes: Any, cells: CellGrid, floor: float) -> None:
    """Write the values above the bars of a figure that is laid out, the nearest first. A bar has none where nearer bars
    or values are in its place."""
    from matplotlib import rcParams
    from matplotlib.path import Path
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox
    from mpl_toolkits.mplot3d import proj3d

    axes.apply_aspect()
    projection, dots = axes.get_proj(), axes.figure.dpi / 72
    rows, columns = cells.values.shape
    size = 8 if rows * columns <= 36 else 6
    halo = [withStroke(linewidth=2.5, foreground=rcParams["figure.facecolor"])]

    def seen(*corners: tuple[float, float, float]) -> Values:
        x, y, _ = proj3d.proj_transform(*np.array(corners).T, projection)
        points: Values = axes.transData.transform(np.column_stack([x, y]))
        return points

    taken: list[Any] = []
    covering: list[Any] = []
    for r, c in ((r, c) for r in range(rows) for c in reversed(range(columns))):
        top, text = max(cells.values[r, c], floor) if cells.trials[r, c] else floor, cells.text(r, c)
        (x, y), half = seen((c, r, top))[0], 0.32 * size * dots * len(text)
        place = Bbox.from_extents(x - half, y - dots, x + half, y + size * dots)
        hidden = any(face.intersects_bbox(place, filled=True) for face in covering)
        if not hidden and not any(place.overlaps(other) for other in taken):
            taken.append(place)
            axes.text(c, r, top, text, ha="center", fontsize=size, zorder=1000, path_effects=halo)
        left, right, near, far = c - 0.35, c + 0.35, r - 0.35, r + 0.35
        sides = (((left, near), (right, near)), ((right, near), (right, far)))
        covering += [Path(seen((*a, floor), (*b, floor), (*b, top), (*a, top))) for a, b in sides if top > floor]
        covering.append(Path(seen(*((x, y, top) for x, y in ((left, near), (right, near), (right, far), (left, far))))))


def _bar(axes: Any, x: int, y: int, floor: float, height: float, colour: Any) -> None:
    """Draw one bar, which stands on `floor`."""
    edges = {"edgecolor": "#222222", "linewidth": 0.3}
    axes.bar3d(x - 0.35, y - 0.35, floor, 0.7, 0.7, height, color=colour, shade=True, **edges)


def _cross(axes: Any, x: int, y: int, floor: float) -> None:
    """Draw the cross of a cell without a value."""
    for xs, ys in (((-0.35, 0.35), (-0.35, 0.35)), ((-0.35, 0.35), (0.35, -0.35))):
        axes.plot([x + v for v in xs], [y + v for v in ys], [floor, floor], color="#888888", lw=0.8)


def base(known: Values) -> tuple[float, float, float]:
    """(start of the vertical axis, smallest value, largest value) of finite values; (0, 0, 1) if there are none."""
    if not len(known):
        return 0.0, 0.0, 1.0
    low, high = float(known.min()), float(known.max())
    if high <= 0:
        return low, low, 0.0
    if low == high or low < FLAT * high:
        return min(0.0, low), low, high
    step = 10 ** np.floor(np.log10(high - low))
    return float(max(0.0, np.floor((low - 0.25 * (high - low)) / step) * step)), low, high


def readable(colour: Any) -> str:
    """``black`` or ``white``, whichever has more contrast with a colour, by the relative luminance of WCAG 2.1."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "black"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
