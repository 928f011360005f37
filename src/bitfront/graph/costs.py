"""Bit operations of a node, after several conventions; docs/metrics.md has them in a table."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront.graph.base import Node, Site

#: A number, or an array of them, one per option or candidate.
Numbers = float | NDArray[Any]


def bit_operations(node: Node, data_bits: Numbers, weight_bits: Numbers) -> Numbers:
    """Multiply-accumulates · weight bits · input bits, and every other operation · input bits, per sample."""
    return node.macs * data_bits * weight_bits + ((node.operations or 0) - node.macs) * data_bits


def fan_in(site: Site) -> int:
    """Products that are summed into one output value of a site; 0 where it multiplies by no weight."""
    if not site.macs:
        return 0
    # Of a matrix product with an activation the weight's shape does not say over what is summed.
    return math.prod(site.weight_shape[1:]) if site.operation.call is not None else site.macs // math.prod(site.output)


def bops(site: Site, data_bits: Numbers, weight_bits: Numbers, density: Numbers = 1.0) -> Numbers:
    """Bit operations per sample after Baskin et al. (2021), as Hawks et al. (2021) use them for jet tagging.

    m·n·(p·b_a·b_w + b_a + b_w + log2 n): m output values (of a convolution: channels · positions; of a linear layer on
    several rows: those of all rows), each the sum of n products (the fan-in; of a convolution C_in/groups · window,
    with padding counted like any other input). Pruning saves products, not the additive terms, as published. Biases
    are ignored. 0 for sites that multiply by no weight.

    Args:
        data_bits: bits of the site's input. What feeds the first layer is the model's input: 32 bits in Hawks et al.,
            16 in Campos et al. (2023).
        weight_bits: bits of its weights.
        density: share of the weights that are not zero, 0 to 1.
    """
    if not site.macs:
        return np.zeros(np.broadcast(data_bits, weight_bits, density).shape)
    return site.macs * (density * data_bits * weight_bits + data_bits + weight_bits + math.log2(fan_in(site)))


def ebops(site: Site, data_bits: Numbers, weight_bits: Numbers, nonzero: Numbers) -> Numbers:
    """Effective bit operations per sample (HGQ, Sun et al. 2024) with one width for all weights of a site.

    nonzero · b_w · b_a · positions: every weight that is not zero is multiplied once per position where it is used, 1
    in a linear layer on one row, height · width of the output in a convolution (padding counted like any other
    input). HGQ's own figure takes the bits of each weight apart and adds those of the bias; biases are ignored here.
    0 for sites that multiply by no weight.

    Args:
        data_bits: bits of the site's input.
        weight_bits: bits of its weights.
        nonzero: how many weights are not zero.
    """
    if not site.macs:
        return np.zeros(np.broadcast(data_bits, weight_bits, nonzero).shape)
    # Exact: a site's multiply-accumulates are a multiple of its weights.
    return site.macs // math.prod(site.weight_shape) * nonzero * weight_bits * data_bits
