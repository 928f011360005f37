"""What a network costs on an FPGA, as logic without multipliers: look-up tables and delay, and a proxy that is free.

``lut`` lays out each layer with the package alkaid and takes its estimate; ``bitfront.metrics.logic`` says how.
``adder_bits`` needs no package: it is the size of the adders if every product were shifts and additions of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bitfront.errors import ConfigError, MissingExtraError
from bitfront.exporters import fabric
from bitfront.formats.base import FLOAT_BITS, Format
from bitfront.metrics import RUNNERS
from bitfront.metrics.base import EvaluationContext, Kind, Metric, Runner, RunnerSettings, Side, Values
from bitfront.metrics.effective_bits import BitCount, of_candidates
from bitfront.metrics.logic import LogicCosts, Walk
from bitfront.metrics.logic_steps import obstacle
from bitfront.spaces.base import Codes
from bitfront.spaces.model_space import FormatSpace


@dataclass(frozen=True)
class DigitCount(BitCount):
    """Counts the digits of weights that are not zero, in canonical signed digits; of inputs their width."""

    sign_bits: bool = True
    biases: bool = False

    def of_values(self, form: Format | None, values: Tensor) -> Tensor:
        """Digits of each rounded value that are not 0; float64, of the same shape. Values without a common step count
        their width."""
        grid = None if form is None else form.grid_of(values)
        if grid is None:
            return super().of_values(form, values)
        return signed_digits(grid.centred(values.double()))


def signed_digits(codes: Tensor) -> Tensor:
    """How many digits of whole numbers are not 0, in the canonical form with the digits −1, 0 and 1, which has the
    fewest (Reitwiesner 1960): 7 = 8 − 1 has two. Float64, of the same shape.

    Args:
        codes: whole numbers below 2^53, float64.
    """
    whole = codes.abs().long()
    # The digits that are not 0 are the bits in which a number and three times the number differ.
    left, count = whole ^ (3 * whole), torch.zeros_like(codes, dtype=torch.float64)
    while bool(left.any()):
        count += left & 1
        left = left >> 1
    return count


@RUNNERS.register("adder_bits")
class AdderBits(Runner):
    """The size of the adders of all products with weights, if none share anything."""

    side: ClassVar[Side] = "hw_runner"
    closed_form: ClassVar[bool] = True
    of_weights: ClassVar[bool] = True
    produces = (
        Metric(
            "adder_bits",
            "bits",
            "minimize",
            "modelled",
            "Σ bits of the input · digits of the weight that are not zero, in canonical signed digits",
        ),
    )

    def measure(self, context: EvaluationContext, codes: Codes) -> Mapping[str, Values]:
        """The sum over the products of each candidate."""
        return {"adder_bits": of_candidates(context, codes, DigitCount(), float(FLOAT_BITS) ** 2)}


@RUNNERS.register("lut")
class LookUpTables(Runner):
    """Look-up tables and delay of the network as logic, everything there once per value, by alkaid's estimate.

    It is not in closed form: the costs of a step depend on the formats of the site behind it, and a step that is new
    takes up to a second.
    """

    side: ClassVar[Side] = "hw_runner"
    of_weights: ClassVar[bool] = True
    produces = (
        Metric("lut", "LUT", "minimize", "modelled", "6-input look-up tables of all layers, by alkaid's estimate"),
        Metric(
            "adder_depth",
            "adders",
            "minimize",
            "modelled",
            "delay of the longest path, by alkaid's estimate: an adder is about 1.1",
        ),
    )

    def __init__(self, settings: RunnerSettings) -> None:
        super().__init__(settings)
        self._costs = LogicCosts()
        self._walks: weakref.WeakKeyDictionary[FormatSpace, Walk | None] = weakref.WeakKeyDictionary()

    def ready(self, device: str) -> None:  # noqa: ARG002
        """Raises ConfigError where alkaid is not installed."""
        try:
            fabric.check_installed("the metric lut")
        except MissingExtraError as error:
            raise ConfigError(str(error)) from None

    def kinds(self, context: EvaluationContext) -> Mapping[str, tuple[Kind, str]]:
        """Modelled. Raises ConfigError where a candidate of the search cannot be laid out; the site is named."""
        why = obstacle(context.searched)
        if why:
            raise ConfigError(
                f"this network cannot be modelled as logic: {why}", key=("search", "strategy", "hw_runner", "lut")
            )
        return super().kinds(context)

    def measure(self, context: EvaluationContext, codes: Codes) -> Mapping[str, Values]:
        """Both metrics of each candidate; NaN for a model in float."""
        space = context.space
        if space not in self._walks:
            self._walks[space] = None if obstacle(space) else Walk(space, self._costs)
        walk = self._walks[space]
        found = np.full((len(codes), 2), np.nan)
        if walk is not None:
            for row, code, options in zip(found, codes, space.options(codes).tolist(), strict=True):
                cost = walk.cost(context, code, options)
                row[:] = cost.luts, cost.levels
        return {"lut": found[:, 0].copy(), "adder_depth": found[:, 1].copy()}
