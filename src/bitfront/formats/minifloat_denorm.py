"""Minifloats whose leading 1 is stored like any other bit.

An exponent code E and a mantissa code M mean ±2^(E − b) · M / 2^m, for every E. The mantissa is not normalised, so
hardware needs no case for subnormal numbers, and a value may have several codes. It has one binary digit less than a
minifloat of IEEE's kind with as many bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bitfront.formats import FORMATS
from bitfront.formats.minifloat import Minifloat


@FORMATS.register("minifloat_denorm")
@dataclass(frozen=True)
class MinifloatDenorm(Minifloat):
    """Floating point of few bits whose mantissa is a plain fraction, without a leading 1 that is not stored."""

    hidden: ClassVar[int] = 0

    @property
    def label(self) -> str:
        """E.g. ``denorm-e4m3``; a bias is said as by ``minifloat_ieee``."""
        return f"denorm-{self._parts()}"
