"""Float16: IEEE 754's binary16, with 5 bits of exponent and 10 of mantissa.

Rounding is half to even, and exact from float32 and float64. Values that are too large become infinite, as IEEE 754
says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from bitfront.formats import FORMATS
from bitfront.formats.floating import StandardFloat


@FORMATS.register("float16")
@dataclass(frozen=True)
class Float16(StandardFloat):
    """Half precision (IEEE 754 binary16): 5 bits of exponent, 10 of mantissa, up to 65,504."""

    dtype: ClassVar[torch.dtype] = torch.float16

    @property
    def bits(self) -> int:
        """16."""
        return 16
