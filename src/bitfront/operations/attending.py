"""Attention as ONNX: the rules of the records in ``attention.py``. Without formats; no operation is registered here."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor, fx

from bitfront.errors import ExportError
from bitfront.operations.onnx import OnnxWriter


def write_scaled_product(w: OnnxWriter, n: fx.Node) -> str:
    """``scaled_dot_product_attention`` without a mask."""
    if w.setting(n, 3, "attn_mask") is not None or w.setting(n, 5, "is_causal", False):
        raise ExportError(f"{n.name} ({w.kind(n)}): a mask")
    query, key, value = (w.value(n, place, name) for place, name in enumerate(("query", "key", "value")))
    width = w.source(n).shape[-1]
    scale = w.setting(n, 6, "scale")
    rank = w.source(n).dim()
    attended = _attended(w, n, (query, key, value), 1 / math.sqrt(width) if scale is None else float(scale), rank)
    return w.add("Identity", [attended], n.name)


def write_attention(w: OnnxWriter, n: fx.Node) -> str:
    """``nn.MultiheadAttention`` without masks; its first result."""
    module: Any = w.module_of(n)
    masks = (n.kwargs.get(name, n.args[place] if len(n.args) > place else None) for place, name in _MASKS)
    if any(mask is not None for mask in masks) or module.in_proj_weight is None or module.bias_k is not None:
        raise ExportError(f"{n.name} ({w.kind(n)}): masks, keys of another width or biases of keys")
    if w.source(n).dim() != 3:
        raise ExportError(f"{n.name} ({w.kind(n)}): a sample without a batch")
    heads, width = int(module.num_heads), int(module.embed_dim)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    projected = []
    for place, (name, weight, bias) in enumerate(
        zip(("query", "key", "value"), module.in_proj_weight.chunk(3), biases, strict=True)
    ):
        x = w.value(n, place, name)
        x = x if module.batch_first else w.add("Transpose", [x], f"{n.name}.{name}.first", perm=[1, 0, 2])
        x = _linear(w, f"{n.name}.{name}", x, weight, bias)
        shape = w.constant(f"{n.name}.{name}.heads", np.array([0, 0, heads, width // heads]))
        parts = w.add("Reshape", [x, shape], f"{n.name}.{name}.parts")
        projected.append(w.add("Transpose", [parts], f"{n.name}.{name}.turned", perm=[0, 2, 1, 3]))
    context = _attended(w, n, (projected[0], projected[1], projected[2]), 1 / math.sqrt(width // heads), 4)
    back = w.add("Transpose", [context], f"{n.name}.back", perm=[0, 2, 1, 3])
    joined = w.add("Reshape", [back, w.constant(f"{n.name}.whole", np.array([0, 0, width]))], f"{n.name}.joined")
    out = _linear(w, f"{n.name}.out", joined, module.out_proj.weight, module.out_proj.bias)
    return out if module.batch_first else w.add("Transpose", [out], n.name, perm=[1, 0, 2])


#: Place and name of the masks among the arguments of the module.
_MASKS = ((3, "key_padding_mask"), (5, "attn_mask"))


def _linear(w: OnnxWriter, name: str, x: str, weight: Tensor, bias: Tensor | None) -> str:
    held = w.constant(f"{name}.weight", weight.detach().numpy().T)
    product = w.add("MatMul", [x, held], f"{name}.product")
    return product if bias is None else w.add("Add", [product, w.constant(f"{name}.bias", bias.detach().numpy())], name)


def _attended(w: OnnxWriter, n: fx.Node, given: tuple[str, str, str], scale: float, rank: int) -> str:
    """softmax(q · kᵀ · scale) · v."""
    query, key, value = given
    turned = [*range(rank - 2), rank - 1, rank - 2]
    scores = w.add("MatMul", [query, w.add("Transpose", [key], f"{n.name}.keys", perm=turned)], f"{n.name}.scores")
    scaled = w.add("Mul", [scores, w.constant(f"{n.name}.scale", np.array(scale, np.float32))], f"{n.name}.scaled")
    weights = w.add("Softmax", [scaled], f"{n.name}.weights", axis=-1)
    return w.add("MatMul", [weights, value], f"{n.name}.context")
