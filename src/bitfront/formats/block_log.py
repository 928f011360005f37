"""Block logarithm: powers of two of either sign, and 0, with an exponent bias that the values of a block share.

The bias is the one at which the largest exponent reaches the block's largest absolute value:
b = clamp(2^(w−1) − 1 − ⌈log2 max⌉, 0, 2^B − 1), of B bits. The values are those of ``log`` with this bias, 0 included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, cast

import torch
from torch import Tensor

from bitfront.formats import FORMATS
from bitfront.formats.base import Format, FormatParameter, Operand, holds_samples
from bitfront.formats.blocks import (
    BLOCK_SIZE,
    LOWEST,
    binade,
    block_of,
    labelled,
    largest,
    number_of_blocks,
    spread,
    to_powers,
)
from bitfront.formats.grid import Grid, common_grid


@FORMATS.register("block_log")
@dataclass(frozen=True)
class BlockLog(Format):
    """Powers of two of either sign, and 0, with one exponent bias per block."""

    width: int
    exponent_bias_width: int
    block_size: tuple[int, ...]
    samples: bool

    parameters: ClassVar[Mapping[str, FormatParameter]] = {
        "width": FormatParameter("bits of a value: a sign and an exponent", low=2, high=8),
        "exponent_bias_width": FormatParameter("bits of the exponent bias of a block", low=1, high=8),
        "block_size": BLOCK_SIZE,
    }

    @classmethod
    def _build(cls, values: Mapping[str, object], operand: Operand, signed: bool) -> Self:  # noqa: ARG003
        size = cast("tuple[int, ...]", values["block_size"])
        bias = cast(int, values["exponent_bias_width"])
        return cls(cast(int, values["width"]), bias, size, holds_samples(operand))

    @property
    def bits(self) -> int:
        """Bits of one stored value, without its share of the exponent bias."""
        return self.width

    @property
    def label(self) -> str:
        """E.g. ``blog5b8-1x16``: with a bias of 8 bits per block."""
        return labelled(f"blog{self.width}b{self.exponent_bias_width}", self.block_size)

    def overhead_bits(self, shape: tuple[int, ...]) -> int:
        """An exponent bias per block."""
        return number_of_blocks(shape, self._block(shape)) * self.exponent_bias_width

    def round(self, x: Tensor) -> Tensor:
        """`x` rounded to the nearest exponent that its block has, saturating; 0 below the lowest one."""
        top = self._top(x)
        return to_powers(x, top * 2.0 ** (1 - self._most), top)

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value that the block of each value can have."""
        end = self._top(x)
        return -end, end

    def grid_of(self, x: Tensor) -> Grid | None:
        """The grid of the smallest value in use."""
        return common_grid(self.round(x))

    @property
    def _most(self) -> int:
        return int(2 ** (self.width - 1)) - 1

    def _block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return block_of(shape, self.block_size, self.samples)

    def _top(self, x: Tensor) -> Tensor:
        """The largest value of the block of each value."""
        block = self._block(x.shape)
        size = largest(x, block)
        below = binade(size)
        reached = torch.where(size > below, below * 2, below)
        low = self._most - min(2**self.exponent_bias_width - 1, 1 - LOWEST)
        return spread(reached.clamp(2.0**low, 2.0**self._most), x.shape, block)
