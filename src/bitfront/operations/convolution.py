"""Convolutions and their transposes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bitfront import kernels
from bitfront.errors import ExportError
from bitfront.operations.base import DATA_IN, Call, Count, Merge, Operands, Product, define, products, weighted
from bitfront.operations.dense import BIAS, WEIGHT, weight_and_bias
from bitfront.operations.layout import ChannelCall, ChannelFollower, Layout
from bitfront.operations.onnx import OnnxWriter, Packed, many
from bitfront.operations.training import ProgramReader, SlidingWindow, UnsupportedError, for_modules, slid

#: Values of windows that exist at a time: 64 MB.
WINDOW_VALUES = 2**24


def _convolve(module: nn.Module, operands: Operands) -> Tensor:
    convolution: Any = module
    result: Tensor = convolution._conv_forward(operands["data_in"], operands["weight"], operands.get("bias"))
    return result


def _ordered(module: nn.Module | None, x: Tensor, weight: Tensor) -> Tensor | None:
    """A convolution as products of its windows; some samples at a time, because windows take memory."""
    if module is None:
        return None
    convolution: Any = module
    mode = convolution.padding_mode
    spatial = weight.dim() - 2
    batch = x if x.dim() == spatial + 2 else x[None]
    padding = convolution._reversed_padding_repeated_twice
    padded = F.pad(batch, padding, mode="constant" if mode == "zeros" else mode)
    spans = [d * (k - 1) + 1 for d, k in zip(convolution.dilation, weight.shape[2:], strict=True)]
    sizes = [(n - span) // s + 1 for n, span, s in zip(padded.shape[2:], spans, convolution.stride, strict=True)]
    groups, inner, places = convolution.groups, math.prod(weight.shape[1:]), math.prod(sizes)
    parts = []
    for samples in torch.split(padded, max(1, WINDOW_VALUES // max(1, inner * groups * places))):
        windows = []
        for offset in itertools.product(*map(range, weight.shape[2:])):
            steps = zip(offset, convolution.dilation, convolution.stride, sizes, strict=True)
            cut = [slice(o * d, o * d + (n - 1) * s + 1, s) for o, d, s, n in steps]
            windows.append(samples[(slice(None), slice(None), *cut)].flatten(2))
        columns = torch.stack(windows, dim=2).reshape(len(samples) * groups, inner, places)
        rows = weight.reshape(groups, -1, inner)
        rows = rows.repeat(len(samples), 1, 1) if groups > 1 else rows[0]
        parts.append(kernels.ordered(rows, columns).reshape(len(samples), len(weight), *sizes))
    out = torch.cat(parts)
    return out if x.dim() == spatial + 2 else out[0]


def _convolve_transposed(module: nn.Module, operands: Operands) -> Tensor:
    m: Any = module
    x, dims = operands["data_in"], len(m.kernel_size)
    output_size = operands.args[1] if len(operands.args) > 1 else operands.kwargs.get("output_size")
    more = m._output_padding(x, output_size, m.stride, m.padding, m.kernel_size, dims, m.dilation)
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
    bias = operands.get("bias")
    return function(x, operands["weight"], bias, m.stride, m.padding, more, m.groups, m.dilation)


def _transposed(call: Call) -> Count:
    # Every input value is multiplied by each of the weights that lead from its channel.
    return products(call.n * math.prod(call.shape(1, "weight")[1:]))


def _geometry(w: OnnxWriter, n: fx.Node) -> dict[str, Any]:
    """Attributes of ONNX's Conv and ConvInteger."""
    spatial, mode = w.out.dim() - 2, w.setting(n, 7, "padding_mode", "zeros")
    if mode != "zeros":
        raise ExportError(f"{n.name} ({w.kind(n)}): padding_mode {mode!r}")
    kernel = w.weight_shape(n)[2:]
    dilation = many(w.setting(n, 5, "dilation", 1), spatial)
    padding = w.setting(n, 4, "padding", 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        pads = list(many(0 if padding == "valid" else padding, spatial)) * 2
    return {
        "kernel_shape": kernel,
        "strides": many(w.setting(n, 3, "stride", 1), spatial),
        "pads": pads,
        "dilations": dilation,
        "group": w.setting(n, 6, "groups", 1),
    }


def _write_transposed(w: OnnxWriter, n: fx.Node) -> str:
    spatial = w.out.dim() - 2
    module = w.module_of(n)
    if module is not None and (len(n.args) > 1 or n.kwargs.get("output_size") is not None):
        raise ExportError(f"{n.name} ({w.kind(n)}): output_size")
    inputs, bias = [w.value(n), w.weights(n)], w.bias(n)
    if bias is not None:
        inputs.append(w.constant(f"{n.name}.bias", bias))
    return w.add(
        "ConvTranspose",
        inputs,
        n.name,
        kernel_shape=w.weight_shape(n)[2:],
        strides=many(w.setting(n, 3, "stride", 1), spatial),
        pads=many(w.setting(n, 4, "padding", 0), spatial) * 2,
        output_padding=many(w.setting(n, 5, "output_padding", 0), spatial),
        group=w.setting(n, 6, "groups", 1),
        dilations=many(w.setting(n, 7, "dilation", 1), spatial),
    )


def _write(w: OnnxWriter, n: fx.Node) -> str:
    geometry = _geometry(w, n)
    if w.integer(n):
        bias = w.bias(n)
        data, weight = w.packed(n), w.packed_weight(n, one_zero=True)
        inputs = [data.name, weight.name, data.zero, weight.zero]
        sums = w.add("ConvInteger", inputs, f"{n.name}.integer", **geometry)
        per_channel = (1, -1, *[1] * (w.out.dim() - 2))
        scale = data.held.scale * weight.held.scale
        scale = scale if weight.held.axis is None else scale.reshape(per_channel)
        return w.scaled(n, sums, scale, None if bias is None else bias.reshape(per_channel))
    inputs = [w.value(n), w.weights(n)]
    if (added := w.bias_of(n, inputs[0])) is not None:
        inputs.append(added)
    return w.add("Conv", inputs, n.name, **geometry)


def _one_zero(packed: Mapping[str, Packed]) -> str:
    return "its weights have a zero point per channel" if len(np.unique(packed["weight"].zero)) > 1 else ""


def _train(reader: ProgramReader, source: fx.Node, module: Any, path: str) -> int:
    value, dims = reader.rounded(source, path), module.weight.dim() - 2
    if module.padding_mode != "zeros":
        raise UnsupportedError(f"{path} pads with other values than zeros ({module.padding_mode})")
    # torch's order: the last dimension first, before and behind.
    both = module._reversed_padding_repeated_twice
    if both[::2] != both[1::2]:
        raise UnsupportedError(f"{path} pads one side more than the other (padding = 'same')")
    sizes = (module.kernel_size, module.stride, tuple(both[::-2]), module.dilation)
    window = SlidingWindow(*(many(size, dims) for size in sizes))
    shape = (module.out_channels, *slid(reader.shape(value), window, path))
    return reader.emit("conv", (value,), shape, path=path, window=window, groups=module.groups)


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
        return None  # the number of groups, an argument of the function, would have to change with the width
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
    "onnx": _write,
    "integers": lambda r, n: r.product(n, spatial=True),
    "onnx_integer": _one_zero,
    "kernel": "convolution",
    "channels": _channels,
}
CONV1D = define(
    "conv1d",
    "Convolution over one dimension.",
    modules=(nn.Conv1d,),
    functions=(F.conv1d, torch.conv1d),
    names=("conv1d",),
    product=Product(_ordered, output=-2),
    train=for_modules(_train),
    **_SITE,
)
CONV2D = define(
    "conv2d",
    "Convolution over two dimensions.",
    modules=(nn.Conv2d,),
    functions=(F.conv2d, torch.conv2d),
    names=("conv2d",),
    product=Product(_ordered, output=-3),
    train=for_modules(_train),
    **_SITE,
)
CONV3D = define(
    "conv3d",
    "Convolution over three dimensions.",
    modules=(nn.Conv3d,),
    functions=(F.conv3d, torch.conv3d),
    names=("conv3d",),
    product=Product(_ordered, output=-4),
    **(_SITE | {"kernel": None}),
)
#: A transposed convolution has its weight as (channels in, channels out / groups, ...).
_TRANSPOSED: dict[str, Any] = {
    "operands": (DATA_IN, replace(WEIGHT, channel_axis=1), BIAS),
    "count": _transposed,
    "call": _convolve_transposed,
    "onnx": _write_transposed,
}
CONV_TRANSPOSE1D = define(
    "conv_transpose1d",
    "Transposed convolution over one dimension.",
    modules=(nn.ConvTranspose1d,),
    names=("conv_transpose1d",),
    product=Product(channels=1, output=-2),
    **_TRANSPOSED,
)
CONV_TRANSPOSE2D = define(
    "conv_transpose2d",
    "Transposed convolution over two dimensions.",
    modules=(nn.ConvTranspose2d,),
    names=("conv_transpose2d",),
    product=Product(channels=1, output=-3),
    **_TRANSPOSED,
)
CONV_TRANSPOSE3D = define(
    "conv_transpose3d",
    "Transposed convolution over three dimensions.",
    modules=(nn.ConvTranspose3d,),
    names=("conv_transpose3d",),
    product=Product(channels=1, output=-4),
    **_TRANSPOSED,
)
