"""Layer widths and number formats in one space: one code says how wide a network is and in what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bitfront.errors import ConfigError, one_of
from bitfront.graph import Graph
from bitfront.spaces import SPACES
from bitfront.spaces.base import Codes
from bitfront.spaces.model_space import ModelSpace, Offer
from bitfront.spaces.quantize import QuantizationSpace
from bitfront.spaces.request import SpaceRequest
from bitfront.spaces.widths import WidthSpace

#: The tables under ``[search.search_space]``, in the order of the columns of a code.
PARTS = ("widths", "quantize")


@SPACES.register("joint")
class JointSpace(ModelSpace):
    """Widths of the layers and formats of their operands, each in a table of its own."""

    def __init__(self, request: SpaceRequest) -> None:
        for part in PARTS:
            if part not in request.parts:
                raise ConfigError(
                    f"a joint space needs the tables {', '.join(PARTS)}, each with setup and seed",
                    key=(*request.where[:-1], part),
                )
        above = request.where[:-1]
        asked = {
            part: replace(request, by=own.by, seed=own.seed, where=(*above, part, "seed"), parts={})
            for part, own in request.parts.items()
        }
        self.graph = request.graph
        self.of_widths, self.of_formats = WidthSpace(asked["widths"]), QuantizationSpace(asked["quantize"])
        self.unused = (*self.of_widths.unused, *self.of_formats.unused)
        self.notes = (*self.of_widths.notes, *self.of_formats.notes)
        super().__init__(
            [
                {**entry, "part": part}
                for part, space in zip(PARTS, (self.of_widths, self.of_formats), strict=True)
                for entry in space.description
            ]
        )

    @property
    def spelled_size(self) -> int:
        """How many candidates the file spells out."""
        return self.of_widths.spelled_size * self.of_formats.spelled_size

    def offers(self) -> tuple[Offer, ...]:
        """The widths, then the formats."""
        return (*self.of_widths.offers(), *self.of_formats.offers())

    def uniform(self) -> Codes:
        """Every uniform precision at the widths of the model, and every uniform multiplier at the middle precision."""
        widths, formats = self.of_widths.uniform(), self.of_formats.uniform()
        middle = formats[len(formats) // 2] if len(formats) else np.zeros_like(self.of_formats.numbered(0, 1)[0])
        pairs = [(widths[0], own) for own in formats] + [(own, middle) for own in widths]
        rows = np.array([np.concatenate(pair) for pair in pairs], dtype=np.int64).reshape(
            len(pairs), len(self.parameters)
        )
        first = {row.tobytes(): i for i, row in reversed(list(enumerate(rows)))}
        return rows[sorted(first.values())]

    def encode(self, config: Mapping[str, object]) -> NDArray[np.int64]:
        """The code of a candidate spelled out.

        Raises:
            ConfigError: `config` is not of this space.
        """
        given = {part: config.get(part) for part in PARTS}
        sides = []
        for part, space in zip(PARTS, (self.of_widths, self.of_formats), strict=True):
            own = given[part]
            if not isinstance(own, Mapping):
                raise ConfigError(f"a candidate of a joint space has the tables {', '.join(PARTS)}; {one_of(PARTS)}")
            sides.append(space.encode(own))
        return np.concatenate(sides)

    def split(self, codes: Codes) -> tuple[Codes, Codes]:
        """Columns of the widths come first."""
        own = len(self.of_widths.parameters)
        return self.of_widths.options(codes[:, :own]), codes[:, own:]

    def widths(self, options: NDArray[np.int64]) -> dict[int, int]:
        """Channel group → width, for the groups whose width changes."""
        return self.of_widths.widths(options)

    def quantization(self, graph: Graph) -> QuantizationSpace:
        """The formats at the sites of `graph`."""
        return self.of_formats.quantization(graph)
