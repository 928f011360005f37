"""The noise of options against NumPy: on a network of one product the estimate is a formula."""

from __future__ import annotations

import numpy as np
import torch
from numpy.testing import assert_allclose
from torch import nn

from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.engine.evaluation.interface import EvaluationJob
from bitfront.engine.evaluation.sensitivity import BATCH, BATCHES, sensitivities
from bitfront.metrics.configured import configured_runner
from bitfront.spaces.request import Choices


def evaluator_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor, choices: Choices) -> FixedEvaluator:
    runners = (configured_runner("basic_evaluation"),)
    job = EvaluationJob(
        model.eval(), x[:2], "graph/quantize/mixed_precision_ptq", "type", choices, runners, {"val": (x, y)}, x
    )
    return FixedEvaluator(job)


def test_a_linear_layer_is_as_the_formula_says() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 6, generator=generator)
    model = nn.Sequential(nn.Linear(6, 3))
    choices = {"name": "integer", "weight_width": [2, 8], "weight_frac_width": 2}
    choices |= {"data_in_width": [3, 8], "data_in_frac_width": [1]}
    evaluator = evaluator_of(model, x, torch.arange(200) % 3, {"linear": choices})
    noise = sensitivities(evaluator)[0]
    space = evaluator.space
    weight, bias = (p.detach().numpy().astype(np.float64) for p in model[0].parameters())
    samples = evaluator.job.calibration[: BATCHES * BATCH].numpy().astype(np.float64)
    outputs = samples @ weight.T + bias
    seeded = torch.Generator().manual_seed(0)
    drawn = [torch.randn(BATCH, 3, generator=seeded).numpy() for _ in range(BATCHES)]
    directions = np.concatenate(drawn).astype(np.float64)
    gradients = np.einsum("bso,bsi->boi", directions.reshape(-1, BATCH, 3), samples.reshape(-1, BATCH, 6))
    variance = ((outputs - outputs.mean(axis=0)) ** 2).sum()

    def rounded(values: np.ndarray, width: int, frac: int) -> np.ndarray:
        step = 2.0**-frac
        return np.clip(np.round(values / step), -(2 ** (width - 1)), 2 ** (width - 1) - 1) * step

    seen = set()
    for option, formats in enumerate(evaluator.space.site_formats[0]):
        w, a = formats["weight"], formats["data_in"]
        moved = (rounded(weight, w.width, 2) - weight) ** 2
        by_weight = (gradients**2 * moved).sum()
        by_input = (((directions @ weight) ** 2) * (rounded(samples, a.width, 1) - samples) ** 2).sum()
        assert_allclose(noise[option], (by_weight + by_input) / variance, rtol=1e-4)
        seen.add((w.width, a.width))
    assert len(seen) == space.groups[0].size == 4


def test_more_bits_disturb_less_and_sites_without_formats_not_at_all() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    x = torch.randn(64, 1, 8, 8)
    table = {"name": ["integer", "NA"], "weight_width": [2, 4, 8], "weight_frac_width": ["auto"]}
    evaluator = evaluator_of(model, x, torch.arange(64) % 3, {"conv2d": table, "linear": table})
    noise = [values for values in sensitivities(evaluator) if len(values) == 4]
    assert len(noise) == 2
    for values in noise:
        assert values[0] > 4 * values[1] > 16 * values[2] > 0
        assert values[3] == 0
