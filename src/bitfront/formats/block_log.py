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
from bitfront.formats.base import FormatParameter, OperandKind
from bitfront.formats.blocks import (
    BLOCK_SIZE,
    LOWEST,
    SizedBlockFormat,
    exchanged_of,
    labelled,
    largest,
    spread,
    to_powers,
)
from bitfront.formats.floating import binade


@FORMATS.register("block_log")
@dataclass(frozen=True)
class BlockLog(SizedBlockFormat):
    """Powers of two of either sign, and 0, with one exponent bias per block."""

    exponent_bias_width: int

    parameters: ClassVar[Mapping[str, FormatParameter]] = {
        "width": FormatParameter("bits of a value: a sign and an exponent", low=2, high=8),
        "exponent_bias_width": FormatParameter("bits of the exponent bias of a block", low=1, high=8),
        "block_size": BLOCK_SIZE,
    }

    @classmethod
    def _build(cls, values: Mapping[str, object], kind: OperandKind, signed: bool) -> Self:  # noqa: ARG003
        size = cast("tuple[int, ...]", values["block_size"])
        bias = cast(int, values["exponent_bias_width"])
        return cls(cast(int, values["width"]), kind.samples, size, bias, exchanged=exchanged_of(kind))

    @property
    def label(self) -> str:
        """E.g. ``blog5b8-1x16``: with a bias of 8 bits per block."""
        return labelled(f"blog{self.width}b{self.exponent_bias_width}", self.block_size)

    @property
    def shared_bits(self) -> int:
        """Those of an exponent bias."""
        return self.exponent_bias_width

    def round(self, x: Tensor) -> Tensor:
        """`x` rounded to the nearest exponent that its block has, saturating; 0 below the lowest one."""
        top = self.end(x)
        return to_powers(x, top * 2.0 ** (1 - self._most), top)

    @property
    def _most(self) -> int:
        return int(2 ** (self.width - 1)) - 1

    def end(self, x: Tensor) -> Tensor:
        """The largest power of two that the block of each value of `x` has."""
        block = self.block(x.shape)
        size = largest(x, block)
        below = binade(size)
        reached = torch.where(size > below, below * 2, below)
        low = self._most - min(2**self.exponent_bias_width - 1, 1 - LOWEST)
        return spread(reached.clamp(2.0**low, 2.0**self._most), x.shape, block)
