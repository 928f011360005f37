"""Pooling over windows, over whole images, and reductions; resampling of images."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import nn

from bitfront.operations.base import Call, Count, Merge, classes, define, per_input
from bitfront.operations.channels import mixing, spatial, windows
from bitfront.operations.layout import ChannelCall, ChannelFollower, Layout, is_constant


def _windows(call: Call) -> Count:
    """One operation per value under the window."""
    window = call.argument(1, "kernel_size", 1)
    name = call.op if call.module is None else type(call.module).__name__
    dims = next(int(c) for c in reversed(name) if c.isdigit())
    return Count(call.out * (math.prod(window) if isinstance(window, (tuple, list)) else int(window) ** dims))


def _interpolated(call: Call) -> Count | None:
    taps = {"nearest": 0, "nearest-exact": 0, "linear": 2, "bilinear": 4, "trilinear": 8, "bicubic": 16}
    mode = call.argument(3, "mode", "nearest")
    if mode == "area":
        return Count(call.n)
    return Count(call.out * taps[mode]) if mode in taps else None


def _reduction(flow: ChannelFollower, call: ChannelCall) -> Layout | None:
    x = call.tensor
    given = dict(zip(("dim", "keepdim"), call.args[1:], strict=False)) | dict(call.kwargs)
    dims: Any = given.get("dim")
    if x is None or not given.keys() <= {"dim", "keepdim", "dtype"} or not is_constant(dims):
        return None
    return mixing(flow, x, None if dims in ((), []) else dims, bool(given.get("keepdim")))


def _resampling(flow: ChannelFollower, call: ChannelCall) -> Layout | None:
    x = call.tensor
    return spatial(flow, x, call) if x is not None and len(x.dims) > 2 and call.constant else None


# F's max pools are made by one factory, and all have its name.
MAX_POOL1D = define(
    "max_pool1d",
    "Largest value of a window, over one dimension.",
    modules=(nn.MaxPool1d,),
    functions=(F.max_pool1d,),
    names=("max_pool1d",),
    count=_windows,
    channels=windows,
    merge=Merge("selection"),
)
MAX_POOL2D = define(
    "max_pool2d",
    "Largest value of a window, over two dimensions.",
    modules=(nn.MaxPool2d,),
    functions=(F.max_pool2d,),
    names=("max_pool2d",),
    count=_windows,
    channels=windows,
    merge=Merge("selection"),
)
MAX_POOL3D = define(
    "max_pool3d",
    "Largest value of a window, over three dimensions.",
    modules=(nn.MaxPool3d,),
    functions=(F.max_pool3d,),
    names=("max_pool3d",),
    count=_windows,
    channels=windows,
)
AVERAGE_POOL = define(
    "avg_pool",
    "Mean of a window.",
    modules=classes("AvgPool1d AvgPool2d AvgPool3d"),
    names=("avg_pool1d", "avg_pool2d", "avg_pool3d"),
    count=_windows,
    channels=windows,
)
LP_POOL = define(
    "lp_pool",
    "Power mean of a window.",
    modules=classes("LPPool1d LPPool2d LPPool3d"),
    names=("lp_pool1d", "lp_pool2d", "lp_pool3d"),
    count=_windows,
    channels=windows,
)
ADAPTIVE_AVERAGE_POOL = define(
    "adaptive_avg_pool",
    "Means over a given number of windows.",
    modules=classes("AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d"),
    names=("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    count=per_input(1),
    channels=windows,
)
ADAPTIVE_MAX_POOL = define(
    "adaptive_max_pool",
    "Maxima over a given number of windows.",
    modules=classes("AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d"),
    functions=(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
    names=("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    count=per_input(1),
    channels=windows,
)
MEAN = define("mean", "Mean over dimensions.", names=("mean",), count=per_input(1), channels=_reduction)
REDUCTION = define(
    "reduction",
    "Sum, maximum and the like over dimensions.",
    names=tuple("sum prod amax amin max min any all argmax argmin logsumexp".split()),
    count=per_input(1),
    channels=_reduction,
)
CUMULATIVE = define(
    "cumulative", "Sums and products of all values so far.", names=("cumsum", "cumprod"), count=per_input(1)
)
VARIANCE = define("variance", "Variance or standard deviation.", names=("var", "std"), count=per_input(4))
INTERPOLATE = define(
    "interpolate",
    "Resampling of an image.",
    modules=classes("Upsample UpsamplingNearest2d UpsamplingBilinear2d"),
    names=("interpolate", "upsample"),
    count=_interpolated,
    channels=_resampling,
)
