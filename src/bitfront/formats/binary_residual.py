"""Residual binary numbers: a sum of binary numbers, each of what the ones before leave.

With as many scales as levels, the values are ``±α_1 ± α_2 ± …``. α_1 is the mean of |x|, and α_l that of the residual:
r_1 = x, α_l = mean |r_l|, r_{l+1} = r_l − α_l · sign(r_l) (residual binarization, ReBNet, Ghasemzadeh et al. 2017,
arXiv:1711.01243). x becomes the nearest of these sums, the larger one of two. That is the sum of the α_l · sign(r_l) if
no scale is smaller than the sum of those after it. Otherwise the signs one by one might not give the nearest value, nor
the same value again.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Self, cast

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


@FORMATS.register("binary_residual")
@dataclass(frozen=True)
class BinaryResidual(MeanFormat):
    """A sum of `levels` binary numbers, each with the mean absolute value of what is left as its scale."""

    levels: int
    #: Level → channel → scale.
    scales: tuple[tuple[float, ...], ...] | None = None

    bits_parameter: ClassVar[str | None] = "levels"
    parameters: ClassVar[Mapping[str, FormatParameter]] = {
        "levels": FormatParameter("binary numbers in a sum, one bit each", low=1, high=4),
        "granularity": replace(
            GRANULARITY,
            meaning="one scale per level and 'tensor' or 'channel'; 'NA' is per channel for weights that are "
            "parameters, else per tensor",
        ),
    }

    @classmethod
    def _build(cls, values: Mapping[str, object], kind: OperandKind, signed: bool) -> Self:  # noqa: ARG003
        return cls(granularity(values, kind), kind.channel_axis or 0, cast(int, values["levels"]))

    @property
    def bits(self) -> int:
        """One per level."""
        return self.levels

    @property
    def has_sign(self) -> bool:
        """Each bit chooses one of two numbers."""
        return False

    @property
    def label(self) -> str:
        """``residual2`` (two levels, scales per tensor), ``residual2c`` (per channel)."""
        return f"residual{self.levels}{'c' * (self.granularity == 'channel')}"

    @property
    def calibrates(self) -> bool:
        """True while there are no scales."""
        return self.scales is None

    @property
    def scales_each(self) -> int:
        """One per level."""
        return self.levels

    def _learned(self, sizes: NDArray[np.float64]) -> Self:
        # The sign of a residual does not matter for the next scale.
        residual, scales = sizes, []
        for _ in range(self.levels):
            means = mean_of(residual)
            scales.append(as_scale(means))
            residual = np.abs(residual - means[:, None])
        return replace(self, scales=tuple(scales))

    @cached_property
    def grid(self) -> Grid | None:
        """That of a binary number where there is one level; sums of several scales have no common step."""
        if self.scales is None:
            raise FormatError("a residual binary format must be calibrated before it is used")
        if self.levels > 1:
            return None
        step, block = channel_steps(self.scales[0], self.axis)
        return Grid(step, -1, 1, block=block, complete=False)

    @cached_property
    def _sums(self) -> Tensor:
        """The values in ascending order, shape (2^levels, channels or 1), as float32 holds them; float64."""
        if self.scales is None:
            raise FormatError("a residual binary format must be calibrated before it is used")
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=self.levels)), dtype=torch.float64)
        sums = signs @ torch.tensor(self.scales, dtype=torch.float64)
        return sums.float().double().sort(dim=0).values

    def _along(self, entry: Tensor, x: Tensor) -> Tensor:
        """An entry per channel with dtype and device of `x`, in a shape that broadcasts against it."""
        if len(entry) == 1:
            return entry.to(x).reshape(())
        return entry.to(x).reshape(*[1] * self.axis, -1, *[1] * (x.dim() - self.axis - 1))

    def round(self, x: Tensor) -> Tensor:
        """The nearest value, the larger one of two."""
        sums = self._sums
        between = (sums[1:] + sums[:-1]) / 2
        # The smallest number of this dtype that is not below the middle: so comparing is exact.
        limits = between.to(x.dtype)
        above = torch.nextafter(limits, torch.full_like(limits, torch.inf))
        limits = torch.where(limits.double() < between, above, limits)
        out = self._along(sums[0], x).expand_as(x)
        for limit, value in zip(limits, sums[1:], strict=True):
            out = torch.where(x >= self._along(limit, x), self._along(value, x), out)
        return keep_nan(x, out)

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of all scales, negative and positive."""
        return self._along(self._sums[0], x), self._along(self._sums[-1], x)
