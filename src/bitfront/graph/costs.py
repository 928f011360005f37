"""Bit operations of a node, by several conventions; docs/metrics.md compares them in a table."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from bitfront.formats.base import Operand
from bitfront.graph.base import Node, Site, WeightProducts

#: A number, or an array of them, one per option or candidate.
Numbers = float | NDArray[Any]


def bit_operations(node: Node, bits: Callable[[Operand], Numbers]) -> Numbers:
    """Bit operations per sample: macs · weight bits · input bits, plus other operations · input bits.

    Args:
        node: the node.
        bits: of its operands; for a node that is no site, of its input and its weight.
    """
    data = bits("data_in")
    others = ((node.operations or 0) - node.macs) * data
    if not isinstance(node, Site):
        return node.macs * data * bits("weight") + others
    return sum(p.macs * bits(p.data) * bits(p.weight) for p in node.products) + others


def bops(product: WeightProducts, data_bits: Numbers, weight_bits: Numbers, density: Numbers = 1.0) -> Numbers:
    """Bit operations per sample after Baskin et al. (2021), as Hawks et al. (2021) use them for jet tagging.

    m·n·(p·b_a·b_w + b_a + b_w + log2 n). m is the number of output values: channels · positions for a convolution, the
    values of all rows for a linear layer on several rows. n is the fan-in, the number of products per output value:
    C_in/groups · window for a convolution, where padding counts like any other input. As published, pruning reduces the
    products, but not the additive terms. Biases are ignored.

    Args:
        product: of a site.
        data_bits: bits of the site's input. For the first layer that is the model's input: 32 bits in Hawks et al., 16
            in Campos et al. (2023).
        weight_bits: bits of the weight.
        density: p, the fraction of the weight's values that are not zero, 0 to 1.
    """
    return product.macs * (density * data_bits * weight_bits + data_bits + weight_bits + math.log2(product.fan_in))


def ebops(product: WeightProducts, data_bits: Numbers, weight_bits: Numbers) -> Numbers:
    """Effective bit operations per sample (HGQ, Sun et al. 2024) of a weight whose values are all used equally often.

    Σ b_w · b_a · positions. Every value is multiplied once per position: 1 for a linear layer on one row, height ·
    width of the output for a convolution (padding counts like any other input). ``metrics.effective_bits`` says how
    bits are counted.

    Args:
        product: of a site.
        data_bits: bits of the site's input.
        weight_bits: Σ of the bits of the weight's values; a value of 0 has none.
    """
    # The division is exact: the multiply-accumulates of nearly every product are a multiple of its weight's values.
    weights = math.prod(product.shape)
    positions = product.macs / weights if product.macs % weights else product.macs // weights
    return positions * weight_bits * data_bits
