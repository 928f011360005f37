"""How well the costs on an FPGA hold: layers against the whole, a proxy against the tool, the tool against yosys.

``jsc-mlp`` (16-64-32-32-5), trained for a short time. Two families of candidates: random formats per layer (inputs 4 to
8 bits, weights 2 to 8, learned binary points), and the networks of a training with learned bits. Of each

- ``lut`` and ``adder_depth`` are measured as a search does, layer by layer;
- the network is laid out as a whole by the same tool, alkaid, which is what an export does;
- ``adder_bits`` and ``ebops`` are measured, which need no tool; how they rank the candidates is compared with the whole
  network's look-up tables (Spearman).

The time of a new layer is that of a candidate of which nothing is known, divided by four; the time of a known candidate
is that of the second measurement. Both are medians, on one thread.

yosys, where it is installed, synthesizes networks of the learned front of at most ``LARGEST`` look-up tables, spread
over their sizes, and the smallest ones of a third family, 16-16-5 with random formats per layer (``synth_xilinx -family
xcup -nodsp -flatten``), without registers. Its look-up tables are counted as they are, LUT1 to LUT6; it is not Vivado,
and no placement follows. ``yosys s`` is its wall time; where it takes more than ``PATIENCE`` seconds it is stopped, and
the network has no figure.

Needs alkaid: ``pip install 'bitfront[fpga]'``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import jets, make_job, parser, report, trained
from scipy.stats import spearmanr
from torch import nn

import bitfront as bf
from bitfront import config as configuration
from bitfront import tomlfile
from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.engine.rebuild import candidate_of
from bitfront.errors import require
from bitfront.exporters import circuit, fabric
from bitfront.exporters.lowering import lowered
from bitfront.metrics.configured import configured_runner
from bitfront.models.base import build_model

CANDIDATES, NETWORKS, SMALL = 24, 40, 6
#: Of each family: networks that yosys gets at most, the look-up tables that they have at most, and seconds of each.
SYNTHESIZED, LARGEST, PATIENCE = 6, 9000, 240
FORMATS = {
    "name": ["integer"],
    "data_in_width": [4, 5, 6, 7, 8],
    "data_in_frac_width": ["auto"],
    "weight_width": [2, 3, 4, 6, 8],
    "weight_frac_width": ["auto"],
    "bias_width": [8],
    "bias_frac_width": ["auto"],
}
METRICS = ("lut", "adder_bits", "ebops")
TEXTS = ("what", "yosys s")


def laid_out(evaluator: FixedEvaluator, code: Any) -> Any:
    """The logic of a whole candidate, as the target rtl has it."""
    return circuit.laid_out(lowered(evaluator.space.graph, evaluator.formats(code)))


def by_yosys(logic: Any) -> int | None:
    """Look-up tables after yosys' synthesis; None where it takes too long."""
    rtl = require("alkaid.codegen", "fpga", "Verilog")
    with tempfile.TemporaryDirectory() as folder:
        rtl.RTLModel(logic, folder, "model", flavor="verilog").write()
        files = [*Path(folder, "src").glob("*.v"), *Path(folder, "src/static").glob("*.v")]
        read = f"read_verilog -sv {' '.join(str(f) for f in files if f.name != 'lookup_table.v')}"
        command = f"{read}; synth_xilinx -family xcup -nodsp -flatten -top model; stat"
        try:
            done = subprocess.run(
                ["yosys", "-p", command], capture_output=True, text=True, check=True, timeout=PATIENCE
            )
        except subprocess.TimeoutExpired:
            return None
    counts = re.findall(r"^\s+LUT[1-6]\s+(\d+)$", done.stdout.rpartition("Number of cells")[2], re.M)
    return sum(map(int, counts))


def searched(quick: bool, model: Any, data: Any, folder: str) -> bf.Run:
    """A short training with learned bits."""
    setup = {"cycles": 1 if quick else NETWORKS // 4, "networks": 3 if quick else 4, "members": 1}
    strategy = {
        "name": "learned_bits",
        "setup": setup,
        "sw_runner": {"basic_evaluation": {}},
        "hw_runner": {"ebops": {}},
        "metrics": {"accuracy": {"direction": "maximize"}, "ebops": {"direction": "minimize"}},
    }
    values = {"project": "fpga", "project_dir": folder, "seed": 0, "search": {"strategy": strategy}}
    return bf.search(configuration.from_document(tomlfile.Document("fpga.py", values)), model=model, data=data)


@dataclass(frozen=True)
class Network:
    """A candidate: its evaluator, its code, and whether yosys may get it."""

    evaluator: FixedEvaluator
    code: Any
    chosen: bool = True


def per_layer(number: int, model: Any, data: Any) -> Iterator[Network]:
    x, y = data.split("val")
    evaluator = FixedEvaluator(make_job(model, x[:2000], y[:2000], {"linear": FORMATS}))
    for code in evaluator.space.sample(number, np.random.default_rng(0)):
        yield Network(evaluator, code)


def learned(quick: bool, model: Any, data: Any) -> Iterator[Network]:
    with tempfile.TemporaryDirectory() as folder:
        run = searched(quick, model, data, folder)
        front = {trial.number for trial in run.front}
        for trial in run.trials:
            candidate = candidate_of(run.folder, trial.number, data=data, model=model)
            assert isinstance(candidate.evaluator, FixedEvaluator)
            yield Network(candidate.evaluator, candidate.code, trial.number in front)


def measured(family: str, networks: Iterator[Network], synthesized: int) -> list[dict[str, Any]]:
    """A row per candidate; so many are synthesized."""
    rows = []
    for number, network in enumerate(networks):
        row: dict[str, Any] = {"what": f"{family} {number}"}
        for name in METRICS:
            runner = configured_runner(name).make()
            begin = time.perf_counter()
            values = {m: float(v[0]) for m, v in runner.measure(network.evaluator, network.code[None]).items()}
            row |= values
            if name == "lut":
                row["new s"] = time.perf_counter() - begin
                begin = time.perf_counter()
                runner.measure(network.evaluator, network.code[None])
                row["known ms"] = (time.perf_counter() - begin) * 1e3
        row["logic"] = laid_out(network.evaluator, network.code)
        cost = fabric.cost_of(row["logic"])
        row |= {"whole lut": cost.luts, "whole depth": cost.levels, "yosys lut": None, "yosys s": ""}
        rows.append(row | {"chosen": network.chosen and 0 < cost.luts <= LARGEST})
    sizes = {row["what"]: row["whole lut"] for row in rows if row["chosen"]}
    ends = (
        np.geomspace(min(sizes.values()), max(sizes.values()), synthesized) if sizes and shutil.which("yosys") else ()
    )
    nearest = {min(sizes, key=lambda what: abs(np.log(sizes[what] / end))) for end in ends}
    for row in [row for row in rows if row["what"] in nearest]:
        begin = time.perf_counter()
        row["yosys lut"] = by_yosys(row["logic"])
        seconds = time.perf_counter() - begin
        row["yosys s"] = f"{seconds:.0f}" if row["yosys lut"] is not None else f"stopped after {PATIENCE}"
        row["what"] = f"synthesized, {row['what']}"
    return [{k: v for k, v in row.items() if k not in ("logic", "chosen")} for row in rows]


def summary_of(rows: list[dict[str, Any]], prefix: str) -> dict[str, float]:
    column = {k: np.array([row[k] for row in rows], dtype=float) for k in rows[0] if k not in TEXTS}
    apart = column["lut"] / column["whole lut"] - 1
    deeper = column["adder_depth"] / column["whole depth"] - 1
    beside = column["yosys lut"] / column["whole lut"]
    summary = {
        "lut_apart_least": float(apart.min()),
        "lut_apart_most": float(apart.max()),
        "depth_apart_least": float(deeper.min()),
        "depth_apart_most": float(deeper.max()),
        "new_layer_s": float(np.median(column["new s"]) / 4),
        "known_candidate_ms": float(np.median(column["known ms"])),
    }
    for name in METRICS:
        summary[f"spearman_{name}"] = float(spearmanr(column[name], column["whole lut"]).statistic)
    if np.isfinite(beside).any():
        summary["yosys_share_least"], summary["yosys_share_most"] = float(np.nanmin(beside)), float(np.nanmax(beside))
    return {f"{prefix}_{key}": value for key, value in summary.items()}


def main() -> None:
    options = parser(__doc__).parse_args()
    data, what = jets()
    small = build_model("jsc-mlp", data.sample_shape, data.num_classes, 0)
    small.seq_blocks = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, data.num_classes))
    small = trained(small, data, steps=20 if options.quick else 600)
    model = small if options.quick else trained(build_model("jsc-mlp", (16,), 5, 0), data, steps=600)
    number, few = (3, 0) if options.quick else (CANDIDATES, SYNTHESIZED)
    layers = measured("layers", per_layer(number, model, data), 0)
    learnt = measured("learned", learned(options.quick, model, data), few)
    others = measured("small", per_layer(2 if options.quick else SMALL, small, data), few)
    summary = summary_of(layers, "layers") | summary_of(learnt, "learned") | summary_of(others, "small")
    installed = shutil.which("yosys")
    yosys = subprocess.run([installed, "-V"], capture_output=True, text=True).stdout[:11] if installed else "no yosys"
    report(
        "Costs on an FPGA",
        [*layers, *learnt, *others],
        summary,
        options.json,
        data=f"{what}; {fabric.version()}; {yosys.strip()}",
    )


if __name__ == "__main__":
    main()
