"""Which strategy, when? ``bitfront compare`` in five situations, ten seeds each, on jsc-toy, jsc-mlp and the jets.

large      examples/jsc_toy_strategies.toml: 13,824 candidates, all of them known; 400 evaluations per run. An
           evaluation, on 1,024 samples, costs next to nothing.
less       the same runs after their first 25, 50, 100 and 200 evaluations: a smaller budget changes no proposal.
larger     810,000 candidates of jsc-mlp on 2,000 samples, all of them known; 260 evaluations per run
covered    216 candidates, and a budget that covers them all.
trained    729 candidates that are trained before they are evaluated, which makes each of them dear; 150 evaluations.

Evaluations and regrets do not depend on the clock; seconds are of the machine named. Medians and quartiles over seeds.
``pays from``: what an evaluation must cost, in ms, for the strategy to have 95 % of the true hypervolume sooner than
brute force has all of it: seconds of the strategy until then, over the evaluations it saves. ``large_alone_ms``: what
one takes where TPE asks for eight at a time; in a comparison everybody pays what it took in brute force's blocks.

A run that is kept (``--json``, without ``--quick``) also draws the pictures of docs/strategies.md.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from common import ROOT, jets, parser, report

import bitfront as bf
from bitfront import config as configuration
from bitfront import tomlfile
from bitfront.data.base import Dataset
from bitfront.engine.comparison import curves
from bitfront.engine.comparison.results import EXHAUSTIVE, StrategyResult
from bitfront.report import comparison as comparison_report
from bitfront.report import comparison_figures

EXAMPLE = ROOT / "examples" / "jsc_toy_strategies.toml"
PICTURES = ROOT / "docs" / "strategies"
STRATEGIES = (EXHAUSTIVE, "surrogate", "evolution", "optuna:tpe", "optuna:nsgaii", "optuna:random")
EARLIER = (25, 50, 100, 200)
COLUMNS = (
    *("evals to 95 %", "evals to 99 %", "seconds to 95 %", "regret", "shortfall"),
    *("seconds strategy + evaluating", "repeats", "pays from, ms"),
    *(f"after {count}" for count in EARLIER),
)
TRAINED = {"max_epochs": 1, "num_samples": 8192, "batch_size": 256, "learning_rate": 2e-3}

Row = dict[str, object]


def situations(quick: bool) -> Iterator[tuple[str, dict[str, Any], int]]:
    """(name, configuration, budget) of each."""
    large = dict(tomlfile.read(EXAMPLE).values)
    if quick:
        large |= {"max_epochs": 1, "max_steps": 30}
    yield "large", _with(large, [2, 8], [4, 8]) if quick else large, 12 if quick else 400
    yield "larger", _with(_mlp(large), [2, 8], [4, 8]) if quick else _mlp(large), 12 if quick else 260
    yield "covered", _with(large, [2, 4, 8], [8] if quick else [4, 8]), 27 if quick else 216
    trained = _with(large, [2, 8] if quick else [2, 4, 8], [8] if quick else [3, 4, 8])
    runners = trained["search"]["strategy"]["sw_runner"]
    runners["basic_train"] = {**TRAINED, "num_samples": 256} if quick else TRAINED
    yield "trained", trained, 6 if quick else 150


def _mlp(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with a larger network of four layers, and 30 formats for each."""
    changed = _with(values, [2, 3, 4, 5, 6, 8], [3, 4, 5, 6, 8])
    changed["model"] = "jsc-mlp"
    changed["search"]["search_space"]["seed"]["linear"]["config"] |= {"bias_width": [16]}
    changed["search"]["strategy"]["sw_runner"]["basic_evaluation"] = {"num_samples": 2000}
    return changed


def _with(values: Mapping[str, Any], weights: list[int], inputs: list[int]) -> dict[str, Any]:
    """The same with fewer widths to choose from."""
    changed: dict[str, Any] = copy.deepcopy(dict(values))
    changed["search"]["search_space"]["seed"]["linear"]["config"] |= {"weight_width": weights, "data_in_width": inputs}
    return changed


def compared(name: str, values: dict[str, Any], budget: int, data: Dataset, folder: Path, quick: bool) -> bf.Comparison:
    """One comparison, from nothing."""
    config = configuration.from_document(
        tomlfile.Document(EXAMPLE.name, values), {"project": name, "project_dir": str(folder)}
    )
    print(f"{name}:", flush=True)
    events = Said()
    return bf.compare(
        config, data=data, strategies=STRATEGIES, seeds=2 if quick else 10, n_trials=budget, events=events
    )


class Said(bf.Events):
    """Says which strategy is done."""

    def ran(self, strategy: str, runs: int, evaluations: int, seconds: float) -> None:
        print(f"  {strategy}: {runs} runs, {evaluations} evaluations, {seconds:.1f} s in the strategy", flush=True)


def rows_of(title: str, comparison: bf.Comparison) -> Iterator[Row]:
    """The table of a comparison, with what an evaluation must cost."""
    sheet = comparison_report.sheet(comparison)
    for cells, result in zip(sheet.rows, comparison.results, strict=True):
        price = pays_from(comparison, result)
        shown = "" if price is None else comparison_report.spread(curves.spread([price]))
        yield _row(title, [*cells, shown])


def _row(title: str, cells: Sequence[str], **more: str) -> Row:
    """A row with all columns; those that are not given stay empty."""
    columns = ("situation", "strategy", *COLUMNS)
    return {**dict.fromkeys(columns, ""), **dict(zip(columns, (title, *cells), strict=False)), **more}


def pays_from(comparison: bf.Comparison, result: StrategyResult) -> float | None:
    """Milliseconds per evaluation from which a strategy has 95 % before brute force is through; None: it has not."""
    needed = result.evaluations[0]
    if result.strategy == EXHAUSTIVE or not np.isfinite(needed.median):
        return None
    spent = [
        c.asking[int(n) - 1] for c, n in zip(comparison.of(result.strategy), needed.values, strict=True) if n < np.inf
    ]
    return 1000 * statistics.median(spent) / (comparison.size - needed.median)


def earlier(comparison: bf.Comparison) -> Iterator[Row]:
    """Regrets of the same runs after fewer evaluations."""
    for strategy in comparison.strategies:
        regrets = {}
        for count in EARLIER:
            left = [max(0.0, 1.0 - float(c.volume[:count][-1])) for c in comparison.of(strategy)]
            regrets[f"after {count}"] = comparison_report.spread(curves.spread(left))
        yield _row(
            "less: the part of the true hypervolume that is missing after fewer evaluations", [strategy], **regrets
        )


def alone(values: dict[str, Any], budget: int, data: Dataset, folder: Path) -> float:
    """Milliseconds per evaluation where a strategy asks for a few candidates at a time, and nobody shares with it."""
    values = {**values, "project": "alone", "project_dir": str(folder)}
    config = configuration.from_document(tomlfile.Document(EXAMPLE.name, values))
    comparison = bf.compare(config, data=data, strategies=["optuna:tpe"], seeds=1, n_trials=budget)
    return 1000 * float(comparison.runs[0].evaluating.mean())


def draw(name: str, comparison: bf.Comparison) -> None:
    """The picture of a situation, for the page."""
    matplotlib.use("agg")
    PICTURES.mkdir(exist_ok=True)
    drawn = {"courses": comparison_figures.courses(comparison_report.panels(comparison))}
    if name == "large":
        drawn["fronts"] = comparison_figures.fronts(comparison_report.planes(comparison), comparison)
    for kind, figure in drawn.items():
        figure.savefig(PICTURES / f"{name}-{kind}.png", dpi=100, metadata={"Software": None})


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--only", help="one situation, and nothing is written")
    options = arguments.parse_args()
    data, what = jets()
    if options.quick:
        few = {split: tuple(t[:1000] for t in data.split(split)) for split in ("train", "val", "test")}
        data = bf.from_splits(few)
    rows: list[Row] = []
    summary: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, values, budget in situations(options.quick):
            if options.only not in (None, name):
                continue
            comparison = compared(name, values, budget, data, Path(folder), options.quick)
            brute = comparison.of(EXHAUSTIVE)[0]
            each = 1000 * float(brute.evaluating.mean())
            title = f"{name}: {comparison.size:,} candidates, {comparison.budget:,} evaluations, {each:.3g} ms each"
            rows += rows_of(title, comparison)
            if name == "large":
                rows += earlier(comparison)
                summary["large_alone_ms"] = alone(values, budget, data, Path(folder))
            summary[f"{name}_evaluation_ms"] = each
            for result in comparison.results:
                key = f"{name}_{result.strategy.replace('optuna:', '')}"
                if result.regret is not None:
                    summary[f"{key}_regret"] = result.regret.median
                if np.isfinite(result.evaluations[0].median):
                    summary[f"{key}_to_95"] = result.evaluations[0].median
                price = pays_from(comparison, result)
                if price is not None:
                    summary[f"{key}_pays_from_ms"] = price
            if options.json and not options.quick and not options.only:
                draw(name, comparison)
    report("Strategies compared", rows, summary, None if options.only else options.json, data=what)


if __name__ == "__main__":
    main()
