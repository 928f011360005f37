"""How the cost of a candidate and the memory of a search grow: with candidates, sites, samples; and a search killed.

Every row is a search by brute force in a separate process: the whole loop, from proposals over evaluation to trials
that are durable in the store. ``loop us`` is what of the time per candidate is not the evaluator's. ``peak MB`` is the
resident memory of the process at its largest, ``grown MB`` how much of it came after the search began.

candidates     jsc-mlp, 32 settings at each of 4 Linear layers, 2,000 samples; 10³ to 10⁶ of its candidates
sites          chains of 1 to 60 Linear layers 16 wide, 4 settings each, 2,000 samples
samples        jsc-mlp, 10² to 10⁶ samples
target         jsc-mlp, 30 settings at each layer: all 810,000 candidates on 2,000 samples
killed, resumed   the search of 10⁶ candidates, ended by SIGKILL half-way, then started again; its front must be
               that of the row of 10⁶ candidates: exit status 1 where it is not
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import clusters, jets, make_job, parser, report, trained
from torch import nn

from bitfront.engine.evaluation.dispatch import Dispatcher
from bitfront.engine.evaluation.fixed import BatchMetrics, FixedEvaluator
from bitfront.engine.search import loop
from bitfront.engine.storage import store as stores
from bitfront.engine.storage.store import Store
from bitfront.models.base import build_model
from bitfront.objectives import Objective, Objectives
from bitfront.pareto import non_dominated
from bitfront.spaces.base import Codes
from bitfront.strategies.brute_force import BruteForce

OBJECTIVES = Objectives((Objective("accuracy", 1.0, "maximize"), Objective("average_bitwidth", 0.2, "minimize")))
WIDTHS = {4: ([4, 8], [4, 8]), 30: ([3, 4, 5, 6, 8], [2, 3, 4, 5, 6, 8]), 32: ([4, 5, 6, 8], [2, 3, 4, 5, 6, 7, 8, 10])}


def chain(sites: int) -> nn.Module:
    """So many Linear layers."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(sites):
        layers[f"fc{i}"] = nn.Linear(16, 16 if i + 1 < sites else 5)
    return nn.Sequential(layers)


class Timed(Dispatcher):
    """An evaluator that knows how long it took."""

    spent = 0.0

    def blocks(self, codes: Codes) -> Iterator[tuple[Codes, BatchMetrics]]:
        evaluated = super().blocks(codes)
        while True:
            begin = time.perf_counter()
            block = next(evaluated, None)
            self.spent += time.perf_counter() - begin
            if block is None:
                return
            yield block


def search(folder: Path, model: str, sites: int, settings: int, candidates: int, samples: int) -> dict[str, Any]:
    """One row: a search in this process, in a store that stays in `folder`."""
    given = torch.load(folder.parent / "data.pt", weights_only=True)
    x = given["x"].repeat(-(-samples // len(given["x"])), 1)[:samples]
    y = given["y"].repeat(-(-samples // len(given["y"])))[:samples]
    torch.manual_seed(0)
    net = chain(sites) if model == "chain" else build_model("jsc-mlp", (16,), 5, 0)
    if model != "chain":
        net.load_state_dict(given["weights"])
    data, weight = WIDTHS[settings]
    linear = {"name": ["integer"], "data_in_width": data, "data_in_frac_width": ["auto"], "bias_width": [16]}
    linear |= {"weight_width": weight, "weight_frac_width": ["auto"], "bias_frac_width": ["auto"]}
    evaluator = FixedEvaluator(make_job(net.eval(), x, y, {"linear": linear}, calibration=given["x"][:512]))
    space = evaluator.space
    identity = {"parameters": [p.name for p in space.parameters]}
    evaluator.evaluate(space.numbered(0, 1))  # calibration, once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    store = Store.open(folder / "trials.sqlite", evaluator.metrics, len(space.parameters), identity, space.keys)
    earlier = len(store)
    begin = time.perf_counter()
    with Timed(evaluator) as dispatcher:
        loop.run(
            space=space,
            strategy=BruteForce(space, 2, 0),
            initial=space.numbered(0, 0),
            objectives=OBJECTIVES,
            store=store,
            evaluator=dispatcher,
            limits=loop.Limits(candidates),
            seed=0,
        )
    seconds = time.perf_counter() - begin
    done = len(store)
    new = max(1, done - earlier)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    trials = store.trials()
    store.close()
    return {
        "sites": len([g for g in space.groups if g.size > 1]),
        "candidates": done,
        "samples": samples,
        "seconds": seconds,
        "us each": seconds / new * 1e6,
        "loop us": (seconds - dispatcher.spent) / new * 1e6,
        "peak MB": peak,
        "grown MB": peak - before,
        "store MB": (folder / "trials.sqlite").stat().st_size / 1e6,
        "front": non_dominated(OBJECTIVES.losses(trials.metrics)).tolist(),
    }


def start(folder: Path, arguments: dict[str, Any]) -> subprocess.Popen[str]:
    """The same in a fresh process."""
    folder.mkdir(exist_ok=True)
    words = [sys.executable, __file__, "--row", json.dumps([str(folder), arguments])]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def finish(what: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    """Its row."""
    out, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{what}: it ended with status {process.returncode}")
    row = json.loads(out.splitlines()[-1])
    print(f"{what}: {row['candidates']:,} candidates in {row['seconds']:.1f} s", file=sys.stderr)
    return {"what": what, **row}


def stored(path: Path) -> int:
    """How many trials are in a store that another process writes."""
    try:
        store = stores.read(path)
    except Exception:
        return 0
    try:
        return store.next_number
    finally:
        store.close()


def main() -> None:
    """All rows."""
    options = parser(__doc__)
    options.add_argument("--row", help="one row, for the processes that this one starts")
    given = options.parse_args()
    if given.row:
        folder, arguments = json.loads(given.row)
        print(json.dumps(search(Path(folder), **arguments)))
        return
    many, target = (2_000, 2_000) if given.quick else (1_000_000, 810_000)
    mlp = {"model": "jsc-mlp", "sites": 4, "settings": 32, "samples": 200 if given.quick else 2_000}
    powers = [10**p for p in (3, 4, 5)] if not given.quick else [100]
    wanted: list[tuple[str, dict[str, Any]]] = [("candidates", {**mlp, "candidates": n}) for n in (*powers, many)]
    for sites in (1, 4, 15, 60) if not given.quick else (4,):
        chains = {"model": "chain", "sites": sites, "settings": 4, "samples": mlp["samples"]}
        wanted.append(("sites", {**chains, "candidates": min(4**sites, 16_384 if not given.quick else 64)}))
    for p in (2, 3, 4, 5, 6) if not given.quick else (2,):
        wanted.append(("samples", {**mlp, "samples": 10**p, "candidates": min(many // 100, 2 * 10 ** (7 - p))}))
    wanted.append(("target", {**mlp, "settings": 30, "candidates": target}))
    with tempfile.TemporaryDirectory(dir=os.environ.get("BITFRONT_SCRATCH")) as scratch:
        root = Path(scratch)
        dataset, described = (clusters(2_000), "synthetic clusters") if given.quick else jets()
        net = trained(build_model("jsc-mlp", (16,), 5, 0), dataset)
        data = {"x": dataset.x["val"][:16_384], "y": dataset.y["val"][:16_384], "weights": net.state_dict()}
        torch.save({k: v.clone() if k != "weights" else v for k, v in data.items()}, root / "data.pt")
        rows = []
        for i, (what, arguments) in enumerate(wanted):
            rows.append(finish(what, start(root / str(i), arguments)))
        whole = next(r for r in rows if r["what"] == "candidates" and r["candidates"] == many)
        arguments = next(a for w, a in wanted if w == "candidates" and a["candidates"] == many)
        process = start(root / "killed", arguments)
        while stored(root / "killed" / "trials.sqlite") < many // 2 and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = stored(root / "killed" / "trials.sqlite")
        print(f"killed after {kept:,} candidates", file=sys.stderr)
        resumed = finish("killed, resumed", start(root / "killed", arguments))
        rows.append(resumed)
        same = resumed["front"] == whole["front"]
        for row in rows:
            row["front"] = len(row["front"])
    fitted = np.polyfit(
        [r["candidates"] for r in rows if r["what"] == "candidates"],
        [r["grown MB"] for r in rows if r["what"] == "candidates"],
        1,
    )
    million = next(r for r in rows if r["candidates"] == many and r["what"] == "candidates")
    base = next(r for r in rows if r["what"] == "candidates" and r["candidates"] in (10_000, 100))
    goal = next(r for r in rows if r["what"] == "target")
    summary = {
        "target_candidates": goal["candidates"],
        "target_seconds": goal["seconds"],
        "million_seconds": million["seconds"],
        "million_us_each": million["us each"],
        "million_loop_us": million["loop us"],
        "million_peak_mb": million["peak MB"],
        "cost_ratio": million["us each"] / base["us each"],
        "memory_ratio": million["peak MB"] / base["peak MB"],
        "bytes_per_candidate_in_memory": max(0.0, float(fitted[0]) * 1e6),
        "bytes_per_candidate_in_store": million["store MB"] * 1e6 / many,
        "killed_after": kept,
        "same_front_after_kill": int(same),
    }
    report("Brute force at scale", rows, summary, given.json, data=described)
    if not same:
        sys.exit("the search that was killed and resumed has another front")


if __name__ == "__main__":
    main()
