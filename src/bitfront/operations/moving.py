"""Operations that move data and compute nothing: copies, parts, joins, padding; and the sizes of tensors."""

from __future__ import annotations

import itertools
from typing import Any, cast

import numpy as np
from torch import Tensor, fx, nn

from bitfront.errors import ExportError
from bitfront.operations.base import OperandSpec, classes, define, free
from bitfront.operations.channels import elementwise, permutation, windows
from bitfront.operations.integers import IntegerReader, Numbers, moving
from bitfront.operations.layout import ChannelCall, ChannelFollower, Dim, Extent, Followed, Layout, is_constant
from bitfront.operations.onnx import INT64, Named, OnnxWriter
from bitfront.operations.training import ProgramReader, UnsupportedError, unsupported


def _clone(_: ChannelFollower, call: ChannelCall) -> Layout | None:
    """The layout of the first argument; other arguments give at most the type of the copy."""
    return None if call.tensor is None else Layout(call.tensor.dims)


def _write_copy(w: OnnxWriter, n: fx.Node) -> str:
    name = w.kind(n)
    if name in ("clone", "detach", "alias"):
        return w.add("Identity", [w.tensor(n)], n.name)
    if name == "long":  # as in torch, what is behind the point is cut off
        return w.add("Cast", [w.tensor(n)], n.name, to=INT64)
    raise ExportError(f"{n.name} ({w.kind(n)}): only clone, detach and long are written")


def _concatenation(flow: ChannelFollower, call: ChannelCall) -> Layout | None:
    tensors, axis = call.argument(0, "tensors"), call.argument(1, "dim", 0)
    if call.shape is None or not isinstance(axis, int) or not all(isinstance(t, Layout) for t in tensors):
        return None
    first, *others = tensors
    axis %= len(first.dims)
    for t in others:
        if len(t.dims) != len(first.dims):
            return None
        for d, (mine, theirs) in enumerate(zip(first.dims, t.dims, strict=True)):
            if d != axis:
                flow.unify(mine, theirs)
    joined = tuple(itertools.chain(*(t.dims[axis] for t in tensors)))
    return Layout((*first.dims[:axis], joined, *first.dims[axis + 1 :]))


def _padding(flow: ChannelFollower, call: ChannelCall) -> Layout | None:
    """A module pads pixels; a function may pad channels too."""
    return windows(flow, call) if call.module is not None else None


def _size(_: ChannelFollower, call: ChannelCall) -> Followed:
    x, d = call.first, call.argument(1, "dim")
    if not isinstance(x, Layout):
        return None
    sizes = tuple(Extent(dim) for dim in x.dims)
    return sizes if d is None else sizes[d] if isinstance(d, int) else None


def _attribute(flow: ChannelFollower, call: ChannelCall) -> Followed:
    x, name = call.first, call.args[1]
    if not isinstance(x, Layout):
        return None
    if name == "shape":
        return tuple(Extent(dim) for dim in x.dims)
    if name in ("T", "mT"):
        return permutation(flow, call)
    # None of these depends on widths, so there is nothing to follow.
    return () if name in ("device", "dtype", "ndim", "is_cuda", "requires_grad") else None


def _item(flow: ChannelFollower, call: ChannelCall) -> Followed:
    """x[:, 1, ..., 2:, None]: whole dimensions stay, others are reduced to the elements of the index."""
    values, index = call.first, call.args[1]
    if isinstance(values, tuple):
        item: Followed = values[index] if isinstance(index, (int, slice)) else None
        return item
    x, shape = call.tensor, call.shape
    wanted = list(index) if isinstance(index, tuple) else [index]
    if x is None or shape is None or not is_constant(wanted):
        return None
    if any(isinstance(i, bool) or not (i is None or i is Ellipsis or isinstance(i, (int, slice))) for i in wanted):
        return None
    missing = len(x.dims) - sum(i is not None and i is not Ellipsis for i in wanted)
    if Ellipsis not in wanted:
        wanted.append(Ellipsis)
    at = wanted.index(Ellipsis)
    wanted[at : at + 1] = [slice(None)] * missing
    dims: list[Dim] = []
    left = iter(x.dims)
    for i in wanted:
        if i is None:
            dims += flow.new((1,))
            continue
        dim = next(left)
        if i == slice(None):
            dims.append(dim)
            continue
        flow.fix(dim, "takes some of it by number")
        if isinstance(i, slice):
            dims += flow.new((shape[len(dims)],))
    return Layout(tuple(dims))


def _train_concatenation(reader: ProgramReader, node: fx.Node, module: nn.Module | None) -> int:
    given = node.args[0] if node.args else node.kwargs.get("tensors")
    if not isinstance(given, (list, tuple)) or not all(isinstance(part, fx.Node) for part in given):
        raise unsupported(node, module)
    values = [reader.value(cast(fx.Node, part)) for part in given]
    shapes = [reader.shape(value) for value in values]
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    if not isinstance(dim, int) or dim % (len(shapes[0]) + 1) != 1:
        raise UnsupportedError(f"{node.name} joins values along another dimension than their channels")
    return reader.emit("concatenate", tuple(values), (sum(shape[0] for shape in shapes), *shapes[0][1:]))


def _write_concatenation(w: OnnxWriter, n: fx.Node) -> str:
    return w.add("Concat", w.values(n, 0, "tensors"), n.name, axis=int(w.setting(n, 1, "dim", 0)) % w.out.dim())


def _lower_copy(r: IntegerReader, n: fx.Node) -> Numbers:
    if str(getattr(n.target, "__name__", n.target)) not in ("clone", "detach", "alias"):
        raise r.refuse(n, "only clone, detach and alias are copies of the same type")
    return r.moved(n)


def _lower_padding(r: IntegerReader, n: fx.Node) -> Numbers:
    if r.setting(n, 3, "value", 0) not in (None, 0):
        raise r.refuse(n, "pads with another value than 0")
    return r.moved(n)


#: Of the functions that move data, those that put no new values in, and take the data as their first argument.
_PLACES = frozenset(
    """
    chunk split narrow select index_select tile repeat hsplit vsplit split_with_sizes expand unbind repeat_interleave
    roll flip unflatten view_as reshape_as tensor_split pixel_shuffle pixel_unshuffle channel_shuffle
    native_channel_shuffle
    """.split()
)


def _lower_move(r: IntegerReader, n: fx.Node) -> Numbers:
    name = str(getattr(n.target, "__name__", n.target))
    if r.module_of(n) is None and name not in _PLACES:
        raise r.refuse(n, "has no form in whole numbers")
    return r.moved(n)


def _write_unbind(w: OnnxWriter, n: fx.Node) -> Named:
    dim, x = int(w.sample(n, 1, "dim") or 0), w.source(n)
    dim %= x.dim()
    if dim in w.sample_dims(n):
        raise ExportError(f"{n.name} ({w.kind(n)}): it takes the samples apart")
    places = [w.constant(f"{n.name}.place", np.array(k)) for k in range(x.shape[dim])]
    given = w.value(n)
    return tuple(w.add("Gather", [given, place], n.name, axis=dim) for place in places)


def _write_item(w: OnnxWriter, n: fx.Node) -> Named:
    """Whole numbers, slices, None and an ellipsis, wherever the samples lie; anything else as a choice of values."""
    x, index = w.sample(n, 0, "input"), n.args[1]
    if not isinstance(x, Tensor):
        raise ExportError(f"{n.name} ({w.kind(n)}): what it takes a part of has no rule")
    given = list(index) if isinstance(index, tuple) else [index]
    plain = all(
        i is None or i is Ellipsis or (isinstance(i, int) and not isinstance(i, bool)) or _is_slice(i) for i in given
    )
    if not plain:
        return tuple(w.moved(n))
    given += [] if Ellipsis in given else [Ellipsis]
    at = given.index(Ellipsis)
    given[at : at + 1] = [slice(None)] * (x.dim() - sum(i is not None and i is not Ellipsis for i in given))
    along: Any = [i for i in given if i is not None]
    cut = [d for d, i in enumerate(along) if i != slice(None)]
    if w.sample_dims(n) & set(cut):
        raise ExportError(f"{n.name} ({w.kind(n)}): it takes some samples only")
    name, axes = w.tensor(n), [d for d in cut if _is_slice(along[d])]
    if axes:
        ends = zip(*(along[d].indices(x.shape[d]) for d in axes), strict=True)
        start, stop, step = (w.constant(f"{n.name}.ends", np.array(end)) for end in ends)
        name = w.add("Slice", [name, start, stop, w.constant(f"{n.name}.axes", np.array(axes)), step], f"{n.name}.cut")
    for d in reversed([d for d in cut if d not in axes]):
        place = w.constant(f"{n.name}.place", np.array(along[d] % x.shape[d]))
        name = w.add("Gather", [name, place], f"{n.name}.at", axis=d)
    kept = [i for i in given if i is None or _is_slice(i)]
    new = [d for d, i in enumerate(kept) if i is None]
    return w.add("Unsqueeze", [name, w.constant(f"{n.name}.new", np.array(new))], n.name) if new else name


def _is_slice(index: object) -> bool:
    return isinstance(index, slice) and not any(isinstance(i, fx.Node) for i in (index.start, index.stop, index.step))


CLONE = define(
    "clone",
    "A copy, maybe of another type or on another device.",
    names=tuple("clone detach to type type_as float double half bfloat16 long int bool alias cpu cuda".split()),
    onnx=_write_copy,
    integers=_lower_copy,
    count=free,
    channels=_clone,
)
CONCATENATION = define(
    "concatenation",
    "Tensors joined along a dimension.",
    names=("cat", "concat", "concatenate"),
    operands=(OperandSpec("data_in", "activation", 0, "tensors", channel_axis=1, several=True),),
    by_default=False,
    count=free,
    channels=_concatenation,
    train=_train_concatenation,
    onnx=_write_concatenation,
    integers=lambda r, n: r.joined(r.values(n, 0, "tensors"), int(r.setting(n, 1, "dim", 0))),
)
STACK = define(
    "stack",
    "Tensors joined along a new dimension, or along one that depends on how many they have.",
    names=("stack", "hstack", "vstack"),
    count=free,
)
PADDING = define(
    "padding",
    "Values around the edges.",
    modules=classes(
        "ZeroPad1d ZeroPad2d ZeroPad3d ConstantPad1d ConstantPad2d ConstantPad3d ReflectionPad1d ReflectionPad2d "
        "ReflectionPad3d CircularPad1d CircularPad2d CircularPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d"
    ),
    names=("pad",),
    count=free,
    integers=_lower_padding,
    channels=_padding,
)
SIZE = define("size", "The size of a tensor.", names=("size",), count=free, channels=_size)
ATTRIBUTE = define(
    "getattr",
    "An attribute: a shape, a transpose.",
    names=("getattr",),
    count=free,
    channels=_attribute,
)
ITEM = define(
    "getitem",
    "Part of a tensor or of a tuple, by index.",
    names=("getitem",),
    count=free,
    channels=_item,
    onnx=_write_item,
    integers=moving,
)
UNBIND = define(
    "unbind",
    "The parts of a tensor along a dimension, each without it.",
    names=("unbind",),
    count=free,
    onnx=_write_unbind,
    integers=_lower_move,
)
EXPAND_AS = define(
    "expand_as", "Repeated to the shape of another tensor.", names=("expand_as",), count=free, channels=elementwise
)
MOVE = define(
    "move",
    "Parts, repeats, orders, copies and new tensors: data is moved, nothing is computed.",
    modules=classes("PixelShuffle PixelUnshuffle ChannelShuffle Unfold"),
    names=tuple(
        """
        chunk split narrow select index_select gather take take_along_dim tile repeat hsplit vsplit meshgrid
        broadcast_to broadcast_tensors split_with_sizes get expand repeat_interleave roll flip unfold im2col
        unflatten view_as reshape_as tensor_split one_hot pixel_shuffle pixel_unshuffle channel_shuffle
        native_channel_shuffle arange zeros ones full empty eye linspace tensor as_tensor zeros_like ones_like full_like
        empty_like new_zeros new_ones new_full new_empty new_tensor randn rand_like randn_like copy fill zero setitem
        requires_grad as_strided diagonal tril triu real imag scatter index_put masked_select nonzero lift_fresh
        set_data data
        """.split()
    ),
    count=free,
    integers=_lower_move,
)
