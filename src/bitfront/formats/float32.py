"""Float32: IEEE 754's binary32, what PyTorch computes in. Values of float32 do not change.

Rounding is half to even, and exact from float32 and float64. Values that are too large become infinite, as IEEE 754
says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from bitfront.formats import FORMATS
from bitfront.formats.floating import StandardFloat


@FORMATS.register("float32")
@dataclass(frozen=True)
class Float32(StandardFloat):
    """Single precision (IEEE 754 binary32): what PyTorch computes in, as a format with a name."""

    dtype: ClassVar[torch.dtype] = torch.float32

    @property
    def bits(self) -> int:
        """32."""
        return 32
