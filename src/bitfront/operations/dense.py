"""Products with a whole weight: Linear, matrix products, and what is written as one (einsum, bilinear)."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfront.operations.base import DATA_IN, Call, Count, Merge, OperandSpec, define, products, weighted

WEIGHT = OperandSpec("weight", "weight", 1, "weight", channel_axis=0)
BIAS = OperandSpec("bias", "bias", 2, "bias")


def _linear(_: nn.Module, operands: Mapping[str, Tensor | None]) -> Tensor:
    x, weight = operands["data_in"], operands["weight"]
    assert x is not None
    assert weight is not None
    return F.linear(x, weight, operands.get("bias"))


def _matmul(call: Call) -> Count:
    return products(call.out * call.tensors[0][-1])


def _addmm(call: Call) -> Count:
    macs = call.out * call.tensors[1][-1]
    return Count(macs if call.kwargs is not None and call.kwargs.get("beta") == 0 else macs + call.out, macs)


def _einsum(call: Call) -> Count | None:
    equation = call.args[0] if call.args else None
    if not isinstance(equation, str) or len(call.tensors) > 2:
        return None  # the order of three factors is not ours to know
    terms = equation.replace(" ", "").split("->")[0].split(",")
    if len(terms) != len(call.tensors):
        return None
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, call.tensors, strict=True):
        named = term.replace("...", "")
        before = term.find("...") if "..." in term else len(named)
        # Dimensions below an ellipsis are aligned at the right.
        hidden = len(shape) - len(named)
        letters = [*named[:before], *(f".{hidden - i}" for i in range(hidden)), *named[before:]]
        for letter, size in zip(letters, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    total = math.prod(sizes.values())
    return products(total) if len(terms) == 2 else Count(call.n)


def _bilinear(call: Call) -> Count:
    _, first, second = call.shape(2, "weight")
    return products(call.out * second * (first + 1))


LINEAR = define(
    "linear",
    "Linear layer: x · weightᵀ + bias.",
    modules=(nn.Linear,),
    functions=(F.linear,),
    names=("linear",),
    operands=(DATA_IN, WEIGHT, BIAS),
    count=weighted,
    call=_linear,
    output_channels=-1,
    merge=Merge("dense"),
    kernel="linear",
)
#: The second factor of a product is its weight, be it a parameter or an activation.
FACTOR: dict[str, Any] = {"role": "weight", "position": 1, "channel_axis": 0}
MATMUL = define(
    "matmul",
    "Matrix product of two tensors.",
    functions=(operator.matmul, torch.matmul),
    names=("matmul",),
    operands=(DATA_IN, OperandSpec("weight", argument="other", **FACTOR)),
    count=_matmul,
)
BMM = define(
    "bmm",
    "Batched matrix product of two tensors.",
    functions=(torch.bmm,),
    names=("bmm",),
    operands=(DATA_IN, OperandSpec("weight", argument="mat2", **FACTOR)),
    count=_matmul,
)
MM = define("mm", "Matrix product of two matrices.", names=("mm",), count=_matmul)
DOT = define("dot", "Product of vectors.", names=("mv", "dot"), count=_matmul)
ADDMM = define("addmm", "Matrix product, added to a tensor.", names=("addmm", "baddbmm"), count=_addmm)
EINSUM = define("einsum", "Sum of products over named dimensions.", names=("einsum",), count=_einsum)
BILINEAR = define(
    "bilinear",
    "Bilinear layer: x₁ · weight · x₂ + bias.",
    modules=(nn.Bilinear,),
    names=("bilinear",),
    count=_bilinear,
)
