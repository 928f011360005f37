"""EBOPs: how the bits of operands are counted, and what the products and biases of a site cost by that count.

HGQ's effective bit operations (Sun et al. 2024, arXiv:2405.00645, equation 5), as the package HGQ2 counts them:

    EBOPs = Σ over products of b_w · b_a + Σ over outputs of b_b

b_w, b_a and b_b are the bits of the weight, the input and the bias, without their signs. A value of 0 has no bits.
``BitCount`` has what publications do otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfront.formats.base import FLOAT_BITS, Format, Operand
from bitfront.graph import Graph, Site
from bitfront.graph.base import WeightProducts
from bitfront.graph.costs import ebops
from bitfront.metrics.base import EvaluationContext, option_sum
from bitfront.operations.base import Operands
from bitfront.spaces.base import Codes

Figures = NDArray[np.float64]
#: (operand, figure of its rounded values) → that figure.
FigureOf = Callable[[Operand, Callable[[Site, Format | None, Tensor], float]], Figures]


@dataclass(frozen=True)
class BitCount:
    """How bits are counted.

    Attributes:
        sign_bits: whether a sign is one of the bits.
        count: of weights and biases, the width of the format (``width``), or from the highest to the lowest bit of each
            value that is set (``set_bits``). Of inputs it is always the width.
        biases: whether biases count.
    """

    sign_bits: bool = False
    count: Literal["width", "set_bits"] = "width"
    biases: bool = True

    def width(self, bits: int, has_sign: bool) -> int:
        """A width of so many bits; at least 1, so that no product is free."""
        return max(1, bits - (has_sign and not self.sign_bits))

    def of(self, form: Format | None) -> int | NDArray[np.int64]:
        """Bits of a value in a format, or of each value; None: in float, 32 bits and a sign among them."""
        if form is None:
            return self.width(FLOAT_BITS, True)
        each = form.value_bits
        if each is None:
            return self.width(form.bits, form.has_sign)
        return each + (each > 0) * (form.has_sign and self.sign_bits)

    def of_values(self, form: Format | None, values: Tensor) -> Tensor:
        """Bits of each of the rounded values of a parameter, 0 for zeros; float64, of their shape."""
        bits = torch.as_tensor(self.of(form), device=values.device).double().expand(values.shape)
        grid = form.grid_of(values) if form is not None and self.count == "set_bits" else None
        if form is not None and grid is not None:
            bits = set_bits(grid.centred(values.double())) + float(form.has_sign and self.sign_bits)
        return torch.where(values == 0, 0.0, bits)


def set_bits(codes: Tensor) -> Tensor:
    """How many bits there are from the highest to the lowest one that is set; 0 for 0. Float64, of the same shape.

    Args:
        codes: whole numbers below 2^53, float64.
    """
    whole = codes.abs().long()
    lowest = whole & -whole
    return (torch.frexp((whole // lowest.clamp(min=1)).double()).exponent * (whole > 0)).double()


@dataclass(frozen=True)
class ProductBits:
    """The figure of a weight that its products cost: Σ over its values of bits · uses, where a product with an input
    counts 1, or, if inputs have bits of their own, the bits of that input.

    Attributes:
        count: how bits are counted.
        graph: of the site.
        product: with the weight.
        data: the format of the input, if each of its values has its own bits.
    """

    count: BitCount
    graph: Graph
    product: WeightProducts
    data: Format | None = None

    def __call__(self, site: Site, form: Format | None, values: Tensor) -> float:
        """The cost of a weight with these rounded values."""
        bits = self.count.of_values(form, values)
        if self.data is not None:
            return _applied(self.graph, site, torch.as_tensor(self.count.of(self.data)), bits)
        uses = _uses_of_window(self.graph, site)
        if uses is not None:
            return float((bits * uses.to(bits.device)).sum())
        return float(ebops(self.product, 1, float(bits.sum())))


@dataclass(frozen=True)
class MeanBits:
    """The figure of a bias: mean bits of its values."""

    count: BitCount

    def __call__(self, _site: Site, form: Format | None, values: Tensor) -> float:
        """The mean of a bias with these rounded values, 0 of none."""
        return float(self.count.of_values(form, values).mean()) if values.numel() else 0.0


def site_ebops(
    graph: Graph,
    site: Site,
    data_formats: Mapping[Operand, Sequence[Format | None]],
    count: BitCount,
    figure_of: FigureOf,
    input_bits: int | None = None,
) -> Figures:
    """EBOPs of a site per sample, under each of its options, shape (options,).

    Args:
        graph: of the site.
        data_formats: operand → its format under each option; of operands that are no parameters.
        count: how bits are counted.
        figure_of: gives figures of rounded parameters, shape (options,).
        input_bits: width of the values of ``data_in``, in place of that of its format.
    """
    total: Figures = np.zeros(1)
    for product in site.products:
        data: Sequence[Format | None] = data_formats.get(product.data, [None])
        if input_bits is not None and product.data == "data_in":
            bits = np.array([count.width(input_bits, form is None or form.has_sign) for form in data], dtype=np.float64)
            data = [None]
        elif data[0] is not None and data[0].value_bits is not None:
            (form,) = data  # only a network with learned bits has such formats, and it is the only option
            total = total + figure_of(product.weight, ProductBits(count, graph, product, form))
            continue
        else:
            bits = np.array([count.of(form) for form in data], dtype=np.float64)
        if site.parameter(product.weight) is not None:
            weights = figure_of(product.weight, ProductBits(count, graph, product))
        else:
            # Of a weight that is an activation no value is known to be zero.
            each = np.array([count.of(form) for form in data_formats.get(product.weight, [None])], dtype=np.float64)
            weights = np.array(ebops(product, 1, math.prod(product.shape) * each))
        total = total + bits * weights
    if count.biases:
        for spec in site.specs:
            if spec.role == "bias" and site.products and site.parameter(spec.name) is not None:
                total = total + figure_of(spec.name, MeanBits(count)) * _outputs(site, spec.name)
    return total


def of_candidates(context: EvaluationContext, codes: Codes, count: BitCount, in_float: float) -> Figures:
    """What the products of candidates cost by a count, shape (candidates,).

    Args:
        in_float: cost of a product of a layer that is no site of the space.
    """
    space, tables = context.space, []
    for group, (site, options) in enumerate(zip(space.sites, space.site_formats, strict=True)):
        data = {name: [formats.get(name) for formats in options] for name in {n for f in options for n in f}}
        total = site_ebops(
            space.graph,
            site,
            data,
            count,
            lambda o, f, g=group: context.of_parameter(g, o, f),  # type: ignore[misc]
        )
        tables.append(np.broadcast_to(total, len(options)).astype(np.float64))
    return option_sum(tables, space.options(codes)) + sum(layer.macs for layer in space.graph.left_out) * in_float


def _outputs(site: Site, bias: Operand) -> float:
    """How many values a bias is added to, per sample."""
    if site.operation.product is not None:
        return float(math.prod(site.output))
    # As often as the weight beside it.
    beside = [p for p in site.products if p.weight == bias.replace("bias", "weight", 1)] or list(site.products)
    return math.prod(dict(site.shapes)[bias]) * beside[0].macs / math.prod(beside[0].shape)


def _layer(graph: Graph, site: Site) -> torch.nn.Module | None:
    """The module of a site whose only products are those of its input with its weight; None if it is no such site."""
    operation = site.operation
    alone = operation.product is not None and operation.call is not None and len(site.products) == 1
    return graph.model.get_submodule(site.path) if alone and site.path else None


def _uses_of_window(graph: Graph, site: Site) -> Tensor | None:
    """How many products each value of a window has, float64, of the shape of the window: those with padding are none.
    None if the site is no convolution of a module."""
    layer, window = _layer(graph, site), site.weight_shape[2:]
    if layer is None or not window or site.operation.call is None:
        return None
    # All channels are used alike.
    groups = int(getattr(layer, "groups", 1))
    weight = torch.zeros(groups, 1, *window, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(1, groups, *site.inputs[0][1:], dtype=torch.float64)
    with torch.enable_grad():
        out: Tensor = site.operation.call(layer, Operands({"data_in": ones, "weight": weight, "bias": None}))
        (uses,) = torch.autograd.grad(out.sum(), weight)
    return uses[0, 0]


def _applied(graph: Graph, site: Site, data: Tensor, weight: Tensor) -> float:
    """The sum of what a layer computes of bits in place of values: every product once, none with padding."""
    layer = _layer(graph, site)
    if layer is None or site.operation.call is None:
        raise ValueError(f"{site.title} has bits per value for its input, but is no layer with a weight")
    operands = Operands({"data_in": data.to(weight)[None], "weight": weight, "bias": None})
    with torch.no_grad():
        return float(site.operation.call(layer, operands).sum())
