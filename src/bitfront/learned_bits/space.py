"""The space of a training with learned bits: a code is a position on its course.

Columns are the cycle, the member and the network that the cycle gives. The formats and weights of a network are results
of the training, so the space does not know them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bitfront.errors import ConfigError
from bitfront.formats.base import Format, Operand
from bitfront.formats.fixed_map import FixedMap
from bitfront.graph import Graph
from bitfront.learned_bits.course import Schedule
from bitfront.learned_bits.program import Granularities, Layer, Program
from bitfront.learned_bits.torch_program import TorchProgram
from bitfront.spaces.base import Codes
from bitfront.spaces.described import LEARNED_BITS, CandidateConfig
from bitfront.spaces.model_space import FormatSpace, ModelSpace, Offer
from bitfront.spaces.quantize import QuantizationSpace
from bitfront.transforms.quantize import SiteFormats


class LearnedBitsSpace(ModelSpace):
    """Where on the course of a training a network is.

    Args:
        graph: the captured model, with its batch norms folded where that is possible.
        program: its steps.
        schedule: how it is trained.
        original: the captured model as the user has it.
    """

    def __init__(self, graph: Graph, program: Program, schedule: Schedule, original: Graph) -> None:
        self.graph, self.program, self.schedule, self.original = graph, program, schedule, original
        self.notes = program.notes
        counts = {"cycle": schedule.cycles, "member": schedule.members, "network": schedule.networks}
        operands = [
            {
                "operand": name,
                "settings": [{"label": f"{name} {i + 1}", "set": {"number": i + 1}} for i in range(count)],
            }
            for name, count in counts.items()
        ]
        super().__init__([{"site": LEARNED_BITS, "alternatives": [{"name": LEARNED_BITS, "operands": operands}]}])

    def offers(self) -> tuple[Offer, ...]:
        """What is learned of each layer."""
        return tuple(
            Offer(
                layer.path,
                type(self.graph.model.get_submodule(layer.path)).__name__,
                layer.shared.rule,
                _offered(layer.shared),
                1,
            )
            for layer in self.program.layers
        )

    def uniform(self) -> Codes:
        """None: the order of the course is the only one."""
        return np.zeros((0, len(self.parameters)), dtype=np.int64)

    def encode(self, config: CandidateConfig) -> NDArray[np.int64]:
        """The code of a position, int64, shape (parameters,). Raises ConfigError if there is no such position."""
        table = config.get(LEARNED_BITS, {}).get("config", {})
        options = 0
        for name, count in zip(("cycle", "member", "network"), self.counts, strict=True):
            number = table.get(f"{name}_number", 1 if count == 1 else None)
            if not isinstance(number, int) or not 1 <= number <= count:
                raise ConfigError(f"{name}_number = {number!r} is no position here; allowed: 1 to {count}")
            options = options * count + number - 1
        code: NDArray[np.int64] = self.codes(np.array([[options]]))[0]
        return code

    @property
    def counts(self) -> tuple[int, int, int]:
        """Number of cycles, members, and networks per cycle and member."""
        return self.schedule.cycles, self.schedule.members, self.schedule.networks

    def positions(self, codes: Codes) -> list[tuple[int, int, int]]:
        """(cycle, member, network) of each code, from 0 on."""
        places = np.unravel_index(self.options(codes)[:, 0], self.counts)
        return list(zip(*(place.tolist() for place in places), strict=True))

    def split(self, codes: Codes) -> tuple[Codes, Codes]:
        """(nothing, as no width is chosen; nothing, as formats are learned)."""
        nothing = np.zeros((len(codes), 0), dtype=np.int64)
        return nothing, nothing

    def widths(self, options: NDArray[np.int64]) -> dict[int, int]:  # noqa: ARG002
        """Empty."""
        return {}

    def quantization(self, graph: Graph) -> FormatSpace:
        """The space whose only candidate has bits for every value that learns them, as many as at the start, and the
        formats that are fixed."""
        sites = {site.path: site.name for site in graph.sites if site.path}
        learned = {sites[layer.path]: _start(layer) for layer in self.program.layers}
        return QuantizationSpace.of_formats(graph, {**self.fixed, **learned})

    @property
    def fixed(self) -> Mapping[str, SiteFormats]:
        """Site → operand → format, not calibrated, of what learns no bits."""
        return self.program.fixed if isinstance(self.program, TorchProgram) else {}


def _offered(shared: Granularities) -> str:
    """Which values share bits, and the widths that they may have, as text."""
    texts = []
    for granularity, operand, widths in (
        (shared.weight, "weight", shared.weight_width),
        (shared.data_in, "input", shared.data_in_width),
        ("element", "bias", shared.bias_width),
    ):
        among = f", {' or '.join(map(str, widths))}" if widths else ""
        if operand != "bias" or widths:
            texts.append(f"per {granularity} of the {operand}{among}")
    if shared.data_in_rounding != "even":
        texts.append(f"inputs are rounded {'half up' if shared.data_in_rounding == 'half_up' else 'down'}")
    return "bits " + "; ".join(texts)


def _start(layer: Layer) -> Mapping[Operand, Format]:
    formats: dict[Operand, Format] = {}
    shapes = {
        "data_in": layer.source,
        "weight": layer.weight_shape,
        **({"bias": (layer.outputs,)} if layer.bias else {}),
    }
    for operand, shape in shapes.items():
        bits = np.full(shape, 8, dtype=np.int8)
        formats[operand] = FixedMap.of(bits, bits - 2, signed=True, samples=operand == "data_in")
    return formats
