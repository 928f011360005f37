"""Norms: by running statistics, by those of a sample, and to unit length."""

from __future__ import annotations

import numpy as np
from torch import fx, nn

from bitfront.errors import ExportError
from bitfront.operations.base import Merge, classes, define, per_input
from bitfront.operations.channels import per_channel
from bitfront.operations.layout import ChannelCall, ChannelFollower, Layout
from bitfront.operations.onnx import OnnxWriter
from bitfront.operations.training import ProgramReader, UnsupportedError, for_modules


def _write_batch_norm(w: OnnxWriter, n: fx.Node) -> str:
    mean, variance = w.parameter(n, 1, "running_mean"), w.parameter(n, 2, "running_var")
    if mean is None or variance is None or w.setting(n, 5, "training", False):
        raise ExportError(f"{n.name} ({w.kind(n)}): without running statistics")
    weight, bias = w.parameter(n, 3, "weight"), w.parameter(n, 4, "bias")
    channels = w.source(n).shape[1]
    weight = weight or w.constant(f"{n.name}.weight", np.ones(channels, np.float32))
    bias = bias or w.constant(f"{n.name}.bias", np.zeros(channels, np.float32))
    inputs = [w.value(n), weight, bias, mean, variance]
    return w.add("BatchNormalization", inputs, n.name, epsilon=w.setting(n, 7, "eps", 1e-5))


def _train_batch_norm(reader: ProgramReader, source: fx.Node, module: nn.BatchNorm1d, path: str) -> int:
    value = reader.value(source)
    if module.momentum is None or not module.track_running_stats:
        raise UnsupportedError(f"{path} keeps no moving averages of its statistics")
    if len(reader.shape(value)) != (3 if isinstance(module, nn.BatchNorm2d) else 1):
        raise UnsupportedError(f"{path} is applied to values of shape {reader.shape(value)}")
    return reader.emit("norm", (value,), reader.shape(value), path=path)


def _write_layer_norm(w: OnnxWriter, n: fx.Node) -> str:
    shape = tuple(w.setting(n, 1, "normalized_shape"))
    weight, bias = w.parameter(n, 2, "weight"), w.parameter(n, 3, "bias")
    inputs = [w.value(n), weight or w.constant(f"{n.name}.weight", np.ones(shape, np.float32))]
    inputs += [] if bias is None else [bias]
    return w.add("LayerNormalization", inputs, n.name, axis=-len(shape), epsilon=w.setting(n, 4, "eps", 1e-5))


def _by_channel(flow: ChannelFollower, call: ChannelCall) -> Layout | None:
    """Channels are independent of each other."""
    x = call.tensor
    if x is None or call.module is None or len(x.dims) < 2:
        return None
    return per_channel(flow, x, "num_features", call.held().values())


def _by_group(flow: ChannelFollower, call: ChannelCall) -> Layout | None:
    """Statistics over equal groups of channels."""
    x, module = call.tensor, call.module
    if x is None or not isinstance(module, nn.GroupNorm) or len(x.dims) < 2:
        return None
    flow.take_statistics([x.dims[1]])
    if module.num_groups != 1:
        flow.cut(x.dims[1], module.num_groups)
    return per_channel(flow, x, "num_channels", call.held().values())


def _by_layer(flow: ChannelFollower, call: ChannelCall) -> Layout | None:
    """Statistics over the last dimensions; the parameters have one value for each value in them."""
    x, module = call.tensor, call.module
    if x is None or not isinstance(module, nn.LayerNorm):
        return None
    over = x.dims[-len(module.normalized_shape) :]
    flow.take_statistics(over)
    flow.remember("normalized_shape", *over)
    for tensor in call.held().values():
        for mine, theirs in zip(flow.hold_values(tensor).dims, over, strict=True):
            flow.unify(mine, theirs)
    return Layout(x.dims)


BATCH_NORM = define(
    "batch_norm",
    "Batch norm; in evaluation a product and a sum per channel.",
    modules=(nn.BatchNorm1d, nn.BatchNorm2d),
    names=("batch_norm",),
    count=per_input(4),
    merge=Merge("norm"),
    train=for_modules(_train_batch_norm),
    onnx=_write_batch_norm,
    channels=_by_channel,
)
BATCH_NORM_3D = define(
    "batch_norm3d",
    "Batch norm of volumes, or synchronised over processes.",
    modules=(nn.BatchNorm3d, nn.SyncBatchNorm),
    count=per_input(4),
    channels=_by_channel,
)
LAYER_NORM = define(
    "layer_norm",
    "Layer norm.",
    modules=(nn.LayerNorm,),
    names=("layer_norm",),
    count=per_input(5),
    channels=_by_layer,
    onnx=_write_layer_norm,
)
GROUP_NORM = define(
    "group_norm",
    "Norm over groups of channels.",
    modules=(nn.GroupNorm,),
    names=("group_norm",),
    count=per_input(5),
    channels=_by_group,
)
INSTANCE_NORM = define(
    "instance_norm",
    "Norm of each channel of a sample.",
    modules=classes("InstanceNorm1d InstanceNorm2d InstanceNorm3d"),
    names=("instance_norm",),
    count=per_input(5),
    channels=_by_channel,
)
RMS_NORM = define("rms_norm", "Root-mean-square norm.", modules=(nn.RMSNorm,), names=("rms_norm",), count=per_input(4))
NORMALIZE = define("normalize", "Scaling to unit length.", names=("normalize",), count=per_input(3))
NORM = define("norm", "Length of a vector.", names=("norm",), count=per_input(2))
