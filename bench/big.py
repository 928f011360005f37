"""Networks of tens of millions of parameters, searched within a limit of memory: what is taken, and how long it takes.

A ResNet-50 on images of 3 × 224 × 224, and a transformer of 100 million parameters on 128 tokens, both with random
weights. Labels are the answers of the float model. Each is searched in a process of its own by ``surrogate`` with
affine formats (a scale per tensor of an input, per channel of a weight) of 4, 6 or 8 bits at every site that
``default`` means, with ``memory_limit = "8 GB"``.

peak MB      the most memory that the process ever took (its resident set)
expected s   what the search said before its first candidate; measured s is what it took from then on, the end included
before s     what it took until then: capture, calibration, the check of the evaluator, the noise of options
forgotten    how often something of a weight was forgotten, to be computed again

Takes a quarter of an hour on two cores, so it is ``make big``, and not part of ``make bench``.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from common import parser, report
from torch import Tensor, nn

import bitfront as bf
from bitfront.data.base import Dataset
from bitfront.engine.planning.plan import Plan
from models import resnet50, transformer

CHOICES = {"name": ["affine"], "data_in_width": [4, 6, 8], "weight_width": [4, 6, 8]}
LIMIT = "8 GB"
#: Name → the model, its samples, the number of classes.
Draw = Callable[[int, torch.Generator], Tensor]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Draw, int]] = {
    "ResNet-50": (resnet50, lambda count, g: torch.randn(count, 3, 224, 224, generator=g), 1000),
    "transformer": (transformer, lambda count, g: torch.randint(20_000, (count, 128), generator=g).float(), 10),
}


class Clock(bf.Events):
    """When a search said how long it takes, and what it said."""

    def __init__(self) -> None:
        self.seconds, self.at = 0.0, 0.0
        self.plan: Plan | None = None

    def planned(self, plan: Plan, seconds: float) -> None:  # noqa: ARG002
        self.plan = plan

    def expected(self, seconds: float) -> None:
        self.seconds, self.at = seconds, time.perf_counter()

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)


def one(name: str, samples: int, trials: int, *, quick: bool = False) -> dict[str, Any]:
    """The figures of one network; with `quick` of a small one."""
    make, draw, classes = NETWORKS[name]
    generator = torch.Generator().manual_seed(0)
    model = transformer(depth=1, width=48) if quick else make()
    x, others = draw(samples, generator), draw(4 * samples, generator)
    with torch.no_grad():
        labels = torch.cat([model(part).argmax(1) for part in x.split(4)])
    names = tuple(map(str, range(classes)))
    data = Dataset(
        "noise",
        {"train": others, "val": x},
        {"train": torch.arange(len(others)) % classes, "val": labels},
        names,
        "noise",
    )
    clock, began = Clock(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = bf.search(
            model=model,
            data=data,
            space={"default": CHOICES},
            metrics={"accuracy": "maximize", "average_bitwidth": "minimize"},
            strategy="surrogate",
            n_trials=trials,
            memory_limit=LIMIT,
            project_dir=folder,
            events=clock,
        )
    measured = time.perf_counter() - clock.at
    assert clock.plan is not None
    return {
        "network": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "sites": len(clock.plan.space.groups),
        "samples": samples,
        "candidates": len(run),
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000 * 1.024,
        "before s": clock.at - began,
        "expected s": clock.seconds,
        "measured s": measured,
        "measured / expected": measured / clock.seconds,
        "forgotten": clock.plan.evaluator.job.weights.forgotten,
    }


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--one", metavar="NAME", choices=list(NETWORKS), help="only this network, as JSON")
    arguments.add_argument("--samples", type=int, default=16, help="validation samples; four times as many calibrate")
    arguments.add_argument("--trials", type=int, default=20, help="candidates")
    options = arguments.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.samples, options.trials, quick=options.quick)))
        return 0
    rows = []
    for name in ["transformer"] if options.quick else NETWORKS:
        samples, trials = (8, 4) if options.quick else (options.samples, options.trials)
        sizes = ["--samples", str(samples), "--trials", str(trials), *(["--quick"] if options.quick else [])]
        done = subprocess.run([sys.executable, __file__, "--one", name, *sizes], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            return 1
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    summary = {f"{row['network']}_peak_MB": float(row["peak MB"]) for row in rows}
    summary["largest_time_factor"] = max(
        max(row["measured / expected"], 1 / row["measured / expected"]) for row in rows
    )
    report("Big networks", rows, summary, options.json, data=f"random samples and weights; memory_limit = {LIMIT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
