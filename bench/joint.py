"""Widths and bit-widths in one search, against each of them alone; and its winners, trained on, against yardsticks.

fronts      jsc-mlp on the jets: accuracy against ``bops``, by ``evolution``, as many candidates of each space, each
            trained with its formats in place. *bits*: formats of all four layers, widths as they are. *widths*:
            multipliers of the three hidden layers, in float. *widths, 8 bits*: the same, all operands in 8 bits.
            *joint*: both choices together. Hypervolume of accuracy against log10 of ``bops``, of the area from half
            of the answers right, and from the float network, on; differences are between runs of one seed. ``cost``
            is the least ``bops`` of a candidate at most 1 % worse than the float network, on the search's samples.
yardsticks  per budget a joint search for accuracy against ``ebops``, of candidates that are trained to the end unless
            halving stops them; three of the front are also trained on with learned ranges (``[search.finetune]``). Of
            all that is within a budget, the one most accurate on the validation split is chosen; its accuracy on the
            test split decides nothing, and is what is reported. The yardsticks are uniform quantization-aware training
            of networks of three sizes on the same data: a plain trainer, one seed. ``cost`` is ``ebops`` after
            training.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import jets, parser, report
from numpy.typing import NDArray
from torch import nn

import bitfront as bf
from bitfront import config as configuration
from bitfront import tomlfile
from bitfront.data.base import Dataset
from bitfront.models.base import build_model
from bitfront.population import train_population
from bitfront.training import TrainSettings

SEEDS = (0, 1, 2)
#: EBOPs → test accuracy of uniform quantization-aware training on the re-simulated jets.
YARDSTICKS = {70_700: 0.770, 27_200: 0.764, 16_800: 0.7565}
MULTIPLIERS = [0.25, 0.375, 0.5, 0.75, 1]
#: Corner of the hypervolume: accuracy, and bops of jsc-mlp in float.
CORNER = (0.5, math.log10(4_652_832))

#: The Linear layers of jsc-mlp, and of the same with batch norms, which trains better.
PLAIN = tuple(f"seq_blocks_{i}" for i in (0, 2, 4, 6))
NORMED = ("_0", "_3", "_6", "_9")

Row = dict[str, object]


def widths(multipliers: list[float]) -> dict[str, Any]:
    return {"seed": {"default": {"config": {"name": "output_only", "channel_multiplier": multipliers}}}}


def bits(formats: Sequence[tuple[list[int], list[int]]], sites: Sequence[str] = PLAIN) -> dict[str, Any]:
    """The space of formats; of each layer (bits of its input, bits of its weights)."""
    seeds = {}
    for i, (site, (data, weight)) in enumerate(zip(sites, formats, strict=True)):
        config = {
            "name": "integer",
            "data_in_width": data,
            "data_in_frac_width": "auto",
            "weight_width": weight,
            "weight_frac_width": "auto",
            "bias_width": 8,
            "bias_frac_width": "auto",
        }
        # What comes out of a ReLU is not negative: its format needs no sign.
        seeds[site] = {"config": {**config, **({"data_in_signed": False} if i else {})}}
    return {"seed": seeds}


def joint(
    multipliers: list[float], formats: Sequence[tuple[list[int], list[int]]], sites: Sequence[str] = PLAIN
) -> dict[str, Any]:
    return {"name": "joint", "widths": widths(multipliers), "quantize": bits(formats, sites)}


ALL = [([4, 6, 8], [2, 3, 4, 6, 8])] * 4
SPACES: Mapping[str, Mapping[str, Any]] = {
    "joint": joint(MULTIPLIERS, ALL),
    "bits": bits(ALL),
    "widths": {"name": "channel_size", **widths(MULTIPLIERS)},
    "widths, 8 bits": joint(MULTIPLIERS, [([8], [8])] * 4),
}


def searched(
    model: Any,
    data: Dataset,
    space: Mapping[str, Any],
    cost: str,
    trials: int,
    seed: int,
    folder: Path,
    basic_train: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
    judged: int = 8192,
) -> bf.Run:
    """The run of a search that trains its candidates, and judges them by `judged` samples of the val split."""
    strategy: dict[str, Any] = {
        "name": "evolution",
        "setup": {"n_trials": trials},
        "sw_runner": {"basic_train": dict(basic_train), "basic_evaluation": {"num_samples": judged}},
        "hw_runner": {"bops": {}, "ebops": {"sign_bits": True, "biases": False}},
        "metrics": {"accuracy": {"direction": "maximize"}, cost: {"direction": "minimize"}},
    }
    values = {
        "accelerator": "cpu",
        "seed": seed,
        "batch_size": 512,
        "project_dir": str(folder),
        "search": {"search_space": dict(space), "strategy": strategy, **(more or {})},
    }
    loaded = configuration.from_document(tomlfile.Document("joint.py", values))
    return bf.search(loaded, model=model, data=data)


def in_float(data: Dataset, epochs: int, seed: int, normed: bool) -> Any:
    """jsc-mlp, trained."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = build_model("jsc-mlp", data.sample_shape, data.num_classes, seed)
        if normed:
            layers: list[nn.Module] = []
            for inputs, outputs in itertools.pairwise((16, 64, 32, 32)):
                layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
            model = nn.Sequential(*layers, nn.Linear(32, 5))
    settings = TrainSettings(max_epochs=epochs, batch_size=512, learning_rate=1e-2, seed=seed)
    (member,) = train_population([model], data, settings)
    model.load_state_dict(member.state)
    return model.eval()


def volume(run: bf.Run, cost: str) -> float:
    """Of the front's area, as a share of all there is."""
    metrics = run.columns.metrics
    losses: NDArray[np.float64] = np.stack([-metrics["accuracy"], np.log10(metrics[cost])], axis=1)
    return float(bf.hypervolume(losses, np.array([-CORNER[0], CORNER[1]])))


def fronts(data: Dataset, quick: bool) -> Iterator[tuple[Row, tuple[str, float] | None]]:
    trials, samples, epochs = (4, 512, 1) if quick else (160, 32_768, 3)
    volumes: dict[str, list[float]] = {name: [] for name in SPACES}
    for seed in SEEDS[: 1 if quick else None]:
        model = in_float(data, 1 if quick else 15, seed, False)
        for name, space in SPACES.items():
            with tempfile.TemporaryDirectory() as folder:
                begin = time.perf_counter()
                training = {"max_epochs": epochs, "num_samples": samples, "learning_rate": 2e-3}
                run = searched(model, data, space, "bops", trials, seed, Path(folder), training)
                seconds = time.perf_counter() - begin
                volumes[name].append(volume(run, "bops"))
                best = run.best()
                cheap = [t for t in run.trials if t.metrics["accuracy"] >= run.reference["accuracy"] - 0.01]
                least = min((t.metrics["bops"] for t in cheap), default=math.nan)
                yield (
                    {
                        "part": "fronts",
                        "space": name,
                        "seed": seed,
                        "trials": len(run),
                        "hypervolume": volumes[name][-1],
                        "val before": "",
                        "best val": best.metrics["accuracy"],
                        "test": best.test_metrics["accuracy"],
                        "cost": "" if math.isnan(least) else int(least),
                        "s": seconds,
                    },
                    None,
                )
    for name in list(SPACES)[1:]:
        gains = [a - b for a, b in zip(volumes["joint"], volumes[name], strict=True)]
        key = name.replace(", ", "_").replace(" ", "_")
        yield (
            {
                "part": "fronts",
                "space": f"joint - {name}",
                "seed": "least of all",
                "trials": "",
                "hypervolume": min(gains),
                "val before": "",
                "best val": "",
                "test": "",
                "cost": "",
                "s": "",
            },
            (f"gain_on_{key}", min(gains)),
        )
    yield (
        {
            "part": "fronts",
            "space": "joint",
            "seed": "median",
            "trials": "",
            "hypervolume": statistics.median(volumes["joint"]),
            "val before": "",
            "best val": "",
            "test": "",
            "cost": "",
            "s": "",
        },
        None,
    )


def yardsticks(data: Dataset, quick: bool) -> Iterator[tuple[Row, tuple[str, float] | None]]:
    trials, samples, epochs = (24, 512, 1) if quick else (160, 270_000, 30)
    model = in_float(data, 1 if quick else 25, 0, True)
    training = {"max_epochs": epochs, "num_samples": samples, "learning_rate": 1e-2, "float_epochs": 1 if quick else 15}
    if not quick:
        training["halving"] = {"rungs": [1, 4, 12], "keep": 0.34}
    candidates: list[Row] = []
    for budget in YARDSTICKS:
        # Networks which can be near the budget: a search for the whole front spends most of itself far below.
        large = budget > 50_000
        multipliers = [0.5, 0.75, 1] if large else [0.25, 0.375, 0.5, 0.75]
        weights = [4, 5, 6] if large else [3, 4, 5]
        # The features have long tails: the first layer needs more bits than those behind a batch norm.
        formats = [([8, 9, 10], weights), *[([5, 6] if large else [4, 5, 6], weights)] * 3]
        space = joint(multipliers, formats, NORMED)
        more = {
            "constraints": {"ebops": f"<= {budget}"},
            "finetune": {"trials": 1 if quick else 3, "max_epochs": 1 if quick else 10, "learning_rate": 3e-3},
        }
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            run = searched(model, data, space, "ebops", trials, 0, Path(folder), training, more, len(data.y["val"]))
            row: Row = {"part": "yardsticks", "trials": len(run), "hypervolume": "", "s": time.perf_counter() - begin}
            for trial in run.front:
                before, number = trial.metrics["accuracy"], {"seed": trial.number}
                before_tuning = {"val before": "", "best val": before, "test": trial.test_metrics["accuracy"]}
                cost = {"cost": int(trial.metrics["ebops"])}
                candidates.append({**row, **number, "space": f"<= {budget:,}", **before_tuning, **cost})
                finetuned = run.finetuned.get(trial.number)
                if finetuned is not None and not finetuned.failed:
                    after = {"val before": before, "best val": finetuned.metrics["accuracy"]}
                    after["test"] = finetuned.test["accuracy"]
                    cost = {"cost": int(finetuned.metrics["ebops"] or 0)}
                    candidates.append({**row, **number, "space": f"<= {budget:,}, trained on", **after, **cost})
    for row in candidates:
        yield row, None
    for budget, yardstick in YARDSTICKS.items():
        within = [row for row in candidates if row["cost"] <= budget]  # type: ignore[operator]
        if not within:
            continue
        best = max(within, key=lambda row: row["best val"])  # type: ignore[arg-type, return-value]
        gain = best["test"] - yardstick  # type: ignore[operator]
        yield (
            {
                "part": "yardsticks",
                "space": f"chosen for {budget:,}",
                "seed": best["seed"],
                "trials": "",
                "hypervolume": "",
                "val before": "",
                "best val": best["best val"],
                "test": best["test"],
                "cost": best["cost"],
                "s": "",
            },
            (f"gain_at_{budget}", gain),
        )


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--only", choices=("fronts", "yardsticks"), help="one part of it")
    args = options.parse_args()
    data, what = jets()
    if args.quick:
        few = {split: tuple(t[:1000] for t in data.split(split)) for split in ("train", "val", "test")}
        data = bf.from_splits(few)
    rows: list[Row] = []
    summary: dict[str, float] = {}
    for part in (fronts, yardsticks):
        if args.only in (None, part.__name__):
            for row, promise in part(data, args.quick):
                rows.append(row)
                summary.update([promise] if promise else [])
                print(row, flush=True)
    report("Widths and bits in one search, and its winners trained on", rows, summary, args.json, data=what)


if __name__ == "__main__":
    main()
