"""Jet classifiers as logic of an FPGA: Bitfront's networks and its rivals' through one tool.

The networks are those of ``recount.py``: HGQ2's and PQuantML's from the files in ``build/rivals/fronts``, which
``make rivals`` trains, and those of ``bitfront search examples/jsc_learned.toml``. Each becomes an integer program with
its own roundings (half up and wrapping around, or half to even and saturating), whose outputs must be those in whole
numbers. alkaid lays it out as logic without multipliers or registers, and estimates the look-up tables. Chosen on val
among the networks of a front by EBOPs; accuracies are those on test, in percent.

This is an estimate of one tool, not Vivado after placement: it compares networks, and is no figure for a device. Papers
that give look-up tables of a device are in ``docs/benchmarks.md`` only where the tool was theirs.

luts         6-input look-up tables, estimated
depth        delay of the longest path; an adder is about 1.1
within N     best test accuracy of a network of the front by LUTs within so many LUTs
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from common import jets, parser, report
from integer_networks import Layer, Network, Whole, accuracy, non_dominated, outputs, read
from recount import FRONTS, as_network, table_of

import bitfront as bf
from bitfront.data.base import Dataset
from bitfront.errors import require
from bitfront.exporters import circuit, fabric, oracle
from bitfront.exporters.building import Builder
from bitfront.exporters.program import Limit, Offset, Product, Program, Round, Value
from learned_bits import best_within, searched

BUDGETS = (1000, 2000, 3000, 5000, 8000, 12_000)
#: Rows whose outputs are compared.
ROWS = 500

Row = dict[str, Any]


def program_of(network: Network) -> Program:
    """The network as an integer program."""
    build = Builder()
    sources: tuple[int, ...] = ()
    for i, layer in enumerate(network.layers):
        build.node = f"layer{i}"
        rounded = _rounded(build, sources, layer, network)
        (weight, point_w), (bias, point_b) = (_at_one_point(p) for p in (layer.weight, layer.bias))
        x = build.values[rounded]
        up, down = np.maximum(weight, 0), np.minimum(weight, 0)
        sums = Value("", (len(weight),), up @ x.low + down @ x.high, up @ x.high + down @ x.low, x.point + point_w)
        number = build.add(Product((rounded,), weight, point_w), sums)
        point = max(sums.point, point_b)
        number = build.emit(Offset((number,), bias << (point - point_b), point - sums.point), point)
        if i + 1 < len(network.layers):
            number = build.emit(Limit((number,), 0, None), point)
        sources = (number,)
    inputs = network.layers[0].weight.codes.shape[1]
    return Program((inputs,), tuple(build.steps), tuple(build.values), sources[0])


def _rounded(build: Builder, sources: tuple[int, ...], layer: Layer, network: Network) -> int:
    """The inputs of a layer on their grids."""
    alive = layer.input_widths > 0
    most = np.where(alive, 2**layer.input_widths - 1, 0)
    least = most + (network.overflow == "wrap")
    low = np.where(layer.input_signed & alive, -least, 0)
    point = int(layer.input_points[alive].max(initial=0))
    points = np.where(alive, layer.input_points, point)
    way = "half_up" if network.rounding == "half up" else "even"
    overflow = "wrap" if network.overflow == "wrap" else "saturate"
    value = Value("", most.shape, low << (point - points), most << (point - points), point)
    return build.add(Round(sources, points, low, most, way, overflow, point), value)


def _at_one_point(parameter: Any) -> tuple[Whole, int]:
    """Codes with one binary point for all, and that point."""
    used = parameter.codes != 0
    point = int(parameter.points[used].max(initial=0))
    return parameter.codes << np.where(used, point - parameter.points, 0), point


def laid_out(networks: Sequence[Network], who: str, seed: int, data: Dataset) -> tuple[list[Row], int]:
    """(a row for each network of a front, how many outputs differ from those in whole numbers)."""
    (val, val_y), (test, test_y) = ((x.numpy(), y.numpy()) for x, y in (data.split("val"), data.split("test")))
    rows, differing = [], 0
    for network in networks:
        program = program_of(network)
        numbers = oracle.run(program, val[:ROWS])
        exact = np.ldexp(numbers.astype(np.float64), -program.result.point)
        differing += int((exact != outputs(network, val[:ROWS])).sum())
        cost = fabric.cost_of(circuit.laid_out(program))
        row = {"table": "networks", "who": who, "seed": seed, "luts": cost.luts, "depth": cost.levels}
        rows.append({**row, "val": 100 * accuracy(network, val, val_y), "test": 100 * accuracy(network, test, test_y)})
    return rows, differing


def on_front(networks: Sequence[Network], data: Dataset) -> list[Network]:
    """Those that none dominates by the EBOPs that their file gives and the accuracy on val."""
    x, y = (part.numpy() for part in data.split("val"))
    costs = [(float(n.about.get("ebops_deployed", n.about["ebops_in_training"])), accuracy(n, x, y)) for n in networks]
    return [networks[i] for i in non_dominated(costs)]


def ours(quick: bool, data: Dataset) -> list[Network]:
    """The front of the example."""
    with tempfile.TemporaryDirectory() as folder:
        run = searched("quick", 0, quick, {}, data, Path(folder))
        return [as_network(bf.transform_trial(run.folder, trial.number), trial.number) for trial in run.front]


def summed(rows: Sequence[Row]) -> Row:
    """The row of a front by LUTs."""
    chosen = [rows[i] for i in non_dominated([(row["luts"], row["val"]) for row in rows])]
    points = [(row["luts"], row["test"]) for row in chosen]
    within = {f"within {budget:,}": best_within(points, budget) for budget in BUDGETS}
    return {"table": "fronts", "who": rows[0]["who"], "seed": rows[0]["seed"], "networks": len(chosen), **within}


def main() -> None:
    """Lay out every front."""
    options = parser(__doc__ or "")
    options.add_argument("--fronts", type=Path, default=FRONTS, help="the folder of the rivals' files")
    given = options.parse_args()
    require("alkaid", "fpga", "laying out logic")
    data, what = jets()
    groups: list[tuple[str, str, int, list[Network]]] = [("bitfront", "Bitfront, quick", 0, ours(given.quick, data))]
    for file in sorted(given.fronts.glob("*-*.npz")):
        record, networks = read(file)
        who = f"{record['rival']} {next(iter(record['packages'].values()))}"
        groups.append((file.stem.rpartition("-")[0], who, record["seed"], on_front(networks, data)))
    rows, fronts, summary = [], [], {}
    for name, who, seed, networks in groups:
        laid, differing = laid_out(networks, who, seed, data)
        rows += laid
        fronts.append(summed(laid))
        summary[f"{name}_differing"] = summary.get(f"{name}_differing", 0) + float(differing)
        best = {f"{name}_within_{budget}": fronts[-1][f"within {budget:,}"] for budget in BUDGETS}
        summary |= {key: max(value, summary.get(key, 0.0)) for key, value in best.items()}
    for row in rows:
        row["luts"], row["val"], row["test"] = round(row["luts"]), f"{row['val']:.2f}", f"{row['test']:.2f}"
    report(
        "luts",
        table_of([*fronts, *sorted(rows, key=lambda r: (r["who"], r["seed"], r["luts"]))]),
        summary,
        given.json,
        data=what,
    )


if __name__ == "__main__":
    main()
