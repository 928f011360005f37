"""The joint space of layer widths and number formats: a code gives both, for every layer."""

from __future__ import annotations

from collections.abc import Mapping
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
from bitfront.spaces.widths import WidthSpace

#: The tables under ``[search.search_space]``, in the order of the columns of a code.
PARTS = ("widths", "quantize")


@SPACES.register("joint")
class JointSpace(ModelSpace):
    """Widths of the layers and formats of their operands, each described by its table.

    Raises:
        ConfigError: a table is missing or wrong.
    """

    def __init__(self, request: SpaceRequest) -> None:
        for part in PARTS:
            if part not in request.parts:
                raise ConfigError(
                    f"this table is missing; a joint space needs the tables {' and '.join(PARTS)}, each with setup "
                    "and seed",
                    key=(*request.where[:-1], part),
                )
        above = request.where[:-1]
        requests = {
            name: replace(
                request,
                by=part.by,
                choices=part.choices,
                where=(*above, name, "seed"),
                parts={},
                default_for=part.default_for,
            )
            for name, part in request.parts.items()
        }
        self.of_widths, self.of_formats = WidthSpace(requests["widths"]), QuantizationSpace(requests["quantize"])
        self.graph = self.of_formats.graph
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
        """Number of candidates that the file spells out."""
        return self.of_widths.spelled_size * self.of_formats.spelled_size

    def offers(self) -> tuple[Offer, ...]:
        """What each layer offers: widths first, then formats."""
        return (*self.of_widths.offers(), *self.of_formats.offers())

    def uniform(self) -> Codes:
        """Each uniform precision at the widths of the model, then each uniform multiplier at the middle precision."""
        widths, formats = self.of_widths.uniform(), self.of_formats.uniform()
        middle = formats[len(formats) // 2] if len(formats) else np.zeros_like(self.of_formats.numbered(0, 1)[0])
        pairs = [(widths[0], code) for code in formats] + [(code, middle) for code in widths]
        rows = np.array([np.concatenate(pair) for pair in pairs], dtype=np.int64).reshape(
            len(pairs), len(self.parameters)
        )
        first = {row.tobytes(): i for i, row in reversed(list(enumerate(rows)))}
        return rows[sorted(first.values())]

    def encode(self, config: CandidateConfig) -> NDArray[np.int64]:
        """The code of a candidate spelled out.

        Raises:
            ConfigError: `config` is not of this space.
        """
        halves = []
        for part, space in zip(PARTS, (self.of_widths, self.of_formats), strict=True):
            table = config.get(part)
            if not isinstance(table, Mapping):
                raise ConfigError(
                    f"a candidate of a joint space needs the tables {' and '.join(PARTS)}; {part!r} is missing or is "
                    "no table"
                )
            halves.append(space.encode(table))
        return np.concatenate(halves)

    def split(self, codes: Codes) -> tuple[Codes, Codes]:
        """(options of the widths, codes of the formats); the columns of the widths come first in a code."""
        count = len(self.of_widths.parameters)
        return self.of_widths.options(codes[:, :count]), codes[:, count:]

    def widths(self, options: NDArray[np.int64]) -> dict[int, int]:
        """Channel group → new width, for the channel groups whose width changes."""
        return self.of_widths.widths(options)

    def quantization(self, graph: Graph) -> FormatSpace:
        """The space of the formats at the sites of `graph`, the model with changed widths."""
        return self.of_formats.quantization(graph)
