"""A network without the channels that do nothing: fewer neurons and channels, and the same outputs to the bit.

A channel leaves if, for each layer that reads it, one of two things holds. All weights of the layer for it are zero. Or
the layer reads a constant, because all weights that compute the channel are zero: the constant then goes into the bias
of that layer, where no bit of a sum changes by that. Otherwise the channel stays, and a note says why.

All operands of such a layer have bits of each value, so it is known which sums are exact. Channels that another layer
computes or reads stay: one in float, and one whose channels are not the first dimension of a sample. A channel that
leaves makes others do nothing, so this is repeated until none leaves.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from bitfront.errors import RunError
from bitfront.formats.base import Format, Operand
from bitfront.formats.fixed_map import FixedMap
from bitfront.graph import Graph, capture, channels
from bitfront.graph.channels import Axis, ChannelGroup, Layer
from bitfront.operations.base import Operands
from bitfront.transforms.arithmetic import EXACT
from bitfront.transforms.quantize import quantize
from bitfront.transforms.widen import narrowed, selected

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]
Formats = Mapping[str, Mapping[Operand, Format]]


@dataclass(frozen=True, eq=False)
class Smaller:
    """A network without the channels that do nothing.

    Attributes:
        graph: captured, with fewer channels.
        formats: site → operand → format, with bits for what is left.
        layers: path of a layer → shape of its weight before, and now.
        stays: why channels that do nothing are still there, in words.
        samples: on how many samples its outputs were compared with those of the larger one; they were equal to the bit.
    """

    graph: Graph
    formats: Formats
    layers: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    stays: tuple[str, ...]
    samples: int = 0

    @property
    def model(self) -> nn.Module:
        """The deployed network, a new model in evaluation mode."""
        return quantize(self.graph, self.formats, bake=True)


def without_idle_channels(graph: Graph, formats: Formats, x: Tensor) -> Smaller:
    """The network without the channels that do nothing.

    Args:
        graph: the captured model, with weights on the grids of their formats; it is not changed.
        formats: site → operand → format: each a ``FixedMap``; none for what stays in float.
        x: one sample or more, shape (samples, *features): constants are read from what the network computes of them.

    Raises:
        RunError: a format is another one, so it is unknown which sums are exact; or the model was not traced.
    """
    if graph.fx_graph is None:
        raise RunError(
            "the smaller network exists only for a model that torch.fx can trace, to see which layers share channels; "
            f"rebuild this trial without `smaller`. What stopped torch.fx: {graph.untraced}"
        )
    for site, of_site in formats.items():
        for operand, form in of_site.items():
            if form.value_bits is None:
                raise RunError(
                    "the smaller network exists only where bits were learned (strategy 'learned_bits'), or nothing is "
                    f"rounded, and {operand} of {site} is {form.label}; rebuild this trial without `smaller`"
                )
    step = _Step(graph, formats, x[:8])
    before = step.shapes()
    while True:
        found = ((group, kept) for group in step.structure.groups if (kept := step.kept(group)) is not None)
        group, kept = next(found, (None, None))
        if group is None or kept is None:
            now = step.shapes()
            return Smaller(graph, formats, {p: (before[p], now[p]) for p in before}, tuple(step.stays))
        graph, formats = step.without(group, *kept)
        step = _Step(graph, formats, x[:8])


def compared(result: Smaller, larger: nn.Module, splits: Mapping[str, Tensor], chunk: int = 4096) -> Smaller:
    """The result with the number of samples on which its outputs are those of the larger network.

    Args:
        larger: the deployed network with all channels.
        splits: name → samples.

    Raises:
        RunError: outputs differ on a sample.
    """
    model, count = result.model, 0
    for name, x in splits.items():
        for start in range(0, len(x), chunk):
            part = x[start : start + chunk]
            with torch.no_grad():
                same = (model(part.clone()) == larger(part.clone())).flatten(1).all(1)
            if not bool(same.all()):
                at = start + int((~same).nonzero()[0])
                raise RunError(
                    f"the smaller network answers otherwise than the larger one on sample {at} of {name}, so it is not "
                    "saved; rebuild the trial without `smaller`, and please report this"
                )
            count += len(part)
    return replace(result, samples=count)


def _module(graph: Graph, layer: Layer) -> Any:
    return graph.model.get_submodule(layer.path)  # a linear layer or a convolution


@dataclass(frozen=True, eq=False)
class _Reading:
    """What a layer reads of the channels of a group.

    Attributes:
        speaks: the channels that are a constant for it which changes its sums, shape (channels,).
        given: what each of these adds to its sums, shape (channels, outputs, positions).
    """

    layer: Layer
    speaks: Mask
    given: Floats


class _Step:
    """One look at a network: which channels do nothing.

    Attributes:
        layers: those that can lose channels, by name.
        stays: of a group that does nothing in part and stays, why.
    """

    def __init__(self, graph: Graph, formats: Formats, x: Tensor) -> None:
        self.graph, self.formats, self.structure, self._x = graph, formats, channels(graph), x
        self.layers = {layer.name: layer for layer in self.structure.layers if not self._obstacle(layer)}
        self.stays: list[str] = []
        self._read: dict[str, Tensor] = {}
        deployed = quantize(graph, formats)
        for layer in self.layers.values():
            deployed.get_submodule(layer.path).register_forward_pre_hook(self._look_at(layer.name))
        with torch.no_grad():
            deployed(x.clone())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path of a layer whose bits were learned → shape of its weight."""
        return {
            layer.path: tuple(_module(self.graph, layer).weight.shape)
            for layer in self.structure.layers
            if layer.path and layer.name in self.formats
        }

    def _obstacle(self, layer: Layer) -> str:
        """Why the channels of a layer stay, in words; empty if they can leave."""
        if not layer.path or layer.name not in self.formats:
            return "stays in float"
        site = self.graph.site(layer.name)
        if len(site.weight_shape) == 2 and len(site.inputs[0]) > 1:
            return "is called for each token"
        return ""

    def _look_at(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._read[name] = self.formats[name]["data_in"].round(inputs[0]).double()

        return hook

    def kept(self, group: ChannelGroup) -> tuple[Indices, dict[str, Floats]] | None:
        """(the channels of a group that stay, layer → its bias with the constants of the others); None if all stay."""
        if group.fixed or group.mixed_by or not group.producers:
            return None
        others = {*group.producers, *group.consumers} - self.layers.keys()
        if others:
            self._say_what_is_not_seen(group, others)
            return None
        free = np.ones(group.width, dtype=bool)
        readings = []
        for layer in self.layers.values():
            if layer.name in group.consumers and not self._depthwise(layer):
                useless, reading = self._reading(group, layer)
                free &= useless
                readings.append(reading)
        while True:
            gone, biases = _in_blocks(free, group.multiple), {}
            for reading in readings:
                which = reading.speaks & gone
                if which.any():
                    bias = self._with_constants(reading, which)
                    if isinstance(bias, str):
                        # Without those that do not fit; the others may.
                        alone = [c for c in np.flatnonzero(which) if isinstance(self._with_constants(reading, c), str)]
                        free[alone or which] = False
                        number = len(alone) or int(which.sum())
                        self.stays.append(f"{number} constant of {', '.join(group.producers)}: {bias}")
                        break
                    biases[reading.layer.name] = bias
            else:
                break
        if (free & ~gone).any():
            self._say_what_blocks(group, int((free & ~gone).sum()))
        return (np.flatnonzero(~gone), biases) if gone.any() else None

    def _say_what_blocks(self, group: ChannelGroup, number: int) -> None:
        names, blocks = ", ".join(group.producers), ", ".join(group.blocked_by)
        why = f"{blocks} cuts its channels into equal blocks" if blocks else "a layer needs one"
        self.stays.append(f"{number} of {names} that {'does' if number == 1 else 'do'} nothing: {why}")

    def _say_what_is_not_seen(self, group: ChannelGroup, others: set[str]) -> None:
        reasons = (f"{name} {self._obstacle(self.structure.layer(name))}" for name in sorted(others))
        self.stays.append(f"those of {', '.join(group.producers)}, whatever they do: {', '.join(reasons)}")

    def _reading(self, group: ChannelGroup, layer: Layer) -> tuple[Mask, _Reading]:
        """(the channels that the layer does not need, what it reads of them)."""
        places = self._places(layer.inputs, group)
        used = _each(places, self._live(layer).sum(axis=0) > 0, group.width)
        constant = self._constant(group, layer) & used
        x, rows = self._read[layer.name], np.flatnonzero(constant)
        outputs = self.graph.site(layer.name).output
        given = np.zeros((group.width, outputs[0], math.prod(outputs[1:])))
        if len(rows):
            alone = torch.zeros(len(rows), *x.shape[1:], dtype=torch.float64)
            for row, channel in enumerate(rows):
                at = torch.from_numpy(np.flatnonzero(places == channel))
                alone[row, at] = x[0, at]
            given[rows] = self._products(layer, alone).reshape(len(rows), *given.shape[1:])
        return ~used | constant, _Reading(layer, (given != 0).any(axis=(1, 2)), given)

    def _constant(self, group: ChannelGroup, layer: Layer) -> Mask:
        """The channels that are the same for all samples where the layer reads them."""
        producers = self._before(layer) & set(group.producers)
        if not producers:
            return np.zeros(group.width, dtype=bool)
        fed = np.zeros(group.width, dtype=bool)
        for producer in (self.structure.layer(name) for name in producers):
            fed |= _each(self._places(producer.outputs, group), self._live(producer).sum(axis=1) > 0, group.width)
        x, places = self._read[layer.name], self._places(layer.inputs, group)
        varying = (x != x[:1]).transpose(0, 1).flatten(1).any(1).numpy()
        return ~fed & ~_each(places, varying, group.width)

    def _before(self, layer: Layer) -> set[str]:
        """The layers whose outputs it reads, with no other layer between."""
        assert self.graph.fx_graph is not None
        names = {each.name for each in self.structure.layers}  # also those that keep their channels
        start = next(node for node in self.graph.fx_graph.nodes if node.name == layer.name)
        seen: set[fx.Node] = set()
        ahead = list(start.all_input_nodes)
        while ahead:
            node = ahead.pop()
            if node not in seen:
                seen.add(node)
                ahead += [] if node.name in names else node.all_input_nodes
        return {node.name for node in seen} & names

    def _with_constants(self, reading: _Reading, which: Mask | np.int64) -> Floats | str:
        """The bias of a layer with the constants of some channels in it, or why some bit of its sums would change."""
        layer = reading.layer
        module, formats = _module(self.graph, layer), self.formats[layer.name]
        added = reading.given[np.atleast_1d(which) if which.ndim == 0 else which].sum(0)
        if (added != added[:, :1]).any():
            return f"{layer.name} reads them beside its padding, so they are no constant for it"
        if module.bias is None:
            return f"{layer.name} has no bias that could take what they add"
        bias: Floats = module.bias.detach().double().numpy()
        now: Floats = bias + added[:, 0]
        data, weight = _fixed(formats["data_in"]), _fixed(formats["weight"])
        dense, x = np.abs(self._dense(layer)), np.ldexp(2.0**data.value_bits - 1, -data.points.astype(np.int64))
        most = x if x.ndim == 1 else x.reshape(len(x), -1).max(1)
        sums = (dense.sum(2) * most).sum(1) + np.abs(bias) + np.abs(added[:, 0])
        finest = int(data.points[data.widths > 0].max(initial=0)) + int(weight.points.max(initial=0))
        finest = max(finest, int(_points(bias).max()), int(_points(now).max()))
        if (np.ldexp(sums, finest) >= EXACT).any():
            return f"what they add to {layer.name} needs more than the 24 bits of a float's sums"
        return now

    def _products(self, layer: Layer, x: Tensor) -> Floats:
        module = _module(self.graph, layer)
        call = self.graph.site(layer.name).operation.call
        assert call is not None
        operands = Operands({"data_in": x, "weight": module.weight.detach().double(), "bias": None})
        result: Floats = call(module, operands).numpy()
        return result

    def _dense(self, layer: Layer) -> Floats:
        """Weights, shape (outputs, inputs, kernel); 0 between the groups of a convolution."""
        module = _module(self.graph, layer)
        weight: Floats = module.weight.detach().double().reshape(*module.weight.shape[:2], -1).numpy()
        groups = int(getattr(module, "groups", 1))
        rows, columns = len(weight) // groups, weight.shape[1]
        dense = np.zeros((len(weight), columns * groups, weight.shape[2]))
        for g in range(groups):
            part = slice(g * rows, (g + 1) * rows)
            dense[part, g * columns : (g + 1) * columns] = weight[part]
        return dense

    def _live(self, layer: Layer) -> Mask:
        """Which products may be other than 0, shape (outputs, inputs): of a weight that is not 0, and an input that has
        bits."""
        widths = _fixed(self.formats[layer.name]["data_in"]).widths
        has_bits = (widths > 0).reshape(len(widths), -1).any(1)
        live: Mask = (self._dense(layer) != 0).any(axis=2) & has_bits
        return live

    def _depthwise(self, layer: Layer) -> bool:
        return self.structure.tensors[layer.weight].contracted is None

    def _places(self, axis: Axis, group: ChannelGroup) -> Indices:
        """Which channel of the group each element of an axis belongs to; -1: to none."""
        parts = []
        for segment in axis:
            width = self.structure.groups[segment.group].width
            each = np.repeat(np.arange(width), segment.repeat)
            parts.append(each if segment.group == group.index else np.full_like(each, -1))
        return np.concatenate(parts)

    def without(self, group: ChannelGroup, kept: Indices, biases: Mapping[str, Floats]) -> tuple[Graph, Formats]:
        """The network with these channels of a group, and its formats."""
        model, formats = copy.deepcopy(self.graph.model), {site: dict(each) for site, each in self.formats.items()}
        for name, bias in biases.items():
            module = model.get_submodule(self.structure.layer(name).path)
            with torch.no_grad():
                module.get_parameter("bias").copy_(torch.from_numpy(bias))
            formats[name]["bias"] = _wide_enough(_fixed(formats[name]["bias"]), bias)
        picks = {group.index: torch.from_numpy(kept)}
        for layer in self.layers.values():
            axes = {"data_in": layer.inputs, "bias": layer.outputs}
            for operand, form in formats[layer.name].items():
                fixed = _fixed(form)
                axis = None if operand == "weight" else axes[operand]
                arrays = [
                    selected(self.structure, torch.from_numpy(a.copy()), picks, layer.weight, axis)
                    for a in (fixed.widths, fixed.points)
                ]
                widths, points = (a.numpy() for a in arrays)
                formats[layer.name][operand] = fixed.with_bits(widths, points)
        model = narrowed(replace(self.graph, model=model), self.structure, picks)
        return capture(model, torch.cat([self._x, self._x])[:2]), formats


def _each(places: Indices, mask: Mask, width: int) -> Mask:
    """Per channel, whether any element of an axis that belongs to it is marked."""
    marked = np.zeros(width, dtype=bool)
    marked[places[mask & (places >= 0)]] = True
    return marked


def _in_blocks(free: Mask, blocks: int) -> Mask:
    """The channels that leave, of those that can: as many in each block, and not all."""
    parts = free.reshape(blocks, -1)
    number = min(int(parts.sum(1).min()), parts.shape[1] - 1)
    gone: Mask = (parts & (np.cumsum(parts[:, ::-1], axis=1)[:, ::-1] <= number)).reshape(-1)
    return gone


def _points(values: Floats) -> Indices:
    """Bits behind the binary point that each value needs; 0 for whole numbers."""
    mantissas, exponents = np.frexp(values)
    whole = np.abs(np.ldexp(mantissas, 53)).astype(np.int64)
    zeros = np.array([(w & -w).bit_length() - 1 if w else 53 for w in whole.tolist()])
    points: Indices = np.maximum(53 - zeros - exponents, 0)
    return points


def _fixed(form: Format) -> FixedMap:
    return cast(FixedMap, form)  # no other format has bits of each value


def _wide_enough(form: FixedMap, values: Floats) -> FixedMap:
    """The format, with more bits where one of these values needs them."""
    widths, points = form.widths.copy(), form.points.copy()
    rounded = form.round(torch.from_numpy(values).float()).double().numpy()
    for at in np.flatnonzero(rounded != values):
        point = int(_points(values[at : at + 1])[0])
        widths[at], points[at] = int(abs(math.ldexp(values[at], point))).bit_length() + 1, point
    return form.with_bits(widths, points)
