"""Rows of a table, looked up by index, and sums of such rows. The table is the weight, one row per channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bitfront.errors import ExportError
from bitfront.operations.base import Call, Count, Operands, OperandSpec, define, free
from bitfront.operations.onnx import INT64, OnnxWriter

#: The indices are whole numbers, and have no format.
TABLE = OperandSpec("weight", "weight", 1, "weight", channel_axis=0)


def _given(operands: Operands, *names: str) -> Mapping[str, Any]:
    """The arguments of a module's ``forward`` by name; None for those that are left out."""
    return {**dict.fromkeys(names), **dict(zip(names, operands.args, strict=False)), **operands.kwargs}


def _look_up(module: nn.Module, operands: Operands) -> Tensor:
    m: Any = module
    indices = _given(operands, "input")["input"]
    return F.embedding(indices, operands["weight"], m.padding_idx, None, m.norm_type, m.scale_grad_by_freq, m.sparse)


def _look_up_bags(module: nn.Module, operands: Operands) -> Tensor:
    m: Any = module
    given = _given(operands, "input", "offsets", "per_sample_weights")
    return F.embedding_bag(
        given["input"],
        operands["weight"],
        given["offsets"],
        None,
        m.norm_type,
        m.scale_grad_by_freq,
        m.mode,
        m.sparse,
        given["per_sample_weights"],
        m.include_last_offset,
        m.padding_idx,
    )


def _renormalises(call: Call) -> str:
    """With ``max_norm``, a call changes rows of the table itself, which then have no format."""
    return "" if call.argument(3, "max_norm") is None else "with max_norm, it changes its weight in every forward"


def _bags(call: Call) -> Count:
    """One addition (or comparison) per value of each row, and one product where rows have weights."""
    indices = call.args[0] if call.args else (call.kwargs or {})["input"]
    values = indices.numel() * call.output[-1]
    position = 2 if call.module is not None else 8
    weighted = call.args[position] if position < len(call.args) else (call.kwargs or {}).get("per_sample_weights")
    divisions = call.out if call.argument(6, "mode", "mean") == "mean" else 0
    return Count(values + divisions, values if weighted is not None else 0)


def _write(w: OnnxWriter, n: fx.Node) -> str:
    if w.setting(n, 3, "max_norm") is not None:
        raise ExportError(f"{n.name} ({w.kind(n)}): max_norm")
    indices = w.add("Cast", [w.tensor(n)], f"{n.name}.indices", to=INT64)
    table = w.weights(n)
    return w.add("Gather", [table, indices], n.name, axis=0)


EMBEDDING = define(
    "embedding",
    "Rows of a table, by index.",
    modules=(nn.Embedding,),
    functions=(F.embedding,),
    operands=(TABLE,),
    refuses=_renormalises,
    count=free,
    call=_look_up,
    onnx=_write,
)
EMBEDDING_BAG = define(
    "embedding_bag",
    "Sums, means or maxima of rows of a table, by index.",
    modules=(nn.EmbeddingBag,),
    functions=(F.embedding_bag,),
    operands=(TABLE,),
    refuses=_renormalises,
    count=_bags,
    call=_look_up_bags,
)
ROWS = define(
    "rows",
    "Rows of a table that is the first argument, by index.",
    functions=(torch.embedding,),
    count=free,
)
