"""Learned bits on JSC-R (re-simulated jets): the front of examples/jsc_learned.toml, beside HGQ2's.

quick      examples/jsc_learned.toml as it is: one member, no teacher.
thorough   the same with four members, float starts of their own and an ensemble of teachers.

Each run is the command `bitfront search`, with seeds 0 to 2, from data to front. Networks are chosen on val, and those
of the front are measured on test once. ``cpu_s`` is the processor time of the whole command: float training, teachers,
members, evaluation. ``volume`` is the hypervolume of log10 EBOPs from 1k to 100k and test accuracy above 70 %;
``volume_1645`` is that of the front of all networks of at least 1,645 EBOPs, where HGQ2's runs stop. ``volume_val`` is
that of the front on val, by which settings may be chosen. EBOPs are counted as HGQ2 does: without sign bits, with the
bits of the biases.

HGQ2's figures are those of HGQ2 0.2.0 (its notebook's configuration with a ramp of the pressure, 1,500 epochs, 10 to 13
minutes of two cores, two seeds) on the same data, chosen and tested in the same way; they were measured elsewhere, with
the EBOPs that HGQ2 logs. ``make rivals`` trains it beside this, and counts both alike.
"""

from __future__ import annotations

import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, jets, parser, report

import bitfront as bf
from bitfront.data.base import Dataset
from bitfront.pareto import non_dominated
from bitfront.scoring import evaluate

EXAMPLE = ROOT / "examples" / "jsc_learned.toml"
THOROUGH = {"members": 4, "float_epochs": 10, "epochs": 10, "teacher": "ensemble"}
#: (EBOPs, test accuracy) of HGQ2, seed 0 and seed 1.
HGQ2 = (
    *((1800, 0.7555), (3700, 0.7643), (7900, 0.7709), (17100, 0.7727)),
    *((2000, 0.7579), (3800, 0.7652), (7700, 0.7691), (15000, 0.7717), (24400, 0.7730)),
)
#: EBOPs and accuracy where the hypervolume begins and ends.
CHEAPEST, DEAREST, LEAST = 1e3, 1e5, 0.70
#: (volume, volume_1645, cpu_s) that each recipe shall reach.
TARGETS = {"quick": (0.137, 0.125, 60), "thorough": (0.142, 0.129, 240)}
BUDGETS = (2000, 3500, 6500, 8000, 12440, 17400, 28098, 50000)

Point = tuple[float, float]


def volume(points: Sequence[Point]) -> float:
    """The hypervolume of some networks; those that are cheaper than 1k EBOPs count as if they had 1k."""
    ends, best, total = math.log10(DEAREST), LEAST, 0.0
    for cost, accuracy in sorted((max(c, CHEAPEST), a) for c, a in points if c <= DEAREST):
        if accuracy > best:
            total += (accuracy - best) * (ends - math.log10(cost))
            best = accuracy
    return total


def best_within(points: Sequence[Point], budget: float) -> float:
    """The best accuracy of networks within a budget; 0 if there is none."""
    return max((accuracy for cost, accuracy in points if cost <= budget), default=0.0)


def front_from(run: bf.Run, cheapest: float) -> list[int]:
    """The numbers of the trials of at least `cheapest` EBOPs that none of them dominates on val."""
    cost, accuracy = run.columns.metrics["ebops"], run.columns.metrics["accuracy"]
    rows = np.flatnonzero(cost >= cheapest)
    kept = rows[non_dominated(np.stack([cost[rows], -accuracy[rows]], axis=1))]
    return [int(number) for number in run.columns.number[kept]]


def located(data: Dataset, folder: Path) -> dict[str, str]:
    """The keys of a file that name the data; data that is in no file is written into one."""
    file = Path(data.source)
    if file.is_file():
        return {"dataset": "jsc", "dataset_path": str(file.absolute())}
    file = folder / "data.npz"
    arrays = {}
    for split in data.splits:
        x, y = data.split(split)
        arrays |= {f"X_{split}": x.numpy(), f"y_{split}": y.numpy()}
    np.savez(file, **arrays)
    return {"dataset": "npz", "dataset_path": str(file)}


def tested(run: bf.Run, numbers: Sequence[int], data: Dataset) -> list[Point]:
    """(EBOPs, test accuracy) of some trials: from the run, or, where it has none, of the rebuilt model."""
    x, y = data.split("test")
    points = []
    for number in numbers:
        trial = run.trial(number)
        accuracy = trial.test_metrics.get("accuracy")
        if accuracy is None:
            accuracy = evaluate(bf.transform_trial(run.folder, number).model, x, y).accuracy
        points.append((trial.metrics["ebops"], accuracy))
    return points


def searched(recipe: str, seed: int, quick: bool, others: dict[str, str], data: Dataset, folder: Path) -> bf.Run:
    """The run of the command, in a folder."""
    settings = THOROUGH if recipe == "thorough" else {}
    if quick:
        settings = {**settings, "cycles": 2, "epochs": 1, "networks": 2, "teacher": "none", "float_epochs": 1}
    text = EXAMPLE.read_text(encoding="utf-8")
    settings = {**settings, **{key: _value(text) for key, text in others.items()}}
    lines = [f"{key} = {value!r}".replace("'", '"') for key, value in settings.items()]
    named = located(data, folder)
    kept = [line for line in text.splitlines() if line.split(" = ")[0] not in {**settings, **named}]
    kept = [*(f'{key} = "{value}"' for key, value in named.items()), *kept]
    place = kept.index("[search.strategy.setup]") + 1
    file = folder / "search.toml"
    file.write_text("\n".join([*kept[:place], *lines, *kept[place:]]), encoding="utf-8")
    command = [sys.executable, "-m", "bitfront", "search", str(file), "--seed", str(seed)]
    subprocess.run([*command, *(["--max-epochs", "1"] if quick else [])], cwd=folder, check=True, capture_output=True)
    return bf.Run.load(folder / "runs" / "jsc-learned")


def measured(recipe: str, seed: int, quick: bool, others: dict[str, str], data: Dataset) -> dict[str, Any]:
    """One run of the command, and its figures."""
    with tempfile.TemporaryDirectory() as folder:
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        run = searched(recipe, seed, quick, others, data, Path(folder))
        wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        points = [(t.metrics["ebops"], t.test_metrics["accuracy"]) for t in run.front if t.test_metrics]
        chosen = [(t.metrics["ebops"], t.metrics["accuracy"]) for t in run.front]
        dearer = tested(run, front_from(run, 1645), data)
        cpu = sum(getattr(after, part) - getattr(before, part) for part in ("ru_utime", "ru_stime"))
    return {
        "recipe": recipe,
        "seed": seed,
        "cpu_s": cpu,
        "wall_s": wall,
        "volume": volume(points),
        "volume_val": volume(chosen),
        "volume_1645": volume(dearer),
        "above_hgq2": sum(best_within(points, cost) > accuracy for cost, accuracy in HGQ2),
        "of": len(HGQ2),
        **{f"within {budget:,}": 100 * best_within(points, budget) for budget in BUDGETS},
    }


def _value(text: str) -> float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def verdict(row: dict[str, Any]) -> str:
    """Whether a run reaches its targets."""
    least, least_1645, seconds = TARGETS[row["recipe"]]
    reached = row["volume"] >= least and row["volume_1645"] >= least_1645 and row["cpu_s"] <= seconds
    beaten = row["recipe"] == "quick" or row["above_hgq2"] == row["of"]
    return "reached" if reached and beaten else "missed"


def main() -> None:
    """Run both recipes with each seed."""
    options = parser(__doc__ or "")
    options.add_argument("--recipe", choices=list(TARGETS), action="append", help="only this one")
    options.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 on")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting of the run")
    given = options.parse_args()
    rows = []
    data, what = jets()
    for recipe in given.recipe or list(TARGETS):
        for seed in range(1 if given.quick else given.seeds):
            row = measured(recipe, seed, given.quick, dict(pair.split("=") for pair in given.set), data)
            row["verdict"] = verdict(row)
            rows.append(row)
            print(
                f"{recipe} seed {seed}: {row['volume_val']:.4f} {row['volume']:.4f} {row['volume_1645']:.4f} "
                f"{row['cpu_s']:.0f} s",
                flush=True,
            )
    summary = {}
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        chosen = [row for row in rows if row["recipe"] == recipe]
        summary |= {
            f"{recipe}_{name}": min(r[name] for r in chosen) for name in ("volume", "volume_1645", "above_hgq2")
        }
        summary[f"{recipe}_cpu_s"] = max(row["cpu_s"] for row in chosen)
    report("learned bits", rows, summary, given.json, data=what)


if __name__ == "__main__":
    main()
