"""The same values in another shape: views, dimensions in another order; and what is the identity in evaluation."""

from __future__ import annotations

from torch import nn

from bitfront.operations.base import Merge, classes, define, free
from bitfront.operations.channels import elementwise, permutation, regroup
from bitfront.operations.layout import ChannelCall, ChannelFollower, Layout, is_constant


def _flatten(flow: ChannelFollower, call: ChannelCall) -> Layout | None:
    x, shape = call.tensor, call.shape
    return regroup(flow, x, shape, {}) if x is not None and shape is not None and call.constant else None


def _view(flow: ChannelFollower, call: ChannelCall) -> Layout | None:
    """The one place where a size that was read off a tensor may stand for a width."""
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


IDENTITY = define(
    "identity",
    "Gives back what it is given: Identity, and dropout in evaluation.",
    modules=classes("Identity Dropout Dropout1d Dropout2d"),
    names=("identity",),
    count=free,
    view=True,
    merge=Merge("identity"),
    channels=elementwise,
)
DROPOUT = define(
    "dropout",
    "Dropout of other kinds, the identity in evaluation.",
    modules=classes("Dropout3d AlphaDropout FeatureAlphaDropout"),
    names=tuple("dropout dropout1d dropout2d dropout3d alpha_dropout stochastic_depth".split()),
    count=free,
    channels=elementwise,
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
)
VIEW = define(
    "view",
    "The same values in another shape.",
    modules=(nn.Unflatten,),
    names=("view", "reshape"),
    count=free,
    view=True,
    channels=_view,
)
PERMUTE = define(
    "permute",
    "Dimensions in another order.",
    names=("permute",),
    count=free,
    view=True,
    channels=permutation,
)
TRANSPOSE = define(
    "transpose",
    "Two dimensions exchanged.",
    names=("transpose",),
    count=free,
    view=True,
    channels=permutation,
)
MOVE_AXES = define(
    "movedim",
    "Dimensions moved to other places, or swapped.",
    names=tuple("movedim moveaxis swapaxes swapdims t".split()),
    count=free,
    channels=permutation,
)
SQUEEZE = define(
    "squeeze", "Dimensions of size 1 removed.", names=("squeeze",), count=free, view=True, channels=_squeeze
)
UNSQUEEZE = define(
    "unsqueeze", "A dimension of size 1 added.", names=("unsqueeze",), count=free, view=True, channels=_unsqueeze
)
CONTIGUOUS = define(
    "contiguous",
    "The same values, one after the other in memory.",
    names=("contiguous",),
    count=free,
    view=True,
    channels=elementwise,
)
