"""Attention: products of queries and keys, softmax, products with values."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from bitfront.operations.base import Call, Count, Shape, define


def _sdpa(call: Call) -> Count:
    query, key, value = call.tensors[:3]
    scores = math.prod(query[:-1]) * key[-2]
    macs = scores * (query[-1] + value[-1])
    return Count(macs + 5 * scores, macs)


def _attention(call: Call) -> Count:
    """nn.MultiheadAttention: three projections in, scores, softmax, weighted sum, projection out."""
    module: Any = call.module
    return _heads(call.tensors[:3], module.batch_first, module.embed_dim, module.num_heads)


def _functional(call: Call) -> Count:
    width, heads = call.args[3:5]
    return _heads(call.tensors[:3], False, width, heads)


def _heads(tensors: tuple[Shape, ...], batch_first: bool, width: int, heads: int) -> Count:
    query, key, value = tensors
    source = key[-2] if batch_first or len(key) == 2 else key[0]
    rows = math.prod(query[:-1])
    projections = width * (math.prod(query) + math.prod(key) + math.prod(value) + rows * width)
    scores = rows * source
    macs = projections + 2 * scores * width
    return Count(macs + 5 * scores * heads, macs)


SDPA = define(
    "scaled_dot_product_attention",
    "Attention of projected queries, keys and values.",
    names=("scaled_dot_product_attention",),
    count=_sdpa,
)
ATTENTION = define(
    "attention",
    "Multi-head attention with its projections.",
    modules=(nn.MultiheadAttention,),
    count=_attention,
)
FUNCTIONAL_ATTENTION = define(
    "multi_head_attention_forward",
    "Multi-head attention as a function.",
    names=("multi_head_attention_forward",),
    count=_functional,
)
