"""Every target, on members of fronts: the numbers that its files compute, beside those of the searched network.

Networks: an MLP on jets, a convolutional one on digits, a residual and a depthwise one on MNIST-10k whose batch norms
are folded. Members: of a search per layer (evolution, 2 to 16 bits, no training), one with each of nine ways to round
and to treat what is out of range, and of learned bits per element with a short training, one with each of three
roundings of inputs; the front first, then others from the cheapest to the dearest. Each is exported to each target. The
judge of the target runs the files on ``SAMPLES`` samples (rtl: 1,000); smaller data sets are repeated with noise.

``rtl`` writes adders for every position of an image, millions for 28 × 28. So its networks are the MLP on jets, and
three on digits of 8 × 8: with convolutions alone, and the residual and the depthwise one.

Members come in an order that is drawn once, all networks and ways in turns. Targets whose judge takes minutes are last,
and get as many members of this order as there is time for (``--minutes``). What is done is in ``--folder`` at once, and
a second call goes on from there.

exported       members whose files were run
refused        members that the target cannot take; a row for each reason, with the message that the first one gave
unfinished     members whose export took more than ``PATIENCE`` seconds and was stopped
samples        that were compared, over all members
differing      samples on which a number differs from the searched network's, over all members
largest alike  share of samples on which the largest output is the same one
median s       of an export with its check, wall time
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from common import ROOT, parser, report
from granularity import CASES, Case, Depthwise, Plain, Residual, digits, drawn, in_float, searched
from torch import Tensor, nn

import bitfront as bf
from bitfront.data.base import Dataset
from bitfront.engine.rebuild import candidate_of
from bitfront.errors import ExportError, MissingExtraError
from bitfront.exporters.exporting import export, target_named
from bitfront.exporters.targets import TARGETS
from bitfront.exporters.targets.base import Candidate
from bitfront.formats.integer import Overflow
from bitfront.graph import capture
from bitfront.kernels.whole import Rounding
from bitfront.transforms.fold import folded

SAMPLES = 10_000
#: Of each network: members of each search per layer, and of each search of learned bits. 200 of all.
MEMBERS = {"layer-wise": (3,) * 9, "learned": (8, 8, 7)}
#: Target whose judge takes minutes → samples.
SLOW: Mapping[str, int] = {"hls4ml": SAMPLES, "rtl": 1000}
#: Targets of a quick run.
QUICK = ("c", "onnx", "qdq")
#: Seconds of an export.
PATIENCE = 600
NETWORKS = ("jets", "digits", "residual", "depthwise")
#: Networks for 8 × 8 pixels.
SMALL: Mapping[str, Case] = {
    "small plain": Case("digits, convolutions", drawn(Plain), Plain.by_integers, digits, 40, 36),
    "small residual": Case("digits, residual", drawn(Residual), Residual.by_integers, digits, 40, 36),
    "small depthwise": Case("digits, depthwise", drawn(Depthwise), Depthwise.by_integers, digits, 40, 36),
}
#: Networks of a target; of all others they are NETWORKS.
NETWORKS_OF: Mapping[str, Sequence[str]] = {"rtl": ("jets", *SMALL)}
EVERY: Mapping[str, Case] = {**{name: CASES[name] for name in NETWORKS}, **SMALL}

Row = dict[str, Any]


@dataclass(frozen=True)
class Member:
    """A trial: of which network, by which way to search, in which run folder, with which number."""

    network: str
    way: str
    run: str
    number: int


def space(model: nn.Module, signed: bool, rounding: str, overflow: str) -> dict[str, Any]:
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
                **{f"{operand}_rounding": rounding for operand in ("data_in", "weight", "bias")},
                **{f"{operand}_overflow": overflow for operand in ("data_in", "weight", "bias")},
            }
        }
    return {"setup": {"by": "name"}, "seed": seeds}


@functools.cache
def prepared(network: str, quick: bool) -> tuple[Dataset, nn.Module, Tensor]:
    """(data, the trained network with its batch norms folded, samples to compare on)."""
    case = EVERY[network]
    data = case.data()
    sample = data.x["train"][:2]
    model = folded(capture(in_float(case, data, quick), sample), sample).graph.model.eval()
    return data, model, many(data, SAMPLES)


def many(data: Dataset, count: int) -> Tensor:
    """Samples of val and test; repeated with noise where there are too few."""
    x = torch.cat([data.x["val"], data.x["test"]])
    generator, parts = torch.Generator().manual_seed(0), [x]
    while sum(map(len, parts)) < count:
        parts.append(x + 0.1 * x.std() * torch.randn(x.shape, generator=generator))
    return torch.cat(parts)[:count]


def runs(network: str, folder: Path, quick: bool) -> Iterator[tuple[str, bf.Run]]:
    """(way to search, run): a search per layer for each rounding and overflow, and learned bits for each rounding."""
    case = EVERY[network]
    data, model, _ = prepared(network, quick)
    layers = {"name": "evolution", "setup": {"n_trials": 4 if quick else 20}}
    ways = list(itertools.product(get_args(Rounding), get_args(Overflow)))
    for rounding, overflow in ways[:2] if quick else ways:
        place = folder / f"{network}-{rounding}-{overflow}"
        yield "layer-wise", searched(model, data, place, layers, space(model, case.signed, rounding, overflow))
    for rounding in get_args(Rounding)[: 1 if quick else None]:
        setup = {
            "weight": "element",
            "epochs": 1 if quick else case.turn / 4,
            "cycles": 2 if quick else 6,
            "networks": 4,
            "data_in_rounding": rounding,
        }
        place = folder / f"{network}-learned-{rounding}"
        yield "learned", searched(model, data, place, {"name": "learned_bits", "setup": setup}, {})


def members(run: bf.Run, count: int) -> list[int]:
    """Numbers of trials: those of the front, then others, spread over the costs."""
    front = [trial.number for trial in run.front][:count]
    cost = run.columns.metrics["ebops"]
    others = [int(run.columns.number[row]) for row in np.argsort(cost, kind="stable")]
    others = [number for number in others if number not in front]
    spread = np.linspace(0, len(others) - 1, min(count - len(front), len(others))).astype(int) if others else []
    return [*front, *(others[i] for i in dict.fromkeys(spread))]


def members_of(networks: Sequence[str], folder: Path, quick: bool) -> list[Member]:
    """All members, networks and ways in turns, each in an order of its own that is drawn."""
    groups: dict[tuple[str, str], list[Member]] = {}
    for network in networks:
        counts = {way: iter(each) for way, each in MEMBERS.items()}
        for way, run in runs(network, folder, quick):
            count = min(next(counts[way]), 1 if quick else SAMPLES)
            chosen = [Member(network, way, str(run.folder), number) for number in members(run, count)]
            groups.setdefault((network, way), []).extend(chosen)
        print(f"{network}: searched", file=sys.stderr, flush=True)
    generator = np.random.default_rng(0)
    orders = [[those[i] for i in generator.permutation(len(those))] for those in groups.values()]
    return [m for turn in itertools.zip_longest(*orders) for m in turn if m is not None]


def candidate(member: Member, quick: bool) -> Candidate:
    """A member as it is exported."""
    data, model, _ = prepared(member.network, quick)
    rebuilt = candidate_of(Path(member.run), member.number, data=data, model=model)
    evaluator, code = rebuilt.evaluator, rebuilt.code
    name = f"net_{member.network.replace(' ', '_')}_{member.number}"
    return Candidate(name, evaluator.space.graph, evaluator.formats(code), evaluator.model(code, bake=True))


class TooLongError(Exception):
    """An export took more than PATIENCE seconds."""


def _too_long(*_: object) -> None:
    raise TooLongError


def outcome(target: str, built: Candidate, x: Tensor, place: Path) -> Row:
    """What one target makes of one member."""
    start = time.perf_counter()
    row: Row = {"samples": 0, "differing": 0, "alike": 0, "refused": "", "unfinished": False}
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(PATIENCE)
    try:
        result = export(built, target_named(target), place, x)
        row |= {"samples": result.samples, "differing": result.differing, "alike": result.alike}
    except MissingExtraError:
        raise
    except ExportError as error:
        if time.perf_counter() - start >= PATIENCE:  # the alarm came while something was cleaned up
            row["unfinished"] = True
        elif "please report this" in str(error):
            row |= {"samples": len(x), "differing": len(x)}
            print(f"{built.name}: {error}", file=sys.stderr, flush=True)
        else:
            row["refused"] = str(error)
    except TooLongError:
        row["unfinished"] = True
    finally:
        signal.alarm(0)
    return row | {"s": time.perf_counter() - start}


def kind_of(message: str) -> str:
    """A refusal without its names and numbers."""
    reason = message.partition(": ")[2] or message
    reason = re.sub(r"^\w+ is \S+, which rounds .*?, and ", "a format rounds in another way, and ", reason)
    reason = re.sub(r"^\w+ is \S+, and ", "a format, and ", reason)
    return re.sub(r"\d[\d,.]*", "N", re.split(r"[;:]", reason)[0])


def rows_of(done: Sequence[Row], there: Mapping[tuple[str, str], int]) -> list[Row]:
    """The table: for each target what it made of each network and way, and why it refused some."""
    rows: list[Row] = []
    for target in dict.fromkeys(one["target"] for one in done):
        of_target = [one for one in done if one["target"] == target]
        for group in there:
            if group[0] not in NETWORKS_OF.get(target, NETWORKS):
                continue
            here = [one for one in of_target if (one["network"], one["way"]) == group]
            exported = [one for one in here if one["samples"]]
            samples = sum(one["samples"] for one in exported)
            rows.append(
                {
                    "target": target,
                    "of": ", ".join(group),
                    "tried": f"{len(here)} of {there[group]}",
                    "exported": len(exported),
                    "refused": sum(bool(one["refused"]) for one in here),
                    "unfinished": sum(one["unfinished"] for one in here),
                    "samples": samples,
                    "differing": sum(one["differing"] for one in exported),
                    "largest alike": f"{sum(one['alike'] for one in exported) / samples:.4f}" if samples else "",
                    "median s": statistics.median(one["s"] for one in exported) if exported else "",
                    "message": "",
                }
            )
        refused: dict[str, list[str]] = {}
        for one in of_target:
            if one["refused"]:
                refused.setdefault(kind_of(one["refused"]), []).append(one["refused"])
        empty = dict.fromkeys(rows[-1], "")
        for messages in refused.values():
            rows.append(empty | {"target": target, "of": "why", "refused": len(messages), "message": messages[0]})
    return rows


def measured(
    chosen: Mapping[str, Sequence[Member]], targets: Sequence[str], folder: Path, minutes: float, quick: bool
) -> list[Row]:
    """What each target makes of its members, as far as there is time; with what an earlier call has done."""
    kept = folder / "done.jsonl"
    done: list[Row] = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    known = {(one["target"], one["run"], one["number"]) for one in done}
    last = time.monotonic() + 60 * minutes
    groups = [[t for t in targets if t not in SLOW], *([t] for t in targets if t in SLOW)]
    for some, member in ((group, member) for group in groups if group for member in chosen[group[0]]):
        waiting = [t for t in some if (t, Path(member.run).parent.name, member.number) not in known]
        if not waiting or time.monotonic() > last:
            continue
        built, x = candidate(member, quick), prepared(member.network, quick)[2]
        for target in waiting:
            count = min(SLOW.get(target, SAMPLES), 64 if quick else SAMPLES)
            row = {"target": target, "network": member.network, "way": member.way}
            row |= {"run": Path(member.run).parent.name, "number": member.number}
            try:
                row |= outcome(target, built, x[:count], folder / "out")
            except MissingExtraError as error:
                print(f"{target}: {error}", file=sys.stderr)
                continue
            done.append(row)
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    return [one for target in targets for one in done if one["target"] == target]


def main() -> None:
    """Search, export, compare."""
    options = parser(__doc__ or "")
    options.add_argument("--target", choices=TARGETS.names(), action="append", help="only this one")
    options.add_argument("--network", choices=list(EVERY), action="append", help="only this one")
    options.add_argument("--folder", type=Path, help="what is done is kept there; default: build/deploy")
    options.add_argument("--minutes", type=float, default=600.0, help="no export begins after so many")
    given = options.parse_args()
    only = given.network or (NETWORKS[1:2] if given.quick else list(EVERY))
    targets = given.target or (QUICK if given.quick else TARGETS.names())
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or (Path(scratch) if given.quick else ROOT / "build" / "deploy")
        folder.mkdir(parents=True, exist_ok=True)
        chosen: dict[str, list[Member]] = {}
        for networks in {NETWORKS_OF.get(target, NETWORKS) for target in targets}:
            found = members_of([network for network in networks if network in only], folder, given.quick)
            chosen |= {target: found for target in targets if NETWORKS_OF.get(target, NETWORKS) == networks}
        left = given.minutes - (time.monotonic() - begin) / 60
        done = measured(chosen, targets, folder, left, given.quick)
    there = Counter((member.network, member.way) for member in {m for these in chosen.values() for m in these})
    groups = sorted(there, key=lambda group: (list(EVERY).index(group[0]), group[1]))
    summary: dict[str, float] = {"members": max(map(len, chosen.values()))}
    for target in targets:
        of_target = [one for one in done if one["target"] == target]
        if any(one["samples"] for one in of_target):
            summary[f"{target}_exported"] = sum(bool(one["samples"]) for one in of_target)
            summary[f"{target}_differing"] = sum(one["differing"] for one in of_target)
    report("deploy", rows_of(done, {group: there[group] for group in groups}), summary, given.json)


if __name__ == "__main__":
    main()
