"""Learned bits and its rivals side by side: the same rows, one counter, one evaluation in whole numbers.

Each rival that ``install.py`` has installed trains in an environment of its own, with one thread, on the rows of train
and val that this script writes; its networks come back as integers. Everything after that is Bitfront's: each network
is evaluated in int64 (``integer_networks.py``), the front is chosen on val, and measured on test once. A training takes
minutes and is not repeated while its file is in ``build/rivals/fronts``; files of more seeds there are counted too.

EBOPs are counted by the metric ``ebops`` in four ways: as by default, which is HGQ2's way (no signs, the width of each
value); with signs; with the span of set bits; and both. ``logged`` is what the rival says of the network: the bits of
every quantizer, also of weights that are 0 or have leading zeros. Bitfront's networks have neither, so that all weights
and biases are counted with the bits that their codes need: this is lower than the rival's figure, never higher.

volume        hypervolume of log10 EBOPs from 1k to 100k and test accuracy above 70 %, by the default count
..._signs     the same networks, counted with signs; ..._span: with the span of set bits
..._1645      that of the networks of at least 1,645 EBOPs, where HGQ2's earlier runs stopped
within N      best test accuracy, in %, of a network of the front within so many EBOPs
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from common import jets, parser, report
from install import installed, known, python_of
from integer_networks import (
    Layer,
    Network,
    Parameter,
    accuracy,
    ebops,
    ebops_of_quantizers,
    non_dominated,
    outputs,
    read,
)

import bitfront as bf
from bitfront.data.base import Dataset
from bitfront.engine.rebuild import Transformed
from bitfront.formats.fixed_map import FixedMap
from bitfront.metrics.effective_bits import BitCount
from learned_bits import BUDGETS, TARGETS, Point, best_within, searched, volume

HERE = Path(__file__).parent
FRONTS = HERE.parents[1] / "build" / "rivals" / "fronts"
#: Suffix of a volume → how bits are counted.
COUNTS = {
    "": BitCount(),
    "_signs": BitCount(sign_bits=True),
    "_span": BitCount(count="set_bits"),
    "_signs_span": BitCount(sign_bits=True, count="set_bits"),
}
#: Rivals that log a bit for each sign.
LOG_SIGNS = frozenset({"pquantml"})
#: Between these EBOPs fronts are compared.
COMPARED = (1700, 50_000)

Samples = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Counted:
    """A network with its costs and accuracies.

    Attributes:
        network: in whole numbers.
        costs: suffix of ``COUNTS`` → EBOPs.
        val, test: accuracies.
    """

    network: Network
    costs: dict[str, float]
    val: float
    test: float


@dataclass(frozen=True, eq=False)
class Front:
    """What one training gave.

    Attributes:
        who: with its version.
        name: as in the summary.
        seed: of the training.
        cpu_s, wall_s: of the training.
        counted: its networks.
    """

    who: str
    name: str
    seed: int
    cpu_s: float
    wall_s: float
    counted: list[Counted]

    def points(self, suffix: str = "", cheapest: float = 0) -> list[Point]:
        """(EBOPs, test accuracy) of the networks of at least `cheapest` EBOPs that none of them dominates on val."""
        some = [c for c in self.counted if c.costs[suffix] >= cheapest]
        chosen = non_dominated([(c.costs[suffix], c.val) for c in some])
        return [(some[n].costs[suffix], some[n].test) for n in chosen]


def counted(networks: Sequence[Network], data: Dataset) -> list[Counted]:
    """Evaluate and count networks; test is looked at where none dominates on val by one of the counts."""
    splits = {name: tuple(part.numpy() for part in data.split(name)) for name in ("val", "test")}
    costs = [{suffix: ebops(n, count) for suffix, count in COUNTS.items()} for n in networks]
    val = [accuracy(n, *splits["val"]) for n in networks]
    chosen = {n for s in COUNTS for n in non_dominated([(c[s], a) for c, a in zip(costs, val, strict=True)])}
    return [
        Counted(network, costs[n], val[n], accuracy(network, *splits["test"]) if n in chosen else float("nan"))
        for n, network in enumerate(networks)
    ]


# -- rivals


def trained(name: str, seed: int, data: Path, file: Path, options: Sequence[str]) -> None:
    """Train a rival in its environment, unless its file is there."""
    if file.is_file():
        print(f"{file} is there; remove it to train anew", flush=True)
        return
    command = [python_of(name), HERE / f"{name}_jsc.py", "--data", data, "--out", file, "--seed", str(seed), *options]
    one_thread = {"OMP_NUM_THREADS": "1", "NPROC": "1"}
    # Its environment shall not see Bitfront's packages.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(command, env={**environment, **one_thread}, check=True)


def front_of(file: Path, data: Dataset) -> tuple[Front, dict[str, float]]:
    """(the front in a rival's file, how far its own figures are reproduced)."""
    record, networks = read(file)
    name = file.stem.rpartition("-")[0]
    who = f"{record['rival']} {next(iter(record['packages'].values()))}"
    x = data.split("val")[0].numpy()
    differing, difference = 0, 0.0
    for network in networks:
        if network.outputs is not None:
            differing += int((outputs(network, x[: len(network.outputs)]) != network.outputs).sum())
        difference = max(difference, abs(ebops_of_quantizers(network, name in LOG_SIGNS) - logged(network)))
    front = Front(who, name, record["seed"], record["cpu_s"], record["wall_s"], counted(networks, data))
    return front, {f"{name}_differing_outputs": differing, f"{name}_difference_of_counts": difference}


def logged(network: Network) -> float:
    """What a rival says that a network costs: as it would be deployed, where it says that."""
    return float(network.about.get("ebops_deployed", network.about["ebops_in_training"]))


# -- Bitfront


def as_network(rebuilt: Transformed, number: int) -> Network:
    """A network of learned bits, from the model and the formats of a trial."""
    layers = []
    for site in rebuilt.graph.sites:
        forms = rebuilt.formats.get(site.name)
        if not forms:
            continue
        module, data = rebuilt.model.get_submodule(site.path), forms["data_in"]
        assert isinstance(data, FixedMap)
        parts = []
        for operand in ("weight", "bias"):
            form = forms[operand]
            assert isinstance(form, FixedMap)
            points = form.points.astype(np.int64)
            codes = np.ldexp(getattr(module, operand).detach().double().numpy(), points)
            parts.append(Parameter(codes.astype(np.int64), form.value_bits, points))
        signed = np.full(data.shape, data.signed) & (data.widths > 0)
        layers.append(Layer(*parts, data.value_bits, data.points.astype(np.int64), signed))
    return Network(tuple(layers), "half to even", "saturate", {"trial": number})


def ours(recipe: str, seed: int, quick: bool, data: Dataset) -> tuple[Front, dict[str, float]]:
    """(the front of `bitfront search` with a recipe of bench/learned_bits.py, the largest differences to its run)."""
    with tempfile.TemporaryDirectory() as folder:
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        run = searched(recipe, seed, quick, {}, data, Path(folder))
        wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        trials = list(run.front)
        networks = [as_network(bf.transform_trial(run.folder, trial.number), trial.number) for trial in trials]
    results = counted(networks, data)
    pairs = list(zip(trials, results, strict=True))
    costs = max(abs(t.metrics["ebops"] - r.costs[""]) for t, r in pairs)
    tests = max(abs(t.test_metrics["accuracy"] - r.test) for t, r in pairs if not math.isnan(r.test))
    cpu = sum(getattr(after, part) - getattr(before, part) for part in ("ru_utime", "ru_stime"))
    front = Front(f"Bitfront, {recipe}", recipe, seed, cpu, wall, results)
    return front, {f"{recipe}_difference_of_counts": costs, f"{recipe}_difference_of_accuracy": tests}


# -- the table


def row_of(front: Front) -> dict[str, Any]:
    """A row for a front."""
    points = front.points()
    return {
        "table": "fronts",
        "who": front.who,
        "seed": front.seed,
        "cpu_s": front.cpu_s,
        "wall_s": front.wall_s,
        "networks": len(points),
        "volume": volume(points),
        **{f"volume{suffix}": volume(front.points(suffix)) for suffix in list(COUNTS)[1:]},
        "volume_1645": volume(front.points(cheapest=1645)),
        **{f"within {budget:,}": 100 * best_within(points, budget) for budget in BUDGETS},
    }


def rows_of(front: Front) -> list[dict[str, Any]]:
    """A row for each network of a front, from the cheapest on; accuracies as texts, with two digits."""
    rows = []
    for result in sorted(front.counted, key=lambda c: c.costs[""]):
        about = result.network.about
        row = {"table": "networks", "who": front.who, "seed": front.seed}
        row["epoch or trial"] = about.get("epoch", about.get("trial"))
        row["logged"] = round(logged(result.network)) if "epoch" in about else ""
        row |= {f"EBOPs{suffix}": round(cost) for suffix, cost in result.costs.items()}
        accuracies = {"val": result.val, "test": result.test}
        rows.append({**row, **{k: "" if math.isnan(a) else f"{100 * a:.2f}" for k, a in accuracies.items()}})
    return rows


def above(front: Front, rival: Front, suffix: str = "") -> float:
    """In %, the networks of the rival's front, within ``COMPARED``, that a front is above at their cost."""
    low, high = COMPARED
    theirs = [point for point in rival.points(suffix) if low <= point[0] <= high]
    better = sum(best_within(front.points(suffix), cost) > reached for cost, reached in theirs)
    return 100 * better / len(theirs) if theirs else 100.0


def summary_of(fronts: Sequence[Front]) -> dict[str, float]:
    """The worst seed of everybody, and of every pair of seeds of Bitfront and a rival."""
    summary: dict[str, float] = {}
    by_name: dict[str, list[Front]] = {}
    for front in fronts:
        by_name.setdefault(front.name, []).append(front)
    for name, some in by_name.items():
        summary[f"{name}_volume"] = min(volume(front.points()) for front in some)
        summary[f"{name}_cpu_s"] = max(front.cpu_s for front in some)
    for recipe in TARGETS:
        for name in by_name.keys() - TARGETS.keys():
            pairs = [(f, rival) for f in by_name.get(recipe, []) for rival in by_name[name]]
            for suffix in COUNTS:
                if pairs:
                    summary[f"{recipe}_above_{name}{suffix}"] = min(above(*pair, suffix) for pair in pairs)
    return summary


def table_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the same keys; what a row has not is empty."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key, "") for key in keys} for row in rows]


def arguments() -> argparse.Namespace:
    """The options; those that contradict what is installed are errors."""
    options = parser(__doc__ or "")
    options.add_argument("--rival", action="append", choices=known(HERE), help="only this one")
    options.add_argument("--recipe", action="append", choices=[*TARGETS, "none"], help="of ours; default: quick")
    options.add_argument("--seeds", type=int, default=1, help="number of seeds, from 0 on")
    options.add_argument("--fronts", type=Path, default=FRONTS, help="the folder of the rivals' files")
    given = options.parse_args()
    missing = [name for name in known(HERE) if not installed(name)]
    for name in missing:
        if name in (given.rival or ()):
            options.error(f"{name} is not installed; run python bench/rivals/install.py {name}")
        print(f"{name} is not installed and is left out; python bench/rivals/install.py {name} says why", flush=True)
    given.rival = [name for name in given.rival or known(HERE) if name not in missing]
    return given


def main() -> None:
    """Train what is not trained, and count everything alike."""
    given = arguments()
    data, what = jets()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if given.quick else given.fronts
        folder.mkdir(parents=True, exist_ok=True)
        samples = Path(scratch) / "jets.npz"
        written = {}
        for split in ("train", "val"):
            x, y = data.split(split)
            written |= {f"X_{split}": x.numpy(), f"y_{split}": y.numpy()}
        np.savez(samples, **written)
        fronts: list[Front] = []
        summary: dict[str, float] = {}
        for name in given.rival:
            for seed in range(given.seeds):
                file = folder / f"{name}-{seed}.npz"
                trained(name, seed, samples, file, ["--quick"] if given.quick else [])
            for file in sorted(folder.glob(f"{name}-*.npz")):
                front, checks = front_of(file, data)
                fronts.append(front)
                summary |= {key: max(value, summary.get(key, 0)) for key, value in checks.items()}
        for seed in range(given.seeds):
            for recipe in [] if given.recipe == ["none"] else given.recipe or ["quick"]:
                front, checks = ours(recipe, seed, given.quick, data)
                fronts.append(front)
                summary |= {key: max(value, summary.get(key, 0)) for key, value in checks.items()}
    fronts.sort(key=lambda front: (front.who, front.seed))
    rows = [*map(row_of, fronts), *(row for front in fronts for row in rows_of(front))]
    report("rivals", table_of(rows), summary | summary_of(fronts), given.json, data=what)


if __name__ == "__main__":
    main()
