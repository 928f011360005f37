"""Products with a whole weight: Linear, matrix products, and what is written as one (einsum, bilinear)."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bitfront import kernels
from bitfront.errors import ExportError
from bitfront.operations.base import (
    DATA_IN,
    Call,
    Count,
    Merge,
    Operands,
    OperandSpec,
    Product,
    define,
    products,
    weighted,
)
from bitfront.operations.layout import ChannelCall, ChannelFollower, Layout
from bitfront.operations.onnx import OnnxWriter, Packed, Write
from bitfront.operations.training import ProgramReader, UnsupportedError, for_modules

WEIGHT = OperandSpec("weight", "weight", 1, "weight", channel_axis=0)
BIAS = OperandSpec("bias", "bias", 2, "bias", channel_axis=0)


def _linear(_: nn.Module, operands: Operands) -> Tensor:
    return F.linear(operands["data_in"], operands["weight"], operands.get("bias"))


def _ordered_linear(_: nn.Module | None, x: Tensor, weight: Tensor) -> Tensor:
    columns = x.reshape(1, -1, x.shape[-1]).transpose(1, 2)
    return kernels.ordered(weight, columns)[0].t().reshape(*x.shape[:-1], len(weight)).contiguous()


def _ordered_matrix(_: nn.Module | None, x: Tensor, weight: Tensor) -> Tensor | None:
    if x.dim() < 2 or weight.dim() < 2:
        return None
    leading = np.broadcast_shapes(x.shape[:-2], weight.shape[:-2])
    rows, columns = (t.expand(*leading, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (x, weight))
    return kernels.ordered(rows, columns).reshape(*leading, x.shape[-2], weight.shape[-1])


def _write_linear(w: OnnxWriter, n: fx.Node) -> str:
    if w.integer(n):
        bias = w.bias(n)
        data, weight = w.packed(n), w.packed_weight(n, turned=True, unsigned=True)
        sums = w.add("MatMulInteger", [data.name, weight.name, data.zero, weight.zero], f"{n.name}.integer")
        return w.scaled(n, sums, data.held.scale * weight.held.scale, bias)
    value = w.value(n)
    added = w.bias_of(n, value)
    if added is not None and w.fuses and w.source(n).dim() == 2:
        return w.add("Gemm", [value, w.weights(n), added], n.name, transB=1)
    inputs = [value, w.weights(n, turned=True)]
    if added is None:
        return w.add("MatMul", inputs, n.name)
    product = w.add("MatMul", inputs, f"{n.name}.product")
    return w.add("Add", [product, added], n.name)


def _train_linear(reader: ProgramReader, source: fx.Node, module: nn.Linear, path: str) -> int:
    value = reader.rounded(source, path)
    if len(reader.shape(value)) != 1:
        raise UnsupportedError(f"{path} is applied to more than one vector per sample")
    return reader.emit("linear", (value,), (module.out_features,), path=path)


def _write_matmul(w: OnnxWriter, n: fx.Node) -> str:
    if w.integer(n):
        left = w.packed(n)
        right = w.packed_weight(n, unsigned=True) if w.has_weight(n) else w.packed(n, 1, "other")
        sums = w.add("MatMulInteger", [left.name, right.name, left.zero, right.zero], f"{n.name}.integer")
        return w.scaled(n, sums, left.held.scale * right.held.scale, None)
    second = w.weights(n) if w.has_weight(n) else w.value(n, 1, "other")
    return w.add("MatMul", [w.value(n), second], n.name)


def _scales_of_columns(packed: Mapping[str, Packed]) -> str:
    if packed["weight"].axis in (None, 1):  # 1: the columns of a matrix
        return ""
    return "its weight has scales along another dimension than the columns of a matrix"


def _matmul(call: Call) -> Count:
    return products(call.out * call.tensors[0][-1])


def _addmm(call: Call) -> Count:
    macs = call.out * call.tensors[1][-1]
    return Count(macs if call.kwargs is not None and call.kwargs.get("beta") == 0 else macs + call.out, macs)


def _einsum(call: Call) -> Count | None:
    equation = call.args[0] if call.args else None
    if not isinstance(equation, str) or len(call.tensors) > 2:
        return None  # the order in which three factors are multiplied is unknown
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


def _factors(call: Call) -> str:
    """Only a product of two tensors, written as an equation and them, has two operands."""
    tensors = call.args[1:]
    if len(tensors) == 2 and isinstance(call.args[0], str):
        return ""
    return "only an einsum of an equation and two tensors has formats"


def _bilinear_forward(_: nn.Module, operands: Operands) -> Tensor:
    return F.bilinear(operands["data_in"], operands["data_in_2"], operands["weight"], operands.get("bias"))


def _transposed_linear(module: nn.Module, operands: Operands) -> Tensor:
    layer: Any = module
    x, weight, bias = operands["data_in"], operands["weight"], operands.get("bias")
    rows = x.view(-1, x.size(-1))
    out = torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)
    return out.view((*x.size()[:-1], layer.nf))


def _by_rows(call: Call) -> Count:
    """Every output value is a dot product over the first dimension of the weight; biases are ignored."""
    return products(call.out * call.shape(1, "weight")[0])


def _write_transposed_linear(w: OnnxWriter, n: fx.Node) -> str:
    bias = w.bias(n)
    if w.integer(n):
        data, weight = w.packed(n), w.packed_weight(n, unsigned=True)
        sums = w.add("MatMulInteger", [data.name, weight.name, data.zero, weight.zero], f"{n.name}.integer")
        return w.scaled(n, sums, data.held.scale * weight.held.scale, bias)
    inputs = [w.value(n), w.weights(n)]
    if bias is None:
        return w.add("MatMul", inputs, n.name)
    return w.add("Add", [w.add("MatMul", inputs, f"{n.name}.product"), w.constant(f"{n.name}.bias", bias)], n.name)


def _write_addmm(names: tuple[str, str]) -> Write:
    def write(w: OnnxWriter, n: fx.Node) -> str:
        if n.kwargs.get("alpha", 1) != 1 or n.kwargs.get("beta", 1) != 1:
            raise ExportError(f"{n.name} ({w.kind(n)}): alpha or beta other than 1")
        second = w.weights(n) if w.has_weight(n) else w.value(n, 2, names[1])
        product = w.add("MatMul", [w.value(n, 1, names[0]), second], f"{n.name}.product")
        return w.add("Add", [product, w.value(n, 0, "input")], n.name)

    return write


def _write_einsum(w: OnnxWriter, n: fx.Node) -> str:
    if len(n.args) != 3 or not isinstance(n.args[0], str):
        raise ExportError(f"{n.name} ({w.kind(n)}): only an equation and two tensors are written")
    second = w.weights(n) if w.has_weight(n) else w.value(n, 2, "")
    return w.add("Einsum", [w.value(n, 1, ""), second], n.name, equation=n.args[0])


def weight_and_bias(flow: ChannelFollower, call: ChannelCall) -> tuple[Layout, Layout | None] | None:
    """The weight and the bias, if there is one, of a layer; None unless both are parameters or buffers."""
    if call.module is not None:
        held = call.held()
        if "weight" not in held:
            return None
        return flow.hold(held["weight"]), flow.hold_values(held["bias"]) if "bias" in held else None
    weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
    if call.extents or not isinstance(weight, Layout) or weight.owned is None:
        return None
    if bias is None:
        return weight, None
    return (weight, bias) if isinstance(bias, Layout) and bias.owned is not None else None


def _linear_channels(flow: ChannelFollower, call: ChannelCall) -> Layout | None:
    """x (..., in) · weight (out, in) + bias (out)."""
    x, held = call.tensor, weight_and_bias(flow, call)
    if x is None or held is None or held[0].owned == x.owned or len(held[0].dims) != 2:
        return None
    weight, bias = held
    if not flow.contract(weight, 1, x.dims[-1], weight.dims[0]):
        return None
    if bias is not None:
        flow.unify(bias.dims[0], weight.dims[0])
    flow.remember("out_features", weight.dims[0])
    flow.remember("in_features", x.dims[-1])
    return Layout((*x.dims[:-1], weight.dims[0]))


def _transposed_linear_channels(flow: ChannelFollower, call: ChannelCall) -> Layout | None:
    """x (..., in) · weight (in, out) + bias (out)."""
    x, held = call.tensor, weight_and_bias(flow, call)
    if x is None or held is None or len(held[0].dims) != 2:
        return None
    weight, bias = held
    if not flow.contract(weight, 0, x.dims[-1], weight.dims[1]):
        return None
    if bias is not None:
        flow.unify(bias.dims[0], weight.dims[1])
    flow.remember("nf", weight.dims[1])
    flow.remember("nx", x.dims[-1])
    return Layout((*x.dims[:-1], weight.dims[1]))


def _product_channels(flow: ChannelFollower, call: ChannelCall) -> Layout | None:
    """x (..., in) · weight (in, out), where the weight is a parameter or buffer."""
    x, weight = call.tensor, call.argument(1, "other")
    if x is None or not isinstance(weight, Layout) or weight.owned in (None, x.owned):
        return None
    if len(weight.dims) != 2 or len(x.dims) < 2 or not flow.contract(weight, 0, x.dims[-1], weight.dims[1]):
        return None
    return Layout((*x.dims[:-1], weight.dims[1]))


LINEAR = define(
    "linear",
    "Linear layer: x · weightᵀ + bias.",
    modules=(nn.Linear,),
    functions=(F.linear,),
    names=("linear",),
    operands=(DATA_IN, WEIGHT, BIAS),
    count=weighted,
    call=_linear,
    product=Product(_ordered_linear),
    merge=Merge("dense"),
    train=for_modules(_train_linear),
    onnx=_write_linear,
    integers=lambda r, n: r.product(n),
    onnx_integer=lambda _: "",
    channels=_linear_channels,
    kernel="linear",
)
MATRIX = Product(_ordered_matrix, channels=-1, matrix=True)
#: The second factor of a product is its weight, whether it is a parameter or an activation.
FACTOR: dict[str, Any] = {"role": "weight", "position": 1, "channel_axis": -1, "summed_axis": -2}
MATMUL = define(
    "matmul",
    "Matrix product of two tensors.",
    functions=(operator.matmul, torch.matmul),
    names=("matmul",),
    operands=(DATA_IN, OperandSpec("weight", argument="other", **FACTOR)),
    count=_matmul,
    product=MATRIX,
    onnx=_write_matmul,
    onnx_integer=_scales_of_columns,
    channels=_product_channels,
)
BMM = define(
    "bmm",
    "Batched matrix product of two tensors.",
    functions=(torch.bmm,),
    names=("bmm",),
    operands=(DATA_IN, OperandSpec("weight", argument="mat2", **FACTOR)),
    count=_matmul,
    product=MATRIX,
    onnx=_write_matmul,
    onnx_integer=_scales_of_columns,
)
MM = define(
    "mm",
    "Matrix product of two matrices.",
    functions=(torch.mm,),
    names=("mm",),
    operands=(DATA_IN, OperandSpec("weight", argument="mat2", **FACTOR)),
    count=_matmul,
    product=MATRIX,
    onnx=_write_matmul,
    onnx_integer=_scales_of_columns,
    channels=_product_channels,
)
MV = define(
    "mv",
    "Product of a matrix and a vector.",
    functions=(torch.mv,),
    names=("mv",),
    operands=(DATA_IN, OperandSpec("weight", "weight", 1, "vec")),
    count=_matmul,
    onnx=_write_matmul,
    onnx_integer=_scales_of_columns,
)
DOT = define("dot", "Product of two vectors.", names=("dot",), count=_matmul)
ADDMM = define(
    "addmm",
    "Matrix product of two matrices, added to a tensor.",
    functions=(torch.addmm,),
    names=("addmm",),
    operands=(
        replace(DATA_IN, position=1, argument="mat1"),
        OperandSpec("weight", argument="mat2", **(FACTOR | {"position": 2})),
        replace(BIAS, position=0, argument="input"),
    ),
    count=_addmm,
    onnx=_write_addmm(("mat1", "mat2")),
)
BADDBMM = define(
    "baddbmm",
    "Batched matrix product, added to a tensor.",
    functions=(torch.baddbmm,),
    names=("baddbmm",),
    operands=(
        replace(DATA_IN, position=1, argument="batch1"),
        OperandSpec("weight", argument="batch2", **(FACTOR | {"position": 2})),
        replace(BIAS, position=0, argument="input"),
    ),
    count=_addmm,
    onnx=_write_addmm(("batch1", "batch2")),
)
EINSUM = define(
    "einsum",
    "Sum of products of two tensors over named dimensions.",
    functions=(torch.einsum,),
    names=("einsum",),
    # The equation comes first, and it decides along which dimensions channels lie.
    operands=(replace(DATA_IN, position=1, argument=""), OperandSpec("weight", "weight", 2, "")),
    refuses=_factors,
    count=_einsum,
    onnx=_write_einsum,
)
BILINEAR = define(
    "bilinear",
    "Bilinear layer: x₁ · weight · x₂ + bias.",
    modules=(nn.Bilinear,),
    functions=(F.bilinear, torch.bilinear),
    names=("bilinear",),
    operands=(
        replace(DATA_IN, argument="input1"),
        OperandSpec("data_in_2", "activation", 1, "input2", channel_axis=1, format_of=("data_in",)),
        replace(WEIGHT, position=2),
        replace(BIAS, position=3),
    ),
    count=_bilinear,
    call=_bilinear_forward,
)
TRANSPOSED_LINEAR = define(
    "transposed_linear",
    "Linear layer with a weight of shape (in, out): the Conv1D of transformers.",
    module_names=("transformers.pytorch_utils.Conv1D",),
    operands=(DATA_IN, replace(WEIGHT, channel_axis=1), BIAS),
    count=_by_rows,
    call=_transposed_linear,
    product=Product(_ordered_matrix, channels=1),
    onnx=_write_transposed_linear,
    onnx_integer=_scales_of_columns,
    channels=_transposed_linear_channels,
)
