"""The cost of a network's multiplications in logic: BOPs and EBOPs, and the fraction of its weights that are zero.

These metrics depend on the values of the weights: a weight that is zero in its format needs no multiplier. The formulas
are in ``bitfront.graph.costs``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import fx
from torch.func import functional_call

from bitfront.formats.base import FLOAT_BITS, Operand
from bitfront.graph import Graph, Site
from bitfront.graph.capture import parameter
from bitfront.graph.costs import bops, ebops
from bitfront.metrics import RUNNERS
from bitfront.metrics.base import EvaluationContext, Metric, Runner, RunnerSettings, Side, Values, option_sum
from bitfront.metrics.stored import weights
from bitfront.spaces.base import Codes


class InputSettings(RunnerSettings):
    """``[search.strategy.hw_runner.bops]`` and ``ebops``."""

    input_bits: int | None = Field(
        None,
        ge=1,
        le=64,
        description="bits of the model's input at the first layers with weights; default: as in their data_in format",
    )


class _Multiplications(Runner):
    """Sum over the sites of the cost of their multiplications, looked up per option."""

    Settings = InputSettings
    settings: InputSettings
    side: ClassVar[Side] = "hw_runner"
    closed_form: ClassVar[bool] = True
    of_weights: ClassVar[bool] = True

    def _tables(self, context: EvaluationContext) -> list[NDArray[np.float64]]:
        settings = self.settings
        space = context.space
        first = first_weighted(space.graph) if settings.input_bits else frozenset()
        tables = []
        for g, site in enumerate(space.sites):
            total = np.zeros(space.groups[g].size)
            for product in site.products:
                weight, data = space.bits_at(g, product.weight), space.bits_at(g, product.data)
                if site.name in first and product.data == "data_in":
                    data = np.full_like(data, settings.input_bits)
                size = math.prod(product.shape)
                # Of a weight that is an activation no value is known to be zero.
                known = site.parameter(product.weight) is not None
                count = context.nonzero(product.weight)[g] if known else np.full_like(data, size)
                if self.produces[0].name == "bops":
                    total += bops(product, data, weight, count / size)
                else:
                    total += ebops(product, data, weight, count)
            if self.produces[0].name == "ebops":
                for option, formats in enumerate(space.site_formats[g]):
                    bits = {operand: form.value_bits for operand, form in formats.items()}
                    if bits.get("weight") is not None:
                        total[option] = mapped_ebops(space.graph, site, bits)
            tables.append(total)
        return tables

    def measure(self, context: EvaluationContext, codes: Codes) -> Mapping[str, Values]:
        """The sum for each candidate."""
        space = context.space
        # Layers that compute something beside their class are no sites: they multiply 32 bits by 32 bits.
        apart = sum(layer.macs for layer in space.graph.left_out) * FLOAT_BITS**2
        return {self.produces[0].name: option_sum(self._tables(context), space.options(codes)) + apart}


def mapped_ebops(graph: Graph, site: Site, bits: Mapping[Operand, NDArray[np.int64] | None]) -> float:
    """EBOPs of a layer whose weights and inputs have bits of their own, per sample (HGQ, Sun et al. 2024, eq. 5).

    Σ over its products of b_w · b_a, without sign bits, plus the bits of its biases. The sum of the products is the
    sum of what the layer computes of bits in place of values, so padding costs nothing.

    Args:
        bits: operand → bits of the magnitude of each value.
    """
    data, weight, bias = (bits.get(operand) for operand in ("data_in", "weight", "bias"))
    if data is None or weight is None:
        raise ValueError(f"{site.title} has bits per value for its weight alone")
    module = graph.model.get_submodule(site.path)
    # A weight that is zero needs no multiplier, whatever the width it is stored in. The weights are on their grids.
    parameters = {"weight": torch.from_numpy(weight).double() * (module.get_parameter("weight") != 0)}
    if module.bias is not None:
        parameters["bias"] = torch.zeros(len(module.get_parameter("bias")), dtype=torch.float64)
    total = functional_call(module, parameters, (torch.from_numpy(data).double()[None],)).sum()
    return float(total) + (0.0 if bias is None else float(bias.sum()))


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


@RUNNERS.register("ebops")
class Ebops(_Multiplications):
    """Effective bit operations: bits times bits of every multiplication by a weight that is not zero (HGQ, 2024)."""

    produces = (
        Metric("ebops", "bit operations", "minimize", "modelled", "Σ non-zero weights · b_w · b_a, per sample"),
    )


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
