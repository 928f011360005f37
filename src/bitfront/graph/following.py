"""How channels flow through each operation: the rules behind ``bitfront.graph.channels``.

The traced graph is run once on a small batch of zeros, and beside each tensor goes its ``Layout``: what each of its
dimensions is made of. A rule takes the layouts of an operation's inputs, ties those that must change together, and
says what comes out. An operation without a rule fixes everything that flows into it, with its name as the reason: a
rule that is missing costs freedom, never correctness. Numbers that a model reads off shapes (``x.size(1)``) are
followed into views, the one place where they may stand for a width; anywhere else they fix it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bitfront.errors import CaptureError
from bitfront.graph.base import Graph
from bitfront.graph.segments import Dim, Variables, repeated

#: Samples in the batch; odd and larger than 1, so that a view that mixes samples with channels is seen as such.
_BATCH = 3


@dataclass(frozen=True)
class Layout:
    """A tensor: its dimensions, batch included, and the id of the parameter or buffer that it is, if it is one."""

    dims: tuple[Dim, ...]
    owned: int | None = None


@dataclass(frozen=True)
class Extent:
    """An integer: the size of a dimension."""

    dim: Dim


@dataclass
class Held:
    """A parameter or buffer.

    Attributes:
        dims: its dimensions; the second of a grouped convolution's weight is that of its whole input.
        contracted: the dimension that is summed over with the input, as the second of a Linear's weight.
        copied: whether it is used in another way too, element by element.
        blocks: into how many blocks its first two dimensions fall, only the diagonal ones of which are held.
    """

    dims: list[Dim]
    contracted: int | None = None
    copied: bool = False
    blocks: int = 1


@dataclass
class Walk:
    """What was learned on the way.

    Attributes:
        held: parameters and buffers by id.
        weights: node → (id of its weight, its input's channels, its output's channels).
        blocks: (node, dimension, n): whose width must stay a multiple of n, in equal blocks, for that node.
        norms: node → the dimensions for which a norm's module has sizes or values.
        mixing: the norms among them that take statistics over these dimensions.
    """

    variables: Variables = field(default_factory=Variables)
    held: dict[int, Held] = field(default_factory=dict)
    weights: dict[str, tuple[int, Dim, Dim]] = field(default_factory=dict)
    blocks: list[tuple[str, Dim, int]] = field(default_factory=list)
    norms: dict[str, tuple[Dim, ...]] = field(default_factory=dict)
    mixing: set[str] = field(default_factory=set)


def walk(graph: Graph) -> Walk:
    """Follow the channels through `graph`, which must be traced.

    Raises:
        CaptureError: the model does not run on a batch of zeros.
    """
    assert graph.fx_graph is not None
    error: Exception | None = None
    first = next(itertools.chain(graph.model.parameters(), graph.model.buffers()), torch.zeros(()))
    # Float first; token indices are whole numbers.
    for dtype in (first.dtype if first.is_floating_point() else torch.float32, torch.long):
        follower = _ChannelInterpreter(fx.GraphModule(graph.model, graph.fx_graph))
        zeros = torch.zeros(_BATCH, *graph.sample_shape, dtype=dtype, device=first.device)
        try:
            with torch.no_grad():
                follower.run(zeros)
        except (RuntimeError, ValueError, TypeError, IndexError) as e:
            error = error or e
            continue
        return follower.walk
    raise CaptureError(
        f"the model fails on {_BATCH} samples of zeros, so its widths cannot be followed: "
        f"{type(error).__name__}: {error}"
    ) from error


class _ChannelInterpreter(fx.Interpreter):
    """Runs the graph; `self.seen` holds the layout, extent or tuple of these beside each node's value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.walk = Walk()
        self.vars = self.walk.variables
        self.seen: dict[fx.Node, Any] = {}
        self.node: fx.Node

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        self.node = n
        self.seen[n] = self._follow(n, out)
        return out

    # --- which rule ----------------------------------------------------------------------------------------------

    def _follow(self, n: fx.Node, out: Any) -> Any:
        if n.op == "placeholder":
            return self._constants(out, "the model's input")
        if n.op == "get_attr":
            return self._attribute(out)
        args: tuple[Any, ...] = fx.node.map_arg(n.args, self.seen.__getitem__)
        kwargs: dict[str, Any] = fx.node.map_arg(n.kwargs, self.seen.__getitem__)
        if n.op == "output":
            self._fix_all(args, "the model's output")
            return None
        given = list(_inside((args, kwargs)))
        followed = None
        if n.op == "call_module":
            module = self.fetch_attr(str(n.target))
            plain = not module._forward_hooks and not module._forward_pre_hooks and len(args) == 1 and not kwargs
            if plain and isinstance(args[0], Layout) and isinstance(out, Tensor):
                followed = self._module(module, args[0], out)
        else:
            name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", str(n.target))
            followed = self._function(_MAX_POOLS.get(n.target, str(name)), args, kwargs, out)
        if followed is not None:
            for each in given:
                if isinstance(each, Layout) and each.owned is not None and not self._contracts(each.owned):
                    self.walk.held[each.owned].copied = True
            return followed
        return self._unknown(given, out)

    def _contracts(self, owned: int) -> bool:
        """Whether this very node contracts that parameter."""
        return self.node.name in self.walk.weights and self.walk.weights[self.node.name][0] == owned

    @property
    def _title(self) -> str:
        n = self.node
        kind = (
            type(self.fetch_attr(str(n.target))).__name__ if n.op == "call_module" else n._pretty_print_target(n.target)
        )
        return f"{n.name} ({kind})"

    def _unknown(self, given: Iterable[Any], out: Any) -> Any:
        reason = f"what {self._title} does to channels is not known"
        self._fix_all(tuple(given), reason)
        return self._constants(out, reason)

    def _fix_all(self, values: Any, reason: str) -> None:
        for value in _inside(values):
            for dim in value.dims if isinstance(value, Layout) else (value.dim,):
                self.vars.fix(dim, reason)

    def _constants(self, value: Any, reason: str) -> Any:
        if isinstance(value, Tensor):
            return Layout(tuple(self.vars.new(size, reason) for size in value.shape))
        if isinstance(value, (tuple, list)):
            return tuple(self._constants(v, reason) for v in value)
        return None

    def _attribute(self, value: Any) -> Any:
        return self._hold(value) if isinstance(value, Tensor) else self._constants(value, "")

    def _hold(self, tensor: Tensor) -> Layout:
        """The layout of a parameter or buffer: unknowns, which its uses tie to what they meet."""
        key = id(tensor)
        if key not in self.walk.held:
            self.walk.held[key] = Held([self.vars.new(size) for size in tensor.shape])
        return Layout(tuple(self.walk.held[key].dims), key)

    # --- modules -------------------------------------------------------------------------------------------------

    def _module(self, module: nn.Module, x: Layout, out: Tensor) -> Layout | None:
        own = {**module._parameters, **module._buffers}
        weight, bias = own.get("weight"), own.get("bias")
        if _is(module, nn.Linear) and weight is not None:
            return self._linear(x, self._hold(weight), None if bias is None else self._hold(bias))
        if _is(module, nn.Conv1d, nn.Conv2d, nn.Conv3d) and weight is not None:
            held = None if bias is None else self._hold(bias)
            return self._convolution(x, self._hold(weight), held, module.groups, out)  # type: ignore[arg-type]
        if _is(module, *_NORMS):
            return self._per_channel(x, own.values()) if len(x.dims) >= 2 else None
        if _is(module, nn.PReLU) and weight is not None and (weight.numel() == 1 or len(x.dims) >= 2):
            return x if weight.numel() == 1 else self._per_channel(x, (weight,))
        if _is(module, nn.LayerNorm):
            return self._layer_norm(x, [weight, bias], len(module.normalized_shape))  # type: ignore[arg-type]
        if _is(module, nn.GroupNorm) and len(x.dims) >= 2:
            self.walk.mixing.add(self.node.name)
            if module.num_groups != 1:
                self.walk.blocks.append((self.node.name, x.dims[1], module.num_groups))  # type: ignore[arg-type]
            return self._per_channel(x, (weight, bias))
        if _is(module, nn.Softmax, nn.LogSoftmax):
            return self._mixing(x, module.dim)
        if _is(module, *_ELEMENTWISE_MODULES):
            return Layout(x.dims)
        if _is(module, *_SPATIAL_MODULES):
            return self._spatial(x, out) if _has_channels(x, type(module).__name__) else None
        if _is(module, nn.Flatten):
            return self._regroup(x, out, {})
        return None

    def _per_channel(self, x: Layout, tensors: Iterable[Tensor | None]) -> Layout:
        """Each of `tensors` holds one value per channel; the channels are dimension 1."""
        self.walk.norms[self.node.name] = (x.dims[1],)
        for tensor in tensors:
            if tensor is not None and tensor.dim():
                held = self._hold(tensor)
                self._copied(held)
                self.vars.unify(held.dims[0], x.dims[1], self._title)
        return Layout(x.dims)

    def _layer_norm(self, x: Layout, tensors: Iterable[Tensor | None], over: int) -> Layout:
        """Each of `tensors` has the shape of the last `over` dimensions of `x`."""
        self.walk.norms[self.node.name] = x.dims[-over:]
        self.walk.mixing.add(self.node.name)
        for tensor in tensors:
            if tensor is not None:
                held = self._hold(tensor)
                self._copied(held)
                for mine, theirs in zip(held.dims, x.dims[-over:], strict=True):
                    self.vars.unify(mine, theirs, self._title)
        return Layout(x.dims)

    def _linear(self, x: Layout, weight: Layout, bias: Layout | None) -> Layout | None:
        """x (..., in) · weight (out, in) + bias (out)."""
        if weight.owned in (None, x.owned) or len(weight.dims) != 2 or (bias is not None and bias.owned is None):
            return None
        assert weight.owned is not None
        self._contract(weight.owned, 1, weight.dims[1], x.dims[-1], weight.dims[0])
        if bias is not None:
            self._copied(bias)
            self.vars.unify(bias.dims[0], weight.dims[0], self._title)
        return Layout((*x.dims[:-1], weight.dims[0]))

    def _contract(self, owned: int, position: int, mine: Dim, incoming: Dim, outgoing: Dim) -> None:
        held = self.walk.held[owned]
        if held.contracted not in (None, position):
            self._fix_all(Layout(tuple(held.dims)), f"{self._title} uses a shared weight the other way round")
        held.contracted = position
        self.vars.unify(incoming, mine, self._title)
        self.walk.weights[self.node.name] = (owned, incoming, outgoing)

    def _copied(self, layout: Layout) -> None:
        assert layout.owned is not None
        self.walk.held[layout.owned].copied = True

    def _convolution(self, x: Layout, weight: Layout, bias: Layout | None, groups: int, out: Tensor) -> Layout | None:
        """x (batch, in, ...), weight (out, in / groups, ...), bias (out)."""
        if weight.owned is None or len(x.dims) != len(weight.dims) or (bias is not None and bias.owned is None):
            return None
        # A weight that two calls read differently.
        if self.walk.held[weight.owned].contracted is not None and self.walk.held[weight.owned].blocks != groups:
            return None
        held, channels = self.walk.held[weight.owned], x.dims[1]
        outgoing, inner, *kernel = held.dims
        for dim in (x.dims[0], *x.dims[2:], *kernel):
            self.vars.fix(dim, f"{self._title} slides over it")
        total = self.vars.size(channels)
        if groups == total and groups > 1:
            # Depthwise: channel c makes the outputs c·m .. c·m + m - 1, so the output is made of the input's channels.
            self.vars.fix(inner, f"{self._title} is depthwise")
            self.vars.unify(outgoing, repeated(channels, self.vars.size(outgoing) // total), self._title)
            held.copied = True
            self.walk.weights[self.node.name] = (weight.owned, channels, outgoing)
        else:
            if held.blocks != groups:
                inner = held.dims[1] = self.vars.new(total)
                held.blocks = groups
            self._contract(weight.owned, 1, inner, channels, outgoing)
            if groups > 1:
                self.walk.blocks.extend((self.node.name, dim, groups) for dim in (channels, outgoing))
        if bias is not None:
            self._copied(bias)
            self.vars.unify(bias.dims[0], outgoing, self._title)
        return Layout((x.dims[0], outgoing, *self._new(out.shape[2:])))

    def _new(self, sizes: Iterable[int]) -> tuple[Dim, ...]:
        return tuple(self.vars.new(size, f"{self._title} makes it") for size in sizes)

    def _spatial(self, x: Layout, out: Tensor) -> Layout:
        """Pooling and the like: dimensions 2 and up change, samples and channels stay what they are."""
        for dim in x.dims[2:]:
            self.vars.fix(dim, f"{self._title} slides over it")
        return Layout((*x.dims[:2], *self._new(out.shape[2:])))

    def _mixing(self, x: Layout, dims: Any, keep: bool | None = None) -> Layout:
        """A softmax, or a sum, mean or maximum (`keep`: whether with keepdim) over `dims`; None: over all."""
        every = range(len(x.dims))
        over = set(every) if dims is None else {d % len(x.dims) for d in ([dims] if isinstance(dims, int) else dims)}
        for d in over:
            self.vars.fix(x.dims[d], f"{self._title} mixes its channels, not as a layer with weights does")
        if keep is None:
            return Layout(x.dims)
        reduced = self._new((1,)) if keep else ()
        return Layout(tuple(itertools.chain(*(reduced if d in over else (x.dims[d],) for d in every))))

    # --- functions and methods -----------------------------------------------------------------------------------

    def _function(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Any:
        x = args[0] if args else kwargs.get("input")
        rest = args[1:]
        if name == "getitem" and isinstance(x, tuple):
            return x[rest[0]] if isinstance(rest[0], (int, slice)) else None
        if name in ("cat", "concat", "concatenate") and isinstance(out, Tensor):
            return self._concatenation(args, kwargs)
        if name in _ELEMENTWISE and isinstance(out, Tensor):
            return self._elementwise(_inside((args, kwargs)))
        if not isinstance(x, Layout):
            return None
        if name in ("size", "getattr"):
            return self._shape(x, name, rest, kwargs, out)
        if not isinstance(out, Tensor):
            return None
        if name in ("view", "reshape"):
            return self._view(x, out, rest, kwargs)
        if name == "flatten":
            return self._regroup(x, out, {}) if _numbers((*rest, *kwargs.values())) else None
        if name in _PERMUTATIONS:
            return self._permutation(x, rest, kwargs)
        if name == "getitem":
            return self._index(x, rest[0], out)
        if name in ("squeeze", "unsqueeze"):
            return self._squeeze(x, name, rest, kwargs, out)
        if name in ("mean", "sum", "amax", "amin"):
            given = dict(zip(("dim", "keepdim"), rest, strict=False)) | dict(kwargs)
            if not given.keys() <= {"dim", "keepdim", "dtype"} or not _numbers((given.get("dim"),)):
                return None
            dims = given.get("dim")
            return self._mixing(x, None if dims == () or dims == [] else dims, bool(given.get("keepdim")))
        if name in ("softmax", "log_softmax") and _numbers((*rest, *kwargs.values())):
            return self._mixing(x, rest[0] if rest else kwargs.get("dim"))
        if name in _SPATIAL and _numbers((*rest, *kwargs.values())):
            return self._spatial(x, out) if _has_channels(x, name) else None
        if name in _CONTRACTIONS:
            return self._contraction(name, x, rest, kwargs, out)
        return None

    def _contraction(
        self, name: str, x: Layout, rest: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor
    ) -> Layout | None:
        given = dict(zip(_CONTRACTIONS[name], rest, strict=False)) | dict(kwargs)
        weight, bias = given.get("weight", given.get("other")), given.get("bias")
        if not isinstance(weight, Layout) or (bias is not None and not isinstance(bias, Layout)):
            return None
        if any(isinstance(each, Extent) for each in _inside(given)):
            return None
        if name == "linear":
            return self._linear(x, weight, bias)
        if name in ("matmul", "mm"):
            if weight.owned in (None, x.owned) or len(weight.dims) != 2 or len(x.dims) < 2:
                return None
            assert weight.owned is not None
            self._contract(weight.owned, 0, weight.dims[0], x.dims[-1], weight.dims[1])
            return Layout((*x.dims[:-1], weight.dims[1]))
        groups = given.get("groups", 1)
        # The number of groups of a depthwise convolution would have to change with its width.
        if groups != 1 and groups == self.vars.size(x.dims[1]):
            return None
        return self._convolution(x, weight, bias, groups, out)

    def _elementwise(self, values: Iterable[Any]) -> Layout | None:
        """Tensors broadcast against each other, as often as there are."""
        layouts = []
        for value in values:
            if isinstance(value, Extent):
                self.vars.fix(value.dim, f"{self._title} computes with its size")
            else:
                layouts.append(value)
        if not layouts:
            return None
        dims = layouts[0].dims
        for layout in layouts[1:]:
            dims = self._broadcast(dims, layout.dims)
        return Layout(dims)

    def _broadcast(self, a: Sequence[Dim], b: Sequence[Dim]) -> tuple[Dim, ...]:
        result = []
        for one, other in itertools.zip_longest(reversed(a), reversed(b)):
            if one is None or other is None:
                result.append(other if one is None else one)
                continue
            narrow, wide = sorted((one, other), key=self.vars.size)
            if self.vars.size(narrow) == 1 != self.vars.size(wide):
                self.vars.fix(narrow, f"{self._title} needs it to be 1, to repeat it")
            else:
                self.vars.unify(one, other, self._title)
            result.append(wide)
        return tuple(reversed(result))

    def _concatenation(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layout | None:
        tensors = args[0] if args else kwargs["tensors"]
        axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        if not isinstance(axis, int) or not all(isinstance(t, Layout) for t in tensors):
            return None
        first, *others = tensors
        axis %= len(first.dims)
        for t in others:
            if len(t.dims) != len(first.dims):
                return None
            for d, (mine, theirs) in enumerate(zip(first.dims, t.dims, strict=True)):
                if d != axis:
                    self.vars.unify(mine, theirs, self._title)
        joined = tuple(itertools.chain(*(t.dims[axis] for t in tensors)))
        return Layout((*first.dims[:axis], joined, *first.dims[axis + 1 :]))

    # --- shapes --------------------------------------------------------------------------------------------------

    def _shape(self, x: Layout, name: str, rest: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Any:
        sizes = tuple(Extent(d) for d in x.dims)
        if name == "size":
            d = rest[0] if rest else kwargs.get("dim")
            return sizes if d is None else sizes[d] if isinstance(d, int) else None
        if rest[0] == "shape":
            return sizes
        if rest[0] in ("T", "mT") and isinstance(out, Tensor):
            return self._permutation(x, rest, kwargs)
        # Nothing of these depends on widths, and there is nothing to follow.
        return () if rest[0] in ("device", "dtype", "ndim", "is_cuda", "requires_grad") else None

    def _view(self, x: Layout, out: Tensor, rest: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layout | None:
        claims = kwargs.get("shape", rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest)
        if not isinstance(claims, (tuple, list)) or len(claims) != out.dim():
            return None
        return self._regroup(x, out, dict(enumerate(claims)))

    def _regroup(self, x: Layout, out: Tensor, claims: Mapping[int, Any]) -> Layout:
        """The same elements in other dimensions, in the same order.

        Args:
            x: what goes in.
            out: what comes out.
            claims: position → what the model says about its size: -1, a number, an Extent, or None, which is a number
                that it computed. A dimension without a claim is what it turns out to be.
        """
        dims: list[Dim] = []
        for inner, sizes in _blocks([self.vars.size(d) for d in x.dims], list(out.shape)):
            block = [x.dims[i] for i in inner]
            if len(sizes) == 0:
                continue
            if math.prod(sizes[1:]) == 1 and block:
                merged = self._merged(block)
                claim = claims.get(len(dims), -1)
                if isinstance(claim, Extent):
                    # What takes its size from something else must go on having the same.
                    self.vars.unify(merged, claim.dim, self._title)
                elif claim != -1:
                    self.vars.fix(merged, f"{self._title} names its size")
                dims += [merged, *self._new(sizes[1:])]
            else:
                for dim in block:
                    self.vars.fix(dim, f"{self._title} splits it")
                dims += self._new(sizes)
        for claim in claims.values():
            # The size of something else, put where there is nothing of that kind.
            if isinstance(claim, Extent) and not any(self.vars.same(claim.dim, d) for d in dims):
                self.vars.fix(claim.dim, f"{self._title} computes with its size")
        return Layout(tuple(dims))

    def _merged(self, block: Sequence[Dim]) -> Dim:
        """One dimension of several: of those, only the first that is not just 1 may change."""
        lead = next((i for i, d in enumerate(block) if self.vars.size(d) > 1 or not self.vars.is_fixed(d)), 0)
        for i, dim in enumerate(block):
            if i != lead:
                self.vars.fix(dim, f"{self._title} makes one dimension of it and others")
        return repeated(block[lead], math.prod(self.vars.size(d) for d in block[lead + 1 :]))

    def _permutation(self, x: Layout, rest: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layout | None:
        if not _numbers((*rest, *kwargs.values())):
            return None
        # Asked of torch itself, on a tensor whose sizes say which dimension is which; nothing is computed.
        probe = torch.empty(*range(1, len(x.dims) + 1), device="meta")
        if self.node.op == "call_method":
            permuted = getattr(probe, str(self.node.target))(*rest, **kwargs)
        else:
            permuted = self.node.target(probe, *rest, **kwargs)  # type: ignore[operator]
        return Layout(tuple(x.dims[size - 1] for size in permuted.shape))

    def _squeeze(
        self, x: Layout, name: str, rest: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor
    ) -> Layout | None:
        d = rest[0] if rest else kwargs.get("dim")
        if name == "unsqueeze":
            if not isinstance(d, int):
                return None
            d %= out.dim()
            return Layout((*x.dims[:d], *self._new((1,)), *x.dims[d:]))
        if d is not None and not _numbers((d,)):
            return None
        chosen = range(len(x.dims)) if d is None else {i % len(x.dims) for i in ([d] if isinstance(d, int) else d)}
        dims = []
        for i, dim in enumerate(x.dims):
            if i in chosen and self.vars.size(dim) == 1:
                self.vars.fix(dim, f"{self._title} needs it to be 1, to remove it")
            else:
                dims.append(dim)
        return Layout(tuple(dims))

    def _index(self, x: Layout, index: Any, out: Tensor) -> Layout | None:
        """x[:, 1, ..., 2:, None]: whole dimensions go on, others are cut to what the index names."""
        wanted = list(index) if isinstance(index, tuple) else [index]
        if any(not (i is None or i is Ellipsis or isinstance(i, (int, slice))) for i in wanted):
            return None
        if any(isinstance(i, bool) for i in wanted) or not _numbers(
            tuple(v for i in wanted if isinstance(i, slice) for v in (i.start, i.stop, i.step))
        ):
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
                dims += self._new((1,))
                continue
            dim = next(left)
            if i == slice(None):
                dims.append(dim)
                continue
            self.vars.fix(dim, f"{self._title} takes some of it by number")
            if isinstance(i, slice):
                dims += self._new((out.shape[len(dims)],))
        return Layout(tuple(dims))


def _inside(values: Any) -> Iterable[Layout | Extent]:
    """Every layout and extent in nested arguments."""
    if isinstance(values, (Layout, Extent)):
        yield values
    elif isinstance(values, Mapping):
        yield from _inside(tuple(values.values()))
    elif isinstance(values, slice):
        yield from _inside((values.start, values.stop, values.step))
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _inside(value)


def _numbers(values: tuple[Any, ...]) -> bool:
    """Whether arguments are all written in the model, none computed from shapes or tensors."""
    return not any(True for _ in _inside(values))


def _is(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether it is one of these, with a forward of its own kind: a subclass may do anything in its own."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


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
        # What is left of one side is ones.
        if o == len(outer):
            i = len(inner)
        elif i == len(inner):
            o = len(outer)
        yield list(range(first_i, i)), outer[first_o:o]


def _has_channels(x: Layout, name: str) -> bool:
    """Whether `x` is (batch, channels, *spatial), for an operation that may also do without the batch."""
    dimensions = re.search(r"(\d)d$", name)
    return len(x.dims) == 2 + int(dimensions[1]) if dimensions else len(x.dims) > 2


_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
_SPATIAL_MODULES = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d),
    nn.Upsample,
)
_ELEMENTWISE_MODULES = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Tanhshrink, nn.Softshrink),
)
_ELEMENTWISE = frozenset(
    "add iadd add_ sub isub sub_ rsub mul imul mul_ div truediv itruediv div_ neg pow square sqrt rsqrt exp log abs "
    "maximum minimum where clamp clamp_min clamp_max gt lt ge le masked_fill relu relu_ relu6 leaky_relu elu selu celu "
    "gelu silu mish softplus sigmoid sigmoid_ logsigmoid tanh tanh_ hardtanh hardswish hardsigmoid dropout dropout1d "
    "dropout2d dropout3d contiguous clone detach to float double half expand_as".split()
)
_PERMUTATIONS = frozenset("transpose permute t movedim moveaxis swapaxes swapdims".split())
_SPATIAL = frozenset(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d interpolate".split()
)
#: These go by another name in the graph.
_MAX_POOLS: Mapping[Any, str] = {F.max_pool1d: "max_pool1d", F.max_pool2d: "max_pool2d", F.max_pool3d: "max_pool3d"}
_CONVOLUTION = ("weight", "bias", "stride", "padding", "dilation", "groups")
_CONTRACTIONS: Mapping[str, tuple[str, ...]] = {
    "linear": ("weight", "bias"),
    "conv1d": _CONVOLUTION,
    "conv2d": _CONVOLUTION,
    "conv3d": _CONVOLUTION,
    "matmul": ("weight",),
    "mm": ("weight",),
}
