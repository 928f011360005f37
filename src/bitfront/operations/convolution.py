"""Convolutions and their transposes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfront.operations.base import DATA_IN, Call, Count, Merge, classes, define, products, weighted
from bitfront.operations.dense import BIAS, WEIGHT


def _convolve(module: nn.Module, operands: Mapping[str, Tensor | None]) -> Tensor:
    own: Any = module
    result: Tensor = own._conv_forward(operands["data_in"], operands["weight"], operands.get("bias"))
    return result


def _transposed(call: Call) -> Count:
    # Every input value is multiplied by each of the weights that lead from its channel.
    return products(call.n * math.prod(call.shape(1, "weight")[1:]))


_SITE: dict[str, Any] = {
    "operands": (DATA_IN, WEIGHT, BIAS),
    "count": weighted,
    "call": _convolve,
    "merge": Merge("convolution"),
    "kernel": "convolution",
}
CONV1D = define(
    "conv1d",
    "Convolution over one dimension.",
    modules=(nn.Conv1d,),
    functions=(F.conv1d, torch.conv1d),
    names=("conv1d",),
    output_channels=-2,
    **_SITE,
)
CONV2D = define(
    "conv2d",
    "Convolution over two dimensions.",
    modules=(nn.Conv2d,),
    functions=(F.conv2d, torch.conv2d),
    names=("conv2d",),
    output_channels=-3,
    **_SITE,
)
CONV3D = define("conv3d", "Convolution over three dimensions.", modules=(nn.Conv3d,), names=("conv3d",), count=weighted)
CONV_TRANSPOSE = define(
    "conv_transpose",
    "Transposed convolution.",
    modules=classes("ConvTranspose1d ConvTranspose2d ConvTranspose3d"),
    names=("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    count=_transposed,
)
