"""Minifloats that are built as IEEE 754 builds its numbers, but with no code for infinity and NaN.

With m bits of mantissa and bias b, an exponent code E > 0 and a mantissa code M mean ±2^(E − b) · (1 + M / 2^m). E = 0
means ±2^(1 − b) · M / 2^m, a subnormal number. E with all bits set is an exponent like any other.
``docs/formats.md`` names the published formats that have these values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bitfront.formats import FORMATS
from bitfront.formats.minifloat import Minifloat


@FORMATS.register("minifloat_ieee")
@dataclass(frozen=True)
class MinifloatIeee(Minifloat):
    """Floating point of few bits with subnormal numbers and without infinities: FP8, FP6, FP4."""

    hidden: ClassVar[int] = 1

    @property
    def label(self) -> str:
        """E.g. ``e4m3``, ``e4m3.b5`` with another than the standard bias, ``e4m3.auto`` before calibration."""
        return self._parts()
