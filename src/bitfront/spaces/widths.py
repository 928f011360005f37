"""The space of layer widths: a multiplier for the number of output channels of each layer.

A group of the space is a layer. Its options are the distinct widths that its multipliers give. Inputs follow: an input
width is never chosen, because it is the output width of the layers before. Layers that share their channels (the two
sides of an addition) have one choice. So the multiplier of an ``input_only`` layer has no effect, and is no parameter.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bitfront.errors import ConfigError
from bitfront.graph import Graph
from bitfront.spaces import SPACES
from bitfront.spaces.base import Codes
from bitfront.spaces.described import CandidateConfig
from bitfront.spaces.model_space import FormatSpace, ModelSpace, Offer
from bitfront.spaces.quantize import QuantizationSpace
from bitfront.spaces.request import SpaceRequest
from bitfront.spaces.width_choices import LayerChoice, candidate_table, read_choices


@SPACES.register("graph/quantize/channel_size_modifier", "channel_size")
class WidthSpace(ModelSpace):
    """Widths of the layers; what takes their outputs in follows.

    Attributes:
        layers: the choice at every layer, also at those without one.

    Raises:
        ConfigError: something in the table of choices is wrong, or no layer has a choice.
    """

    def __init__(self, request: SpaceRequest) -> None:
        self.graph = request.graph
        self._request = request
        self.layers, self.unused, self.notes = read_choices(request)
        self._choices = tuple(choice for choice in self.layers if not choice.follows)
        if not request.float_only and all(not width.groups for choice in self._choices for width in choice.widths):
            layers = "; ".join(f"{c.layer.name} ({c.follows or 'as it is'})" for c in self.layers)
            unused = "".join(f"No layer matches {key!r} (by = {request.by!r}). " for key in self.unused)
            raise ConfigError(
                "there is no choice of widths: no layer whose width can change has a channel_multiplier that changes "
                f"it. {unused}Layers: {layers}",
                key=request.where,
            )
        super().__init__([_described(choice) for choice in self._choices])

    @property
    def spelled_size(self) -> int:
        """Number of candidates that the file spells out; candidates with the same widths count each."""
        return math.prod(choice.spelled for choice in self.layers)

    def offers(self) -> tuple[Offer, ...]:
        """For each layer its output width, and the widths it may have."""
        return tuple(
            Offer(
                choice.layer.name,
                choice.node.type,
                choice.key,
                choice.follows or f"{_size(choice)} → {' or '.join(str(w.channels) for w in choice.widths)}",
                len(choice.widths),
            )
            for choice in self.layers
        )

    def uniform(self) -> Codes:
        """The model as it is, then each multiplier at all layers, or the nearest that a layer has; each code once."""
        multipliers = sorted({w.multiplier for c in self._choices for w in c.widths}, key=lambda m: (m != 1, m))
        rows = [
            [min(range(len(c.widths)), key=lambda i: (abs(c.widths[i].multiplier - m), i)) for c in self._choices]
            for m in dict.fromkeys([1.0, *multipliers])
        ]
        codes = self.codes(np.array(rows, dtype=np.int64).reshape(len(rows), len(self.groups)))
        first = {row.tobytes(): i for i, row in reversed(list(enumerate(codes)))}
        return codes[sorted(first.values())]

    def encode(self, config: CandidateConfig) -> NDArray[np.int64]:
        """The code of a candidate spelled out, int64, shape (parameters,).

        Raises:
            ConfigError: `config` is not of this space; the message names the layer and its widths.
        """
        alone = WidthSpace(replace(self._request, **vars(candidate_table(config)), where=(), float_only=True))
        if alone.size != 1:
            free = ", ".join(p.name for p in alone.parameters)
            raise ConfigError(
                f"a single configuration is needed, and this leaves a choice at {free}; give one value each"
            )
        wanted = alone.widths(np.zeros(len(alone.groups), dtype=np.int64))
        options = np.zeros((1, len(self.groups)), dtype=np.int64)
        for g, choice in enumerate(self._choices):
            outputs = {s.group for s in choice.layer.outputs}
            changed = {group: width for group, width in wanted.items() if group in outputs}
            offered = [dict(w.groups) for w in choice.widths]
            if changed not in offered:
                allowed = ", ".join(str(w.channels) for w in choice.widths)
                raise ConfigError(
                    f"this space has no such width of {choice.node.title}; allowed: {allowed}. The candidate is "
                    f"{config}"
                )
            options[0, g] = offered.index(changed)
        code: NDArray[np.int64] = self.codes(options)[0]
        if self.widths(options[0]) != wanted:
            free = ", ".join(choice.layer.name for choice in self._choices)
            raise ConfigError(
                f"the candidate changes the width of a layer without a choice in this space; allowed: {free}. The "
                f"candidate is {config}"
            )
        return code

    def split(self, codes: Codes) -> tuple[Codes, Codes]:
        """(options, shape (candidates, groups); codes without columns, as all operands stay in float)."""
        return self.options(codes), np.zeros((len(codes), 0), dtype=np.int64)

    def widths(self, options: NDArray[np.int64]) -> dict[int, int]:
        """Channel group → new width, for the channel groups whose width changes.

        Args:
            options: of one candidate, shape (groups,).
        """
        changed: dict[int, int] = {}
        for choice, option in zip(self._choices, options.tolist(), strict=True):
            changed.update(choice.widths[option].groups)
        return changed

    def quantization(self, graph: Graph) -> FormatSpace:
        """The space of the float model alone: one candidate."""
        return QuantizationSpace.of_float(graph)


def _size(choice: LayerChoice) -> int:
    """The output width of a layer in the captured model."""
    unchanged = next((w.channels for w in choice.widths if not w.groups), None)
    return unchanged if unchanged is not None else choice.node.output[0] if choice.node.output else 0


def _described(choice: LayerChoice) -> dict[str, object]:
    """The entry of a layer in the description of the space."""
    settings = [
        {"label": f"x{w.multiplier:g}", "set": {"multiplier": w.multiplier}, "width": w.channels} for w in choice.widths
    ]
    operands = [{"operand": "channel", "settings": settings}]
    also: dict[str, object] = {"divisor": choice.divisor} if choice.divisor > 1 else {}
    also |= {"parent_block_name": choice.parent} if choice.parent else {}
    return {"site": choice.layer.name, "alternatives": [{"name": choice.name, "operands": operands, "also": also}]}
