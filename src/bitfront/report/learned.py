"""What a search with learned bits learned: bits per weight of the front's networks, and how the training went.

The figures are drawn with matplotlib. The page shows the same pictures, and a table of the numbers per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bitfront.report import data
from bitfront.report.figures import BLUE, GREEN, GREY, ORANGE, RED, logarithmic, panels_of, wide
from bitfront.report.grid import COLOURS
from bitfront.report.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bitfront.checkpoints.cycles import LearnedLayer, LearnedNetwork
    from bitfront.engine.storage.run import Run

#: Networks of the front that a picture has room for.
SHOWN = 6
#: Rows and columns of a map; larger weights are thinned out.
CELLS = 256
LINES = ("-", "--", ":", "-.")


@dataclass(frozen=True, eq=False)
class LearnedFront:
    """The networks of a front whose bits were learned, from the first trial of the front to the last.

    Attributes:
        rows: of the trials, in ``Run.columns``.
        networks: as many.
        cost: name of the metric on the axes: the first objective beside the accuracy; empty if there is none.
        costs: its value for each network; zeros if there is none.
    """

    rows: NDArray[np.int64]
    networks: tuple[LearnedNetwork, ...]
    cost: str
    costs: NDArray[np.float64]

    @property
    def spread(self) -> list[int]:
        """Places of at most ``SHOWN`` networks, whose costs are evenly spread by their logarithm."""
        if len(self.rows) <= SHOWN:
            return list(range(len(self.rows)))
        logs = np.log(np.maximum(self.costs, 1e-9))
        return sorted({int(np.abs(logs - at).argmin()) for at in np.linspace(logs.min(), logs.max(), SHOWN)})


def learned_front(run: Run) -> LearnedFront | None:
    """What was learned; None if bits were not, or nothing of it is on the front."""
    rows = data.cloud(run).front
    if not run.space.learned:
        return None
    from bitfront.checkpoints.cycles import learned_network  # it loads torch, which other runs do not need

    pairs = [(row, learned_network(run.folder, run.row(int(row)).config)) for row in rows]
    known = [(row, network) for row, network in pairs if network is not None]
    if not known:
        return None
    cost = next((part.metric for part in run.objectives.parts if part.metric not in ("accuracy", "loss")), "")
    chosen = np.array([row for row, _ in known], dtype=np.int64)
    costs = run.columns.metrics[cost][chosen] if cost else np.zeros(len(chosen))
    return LearnedFront(chosen, tuple(network for _, network in known), cost, costs)


def bits(run: Run, front: LearnedFront) -> Figure:
    """Draw the bits of every weight: a row per network of the front, a column per layer. Zeros are empty."""
    from matplotlib import colormaps, rcParams
    from matplotlib.figure import Figure as NewFigure

    shown = front.spread
    layers = front.networks[0].layers
    most = max(1, *(int(front.networks[k].layers[i].weight.max()) for k in shown for i in range(len(layers))))
    width, height = min(40.0, 1.6 + 2.6 * len(layers)), min(40.0, 0.8 + 2.2 * len(shown))
    figure = NewFigure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(len(shown), len(layers), squeeze=False)
    colours = colormaps[COLOURS].with_extremes(bad=rcParams["figure.facecolor"])
    for place, of_network in zip(shown, panels, strict=True):
        for layer, axes in zip(front.networks[place].layers, of_network, strict=True):
            image = axes.imshow(_map(layer), cmap=colours, vmin=1, vmax=most, aspect="auto", interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(f"{layer.pruned:.0%} zero, others {layer.weight_bits:.2g} bits", fontsize=7)
        trial = run.row(int(front.rows[place]))
        cost = f"\n{front.cost} {number(trial.metrics[front.cost])}" if front.cost else ""
        of_network[0].set_ylabel(f"trial {trial.number}{cost}\noutputs", fontsize=8)
    for layer, axes in zip(layers, panels[-1], strict=True):
        axes.set_xlabel(f"inputs of {layer.path or 'the model'}", fontsize=8)
    figure.colorbar(image, ax=list(panels.ravel()), label="bits of a weight, without its sign; empty: 0", shrink=0.6)
    figure.suptitle("bits per weight along the front", fontsize=10)
    return figure


def _map(layer: LearnedLayer) -> NDArray[np.float64]:
    """Bits as a matrix of outputs and inputs, NaN for zeros."""
    matrix = layer.weight.reshape(len(layer.weight), -1).astype(np.float64)
    thinned = matrix[:: -(-matrix.shape[0] // CELLS), :: -(-matrix.shape[1] // CELLS)]
    return np.where(thinned > 0, thinned, np.nan)


def course(run: Run, front: LearnedFront) -> Figure:
    """Draw accuracy and cost over the cycles, and pressure, bits and zeros of the layers along the front."""
    from matplotlib import rcParams

    figure, panels = panels_of(6 if front.cost else 1)
    cycles = np.array([run.row(row).config["learned_bits"]["config"]["cycle_number"] for row in range(len(run))])
    quality = next((m for m in ("accuracy", "loss") if m in run.columns.metrics), front.cost)
    _over_cycles(panels[0], cycles, run.columns.metrics[quality], front.rows, quality)
    if not front.cost:
        return figure
    _over_cycles(panels[1], cycles, run.columns.metrics[front.cost], front.rows, front.cost)
    costs = front.costs
    if wide(run.columns.metrics[front.cost]):
        panels[1].set_yscale("log")
    order = np.argsort(costs, kind="stable")
    pressures = np.array([network.pressure for network in front.networks])
    panels[2].plot(costs[order], pressures[order], "o-", color=BLUE, ms=4, lw=1)
    panels[2].set_yscale("log")
    panels[2].set_ylabel("pressure, nats per unit of the cost")
    titles = ("mean bits of weights that are not zero", "share of weights that are zero", "mean bits of inputs")
    for axes, name, title in zip(panels[3:], ("weight_bits", "pruned", "data_in_bits"), titles, strict=True):
        for i, layer in enumerate(front.networks[0].layers):
            colour = (BLUE, ORANGE, GREEN, RED, rcParams["text.color"])[i % 5]
            values = np.array([getattr(network.layers[i], name) for network in front.networks])
            line = LINES[i // 5 % len(LINES)]
            axes.plot(costs[order], values[order], line, marker=".", color=colour, lw=1, label=layer.path)
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0)
    panels[3].legend(fontsize=7)
    for axes in panels[2:]:
        axes.set_xlabel(f"{front.cost}, along the front")
        if wide(costs):
            logarithmic(axes, run.units.get(front.cost, ""))
    return figure


def _over_cycles(
    axes: Axes, cycles: NDArray[np.int64], values: NDArray[np.float64], rows: NDArray[np.int64], name: str
) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.plot(cycles, values, ".", color=GREY, ms=5, label="networks")
    axes.plot(cycles[rows], values[rows], "o", color=BLUE, ms=4, label="front")
    axes.set_xlabel("cycle")
    axes.set_ylabel(name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)


def rows_of(front: LearnedFront) -> list[Sequence[str]]:
    """The numbers as text, a row per layer: its path, then per network of ``spread`` mean bits of the weights that are
    not zero, the share of zeros, mean bits of the input."""
    shown = [front.networks[place] for place in front.spread]
    rows: list[Sequence[str]] = []
    for i, layer in enumerate(shown[0].layers):
        cells = [network.layers[i] for network in shown]
        rows.append((layer.path, *(f"{e.weight_bits:.1f} / {e.pruned:.0%} / {e.data_in_bits:.1f}" for e in cells)))
    return rows
