"""Rules for how channels flow that several operations share: value by value, through windows, and so on.

Records use these rules, or parts of them, as their ``channels``; no operation is registered here. A rule takes the
layouts of the inputs, ties dimensions that must change together, and returns the layout of the output.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitfront.operations.layout import ChannelCall, ChannelFollower, Dim, Extent, Layout, inside, repeated


def elementwise(flow: ChannelFollower, call: ChannelCall) -> Layout | None:
    """Value by value: any number of tensors, which are broadcast against each other."""
    if call.shape is None:
        return None
    layouts = []
    for value in inside((call.args, call.kwargs)):
        if isinstance(value, Extent):
            flow.fix(value.dim, "computes with its size")
        else:
            layouts.append(value)
    if not layouts:
        return None
    dims = layouts[0].dims
    for layout in layouts[1:]:
        dims = _broadcast(flow, dims, layout.dims)
    return Layout(dims)


def _broadcast(flow: ChannelFollower, a: Sequence[Dim], b: Sequence[Dim]) -> tuple[Dim, ...]:
    result = []
    for one, other in itertools.zip_longest(reversed(a), reversed(b)):
        if one is None or other is None:
            result.append(other if one is None else one)
            continue
        narrow, wide = sorted((one, other), key=flow.size)
        if flow.size(narrow) == 1 != flow.size(wide):
            flow.fix(narrow, "needs it to be 1, to repeat it")
        else:
            flow.unify(one, other)
        result.append(wide)
    return tuple(reversed(result))


def windows(flow: ChannelFollower, call: ChannelCall) -> Layout | None:
    """Pooling and the like over (batch, channels, *spatial); the name ends with the number of spatial dimensions.

    An input without the batch is not followed: its channels are in another place.
    """
    x, dimensions = call.tensor, re.search(r"(\d)d$", call.name)
    if x is None or dimensions is None or len(x.dims) != 2 + int(dimensions[1]) or not call.constant:
        return None
    return spatial(flow, x, call)


def spatial(flow: ChannelFollower, x: Layout, call: ChannelCall) -> Layout | None:
    """Dimensions 2 and up of `x` change; samples and channels do not."""
    if call.shape is None:
        return None
    for dim in x.dims[2:]:
        flow.fix(dim, "slides over it")
    return Layout((*x.dims[:2], *flow.new(call.shape[2:])))


def mixing(flow: ChannelFollower, x: Layout, dims: int | Iterable[int] | None, keep: bool | None = None) -> Layout:
    """A softmax, or a sum, mean or maximum (`keep`: whether with keepdim) over `dims`; None: over all."""
    every = range(len(x.dims))
    over = set(every) if dims is None else {d % len(x.dims) for d in ([dims] if isinstance(dims, int) else dims)}
    for d in over:
        flow.fix(x.dims[d], "mixes its channels, not as a layer with weights does")
    if keep is None:
        return Layout(x.dims)
    reduced = flow.new((1,)) if keep else ()
    return Layout(tuple(itertools.chain(*(reduced if d in over else (x.dims[d],) for d in every))))


def per_channel(flow: ChannelFollower, x: Layout, attribute: str, tensors: Iterable[Tensor]) -> Layout:
    """Each of the module's `tensors` holds one value per channel, its `attribute` their number; the channels are
    dimension 1."""
    flow.remember(attribute, x.dims[1])
    for tensor in tensors:
        if tensor.dim():
            flow.unify(flow.hold_values(tensor).dims[0], x.dims[1])
    return Layout(x.dims)


def permutation(_: ChannelFollower, call: ChannelCall) -> Layout | None:
    """The same dimensions in another order."""
    x = call.tensor
    if x is None or not call.constant:
        return None
    # Torch itself is called, on a tensor whose sizes identify the dimensions; nothing is computed.
    probe = torch.empty(*range(1, len(x.dims) + 1), device="meta")
    permuted: Any = call.function(probe, *call.args[1:], **call.kwargs)
    return Layout(tuple(x.dims[size - 1] for size in permuted.shape))


def regroup(flow: ChannelFollower, x: Layout, shape: Sequence[int], claims: Mapping[int, object]) -> Layout:
    """The same elements in other dimensions, in the same order.

    Args:
        flow: the caller.
        x: the input.
        shape: shape of the output.
        claims: position → the size that the model gives: -1, a number, or an Extent. The size of a dimension without a
            claim follows from the others.
    """
    dims: list[Dim] = []
    for inner, sizes in _blocks([flow.size(d) for d in x.dims], list(shape)):
        block = [x.dims[i] for i in inner]
        if len(sizes) == 0:
            continue
        if math.prod(sizes[1:]) == 1 and block:
            merged = _merged(flow, block)
            claim = claims.get(len(dims), -1)
            if isinstance(claim, Extent):
                # A dimension whose size comes from something else must keep that size.
                flow.unify(merged, claim.dim)
            elif claim != -1:
                flow.fix(merged, "names its size")
            dims += [merged, *flow.new(sizes[1:])]
        else:
            for dim in block:
                flow.fix(dim, "splits it")
            dims += flow.new(sizes)
    for claim in claims.values():
        # A size of something else, used for a dimension of another kind.
        if isinstance(claim, Extent) and not any(flow.same(claim.dim, d) for d in dims):
            flow.fix(claim.dim, "computes with its size")
    return Layout(tuple(dims))


def _merged(flow: ChannelFollower, block: Sequence[Dim]) -> Dim:
    """Several dimensions become one: only the first that is larger than 1 may change."""
    lead = next((i for i, d in enumerate(block) if flow.size(d) > 1 or not flow.is_fixed(d)), 0)
    for i, dim in enumerate(block):
        if i != lead:
            flow.fix(dim, "makes one dimension of it and others")
    return repeated(block[lead], math.prod(flow.size(d) for d in block[lead + 1 :]))


def _blocks(inner: list[int], outer: list[int]) -> Iterable[tuple[list[int], list[int]]]:
    """Two factorisations of one number, cut wherever they agree: (positions of `inner`, sizes of `outer`) per block."""
    i = o = 0
    while i < len(inner) or o < len(outer):
        first_i, first_o = i, o
        have, want = 1, 1
        if i < len(inner) and o < len(outer):
            have, want, i, o = inner[i], outer[o], i + 1, o + 1
        while have != want:
            if have < want:
                have, i = have * inner[i], i + 1
            else:
                want, o = want * outer[o], o + 1
        # The rest of one side are ones.
        if o == len(outer):
            i = len(inner)
        elif i == len(inner):
            o = len(outer)
        yield list(range(first_i, i)), outer[first_o:o]
