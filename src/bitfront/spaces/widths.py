"""The space of layer widths: by what the number of output channels of each layer is multiplied.

A group of the space is a layer, with the channels it makes; its options are the widths that its multipliers come to,
each once. What takes these channels in follows, through whatever lies between, and so do layers that share them (the
two sides of an addition): an input width is never chosen. So the multiplier of an ``input_only`` layer has no effect,
and is no parameter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from bitfront.errors import ConfigError, nearest, one_of
from bitfront.graph import Channels, Graph, channels
from bitfront.graph.base import Node
from bitfront.graph.channels import Layer
from bitfront.registry import canonical
from bitfront.spaces import SPACES
from bitfront.spaces.base import Codes
from bitfront.spaces.model_space import ModelSpace, Offer
from bitfront.spaces.quantize import QuantizationSpace
from bitfront.spaces.request import Part, SpaceRequest
from bitfront.transforms.widen import multiplied_groups

#: What ``name`` may say: whose width a multiplier changes. Inputs follow in any case.
WIDENS = ("output_only", "both")
FOLLOWS = ("input_only", "NA")
KEYS = ("name", "channel_multiplier", "parent_block_name", "divisor")


@dataclass(frozen=True)
class Width:
    """One option of a layer.

    Attributes:
        multiplier: as the TOML says it.
        channels: output channels of the layer.
        groups: channel group → its width, where that changes.
    """

    multiplier: float
    channels: int
    groups: Mapping[int, int]


@dataclass(frozen=True)
class Widening:
    """What a layer got.

    Attributes:
        key: the key of the seed table that applied.
        name: the first of its names that widens, else the first.
        parent: ``parent_block_name``, empty if it has none.
        divisor: what widths are a multiple of.
        widths: the options, narrowest first; one where nothing is chosen here.
        follows: why nothing is chosen here, in words; empty where something is.
        spelled: how many settings of the layer the seed spells out.
    """

    layer: Layer
    node: Node
    key: str
    name: str
    parent: str
    divisor: int
    widths: tuple[Width, ...]
    follows: str
    spelled: int


@SPACES.register("graph/quantize/channel_size_modifier", "channel_size")
class WidthSpace(ModelSpace):
    """Widths of the layers; what takes their outputs in follows."""

    def __init__(self, request: SpaceRequest) -> None:
        self.graph = request.graph
        self._request = request
        self.layers, self.unused, self.notes = _SeedReader(request).read()
        self._chosen_at = tuple(w for w in self.layers if not w.follows)
        if not request.float_only and all(not width.groups for w in self._chosen_at for width in w.widths):
            layers = "; ".join(f"{w.layer.name} ({w.follows or 'as it is'})" for w in self.layers)
            unused = "".join(f"{key!r} is the {request.by} of none. " for key in self.unused)
            raise ConfigError(
                "there is no choice of widths: no layer with a free width has a channel_multiplier that makes another "
                f"one. {unused}Layers: {layers}",
                key=request.where,
            )
        super().__init__([_described(w) for w in self._chosen_at])

    @property
    def spelled_size(self) -> int:
        """How many candidates the file spells out, those that come to the same widths included."""
        return math.prod(w.spelled for w in self.layers)

    def offers(self) -> tuple[Offer, ...]:
        """Per layer its output width, and what it may become."""
        found = []
        for own in self.layers:
            choices = " or ".join(str(w.channels) for w in own.widths)
            text = own.follows or f"{_size(own)} → {choices}"
            found.append(Offer(own.layer.name, own.node.type, own.key, text, len(own.widths)))
        return tuple(found)

    def uniform(self) -> Codes:
        """The model as it is, then each multiplier at every layer, as near as the layer has it; each candidate once."""
        multipliers = sorted({w.multiplier for own in self._chosen_at for w in own.widths}, key=lambda m: (m != 1, m))
        rows = [
            [min(range(len(o.widths)), key=lambda i: (abs(o.widths[i].multiplier - m), i)) for o in self._chosen_at]
            for m in dict.fromkeys([1.0, *multipliers])
        ]
        codes = self.codes(np.array(rows, dtype=np.int64).reshape(len(rows), len(self.groups)))
        first = {row.tobytes(): i for i, row in reversed(list(enumerate(codes)))}
        return codes[sorted(first.values())]

    def encode(self, config: Mapping[str, object]) -> NDArray[np.int64]:
        """The code of a candidate spelled out.

        Raises:
            ConfigError: `config` is not of this space; the layer and what it offers are named.
        """
        alone = WidthSpace(replace(self._request, **vars(spelled(config)), where=(), float_only=True))
        if alone.size != 1:
            free = ", ".join(p.name for p in alone.parameters)
            raise ConfigError(f"one configuration is needed, and this leaves a choice at {free}")
        wanted = alone.widths(np.zeros(len(alone.groups), dtype=np.int64))
        options = np.zeros((1, len(self.groups)), dtype=np.int64)
        for g, own in enumerate(self._chosen_at):
            mine = {s.group for s in own.layer.outputs}
            changed = {group: width for group, width in wanted.items() if group in mine}
            if changed not in [dict(w.groups) for w in own.widths]:
                offered = ", ".join(str(w.channels) for w in own.widths)
                raise ConfigError(f"this space offers {own.node.title} the widths {offered}, and not that of {config}")
            options[0, g] = [dict(w.groups) for w in own.widths].index(changed)
        code: NDArray[np.int64] = self.codes(options)[0]
        if self.widths(options[0]) != wanted:
            raise ConfigError(f"this space does not offer the widths of {config}")
        return code

    def split(self, codes: Codes) -> tuple[Codes, Codes]:
        """Everything stays in float."""
        return self.options(codes), np.zeros((len(codes), 0), dtype=np.int64)

    def widths(self, options: NDArray[np.int64]) -> dict[int, int]:
        """Channel group → width, for the groups whose width changes."""
        found: dict[int, int] = {}
        for own, option in zip(self._chosen_at, options.tolist(), strict=True):
            found.update(own.widths[option].groups)
        return found

    def quantization(self, graph: Graph) -> QuantizationSpace:
        """The space of the float model alone."""
        return QuantizationSpace.of_float(graph)


def spelled(config: Mapping[str, object]) -> Part:
    """The tables in a candidate spelled out, ``{"by": ..., key: {"config": {...}}}``. Raises ConfigError."""
    seed = {}
    for key, own in config.items():
        if key == "by":
            continue
        if not isinstance(own, Mapping) or not isinstance(own.get("config", own), Mapping):
            raise ConfigError(f"{key!r} must be a table with a config")
        seed[key] = own.get("config", own)
    return Part(str(config.get("by", "name")), seed)


def _size(own: Widening) -> int:
    return next((w.channels for w in own.widths if not w.groups), own.node.output[0] if own.node.output else 0)


def _described(own: Widening) -> dict[str, object]:
    settings = [
        {"label": f"x{w.multiplier:g}", "set": {"multiplier": w.multiplier}, "width": w.channels} for w in own.widths
    ]
    operands = [{"operand": "channel", "settings": settings}]
    also: dict[str, object] = {"divisor": own.divisor} if own.divisor > 1 else {}
    also |= {"parent_block_name": own.parent} if own.parent else {}
    return {"site": own.layer.name, "alternatives": [{"name": own.name, "operands": operands, "also": also}]}


class _SeedReader:
    """From the TOML's tables to what each layer got."""

    def __init__(self, request: SpaceRequest) -> None:
        self.request = request
        self.structure: Channels = channels(request.graph)
        self.nodes = {n.name: n for n in request.graph.nodes}
        self.notes: list[str] = []
        #: Channel group → the layer whose parameter decides its width.
        self.owner: dict[int, Widening] = {}

    def read(self) -> tuple[tuple[Widening, ...], tuple[str, ...], tuple[str, ...]]:
        """(what each layer got, unused keys of the seed, notes). Raises ConfigError."""
        seed = self.request.seed
        keys = [k for k in seed if k != "default"]
        for key in keys:
            self._check_key(key)
        used: set[str] = set()
        found = []
        for layer in self.structure.layers:
            node = self.nodes[layer.name]
            key = next((k for k in keys if self._names(k, node)), "default")
            used.add(key)
            found.append(self._layer(layer, node, key))
        return tuple(found), tuple(k for k in keys if k not in used), tuple(self.notes)

    def _where(self, key: str, *more: str) -> tuple[str, ...]:
        return (*self.request.where, key, *more)

    def _names(self, key: str, node: Node) -> bool:
        if self.request.by == "name":
            return key == (node.name if key in self.nodes else node.path)
        if self.request.by == "type":
            return canonical(key) in (canonical(node.op), canonical(node.type))
        return bool(re.fullmatch(key, node.name) or (node.path and re.fullmatch(key, node.path)))

    def _check_key(self, key: str) -> None:
        """A key must name something; and what it widens must be a layer."""
        if self.request.by == "regex_name":
            try:
                re.compile(key)
            except re.error as error:
                raise ConfigError(f"{key!r} is not a regular expression: {error}", key=self._where(key)) from None
            return
        layers = [layer.name for layer in self.structure.layers]
        named = [n for n in self.nodes.values() if key in (n.name, n.path)]
        types = {t: None for n in self.nodes.values() for t in (n.op, n.type)}
        if not named and canonical(key) not in map(canonical, types):
            known = layers if self.request.by == "name" else list(types)
            what = "layer" if self.request.by == "name" else "type of layer"
            raise ConfigError(
                f"the model has no {what} {key!r}; {one_of(known)}.{nearest(key, known)}", key=self._where(key)
            )
        if named and not any(n.name in layers for n in named):
            names, multipliers, _ = self._settings(key)
            if any(n in WIDENS for n in names) and any(m != 1 for m in multipliers):
                raise ConfigError(
                    f"{named[0].title} has no width of its own: it follows the layers before it. Layers that have one: "
                    f"{', '.join(layers)}",
                    key=self._where(key),
                )

    def _settings(self, key: str) -> tuple[list[str], list[float], int]:
        """(names, multipliers, divisor) of a key of the seed. Raises ConfigError."""
        given = self.request.seed.get(key, {})
        where = self._where(key, "config")
        values: dict[str, list[Any]] = {k: list(v) if isinstance(v, (list, tuple)) else [v] for k, v in given.items()}
        for name, own in values.items():
            if name not in KEYS:
                raise ConfigError(f"unknown key; {one_of(KEYS)}.{nearest(name, KEYS)}", key=(*where, name))
            if not own:
                raise ConfigError("the list of choices is empty", key=(*where, name))
        names = ["NA" if n is None else n for n in values.get("name", ["NA"])]
        allowed = (*WIDENS, *FOLLOWS)
        for name in names:
            if name not in allowed:
                hint = nearest(str(name), allowed)
                raise ConfigError(f"{name!r} is not possible; {one_of(allowed)}.{hint}", key=(*where, "name"))
        multipliers = [1 if v in ("NA", None) else v for v in values.get("channel_multiplier", [1])]
        for value in multipliers:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                raise ConfigError(
                    f"{value!r} is not possible; allowed: numbers above 0", key=(*where, "channel_multiplier")
                )
        divisors = values.get("divisor", [1])
        for value in divisors:
            if len(divisors) > 1 or isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"{given['divisor']!r} is not possible; allowed: one whole number from 1", key=(*where, "divisor")
                )
        return names, multipliers, divisors[0]

    def _layer(self, layer: Layer, node: Node, key: str) -> Widening:
        names, multipliers, divisor = self._settings(key)
        parents = self._parents(layer, key)
        size = self.structure.size(layer.outputs)
        widths: tuple[Width, ...] = (Width(1, size, {}),)
        follows = f"{size}, as it is"
        if any(n in WIDENS for n in names) and any(m != 1 for m in multipliers):
            # A choice between widening and not is one among multipliers.
            wanted = multipliers + [1] * any(n in FOLLOWS for n in names)
            widths, follows = self._options(layer, key, wanted, divisor)
        own = Widening(
            layer=layer,
            node=node,
            key=key,
            name=next((n for n in names if n in WIDENS), names[0]),
            parent=parents[0] if parents else "",
            divisor=divisor,
            widths=widths,
            follows=follows,
            spelled=len(names) * len(multipliers) * max(1, len(parents)),
        )
        return self._owned(own)

    def _options(self, layer: Layer, key: str, multipliers: list[float], divisor: int) -> tuple[tuple[Width, ...], str]:
        """(a layer's options, why it has none)."""
        fixed = {s.group: self.structure.groups[s.group].fixed for s in layer.outputs}
        reason = next((why for why in fixed.values() if why), "" if layer.outputs else "its outputs are no channels")
        size = self.structure.size(layer.outputs)
        if reason:
            text = f"the width of {layer.name} is {size} and cannot change: {reason}"
            if self.request.by == "name" and key != "default":
                raise ConfigError(text, key=self._where(key, "config", "channel_multiplier"))
            # A rule for many layers is not wrong because one of them makes the output.
            self.notes.append(text)
            return (Width(1, size, {}),), f"{size}, fixed: {reason}"
        found: dict[int, Width] = {}
        for multiplier in multipliers:
            groups = multiplied_groups(self.structure, {layer.name: multiplier}, divisor)
            changed = {g: w for g, w in groups.items() if w != self.structure.groups[g].width}
            width = self.structure.size(layer.outputs, changed)
            found.setdefault(width, Width(multiplier, width, changed))
        return tuple(found[w] for w in sorted(found)), ""

    def _owned(self, own: Widening) -> Widening:
        """A layer whose channels another one decides about follows it; it must not say otherwise."""
        if own.follows:
            return own
        groups = {s.group for s in own.layer.outputs}
        owners = {self.owner[g].layer.name: self.owner[g] for g in groups if g in self.owner}
        for other in owners.values():
            theirs = {s.group for s in other.layer.outputs}
            same = [(w.multiplier, dict(w.groups)) for w in own.widths] == [
                (w.multiplier, dict(w.groups)) for w in other.widths
            ]
            if not same or groups - theirs:
                said = " and ".join(
                    f"{w.layer.name} {', '.join(f'x{o.multiplier:g}' for o in w.widths)}" for w in (other, own)
                )
                raise ConfigError(
                    f"{other.layer.name} and {own.layer.name} share their channels, so they cannot have multipliers of "
                    f"their own: {said}. Give both the same, or one of them 'NA'",
                    key=self._where(own.key, "config", "channel_multiplier"),
                )
            return replace(own, widths=(Width(1, own.widths[0].channels, {}),), follows=f"as {other.layer.name}")
        self.owner.update(dict.fromkeys(groups, own))
        return own

    def _parents(self, layer: Layer, key: str) -> list[str]:
        """``parent_block_name``, checked: where the layer's input comes from is in the model, not in the file."""
        given = self.request.seed.get(key, {}).get("parent_block_name")
        where = self._where(key, "config", "parent_block_name")
        named = [p for p in (given if isinstance(given, (list, tuple)) else [given]) if p not in (None, "NA")]
        sources = self._sources(layer) if named else {}
        for parent in named:
            node = next((n for n in self.nodes.values() if parent in (n.name, n.path)), None)
            if node is None:
                known = list(self.nodes)
                raise ConfigError(
                    f"the model has no node {parent!r}; {one_of(known)}.{nearest(str(parent), known)}", key=where
                )
            if node.name not in sources:
                layers = [name for name, is_layer in sources.items() if is_layer]
                raise ConfigError(
                    f"the input of {layer.name} does not come from {parent!r}, but from "
                    f"{' and '.join(layers) or 'the input of the model'}; leave parent_block_name out, it follows "
                    "from the model",
                    key=where,
                )
        return [str(p) for p in named]

    def _sources(self, layer: Layer) -> dict[str, bool]:
        """The nodes that the layer's input goes through, back to the layers that make it; whether each is one."""
        graph = self.request.graph.fx_graph
        assert graph is not None
        layers = {other.name for other in self.structure.layers}
        found: dict[str, bool] = {}
        ahead = list(next(n for n in graph.nodes if n.name == layer.name).all_input_nodes)
        for node in _all(ahead):
            found[node.name] = node.name in layers
            if not found[node.name]:
                ahead.extend(n for n in node.all_input_nodes if n.name not in found)
        return found


def _all(ahead: list[fx.Node]) -> Iterator[fx.Node]:
    """Everything in a list that grows meanwhile."""
    while ahead:
        yield ahead.pop()
