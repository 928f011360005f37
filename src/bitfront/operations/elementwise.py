"""Arithmetic, comparisons and functions, value by value."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from bitfront.errors import ExportError
from bitfront.operations.base import DATA_IN, Merge, OperandSpec, define, per_output
from bitfront.operations.channels import elementwise
from bitfront.operations.integers import IntegerReader, Lower, Numbers
from bitfront.operations.onnx import OnnxWriter, Write
from bitfront.operations.training import ProgramReader, UnsupportedError, unsupported

#: The second input is treated as the first one, unless the file says otherwise.
OTHER = OperandSpec("data_in_2", "activation", 1, "other", channel_axis=1, format_of=("data_in",))


def _arithmetic(op: str) -> Write:
    def write(w: OnnxWriter, n: fx.Node) -> str:
        if w.setting(n, 2, "alpha", 1) != 1:
            raise ExportError(f"{n.name} ({op}): alpha other than 1")
        return w.add(op, [w.value(n), w.value(n, 1, "other")], n.name)

    return write


def _sum(sign: int) -> Lower:
    """The rule of a sum (sign 1) or a difference (−1) of two values."""

    def lower(r: IntegerReader, n: fx.Node) -> Numbers:
        if r.setting(n, 2, "alpha", 1) != 1:
            raise r.refuse(n, "alpha other than 1")
        if any(tensor.shape != r.out.shape for tensor in r.tensors(n)):
            raise r.refuse(n, "its operands have other shapes than its result")
        return r.added((r.value(n), r.value(n, 1, "other")), (1, sign))

    return lower


def _train_add(reader: ProgramReader, node: fx.Node, module: nn.Module | None) -> int:
    # Forms that change their first input in place would change what others read.
    if node.target not in (operator.add, torch.add, "add") or node.kwargs:
        raise unsupported(node, module)
    left, right = (reader.value(n) for n in reader.sources(node, 2))
    if reader.shape(left) != reader.shape(right):
        raise UnsupportedError(f"{node.name} adds tensors of different shapes")
    return reader.emit("add", (left, right), reader.shape(left))


def _write_div(w: OnnxWriter, n: fx.Node) -> str:
    mode = w.setting(n, 2, "rounding_mode")
    if mode is not None:
        raise ExportError(f"{n.name} (Div): rounding_mode {mode!r}")
    return w.add("Div", [w.value(n), w.value(n, 1, "other")], n.name)


ADD = define(
    "add",
    "Sum of two tensors.",
    functions=(operator.add, operator.iadd, torch.add),
    names=("add",),
    operands=(DATA_IN, OTHER),
    count=per_output(1),
    merge=Merge("arithmetic", torch.add),
    train=_train_add,
    onnx=_arithmetic("Add"),
    integers=_sum(1),
    channels=elementwise,
)
SUB = define(
    "sub",
    "Difference of two tensors.",
    functions=(operator.sub, torch.sub),
    names=("sub",),
    operands=(DATA_IN, OTHER),
    count=per_output(1),
    merge=Merge("arithmetic", torch.sub),
    onnx=_arithmetic("Sub"),
    integers=_sum(-1),
    channels=elementwise,
)
MUL = define(
    "mul",
    "Product of two tensors, value by value.",
    functions=(operator.mul, torch.mul),
    names=("mul",),
    operands=(DATA_IN, OTHER),
    count=per_output(1),
    merge=Merge("arithmetic", torch.mul),
    onnx=_arithmetic("Mul"),
    channels=elementwise,
)
DIV = define(
    "div",
    "Quotient of two tensors, value by value.",
    functions=(operator.truediv, operator.itruediv, torch.div),
    names=("div", "truediv", "true_divide", "itruediv"),
    operands=(DATA_IN, OTHER),
    by_default=False,
    count=per_output(1),
    merge=Merge("arithmetic", torch.div),
    onnx=_write_div,
    channels=elementwise,
)
MAXIMUM = define(
    "maximum",
    "The larger of two tensors, value by value.",
    names=("maximum",),
    operands=(DATA_IN, OTHER),
    by_default=False,
    count=per_output(1),
    merge=Merge("arithmetic", torch.maximum),
    onnx=_arithmetic("Max"),
    channels=elementwise,
)
MINIMUM = define(
    "minimum",
    "The smaller of two tensors, value by value.",
    names=("minimum",),
    operands=(DATA_IN, OTHER),
    by_default=False,
    count=per_output(1),
    merge=Merge("arithmetic", torch.minimum),
    onnx=_arithmetic("Min"),
    channels=elementwise,
)
ELEMENTWISE = define(
    "elementwise",
    "One operation per value: arithmetic with numbers, comparisons, functions.",
    names=tuple(
        """
        clamp clamp_min clamp_max clip ceil round trunc sign floordiv floor_divide rdiv rtruediv mod remainder fmod pow
        rpow radd iadd rsub isub rmul imul where masked_fill abs neg exp expm1 log log1p log2 sqrt rsqrt square
        reciprocal sin cos tan atan erf floor lt le gt ge eq ne isnan isinf isfinite logical_and logical_or logical_not
        logical_xor and or xor invert rand ror bitwise_and bitwise_or bitwise_not bitwise_xor lerp
        """.split()
    ),
    count=per_output(1),
    channels=elementwise,
)
OUTER = define("outer", "Products of all pairs of values.", names=("outer",), count=per_output(1))
TWICE = define(
    "addcmul",
    "A product or quotient, added: two operations per value.",
    names=("addcmul", "addcdiv"),
    count=per_output(2),
    channels=elementwise,
)
