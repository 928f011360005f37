"""The same values in another shape: views, dimensions in another order; and what is the identity in evaluation."""

from __future__ import annotations

import math

import numpy as np
from torch import fx, nn

from bitfront.errors import ExportError
from bitfront.operations.base import Merge, classes, define, free
from bitfront.operations.channels import elementwise, permutation, regroup
from bitfront.operations.integers import IntegerReader, Numbers, moving
from bitfront.operations.layout import ChannelCall, ChannelFollower, Layout, is_constant
from bitfront.operations.onnx import OnnxWriter
from bitfront.operations.training import ProgramReader, UnsupportedError, for_modules, unsupported


def _flatten(flow: ChannelFollower, call: ChannelCall) -> Layout | None:
    x, shape = call.tensor, call.shape
    return regroup(flow, x, shape, {}) if x is not None and shape is not None and call.constant else None


def _view(flow: ChannelFollower, call: ChannelCall) -> Layout | None:
    """The only place where a size of a tensor may stand for a width."""
    x, shape, rest = call.tensor, call.shape, call.args[1:]
    claims = call.kwargs.get("shape", rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest)
    if x is None or shape is None or call.module is not None:
        return None
    if not isinstance(claims, (tuple, list)) or len(claims) != len(shape):
        return None
    return regroup(flow, x, shape, dict(enumerate(claims)))


def _squeeze(flow: ChannelFollower, call: ChannelCall) -> Layout | None:
    x, d = call.tensor, call.argument(1, "dim")
    if x is None or not is_constant(d):
        return None
    chosen = range(len(x.dims)) if d is None else {i % len(x.dims) for i in ([d] if isinstance(d, int) else d)}
    dims = []
    for i, dim in enumerate(x.dims):
        if i in chosen and flow.size(dim) == 1:
            flow.fix(dim, "needs it to be 1, to remove it")
        else:
            dims.append(dim)
    return Layout(tuple(dims))


def _unsqueeze(flow: ChannelFollower, call: ChannelCall) -> Layout | None:
    x, d = call.tensor, call.argument(1, "dim")
    if x is None or not isinstance(d, int):
        return None
    d %= len(x.dims) + 1
    return Layout((*x.dims[:d], *flow.new((1,)), *x.dims[d:]))


def _write_dropout(w: OnnxWriter, n: fx.Node) -> str:
    place = 3 if w.kind(n) == "stochastic_depth" else 2
    if w.module_of(n) is None and w.setting(n, place, "training", True):
        raise ExportError(f"{n.name} ({w.kind(n)}): draws random numbers")
    return w.value(n)


def _lower_dropout(r: IntegerReader, n: fx.Node) -> Numbers:
    name = r.module_of(n) is None and str(getattr(n.target, "__name__", n.target))
    if name and r.setting(n, 3 if name == "stochastic_depth" else 2, "training", True):
        raise r.refuse(n, "draws random numbers")
    return r.moved(n)


def _train_identity(reader: ProgramReader, source: fx.Node, module: nn.Module, path: str) -> int:
    if getattr(module, "p", 0):
        raise UnsupportedError(f"{path} draws random numbers")
    return reader.value(source)


def _write_reshape(w: OnnxWriter, n: fx.Node) -> str:
    before, after = tuple(w.source(n).shape), tuple(w.out.shape)
    if before[0] != w.batch or math.prod(before) != math.prod(after) or after[0] % w.batch:
        raise ExportError(f"{n.name}: reshapes {before} into {after}, which does not keep the batch in front")
    target = np.array([-1, *after[1:]], np.int64)
    return w.add("Reshape", [w.value(n), w.constant(f"{n.name}.shape", target)], n.name)


def _train_flatten(reader: ProgramReader, node: fx.Node, module: nn.Module | None) -> int:
    if isinstance(module, nn.Flatten):
        (source,) = reader.sources(node, 1)
        if (module.start_dim, module.end_dim) != (1, -1):
            raise UnsupportedError(f"{node.target} flattens some dimensions only")
        return reader.flatten(reader.value(source))
    given = node.args[0] if node.args else None
    if not isinstance(given, fx.Node) or not (node.args[1:] == (1,) or node.kwargs == {"start_dim": 1}):
        raise unsupported(node, module)
    return reader.flatten(reader.value(given))


def _write_transpose(w: OnnxWriter, n: fx.Node) -> str:
    first, second = int(w.setting(n, 1, "dim0")), int(w.setting(n, 2, "dim1"))
    order = list(range(w.out.dim()))
    order[first], order[second] = order[second], order[first]
    return w.add("Transpose", [w.value(n)], n.name, perm=order)


def _write_permute(w: OnnxWriter, n: fx.Node) -> str:
    given = w.arguments(n)[1:]
    given = given[0] if len(given) == 1 and not isinstance(given[0], int) else given
    order = [int(d) % w.out.dim() for d in given or w.setting(n, 1, "dims")]
    return w.add("Transpose", [w.value(n)], n.name, perm=order)


IDENTITY = define(
    "identity",
    "Returns its input: Identity, and dropout in evaluation.",
    modules=classes("Identity Dropout Dropout1d Dropout2d"),
    names=("identity",),
    count=free,
    view=True,
    merge=Merge("identity"),
    channels=elementwise,
    train=for_modules(_train_identity),
    onnx=lambda w, n: w.value(n),
    integers=moving,
)
DROPOUT = define(
    "dropout",
    "Dropout of other kinds, the identity in evaluation.",
    modules=classes("Dropout3d AlphaDropout FeatureAlphaDropout"),
    names=tuple("dropout dropout1d dropout2d dropout3d alpha_dropout stochastic_depth".split()),
    count=free,
    channels=elementwise,
    onnx=_write_dropout,
    integers=_lower_dropout,
)
FLATTEN = define(
    "flatten",
    "Several dimensions as one.",
    modules=(nn.Flatten,),
    names=("flatten",),
    count=free,
    view=True,
    merge=Merge("flatten"),
    channels=_flatten,
    train=_train_flatten,
    onnx=_write_reshape,
    integers=moving,
)
VIEW = define(
    "view",
    "The same values in another shape.",
    modules=(nn.Unflatten,),
    names=("view", "reshape"),
    count=free,
    view=True,
    channels=_view,
    onnx=_write_reshape,
    integers=moving,
)
PERMUTE = define(
    "permute",
    "Dimensions in another order.",
    names=("permute",),
    count=free,
    view=True,
    channels=permutation,
    onnx=_write_permute,
    integers=moving,
)
TRANSPOSE = define(
    "transpose",
    "Two dimensions exchanged.",
    names=("transpose",),
    count=free,
    view=True,
    channels=permutation,
    onnx=_write_transpose,
    integers=moving,
)
MOVE_AXES = define(
    "movedim",
    "Dimensions moved to other places, or swapped.",
    names=tuple("movedim moveaxis swapaxes swapdims t".split()),
    count=free,
    integers=moving,
    channels=permutation,
)
SQUEEZE = define(
    "squeeze",
    "Dimensions of size 1 removed.",
    names=("squeeze",),
    count=free,
    view=True,
    channels=_squeeze,
    onnx=_write_reshape,
    integers=moving,
)
UNSQUEEZE = define(
    "unsqueeze",
    "A dimension of size 1 added.",
    names=("unsqueeze",),
    count=free,
    view=True,
    channels=_unsqueeze,
    onnx=_write_reshape,
    integers=moving,
)
CONTIGUOUS = define(
    "contiguous",
    "The same values, one after the other in memory.",
    names=("contiguous",),
    count=free,
    view=True,
    channels=elementwise,
    onnx=lambda w, n: w.value(n),
    integers=moving,
)
