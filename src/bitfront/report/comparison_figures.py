"""The figures of a comparison: the tables of ``report.comparison``, drawn with matplotlib.

A strategy has the same colour and the same line style or marker in all figures. The colours are from the palette of
Okabe and Ito, which colour-blind readers can distinguish.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bitfront.engine.comparison.results import EXHAUSTIVE, Comparison
from bitfront.report.comparison import Panel, Plane, best_there_is
from bitfront.report.figures import BLACK, BLUE, GREEN, GREY, ORANGE, RED, logarithmic, panels_of, staircase, wide
from bitfront.report.layout import round_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = (BLACK, BLUE, RED, GREEN, ORANGE, "#CC79A7", "#56B4E9", GREY)
DASHES = ("-", "-", "--", "-.", ":", "-", "--", "-.")
MARKERS = "ov^sDPX*"
#: At most about so many of all results are drawn as points.
SHOWN = 4000


def courses(panels: Sequence[Panel]) -> Figure:
    """Draw curves over evaluations and over seconds: median and quartiles over the seeds."""
    figure, axes_grid = panels_of(len(panels), 5.6, 4.2)
    at_the_edge: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    for axes, panel in zip(axes_grid, panels, strict=True):
        for place, line in enumerate(panel.lines):
            colour, dashes = COLOURS[place % len(COLOURS)], DASHES[place % len(DASHES)]
            axes.step(line.x, line.median, where="post", label=line.strategy, lw=1.6, color=colour, ls=dashes)
            axes.fill_between(line.x, line.low, line.high, step="post", color=colour, alpha=0.18, lw=0)
        for height, text in panel.levels:
            axes.axhline(height, color=GREY, lw=0.8, ls=(0, (1, 2)))
            axes.annotate(text, (0, height), (3, 2), fontsize=7, color="#555555", **at_the_edge)
        logarithmic(axes)
        # The same range in both panels, so that their heights can be compared.
        low, high = limits(next(p for p in panels if p.what == panel.what and p.over == "evaluations"))
        axes.set_ylim(low, high)
        axes.set_xlim(left=start(panel, low, high))
        axes.set_xlabel(panel.x_title)
        axes.set_ylabel(panel.y_title)
    handles, labels = axes_grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=9, ncols=min(5, len(labels)), loc="outside upper center")
    return figure


def limits(panel: Panel) -> tuple[float, float]:
    """Ends of the vertical axis: the range of the curves after a tenth of the shortest run, and of the levels.

    Brute force counts only if it is the only strategy: its poor results before the end would stretch the axis.

    Args:
        panel: a panel over evaluations.
    """
    lines = [line for line in panel.lines if line.strategy != EXHAUSTIVE] or panel.lines
    start = min(float(line.x[-1]) for line in lines) / 10
    heights = [height for height, _ in panel.levels]
    for line in lines:
        late = np.concatenate([values[line.x >= start] for values in (line.low, line.median, line.high)])
        heights += late[np.isfinite(late)].tolist()
    room = 0.06 * (max(heights) - min(heights) or 0.1)
    return min(heights) - room, max(heights) + room


def start(panel: Panel, low: float, high: float) -> float | None:
    """Where the first of the curves comes between `low` and `high`, with some room before it; None if none does."""
    firsts = []
    for line in panel.lines:
        table = np.stack([line.low, line.median, line.high])
        seen = np.flatnonzero(((table >= low) & (table <= high)).any(axis=0))
        firsts += [float(line.x[seen[0]])] if len(seen) else []
    return min(firsts) / 1.5 if firsts else None


def fronts(planes: Sequence[Plane], comparison: Comparison) -> Figure:
    """Draw the reference front, the front of each strategy at the end of the budget, and all results behind them."""
    figure, axes_grid = panels_of(len(planes), 7.0, 5.0)
    for axes, plane in zip(axes_grid, planes, strict=True):
        results = plane.results[:: max(1, -(-len(plane.results) // SHOWN))]
        axes.plot(*results.T, ".", color=GREY, ms=2, alpha=0.35, label="everything evaluated", rasterized=True)
        steps, label = staircase(plane.better), f"{best_there_is(comparison)} front"
        axes.plot(*plane.front.T, "-", drawstyle=steps, color=GREY, lw=4, alpha=0.6, label=label)
        for place, (strategy, seed, front) in enumerate(plane.fronts):
            if strategy == EXHAUSTIVE:
                continue  # it ignores the budget, and after the whole space its front is the reference front
            axes.plot(
                *front.T, MARKERS[place % len(MARKERS)], color=COLOURS[place % len(COLOURS)], ms=5, mfc="none",
                label=f"{strategy}, seed {seed}",
            )  # fmt: skip
        if wide(plane.results[:, 0]):
            logarithmic(axes)
        else:
            round_numbers(axes.xaxis, "", 400)
        axes.set_xlabel(plane.x_title)
        axes.set_ylabel(plane.y_title)
        axes.legend(fontsize=8)
    what = f"after {comparison.budget:,} evaluations; of each strategy the run whose regret is the median"
    figure.suptitle(what, fontsize=9)
    return figure
