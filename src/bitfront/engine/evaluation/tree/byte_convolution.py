"""Convolutions of bytes: oneDNN's 8-bit kernels, which a processor with VNNI runs several times faster than float32.

Products of an unsigned and a signed byte are added up in 32-bit integers, and the sum times a power of two is the
float32 that the deployed model computes, as long as that one is exact too. Older processors add pairs of products in
16 bits, and saturate: ``exact_bytes`` looks what this one does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfront import kernels


@dataclass(frozen=True, eq=False)
class ByteConvolution:
    """One convolution module with weights in bytes.

    Attributes:
        grid: how its input is rounded: scale, low, high, and what is added, shape (4,).
    """

    grid: NDArray[np.float32]
    _packed: Tensor
    _steps: Tensor
    _zeros: Tensor
    _bias: Tensor | None
    _size: float
    _geometry: tuple[list[int], list[int], list[int]]

    @classmethod
    def of(
        cls, module: Any, weight: Tensor, steps: Tensor, bias: Tensor | None, size: float, grid: NDArray[np.float32]
    ) -> ByteConvolution:
        """
        Args:
            module: whose stride, padding and dilation it has.
            weight: int8, shape (channels out, channels in, height, width).
            steps: of the weights, per output channel.
            size: step of the input.
        """
        geometry = (list(module.stride), list(module.padding), list(module.dilation))
        packed = torch.ops.onednn.qconv_prepack(weight, steps, size, int(grid[3]), *geometry, 1, None)
        zeros = torch.zeros(len(steps), dtype=torch.int32)
        return cls(grid, packed, steps, zeros, bias, size, geometry)

    def __call__(self, x: Tensor) -> Tensor:
        """Bytes of shape (samples, channels in, height, width), channels last in memory → float32, likewise."""
        result: Tensor = torch.ops.onednn.qconv2d_pointwise(
            x,
            self._size,
            int(self.grid[3]),
            self._packed,
            self._steps,
            self._zeros,
            self._bias,
            *self._geometry,
            1,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return result


def byte_sized(module: Any) -> bool:
    """Whether a module is a convolution of the plain kind."""
    plain = isinstance(module, torch.nn.Conv2d) and module.padding_mode == "zeros" and module.groups == 1
    return plain and not isinstance(module.padding, str)


@cache
def exact_bytes() -> bool:
    """Whether convolutions of bytes exist here, and add up exactly, the largest values included."""
    if not kernels.compiled():
        return False
    try:
        generator = torch.Generator().manual_seed(0)
        for depth, offset in ((3, 128), (16, 0), (64, 0)):
            module = torch.nn.Conv2d(depth, 32, 3, padding=1)
            x = torch.randint(0, 256, (2, depth, 9, 9), generator=generator)
            weight = torch.randint(-128, 128, module.weight.shape, generator=generator)
            # Pairs of these overflow 16 bits, in either direction.
            x[:, :, :5], weight[:8], weight[8:16] = 255, 127, -128
            grid = np.array([1, 0, 255, offset], dtype=np.float32)
            convolution = ByteConvolution.of(module, weight.to(torch.int8), torch.full((32,), 0.25), None, 0.5, grid)
            result = convolution(x.to(torch.uint8).contiguous(memory_format=torch.channels_last))
            wanted = torch.conv2d((x - offset).double(), weight.double(), padding=1) / 8
            if not torch.equal(result.double(), wanted):
                return False
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return True
