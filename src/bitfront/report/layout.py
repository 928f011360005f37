"""Where the parts of a static figure are: the numbers on an axis of bits, and the labels that fit beside others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bitfront.report.data import shortened
from bitfront.report.importance import Influence
from bitfront.report.tables import number
from bitfront.spaces.described import Size

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

#: Dots per inch of a PNG.
DPI = 150
#: Points between two labels, and options that one label has room for.
GAP, TOGETHER = 4.0, 4
#: Steps that a linear axis has at most.
STEPS = 7


def lay_out(figure: Figure) -> None:
    """Fix where the parts of a figure are. It takes as long as drawing it, so it is done once, not per file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    engine = figure.get_layout_engine()
    if engine is not None:
        figure.set_dpi(DPI)
        FigureCanvasAgg(figure)  # it keeps the sizes of texts for the PNG
        engine.execute(figure)
        figure.set_layout_engine(None)


def round_numbers(axis: Axis, unit: str, room: float = math.inf, *, whole: bool = False) -> None:
    """The numbers on a linear axis on which all is drawn: few enough to stand side by side, of bits in steps that are
    powers of two.

    Args:
        room: length of a horizontal axis in points, at least.
        whole: whether only whole numbers make sense.
    """
    from matplotlib.ticker import MaxNLocator, MultipleLocator

    low, high = axis.get_view_interval()
    steps = max(2, min(STEPS, int(min(room, 1e6) / (wide_text(number(round(high, 3)), 10) + 2 * GAP)) - 1))
    if unit == "bits":
        axis.set_major_locator(MultipleLocator(2.0 ** np.ceil(np.log2(max(high - low, 1e-9) / steps))))
    else:
        axis.set_major_locator(MaxNLocator(steps, steps=[1, 2, 2.5, 5, 10], integer=whole))
    axis.set_major_formatter(lambda value, _: number(value))


def spaced(
    influence: Influence, ends: tuple[float, float], scale: float, sizes: Mapping[str, Size]
) -> list[tuple[float, str]]:
    """(middle, text) of the labels above the options of a parameter. Options without room for two labels share one.

    Args:
        ends: of the axis; no label reaches beyond them.
        scale: points of the axis per unit of the mean.
    """
    brief = shortened([e.label for e in influence.effects], sizes)
    order = sorted(range(len(brief)), key=lambda i: influence.effects[i].mean)
    # Per label: the least and the largest mean, and the options.
    labels: list[tuple[float, float, list[str]]] = []

    def half(label: tuple[float, float, list[str]]) -> float:
        return 0.5 * (wide_text(_together(label[2])) + GAP) / scale

    def middle(label: tuple[float, float, list[str]]) -> float:
        return min(max((label[0] + label[1]) / 2, ends[0] + half(label)), ends[1] - half(label))

    for i in order:
        labels.append((influence.effects[i].mean, influence.effects[i].mean, [brief[i]]))
        while len(labels) > 1 and middle(labels[-1]) - half(labels[-1]) < middle(labels[-2]) + half(labels[-2]):
            after, before = labels.pop(), labels.pop()
            labels.append((before[0], after[1], [*before[2], *after[2]]))
    return [(middle(label), _together(label[2])) for label in labels]


def _together(options: Sequence[str]) -> str:
    """One label for several options: of many, the first and the last."""
    return " ".join(options) if len(options) <= TOGETHER else f"{options[0]} … {options[-1]}"


def wide_text(text: str, size: float = 7) -> float:
    """About how wide a text is, in points. Glyphs of the font of the figures are 0.6 of its size wide, on average."""
    return 0.6 * size * len(text)
