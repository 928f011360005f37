"""Every target, on members of fronts: the numbers that its files compute, beside those of the searched network.

Networks: an MLP on jets, a convolutional one on digits, a residual and a depthwise one on MNIST-10k whose batch norms
are folded. Members: of a search per layer (evolution, 2 to 16 bits, every rounding, no training), and of learned bits
per element with a short training; the front first, then others from the cheapest to the dearest. Each is exported to
each target. The judge of the target runs the files on ``SAMPLES`` samples; smaller data sets are repeated with noise.
Targets whose judge takes minutes get fewer members and samples, as the table says.

members      how many were exported, or refused
differing    samples on which a number differs from the searched network's, over all members; and members with one
refused      members that the target cannot take, by the beginning of its message
median s     of an export with its check, wall time
"""

from __future__ import annotations

import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import parser, report
from granularity import CASES, Case, in_float, searched
from torch import Tensor, nn

import bitfront as bf
from bitfront.data.base import Dataset
from bitfront.engine.rebuild import candidate_of
from bitfront.errors import ExportError, MissingExtraError
from bitfront.exporters.exporting import export, target_named
from bitfront.exporters.targets import TARGETS
from bitfront.exporters.targets.base import Candidate
from bitfront.graph import capture
from bitfront.transforms.fold import folded

SAMPLES = 10_000
#: Of each network and way to search.
MEMBERS = 25
#: Target → (members of each network and way, samples), where that is fewer.
FEWER: Mapping[str, tuple[int, int]] = {"hls4ml": (1, 1000), "rtl": (1, 1000), "torch": (5, SAMPLES)}
#: The targets that are not approximate.
EXACT = tuple(name for name in TARGETS.names() if name != "qdq")
NETWORKS = ("jets", "digits", "residual", "depthwise")

Row = dict[str, Any]


def space(model: nn.Module, signed: bool) -> dict[str, Any]:
    """Formats per layer, of 2 to 16 bits. Every layer but the first one follows a ReLU."""
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    seeds = {}
    for place, name in enumerate(names):
        seeds[name.replace(".", "_")] = {
            "config": {
                "name": "integer",
                "data_in_width": [2, 3, 4, 6, 8, 12, 16],
                "data_in_frac_width": "auto",
                "data_in_signed": signed and not place,
                "weight_width": [2, 3, 4, 5, 6, 8, 12, 16],
                "weight_frac_width": "auto",
                "bias_width": 8,
                "bias_frac_width": "auto",
            }
        }
    return {"setup": {"by": "name"}, "seed": seeds}


def without_norms(model: nn.Module, data: Dataset) -> nn.Module:
    """The model with its batch norms folded into the layers before them."""
    sample = data.x["train"][:2]
    return folded(capture(model, sample), sample).graph.model.eval()


def many(data: Dataset, count: int) -> Tensor:
    """Samples of val and test; repeated with noise where there are too few."""
    x = torch.cat([data.x["val"], data.x["test"]])
    generator, parts = torch.Generator().manual_seed(0), [x]
    while sum(map(len, parts)) < count:
        parts.append(x + 0.1 * x.std() * torch.randn(x.shape, generator=generator))
    return torch.cat(parts)[:count]


def runs(case: Case, data: Dataset, model: nn.Module, folder: Path, quick: bool) -> dict[str, bf.Run]:
    """A search per layer, and learned bits per element."""
    layers = {"name": "evolution", "setup": {"n_trials": 6 if quick else 60}}
    bits = {
        "name": "learned_bits",
        "setup": {
            "weight": "element",
            "epochs": 1 if quick else case.turn / 2,
            "cycles": 2 if quick else 8,
            "networks": 4,
        },
    }
    return {
        "layer-wise": searched(model, data, folder / "layers", layers, space(model, case.signed)),
        "learned": searched(model, data, folder / "learned", bits, {}),
    }


def members(run: bf.Run, count: int) -> list[int]:
    """Numbers of trials: those of the front, then others, spread over the costs."""
    front = [trial.number for trial in run.front][:count]
    cost = run.columns.metrics["ebops"]
    others = [int(run.columns.number[row]) for row in np.argsort(cost, kind="stable")]
    others = [number for number in others if number not in front]
    spread = np.linspace(0, len(others) - 1, min(count - len(front), len(others))).astype(int) if others else []
    return [*front, *(others[i] for i in dict.fromkeys(spread))]


def kind_of(message: str) -> str:
    """A refusal without its names and numbers."""
    reason = message.partition(": ")[2] or message
    return re.sub(r"\d[\d,.]*", "N", re.split(r"[;:]", reason)[0])[:90]


def measured(target: str, candidates: list[tuple[str, Candidate, Tensor]], folder: Path, samples: int) -> list[Row]:
    """What one target makes of the members, by network and way."""
    rows: dict[str, Row] = {}
    for name, candidate, x in candidates:
        row = rows.setdefault(name, {"target": target, "of": name, "members": 0, "samples": 0, "differing": 0, "s": []})
        row.setdefault("refused", Counter())
        start = time.perf_counter()
        row["members"] += 1
        try:
            result = export(candidate, target_named(target), folder / "out", x[:samples])
            row["samples"] += result.samples
            row["differing"] += result.differing
        except ExportError as error:
            if "not kept" in str(error) or "something else" in str(error):
                row["differing"] += 1
                print(f"{name}: {error}", file=sys.stderr)
            else:
                row["refused"][kind_of(str(error))] += 1
                continue
        row["s"].append(time.perf_counter() - start)
    for row in rows.values():
        seconds, refused = row.pop("s"), row.pop("refused")
        row["median s"] = statistics.median(seconds) if seconds else ""
        row["refused"] = "; ".join(f"{count}: {reason}" for reason, count in refused.items())
    return list(rows.values())


def main() -> None:
    """Search, export, compare."""
    options = parser(__doc__ or "")
    options.add_argument("--target", choices=TARGETS.names(), action="append", help="only this one")
    options.add_argument("--network", choices=NETWORKS, action="append", help="only this one")
    options.add_argument("--members", type=int, default=MEMBERS, help="of each network and way to search")
    given = options.parse_args()
    count, samples = (2, 64) if given.quick else (given.members, SAMPLES)
    networks = given.network or (NETWORKS[1:2] if given.quick else NETWORKS)
    candidates: dict[str, list[tuple[str, Candidate, Tensor]]] = {}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for network in networks:
            case = CASES[network]
            data = case.data()
            model = without_norms(in_float(case, data, given.quick), data)
            x = many(data, samples)
            for way, run in runs(case, data, model, Path(scratch) / network, given.quick).items():
                title = f"{network}, {way}"
                candidates[title] = []
                for number in members(run, count):
                    rebuilt = candidate_of(run.folder, number, data=data, model=model)
                    evaluator = rebuilt.evaluator
                    built = Candidate(
                        f"net_{network}_{number}",
                        evaluator.space.graph,
                        evaluator.formats(rebuilt.code),
                        evaluator.model(rebuilt.code, bake=True),
                    )
                    candidates[title].append((title, built, x))
        quick = [name for name in EXACT if name not in FEWER]
        for target in given.target or (quick if given.quick else EXACT):
            each, fewer = FEWER.get(target, (count, samples))
            chosen = [one for those in candidates.values() for one in those[: min(each, count)]]
            try:
                rows += measured(target, chosen, Path(scratch), min(fewer, samples))
            except MissingExtraError as error:
                print(f"{target}: {error}", file=sys.stderr)
    summary: dict[str, float] = {"members": sum(map(len, candidates.values()))}
    for row in rows:
        name = f"{row['target']}_differing"
        summary[name] = summary.get(name, 0) + row["differing"]
    report("deploy", rows, summary, given.json)


if __name__ == "__main__":
    main()
