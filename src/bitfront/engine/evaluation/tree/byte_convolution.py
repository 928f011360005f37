"""Convolutions of bytes in the tree: oneDNN's kernels take several options of a weight at once.

The step of the input times the step of a weight is a power of two. So the sum of bytes times it is the float32 that the
deployed model computes, as long as that one is exact too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfront import kernels
from bitfront.kernels import onednn


@dataclass(frozen=True, eq=False)
class ByteConvolution:
    """One convolution module with weights in bytes.

    Attributes:
        grid: how its input is rounded: scale, low, high, and what is added, shape (4,).
        kernel: what computes it.
    """

    grid: NDArray[np.float32]
    kernel: onednn.ConvolutionKernel

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
        return cls(grid, onednn.ConvolutionKernel.of(weight, steps, bias, size, int(grid[3]), geometry))

    def __call__(self, x: Tensor) -> Tensor:
        """Bytes of shape (samples, channels in, height, width), channels last in memory → float32, likewise."""
        return self.kernel(x)


def byte_sized(module: Any) -> bool:
    """Whether a module is a convolution of the plain kind."""
    plain = isinstance(module, torch.nn.Conv2d) and module.padding_mode == "zeros" and module.groups == 1
    return plain and not isinstance(module.padding, str)


def exact_bytes() -> bool:
    """Whether inputs can be rounded to bytes here, and convolutions of bytes are exact; where not, the tree computes in
    float."""
    return kernels.compiled() and onednn.exact()
