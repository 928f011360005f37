"""Follows channels through a model; ``bitfront.graph.channels`` sorts the result into groups.

The traced graph is run once on a small batch of zeros. Each tensor has a ``Layout``: the channels that each of its
dimensions consists of. At each call the rule of the operation is used (``Operation.channels``): it ties dimensions that
must change together, and returns the layout of the output. An operation without a rule fixes all its inputs, with its
name as the reason. So with a missing rule fewer widths can change, but nothing is wrong. Sizes that a model reads from
shapes (``x.size(1)``) may stand for a width in views only; anywhere else they fix the width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitfront.errors import CaptureError
from bitfront.graph.base import Graph
from bitfront.graph.segments import Variables
from bitfront.operations.base import Operation
from bitfront.operations.layout import ChannelCall, ChannelFollower, Dim, Extent, Followed, Layout, inside, repeated
from bitfront.operations.lookup import bare, of_node

#: Samples in the batch; odd and larger than 1, so that a view that mixes samples with channels is noticed.
_BATCH = 3


@dataclass
class Held:
    """A parameter or buffer.

    Attributes:
        dims: its dimensions; the second of a grouped convolution's weight is that of its whole input.
        contracted: the dimension that is summed over with the input, such as the second of a Linear's weight.
        copied: whether it is also used element by element.
        blocks: number of blocks of its first two dimensions; it has only the diagonal blocks.
    """

    dims: list[Dim]
    contracted: int | None = None
    copied: bool = False
    blocks: int = 1


@dataclass
class Walk:
    """The result of following a model.

    Attributes:
        held: parameters and buffers by id.
        weights: node → (id of its weight, its input's channels, its output's channels).
        blocks: (node, dimension, n): the node needs the width of the dimension to be a multiple of n, in equal blocks.
        statistics: (node, dimension): dimensions over which a norm computes statistics.
        sizes: node → attribute of its module → the dimensions whose sizes it holds.
    """

    variables: Variables = field(default_factory=Variables)
    held: dict[int, Held] = field(default_factory=dict)
    weights: dict[str, tuple[int, Dim, Dim]] = field(default_factory=dict)
    blocks: list[tuple[str, Dim, int]] = field(default_factory=list)
    statistics: list[tuple[str, Dim]] = field(default_factory=list)
    sizes: dict[str, dict[str, tuple[Dim, ...]]] = field(default_factory=dict)

    def hold(self, tensor: Tensor) -> Layout:
        """The layout of a parameter or buffer: new variables, which its uses tie to other dimensions."""
        key = id(tensor)
        if key not in self.held:
            self.held[key] = Held([self.variables.new(size) for size in tensor.shape])
        return Layout(tuple(self.held[key].dims), key)

    def fix_all(self, values: object, reason: str) -> None:
        """Fix the sizes of all layouts and extents among the values."""
        for value in inside(values):
            for dim in value.dims if isinstance(value, Layout) else (value.dim,):
                self.variables.fix(dim, reason)

    def constants(self, value: object, reason: str) -> object:
        """The layout of a value whose sizes never change; for a number, the number itself."""
        if isinstance(value, Tensor):
            return Layout(tuple(self.variables.new(size, reason) for size in value.shape))
        if isinstance(value, (tuple, list)):
            return tuple(self.constants(v, reason) for v in value)
        return value

    def fits(self, followed: Followed, value: object) -> bool:
        """Whether layouts and extents have the same sizes as the value that they describe."""
        if isinstance(followed, Layout):
            sizes = tuple(self.variables.size(dim) for dim in followed.dims)
            return isinstance(value, Tensor) and sizes == tuple(value.shape)
        if isinstance(followed, Extent):
            return self.variables.size(followed.dim) == value
        if isinstance(followed, tuple) and followed:
            if not isinstance(value, (tuple, list)) or len(value) != len(followed):
                return False
            return all(self.fits(f, v) for f, v in zip(followed, value, strict=True))
        return True


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
        interpreter = _ChannelInterpreter(fx.GraphModule(graph.model, graph.fx_graph))
        zeros = torch.zeros(_BATCH, *graph.sample_shape, dtype=dtype, device=first.device)
        try:
            with torch.no_grad():
                interpreter.run(zeros)
        except (RuntimeError, ValueError, TypeError, IndexError) as e:
            error = error or e
            continue
        return interpreter.walk
    raise CaptureError(
        f"the model fails on {_BATCH} samples of zeros, so its widths cannot be followed: "
        f"{type(error).__name__}: {error}"
    ) from error


class _ChannelInterpreter(fx.Interpreter):
    """Runs the graph; `self.seen` has the layout, extent, constant or tuple of these for the value of each node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.walk = Walk()
        self.seen: dict[fx.Node, object] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        self.seen[n] = self._follow(n, out)
        return out

    def _follow(self, n: fx.Node, out: object) -> object:
        if n.op == "placeholder":
            return self.walk.constants(out, "the model's input")
        if n.op == "get_attr":
            return self.walk.hold(out) if isinstance(out, Tensor) else self.walk.constants(out, "")
        beside: Callable[[fx.Node], Any] = self.seen.__getitem__
        args: Any = fx.node.map_arg(n.args, beside)
        kwargs: Any = fx.node.map_arg(n.kwargs, beside)
        given = tuple(inside((args, kwargs)))
        if n.op == "output":
            self.walk.fix_all(given, "the model's output")
            return None
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        title = f"{n.name} ({n._pretty_print_target(n.target) if module is None else type(module).__name__})"
        reason = f"what {title} does to channels is not known"
        operation = of_node(n, self.module)
        if operation is not None and operation.channels is not None and not _hooked(module):
            call = ChannelCall(_name(n, module, operation), _function(n, module), args, kwargs, out, module)
            followed = operation.channels(_CallFollower(self.walk, n.name, title, module), call)
            if followed is not None:
                if self.walk.fits(followed, out):
                    self._use_by_value(n, given)
                    return followed
                reason = f"the rule of {title} for channels says other sizes than it has"
        self.walk.fix_all(given, reason)
        return self.walk.constants(out, reason)

    def _use_by_value(self, n: fx.Node, given: Iterable[object]) -> None:
        """Parameters among the arguments of a call, except the one that it contracts, are used value by value."""
        contracted = self.walk.weights[n.name][0] if n.name in self.walk.weights else None
        for each in given:
            if isinstance(each, Layout) and each.owned not in (None, contracted):
                self.walk.held[each.owned].copied = True


def _hooked(module: nn.Module | None) -> bool:
    """Whether a module does more than its class, e.g. because of hooks."""
    return module is not None and bool(module._forward_hooks or module._forward_pre_hooks)


def _function(n: fx.Node, module: nn.Module | None) -> Any:
    if module is not None:
        return module
    return getattr(Tensor, str(n.target)) if n.op == "call_method" else n.target


def _name(n: fx.Node, module: nn.Module | None, operation: Operation) -> str:
    if module is not None:
        return type(module).__name__
    # A function from a factory has the name of the factory's inner function.
    name = bare(n.target)
    return name if name in operation.names else operation.name


@dataclass(frozen=True)
class _CallFollower(ChannelFollower):
    """One call: the statements of its rule are stored in the walk, under the name of the node."""

    walk: Walk
    node: str
    title: str
    module: nn.Module | None

    def size(self, dim: Dim) -> int:
        return self.walk.variables.size(dim)

    def is_fixed(self, dim: Dim) -> bool:
        return self.walk.variables.is_fixed(dim)

    def same(self, a: Dim, b: Dim) -> bool:
        return self.walk.variables.same(a, b)

    def unify(self, a: Dim, b: Dim) -> None:
        self.walk.variables.unify(a, b, self.title)

    def fix(self, dim: Dim, why: str) -> None:
        self.walk.variables.fix(dim, f"{self.title} {why}")

    def new(self, sizes: Iterable[int]) -> tuple[Dim, ...]:
        return tuple(self.walk.variables.new(size, f"{self.title} makes it") for size in sizes)

    def hold(self, tensor: Tensor) -> Layout:
        return self.walk.hold(tensor)

    def hold_values(self, tensor: Tensor) -> Layout:
        layout = self.walk.hold(tensor)
        self.walk.held[id(tensor)].copied = True
        return layout

    def contract(self, weight: Layout, over: int, incoming: Dim, outgoing: Dim, blocks: int = 1) -> bool:
        assert weight.owned is not None
        held = self.walk.held[weight.owned]
        if held.contracted is not None and held.blocks != blocks:
            return False
        if held.contracted not in (None, over):
            for dim in held.dims:
                self.fix(dim, "uses a shared weight the other way round")
        if held.blocks != blocks:
            # The dimension of the weight is that of one block.
            held.dims[over] = self.walk.variables.new(self.size(incoming))
            held.blocks = blocks
        held.contracted = over
        self.unify(incoming, held.dims[over])
        self.walk.weights[self.node] = (weight.owned, incoming, outgoing)
        if blocks > 1:
            self.cut(incoming, blocks)
            self.cut(outgoing, blocks)
        return True

    def repeat(self, weight: Layout, incoming: Dim, outgoing: Dim) -> bool:
        assert weight.owned is not None
        held = self.walk.held[weight.owned]
        if held.contracted is not None:
            return False
        # Channel c makes the outputs c·m .. c·m + m - 1, so the output consists of the channels of the input.
        self.unify(outgoing, repeated(incoming, self.size(outgoing) // self.size(incoming)))
        held.copied = True
        self.walk.weights[self.node] = (weight.owned, incoming, outgoing)
        return True

    def cut(self, dim: Dim, blocks: int) -> None:
        self.walk.blocks.append((self.node, dim, blocks))

    def take_statistics(self, dims: Iterable[Dim]) -> None:
        self.walk.statistics.extend((self.node, dim) for dim in dims)

    def remember(self, attribute: str, *dims: Dim) -> None:
        if self.module is not None:
            self.walk.sizes.setdefault(self.node, {})[attribute] = dims
