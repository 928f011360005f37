"""Block minifloat: small floating-point numbers with an exponent bias that the values of a block share.

The bias is the one at which the largest exponent is that of the block's largest absolute value:
b = clamp(2^e − 1 − ⌊log2 max⌋, 0, 2^B − 1), of B bits. The values are those of a floating-point format with this bias,
m = w − e − 1 bits of mantissa and subnormal numbers, without infinities: ``±2^(E − b) · (1 + k / 2^m)`` for E from 1
to 2^e − 1, ``±2^(1 − b) · k / 2^m``, with 0 ≤ k < 2^m. Rounding is half to even and saturates. (Fox et al. 2021, A
block minifloat representation for training deep neural networks.) In MASE the bias has the opposite sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, cast

from bitfront.formats import FORMATS
from bitfront.formats.base import FormatError, FormatParameter, OperandKind
from bitfront.formats.blocks import BLOCK_SIZE, SizedBlockFormat, exchanged_of, labelled
from bitfront.kernels.scaled import LOWEST, ScaledRounding, Unit


@FORMATS.register("block_minifloat")
@dataclass(frozen=True)
class BlockMinifloat(SizedBlockFormat):
    """Small floating-point numbers, and one exponent bias per block."""

    exponent_width: int
    exponent_bias_width: int

    parameters: ClassVar[Mapping[str, FormatParameter]] = {
        "width": FormatParameter("bits of a value, sign included", low=3, high=24),
        "exponent_width": FormatParameter("bits of the exponent of a value", low=1, high=7),
        "exponent_bias_width": FormatParameter("bits of the exponent bias of a block", low=1, high=8),
        "block_size": BLOCK_SIZE,
    }

    @classmethod
    def _build(cls, values: Mapping[str, object], kind: OperandKind, signed: bool) -> Self:  # noqa: ARG003
        width, exponent_width = cast(int, values["width"]), cast(int, values["exponent_width"])
        if exponent_width > width - 2:
            raise FormatError(f"exponent_width = {exponent_width} leaves no mantissa in width = {width}")
        size = cast("tuple[int, ...]", values["block_size"])
        bias_width = cast(int, values["exponent_bias_width"])
        return cls(width, kind.samples, size, exponent_width, bias_width, exchanged=exchanged_of(kind))

    @property
    def label(self) -> str:
        """E.g. ``bm-e4m3b8-1x16``: with a bias of 8 bits per block."""
        return labelled(f"bm-e{self.exponent_width}m{self._mantissa}b{self.exponent_bias_width}", self.block_size)

    @property
    def shared_bits(self) -> int:
        """Those of an exponent bias."""
        return self.exponent_bias_width

    @property
    def rounding(self) -> ScaledRounding:
        """To floating-point numbers; the unit is the largest power of two among them."""
        most = 2**self.exponent_width - 1
        low = max(most - (2**self.exponent_bias_width - 1), LOWEST + self._mantissa)
        unit = Unit(1.0, 2.0**low, 2.0**most)
        lowest, largest = 2.0 ** (2 - 2**self.exponent_width), 2 - 2.0**-self._mantissa
        return ScaledRounding("floats", lowest, 1.0, largest, self._mantissa, unit)

    @property
    def _mantissa(self) -> int:
        return self.width - 1 - self.exponent_width
