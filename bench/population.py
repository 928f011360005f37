"""What training many candidates together costs, against training them one by one.

jsc-mlp (16-64-32-32-5) on 65,536 jets of the train split, one epoch of Adam, then loss and accuracy on 8,192 jets of
the val split: 1, 8, 32 and 128 candidates, each with separate weights, in batches of 1,024 and of 128 samples.
``float`` are plain models, ``8 and 4 bits`` quantized ones, trained through straight-through gradients: weights, inputs
and biases of each layer have 8 or 4 bits, drawn per candidate.

population     ``train_population``, everything included: reading the models, gathering batches, state dicts at the end.
               It uses both cores.
one by one     ``training.train``, the loop for one model, which has resident data, fused optimizers and no reading back
               within an epoch; on 1 or 2 threads, whichever is faster. As many candidates as ``alone`` says are
               trained, the time is scaled to all.

Both take turns in one process; ``times`` is the median over rounds of one by one / population. The profile is of 32
candidates: seconds that the threads spend on each part of the compiled steps, as shares of all the time that the
threads had; the rest is reading models, gathering batches, scores, and waiting for one another. The largest difference
of the val loss to training alone is printed; above 0.01 after one epoch the exit status is 1.

With ``--device cuda`` both train on a GPU; there is no profile then.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from common import clusters, jets, paired, parser, report, spread, timed
from torch import nn

from bitfront.data.base import Dataset
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.models.base import build_model
from bitfront.population import TrainedMember, train_population, why_alone
from bitfront.training import TrainSettings, train
from bitfront.transforms import calibrate, quantize

COUNTS = (1, 8, 32, 128)
TARGET = 32
Row = dict[str, Any]


def part_of(data: Dataset, samples: int, val: int) -> Dataset:
    def cut(split: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = data.split(split)
        return x[:n], y[:n]

    splits = {"train": cut("train", samples), "val": cut("val", val)}
    return Dataset(
        data.name,
        {k: x for k, (x, _) in splits.items()},
        {k: y for k, (_, y) in splits.items()},
        data.class_names,
        data.source,
    )


def float_models(count: int) -> list[nn.Module]:
    return [build_model("jsc-mlp", (16,), 5, seed=i) for i in range(count)]


def quantized_models(count: int, x: torch.Tensor) -> list[nn.Module]:
    rng = np.random.default_rng(0)
    models = []
    for model in float_models(count):
        graph = capture(model, x[:2])
        formats = {
            site.name: {o: Integer(int(rng.choice([4, 8])), "auto") for o in ("data_in", "weight", "bias")}
            for site in graph.sites
            if site.op == "linear"
        }
        models.append(quantize(graph, calibrate(graph, formats, x)))
    return models


def alone(
    models: Sequence[nn.Module], data: Dataset, settings: TrainSettings, threads: int, device: str
) -> list[float]:
    """Val losses of models that are trained one by one."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return [train(model, data, settings, device=device).history[-1].val_loss for model in models]
    finally:
        torch.set_num_threads(before)


def better_threads(model: nn.Module, data: Dataset, settings: TrainSettings, device: str) -> int:
    if device != "cpu":
        return 1
    short = TrainSettings(max_epochs=1, batch_size=settings.batch_size, max_steps=20)
    times = paired({str(n): partial(alone, [model], data, short, n, device) for n in (1, 2)}, 4)
    return min((1, 2), key=lambda n: statistics.median(times[str(n)][1:]))


def compare(
    name: str, models: Sequence[nn.Module], data: Dataset, batch: int, by_hand: int, rounds: int, device: str
) -> tuple[list[Row], dict[str, float], float]:
    """(rows, times as fast by number of candidates, largest difference of the val loss)."""
    settings = TrainSettings(max_epochs=1, batch_size=batch)
    reason = why_alone(models[0], data.sample_shape, device)
    if reason:
        print(f"populations are trained one by one here: {reason}", file=sys.stderr)
    threads = better_threads(models[0], data, settings, device)
    counts = [k for k in COUNTS if k <= len(models)]
    losses: list[float] = []
    members: Sequence[TrainedMember] = ()

    def one_by_one() -> None:
        losses[:] = alone(models[:by_hand], data, settings, threads, device)

    def together(count: int) -> None:
        nonlocal members
        members = train_population(models[:count], data, settings, device=device)

    train_population(models[:1], data, settings, device=device)  # compiles, where nobody has yet
    functions: Mapping[str, Callable[[], object]] = {
        "one by one": one_by_one,
        **{str(k): partial(together, k) for k in counts},
    }
    times = paired(functions, rounds)
    together(by_hand)
    difference = max(abs(member.history[-1].val_loss - loss) for member, loss in zip(members, losses, strict=True))
    rows, speedups = [], {}
    for k in counts:
        scaled = [t / by_hand * k for t in times["one by one"]]
        ratios = [a / b for a, b in zip(scaled, times[str(k)], strict=True)]
        quartiles = spread(ratios)
        speedups[str(k)] = quartiles["median"]
        rows.append(
            {
                "candidates": name,
                "batch": batch,
                "what": f"{k} trained, s",
                "population": statistics.median(times[str(k)]),
                "one by one": statistics.median(scaled),
                "alone": f"{by_hand}, {threads} thread{'s' * (threads > 1)}",
                "times": quartiles["median"],
                "q1": quartiles["q1"],
                "q3": quartiles["q3"],
            }
        )
    # The compiled steps alone know what they spend their time on.
    parts = profile(name, models[: min(TARGET, len(models))], data, settings) if device == "cpu" else []
    return rows + parts, speedups, difference


def profile(name: str, models: Sequence[nn.Module], data: Dataset, settings: TrainSettings) -> list[Row]:
    """Shares of the threads' time."""
    parts: dict[str, float] = {}
    whole = timed(lambda: train_population(models, data, settings, parts=parts))
    whole *= min(len(models), torch.get_num_threads())
    parts["everything else"] = whole - sum(parts.values())
    empty = {"one by one": None, "alone": "", "times": None, "q1": None, "q3": None}
    return [
        {
            "candidates": name,
            "batch": settings.batch_size,
            "what": f"of {len(models)}: {part}, share",
            "population": seconds / whole,
            **empty,
        }
        for part, seconds in parts.items()
    ]


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--device", default="cpu", help="where to train: cpu or cuda")
    options = arguments.parse_args()
    quick = options.quick
    data, described = (clusters(3000), "synthetic clusters, 3,000") if quick else jets()
    data = part_of(data, 65_536, 8192)
    count = 8 if quick else max(COUNTS)
    plain, low = float_models(count), quantized_models(count, data.split("train")[0][:512])
    rows: list[Row] = []
    summary: dict[str, float] = {}
    differences = []
    # How many are trained one by one: all of those that the target is about; elsewhere what a minute allows.
    for name, key, models, batch, by_hand in (
        ("float", "", plain, 1024, TARGET),
        ("float", "batch_128_", plain, 128, 4),
        ("8 and 4 bits", "quantized_", low, 1024, 4),
        ("8 and 4 bits", "quantized_batch_128_", low, 128, 2),
    ):
        case_rows, speedups, difference = compare(
            name, models, data, batch, min(by_hand, count), 1 if quick else 5 if by_hand > 2 else 3, options.device
        )
        rows += case_rows
        summary |= {f"{key}speedup_{k}": value for k, value in speedups.items()}
        differences.append(difference)
    summary["max_val_loss_difference"] = max(differences)
    report(
        "Training many candidates together",
        rows,
        summary,
        options.json,
        data=f"{described}; 65,536 of them to train on, 8,192 to judge by" if not quick else described,
    )
    wrong = not summary["max_val_loss_difference"] <= 0.01
    if wrong:
        print("a population and training alone disagree", file=sys.stderr)
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
