"""Binary numbers: one bit, either −1 and 1 or 0 and 1, times a scale.

Bipolar, the value of x is ``α`` where x ≥ 0 and ``−α`` elsewhere; otherwise ``α`` where x > 0 and 0 elsewhere. α is 1,
or the mean absolute value (XNOR-Net, Rastegari et al. 2016, arXiv:1603.05279, eq. 6), per tensor or per channel.
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


@FORMATS.register("binary")
@dataclass(frozen=True)
class Binary(MeanFormat):
    """One bit: the sign, or whether a value is positive; times 1 or the mean absolute value."""

    bipolar: bool
    scaling_factor: bool
    scale: tuple[float, ...] | None = None

    parameters: ClassVar[Mapping[str, FormatParameter]] = {
        "width": FormatParameter("bits of a value: 1", default=1, low=1, high=1),
        "bipolar": FormatParameter(
            "the values are −1 and 1 (true), or 0 and 1 (false), times the scale; 'NA' is true, except for the input "
            "of a ReLU",
            default=None,
            words=("NA",),
            boolean=True,
        ),
        "scaling_factor": FormatParameter(
            "the scale is the mean absolute value (true), or 1 (false); 'NA' is false if bipolar, else true",
            default=None,
            words=("NA",),
            boolean=True,
        ),
        "granularity": GRANULARITY,
        "stochastic": FormatParameter(
            "only false: with random signs, a candidate would have other results each time",
            default=False,
            words=("NA",),
            boolean=True,
        ),
    }

    @classmethod
    def _build(cls, values: Mapping[str, object], kind: OperandKind, signed: bool) -> Self:
        if values["stochastic"]:
            raise FormatError(
                "stochastic = true is not possible: a candidate would have other results each time; allowed: false",
                "stochastic",
            )
        bipolar = signed if values["bipolar"] is None else bool(values["bipolar"])
        scaled = not bipolar if values["scaling_factor"] is None else bool(values["scaling_factor"])
        # Without a scale, nothing differs between channels.
        return cls(
            granularity(values, kind) if scaled else "tensor",
            (kind.channel_axis or 0) if scaled else 0,
            bipolar,
            scaled,
        )

    @property
    def bits(self) -> int:
        """One."""
        return 1

    @property
    def has_sign(self) -> bool:
        """A bit chooses one of two numbers."""
        return False

    @property
    def label(self) -> str:
        """``binary`` (−1 and 1), ``binary-s`` (with a scale), ``binary-sc`` (per channel), ``binary01-s`` ..."""
        scale = "-s" if self.scaling_factor else ""
        return f"binary{'' if self.bipolar else '01'}{scale}{'c' * (self.granularity == 'channel')}"

    @property
    def calibrates(self) -> bool:
        """True while a scale is missing."""
        return self.scaling_factor and self.scale is None

    @property
    def scales_each(self) -> int:
        """One, or none."""
        return int(self.scaling_factor)

    def _learned(self, sizes: NDArray[np.float64]) -> Self:
        return replace(self, scale=as_scale(mean_of(sizes)))

    @cached_property
    def grid(self) -> Grid:
        """The step is the scale. Not complete: a bipolar format does not hold 0, and otherwise 0 is the threshold."""
        if self.calibrates:
            raise FormatError("a binary format with a scale must be calibrated before it is used")
        step, block = channel_steps(self.scale or (1.0,), self.axis)
        return Grid(step, -1 if self.bipolar else 0, 1, block=block, complete=False)

    def round(self, x: Tensor) -> Tensor:
        """The scale, with the sign of `x` if bipolar; otherwise 0 unless `x` is positive."""
        low, high = self.bounds(x)
        return keep_nan(x, torch.where(x >= 0 if self.bipolar else x > 0, high, low))

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two values."""
        return self.grid.ends(x)
