"""What a candidate costs in each number format, beside fixed point.

``jsc-mlp`` (16-64-32-32-5) on 512 and on 4,096 samples. Each space has two settings for the input and three for the
weight of every linear layer, so 1,296 candidates, all of which are evaluated; biases stay in float. Set-up and
calibration are not counted: options are learned before the first round. The spaces take turns; a time is the median
over rounds, a ratio the median of the rounds' ratios. Some candidates are evaluated whole too, as deployed, and must
give the same loss and accuracy (exit status 1).
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import numpy as np
from common import clusters, make_job, measured, paired, parser, ratio, report, spread, trained

from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.models.base import build_model
from bitfront.scoring import evaluate

BASE = "integer"
#: How each space is called → the format, the settings of the input, those of the weight.
SPACES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    BASE: ("integer", {"width": [6, 8]}, {"width": [3, 4, 8]}),
    "affine": ("affine", {"width": [6, 8]}, {"width": [3, 4, 8]}),
    "affine, groups": ("affine", {"width": [6, 8]}, {"width": [3, 4, 8], "group_size": 16}),
    "minifloat_ieee": (
        "minifloat_ieee",
        {"width": [6, 8], "exponent_width": 3},
        {"width": [5, 6, 8], "exponent_width": 3},
    ),
    "minifloat_denorm": (
        "minifloat_denorm",
        {"width": [6, 8], "exponent_width": 3},
        {"width": [5, 6, 8], "exponent_width": 3},
    ),
    "mx": ("mx", {"width": [6, 8]}, {"width": [4, 6, 8]}),
    "block_fp": (
        "block_fp",
        {"width": [6, 8], "exponent_width": 8, "block_size": [16]},
        {"width": [3, 4, 8], "exponent_width": 8, "block_size": [16]},
    ),
    "log": ("log", {"width": [6, 8]}, {"width": [4, 6, 8]}),
    "weights alone": ("affine", {}, {"width": [2, 3, 4, 6, 8, 16]}),
}


def space(name: str) -> dict[str, dict[str, Any]]:
    """The table of choices of a space."""
    form, data, weight = SPACES[name]
    operands = {"data_in": data, "weight": weight}
    return {"linear": {"name": form, **{f"{o}_{k}": v for o, table in operands.items() for k, v in table.items()}}}


def main() -> int:
    """Run; 1 where a candidate is not what it is alone."""
    options = parser(__doc__ or "").parse_args()
    data = clusters(20_000)
    model = trained(build_model("jsc-mlp", (16,), 5, 0), data)
    rows, summary, wrong = [], {}, 0
    for samples in (512,) if options.quick else (512, 4096):
        x, y = data.x["train"][:samples], data.y["train"][:samples]
        evaluators = {name: FixedEvaluator(make_job(model, x, y, space(name))) for name in SPACES}
        codes = {}
        for name, evaluator in evaluators.items():
            size = 100 if options.quick else evaluator.space.size
            codes[name] = evaluator.space.numbered(0, size)
            batch = measured(evaluator, codes[name])
            for i in np.linspace(0, size - 1, 5).astype(int).tolist():
                alone = evaluate(evaluator.model(codes[name][i]), x, y)
                wrong += (alone.loss, alone.accuracy) != (batch.values["loss"][i], batch.values["accuracy"][i])
        calls = {name: partial(measured, evaluators[name], codes[name]) for name in SPACES}
        times = paired(calls, 1 if options.quick else 7)
        per = {name: [s / len(codes[name]) for s in times[name]] for name in SPACES}
        for name in SPACES:
            ms = {k: 1e3 * v for k, v in spread(per[name]).items()}
            times_base = ratio(per[name], per[BASE])
            rows.append(
                {
                    "samples": samples,
                    "format": name,
                    "ms per candidate": ms["median"],
                    "quartiles": f"{ms['q1']:.4f}–{ms['q3']:.4f}",
                    "× integer": times_base,
                }
            )
            summary[f"{name}_{samples}"] = times_base
    summary["differing_candidates"] = wrong
    report("Formats", rows, summary, options.json)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
