"""Convolutions and their transposes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfront.operations.base import DATA_IN, Call, Count, Merge, classes, define, products, weighted
from bitfront.operations.dense import BIAS, WEIGHT, weight_and_bias
from bitfront.operations.layout import ChannelCall, ChannelFollower, Layout


def _convolve(module: nn.Module, operands: Mapping[str, Tensor | None]) -> Tensor:
    own: Any = module
    result: Tensor = own._conv_forward(operands["data_in"], operands["weight"], operands.get("bias"))
    return result


def _transposed(call: Call) -> Count:
    # Every input value is multiplied by each of the weights that lead from its channel.
    return products(call.n * math.prod(call.shape(1, "weight")[1:]))


def _channels(flow: ChannelFollower, call: ChannelCall) -> Layout | None:
    """x (batch, in, ...), weight (out, in / groups, ...), bias (out)."""
    x, held = call.tensor, weight_and_bias(flow, call)
    if x is None or held is None or call.shape is None or len(x.dims) != len(held[0].dims):
        return None
    (weight, bias), channels = held, x.dims[1]
    outgoing, inner, *kernel = weight.dims
    groups = call.argument(6, "groups", 1) if call.module is None else call.module.groups
    if not isinstance(groups, int):
        return None
    depthwise = groups == flow.size(channels) and groups > 1
    if depthwise and call.module is None:
        return None  # the number of groups that the function is given would have to change with the width
    if depthwise:
        followed = flow.repeat(weight, channels, outgoing)
        flow.fix(inner, "is depthwise")
        flow.remember("groups", channels)
    else:
        followed = flow.contract(weight, 1, channels, outgoing, groups)
    if not followed:
        return None
    for dim in (x.dims[0], *x.dims[2:], *kernel):
        flow.fix(dim, "slides over it")
    if bias is not None:
        flow.unify(bias.dims[0], outgoing)
    flow.remember("in_channels", channels)
    flow.remember("out_channels", outgoing)
    return Layout((x.dims[0], outgoing, *flow.new(call.shape[2:])))


_SITE: dict[str, Any] = {
    "operands": (DATA_IN, WEIGHT, BIAS),
    "count": weighted,
    "call": _convolve,
    "merge": Merge("convolution"),
    "kernel": "convolution",
    "channels": _channels,
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
CONV3D = define(
    "conv3d",
    "Convolution over three dimensions.",
    modules=(nn.Conv3d,),
    names=("conv3d",),
    count=weighted,
    channels=_channels,
)
CONV_TRANSPOSE = define(
    "conv_transpose",
    "Transposed convolution.",
    modules=classes("ConvTranspose1d ConvTranspose2d ConvTranspose3d"),
    names=("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    count=_transposed,
)
