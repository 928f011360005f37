"""Layer-wise precision, fine-tuned, against uniform quantization-aware training at the same EBOPs.

For each network (16-h-h-h-5, those of the yardsticks) and each budget: train it in float, search bit-widths layer by
layer with ``evolution`` for accuracy under the constraint ``ebops <= budget``, train the most accurate trials on with
their formats in place (``[search.finetune]``). Among all that came of it within a budget, the one most accurate on the
validation split is chosen; its accuracy on the test split, which decides nothing, is what is reported. The yardsticks
are uniform quantization-aware training of the same networks on the same data, by a plain trainer: one seed, 25 epochs.

EBOPs are those of the metric: Σ non-zero weights · weight bits · input bits, the model's input in the bits of the first
layer's format.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import jets, parser, report
from torch import nn

import bitfront as bf
from bitfront import config as configuration
from bitfront import tomlfile
from bitfront.data.base import Dataset
from bitfront.engine.workbench import one_thread
from bitfront.training import TrainSettings, train

#: EBOPs → test accuracy of uniform quantization-aware training on the re-simulated jets.
YARDSTICKS = {70_700: 0.770, 27_200: 0.764, 16_800: 0.7565}
NETWORKS = ((64, 32, 32), (32, 16, 16), (16, 8, 8))
#: A budget of less than so many bit products per multiplication, or of more, is not tried with that network.
SENSIBLE = (8, 72)


def network(widths: tuple[int, ...]) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((16, *widths)):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 5))


def multiplications(widths: tuple[int, ...]) -> int:
    return sum(a * b for a, b in itertools.pairwise((16, *widths, 5)))


def in_float(widths: tuple[int, ...], data: Dataset, epochs: int, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = network(widths)
    with one_thread():
        settings = TrainSettings(max_epochs=epochs, batch_size=1024, learning_rate=3e-3, seed=seed)
        result = train(model, data, settings)
    model.load_state_dict(result.best_state)
    return model.eval()


def searched(model: nn.Module, data: Dataset, budget: int, seed: int, quick: bool, folder: Path) -> bf.Run:
    own = {
        "name": ["integer"],
        "data_in_width": [4, 5, 6, 7, 8],
        "data_in_frac_width": ["auto"],
        "weight_width": [2, 3, 4, 5, 6],
        "weight_frac_width": ["auto"],
        "bias_width": [8],
        "bias_frac_width": ["auto"],
    }
    # What comes out of a ReLU is not negative: its format needs no sign.
    seeds = {site: own if site == "_0" else {**own, "data_in_signed": [False]} for site in ("_0", "_2", "_4", "_6")}
    values: dict[str, Any] = {
        "accelerator": "cpu",
        "seed": seed,
        "batch_size": 1024,
        "project_dir": str(folder),
        "project": f"seed-{seed}-{budget}-{id(model)}",
        "search": {
            "search_space": {"seed": {site: {"config": config} for site, config in seeds.items()}},
            "strategy": {
                "name": "evolution",
                "setup": {"n_trials": 40 if quick else 600},
                "sw_runner": {"basic_evaluation": {}},
                "hw_runner": {"ebops": {}},
                "metrics": {"accuracy": {"direction": "maximize"}},
            },
            "constraints": {"ebops": f"<= {budget}"},
            "finetune": {
                "trials": 1 if quick else 3,
                "max_epochs": 1 if quick else 20,
                "learning_rate": 3e-3,
            },
        },
    }
    loaded = configuration.from_document(tomlfile.Document("finetune.py", values))
    return bf.search(loaded, model=model, data=data)


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    data, what = jets()
    if args.quick:
        x, y = data.split("train")
        data = bf.from_splits({"train": (x[:2000], y[:2000]), "val": data.split("val"), "test": data.split("test")})
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for widths in NETWORKS:
            model = in_float(widths, data, 1 if args.quick else 25, args.seed)
            for budget in YARDSTICKS:
                if not SENSIBLE[0] <= budget / multiplications(widths) <= SENSIBLE[1]:
                    continue
                begin = time.perf_counter()
                run = searched(model, data, budget, args.seed, args.quick, Path(folder))
                seconds = time.perf_counter() - begin
                for number, tuned in run.finetuned.items():
                    trial = run.trial(number)
                    rows.append(
                        {
                            "network": "-".join(map(str, widths)),
                            "budget": budget,
                            "trial": number,
                            "bits in/weight": " ".join(
                                f"{c['config']['data_in_width']}/{c['config']['weight_width']}"
                                for site, c in trial.config.items()
                                if site.startswith("_")
                            ),
                            "val before": trial.metrics["accuracy"],
                            "val": tuned.metrics["accuracy"],
                            "ebops": int(tuned.metrics["ebops"] or 0),
                            "test": tuned.test["accuracy"],
                            "s": seconds,
                        }
                    )
                    print(rows[-1], flush=True)
    summary: dict[str, float] = {}
    for budget, yardstick in YARDSTICKS.items():
        within = [row for row in rows if row["ebops"] <= budget]  # type: ignore[operator]
        if not within:
            continue
        best = max(within, key=lambda row: row["val"])  # type: ignore[arg-type, return-value]
        summary[f"test_at_{budget}"] = best["test"]  # type: ignore[assignment]
        summary[f"gain_at_{budget}"] = best["test"] - yardstick  # type: ignore[operator]
        summary[f"ebops_at_{budget}"] = float(best["ebops"])  # type: ignore[arg-type]
        best["chosen for"] = budget
    for row in rows:
        row.setdefault("chosen for", "")
    report(
        "Fine-tuned layer-wise candidates against uniform quantization-aware training",
        rows,
        summary,
        args.json,
        data=what,
    )


if __name__ == "__main__":
    main()
