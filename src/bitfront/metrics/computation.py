"""Operations and bit operations per sample, or per batch, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bitfront.formats.base import FLOAT_BITS
from bitfront.graph import Site
from bitfront.graph.costs import bit_operations
from bitfront.metrics import RUNNERS
from bitfront.metrics.base import EvaluationContext, Metric, Runner, RunnerSettings, Side, Values, table_sum
from bitfront.spaces.base import Codes
from bitfront.spaces.model_space import FormatSpace


class ComputationSettings(RunnerSettings):
    """``[search.strategy.hw_runner.basic_computation]``."""

    per: Literal["sample", "batch"] = Field("sample", description="whether a sample or a batch is counted")
    batch_size: int | None = Field(
        None, ge=1, description='samples in the batch of `per = "batch"`; default: `batch_size` at the top'
    )

    @property
    def batch(self) -> int | None:
        """Samples in the batch that is counted; None where it is a sample, or the size is not known."""
        return self.batch_size if self.per == "batch" else None

    def with_batch(self, size: int) -> Self:
        """With `size` as the default of ``batch_size``."""
        return self if self.per == "sample" or self.batch_size else self.model_copy(update={"batch_size": size})


@RUNNERS.register("basic_computation")
class BasicComputation(Runner):
    """Operations and bit operations per sample, or per batch."""

    Settings = ComputationSettings
    settings: ComputationSettings
    side: ClassVar[Side] = "hw_runner"
    closed_form: ClassVar[bool] = True
    produces = (
        Metric(
            "total_flops",
            "operations",
            "minimize",
            "modelled",
            "operations per sample (or batch), a multiply-add as one",
        ),
        Metric(
            "total_bitops",
            "bit operations",
            "minimize",
            "modelled",
            "multiply-adds · weight bits · input bits + other operations · input bits, per sample (or batch)",
        ),
    )

    def measure(self, context: EvaluationContext, codes: Codes) -> Mapping[str, Values]:
        """Both metrics of each candidate."""
        space = context.space
        flops = sum(n.operations or 0 for n in space.graph.nodes)
        bitops = table_sum(space, site_bitops(space), codes)
        others = [n for n in space.graph.nodes if not isinstance(n, Site)]
        fixed_bitops = sum(bit_operations(n, lambda _: FLOAT_BITS) for n in others)
        samples = self.settings.batch or 1
        return {
            "total_flops": np.full(len(codes), float(flops * samples)),
            "total_bitops": (bitops + fixed_bitops) * samples,
        }


def site_bitops(space: FormatSpace) -> list[NDArray[np.float64]]:
    """Bit operations per sample of each site for each of its options: an array of shape (options,) per group."""
    tables = []
    for g, (site, data) in enumerate(zip(space.sites, space.input_bits(), strict=True)):
        weights = {name: space.bits_at(g, name) for p in site.products for name in (p.data, p.weight)}
        bits = {**weights, "data_in": data}
        tables.append(np.asarray(bit_operations(site, bits.__getitem__), dtype=np.float64))
    return tables
