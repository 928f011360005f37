"""Norms: by running statistics, by those of a sample, and to unit length."""

from __future__ import annotations

from torch import nn

from bitfront.operations.base import Merge, classes, define, per_input

BATCH_NORM = define(
    "batch_norm",
    "Batch norm; in evaluation a product and a sum per channel.",
    modules=(nn.BatchNorm1d, nn.BatchNorm2d),
    names=("batch_norm",),
    count=per_input(4),
    merge=Merge("norm"),
)
BATCH_NORM_3D = define(
    "batch_norm3d",
    "Batch norm of volumes, or synchronised over processes.",
    modules=(nn.BatchNorm3d, nn.SyncBatchNorm),
    count=per_input(4),
)
LAYER_NORM = define("layer_norm", "Layer norm.", modules=(nn.LayerNorm,), names=("layer_norm",), count=per_input(5))
GROUP_NORM = define(
    "group_norm", "Norm over groups of channels.", modules=(nn.GroupNorm,), names=("group_norm",), count=per_input(5)
)
INSTANCE_NORM = define(
    "instance_norm",
    "Norm of each channel of a sample.",
    modules=classes("InstanceNorm1d InstanceNorm2d InstanceNorm3d"),
    names=("instance_norm",),
    count=per_input(5),
)
RMS_NORM = define("rms_norm", "Root-mean-square norm.", modules=(nn.RMSNorm,), names=("rms_norm",), count=per_input(4))
NORMALIZE = define("normalize", "Scaling to unit length.", names=("normalize",), count=per_input(3))
NORM = define("norm", "Length of a vector.", names=("norm",), count=per_input(2))
