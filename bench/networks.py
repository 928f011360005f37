"""The front of trained networks of 22 to 53 layers in few evaluations: ``surrogate`` beside other strategies.

Four networks are trained here on MNIST images of 14 × 14: ResNet-20, two with inverted residuals like MobileNetV2, and
a small transformer. Each weight layer has 2, 3, 4, 6 or 8 bits (int8-style: a scale per output channel), inputs have 8.
Objectives are accuracy on 1,000 images and the average number of bits.

within 5     share of the hypervolume of accuracies at most 5 points below float, after so many evaluations; 1 is the
             front of all runs together, among them a long one of each strategy of ``LONG``
up to float  the same after all evaluations, where accuracies above float count as float's: what is gained above it on
             1,000 images is mostly chance
1 % worse    bits of the smallest network that is at most 1 point below float, after 120 evaluations of a search with
             that constraint, over the fewest that any run found
unseen       the share for the same fronts by their accuracies on 2,200 images that no search has seen; 1 is what is
             best there of the fronts of all runs
luck         points by which a front is closer to float on the images of the search than on unseen ones, mean of its
             members; ``at 400`` is that of the long run
before       what ``surrogate`` measures before it begins (noise and margins of all options) takes, in evaluations at
             their mean time; it counts as so many of its evaluations

Medians over runs, with the worst run of ``within 5`` in ``worst``. Every seed gives the same run of ``sensitivities``
(``baseline.py``), in which nothing is drawn at random. It and Optuna's samplers take part in the first comparison only.
With ``--store`` results are kept in a folder, and a run that was ended goes on.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import baseline
import numpy as np
import torch
from common import parser, report
from int8 import images
from torch import Tensor, nn
from torch.nn import functional

import bitfront as bf
from bitfront.engine.comparison import curves
from bitfront.engine.evaluation.fixed import EvaluationJob, FixedEvaluator
from bitfront.engine.evaluation.margins import margins
from bitfront.engine.evaluation.sensitivity import sensitivities
from bitfront.metrics.configured import configured_runner
from bitfront.pareto import MARGIN, hypervolume, non_dominated
from models import ResNet20

STRATEGIES = ("surrogate", baseline.NAME, "evolution", "optuna:tpe", "optuna:nsgaii")
CONSTRAINED = ("surrogate", "evolution")
SHOWN = (50, 100, 150)
#: Strategies with one run of so many evaluations, for the reference.
LONG, LONGER = ("surrogate", "evolution"), 400
#: The question "at most 1 % worse" is asked after so many evaluations.
ASKED = 120
CHOICES = {"name": "affine", "weight_width": [2, 3, 4, 6, 8], "weight_granularity": "channel", "data_in_width": 8}
METRICS = {"accuracy": "maximize", "average_bitwidth": "minimize"}


class Inverted(nn.Module):
    """An inverted residual (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, factor: int) -> None:
        super().__init__()
        inner = inputs * factor
        first = [nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()] if factor > 1 else []
        self.adds = stride == 1 and inputs == outputs
        self.steps = nn.Sequential(
            *first,
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.steps(x) if self.adds else self.steps(x)


def mobile(blocks: Sequence[tuple[int, int, int, int]]) -> nn.Module:
    """A network of inverted residuals: (factor, channels, repeats, stride of the first) per stage."""
    layers: list[nn.Module] = [nn.Conv2d(1, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()]
    channels = 8
    for factor, outputs, repeats, stride in blocks:
        for i in range(repeats):
            layers.append(Inverted(channels, outputs, stride if i == 0 else 1, factor))
            channels = outputs
    end = [nn.Conv2d(channels, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU6(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, *end, nn.Flatten(), nn.Linear(64, 10))


class Block(nn.Module):
    """A block of a transformer, with its products as functions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.gelu, self.down = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        batch, tokens, width = y.shape
        shape = (batch, tokens, self.heads, width // self.heads)
        q, k, v = (layer(y).reshape(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = torch.softmax(q @ k.transpose(-1, -2) / shape[-1] ** 0.5, -1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(self.gelu(self.up(self.between(x))))


class Transformer(nn.Module):
    """Four blocks over the rows of an image."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.places = nn.Linear(14, width), nn.Parameter(torch.randn(14, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x.flatten(1, 2)) + self.places).mean(1)))


def networks(quick: bool) -> Iterator[tuple[str, nn.Module, int]]:
    """(name, network, epochs) of each."""
    made = (
        ("ResNet-20", lambda: ResNet20(channels=1), 8),
        ("mobile, 29 layers", lambda: mobile([(1, 8, 1, 1), (3, 12, 2, 2), (3, 16, 3, 2), (3, 24, 3, 1)]), 8),
        (
            "mobile, 53 layers",
            lambda: mobile(
                [(1, 8, 1, 1), (3, 8, 2, 1), (3, 12, 3, 2), (3, 16, 4, 2), (3, 20, 3, 1), (3, 24, 3, 1), (3, 32, 1, 1)]
            ),
            8,
        ),
        ("transformer", Transformer, 20),
    )
    for name, make, epochs in made[1:2] if quick else made:
        torch.manual_seed(0)
        yield name, make(), 1 if quick else epochs


def trained(network: nn.Module, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """The network after a plain training."""
    rate, generator = 4e-3, torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * -(-len(x) // 128))
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(128):
            optimizer.zero_grad()
            functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def compared(
    network: nn.Module,
    data: dict[str, Any],
    strategies: Sequence[str],
    seeds: int,
    budget: int,
    drop: str | None,
    folder: Path,
) -> bf.Comparison:
    """A comparison on one network; what is in the folder is not evaluated again."""
    conditions = {"constraints": {"accuracy_drop": drop}} if drop else {}
    return bf.compare(
        model=network,
        data={split: data[split] for split in ("train", "val", "test")},
        space=dict.fromkeys(("conv2d", "linear"), CHOICES),
        metrics=METRICS,
        strategies=list(strategies),
        seeds=seeds,
        n_trials=budget,
        project_dir=str(folder),
        project="strict" if drop else "free",
        focus=10.0,
        **conditions,
    )


def evaluator_of(network: nn.Module, data: dict[str, Any], split: str) -> FixedEvaluator:
    """An evaluator of the candidates of a comparison, on one split of the data."""
    space = "graph/quantize/mixed_precision_ptq"
    choices = {op: {k: v if isinstance(v, list) else [v] for k, v in CHOICES.items()} for op in ("conv2d", "linear")}
    x, runners = data["train"][0], tuple(configured_runner(r) for r in ("basic_evaluation", "average_bitwidth"))
    job = EvaluationJob(network, x[:2], space, "type", choices, runners, {"val": data[split]}, x[:512])
    return FixedEvaluator(job)


def before_in_evaluations(network: nn.Module, data: dict[str, Any], seconds: float) -> float:
    """What the measurements before a search take, in evaluations."""
    evaluator = evaluator_of(network, data, "val")
    evaluator.formats(evaluator.space.numbered(0, 1)[0])
    begin = time.perf_counter()
    margins(evaluator, sensitivities(evaluator))
    return (time.perf_counter() - begin) / seconds


def measured_network(
    name: str, network: nn.Module, data: dict[str, Any], seeds: int, budget: int, longer: int, folder: Path
) -> Iterator[dict]:
    """The rows of one network."""
    x, y = data["val"]
    with torch.no_grad():
        of_float = float((network(x).argmax(1) == y).float().mean())
    free = compared(network, data, STRATEGIES, seeds, budget, None, folder).runs
    strict = compared(network, data, CONSTRAINED, seeds, budget, "<= 1 %", folder).runs
    long = compared(network, data, LONG, 1, longer, None, folder)
    every = np.concatenate([run.losses for run in (*free, *strict, *long.runs)])
    every = every[np.isfinite(every).all(axis=1)]
    limit = -(of_float - 0.05)
    inside = every[every[:, 0] <= limit]
    front = inside[non_dominated(inside)]
    point = np.array([limit, front[:, 1].max() + MARGIN * np.ptp(front[:, 1])])
    whole = hypervolume(front, point)
    fewest = every[every[:, 0] <= -(of_float - 0.01) + 1e-9, 1].min()
    seconds = statistics.median(float(np.median(run.evaluating)) for run in free)
    first = before_in_evaluations(network, data, seconds)
    counts = [len(run.losses) - (round(first) if run.strategy == "surrogate" else 0) for run in free]
    every_run, counts = [*free, *long.runs], counts + [longer] * len(long.runs)
    unseen, luck = on_unseen(network, data, every_run, counts, limit, point[1])
    for strategy in STRATEGIES:
        before = round(first) if strategy == "surrogate" else 0
        runs = [run for run in free if run.strategy == strategy]
        shares = {n: [s / whole for s in _shares(runs, point, n - before)] for n in SHOWN if n <= budget}
        capped = [_up_to(run.losses[: budget - before], -of_float) for run in runs]
        most = hypervolume(_up_to(front, -of_float), point)
        asked = [run for run in strict if run.strategy == strategy]
        if strategy == baseline.NAME:
            asked = runs
        bits = [_fewest(run.losses[: ASKED - before], of_float) for run in asked]
        rows = [i for i, run in enumerate(free) if run.strategy == strategy]
        long_rows = [len(free) + i for i, run in enumerate(long.runs) if run.strategy == strategy]
        yield {
            "network": name,
            "strategy": strategy,
            "runs": len(runs),
            **{f"within 5 @{n}": statistics.median(of_seeds) for n, of_seeds in shares.items()},
            "worst": min(list(shares.values())[-1]) if shares else None,
            "up to float": statistics.median(hypervolume(losses, point) / most for losses in capped),
            "unseen": statistics.median(unseen[i] for i in rows),
            "luck": _median([luck[i] for i in rows]),
            f"luck @{longer}": _median([luck[i] for i in long_rows]),
            "1 % worse": statistics.median(bits) / fewest if bits else None,
            "bits": statistics.median(bits) if bits else None,
            "fewest": float(fewest),
            "ms each": 1000 * seconds,
            "proposal ms": 1000 * statistics.median(float(r.asking[-1]) / len(r.losses) for r in runs),
            "before": first if strategy == "surrogate" else None,
        }


def on_unseen(
    network: nn.Module, data: dict[str, Any], runs: Sequence[Any], counts: Sequence[int], limit: float, bits: float
) -> tuple[list[float], list[float | None]]:
    """What the fronts of runs are worth on images that no search has seen.

    Args:
        network: the network.
        data: with the split ``unseen``.
        runs: of all strategies.
        counts: per run after how many evaluations its front is taken.
        limit: the largest loss of accuracy that counts, on the images of the search.
        bits: the largest number of bits that counts.

    Returns:
        Per run the share of the hypervolume of all fronts together, within 5 points of float on unseen images; and by
        how many points its members are closer to float on the images of the search, None where there is no member.
    """
    here, there = evaluator_of(network, data, "val"), evaluator_of(network, data, "unseen")
    of_float = [
        e.float_evaluator().evaluate(np.zeros((1, 0), dtype=np.int64)).values["accuracy"][0] for e in (here, there)
    ]
    fronts = [_front(run, limit, count) for run, count in zip(runs, counts, strict=True)]
    every, place = np.unique(np.concatenate([codes for codes, _ in fronts]), axis=0, return_inverse=True)
    below = (of_float[1] - there.evaluate(every).values["accuracy"])[place.ravel()]
    of_runs = np.split(below, np.cumsum([len(codes) for codes, _ in fronts])[:-1])
    results = [np.column_stack([b, losses[:, 1]]) for b, (_, losses) in zip(of_runs, fronts, strict=True)]
    point = np.array([0.05, bits])
    volumes = [hypervolume(_inside(found, point), point) for found in [*results, np.concatenate(results)]]
    luck = [
        100 * float(np.mean(b - (of_float[0] + losses[:, 0]))) if len(b) else None
        for b, (_, losses) in zip(of_runs, fronts, strict=True)
    ]
    return [volume / volumes[-1] if volumes[-1] > 0 else 0.0 for volume in volumes[:-1]], luck


def _front(run: Any, limit: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes, losses) of the front of a run after `count` evaluations, of what is within 5 points of float."""
    losses = np.nan_to_num(run.losses[:count], nan=np.inf)
    rows = np.flatnonzero(losses[:, 0] <= limit)
    rows = rows[non_dominated(losses[rows])]
    return run.codes[rows], losses[rows]


def _inside(losses: np.ndarray, point: np.ndarray) -> np.ndarray:
    """The front of the results that a reference point counts."""
    losses = losses[(losses < point).all(axis=1)]
    return losses[non_dominated(losses)]


def _median(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def _shares(runs: Sequence[Any], point: np.ndarray, count: int) -> list[float]:
    volumes = [curves.volumes(np.nan_to_num(run.losses, nan=np.inf), point) for run in runs]
    return [float(v[min(count, len(v)) - 1]) for v in volumes]


def _up_to(losses: np.ndarray, least: float) -> np.ndarray:
    """The front of results whose first loss counts as `least` where it is less."""
    losses = losses[np.isfinite(losses).all(axis=1)]
    capped = np.column_stack([np.maximum(losses[:, 0], least), losses[:, 1:]])
    return capped[non_dominated(capped)]


def _fewest(losses: np.ndarray, of_float: float) -> float:
    fine = losses[losses[:, 0] <= -(of_float - 0.01) + 1e-9, 1]
    return float(fine.min()) if len(fine) else float("inf")


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--seeds", type=int, default=10, help="runs of each strategy")
    options.add_argument("--network", action="append", help="only the network of this name; can be repeated")
    options.add_argument("--store", type=Path, help="folder that keeps the results of evaluations")
    given = options.parse_args()
    torch.set_num_threads(1)
    dataset, what = images()
    splits = {s: (functional.avg_pool2d(dataset.x[s], 2), dataset.y[s]) for s in ("train", "val", "test")}
    few = slice(0, 100 if given.quick else 1000)
    data = {
        "train": splits["train"],
        "val": tuple(t[few] for t in splits["test"]),
        "test": splits["val"],
        "unseen": tuple(torch.cat([a, b[1000:]]) for a, b in zip(splits["val"], splits["test"], strict=True)),
    }
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, network, epochs in networks(given.quick):
            if given.network and name not in given.network:
                continue
            trained(network, *data["train"], epochs)
            sizes = (1, 20, 20) if given.quick else (given.seeds, max(SHOWN), LONGER)
            for row in measured_network(name, network, data, *sizes, (given.store or Path(scratch)) / name):
                rows.append(row)
                print(row, flush=True)
    ours = [row for row in rows if row["strategy"] == "surrogate"]
    summary = {
        "least_share": min(row[f"within 5 @{max(n for n in SHOWN if f'within 5 @{n}' in row)}"] for row in ours)
        if not given.quick
        else 0.0,
        "most_bits": max(row["1 % worse"] for row in ours),
    }
    report("Trained networks in few evaluations", rows, summary, given.json, data=what)


if __name__ == "__main__":
    main()
