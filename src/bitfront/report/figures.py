"""The static figures: the tables of ``report.data``, drawn with matplotlib, for papers and slides.

The colours are the palette of Okabe and Ito and the colour map cividis, which colour-blind readers can distinguish. The
front also has a marker and a line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitfront.files import whole
from bitfront.report.data import Cloud, Failure, LayerMap, Parallel, SearchCourse, better, heights, title
from bitfront.report.grid import COLOURS, readable
from bitfront.report.importance import Importance
from bitfront.report.layout import DPI, lay_out, round_numbers, spaced, wide_text
from bitfront.report.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bitfront.engine.storage.run import Run

Values = NDArray[np.float64]
#: Okabe and Ito's palette.
BLUE, ORANGE, GREEN, RED, GREY, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999", "#000000"
#: Largest number of rows or columns that stay readable, and of cells with text that are drawn within about a second.
CELLS, WRITTEN = 60, 1500
#: An axis is logarithmic if its largest value is more than so many times its smallest.
WIDE = 8
#: Characters of an error message that a figure has room for.
ERROR = 90
#: Up to this many bits, the numbers on an axis of bits are powers of two.
BITS = 1024


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and SVG, and return the paths. Equal figures give equal bytes."""
    import matplotlib

    lay_out(figure)
    written = []
    options: dict[str, dict[str, Any]] = {
        # Level 6, the usual one, takes twice as long for some percent of the bytes.
        "png": {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": 3}},
        "svg": {"metadata": {"Date": None}},
    }
    for kind, more in options.items():
        path = folder / f"{name}.{kind}"
        with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}), whole(path) as part:
            figure.savefig(part, format=kind, dpi=DPI, **more)
        written.append(path)
    return written


def staircase(better: str) -> str:
    """The style of a line along a front, by the direction in which what is across is better. Between two members there
    is nothing but what one of them reaches, and a slanted line would promise more."""
    return "steps-pre" if better == "maximize" else "steps-post"


def front(run: Run, cloud: Cloud) -> Figure:
    """Draw the quality over each cost: all trials, the front with its intervals, and the float model."""
    metrics = run.columns.metrics
    figure, panels = panels_of(max(1, len(cloud.costs)))
    for axes, cost in zip(panels, cloud.costs, strict=False):
        x, y = metrics[cost], metrics[cloud.quality]
        axes.plot(x[cloud.rows], y[cloud.rows], ".", color=GREY, ms=4, alpha=0.6, label="trials", zorder=1)
        at = np.argsort(x[cloud.front], kind="stable")
        order = cloud.front[at]
        steps = staircase(better(run, cost))
        axes.plot(x[order], y[order], "-", drawstyle=steps, color=BLUE, lw=1, alpha=0.6, zorder=2)
        spread = np.abs(np.array([cloud.low, cloud.high])[:, at] - y[order])
        axes.errorbar(
            x[order],
            y[order],
            np.nan_to_num(spread),
            fmt="o",
            color=BLUE,
            ms=5,
            lw=1,
            capsize=2,
            label="front",
            zorder=3,
        )
        reference = run.reference.get(cost), run.reference.get(cloud.quality)
        if reference[0] is not None and reference[1] is not None:
            axes.plot([reference[0]], [reference[1]], "*", color=RED, ms=11, label="float model", zorder=4)
        _bounds(axes, run, {cost: x[cloud.rows], cloud.quality: y[cloud.rows]}, cost)
        if wide(np.append(x[cloud.rows], np.nan if reference[0] is None else reference[0])):
            logarithmic(axes, run.units.get(cost, ""))
        axes.set_xlabel(title(run, cost))
        axes.set_ylabel(title(run, cloud.quality) + (", 95 % intervals" if np.isfinite(cloud.low).any() else ""))
        axes.legend(fontsize=8)
    figure.suptitle(cloud.note, fontsize=9)
    return figure


def _bounds(axes: Axes, run: Run, drawn: Mapping[str, Values], across: str) -> None:
    """Draw the bounds of the constraints as lines, those among the points: others would squeeze the points together.

    Args:
        drawn: metric of an axis → the values there.
        across: which of them is the horizontal axis.
    """
    label = "constraints"
    for constraint in run.constraints:
        values = drawn.get(constraint.metric, np.array([]))
        if (values <= constraint.bound).any() and (values >= constraint.bound).any():
            line = axes.axvline if constraint.metric == across else axes.axhline
            line(constraint.bound, color=BLACK, lw=0.8, ls="--", alpha=0.7, zorder=0, label=label)
            label = "_nolegend_"


def wide(values: Values) -> bool:
    """Whether values need a logarithmic axis: all are positive, and the largest is more than ``WIDE`` times the
    smallest."""
    known = values[np.isfinite(values)]
    return len(known) > 0 and known.min() > 0 and bool(known.max() > WIDE * known.min())


def logarithmic(axes: Axes, unit: str = "") -> None:
    """Make the horizontal axis logarithmic, with as many plain numbers as it has room for: powers of two for bits."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    low, high = axes.dataLim.intervalx
    decades = float(np.log10(high / low))
    axes.set_xscale("log")
    # Numbers are written in full, so only a few fit.
    if unit == "bits" and high <= BITS:
        axes.xaxis.set_major_locator(LogLocator(base=2))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 1.5 else (1, 3) if decades < 2.2 else (1,)))
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8)


def layers(layer_map: LayerMap) -> Figure:
    """Draw one cell per place and trial of the front. More bits, or more channels, make it lighter."""
    from matplotlib import colormaps

    count = min(CELLS, len(layer_map.numbers))
    figure, (axes,) = panels_of(1, max(4.0, 1.8 + 0.42 * count), 1.2 + 0.3 * max(1, len(layer_map.places)))
    shades = np.ma.masked_invalid(layer_map.shades[:, :count])
    if shades.size:
        image = axes.imshow(shades, cmap=COLOURS, vmin=0, vmax=1, aspect="auto")
        for (i, j), _ in np.ndenumerate(shades) if shades.size <= WRITTEN else ():
            shade = layer_map.shades[i, j]
            colour = readable(colormaps[COLOURS](shade)) if np.isfinite(shade) else BLACK
            axes.text(j, i, layer_map.short[i][j], ha="center", va="center", fontsize=7, color=colour, in_layout=False)
        figure.colorbar(image, ax=axes).set_label("share of the\nlargest on offer", fontsize=8)
    axes.set_xticks(range(count), [str(n) for n in layer_map.numbers[:count]], rotation=90, fontsize=7)
    axes.set_yticks(range(len(layer_map.places)), layer_map.places, fontsize=8)
    # Long names of layers leave a narrow map.
    between = "\n" if count < CELLS // 4 else " "
    axes.set_xlabel(f"trial of the front,{between}best first objective first")
    return figure


def importances(per_metric: Sequence[Importance]) -> Figure:
    """Draw, per metric, the share of its variance that each parameter explains alone."""
    most = max([len(i.parameters) for i in per_metric], default=1)
    figure, panels = panels_of(max(1, len(per_metric)), 5.2, 1.4 + 0.28 * min(CELLS, max(4, most)))
    for axes, importance in zip(panels, per_metric, strict=False):
        axes.set_title(f"{importance.metric}, {importance.trials:,} trials", fontsize=10)
        if importance.missing:
            _say(axes, importance.missing)
            continue
        shown = importance.parameters[: CELLS - 1]
        names = [*(i.parameter for i in shown), "interactions and noise"]
        shares = [*(i.share for i in shown), importance.rest]
        axes.barh(range(len(names)), shares, color=[BLUE] * len(shown) + [GREY])
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        for place, share in enumerate(shares):
            inside = share > 0.8
            x, align, colour = (share - 0.01, "right", "white") if inside else (share + 0.01, "left", BLACK)
            axes.text(x, place, f"{share:.1%}", va="center", ha=align, color=colour, fontsize=8)
        axes.set_xlabel("share of the variance")
    return figure


def effects(run: Run, per_metric: Sequence[Importance]) -> Figure:
    """Draw, per metric, its mean with each option of a parameter. The parameters that matter most come first."""
    most = max([len(i.parameters) for i in per_metric], default=1)
    figure, panels = panels_of(max(1, len(per_metric)), 5.2, 1.4 + 0.4 * min(CELLS, max(3, most)))
    for axes, importance in zip(panels, per_metric, strict=False):
        if importance.missing:
            _say(axes, importance.missing)
            continue
        shown = importance.parameters[:CELLS]
        for place, influence in enumerate(shown):
            means = [e.mean for e in influence.effects]
            axes.plot([min(means), max(means)], [place, place], "-", color=GREY, lw=1)
            axes.plot(means, [place] * len(means), "o", color=BLUE, ms=5)
        axes.set_yticks(range(len(shown)), [i.parameter for i in shown], fontsize=8)
        axes.set_ylim(len(shown) - 0.5, -0.7)
        names = max((wide_text(i.parameter, 8) for i in shown), default=0.0)
        round_numbers(axes.xaxis, run.units.get(importance.metric, ""), 72 * 5.2 - names - 30)
        axes.set_xlabel(f"mean {title(run, importance.metric)} with that option")
    # How many labels fit is known only now.
    lay_out(figure)
    for axes, importance in zip(panels, per_metric, strict=False):
        low, high = axes.get_xlim()
        scale = axes.get_position().width * 72 * figure.get_figwidth() / (high - low)
        for place, influence in enumerate(() if importance.missing else importance.parameters[:CELLS]):
            for mean, label in spaced(influence, (low, high), scale, run.space.sizes):
                axes.annotate(label, (mean, place), (0, 5), textcoords="offset points", ha="center", fontsize=7)
    return figure


def history(search: SearchCourse) -> Figure:
    """Draw each objective over the trials with the best so far, then the hypervolume over trials and over seconds."""
    figure, panels = panels_of(len(search.courses) + 2, 4.4)
    for axes, course in zip(panels, search.courses, strict=False):
        axes.plot(course.rows + 1, course.values, ".", color=GREY, ms=4, alpha=0.6)
        if len(course.steps):
            last = max(int(course.steps[-1]), int(course.rows[-1]) if len(course.rows) else 0)
            at = np.append(course.steps, last) + 1
            axes.step(at, np.append(course.best, course.best[-1]), where="post", color=BLUE, label="best so far")
            axes.legend(fontsize=8)
        round_numbers(axes.yaxis, course.unit)
        round_numbers(axes.xaxis, "", whole=True)
        axes.set_xlabel("trials")
        axes.set_ylabel(course.title)
    for axes, x, label in zip(
        panels[-2:],
        (search.trials, search.seconds),
        ("trials", "seconds of evaluation, summed over trials"),
        strict=True,
    ):
        if search.missing:
            _say(axes, search.missing)
        else:
            axes.step(x, search.volume, where="post", color=GREEN)
            if label == "trials":
                round_numbers(axes.xaxis, "", whole=True)
            axes.set_ylim(0, 1)
            axes.set_xlabel(label)
        axes.set_ylabel("hypervolume, share of the box")
    return figure


def parallel(coordinates: Parallel) -> Figure:
    """Draw trials as lines over the choices and the objectives, with the front in colour."""
    from matplotlib.collections import LineCollection

    figure, (axes,) = panels_of(1, max(6.0, 1.3 * len(coordinates.axes)), 4.6)
    up = heights(coordinates)
    places = np.arange(len(coordinates.axes))
    for line in (False, True):
        colour, alpha, width = (BLUE, 0.9, 1.3) if line else (GREY, 0.25, 0.7)
        shown = [np.column_stack([places, crossed]) for crossed in up[:, coordinates.front == line].T]
        drawn = LineCollection(shown, color=colour, alpha=alpha, linewidths=width, zorder=2 if line else 1)
        axes.add_collection(drawn)
    for place in range(len(coordinates.axes)):
        axes.axvline(place, color=BLACK, lw=0.6)
        for height, label in ticks(coordinates, place):
            axes.text(
                place + 0.04,
                height,
                label,
                fontsize=7,
                va="center",
                bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.8},
                zorder=3,
            )
    axes.set_xticks(places, [a.title for a in coordinates.axes], rotation=30, ha="right", fontsize=8)
    axes.set_yticks([])
    # Room for what stands beside the last axis: an axis has about 90 points.
    last = max((wide_text(label) for _, label in ticks(coordinates, len(coordinates.axes) - 1)), default=0.0)
    axes.set_xlim(-0.2, len(coordinates.axes) - 1 + max(0.6, 0.1 + last / 90))
    axes.set_ylim(-0.03, 1.03)
    left = f"; not drawn: {words}" if (words := left_out(coordinates)) else ""
    axes.set_title(f"{coordinates.note}, the front in blue{left}", fontsize=10)
    return figure


def left_out(coordinates: Parallel) -> str:
    """Which parameters have no axis, in words; empty if all have one."""
    count = coordinates.left_out
    if not count:
        return ""
    if not coordinates.ranked:
        last = "the last parameter" if count == 1 else f"the last {count} parameters"
        return f"{last}; how much they matter is not known"
    return "the parameter that matters least" if count == 1 else f"the {count} parameters that matter least"


def ticks(coordinates: Parallel, axis: int) -> list[tuple[float, str]]:
    """(height, text) of the labels beside an axis: all labels of a parameter, or both ends of a metric."""
    labels = coordinates.axes[axis].short
    if labels:
        return [((i + 0.5) / len(labels), label) for i, label in enumerate(labels)]
    known = coordinates.values[axis][np.isfinite(coordinates.values[axis])]
    if not len(known):
        return []
    low, high = float(known.min()), float(known.max())
    return [(0.5, number(low))] if low == high else [(0.02, number(low)), (0.98, number(high))]


def failures(reasons: Sequence[Failure]) -> Figure:
    """Draw the number of trials per reason for which they failed."""
    shown = reasons[:20]
    figure, (axes,) = panels_of(1, 8.0, 1.2 + 0.4 * max(2, len(shown)))
    axes.barh(range(len(shown)), [f.count for f in shown], color=RED)
    axes.set_yticks([])
    for place, reason in enumerate(shown):
        text = reason.error if len(reason.error) <= ERROR else reason.error[: ERROR - 1] + "…"
        # matplotlib reads an unescaped dollar sign as the start of a formula.
        axes.text(
            0,
            place - 0.42,
            f" {reason.count:,} × {' '.join(text.split())}".replace("$", r"\$"),
            fontsize=8,
            va="bottom",
        )
    axes.set_ylim(max(1, len(shown)) - 0.4, -1.1)
    axes.set_xlabel("trials that failed")
    return figure


def panels_of(count: int, width: float = 5.2, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, side by side: at most three per row, four as two by two. Sizes are inches per panel."""
    from bitfront.report.canvas import ShownFigure

    across = 2 if count == 4 else min(3, count)
    down = -(-count // across)
    figure = ShownFigure(figsize=(min(40.0, width * across), min(40.0, height * down)), layout="constrained")
    drawn: Any = figure.subplots(down, across, squeeze=False)
    panels = list(drawn.ravel())
    for unused in panels[count:]:
        unused.set_visible(False)
    return figure, panels[:count]


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", wrap=True, fontsize=9, transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])
