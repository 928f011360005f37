"""NormalFloat 4: 16 levels that normally distributed weights use about equally often, times a scale per group.

The value of x is the nearest of the levels times s, the lower one of two; s is the largest absolute value of the
group (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E). The paper's second quantization, of
the scales, is not there: a scale is a float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Self, cast

import torch
from torch import Tensor

from bitfront.formats import FORMATS
from bitfront.formats.base import FLOAT_BITS, Format, FormatError, FormatParameter, OperandKind
from bitfront.formats.grid import Grid
from bitfront.formats.groups import (
    block_of,
    check_kind,
    dimensions,
    grouped,
    known,
    laid,
    number_of_groups,
    size_parameter,
)
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
    #: Of the scales, as they lie along the dimensions of the tensor; (groups,) of a vector.
    shape: tuple[int, ...] | None = None
    scale: tuple[float, ...] | None = None
    #: The dimensions of the output channels and of the sums; None: dimension 1.
    axis: int = 0
    summed: int | None = None

    parameters: ClassVar[Mapping[str, FormatParameter]] = {
        "width": FormatParameter("bits of a value: 4; for weights only", default=4, low=4, high=4),
        "group_size": size_parameter(
            "neighbours along the input dimension of a weight that share a scale; the last group may be shorter", 64
        ),
    }

    @classmethod
    def _build(cls, values: Mapping[str, object], kind: OperandKind, signed: bool) -> Self:  # noqa: ARG003
        check_kind(kind, "width")
        return cls(cast(int, values["group_size"]), axis=kind.channel_axis or 0, summed=kind.sums)

    @property
    def bits(self) -> int:
        """Four."""
        return 4

    def overhead_bits(self, shape: tuple[int, ...]) -> int:
        """A float32 scale per group."""
        return FLOAT_BITS * number_of_groups(shape, self.group_size, self.axis, self.summed)

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
        rows, inputs = dimensions(sample.dim(), self.axis, self.summed)
        largest = known(grouped(sample, self.group_size, rows, inputs)).abs().amax(dim=-1)
        scale = laid(largest.clamp(min=SMALLEST_SCALE).float(), rows, inputs)
        return replace(
            self,
            shape=tuple(scale.shape),
            scale=tuple(scale.flatten().tolist()),
            axis=rows,
            summed=None if self.summed is None else inputs,
        )

    @cached_property
    def _scales(self) -> Grid:
        """The scales in the form of a grid, to lay them along the groups. The values are not on it."""
        if self.shape is None:
            raise FormatError("nf4 must be calibrated before it is used")
        step = torch.tensor(self.scale, dtype=torch.float64).reshape(self.shape)
        rows, inputs = dimensions(len(self.shape), self.axis, self.summed)
        return Grid(step, -1, 1, block=block_of(len(self.shape), self.group_size, rows, inputs))

    def round(self, x: Tensor) -> Tensor:
        """The nearest level times the scale of the group."""
        scale = self._scales.along(self._scales.step, x)
        levels = torch.tensor(LEVELS, dtype=x.dtype, device=x.device)
        nearest = torch.bucketize((x / scale).contiguous(), (levels[1:] + levels[:-1]) / 2)
        return keep_nan(x, levels[nearest] * scale)

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The scale of the group, negative and positive."""
        return self._scales.ends(x)
