"""Convolutions of bytes in the tree: one call of oneDNN's kernel computes several options of a weight.

What the kernel scales sums by is a power of two (1, if they are scaled afterwards). So the sum of products of bytes,
times this power of two, is the same float32 that the deployed model computes, whose sum is exact too.
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
    """A convolution with weights in bytes.

    Attributes:
        grid: how its input is rounded: scale, low, high, the offset that is added, divisor and zero, shape (6,).
        kernel: oneDNN's kernel for these weights.
    """

    grid: NDArray[np.float32]
    kernel: onednn.ConvolutionKernel

    @classmethod
    def of(
        cls,
        module: Any,
        weight: Tensor,
        steps: Tensor,
        bias: Tensor | None,
        size: float,
        grid: NDArray[np.float32],
        zero: int,
    ) -> ByteConvolution:
        """Prepare the kernel of a convolution.

        Args:
            module: the convolution module that gives stride, padding and dilation.
            weight: int8, shape (channels out, channels in, height, width).
            steps: the steps of the weights, float32, shape (channels out,).
            bias: float32, shape (channels out,); None if there is no bias.
            size: the step of the input.
            grid: as the attribute.
            zero: the byte of the input's value 0.
        """
        geometry = (list(module.stride), list(module.padding), list(module.dilation))
        return cls(grid, onednn.ConvolutionKernel.of(weight, steps, bias, size, zero, geometry))

    def __call__(self, x: Tensor) -> Tensor:
        """Bytes of shape (samples, channels in, height, width), channels last in memory → float32, likewise."""
        return self.kernel(x)


def byte_sized(module: Any) -> bool:
    """Whether a module is a two-dimensional convolution with zero padding and without groups."""
    plain = isinstance(module, torch.nn.Conv2d) and module.padding_mode == "zeros" and module.groups == 1
    return plain and not isinstance(module.padding, str)


def exact_bytes() -> bool:
    """Whether this machine can round inputs to bytes and its convolutions of bytes are exact. If not, the tree computes
    convolutions in float."""
    return kernels.compiled() and onednn.exact()
