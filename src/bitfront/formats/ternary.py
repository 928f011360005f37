"""Ternary numbers: −1, 0 and 1, times a scale.

With a threshold Δ = 0.75 · mean |w|, the value of x is 0 where |x| ≤ Δ, otherwise ``α`` with the sign of x. α is 1, or
the mean of the absolute values above Δ (ternary weight networks, Li et al. 2016, arXiv:1605.04711; the factor there is
0.7, for normal and uniform weights together, and 0.75 for normal ones). A value of at least α is never 0, so that
rounding again changes nothing; this matters only where the scale is 1 and Δ is larger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfront.formats import FORMATS
from bitfront.formats.base import FormatError, FormatParameter, OperandKind
from bitfront.formats.grid import Grid
from bitfront.formats.scales import (
    GRANULARITY,
    MeanFormat,
    as_scale,
    channel_steps,
    granularity,
    keep_nan,
    mean_of,
)

#: The threshold as a part of the mean absolute value.
THRESHOLD = 0.75


@FORMATS.register("ternary")
@dataclass(frozen=True)
class Ternary(MeanFormat):
    """−1, 0 and 1, times 1 or the mean of what is above the threshold; two bits are stored."""

    scaling_factor: bool
    threshold: tuple[float, ...] | None = None
    scale: tuple[float, ...] | None = None

    parameters: ClassVar[Mapping[str, FormatParameter]] = {
        "width": FormatParameter(
            "bits of a stored value: 2, although three values are log2(3) = 1.58 bits of information",
            default=2,
            low=2,
            high=2,
        ),
        "scaling_factor": FormatParameter(
            "the scale is the mean of the absolute values above the threshold (true, 'NA'), or 1 (false)",
            default=None,
            words=("NA",),
            boolean=True,
        ),
        "granularity": replace(
            GRANULARITY,
            meaning="one threshold and scale per 'tensor' or per 'channel'; 'NA' is per channel for weights that are "
            "parameters, else per tensor",
        ),
    }

    @classmethod
    def _build(cls, values: Mapping[str, object], kind: OperandKind, signed: bool) -> Self:  # noqa: ARG003
        scaled = values["scaling_factor"] is None or bool(values["scaling_factor"])
        return cls(granularity(values, kind), kind.channel_axis or 0, scaled)

    @property
    def bits(self) -> int:
        """Two, as the values are stored."""
        return 2

    @property
    def label(self) -> str:
        """``ternary-sc`` (scale and threshold per channel), ``ternary-s`` (per tensor), ``ternary-c`` (threshold per
        channel, no scale), ``ternary``."""
        marks = "s" * self.scaling_factor + "c" * (self.granularity == "channel")
        return f"ternary-{marks}" if marks else "ternary"

    @property
    def calibrates(self) -> bool:
        """True while there is no threshold."""
        return self.threshold is None

    @property
    def scales_each(self) -> int:
        """One, or none. The threshold is not stored."""
        return int(self.scaling_factor)

    def _learned(self, sizes: NDArray[np.float64]) -> Self:
        threshold = (THRESHOLD * mean_of(sizes)).astype(np.float32).astype(np.float64)
        scale = as_scale(mean_of(sizes, threshold)) if self.scaling_factor else None
        return replace(self, threshold=tuple(threshold.tolist()), scale=scale)

    @cached_property
    def grid(self) -> Grid:
        """The step is the scale, and codes are −1, 0 and 1. Not complete: the threshold is not half a step."""
        if self.calibrates:
            raise FormatError("a ternary format must be calibrated before it is used")
        step, block = channel_steps(self.scale or (1.0,), self.axis)
        return Grid(step, -1, 1, block=block, complete=False)

    @cached_property
    def _thresholds(self) -> Grid:
        """The thresholds in the form of a grid, to lay them along the channels; never called a step."""
        step, block = channel_steps(self.threshold or (0.0,), self.axis)
        return Grid(step, 0, 1, block=block)

    def round(self, x: Tensor) -> Tensor:
        """The scale with the sign of `x` where |x| is above the threshold, 0 elsewhere."""
        _, scale = self.grid.ends(x)
        size = x.abs()
        large = (size > self._threshold_along(x)) | (size >= scale)
        return keep_nan(x, torch.where(large, torch.copysign(scale.expand_as(x), x), torch.zeros_like(x)))

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The scale, negative and positive; per channel where thresholds are."""
        low, high = self.grid.ends(x)
        ones = torch.ones_like(self._threshold_along(x))
        return low * ones, high * ones

    def _threshold_along(self, x: Tensor) -> Tensor:
        return self._thresholds.along(self._thresholds.step, x)
