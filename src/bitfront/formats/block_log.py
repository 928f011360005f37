"""Block logarithm: powers of two of either sign, and 0, with an exponent bias that the values of a block share.

The bias is the one at which the largest exponent reaches the block's largest absolute value:
b = clamp(2^(w−1) − 1 − ⌈log2 max⌉, 0, 2^B − 1), of B bits. The values are those of ``log`` with this bias, 0 included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, cast

from bitfront.formats import FORMATS
from bitfront.formats.base import FormatParameter, OperandKind
from bitfront.formats.blocks import BLOCK_SIZE, SizedBlockFormat, exchanged_of, labelled
from bitfront.kernels.scaled import LOWEST, ScaledRounding, Unit


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

    @property
    def rounding(self) -> ScaledRounding:
        """To powers of two; the unit is the largest one that the block has."""
        most = int(2 ** (self.width - 1)) - 1
        low = most - min(2**self.exponent_bias_width - 1, 1 - LOWEST)
        unit = Unit(1.0, 2.0**low, 2.0**most, upward=True)
        return ScaledRounding("powers", 2.0 ** (1 - most), 1.0, 1.0, unit=unit)
