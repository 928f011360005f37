"""BFloat16: the upper half of a float32, with 8 bits of exponent and 7 of mantissa.

Rounding is half to even, and exact from float32 and float64. Values that are too large become infinite, as IEEE 754
says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from bitfront.formats import FORMATS
from bitfront.formats.floating import StandardFloat


@FORMATS.register("bfloat16")
@dataclass(frozen=True)
class BFloat16(StandardFloat):
    """The upper half of a float32: 8 bits of exponent, 7 of mantissa, up to 3.4e38."""

    dtype: ClassVar[torch.dtype] = torch.bfloat16

    @property
    def bits(self) -> int:
        """16."""
        return 16
