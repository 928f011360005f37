"""NormalFloat 4: 16 levels that normally distributed weights use about equally often, times a scale per group.

The value of x is the nearest of the levels times s, the lower one of two; s is the largest absolute value of the
group (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E). The paper's second quantization, of
the scales, is not there: a scale is a float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Self, cast

import torch
from torch import Tensor

from bitfront.formats import FORMATS
from bitfront.formats.base import FLOAT_BITS, Format, FormatError, FormatParameter, Operand
from bitfront.formats.grid import Grid
from bitfront.formats.groups import block_of, check_operand, grouped, groups_of, known, size_parameter
from bitfront.formats.scales import SMALLEST_SCALE, keep_nan

#: The levels for a scale of 1, from appendix E of the paper.
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@FORMATS.register("nf4")
@dataclass(frozen=True)
class NormalFloat4(Format):
    """NormalFloat 4 of QLoRA: 16 levels of a normal distribution, with a scale per group of a weight."""

    group_size: int
    #: Of the scales: (rows, groups), or (groups,) of a vector.
    shape: tuple[int, ...] | None = None
    scale: tuple[float, ...] | None = None

    parameters: ClassVar[Mapping[str, FormatParameter]] = {
        "width": FormatParameter("bits of a value: 4; for weights only", default=4, low=4, high=4),
        "group_size": size_parameter(
            "neighbours along the input dimension of a weight that share a scale; the last group may be shorter", 64
        ),
    }

    @classmethod
    def _build(cls, values: Mapping[str, object], operand: Operand, signed: bool) -> Self:  # noqa: ARG003
        check_operand(operand, "width")
        return cls(cast(int, values["group_size"]))

    @property
    def bits(self) -> int:
        """Four."""
        return 4

    def overhead_bits(self, shape: tuple[int, ...]) -> int:
        """A float32 scale per group."""
        return FLOAT_BITS * math.prod(groups_of(shape, self.group_size))

    @property
    def label(self) -> str:
        """E.g. ``nf4-g64``, with the size of a group."""
        return f"nf4-g{self.group_size}"

    @property
    def calibrates(self) -> bool:
        """True while there are no scales."""
        return self.scale is None

    def calibrated(self, sample: Tensor) -> Self:
        """With the largest finite absolute value of each group as its scale."""
        if not self.calibrates:
            return self
        # Kept as the float32 that the deployed model will hold.
        largest = known(grouped(sample, self.group_size)).abs().amax(dim=-1).clamp(min=SMALLEST_SCALE).float()
        return replace(self, shape=tuple(largest.shape), scale=tuple(largest.flatten().tolist()))

    @cached_property
    def _scales(self) -> Grid:
        """The scales in the form of a grid, to lay them along the groups. The values are not on it."""
        if self.shape is None:
            raise FormatError("nf4 must be calibrated before it is used")
        step = torch.tensor(self.scale, dtype=torch.float64).reshape(self.shape)
        return Grid(step, -1, 1, block=block_of(self.shape, self.group_size))

    def round(self, x: Tensor) -> Tensor:
        """The nearest level times the scale of the group."""
        scale = self._scales.along(self._scales.step, x)
        levels = torch.tensor(LEVELS, dtype=x.dtype, device=x.device)
        nearest = torch.bucketize((x / scale).contiguous(), (levels[1:] + levels[:-1]) / 2)
        return keep_nan(x, levels[nearest] * scale)

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The scale of the group, negative and positive."""
        return self._scales.ends(x)
