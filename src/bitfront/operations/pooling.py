"""Pooling over windows, over whole images, and reductions; resampling of images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bitfront.errors import ExportError
from bitfront.operations.base import ON_INPUT, Call, Count, Merge, Operands, classes, define, per_input
from bitfront.operations.channels import mixing, spatial, windows
from bitfront.operations.integers import IntegerReader, Numbers
from bitfront.operations.layout import ChannelCall, ChannelFollower, Layout, is_constant
from bitfront.operations.onnx import OnnxWriter, Write, many
from bitfront.operations.training import ProgramReader, SlidingWindow, TrainRule, UnsupportedError, slid, unsupported


def _windows(call: Call) -> Count:
    """One operation per value under the window."""
    window = call.argument(1, "kernel_size", 1)
    dims = _dimensions(call.op if call.module is None else type(call.module).__name__)
    return Count(call.out * (math.prod(window) if isinstance(window, (tuple, list)) else int(window) ** dims))


def _interpolated(call: Call) -> Count | None:
    taps = {"nearest": 0, "nearest-exact": 0, "linear": 2, "bilinear": 4, "trilinear": 8, "bicubic": 16}
    mode = call.argument(3, "mode", "nearest")
    if mode == "area":
        return Count(call.n)
    return Count(call.out * taps[mode]) if mode in taps else None


def _dimensions(name: str) -> int:
    """The dimensions in which a pool called ``avg_pool2d`` or ``AvgPool2d`` has windows."""
    return next(int(c) for c in reversed(name) if c.isdigit())


def _call_average(module: nn.Module, operands: Operands) -> Tensor:
    pool: Any = module
    x = operands["data_in"]
    window = (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.count_include_pad)
    if isinstance(module, nn.AvgPool1d):
        return F.avg_pool1d(x, *window)
    average: Any = F.avg_pool2d if isinstance(module, nn.AvgPool2d) else F.avg_pool3d
    result: Tensor = average(x, *window, pool.divisor_override)
    return result


def _call_largest(module: nn.Module, operands: Operands) -> Any:
    pool: Any = module
    function: Any = getattr(F, f"max_pool{_dimensions(_class_of(module))}d")
    window = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    return function(operands["data_in"], *window, ceil_mode=pool.ceil_mode, return_indices=pool.return_indices)


def _call_adaptive(module: nn.Module, operands: Operands) -> Tensor:
    function: Any = getattr(F, f"adaptive_avg_pool{_dimensions(_class_of(module))}d")
    result: Tensor = function(operands["data_in"], module.output_size)
    return result


def _call_adaptive_largest(module: nn.Module, operands: Operands) -> Any:
    function: Any = getattr(F, f"adaptive_max_pool{_dimensions(_class_of(module))}d")
    return function(operands["data_in"], module.output_size, module.return_indices)


def _class_of(pool: nn.Module) -> str:
    """The name of the class of torch.nn that a pool is of, or is derived from."""
    return next(kind.__name__ for kind in type(pool).__mro__ if kind.__module__ == nn.MaxPool1d.__module__)


def _geometry(w: OnnxWriter, n: fx.Node, dims: int, ceil_mode: int) -> dict[str, Any]:
    kernel = many(w.setting(n, 1, "kernel_size"), dims)
    stride = w.setting(n, 2, "stride")
    strides = kernel if stride is None or stride == [] else many(stride, dims)
    geometry = {"kernel_shape": kernel, "strides": strides, "pads": many(w.setting(n, 3, "padding", 0), dims) * 2}
    return geometry | ({"ceil_mode": 1} if w.setting(n, ceil_mode, "ceil_mode", False) else {})


def _largest(dims: int) -> Write:
    def write(w: OnnxWriter, n: fx.Node) -> str:
        dilations = many(w.setting(n, 4, "dilation", 1), dims)
        return w.add("MaxPool", [w.value(n)], n.name, dilations=dilations, **_geometry(w, n, dims, 5))

    return write


def _write_average(w: OnnxWriter, n: fx.Node) -> str:
    dims = _dimensions(w.kind(n))
    geometry = _geometry(w, n, dims, 4)
    if dims > 1 and w.setting(n, 6, "divisor_override") is not None:
        raise ExportError(f"{n.name} ({w.kind(n)}): divisor_override")
    padded = int(bool(w.setting(n, 5, "count_include_pad", True)))
    return w.add("AveragePool", [w.value(n)], n.name, count_include_pad=padded, **geometry)


def _write_adaptive(w: OnnxWriter, n: fx.Node) -> str:
    dims = _dimensions(w.kind(n))
    before, after = tuple(w.source(n).shape[-dims:]), tuple(w.out.shape[-dims:])
    if any(b % a for b, a in zip(before, after, strict=True)):
        raise ExportError(f"{n.name}: an adaptive pool from {before} to {after} has windows of several sizes")
    window = [b // a for b, a in zip(before, after, strict=True)]
    return w.add("AveragePool", [w.value(n)], n.name, kernel_shape=window, strides=window)


def _write_mean(w: OnnxWriter, n: fx.Node) -> str:
    dims = w.setting(n, 1, "dim")
    if dims is None:
        raise ExportError(f"{n.name} (mean): over all dimensions, the batch included")
    axes = w.constant(f"{n.name}.axes", np.array([dims] if isinstance(dims, int) else list(dims), np.int64))
    return w.add("ReduceMean", [w.value(n), axes], n.name, keepdims=int(bool(w.setting(n, 2, "keepdim", False))))


def _lower_largest(r: IntegerReader, n: fx.Node) -> Numbers:
    module = r.module_of(n)
    dims = _dimensions(_class_of(module)) if module is not None else r.source(n).dim() - 2
    if r.setting(n, 6, "return_indices", False):
        raise r.refuse(n, "return_indices")
    return r.pooled(n, "largest", (*_sizes(r, n, dims), many(r.setting(n, 4, "dilation", 1), dims)))


def _lower_average(r: IntegerReader, n: fx.Node) -> Numbers:
    dims = r.source(n).dim() - 2
    kernel, stride, padding = _sizes(r, n, dims)
    if r.setting(n, 6, "divisor_override") is not None:
        raise r.refuse(n, "divisor_override")
    if any(padding) and not r.setting(n, 5, "count_include_pad", True):
        raise r.refuse(n, "count_include_pad=False, with means over windows of several sizes")
    return r.pooled(n, "mean", (kernel, stride, padding, (1,) * dims))


def _sizes(r: IntegerReader, n: fx.Node, dims: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Kernel, stride and padding of a pooling."""
    kernel, stride = many(r.setting(n, 1, "kernel_size"), dims), r.setting(n, 2, "stride")
    return kernel, kernel if stride in (None, [], ()) else many(stride, dims), many(r.setting(n, 3, "padding", 0), dims)


def _lower_adaptive(r: IntegerReader, n: fx.Node) -> Numbers:
    dims = r.source(n).dim() - 2
    before, after = tuple(r.source(n).shape[2:]), tuple(r.out.shape[2:])
    kernel = tuple(b // a for b, a in zip(before, after, strict=True))
    if any(b % a for b, a in zip(before, after, strict=True)):
        raise r.refuse(n, f"an adaptive pool from {before} to {after} has windows of several sizes")
    count = math.prod(kernel)
    if set(after) != {1} and count & (count - 1):
        raise r.refuse(n, f"torch divides these means twice, so that windows of {count} values round twice")
    return r.pooled(n, "mean", (kernel, kernel, (0,) * dims, (1,) * dims))


def _lower_mean(r: IntegerReader, n: fx.Node) -> Numbers:
    x, dims = r.source(n), r.setting(n, 1, "dim")
    chosen = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims or range(x.dim()))}
    if chosen != set(range(2, x.dim())):
        raise r.refuse(n, "a mean over other dimensions than all behind the channels")
    spatial = tuple(x.shape[2:])
    number = r.pooled(n, "mean", (spatial, spatial, (0,) * len(spatial), (1,) * len(spatial)))
    return r.reshaped(number, tuple(r.out.shape[1:]))


def _train_largest(reader: ProgramReader, source: fx.Node, module: Any, path: str) -> int:
    dims = _dimensions(_class_of(module))
    if module.ceil_mode or module.return_indices or set(many(module.dilation, dims)) != {1}:
        raise UnsupportedError(f"{path or 'a function'} is a dilated pooling, or one with ceil_mode or indices")
    window = SlidingWindow(*(many(size, dims) for size in (module.kernel_size, module.stride, module.padding)))
    return _train_window(reader, "largest", source, window, path)


def _train_average(reader: ProgramReader, source: fx.Node, module: nn.Module, path: str) -> int:
    if not isinstance(module, nn.AvgPool1d | nn.AvgPool2d):
        raise UnsupportedError(f"{path} is a {type(module).__name__}")
    dims = _dimensions(_class_of(module))
    if module.ceil_mode or any(many(module.padding, dims)) or getattr(module, "divisor_override", None):
        raise UnsupportedError(f"{path or 'a function'} is a pooling with padding, ceil_mode or another divisor")
    window = SlidingWindow(many(module.kernel_size, dims), many(module.stride, dims), (0,) * dims)
    return _train_window(reader, "mean", source, window, path)


def _train_adaptive(reader: ProgramReader, source: fx.Node, module: nn.Module, path: str) -> int:
    if not isinstance(module, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d):
        raise UnsupportedError(f"{path} is a {type(module).__name__}")
    dims, (_, *sizes) = _dimensions(_class_of(module)), reader.shape(reader.value(source))
    wanted: Any = module.output_size
    if len(sizes) != dims or wanted not in (1, (1,) * dims):
        raise UnsupportedError(f"{path or 'a function'} pools to more than one pixel")
    return _train_window(reader, "mean", source, SlidingWindow(tuple(sizes), (1,) * dims, (0,) * dims), path)


#: Functions that take the arguments that their modules take.
_MODULES: dict[Any, type[nn.Module]] = {
    F.max_pool1d: nn.MaxPool1d,
    F.max_pool2d: nn.MaxPool2d,
    F.avg_pool1d: nn.AvgPool1d,
    F.avg_pool2d: nn.AvgPool2d,
    F.adaptive_avg_pool1d: nn.AdaptiveAvgPool1d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
}


def _pooled(rule: Callable[[ProgramReader, fx.Node, Any, str], int]) -> TrainRule:
    """A rule for the modules of a pooling and for its functions."""

    def train(reader: ProgramReader, node: fx.Node, module: nn.Module | None) -> int:
        if module is not None:
            return rule(reader, reader.sources(node, 1)[0], module, str(node.target))
        kind: Any = _MODULES.get(node.target)
        source = node.args[0] if node.args else None
        if kind is None or not isinstance(source, fx.Node) or len(node.all_input_nodes) > 1:
            raise unsupported(node, module)
        return rule(reader, source, kind(*node.args[1:], **node.kwargs), "")

    return train


def _train_window(
    reader: ProgramReader, kind: Literal["largest", "mean"], source: fx.Node, window: SlidingWindow, path: str
) -> int:
    count = math.prod(window.kernel)
    if kind == "mean" and count & (count - 1) and (reader.formatted(path) or _in_format(source)):
        # The mean of so many rounded values is often half a step of the next format, where a last bit decides.
        raise UnsupportedError(f"{path or source.name} is the mean of {count} values in formats")
    value = reader.rounded(source, path)
    shape = (reader.shape(value)[0], *slid(reader.shape(value), window, path))
    return reader.emit(kind, (value,), shape, window=window)


def _in_format(source: fx.Node) -> bool:
    """Whether the input of a function has a format, which then is a step before it."""
    return source.op == "call_module" and str(source.target).endswith("_quantizer")


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


# torch.nn.functional's max pools come from one factory, and all have its name.
MAX_POOL1D = define(
    "max_pool1d",
    "Largest value of a window, over one dimension.",
    modules=(nn.MaxPool1d,),
    functions=(F.max_pool1d,),
    names=("max_pool1d",),
    count=_windows,
    call=_call_largest,
    **ON_INPUT,
    channels=windows,
    merge=Merge("selection"),
    train=_pooled(_train_largest),
    onnx=_largest(1),
    integers=_lower_largest,
)
MAX_POOL2D = define(
    "max_pool2d",
    "Largest value of a window, over two dimensions.",
    modules=(nn.MaxPool2d,),
    functions=(F.max_pool2d,),
    names=("max_pool2d",),
    count=_windows,
    call=_call_largest,
    **ON_INPUT,
    channels=windows,
    merge=Merge("selection"),
    train=_pooled(_train_largest),
    onnx=_largest(2),
    integers=_lower_largest,
)
MAX_POOL3D = define(
    "max_pool3d",
    "Largest value of a window, over three dimensions.",
    modules=(nn.MaxPool3d,),
    functions=(F.max_pool3d,),
    names=("max_pool3d",),
    count=_windows,
    call=_call_largest,
    **ON_INPUT,
    channels=windows,
)
AVERAGE_POOL = define(
    "avg_pool",
    "Mean of a window.",
    modules=classes("AvgPool1d AvgPool2d AvgPool3d"),
    names=("avg_pool1d", "avg_pool2d", "avg_pool3d"),
    count=_windows,
    call=_call_average,
    **ON_INPUT,
    train=_pooled(_train_average),
    onnx=_write_average,
    integers=_lower_average,
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
    call=_call_adaptive,
    **ON_INPUT,
    train=_pooled(_train_adaptive),
    onnx=_write_adaptive,
    integers=_lower_adaptive,
    channels=windows,
)
ADAPTIVE_MAX_POOL = define(
    "adaptive_max_pool",
    "Maxima over a given number of windows.",
    modules=classes("AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d"),
    functions=(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
    names=("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    count=per_input(1),
    call=_call_adaptive_largest,
    **ON_INPUT,
    channels=windows,
)
MEAN = define(
    "mean",
    "Mean over dimensions.",
    names=("mean",),
    count=per_input(1),
    channels=_reduction,
    onnx=_write_mean,
    integers=_lower_mean,
    **ON_INPUT,
)
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
