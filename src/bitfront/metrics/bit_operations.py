"""The cost of a network's multiplications in logic: BOPs and EBOPs, and the fraction of its weights that are zero.

These metrics depend on the values of the weights: a weight that is zero in its format needs no multiplier. The formulas
are in ``bitfront.graph.costs`` and ``bitfront.metrics.effective_bits``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import fx

from bitfront.formats.base import FLOAT_BITS
from bitfront.graph import Graph
from bitfront.graph.capture import parameter
from bitfront.graph.costs import bops
from bitfront.metrics import RUNNERS
from bitfront.metrics.base import EvaluationContext, Metric, Runner, RunnerSettings, Side, Values, option_sum
from bitfront.metrics.effective_bits import BitCount, site_ebops
from bitfront.metrics.stored import weights
from bitfront.spaces.base import Codes


class InputSettings(RunnerSettings):
    """``[search.strategy.hw_runner.bops]``."""

    input_bits: int | None = Field(
        None,
        ge=1,
        le=64,
        description="bits of the model's input at the first layers with weights; default: as in their data_in format",
    )


class EbopsSettings(InputSettings):
    """``[search.strategy.hw_runner.ebops]``."""

    sign_bits: bool = Field(False, description="whether signs count; HGQ leaves them out")
    count: Literal["width", "set_bits"] = Field(
        "width",
        description="bits of a weight or bias: the width of its format, or from the highest to the lowest bit of each "
        "value that is set",
    )
    biases: bool = Field(True, description="whether bits of biases count, once per output, as HGQ counts them")


class _Multiplications(Runner):
    """Sum over the sites of the cost of their multiplications, looked up per option."""

    Settings = InputSettings
    settings: InputSettings
    side: ClassVar[Side] = "hw_runner"
    closed_form: ClassVar[bool] = True
    of_weights: ClassVar[bool] = True
    #: Of a product of two values in float, which layers that are no sites have.
    in_float: float = FLOAT_BITS**2

    @abstractmethod
    def _table(self, context: EvaluationContext, group: int, input_bits: int | None) -> Values:
        """The cost of a site under each option; its input has `input_bits`, or as many as its format."""

    def measure(self, context: EvaluationContext, codes: Codes) -> Mapping[str, Values]:
        """The sum for each candidate."""
        space, wanted = context.space, self.settings.input_bits
        first = first_weighted(space.graph) if wanted else frozenset()
        tables = [self._table(context, g, wanted if site.name in first else None) for g, site in enumerate(space.sites)]
        apart = sum(layer.macs for layer in space.graph.left_out) * self.in_float
        return {self.produces[0].name: option_sum(tables, space.options(codes)) + apart}


@RUNNERS.register("bops")
class Bops(_Multiplications):
    """Bit operations with their additions, as published for jet tagging (Baskin et al. 2021, Hawks et al. 2021)."""

    produces = (
        Metric(
            "bops",
            "bit operations",
            "minimize",
            "modelled",
            "Σ m·n·(p·b_a·b_w + b_a + b_w + log2 n), p the share of non-zero weights, per sample",
        ),
    )

    def _table(self, context: EvaluationContext, group: int, input_bits: int | None) -> Values:
        space = context.space
        site, total = space.sites[group], np.zeros(space.groups[group].size)
        for product in site.products:
            weight, data = space.bits_at(group, product.weight), space.bits_at(group, product.data)
            if input_bits is not None and product.data == "data_in":
                data = np.full_like(data, input_bits)
            size = math.prod(product.shape)
            # Of a weight that is an activation no value is known to be zero.
            known = site.parameter(product.weight) is not None
            count = context.nonzero(group, product.weight) if known else np.full_like(data, size)
            total += bops(product, data, weight, count / size)
        return total


@RUNNERS.register("ebops")
class Ebops(_Multiplications):
    """Effective bit operations: bits times bits of every multiplication by a weight that is not zero (HGQ, 2024)."""

    Settings = EbopsSettings
    settings: EbopsSettings
    produces = (
        Metric(
            "ebops", "bit operations", "minimize", "modelled", "Σ b_w · b_a of weights that are not zero + Σ b_bias"
        ),
    )

    def __init__(self, settings: EbopsSettings) -> None:
        super().__init__(settings)
        self._count = BitCount(settings.sign_bits, settings.count, settings.biases)
        self.in_float = float(self._count.width(FLOAT_BITS, True)) ** 2

    def _table(self, context: EvaluationContext, group: int, input_bits: int | None) -> Values:
        space = context.space
        site, options = space.sites[group], space.site_formats[group]
        data = {name: [formats.get(name) for formats in options] for name in {n for f in options for n in f}}
        total = site_ebops(
            space.graph, site, data, self._count, lambda o, f: context.of_parameter(group, o, f), input_bits
        )
        return np.broadcast_to(total, len(options)).astype(np.float64)


@RUNNERS.register("sparsity")
class Sparsity(Runner):
    """Share of the weights that are zero in their formats."""

    side: ClassVar[Side] = "hw_runner"
    closed_form: ClassVar[bool] = True
    of_weights: ClassVar[bool] = True
    produces = (Metric("sparsity", "", "maximize", "modelled", "share of weights that are zero once quantized"),)

    def measure(self, context: EvaluationContext, codes: Codes) -> Mapping[str, Values]:
        """The sparsity of each candidate, 0 to 1; 0 for a model without weights.

        Weights that several use count once, as they are stored.
        """
        space, options = context.space, context.space.options(codes)
        known = {(site.name, o) for site in space.sites for o, _ in site.operand_parameters}
        total, remaining = 0, np.zeros(len(codes))
        for weight in weights(space):
            if not any(use.role == "weight" and (use.site, use.operand) in known for use in weight.tensor.uses):
                continue  # it is seen through a view alone, and its values there are not looked at
            total += weight.tensor.elements
            if weight.tensor.as_it_is:
                remaining += int((parameter(space.graph.model, weight.tensor.names[0]) != 0).sum())
            else:
                remaining += weight.in_widest(context.nonzero, options)
        return {"sparsity": 1.0 - remaining / total if total else np.zeros(len(codes))}


def first_weighted(graph: Graph) -> frozenset[str]:
    """Names of the sites with weights that the model's input reaches without passing another such site.

    Nodes without weights (batch norm, ReLU, flatten) may be in between. For a model that cannot be traced it is the
    first site with weights.
    """
    weighted = [s.name for s in graph.sites if s.macs]
    if graph.fx_graph is None:
        return frozenset(weighted[:1])
    without_weights: set[fx.Node] = set()  # nodes that the input reaches without passing a site with weights
    names = []
    for node in graph.fx_graph.nodes:
        if node.op == "placeholder":
            without_weights.add(node)
        elif any(n in without_weights for n in node.all_input_nodes):
            if node.name in weighted:
                names.append(node.name)
            else:
                without_weights.add(node)
    return frozenset(names)
