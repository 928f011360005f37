"""How much each option of each site disturbs the outputs of the float model: an estimate from gradients.

For a few batches, the gradient of random projections of the outputs, one per sample, is taken by every operand of every
site. What rounding changes about an operand, times this gradient, squared and summed, estimates the noise that the
option adds to the outputs (first order; roundings are taken as independent of each other, as in diagonal Fisher
approximations and in SQNR models). The projections have mean 0 and are independent, so the square of a weight's
gradient by a whole batch has the expectation of the sum of its squares per sample. The noise is given as a share of the
variance of the outputs. Such shares of several sites add up. All options together take as long as a few forward and
backward passes.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfront.engine.evaluation.fixed import FixedEvaluator, one_thread
from bitfront.formats.base import Format, Operand
from bitfront.operations.base import Rounds
from bitfront.transforms.quantize import rebuilt

Values = NDArray[np.float64]
#: Samples whose gradients are taken: so many batches of so many.
BATCHES, BATCH = 8, 8
#: (site, operand)
Place = tuple[str, Operand]


@dataclass(eq=False)
class _Probe:
    """Stands where a format would, changes nothing, and keeps what it sees in one forward pass."""

    seen: list[Tensor] = field(default_factory=list)

    def quantize(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x


def sensitivities(evaluator: FixedEvaluator) -> list[Values]:
    """Per site the noise that each of its options adds to the outputs, as a share of their variance.

    Args:
        evaluator: of candidates that all have the weights of one model.

    Returns:
        Per group of the space float64 of shape (options,), 0 or more.

    Raises:
        RuntimeError: torch cannot differentiate the model.
    """
    evaluator.job.weights.make_room()
    options = _formats(evaluator)
    wanted: dict[Place, set[Format]] = defaultdict(set)
    for by_option in options:
        for place, form in (item for formats in by_option for item in formats.items()):
            wanted[place].add(form)
    with one_thread(), torch.enable_grad():
        noise = _noise(evaluator, {place: list(forms) for place, forms in wanted.items()})
    return [np.array([sum(noise[p, f] for p, f in formats.items()) for formats in by_option]) for by_option in options]


def _formats(evaluator: FixedEvaluator) -> list[list[dict[Place, Format]]]:
    """Per group, per option: the calibrated formats of the operands of its site."""
    of_sites = zip(evaluator.space.sites, evaluator.option_formats(), strict=True)
    return [
        [{(site.name, operand): form for operand, form in formats.items()} for formats in options]
        for site, options in of_sites
    ]


def _noise(evaluator: FixedEvaluator, wanted: dict[Place, list[Format]]) -> dict[tuple[Place, Format], float]:
    """(place, format) → the noise that it adds to the outputs, as a share of their variance."""
    graph, device = evaluator.space.graph, evaluator.job.device
    probes = {place: _Probe() for place in wanted}
    rounds: dict[str, dict[Operand, Rounds]] = defaultdict(dict)
    for (site, operand), probe in probes.items():
        rounds[site][operand] = probe
    model = rebuilt(graph, rounds, {}).to(device)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    stored = {(site.name, operand) for site in graph.sites for operand, _ in site.operand_parameters}
    generator = torch.Generator().manual_seed(0)
    squares: dict[Place, Tensor] = {}
    values: dict[Place, Tensor] = {}
    noise: dict[tuple[Place, Format], float] = defaultdict(float)
    outputs = []
    samples = evaluator.job.calibration[: BATCHES * BATCH].to(device)
    for batch in torch.split(samples, BATCH):
        evaluator.job.weights.settle()
        for probe in probes.values():
            probe.seen.clear()
        given = batch.clone().requires_grad_(batch.is_floating_point())
        output = model(given)
        if not isinstance(output, Tensor):
            raise RuntimeError(f"the model returns a {type(output).__name__}, and not one tensor")
        direction = torch.randn(output.shape, generator=generator).to(device)
        seen = [(place, x) for place, probe in probes.items() for x in probe.seen if x.requires_grad]
        gradients = torch.autograd.grad((direction * output).sum(), [x for _, x in seen], allow_unused=True)
        outputs.append(output.detach().flatten(1).double().cpu())
        for (place, x), gradient in zip(seen, gradients, strict=True):
            if gradient is not None and place in stored:
                squares[place] = squares.get(place, torch.zeros_like(x)) + gradient.square()
                values[place] = x.detach()
            elif gradient is not None:
                for form in wanted[place]:
                    noise[place, form] += _disturbed(form, x.detach(), gradient.square())
    for place, square in squares.items():
        for form in wanted[place]:
            noise[place, form] += _disturbed(form, values[place], square)
    stacked = torch.cat(outputs)
    variance = float((stacked - stacked.mean(dim=0)).square().sum())
    return defaultdict(float, {key: value / variance for key, value in noise.items()} if variance > 0 else {})


def _disturbed(form: Format, x: Tensor, square: Tensor) -> float:
    """Σ (gradient · what rounding changes)², from the squares of gradients."""
    with torch.no_grad():
        total = float((square * (form.quantize(x) - x).square()).double().sum())
    return total if np.isfinite(total) else 0.0
