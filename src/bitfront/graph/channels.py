"""Which dimensions of a model must change their size together: what a search over layer widths chooses among.

``channels(graph)`` sorts the channels of a traced model into groups. All channels of a group appear and disappear
together, in every tensor in which they occur: two layers whose outputs are added make one group, and the group of a
convolution that is flattened comes up as H·W features per channel in the Linear behind it. Each dimension of each
parameter is an *axis*: a sequence of segments, group after group. What cannot change, or cannot be followed, is a group
too; it is *fixed*, and says why.

How layouts flow through the model is in ``following.py``, the arithmetic of segments in ``segments.py``; the rule of
each operation is in its record.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from bitfront.errors import CaptureError, ConfigError
from bitfront.graph.base import Graph
from bitfront.graph.following import Held, Walk, walk
from bitfront.operations.layout import Dim


@dataclass(frozen=True)
class Segment:
    """A stretch of an axis: `repeat` elements for each channel of a group, one channel after the other."""

    group: int
    repeat: int = 1


#: What a dimension is made of, in order; empty for a dimension that has nothing to do with channels (a kernel's).
Axis = tuple[Segment, ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that appear and disappear together.

    Attributes:
        index: its position in ``Channels.groups``.
        width: how many channels it has.
        producers: the nodes whose output channels these are, in execution order. A depthwise convolution is one, and
            is among the consumers too.
        consumers: the nodes that take a weighted sum over these channels.
        fixed: why its width cannot change; empty if it can.
        multiple: its width must be a multiple of that, because grouped convolutions or GroupNorms cut it into so many
            equal blocks.
        blocked_by: the nodes which do.
        mixed_by: the LayerNorms and GroupNorms that take statistics over its channels: copies of channels leave what
            they compute as it is only if every group under the norm grows by the same whole number of times.
    """

    index: int
    width: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    fixed: str = ""
    multiple: int = 1
    blocked_by: tuple[str, ...] = ()
    mixed_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorChannels:
    """What a parameter or buffer is made of.

    Attributes:
        axes: one per dimension.
        contracted: the dimension that is summed over with the input (1 of a Linear's weight), None if there is none.
        blocks: groups of a grouped convolution that is not depthwise: the axes of dimensions 0 and 1 are then those of
            all output and input channels, which fall into so many equal blocks; each block of outputs holds weights
            for its block of inputs alone.
    """

    axes: tuple[Axis, ...]
    contracted: int | None = None
    blocks: int = 1


@dataclass(frozen=True)
class Layer:
    """A node with weights. `path` is its module's, empty for a function; `weight` a name of its weight."""

    name: str
    path: str
    weight: str
    inputs: Axis
    outputs: Axis


@dataclass(frozen=True)
class Channels:
    """The groups of a model and where they occur.

    Attributes:
        groups: in the order in which they come up.
        tensors: name → its axes, for every parameter and buffer that has channels, under each of its names.
        layers: the nodes with weights, in execution order.
        sizes: module path → attribute → what it holds the size of: an axis, or, where it is a tuple, several.
    """

    groups: tuple[ChannelGroup, ...]
    tensors: Mapping[str, TensorChannels]
    layers: tuple[Layer, ...]
    sizes: Mapping[str, Mapping[str, tuple[Axis, ...]]]

    def layer(self, name: str) -> Layer:
        """The layer of that node name or module path.

        Raises:
            ConfigError: there is none.
        """
        for layer in self.layers:
            if name in (layer.name, layer.path):
                return layer
        names = [layer.name for layer in self.layers]
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"no layer {name!r} has a width.{hint} Layers that have one: {', '.join(names) or 'none'}")

    def size(self, axis: Axis, widths: Mapping[int, int] | None = None) -> int:
        """How many elements an axis has, with other `widths` (by group) if these are given."""
        changed = widths or {}
        return sum(changed.get(s.group, self.groups[s.group].width) * s.repeat for s in axis)


def channels(graph: Graph) -> Channels:
    """Sort the channels of a captured model into groups.

    Raises:
        CaptureError: the model was not traced: what its layers do with each other's outputs is then unknown.
    """
    if graph.fx_graph is None:
        raise CaptureError(
            "the widths of this model cannot be searched: that needs a model that torch.fx can trace, to see which "
            f"layers share a width. What stopped it: {graph.untraced}"
        )
    seen = walk(graph)
    _settle(seen)
    return _numbered(graph, seen)


def _settle(seen: Walk) -> None:
    """Fix what turned out, in the end, to be of no simple form."""
    variables = seen.variables
    for held in seen.held.values():
        if held.contracted is not None and held.copied:
            reason = "a weight that is summed over it is used in another way too"
            variables.fix(held.dims[held.contracted], reason)
    for node, dim, blocks in seen.blocks:
        pieces = variables.resolve(dim)
        if len(pieces) > 1 or variables.width(pieces[0][0]) % blocks:
            variables.fix(dim, f"{node} cuts it into {blocks} blocks, in which it does not fit as a whole")


def _numbered(graph: Graph, seen: Walk) -> Channels:
    """The groups as others see them: numbered, without those that are not channels of any layer."""
    variables = seen.variables
    names = _tensor_names(graph.model, seen.held)
    nodes = {n.name: n for n in graph.nodes}

    def unknowns(dim: Dim) -> set[int]:
        return {v for v, _ in variables.resolve(dim)}

    producers: dict[int, list[str]] = {}
    consumers: dict[int, list[str]] = {}
    for node, (_, inputs, outputs) in seen.weights.items():
        for among, dim in ((producers, outputs), (consumers, inputs)):
            for v in unknowns(dim):
                among.setdefault(v, []).append(node)
    blocked = [(node, v, n) for node, dim, n in seen.blocks for v in unknowns(dim)]
    mixed = [(node, v) for node, dim in seen.statistics for v in unknowns(dim)]

    listed: set[int] = set()
    dims = [d for key in names for d in seen.held[key].dims]
    for dim in (*dims, *(d for _, *both in seen.weights.values() for d in both)):
        # Kernels, and the ones that broadcasting needs: fixed, and no layer's channels.
        if any(not variables.reason(v) or v in producers or v in consumers for v in unknowns(dim)):
            listed |= unknowns(dim)
    number = {v: i for i, v in enumerate(sorted(listed))}

    def axis(dim: Dim) -> Axis:
        pieces = variables.resolve(dim)
        return tuple(Segment(number[v], r) for v, r in pieces) if all(v in number for v, _ in pieces) else ()

    groups = tuple(
        ChannelGroup(
            index=number[v],
            width=variables.width(v),
            producers=tuple(producers.get(v, ())),
            consumers=tuple(consumers.get(v, ())),
            fixed=variables.reason(v),
            multiple=math.lcm(*(n for _, w, n in blocked if w == v)),
            blocked_by=_unique(node for node, w, _ in blocked if w == v),
            mixed_by=_unique(node for node, w in mixed if w == v),
        )
        for v in sorted(listed)
    )
    tensors = {}
    for key, aliases in names.items():
        held = seen.held[key]
        axes = tuple(axis(d) for d in held.dims)
        if any(axes):
            tensors.update(dict.fromkeys(aliases, TensorChannels(axes, held.contracted, held.blocks)))
    layers = tuple(
        Layer(node, nodes[node].path, names[weight][0], axis(inputs), axis(outputs))
        for node, (weight, inputs, outputs) in seen.weights.items()
    )
    sizes = {
        nodes[node].path: {attribute: tuple(axis(d) for d in dims) for attribute, dims in held.items()}
        for node, held in seen.sizes.items()
    }
    return Channels(groups, tensors, layers, sizes)


def _tensor_names(model: nn.Module, held: Mapping[int, Held]) -> dict[int, list[str]]:
    """id → every name of each parameter and buffer that was met, in the model's order."""
    names: dict[int, list[str]] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        if id(tensor) in held:
            names.setdefault(id(tensor), []).append(name)
    return names


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
