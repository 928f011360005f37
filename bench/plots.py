"""From ``bench/results/*.json`` to the tables, pictures and verdicts of ``docs/benchmarks.md``.

``PAGES`` names the benchmarks that are on another page. Whatever stands between ``<!-- begin:NAME -->`` and
``<!-- end -->`` is written here: the machine, each target with what was measured and whether it is met, the table, and
a picture in ``docs/benchmarks/``. The prose around it is typed by hand and holds no number. A benchmark without
results keeps what the page says about it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from common import ROOT, cell, table

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
#: Benchmarks with a separate page.
PAGES: Mapping[str, Path] = {"strategies": ROOT / "docs" / "strategies.md", "fpga": ROOT / "docs" / "metrics.md"}
#: Benchmarks whose rows are several tables → the column that says which table; it is left out.
SPLIT = {"strategies": "situation", "rivals": "table", "luts": "table", "granularity": "network", "zoo": "table"}
#: Benchmarks of which only some rows are in the table → how the column ``what`` of the others begins.
DRAWN_ONLY: Mapping[str, str | tuple[str, ...]] = {
    "granularity": "front of ",
    "fpga": ("layers", "learned", "small"),
}
PICTURES = ROOT / "docs" / "benchmarks"

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """A promise about one number of a summary. `at_most` or else at least."""

    key: str
    value: float
    unit: str
    meaning: str
    at_most: bool = False

    def met(self, measured: float) -> bool:
        return measured <= self.value if self.at_most else measured >= self.value

    @property
    def text(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {cell(self.value)} {self.unit}"


TARGETS: Mapping[str, Sequence[Target]] = {
    "microcontroller": (
        Target("samples_that_differ", 0, "samples", "differ from the searched network", at_most=True),
        Target("slowest_seconds", 300, "s", "search and export of the slowest network", at_most=True),
        Target("cycle_model_error_largest", 0.3, "", "largest error of the model of cycles", at_most=True),
    ),
    "trial_cost": (
        Target("ms_per_candidate_512", 0.008, "ms", "a candidate of jsc-mlp, 512 samples", at_most=True),
        Target("vs_plain_512", 30, "times", "faster than the plain loop, 512 samples"),
        Target("vs_dataloader_512", 1000, "times", "faster than the loop with a DataLoader, 512 samples"),
        Target("vs_plain_16384", 5, "times", "faster than the plain loop, 16,384 samples"),
        Target("max_accuracy_difference", 1e-6, "", "difference of accuracy to the plain loop", at_most=True),
    ),
    "roofline": (
        *(
            Target(f"{model}_{form}_nsga_ii_forwards", most, "forwards", f"genetic search, {name}, {form}", True)
            for model, name, most in (
                ("digits_cnn", "digits-cnn", 1.0),
                ("resnet_20", "ResNet-20", 1.0),
                ("mobilenet", "MobileNetV2", 1.0),
                ("ds_cnn", "DS-CNN", 1.0),
                ("vit_tiny", "ViT-Tiny", 1.3),
                ("bert_tiny", "BERT-tiny, not traced", 1.3),
            )
            for form in ("integer", "affine")
        ),
        Target("brute_force_forwards", 0.1, "forwards", "a candidate of brute force, the worst case", at_most=True),
        Target("max_difference", 1e-6, "", "difference of loss or accuracy to candidates run whole", at_most=True),
    ),
    "deploy": tuple(
        Target(f"{name}_differing", 0, "", f"samples with another number, target {name}", at_most=True)
        for name in ("c", "onnx")
    ),
    "zoo": (
        Target("least_share", 0.95, "", "weights and multiply-accumulates that can be quantized, the least"),
        Target("float_exported", 23, "", "networks of 23 that are written as ONNX in float, and run"),
        Target("int8_exported", 23, "", "networks of 23 that are written as ONNX in int8 formats, and run"),
    ),
    "big": (
        Target("ResNet-50_peak_MB", 8000, "MB", "peak of a search of ResNet-50 at 224 × 224", at_most=True),
        Target("transformer_peak_MB", 8000, "MB", "peak of a search of a transformer, 100 million parameters", True),
        Target("largest_time_factor", 2, "times", "between the expected and the measured time", at_most=True),
    ),
    "formats": (
        *(
            Target(f"{name}_512", 3, "times", f"a candidate in {name} against one in fixed point", at_most=True)
            for name in ("affine", "minifloat_ieee", "minifloat_denorm", "mx", "block_fp", "log")
        ),
        Target("differing_candidates", 0, "", "candidates that differ from the deployed model", at_most=True),
    ),
    "int8": (
        *(
            target
            for name, network in (("digits_cnn", "digits-cnn"), ("resnet_8", "ResNet-8"))
            for target in (
                Target(f"{name}_below_float", 0.3, "points", f"int8 below float, {network}", at_most=True),
                Target(f"{name}_above_onnxruntime", 0, "points", f"int8 above ONNX Runtime's, {network}"),
            )
        ),
        Target("differing_networks", 0, "", "networks that differ from the deployed model", at_most=True),
    ),
    "runtime": tuple(
        target
        for name, network in (("resnet_18", "ResNet-18"), ("mobilenetv2", "MobileNetV2"))
        for target in (
            Target(f"{name}_fused", 0.9, "of all", f"fused convolutions, {network}"),
            Target(f"{name}_time_over_onnxruntime", 1.05, "times", f"time over ORT's, {network}", at_most=True),
            Target(f"{name}_time_over_float", 1, "times", f"time over float, {network}", at_most=True),
        )
    ),
    "learned_bits": (
        Target("quick_volume", 0.137, "", "hypervolume of examples/jsc_learned.toml, least of 3 seeds"),
        Target("quick_volume_1645", 0.125, "", "the same, of networks of at least 1,645 EBOPs"),
        Target("quick_cpu_s", 60, "s", "processor time of the whole command", at_most=True),
        Target("thorough_volume", 0.142, "", "hypervolume with four members and teachers, least of 3 seeds"),
        Target("thorough_volume_1645", 0.129, "", "the same, of networks of at least 1,645 EBOPs"),
        Target("thorough_cpu_s", 240, "s", "processor time of the whole command", at_most=True),
        Target("thorough_above_hgq2", 9, "of 9", "points of HGQ2's front that it is above"),
    ),
    "networks": (
        Target("least_share", 0.95, "", "surrogate: hypervolume within 5 points of float after 150 evaluations, least"),
        Target("most_bits", 1.1, "times", "bits at most 1 % worse after 120, over the fewest known", at_most=True),
    ),
    "rivals": (
        *(
            Target(f"{name}_{check}", 0, "", f"{meaning}, {rival}", at_most=True)
            for name, rival in (("hgq2", "HGQ2"), ("pquantml", "PQuantML"))
            for check, meaning in (
                ("differing_outputs", "outputs that differ from those in whole numbers"),
                ("difference_of_counts", "difference of the bits of all quantizers to those it logs"),
            )
        ),
        *(
            Target(f"{recipe}_{check}", 0, "", f"difference of {what} to the run, Bitfront, {recipe}", at_most=True)
            for recipe in ("quick", "thorough")
            for check, what in (("difference_of_counts", "EBOPs"), ("difference_of_accuracy", "test accuracy"))
        ),
        *(
            Target(f"thorough_above_hgq2{suffix}", 100, "%", f"networks of HGQ2 that thorough is above, {how}")
            for suffix, how in (
                ("", "by the default count"),
                ("_signs", "with signs"),
                ("_span", "by the span of set bits"),
                ("_signs_span", "by both"),
            )
        ),
    ),
    "luts": tuple(
        Target(f"{name}_differing", 0, "", f"outputs that differ from those in whole numbers, {who}", at_most=True)
        for name, who in (("bitfront", "Bitfront"), ("hgq2", "HGQ2"), ("pquantml", "PQuantML"))
    ),
    "calibration": (
        Target("minmax_setup", 3, "forwards", "set-up of ResNet-18 less 1 s, five widths, minmax", at_most=True),
        Target("mse_setup", 3, "forwards", "the same, ranges of least squared error", at_most=True),
        Target("mse_width", 5, "forwards", "calibration of one more weight width, mse", at_most=True),
    ),
    "granularity": (
        *(
            Target(f"{key}_element_{split}", 0, "points", f"{network}: per element above per layer by search, {split}")
            for key, network in (
                ("jets", "jets"),
                ("digits", "digits-cnn"),
                ("convolutions", "MNIST-10k, convolutions"),
                ("residual", "MNIST-10k, residual"),
                ("depthwise", "MNIST-10k, depthwise"),
            )
            for split in ("val", "test")
        ),
        *(
            Target(
                f"{key}_element_unreached", 0, "points", f"{key}: points of the search cheaper than all of them", True
            )
            for key in ("jets", "digits", "convolutions", "residual", "depthwise")
        ),
        Target(
            "differing_networks", 0, "", "networks that differ from their evaluation in whole numbers", at_most=True
        ),
    ),
    "scaling": (
        Target("target_seconds", 15, "s", "810,000 candidates of jsc-mlp on 2,000 samples, all included", at_most=True),
        Target("cost_ratio", 1.0, "times", "a candidate among 10⁶ against one among 10⁴", at_most=True),
        Target("memory_ratio", 1.25, "times", "peak memory with 10⁶ candidates against 10⁴", at_most=True),
        Target("same_front_after_kill", 1, "", "10⁶ candidates, killed half-way and resumed: the same front"),
    ),
    "cluster": (
        Target("workers_fed_at_1_s", 256, "workers", "candidates of a second: so many workers at 0.8 efficiency"),
    ),
    "overhead": (
        Target("command_seconds", 4, "s", "the whole command, 18 candidates", at_most=True),
        Target("search_seconds", 0.1, "s", "of which the search", at_most=True),
        Target("durable_trial_alone_ms", 3, "ms", "a durable trial, stored alone", at_most=True),
        Target("durable_trial_batched_ms", 0.2, "ms", "a durable trial, in blocks of 1,024", at_most=True),
        Target("brute_force_proposal_ms", 0.01, "ms", "a proposal of brute force", at_most=True),
        Target("analytic_million_seconds", 1, "s", "bits, bit operations and bytes of 10⁶ candidates", at_most=True),
    ),
    "joint": (
        Target("gain_on_bits", 0, "", "hypervolume of the joint search minus that of bits alone, least of 3 seeds"),
        Target("gain_on_widths", 0, "", "the same, minus that of widths alone"),
        Target("gain_on_widths_8_bits", 0, "", "the same, minus that of widths at 8 bits"),
        *(
            Target(f"gain_at_{budget}", 0, "", f"test accuracy within {budget:,} EBOPs minus {yardstick}")
            for budget, yardstick in ((70_700, "0.770"), (27_200, "0.764"), (16_800, "0.7565"))
        ),
    ),
    "samplers": (
        Target("evolution_30_at_3000_ms", 0.1, "ms", "a proposal of evolution, 30 parameters, 3,000 trials", True),
        Target("brute_force_60_ms", 0.01, "ms", "a proposal of brute force, 60 parameters", at_most=True),
        *(
            Target(
                f"{space}_{budget}_uniform_gain",
                0,
                "",
                f"hypervolume of evolution minus the better of TPE and NSGA-II, {space}, {budget} evaluations",
            )
            for space in ("jsc-toy", "digits-mlp", "jsc-mlp")
            for budget in (100, 200, 400)
        ),
        Target("evolution_batch_speedup", 5, "times", "evolution in generations against one by one"),
        Target("nsgaii_batch_speedup", 5, "times", "Optuna's NSGA-II in generations against one by one"),
        Target("tpe_batch_speedup", 5, "times", "Optuna's TPE in batches against one by one"),
    ),
    "fpga": (
        Target("layers_lut_apart_least", -0.05, "", "lut beside the whole network's, formats per layer, least"),
        Target("layers_lut_apart_most", 0.05, "", "the same, most", at_most=True),
        Target("learned_lut_apart_least", -0.05, "", "lut beside the whole network's, learned bits, least"),
        Target("learned_lut_apart_most", 0.05, "", "the same, most", at_most=True),
        Target("layers_spearman_adder_bits", 0.95, "", "rank correlation of adder_bits, formats per layer"),
        Target("learned_spearman_adder_bits", 0.95, "", "the same, learned bits"),
        Target("layers_new_layer_s", 1, "s", "a layer that is new", at_most=True),
        Target("layers_known_candidate_ms", 1, "ms", "a candidate whose layers are known", at_most=True),
    ),
    "population": (
        Target("speedup_32", 2.5, "times", "32 candidates trained together against one by one, batches of 1,024"),
        Target("max_val_loss_difference", 0.01, "", "difference of val loss to training alone", at_most=True),
    ),
}


# -- pictures


def draw_trial_cost(axes: Axes, result: Result) -> None:
    rows = result["rows"]
    groups = list(dict.fromkeys((r["model"], r["samples"]) for r in rows))
    loops = ["bitfront", "plain", "dataloader, 0 workers", "dataloader, 2 workers"]
    for i, loop in enumerate(loops):
        of_loop = [
            next(r for r in rows if (r["model"], r["samples"]) == g and r["loop"].startswith(loop)) for g in groups
        ]
        places = [g + (i - 1.5) * 0.2 for g in range(len(groups))]
        bars = axes.bar(places, [r["ms/candidate"] for r in of_loop], 0.19, label=loop)
        axes.bar_label(bars, [cell(r["ms/candidate"]) for r in of_loop], fontsize=7)
    axes.set_xticks(range(len(groups)), [f"{m}, {n:,} samples" for m, n in groups])
    axes.set_ylabel("time per candidate, ms")
    axes.set_yscale("log")
    axes.plot([-0.5, 0.5], [0.008, 0.008], "k--", linewidth=1, label="target for bitfront")
    axes.set_ylim(top=2e4)  # room for the legend


def draw_roofline(axes: Axes, result: Result) -> None:
    rows = [r for r in result["rows"] if r["candidates"]]
    models = list(dict.fromkeys(r["model"] for r in rows))
    kinds = list(dict.fromkeys((r["what"], r["format"]) for r in rows))
    for i, (what, form) in enumerate(kinds):
        bars_of = [r for r in rows if (r["what"], r["format"]) == (what, form)]
        places = [models.index(r["model"]) + (i - (len(kinds) - 1) / 2) * 0.2 for r in bars_of]
        bars = axes.bar(places, [r["float forwards"] for r in bars_of], 0.19, label=f"{what}, {form}")
        axes.bar_label(bars, [cell(r["float forwards"]) for r in bars_of], fontsize=7, rotation=90, padding=2)
    axes.axhline(1.0, color="k", linestyle="--", linewidth=1, label="a float forward")
    axes.set_xticks(range(len(models)), models)
    axes.set_ylabel("time per candidate, float forward passes")


def draw_fpga(axes: Axes, result: Result) -> None:
    for i, family in enumerate(("layers", "learned", "small")):
        rows = [r for r in result["rows"] if r["what"].removeprefix("synthesized, ").startswith(family)]
        whole = [r["whole lut"] for r in rows]
        axes.plot(whole, [r["lut"] for r in rows], "o", markersize=3, color=f"C{i}", label=f"{family}: lut")
        axes.plot(whole, [r["adder_bits"] for r in rows], "x", markersize=4, color=f"C{i}", label="adder_bits")
        synthesized = [r for r in rows if r["yosys lut"] is not None]
        if synthesized:
            places = [[r[key] for r in synthesized] for key in ("whole lut", "yosys lut")]
            axes.plot(*places, "^", markersize=5, color=f"C{i}", fillstyle="none", label="yosys")
    axes.axline((1e3, 1e3), (1e4, 1e4), color="k", linestyle="--", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="LUT of the whole network, by alkaid", ylabel="LUT, or bits")
    axes.legend(fontsize=7, ncols=3)


def draw_scaling(axes: Axes, result: Result) -> None:
    rows = [r for r in result["rows"] if r["what"] == "candidates"]
    counts = [r["candidates"] for r in rows]
    axes.plot(counts, [r["us each"] for r in rows], "o-", color="C0", label="time per candidate, µs")
    axes.plot(counts, [r["loop us"] for r in rows], "s--", color="C0", label="of which loop and store, µs")
    axes.set(xscale="log", yscale="log", xlabel="candidates of jsc-mlp, 2,000 samples", ylabel="µs per candidate")
    memory = axes.twinx()
    memory.plot(counts, [r["peak MB"] for r in rows], "^:", color="C1", label="peak memory, MB (right)")
    memory.set_ylabel("MB")
    memory.set_ylim(0, 1.3 * max(r["peak MB"] for r in rows))
    lines = [*axes.get_lines(), *memory.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], fontsize=8, loc="center right")


def draw_cluster(axes: Axes, result: Result) -> None:
    rows = result["rows"]
    for i, ms in enumerate(dict.fromkeys(r["ms"] for r in rows)):
        points = [r for r in rows if r["ms"] == ms]
        text = f"{ms:g} ms" if ms < 1000 else f"{ms / 1000:g} s"
        axes.plot([r["workers"] for r in points], [r["efficiency"] for r in points], "o-", color=f"C{i}", label=text)
    axes.set(xscale="log", xlabel="workers (simulated)", ylabel="efficiency", ylim=(0, 1.05))
    workers = sorted({r["workers"] for r in rows})
    axes.set_xticks(workers, [f"{w:,}" for w in workers])
    axes.minorticks_off()
    axes.legend(title="a candidate takes", fontsize=8)


def draw_samplers(axes: Axes, result: Result) -> None:
    wanted = [r for r in result["rows"] if r["measure"].startswith("hypervolume at") and "uniform" in r["measure"]]
    problems = list(dict.fromkeys(r["space"] for r in wanted))
    strategies = list(dict.fromkeys(r["strategy"] for r in wanted))
    for i, strategy in enumerate(strategies):
        for p, problem in enumerate(problems):
            points = [r for r in wanted if r["strategy"] == strategy and r["space"] == problem]
            budgets = [int(r["measure"].split()[2].rstrip(",")) for r in points]
            places = [p + 0.2 * b / max(budgets) * 3 + 0.03 * i for b in budgets]
            values = [r["median"] for r in points]
            spread = [[r["median"] - r["least"] for r in points], [r["most"] - r["median"] for r in points]]
            label = strategy if not p else None
            axes.errorbar(places, values, yerr=spread, fmt="o-", color=f"C{i}", capsize=2, markersize=4, label=label)
    axes.set_xticks([p + 0.3 for p in range(len(problems))], [f"{p} candidates" for p in problems])
    axes.set_xlabel("each with 100, 200 and 400 evaluations; median of five seeds, bars from the least to the most")
    axes.set_ylabel("part of the exact hypervolume")


def draw_rivals(axes: Axes, result: Result) -> None:
    """The networks that were tested, a line per training."""
    _draw_tested(axes, result, "EBOPs", "EBOPs, counted alike")


def draw_luts(axes: Axes, result: Result) -> None:
    """The same, by look-up tables."""
    _draw_tested(axes, result, "luts", "look-up tables, estimated by alkaid")


def _draw_tested(axes: Axes, result: Result, cost: str, label: str) -> None:
    rows = [r for r in result["rows"] if r["table"] == "networks" and r["test"] != ""]
    names = list(dict.fromkeys(r["who"] for r in rows))
    for who, seed in dict.fromkeys((r["who"], r["seed"]) for r in rows):
        chosen = [r for r in rows if (r["who"], r["seed"]) == (who, seed)]
        costs, tests = [r[cost] for r in chosen], [float(r["test"]) for r in chosen]
        of_line = who if seed == min(r["seed"] for r in rows if r["who"] == who) else None
        axes.plot(costs, tests, "o-", color=f"C{names.index(who)}", markersize=3, linewidth=0.8, label=of_line)
    axes.set(xscale="log", xlabel=label, ylabel="accuracy on test, %", ylim=(74, 78))
    axes.minorticks_off()
    axes.set_xticks([1000, 2000, 5000, 10_000, 20_000, 50_000], ["1k", "2k", "5k", "10k", "20k", "50k"])


def draw_joint(axes: Axes, result: Result) -> None:
    """Hypervolume of each space, a point per seed."""
    rows = [r for r in result["rows"] if r["part"] == "fronts" and isinstance(r["seed"], int)]
    spaces = list(dict.fromkeys(r["space"] for r in rows))
    for seed in dict.fromkeys(r["seed"] for r in rows):
        of_seed = [r for r in rows if r["seed"] == seed]
        axes.plot(
            [spaces.index(r["space"]) for r in of_seed], [r["hypervolume"] for r in of_seed], "o", label=f"seed {seed}"
        )
    axes.set_xticks(range(len(spaces)), spaces)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("hypervolume: accuracy, log10 bops")


def draw_granularity(figure: Figure, result: Result) -> None:
    """Per network the fronts as steps: test accuracy against EBOPs, from where evolution's begins."""
    rows = [r for r in result["rows"] if r["what"].startswith(DRAWN_ONLY["granularity"])]
    networks = list(dict.fromkeys(r["network"] for r in rows))
    ways = list(dict.fromkeys(r["what"].removeprefix(DRAWN_ONLY["granularity"]) for r in rows))
    panels = figure.subplots(2, math.ceil(len(networks) / 2), squeeze=False).flatten()
    for axes, network in zip(panels, networks, strict=False):
        for way in ways:
            points = [(r["EBOPs"], float(r[way])) for r in rows if r["network"] == network and r[way] != ""]
            name = "per layer, by search" if way == "evolution" else f"per {way}, learned"
            axes.plot(*zip(*points, strict=True), ".-", drawstyle="steps-post", linewidth=1, label=name)
        # Networks that lost a whole layer are far below and to the left of all others.
        accuracies = [float(r["evolution"]) for r in rows if r["network"] == network and r["evolution"] != ""]
        costs = [r["EBOPs"] for r in rows if r["network"] == network and r["evolution"] + r["element"] != ""]
        axes.set(xscale="log", title=network, ylim=(min(accuracies) - 1, None), xlim=(0.7 * min(costs), None))
        axes.grid(alpha=0.3)
    for axes in panels[len(networks) :]:
        axes.axis("off")
    figure.supxlabel("EBOPs")
    figure.supylabel("accuracy on test, %")
    last = panels[-1] if len(panels) > len(networks) else panels[0]
    last.legend(*panels[0].get_legend_handles_labels(), loc="center" if last is not panels[0] else "lower right")


def draw_summary(name: str) -> Callable[[Axes, Result], None]:
    """The picture of a benchmark for which nothing else is drawn: each promised number as a share of its target."""

    def draw(axes: Axes, result: Result) -> None:
        targets = [t for t in TARGETS[name] if t.key in result["summary"] and t.value]
        shares = [result["summary"][t.key] / t.value for t in targets]
        bars = axes.barh([t.key for t in targets], shares)
        axes.bar_label(bars, [f"{cell(result['summary'][t.key])} {t.unit} ({t.text})" for t in targets], fontsize=8)
        axes.axvline(1, color="k", linestyle="--", linewidth=1, label="target")
        axes.set_xlabel("measured / target")

    return draw


DRAWN: Mapping[str, Callable[[Axes, Result], None]] = {
    "trial_cost": draw_trial_cost,
    "roofline": draw_roofline,
    "scaling": draw_scaling,
    "cluster": draw_cluster,
    "samplers": draw_samplers,
    "joint": draw_joint,
    "rivals": draw_rivals,
    "luts": draw_luts,
    "fpga": draw_fpga,
}
#: Pictures with several pairs of axes.
PANELS: Mapping[str, Callable[[Figure, Result], None]] = {"granularity": draw_granularity}


def draw_one(name: str, figure: Figure, draw: Callable[[Axes, Result], None], result: Result) -> None:
    """A picture with one pair of axes."""
    axes = figure.subplots()
    draw(axes, result)
    axes.grid(axis="x" if name not in DRAWN else "y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.margins(y=0.12)
    if axes.get_legend() is None:
        axes.legend(fontsize=8)


def picture(name: str, result: Result) -> Path | None:
    """Draws ``docs/benchmarks/NAME.svg``; nothing where there is no function for it and no target."""
    draw = DRAWN.get(name) or (draw_summary(name) if TARGETS.get(name) else None)
    if draw is None:
        return None
    figure = plt.figure(figsize=(10, 6) if name in PANELS else (8, 4), layout="constrained")
    if name in PANELS:
        PANELS[name](figure, result)
    else:
        draw_one(name, figure, draw, result)
    PICTURES.mkdir(exist_ok=True)
    file = PICTURES / f"{name}.svg"
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
    return file


# -- the page


def region(name: str, result: Result) -> str:
    """What the page says about one benchmark."""
    machine, summary = result["machine"], result["summary"]
    parts = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; Python {machine['python']}, "
        f"torch {machine['torch']}, NumPy {machine['numpy']}, Bitfront {machine['bitfront']} "
        f"({machine.get('commit', 'unknown')}, source {machine.get('source', 'unknown')}), "
        f"{machine['compiler']}; load {machine['load_at_start']} at the start."
    ]
    if machine.get("source_changed"):
        parts.append("**Bitfront's source changed during this run: measure again.**")
    if machine.get("data"):
        parts.append(f"Data: {machine['data']}.")
    verdicts = []
    for target in TARGETS.get(name, ()):
        measured = summary.get(target.key)
        verdict = "not measured" if measured is None else "met" if target.met(measured) else "**missed**"
        verdicts.append({"what": target.meaning, "target": target.text, "measured": cell(measured), "verdict": verdict})
    if verdicts:
        parts.append(table(verdicts, markdown=True))
    file = picture(name, result)
    if file is not None:
        parts.append(f"![{name}]({file.parent.name}/{file.name})")
    rows = result["rows"]
    if name in DRAWN_ONLY:
        rows = [row for row in rows if not row["what"].startswith(DRAWN_ONLY[name])]
    parts += split(rows, SPLIT[name]) if name in SPLIT else [table(rows, markdown=True)]
    return "\n\n".join(parts)


def split(rows: Sequence[Mapping[str, Any]], column: str) -> list[str]:
    """A heading, a table and, where there are any, pictures for each value of a column; without empty columns."""
    parts: list[str] = []
    for which in dict.fromkeys(row[column] for row in rows):
        chosen = [row for row in rows if row[column] == which]
        filled = [c for c in chosen[0] if c != column and any(row[c] != "" for row in chosen)]
        parts += [f"**{which}**", table([{c: row[c] for c in filled} for row in chosen], markdown=True)]
        folder = ROOT / "docs" / "strategies"
        pictures = sorted(folder.glob(f"{which.partition(':')[0]}-*.png"))
        parts += [f"![{p.stem.replace('-', ', ')}]({folder.name}/{p.name})" for p in pictures]
    return parts


def rewritten(page: str, results: Mapping[str, str]) -> str:
    """`page` with the region of each name replaced. Raises KeyError for a name that has no region."""
    for name, text in results.items():
        # No region may reach into the next one, where its end is missing.
        inside = r"(?:(?!<!-- begin:).)*?"
        pattern = re.compile(rf"(<!-- begin:{re.escape(name)} -->\n){inside}(<!-- end -->)", re.S)
        if not pattern.search(page):
            raise KeyError(f"the page has no region <!-- begin:{name} --> ... <!-- end -->")
        page = pattern.sub(lambda m, text=text: f"{m[1]}\n{text}\n\n{m[2]}", page)
    return page


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a target is missed")
    asked = options.parse_args()
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "bitfront", "font.size": 9})
    results = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))}
    if not asked.check:
        for page in (PAGE, *PAGES.values()):
            regions = {n: region(n, r) for n, r in results.items() if PAGES.get(n, PAGE) == page}
            page.write_text(rewritten(page.read_text(encoding="utf-8"), regions), encoding="utf-8")
    missed = 0
    for name, result in results.items():
        for target in TARGETS.get(name, ()):
            measured = result["summary"].get(target.key)
            met = measured is not None and target.met(measured)
            missed += not met
            print(f"{'met   ' if met else 'MISSED'} {name}: {target.meaning}: {cell(measured)}, target {target.text}")
    if asked.check and missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
