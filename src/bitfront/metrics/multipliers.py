"""Multipliers of an FPGA, where a design keeps them: a closed form, after the rule by which hls4ml counts.

hls4ml's estimate (1.3, ``hls4ml.optimization.dsp_aware_pruning``, ``VivadoDSPEstimator``) is one multiplier per weight
that is not zero, in layers whose weights have 9 bits or more; Vivado makes narrower products of look-up tables. A
multiplier is a DSP48E2, 27 × 18 bits with signs (AMD UG579). A wider operand is cut into parts, each of which but the
highest holds a bit less, as it has no sign; every part of the one is multiplied with every part of the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from bitfront.formats.base import FLOAT_BITS, Format
from bitfront.metrics import RUNNERS
from bitfront.metrics.base import EvaluationContext, Metric, Runner, RunnerSettings, Side, Values
from bitfront.metrics.effective_bits import BitCount, of_candidates
from bitfront.spaces.base import Codes

#: Bits of the two inputs of a DSP48E2, signs included: what a layer takes, and its weights.
OF_DATA, OF_WEIGHT = 27, 18
#: hls4ml's: narrower weights get no multiplier.
NARROWEST = 9


class MultipliersSettings(RunnerSettings):
    """Settings of the metric dsp."""

    least_width: int = Field(
        NARROWEST,
        ge=1,
        description="bits that both operands of a product have at least to get a multiplier; the others become look-up "
        "tables",
    )


@dataclass(frozen=True)
class PartCount(BitCount):
    """Counts into how many parts operands are cut; 0 where a product with them gets no multiplier.

    Attributes:
        least: bits that an operand of a multiplier has at least.
    """

    sign_bits: bool = True
    biases: bool = False
    least: int = NARROWEST

    def parts(self, bits: NDArray[np.int64], signed: bool, most: int) -> NDArray[np.int64]:
        """Parts of operands with so many bits, for an input of the multiplier that has `most`."""
        beyond = bits + (not signed) - most
        return np.where(bits >= self.least, 1 + np.maximum(-(-beyond // (most - 1)), 0), 0)

    def _of(self, form: Format | None, most: int) -> NDArray[np.int64]:
        if form is None:
            return self.parts(np.array(FLOAT_BITS), True, most)
        each = form.value_bits
        bits = np.array(form.bits) if each is None else each + (each > 0) * form.has_sign
        return self.parts(bits, form.has_sign, most)

    def of(self, form: Format | None) -> int | NDArray[np.int64]:
        """Parts of an input in a format, or of each of its values; None: in float."""
        parts = self._of(form, OF_DATA)
        return parts if parts.ndim else int(parts)

    def of_values(self, form: Format | None, values: Tensor) -> Tensor:
        """Parts of each of the rounded weights, 0 for zeros; float64, of their shape."""
        parts = torch.as_tensor(self._of(form, OF_WEIGHT), device=values.device).double().expand(values.shape)
        return torch.where(values == 0, 0.0, parts)


@RUNNERS.register("dsp")
class Multipliers(Runner):
    """Multipliers (DSP48E2), one for each product of wide operands with a weight that is not zero."""

    Settings = MultipliersSettings
    settings: MultipliersSettings
    side: ClassVar[Side] = "hw_runner"
    closed_form: ClassVar[bool] = True
    of_weights: ClassVar[bool] = True
    produces = (
        Metric(
            "dsp",
            "DSP48E2",
            "minimize",
            "modelled",
            "multipliers of all products of wide operands whose weight is not zero, as hls4ml counts",
        ),
    )

    def measure(self, context: EvaluationContext, codes: Codes) -> Mapping[str, Values]:
        """The multipliers of each candidate, everything being there once per product."""
        count = PartCount(least=self.settings.least_width)
        in_float = float(count.of(None)) * count.of_values(None, torch.ones(1)).item()
        return {"dsp": of_candidates(context, codes, count, in_float)}
