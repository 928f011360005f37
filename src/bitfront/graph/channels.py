"""Channel groups: which dimensions of a model must change their size together. A search over widths chooses their
sizes.

``channels(graph)`` sorts the channels of a traced model into groups. All channels of a group are added or removed
together, in every tensor in which they occur. Two layers whose outputs are added make one group. The group of a
convolution whose output is flattened has H·W features per channel in the Linear that follows. Each dimension of each
parameter is an *axis*: a sequence of segments, group after group. Channels that cannot change, or cannot be followed,
are a group too; it is *fixed*, and says why.

``following.py`` follows layouts through the model, ``segments.py`` has the arithmetic of segments, and the record of
each operation has its rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from bitfront.errors import CaptureError, ConfigError, nearest
from bitfront.graph.base import Graph
from bitfront.graph.following import Held, Walk, walk
from bitfront.operations.layout import Dim


@dataclass(frozen=True)
class Segment:
    """A part of an axis: `repeat` elements for each channel of a group, one channel after the other."""

    group: int
    repeat: int = 1


#: The segments of a dimension, in order; empty for a dimension without channels (of a kernel).
Axis = tuple[Segment, ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are added and removed together.

    Attributes:
        index: its position in ``Channels.groups``.
        width: how many channels it has.
        producers: the nodes whose output channels these are, in execution order. A depthwise convolution is one of
            them, and one of the consumers too.
        consumers: the nodes that compute a weighted sum over these channels.
        fixed: why its width cannot change; empty if it can.
        multiple: the width must be a multiple of this number, because grouped convolutions or GroupNorms divide the
            channels into equal blocks.
        blocked_by: the nodes that divide them.
        mixed_by: the LayerNorms and GroupNorms that compute statistics over its channels. Copies of channels do not
            change their output only if every group under the norm is multiplied by the same integer.
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
    """The axes of a parameter or buffer.

    Attributes:
        axes: one per dimension.
        contracted: the dimension that is summed over with the input (1 of a Linear's weight); None if there is none.
        blocks: groups of a grouped convolution that is not depthwise, else 1. The axes of dimensions 0 and 1 are then
            those of all output and input channels, in this number of equal blocks. A block of outputs has weights for
            its block of inputs only.
    """

    axes: tuple[Axis, ...]
    contracted: int | None = None
    blocks: int = 1


@dataclass(frozen=True)
class Layer:
    """A node with weights.

    Attributes:
        name: the node's name.
        path: its module's path; empty for a function.
        weight: a name of its weight.
        inputs: the axis that is summed over.
        outputs: the axis of its output channels.
    """

    name: str
    path: str
    weight: str
    inputs: Axis
    outputs: Axis


@dataclass(frozen=True)
class Channels:
    """The groups of a model and where they occur.

    Attributes:
        groups: in the order of their first occurrence.
        tensors: name → its axes, for every parameter and buffer that has channels, under each of its names.
        layers: the nodes with weights, in execution order.
        sizes: module path → attribute → the axes whose sizes it holds; several where the attribute is a tuple.
    """

    groups: tuple[ChannelGroup, ...]
    tensors: Mapping[str, TensorChannels]
    layers: tuple[Layer, ...]
    sizes: Mapping[str, Mapping[str, tuple[Axis, ...]]]

    def layer(self, name: str) -> Layer:
        """The layer with that node name or module path.

        Raises:
            ConfigError: there is none.
        """
        for layer in self.layers:
            if name in (layer.name, layer.path):
                return layer
        names = [layer.name for layer in self.layers]
        raise ConfigError(
            f"no layer {name!r} has a width.{nearest(name, names)} Layers that have one: {', '.join(names) or 'none'}"
        )

    def size(self, axis: Axis, widths: Mapping[int, int] | None = None) -> int:
        """The number of elements of an axis; `widths` gives other widths, by group."""
        changed = widths or {}
        return sum(changed.get(s.group, self.groups[s.group].width) * s.repeat for s in axis)


def channels(graph: Graph) -> Channels:
    """Sort the channels of a captured model into groups.

    Raises:
        CaptureError: the model was not traced, so it is unknown which layers share a width.
    """
    if graph.fx_graph is None:
        raise CaptureError(
            "the widths of this model cannot be searched: that needs a model that torch.fx can trace, to see which "
            f"layers share a width. What stopped torch.fx: {graph.untraced}"
        )
    seen = walk(graph)
    _settle(seen)
    return _numbered(graph, seen)


def _settle(seen: Walk) -> None:
    """Fix dimensions whose final form is not supported."""
    variables = seen.variables
    for held in seen.held.values():
        if held.contracted is not None and held.copied:
            reason = "a weight that is summed over it is used in another way too"
            variables.fix(held.dims[held.contracted], reason)
    for node, dim, blocks in seen.blocks:
        pieces = variables.resolve(dim)
        if len(pieces) > 1 or variables.width(pieces[0][0]) % blocks:
            variables.fix(dim, f"{node} divides it into {blocks} blocks, which do not match its channels")


def _numbered(graph: Graph, seen: Walk) -> Channels:
    """The groups, numbered, without those that are not channels of any layer."""
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
        # Not those of kernels and of dimensions that broadcasting adds: they are fixed, and not channels of a layer.
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
    """id → all names of each parameter and buffer in `held`, in the model's order."""
    names: dict[int, list[str]] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        if id(tensor) in held:
            names.setdefault(id(tensor), []).append(name)
    return names


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
