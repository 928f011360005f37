"""What comes before the first candidate: capturing ResNet-18, calibrating it, and rounding all options of its weights.

64 samples of 224 × 224 × 3, random weights; every convolution and linear layer has an 8-bit input and weights of 2, 3,
4, 6 and 8 bits with a scale per output channel, whose range is the largest value (``minmax``) or the one of the least
squared error (``mse``). Set-up is everything from the float model to a deployed model of each of the five widths. It is
counted in forward passes of the float model over the same samples, timed right before, after one second is taken off.
``mse_width`` is what one more width costs with ``mse``: the calibration of two widths, halved, with the forward pass
that looks at the activations. Medians over rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
import torch
from common import make_job, parser, report, timed
from torch import Tensor, nn

from bitfront.engine.evaluation.fixed import FixedEvaluator
from models import resnet18

RULES = ("minmax", "mse")
WIDTHS, PAIRS = (2, 3, 4, 6, 8), ((2, 3), (3, 4), (4, 8))


def evaluator(model: nn.Module, x: Tensor, widths: Sequence[int], rule: str) -> tuple[FixedEvaluator, np.ndarray]:
    """(an evaluator of spaces with these weight widths, codes that use each of them at every site)."""
    formats = {"name": "affine", "data_in_width": [8], "weight_width": list(widths), "weight_range": [rule]}
    choices = {kind: {**formats, "weight_granularity": ["channel"]} for kind in ("conv2d", "linear")}
    made = FixedEvaluator(make_job(model, x, torch.zeros(len(x), dtype=torch.int64), choices, calibration=x))
    sizes = [group.size for group in made.space.groups]
    options = np.array([[min(i, size - 1) for size in sizes] for i in range(max(sizes))])
    return made, made.space.codes(options)


def prepare(model: nn.Module, x: Tensor, widths: Sequence[int], rule: str, *, deployed: bool) -> None:
    """Calibrate these widths, and build a deployed model of each, or not."""
    made, codes = evaluator(model, x, widths, rule)
    for code in codes:
        if deployed:
            made.model(code)
        else:
            made.formats(code)


def main() -> None:
    """Measure set-up and calibration in turns with forward passes."""
    options = parser(__doc__ or "")
    given = options.parse_args()
    size, samples, rounds = (32, 4, 1) if given.quick else (224, 64, 3)
    model, x = resnet18(), torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(0))

    def forward() -> None:
        with torch.inference_mode():
            model(x)

    forward()
    rows, summary = [], {}
    for rule in RULES:
        setups, each = [], []
        for _ in range(rounds):
            one = timed(forward)
            seconds = timed(lambda rule=rule: prepare(model, x, WIDTHS, rule, deployed=True))
            setups.append((one, seconds, (seconds - 1) / one))
            for pair in PAIRS:
                one = timed(forward)
                each.append(timed(lambda pair=pair, rule=rule: prepare(model, x, pair, rule, deployed=False)) / 2 / one)
        middle = sorted(setups, key=lambda row: row[2])[len(setups) // 2]
        summary |= {f"{rule}_setup": middle[2], f"{rule}_width": statistics.median(each)}
        rows.append(
            {
                "range": rule,
                "forward_s": middle[0],
                "setup_s": middle[1],
                "setup - 1 s, forwards": middle[2],
                "a width, forwards": statistics.median(each),
                "at most": max(each),
            }
        )
    report("calibration", rows, summary, given.json, data=f"{samples} random samples, {size} x {size}")


if __name__ == "__main__":
    main()
