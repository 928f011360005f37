"""Products of 8-bit integers by oneDNN. A processor with VNNI computes them several times faster than float32.

Products of an input byte and a signed weight byte are added up in 32-bit integers; the sum times the two steps is a
float32. Torch calls oneDNN through operators that are not documented and may change. They are called only here, and
``exact`` tests whether they exist and give the right results: older processors add pairs of products in 16 bits, which
can saturate. If it returns False, callers compute in float.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

#: Stride, padding and dilation of a convolution, each (down, across).
Geometry = tuple[Sequence[int], Sequence[int], Sequence[int]]
#: The result: scale 1, zero point 0, float32, nothing applied to it.
_AS_FLOAT: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")


@dataclass(frozen=True, eq=False)
class _Kernel:
    """The common part of a linear layer and a convolution of bytes.

    Attributes:
        scale: step of the input.
        zero: the input's zero point.
    """

    scale: float
    zero: int
    _weight: Tensor
    _steps: Tensor
    _zeros: Tensor
    _bias: Tensor | None


@dataclass(frozen=True, eq=False)
class LinearKernel(_Kernel):
    """A linear layer."""

    @classmethod
    def of(cls, weight: Tensor, steps: Tensor, bias: Tensor | None, scale: float, zero: int) -> LinearKernel:
        """
        Args:
            weight: int8, shape (out, in).
            steps: steps of the weight, float32, shape (out,).
            bias: float32, shape (out,).
        """
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        return cls(scale, zero, packed, steps, torch.zeros(len(steps), dtype=torch.int32), bias)

    def __call__(self, x: Tensor) -> Tensor:
        """int8 or uint8, shape (samples, in) → float32, shape (samples, out)."""
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            x, self.scale, self.zero, self._weight, self._steps, self._zeros, self._bias, *_AS_FLOAT
        )
        return out


@dataclass(frozen=True, eq=False)
class ConvolutionKernel(_Kernel):
    """A convolution over two dimensions, padded with the input's zero point."""

    _geometry: Geometry
    _groups: int

    @classmethod
    def of(
        cls,
        weight: Tensor,
        steps: Tensor,
        bias: Tensor | None,
        scale: float,
        zero: int,
        geometry: Geometry,
        groups: int = 1,
    ) -> ConvolutionKernel:
        """
        Args:
            weight: int8, shape (channels out, channels in / groups, height, width).
            steps: steps of the weight, float32, shape (channels out,).
            bias: float32, shape (channels out,).
        """
        packed = torch.ops.onednn.qconv_prepack(weight, steps, scale, zero, *geometry, groups, None)
        zeros = torch.zeros(len(steps), dtype=torch.int32)
        return cls(scale, zero, packed, steps, zeros, bias, geometry, groups)

    def __call__(self, x: Tensor) -> Tensor:
        """uint8, shape (samples, channels in, height, width), channels last in memory → float32, the same layout."""
        out: Tensor = torch.ops.onednn.qconv2d_pointwise(
            x, self.scale, self.zero, self._weight, self._steps, self._zeros, self._bias, *self._geometry, self._groups,
            *_AS_FLOAT,
        )  # fmt: skip
        return out


@cache
def exact() -> bool:
    """Whether products of bytes exist on this machine and are summed exactly, also for the largest values."""
    generator = torch.Generator().manual_seed(0)

    def bytes_of(*shape: int) -> tuple[Tensor, Tensor]:
        x = torch.randint(0, 256, (4, *shape[1:]), generator=generator)
        weight = torch.randint(-128, 128, shape, generator=generator)
        # Pairs of these overflow 16 bits, in either direction.
        x[:2], weight[:2], weight[2:4] = 255, 127, -128
        return x, weight

    steps = torch.full((32,), 0.25)
    try:
        for zero in (0, 128):
            x, weight = bytes_of(32, 64)
            linear = LinearKernel.of(weight.to(torch.int8), steps, None, 0.5, zero)
            if not torch.equal(linear(x.to(torch.uint8)).double(), (x - zero).double() @ weight.double().T / 8):
                return False
        for depth, zero, groups in ((3, 128, 1), (16, 0, 1), (64, 0, 1), (64, 128, 4)):
            _, weight = bytes_of(32, depth // groups, 3, 3)
            x, _ = bytes_of(32, depth, 9, 9)
            geometry = ((1, 1), (1, 1), (1, 1))
            convolution = ConvolutionKernel.of(weight.to(torch.int8), steps, None, 0.5, zero, geometry, groups)
            out = convolution(x.to(torch.uint8).contiguous(memory_format=torch.channels_last))
            wanted = torch.conv2d((x - zero).double(), weight.double(), padding=1, groups=groups) / 8
            if not torch.equal(out.double(), wanted):
                return False
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return True
