"""Attention: products of queries and keys, softmax, products with values.

``query``, ``key`` and ``value`` are what is multiplied, so they are the projected ones where the operation has the
projections. They, the scores, the attention weights and the context (the input of the output projection) have the
format of ``data_in`` unless the file has keys for them; all projections share the format of ``weight`` in the same way.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bitfront.operations.attention_onnx import write_attention, write_sdpa, write_windows
from bitfront.operations.base import Call, Count, Operands, OperandSpec, Products, Role, Shape, define


def _shares(
    name: str, role: Role, format_of: str, position: int = 0, argument: str = "", parameter: str = ""
) -> OperandSpec:
    axis = {"weight": 0, "activation": -1}.get(role)
    return OperandSpec(name, role, position, argument, axis, format_of=(format_of,), parameter=parameter)


#: Values that an attention computes on its way, in the order in which it computes them.
_SCORES = (_shares("scores", "inner", "data_in"), _shares("attention", "inner", "data_in"))
_PROJECTED = tuple(_shares(name, "inner", "data_in") for name in ("query", "key", "value"))
#: Of the module and of the function; the places are those of the function, and of the module's inputs. The function has
#: samples along the second dimension.
_OPERANDS = (
    OperandSpec("data_in", "activation", 0, "query", channel_axis=-1, sample_axis=1),
    replace(_shares("data_in_key", "activation", "data_in", 1, "key"), sample_axis=1),
    replace(_shares("data_in_value", "activation", "data_in", 2, "value"), sample_axis=1),
    OperandSpec("weight", "weight", 5, "in_proj_weight", channel_axis=0, parameter="in_proj_weight"),
    _shares("weight_query", "weight", "weight", 18, "q_proj_weight", "q_proj_weight"),
    _shares("weight_key", "weight", "weight", 19, "k_proj_weight", "k_proj_weight"),
    _shares("weight_value", "weight", "weight", 20, "v_proj_weight", "v_proj_weight"),
    _shares("weight_out", "weight", "weight", 11, "out_proj_weight", "out_proj.weight"),
    OperandSpec("bias", "bias", 6, "in_proj_bias", parameter="in_proj_bias"),
    _shares("bias_key", "bias", "bias", 7, "bias_k", "bias_k"),
    _shares("bias_value", "bias", "bias", 8, "bias_v", "bias_v"),
    _shares("bias_out", "bias", "bias", 12, "out_proj_bias", "out_proj.bias"),
    *_PROJECTED,
    *_SCORES,
    _shares("context", "inner", "data_in"),
)

_SAMPLES_FIRST = tuple(replace(operand, sample_axis=0) for operand in _OPERANDS)


def _operands_of(module: Any) -> tuple[OperandSpec, ...]:
    return _SAMPLES_FIRST if module.batch_first else _OPERANDS


_SDPA_ARGUMENTS = tuple("query key value attn_mask dropout_p is_causal scale enable_gqa".split())
_MODULE_ARGUMENTS = tuple(
    "query key value key_padding_mask need_weights attn_mask average_attn_weights is_causal".split()
)
_FUNCTION_ARGUMENTS = tuple(
    """
    query key value embed_dim_to_check num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn dropout_p
    out_proj_weight out_proj_bias training key_padding_mask need_weights attn_mask use_separate_proj_weight
    q_proj_weight k_proj_weight v_proj_weight static_k static_v average_attn_weights is_causal
    """.split()
)


def _named(arguments: tuple[str, ...], operands: Operands) -> dict[str, Any]:
    return dict(zip(arguments, operands.args, strict=False)) | dict(operands.kwargs)


# --- counts -----------------------------------------------------------------------------------------------------------


def _both(scores: int, query_width: int, value_width: int, sources: int) -> tuple[Products, Products]:
    """The products of queries and keys, and of attention weights and values, for so many scores."""
    return (
        Products(scores * query_width, "query", "key", query_width),
        Products(scores * value_width, "attention", "value", sources),
    )


def _count_sdpa(call: Call) -> Count:
    query, key, value = call.tensors[:3]
    scores = math.prod(query[:-1]) * key[-2]
    macs = scores * (query[-1] + value[-1])
    return Count(macs + 5 * scores, macs, _both(scores, query[-1], value[-1], key[-2]))


def _count_module(call: Call) -> Count:
    """nn.MultiheadAttention: three projections in, scores, softmax, weighted sum, projection out."""
    module: Any = call.module
    packed = module.in_proj_weight is not None
    return _heads(call.tensors[:3], module.batch_first, module.embed_dim, module.num_heads, packed)


def _count_function(call: Call) -> Count:
    width, heads = call.args[3:5]
    separate = call.argument(17, "use_separate_proj_weight", False)
    return _heads(call.tensors[:3], False, width, heads, not separate)


def _heads(tensors: tuple[Shape, ...], batch_first: bool, width: int, heads: int, packed: bool) -> Count:
    query, key = tensors[:2]
    source = key[-2] if batch_first or len(key) == 2 else key[0]
    rows = math.prod(query[:-1])
    scores = rows * source
    inputs = ("data_in", "data_in_key", "data_in_value")
    weights = ("weight",) * 3 if packed else ("weight_query", "weight_key", "weight_value")
    products = (
        *(
            Products(width * math.prod(shape), left, right, shape[-1])
            for shape, left, right in zip(tensors, inputs, weights, strict=True)
        ),
        *_both(scores * heads, width // heads, width // heads, source),
        Products(width * rows * width, "context", "weight_out", width),
    )
    macs = sum(p.macs for p in products)
    return Count(macs + 5 * scores * heads, macs, products)


# --- calls ------------------------------------------------------------------------------------------------------------


def _added(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask as what is added to scores: a boolean one is true where torch's modules leave out."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)


def _attended(
    operands: Operands, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """(attention weights · values, attention weights) with rounded scores and weights; shapes (..., length, width).

    Args:
        mask: is added to the scores.
    """
    scores = operands.round("scores", (query @ key.transpose(-2, -1)).mul_(scale))
    weights = operands.round("attention", torch.softmax(scores if mask is None else scores + mask, -1))
    weights = F.dropout(weights, dropout) if dropout else weights
    return weights @ value, weights


def _sdpa(_: object, operands: Operands) -> Tensor:
    named = _named(_SDPA_ARGUMENTS, operands)
    query, key, value = (named[name] for name in ("query", "key", "value"))
    if named.get("enable_gqa"):
        key, value = (x.repeat_interleave(query.size(-3) // x.size(-3), -3) for x in (key, value))
    mask: Tensor | None = named.get("attn_mask")
    if named.get("is_causal"):
        mask = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
    if mask is not None and not mask.is_floating_point():
        mask = _added(~mask, query)
    scale = named.get("scale")
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    return _attended(operands, query, key, value, mask, scale, named.get("dropout_p", 0.0))[0]


def _module(module: Any, operands: Operands) -> tuple[Tensor, Tensor | None]:
    if not operands.rounds:
        return nn.MultiheadAttention.forward(_with_rounded(module, operands), *operands.args, **operands.kwargs)
    named = _named(_MODULE_ARGUMENTS, operands)
    turned = module.batch_first and named["query"].dim() == 3
    inputs = {n: named[n].transpose(0, 1) if turned else named[n] for n in ("query", "key", "value")}
    held = {o.argument: operands.get(o.name) for o in _OPERANDS if o.role in ("weight", "bias")}
    settings = {
        "num_heads": module.num_heads,
        "add_zero_attn": module.add_zero_attn,
        "dropout_p": module.dropout,
        "training": module.training,
        "use_separate_proj_weight": module.in_proj_weight is None,
    }
    out, weights = _projected({**named, **inputs, **held, **settings}, operands)
    return (out.transpose(0, 1) if turned else out), weights


def _with_rounded(module: nn.MultiheadAttention, operands: Operands) -> Any:
    """The module with rounded parameters: a view of it, to call torch's ``forward`` with."""
    view: Any = copy.copy(module)
    view._parameters, view._modules = dict(module._parameters), dict(module._modules)
    out: Any = copy.copy(module.out_proj)
    view._modules["out_proj"] = out
    out._parameters = dict(module.out_proj._parameters)
    for operand in _OPERANDS:
        value = operands.get(operand.name)
        if operand.role in ("weight", "bias") and value is not None:
            holder = out if operand.parameter.startswith("out_proj.") else view
            holder._parameters[operand.parameter.removeprefix("out_proj.")] = value
    return view


def _call(called: object, operands: Operands) -> tuple[Tensor, Tensor | None]:
    if isinstance(called, nn.Module):
        return _module(called, operands)
    return _projected(_named(_FUNCTION_ARGUMENTS, operands), operands)


def _projected(named: Mapping[str, Any], operands: Operands) -> tuple[Tensor, Tensor | None]:
    """What F.multi_head_attention_forward computes for its arguments, with rounded values on its way."""
    query: Tensor = named["query"]
    batched, heads = query.dim() == 3, named["num_heads"]
    inputs = [named[n] if batched else named[n].unsqueeze(1) for n in ("query", "key", "value")]
    length, batch, width = inputs[0].shape
    q, k, v = (F.linear(x, w, b) for x, w, b in zip(inputs, *_projections(named), strict=True))
    if named.get("bias_k") is not None:
        k, v = (torch.cat([x, named[n].expand(1, batch, -1)]) for x, n in ((k, "bias_k"), (v, "bias_v")))
    q, k, v = (x.view(len(x), batch, heads, -1).permute(1, 2, 0, 3) for x in (q, k, v))
    k, v = (
        x if named.get(n) is None else named[n].view(batch, heads, *named[n].shape[1:])
        for x, n in ((k, "static_k"), (v, "static_v"))
    )
    if named.get("add_zero_attn"):
        k, v = (torch.cat([x, x.new_zeros(*x.shape[:2], 1, x.shape[3])], 2) for x in (k, v))
    q, k, v = (operands.round(name, x) for name, x in (("query", q), ("key", k), ("value", v)))
    mask = _merged_mask(named, q, k, batched)
    dropout = named.get("dropout_p", 0.0) if named.get("training", True) else 0.0
    context, weights = _attended(operands, q, k, v, mask, 1 / math.sqrt(width // heads), dropout)
    context = operands.round("context", context.transpose(1, 2).reshape(batch, length, width))
    out = F.linear(context.transpose(0, 1), named["out_proj_weight"], named["out_proj_bias"])
    out = out if batched else out.squeeze(1)
    if not named.get("need_weights", True):
        return out, None
    shown = weights.mean(1) if named.get("average_attn_weights", True) else weights
    return out, shown if batched else shown.squeeze(0)


def _projections(named: Mapping[str, Any]) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """(weights, biases) of the projections of queries, keys and values."""
    if named.get("use_separate_proj_weight"):
        weights = tuple(named[f"{n}_proj_weight"] for n in "qkv")
    else:
        weights = named["in_proj_weight"].chunk(3)
    bias = named["in_proj_bias"]
    return weights, (None,) * 3 if bias is None else bias.chunk(3)


def _merged_mask(named: Mapping[str, Any], query: Tensor, key: Tensor, batched: bool) -> Tensor | None:
    """Both masks as one that is added to scores of shape (batch, heads, length, sources); None without any."""
    mask, padding = (_added(named.get(n), query) for n in ("attn_mask", "key_padding_mask"))
    if named.get("is_causal") and mask is None:
        raise RuntimeError("is_causal is a hint on attn_mask, and needs one")
    if mask is not None and mask.dim() == 3:
        mask = mask.view(query.size(0), -1, *mask.shape[1:])
    if padding is not None:
        padding = padding[:, None, None] if batched else padding[None, None, None]
    both = [F.pad(m, (0, key.size(2) - m.size(-1))) for m in (mask, padding) if m is not None]
    return sum(both[1:], both[0]) if both else None


class _RoundedInside(TorchFunctionMode):
    """Rounds what a window attention computes on its way: its first product projects, its second gives the scores."""

    def __init__(self, operands: Operands) -> None:
        super().__init__()
        self.operands = operands
        self.projections = self.products = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name, operands = kwargs or {}, getattr(func, "__name__", ""), self.operands
        if name == "linear" and self.projections == 1:
            args = (operands.round("context", args[0]), *args[1:])
        out = func(*args, **kwargs)
        if name == "linear":
            self.projections += 1
            if self.projections == 1:
                parts = zip(("query", "key", "value"), out.chunk(3, -1), strict=True)
                return torch.cat([operands.round(operand, part) for operand, part in parts], -1)
        elif name in ("matmul", "__matmul__"):
            self.products += 1
            return operands.round("scores", out) if self.products == 1 else out
        return operands.round("attention", out) if name == "softmax" else out


def _windows(function: Any, operands: Operands) -> Any:
    with _RoundedInside(operands):
        return function(*operands.args, **operands.kwargs)


SDPA = define(
    "scaled_dot_product_attention",
    "Attention of projected queries, keys and values.",
    names=("scaled_dot_product_attention",),
    operands=(
        _shares("query", "activation", "data_in", 0, "query"),
        _shares("key", "activation", "data_in", 1, "key"),
        _shares("value", "activation", "data_in", 2, "value"),
        *_SCORES,
    ),
    count=_count_sdpa,
    call=_sdpa,
    onnx=write_sdpa,
)
ATTENTION = define(
    "attention",
    "Multi-head attention with its projections.",
    modules=(nn.MultiheadAttention,),
    operands=_OPERANDS,
    operands_of=_operands_of,
    count=_count_module,
    call=_call,
    onnx=write_attention,
)
FUNCTIONAL_ATTENTION = define(
    "multi_head_attention_forward",
    "Multi-head attention as a function.",
    names=("multi_head_attention_forward",),
    operands=_OPERANDS,
    count=_count_function,
    call=_call,
    onnx=write_attention,
)
WINDOW_ATTENTION = define(
    "shifted_window_attention",
    "Attention within windows of an image, with its projections (torchvision's Swin).",
    names=("shifted_window_attention",),
    operands=(
        OperandSpec("data_in", "activation", 0, "input", channel_axis=-1),
        OperandSpec("weight", "weight", 1, "qkv_weight", channel_axis=0),
        _shares("weight_out", "weight", "weight", 2, "proj_weight"),
        OperandSpec("bias", "bias", 9, "qkv_bias"),
        _shares("bias_out", "bias", "bias", 10, "proj_bias"),
        *_PROJECTED,
        *_SCORES,
        _shares("context", "inner", "data_in"),
    ),
    call=_windows,
    onnx=write_windows,
)
