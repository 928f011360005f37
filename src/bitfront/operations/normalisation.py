"""Norms: by running statistics, by those of a sample, and to unit length."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bitfront.errors import ExportError
from bitfront.operations.base import DATA_IN, Merge, Operands, OperandSpec, classes, define, per_input
from bitfront.operations.channels import per_channel
from bitfront.operations.integers import IntegerReader, Numbers
from bitfront.operations.layout import ChannelCall, ChannelFollower, Layout
from bitfront.operations.onnx import OnnxWriter
from bitfront.operations.training import ProgramReader, UnsupportedError, for_modules


def _parameters(first: int) -> tuple[OperandSpec, OperandSpec]:
    """The weight and the bias of a norm, whose places among the arguments of its function begin with `first`."""
    return (
        OperandSpec("weight", "weight", first, "weight", channel_axis=0),
        OperandSpec("bias", "bias", first + 1, "bias", channel_axis=0),
    )


def _call_batch_norm(module: nn.Module, operands: Operands) -> Tensor:
    """As ``nn.BatchNorm2d.forward``, the moving averages in training included."""
    norm: Any = module
    x = operands["data_in"]
    norm._check_input_dim(x)
    average = 0.0 if norm.momentum is None else norm.momentum
    tracks = norm.training and norm.track_running_stats
    if tracks and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        average = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    of_batch = norm.training or (norm.running_mean is None and norm.running_var is None)
    known = not norm.training or norm.track_running_stats
    mean, variance = (norm.running_mean, norm.running_var) if known else (None, None)
    return F.batch_norm(x, mean, variance, operands.get("weight"), operands.get("bias"), of_batch, average, norm.eps)


def _call_layer_norm(module: nn.Module, operands: Operands) -> Tensor:
    norm: Any = module
    return F.layer_norm(
        operands["data_in"], norm.normalized_shape, operands.get("weight"), operands.get("bias"), norm.eps
    )


def _call_rms_norm(module: nn.Module, operands: Operands) -> Tensor:
    norm: Any = module
    return F.rms_norm(operands["data_in"], norm.normalized_shape, operands.get("weight"), norm.eps)


def _call_group_norm(module: nn.Module, operands: Operands) -> Tensor:
    norm: Any = module
    return F.group_norm(operands["data_in"], norm.num_groups, operands.get("weight"), operands.get("bias"), norm.eps)


def _call_instance_norm(module: nn.Module, operands: Operands) -> Tensor:
    """As ``nn.InstanceNorm2d.forward``, whose input may lack the samples."""
    norm: Any = module
    x = operands["data_in"]
    norm._check_input_dim(x)
    alone = x.dim() == norm._get_no_batch_dim()
    normed = F.instance_norm(
        x.unsqueeze(0) if alone else x,
        norm.running_mean,
        norm.running_var,
        operands.get("weight"),
        operands.get("bias"),
        norm.training or not norm.track_running_stats,
        norm.momentum if norm.momentum is not None else 0.0,
        norm.eps,
    )
    return normed.squeeze(0) if alone else normed


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
    if reader.formatted(path):
        raise UnsupportedError(f"{path} is a {type(module).__name__} in formats")
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


def _lower_batch_norm(r: IntegerReader, n: fx.Node) -> Numbers:
    raise r.refuse(
        n, "a batch norm in float; fold it into the layer before it (fold_batch_norm = true), and search that network"
    )


BATCH_NORM = define(
    "batch_norm",
    "Batch norm; in evaluation a product and a sum per channel.",
    modules=(nn.BatchNorm1d, nn.BatchNorm2d),
    names=("batch_norm",),
    operands=(DATA_IN, *_parameters(3)),
    by_default=False,
    count=per_input(4),
    call=_call_batch_norm,
    merge=Merge("norm"),
    train=for_modules(_train_batch_norm),
    onnx=_write_batch_norm,
    integers=_lower_batch_norm,
    channels=_by_channel,
)
BATCH_NORM_3D = define(
    "batch_norm3d",
    "Batch norm of volumes.",
    modules=(nn.BatchNorm3d,),
    operands=(DATA_IN, *_parameters(3)),
    by_default=False,
    count=per_input(4),
    call=_call_batch_norm,
    channels=_by_channel,
)
SYNC_BATCH_NORM = define(
    "sync_batch_norm",
    "Batch norm that is synchronised over processes.",
    modules=(nn.SyncBatchNorm,),
    count=per_input(4),
    channels=_by_channel,
)
# These take their arguments in another order than the functions of torch.nn.functional that have the same names.
ATEN_NORM = define(
    "native_batch_norm",
    "Batch norm and instance norm as torch.batch_norm and torch.instance_norm.",
    functions=(torch.batch_norm, torch.instance_norm),
    names=("native_batch_norm",),
    count=per_input(4),
)
LAYER_NORM = define(
    "layer_norm",
    "Layer norm.",
    modules=(nn.LayerNorm,),
    names=("layer_norm",),
    operands=(DATA_IN, *_parameters(2)),
    by_default=False,
    count=per_input(5),
    call=_call_layer_norm,
    channels=_by_layer,
    onnx=_write_layer_norm,
)
GROUP_NORM = define(
    "group_norm",
    "Norm over groups of channels.",
    modules=(nn.GroupNorm,),
    names=("group_norm",),
    operands=(DATA_IN, *_parameters(2)),
    by_default=False,
    count=per_input(5),
    call=_call_group_norm,
    channels=_by_group,
)
INSTANCE_NORM = define(
    "instance_norm",
    "Norm of each channel of a sample.",
    modules=classes("InstanceNorm1d InstanceNorm2d InstanceNorm3d"),
    names=("instance_norm",),
    operands=(DATA_IN, *_parameters(3)),
    by_default=False,
    count=per_input(5),
    call=_call_instance_norm,
    channels=_by_channel,
)
RMS_NORM = define(
    "rms_norm",
    "Root-mean-square norm.",
    modules=(nn.RMSNorm,),
    names=("rms_norm",),
    operands=(DATA_IN, _parameters(2)[0]),
    by_default=False,
    count=per_input(4),
    call=_call_rms_norm,
)
NORMALIZE = define("normalize", "Scaling to unit length.", names=("normalize",), count=per_input(3))
NORM = define("norm", "Length of a vector.", names=("norm",), count=per_input(2))
