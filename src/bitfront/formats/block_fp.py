"""Block floating point: whole numbers with an exponent that the values of a block share.

This is MSFP (Darvish Rouhani et al. 2020, Pushing the limits of narrow precision inferencing at cloud scale with
Microsoft floating point). With
E = clamp(⌊log2 max⌋ + 1, −b, 2^e − 1 − b) of the largest absolute value of the block, the value of x is
``clamp(round(x / s), −(2^(w−1) − 1), 2^(w−1) − 1) · s`` with the step s = 2^(E − w + 1), rounding half to even. MASE
takes ⌈log2 max⌉, which is less by one where the largest value is a power of two, and then cuts off that value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, cast

from bitfront.formats import FORMATS
from bitfront.formats.base import FormatError, FormatParameter, OperandKind
from bitfront.formats.blocks import (
    BLOCK_SIZE,
    SizedBlockFormat,
    exchanged_of,
    labelled,
)
from bitfront.kernels.scaled import HIGHEST, LOWEST, ScaledRounding, Unit


@FORMATS.register("block_fp")
@dataclass(frozen=True)
class BlockFloat(SizedBlockFormat):
    """Block floating point: signed whole numbers, and one exponent per block (MSFP)."""

    exponent_width: int
    exponent_bias: int

    parameters: ClassVar[Mapping[str, FormatParameter]] = {
        "width": FormatParameter("bits of a value, sign included", low=2, high=24),
        "exponent_width": FormatParameter("bits of the exponent of a block", low=1, high=8),
        "exponent_bias": FormatParameter(
            "what the stored exponent is larger by; 'NA' is 2^(exponent_width - 1) - 1",
            default=None,
            low=-HIGHEST,
            high=255,
            words=("NA",),
        ),
        "block_size": BLOCK_SIZE,
    }

    @classmethod
    def _build(cls, values: Mapping[str, object], kind: OperandKind, signed: bool) -> Self:  # noqa: ARG003
        width, exponent_width = cast(int, values["width"]), cast(int, values["exponent_width"])
        bias = values["exponent_bias"]
        bias = 2 ** (exponent_width - 1) - 1 if bias is None else cast(int, bias)
        size = cast("tuple[int, ...]", values["block_size"])
        form = cls(width, kind.samples, size, exponent_width, bias, exchanged=exchanged_of(kind))
        low, high = form._steps
        if low > high:
            raise FormatError(
                f"exponent_bias = {bias} leaves no exponent that float32 has in exponent_width = {exponent_width}"
            )
        return form

    @property
    def label(self) -> str:
        """E.g. ``bfp8e8-1x16``; with a bias that is not the default ``bfp8e8b100-1x16``."""
        bias = "" if self.exponent_bias == 2 ** (self.exponent_width - 1) - 1 else f"b{self.exponent_bias}"
        return labelled(f"bfp{self.width}e{self.exponent_width}{bias}", self.block_size)

    @property
    def shared_bits(self) -> int:
        """Those of an exponent."""
        return self.exponent_width

    @property
    def rounding(self) -> ScaledRounding:
        """To multiples of the step of the block."""
        low, high = self._steps
        unit = Unit(2.0 ** (2 - self.width), 2.0**low, 2.0**high)
        return ScaledRounding("multiples", 1.0, 1.0, 2.0 ** (self.width - 1) - 1, unit=unit)

    @property
    def _steps(self) -> tuple[int, int]:
        """The exponents of the smallest and the largest step, of those that float32 can hold."""
        low = -self.exponent_bias - self.width + 1
        return max(low, LOWEST), min(low + 2**self.exponent_width - 1, HIGHEST + 2 - self.width)
