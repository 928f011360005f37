"""What a candidate needs on a microcontroller: flash and RAM of its C file, exactly, and cycles, by a model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from bitfront.errors import ExportError
from bitfront.graph import Graph
from bitfront.metrics import RUNNERS
from bitfront.metrics.base import EvaluationContext, Metric, Runner, Side, Values
from bitfront.spaces.base import Codes

if TYPE_CHECKING:
    from bitfront.exporters.c99.needs import CandidateNeeds


@RUNNERS.register("microcontroller")
class Microcontroller(Runner):
    """Flash, RAM and cycles of the C that ``bitfront export --to c`` writes."""

    side: ClassVar[Side] = "hw_runner"
    closed_form: ClassVar[bool] = True
    of_weights: ClassVar[bool] = True
    one_by_one: ClassVar[bool] = True
    produces = (
        Metric("flash", "bytes", "minimize", "modelled", "constants of the exported C, without the code; exact"),
        Metric("ram", "bytes", "minimize", "modelled", "buffers of the exported C; exact"),
        Metric("cycles", "cycles", "minimize", "modelled", "per sample on a Cortex-M4, from counts of operations"),
    )

    def measure(self, context: EvaluationContext, codes: Codes) -> Mapping[str, Values]:
        """The metrics of each candidate; NaN for one that has no integer program."""
        of_graph, rows = _needs(context.space.graph), []
        for code in codes:
            try:
                needs = of_graph.of(context.formats(code))
            except ExportError:
                rows.append((np.nan,) * 3)
            else:
                rows.append((needs.flash, needs.ram, needs.cycles))
        columns = np.array(rows, dtype=np.float64).reshape(-1, 3).T
        return {metric.name: column for metric, column in zip(self.produces, columns, strict=True)}

    def why_unmeasured(self, context: EvaluationContext, code: NDArray[np.int64]) -> str:
        """What the integer program of a candidate does not have."""
        try:
            _needs(context.space.graph).of(context.formats(code))
        except ExportError as error:
            return str(error)
        return ""


@lru_cache(maxsize=8)
def _needs(graph: Graph) -> CandidateNeeds:
    from bitfront.exporters.c99.needs import CandidateNeeds  # every search reads the names of all metrics

    return CandidateNeeds(graph)
