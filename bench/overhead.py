"""What is paid beside the evaluation: the whole command on a small search, and durable trials.

command   ``bitfront search`` on the 18 candidates of shared/examples/jsc_new_by_type_brute.toml, in a new
          process, with a checkpoint that is trained already; median of some runs. Its parts, measured inside: ``start``
          (interpreter and imports), ``data`` (read, split, fingerprint), ``capture`` (model, graph, space, plan),
          ``weights`` (the checkpoint is read and copied), ``search`` (the loop), ``test`` (the front on the test
          split), ``report`` (best.json, log.json, tables); ``rest`` is what is left of the whole.
store     a trial until it is durable on disk (SQLite, write-ahead log, synchronous = FULL): alone, and in blocks.
strategy  brute force: a proposal.
metrics   a million candidates' average_bitwidth, total_bitops and model_size.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, make_job, parser, report, timed

from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.engine.storage.store import Store
from bitfront.metrics.configured import configured_runner
from bitfront.models.base import build_model
from bitfront.spaces.base import Branch, Choice, Group, Space
from bitfront.strategies.base import History
from bitfront.strategies.brute_force import BruteForce

EXAMPLE = ROOT.parent / "shared" / "examples" / "jsc_new_by_type_brute.toml"
PARTS = ("start", "data", "capture", "weights", "search", "test", "report", "rest")

#: Runs the command with clocks around its parts; the last line it writes on standard error is JSON.
COMMAND = """
import time
began = time.time()
import json, sys
from bitfront import cli
import bitfront.api
from bitfront.engine.planning import builder
from bitfront.engine.search import loop, session
from bitfront.report import remarks, tables

times = {"start": time.time() - float(sys.argv.pop(1))}

def clocked(module, name, part):
    function = getattr(module, name)
    def call(*args, **kwargs):
        begin = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            times[part] = times.get(part, 0.0) + time.perf_counter() - begin
    setattr(module, name, call)

clocked(builder, "open_data", "data")
clocked(bitfront.api, "make_plan", "capture")  # the data is within it
clocked(session, "trained_model", "weights")
clocked(session.checkpoints, "save_checkpoint", "weights")
clocked(loop, "run", "search")
clocked(session.front, "measure_on_test", "test")
clocked(session, "write_results", "report")
clocked(tables, "best_trials", "report")
clocked(remarks, "summary", "report")
try:
    cli.main()
finally:
    times["capture"] = times.get("capture", 0.0) - times.get("data", 0.0)
    print(json.dumps(times), file=sys.stderr)
"""


def command(runs: int) -> list[dict[str, Any]]:
    """The parts of the command, in seconds."""
    if not EXAMPLE.is_file():
        print(f"{EXAMPLE} is not there: the command is left out", file=sys.stderr)
        return []
    timings: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        base = ["--config", str(EXAMPLE), "--project-dir", folder]
        env = {**os.environ, "BITFRONT_DATA": os.environ.get("BITFRONT_DATA", str(ROOT.parent / "shared" / "data"))}
        first = [sys.executable, "-m", "bitfront", "train", *base, "--max-epochs", "1"]
        subprocess.run(first, env=env, check=True, capture_output=True)
        for _ in range(runs):
            again = [*base, "--max-epochs", "1", "--restart"]
            begin = time.time()
            words = [sys.executable, "-c", COMMAND, str(begin), "search", *again]
            done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
            whole = time.time() - begin
            if done.returncode:
                sys.exit(done.stderr)
            parts = json.loads(done.stderr.splitlines()[-1])
            parts["rest"] = whole - sum(parts.values())
            timings.append({**parts, "whole": whole})
    medians = {p: statistics.median(timing.get(p, 0.0) for timing in timings) for p in (*PARTS, "whole")}
    return [_row("command", part, seconds * 1e3, "ms") for part, seconds in medians.items()]


def durable(scale: int) -> list[dict[str, Any]]:
    """Milliseconds per durable trial of 12 parameters and 5 metrics."""
    metrics = [f"m{i}" for i in range(5)]
    rng = np.random.default_rng(0)
    rows = []
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        for block, blocks in ((1, 300), (32, 100), (1024, 50), (65_536, 16)):
            codes = rng.integers(0, 32, (block, 12))
            values = {m: rng.random(block) for m in metrics}
            nothing, seconds = ("",) * block, (1e-6,) * block
            store = Store.open(Path(folder) / f"{block}.sqlite", metrics, 12, {"parameters": ["p"] * 12})
            count = max(2, blocks // scale)
            times = [timed(lambda: store.add(codes, values, nothing, seconds)) for _ in range(count)]  # noqa: B023
            store.close()
            what = "one trial, stored alone" if block == 1 else f"trial in blocks of {block:,}"
            rows.append(_row("store", what, statistics.fmean(times) / block * 1e3, "ms"))
            if block == 1:
                rows.append(_row("store", "the same, median", statistics.median(times) * 1e3, "ms"))
    return rows


def proposals() -> list[dict[str, Any]]:
    """Milliseconds per proposal of brute force, in a history that grows to a million."""
    labels = tuple(map(str, range(32)))
    space = Space([Group(f"s{i}", (Branch("b", (Choice("c", labels),)),)) for i in range(4)])
    strategy, history = BruteForce(space, 2, 0), History(4, 2, space, forgets=True)
    rng = np.random.default_rng(0)
    seconds = 0.0
    while len(history) < 1_000_000:
        begin = time.perf_counter()
        codes = strategy.propose(history, strategy.batch, rng)
        seconds += time.perf_counter() - begin
        history.tell(codes, np.zeros((len(codes), 2)))
    return [_row("strategy", "brute force, a proposal", seconds / len(history) * 1e3, "ms")]


def analytic(count: int) -> list[dict[str, Any]]:
    """Milliseconds of all closed-form metrics of so many candidates."""
    names = ("average_bitwidth", "basic_computation", "model_size")
    linear = {"name": ["integer"], "data_in_width": [3, 4, 5, 6, 8], "data_in_frac_width": ["NA"]}
    linear |= {"weight_width": [2, 3, 4, 5, 6, 8], "weight_frac_width": ["NA"], "bias_width": [8]}
    linear |= {"bias_frac_width": ["NA"]}
    x, y = torch.zeros(8, 16), torch.zeros(8, dtype=torch.long)
    runners = tuple(map(configured_runner, names))
    evaluator = FixedEvaluator(make_job(build_model("jsc-mlp", (16,), 5, 0), x, y, {"linear": linear}, runners=runners))
    codes = evaluator.space.sample(count, np.random.default_rng(0))

    def each(runner: Any) -> Callable[[], object]:
        return lambda: runner.measure(evaluator, codes)

    fastest = {name: min(timed(each(r)) for _ in range(3)) for name, r in zip(names, evaluator.runners, strict=True)}
    fastest["all three"] = sum(fastest.values())
    return [_row("metrics", f"{name}, {count:,} candidates", s * 1e3, "ms") for name, s in fastest.items()]


def _row(what: str, part: str, value: float, unit: str) -> dict[str, Any]:
    return {"what": what, "part": part, "value": value, "unit": unit}


def main() -> None:
    """All of them."""
    given = parser(__doc__).parse_args()
    rows = [
        *command(1 if given.quick else 5),
        *durable(50 if given.quick else 1),
        *proposals(),
        *analytic(1000 if given.quick else 1_000_000),
    ]
    value = {(r["what"], r["part"]): r["value"] for r in rows}
    summary = {
        "durable_trial_alone_ms": value["store", "one trial, stored alone"],
        "durable_trial_batched_ms": value["store", "trial in blocks of 1,024"],
        "durable_trial_us_at_a_million": value["store", "trial in blocks of 65,536"] * 1e3,
        "brute_force_proposal_ms": value["strategy", "brute force, a proposal"],
        "analytic_million_seconds": next(v for (_, p), v in value.items() if p.startswith("all three")) / 1e3,
    }
    if ("command", "whole") in value:
        summary = {
            "command_seconds": value["command", "whole"] / 1e3,
            "search_seconds": value["command", "search"] / 1e3,
            **summary,
        }
    report("Overhead", rows, summary, given.json)


if __name__ == "__main__":
    main()
