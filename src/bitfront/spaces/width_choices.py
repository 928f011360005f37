"""From the table of choices of a width space to the widths that each layer may have.

Every mistake in the table is an error here: keys that name no layer, multipliers of layers whose width is fixed, layers
that share channels but have different multipliers, parents that contradict the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from bitfront.errors import ConfigError, nearest, one_of
from bitfront.graph import Channels, channels
from bitfront.graph.base import Node
from bitfront.graph.channels import Layer
from bitfront.registry import canonical
from bitfront.spaces.request import Part, SpaceRequest
from bitfront.transforms.widen import multiplied_groups

#: Values of ``name`` with which multipliers apply to the output width. Input widths follow in any case.
WIDENS = ("output_only", "both")
#: Values of ``name`` with which the output width stays.
FOLLOWS = ("input_only", "NA")
KEYS = ("name", "channel_multiplier", "parent_block_name", "divisor")


@dataclass(frozen=True)
class Width:
    """One option of a layer.

    Attributes:
        multiplier: as in the table.
        channels: output channels of the layer.
        groups: channel group → its width, for those whose width changes.
    """

    multiplier: float
    channels: int
    groups: Mapping[int, int]


@dataclass(frozen=True)
class LayerChoice:
    """The choice of widths at one layer.

    Attributes:
        layer: with the channel groups of its output.
        node: its node in the graph.
        key: the key of the table that applied.
        name: the first of its values of ``name`` that widens, else the first.
        parent: ``parent_block_name``; empty if there is none.
        divisor: widths are a multiple of it.
        widths: the options, narrowest first; a single one if the layer has no choice.
        follows: why the layer has no choice, in words; empty if it has one.
        spelled: number of settings of the layer that the table spells out.
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


def read_choices(request: SpaceRequest) -> tuple[tuple[LayerChoice, ...], tuple[str, ...], tuple[str, ...]]:
    """The choice at every layer.

    Returns:
        (a choice per layer; keys of the table that name no layer; notes for the user).

    Raises:
        ConfigError: something in the table is wrong; its key is named.
    """
    return _Reader(request).read()


def candidate_table(config: Mapping[str, object]) -> Part:
    """The table of choices of a single candidate spelled out, ``{"by": ..., key: {"config": {...}}}``.

    Raises:
        ConfigError: the value of a key is no table.
    """
    table = {}
    for key, value in config.items():
        if key == "by":
            continue
        settings = value.get("config", value) if isinstance(value, Mapping) else None
        if not isinstance(settings, Mapping):
            raise ConfigError(f"{key!r} must be a table with the key 'config', as in a trial's config; it is {value!r}")
        table[key] = settings
    return Part(str(config.get("by", "name")), table)


class _Reader:
    """Reads the table of a request, layer by layer."""

    def __init__(self, request: SpaceRequest) -> None:
        self.request = request
        self.structure: Channels = channels(request.graph)
        self.nodes = {n.name: n for n in request.graph.nodes}
        self.notes: list[str] = []
        #: Channel group → the layer that its width is chosen at.
        self.chooser: dict[int, LayerChoice] = {}

    def read(self) -> tuple[tuple[LayerChoice, ...], tuple[str, ...], tuple[str, ...]]:
        keys = [k for k in self.request.choices if k != "default"]
        for key in keys:
            self._check_key(key)
        used: set[str] = set()
        choices = []
        for layer in self.structure.layers:
            node = self.nodes[layer.name]
            key = next((k for k in keys if self._names(k, node)), "default")
            used.add(key)
            choices.append(self._choice(layer, node, key))
        return tuple(choices), tuple(k for k in keys if k not in used), tuple(self.notes)

    def _where(self, key: str, *more: str) -> tuple[str, ...]:
        return (*self.request.where, key, *more)

    def _names(self, key: str, node: Node) -> bool:
        if self.request.by == "name":
            return key == (node.name if key in self.nodes else node.path)
        if self.request.by == "type":
            return canonical(key) in (canonical(node.op), canonical(node.type))
        return bool(re.fullmatch(key, node.name) or (node.path and re.fullmatch(key, node.path)))

    def _check_key(self, key: str) -> None:
        """A key must name something, and whatever it widens must be a layer."""
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
                    f"the width of {named[0].title} cannot be chosen: it follows the layers before it; "
                    f"{one_of(layers)}",
                    key=self._where(key),
                )

    def _settings(self, key: str) -> tuple[list[str], list[float], int]:
        """(names, multipliers, divisor) of a key of the table. Raises ConfigError."""
        given = self.request.choices.get(key, {})
        where = self._where(key, "config")
        values: dict[str, list[Any]] = {k: list(v) if isinstance(v, (list, tuple)) else [v] for k, v in given.items()}
        for name, choices in values.items():
            if name not in KEYS:
                raise ConfigError(f"unknown key; {one_of(KEYS)}.{nearest(name, KEYS)}", key=(*where, name))
            if not choices:
                raise ConfigError("the list of choices is empty; give one value or more", key=(*where, name))
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

    def _choice(self, layer: Layer, node: Node, key: str) -> LayerChoice:
        names, multipliers, divisor = self._settings(key)
        parents = self._parents(layer, key)
        size = self.structure.size(layer.outputs)
        widths: tuple[Width, ...] = (Width(1, size, {}),)
        follows = f"{size}, as it is"
        if any(n in WIDENS for n in names) and any(m != 1 for m in multipliers):
            # A name that does not widen, beside one that does, is the multiplier 1.
            wanted = multipliers + [1] * any(n in FOLLOWS for n in names)
            widths, follows = self._options(layer, key, wanted, divisor)
        choice = LayerChoice(
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
        return self._shared(choice)

    def _options(self, layer: Layer, key: str, multipliers: list[float], divisor: int) -> tuple[tuple[Width, ...], str]:
        """(the options of a layer; why it has no choice, empty if it has one)."""
        fixed = {s.group: self.structure.groups[s.group].fixed for s in layer.outputs}
        reason = next((why for why in fixed.values() if why), "" if layer.outputs else "its outputs are no channels")
        size = self.structure.size(layer.outputs)
        if reason:
            text = f"the width of {layer.name} is {size} and cannot change: {reason}"
            if self.request.by == "name" and key != "default":
                raise ConfigError(
                    f"{text}; leave its channel_multiplier out", key=self._where(key, "config", "channel_multiplier")
                )
            # A rule for many layers is no mistake if it cannot apply to one of them, such as the output layer.
            self.notes.append(text)
            return (Width(1, size, {}),), f"{size}, fixed: {reason}"
        options: dict[int, Width] = {}
        for multiplier in multipliers:
            groups = multiplied_groups(self.structure, {layer.name: multiplier}, divisor)
            changed = {g: w for g, w in groups.items() if w != self.structure.groups[g].width}
            width = self.structure.size(layer.outputs, changed)
            options.setdefault(width, Width(multiplier, width, changed))
        return tuple(options[w] for w in sorted(options)), ""

    def _shared(self, choice: LayerChoice) -> LayerChoice:
        """The choice, or none if the channels of the layer are chosen at a layer before it; both must then agree."""
        if choice.follows:
            return choice
        groups = {s.group for s in choice.layer.outputs}
        choosers = {self.chooser[g].layer.name: self.chooser[g] for g in groups if g in self.chooser}
        for other in choosers.values():
            others = {s.group for s in other.layer.outputs}
            same = [(w.multiplier, dict(w.groups)) for w in choice.widths] == [
                (w.multiplier, dict(w.groups)) for w in other.widths
            ]
            if not same or groups - others:
                multipliers = " and ".join(
                    f"{c.layer.name} {', '.join(f'x{w.multiplier:g}' for w in c.widths)}" for c in (other, choice)
                )
                raise ConfigError(
                    f"{other.layer.name} and {choice.layer.name} share their channels, so their multipliers must be "
                    f"equal, and they are {multipliers}. Give both the same, or give one of them name = 'NA'",
                    key=self._where(choice.key, "config", "channel_multiplier"),
                )
            unchanged = (Width(1, choice.widths[0].channels, {}),)
            return replace(choice, widths=unchanged, follows=f"as {other.layer.name}")
        self.chooser.update(dict.fromkeys(groups, choice))
        return choice

    def _parents(self, layer: Layer, key: str) -> list[str]:
        """``parent_block_name``, checked: the model says where the input of the layer comes from."""
        given = self.request.choices.get(key, {}).get("parent_block_name")
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
                    f"{' and '.join(layers) or 'the input of the model'}; leave parent_block_name out: it follows "
                    "from the model",
                    key=where,
                )
        return [str(p) for p in named]

    def _sources(self, layer: Layer) -> dict[str, bool]:
        """The nodes between the layer and the layers that make its input, with those layers: name → is it a layer."""
        graph = self.request.graph.fx_graph
        assert graph is not None
        layers = {other.name for other in self.structure.layers}
        sources: dict[str, bool] = {}
        ahead = list(next(n for n in graph.nodes if n.name == layer.name).all_input_nodes)
        for node in _popped(ahead):
            sources[node.name] = node.name in layers
            if not sources[node.name]:
                ahead.extend(n for n in node.all_input_nodes if n.name not in sources)
        return sources


def _popped(ahead: list[fx.Node]) -> Iterator[fx.Node]:
    """Takes nodes from the end of a list, to which the caller adds meanwhile, until it is empty."""
    while ahead:
        yield ahead.pop()
