"""Activation functions: one value in, one value out; and softmax, which reads a whole dimension."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bitfront.errors import ExportError
from bitfront.operations.base import (
    DATA_IN,
    ON_INPUT,
    Merge,
    OperandCall,
    Operands,
    classes,
    define,
    per_input,
    per_output,
)
from bitfront.operations.channels import elementwise, mixing, per_channel
from bitfront.operations.dense import WEIGHT
from bitfront.operations.integers import IntegerReader, Numbers
from bitfront.operations.layout import ChannelCall, ChannelFollower, Layout
from bitfront.operations.onnx import OnnxWriter, Packed, Write, unary
from bitfront.operations.training import Bend, ProgramReader, TrainRule, UnsupportedError, unsupported


def _relu(_: nn.Module, operands: Operands) -> Tensor:
    return F.relu(operands["data_in"])


def _write_relu(w: OnnxWriter, n: fx.Node) -> str:
    if not w.integer(n):
        return w.add("Relu", [w.value(n)], n.name)
    data = w.packed(n, signed=True)
    # A ReLU does not change unsigned bytes whose zero is 0.
    cut = w.add("Relu", [data.name], f"{n.name}.integer") if data.held.signed else data.name
    return w.unpacked(replace(data, name=cut), n.name)


def _zero_is_zero(packed: Mapping[str, Packed]) -> str:
    return "" if packed["data_in"].symmetric else "its input has a zero point other than 0"


def _train_relu(reader: ProgramReader, node: fx.Node, module: nn.Module | None) -> int:
    if module is None:
        inplace = node.kwargs.get("inplace") or set(node.kwargs) - {"inplace"}
        if node.target not in (torch.relu, F.relu, "relu") or inplace:
            raise unsupported(node, module)
        return reader.rectified(reader.sources(node, 1)[0])
    path, (source,) = str(node.target), reader.sources(node, 1)
    if getattr(module, "inplace", False) and len(source.users) > 1:
        raise UnsupportedError(f"{path} changes a tensor in place that others read")
    return reader.rectified(source, path)


def _bending(bend: Callable[[Callable[[int, str, float], float]], Bend]) -> TrainRule:
    """The rule of a function of two bends.

    Args:
        bend: gives it from a function (place among the arguments, name, default) → the value of a setting.
    """

    def train(reader: ProgramReader, node: fx.Node, module: nn.Module | None) -> int:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or (module is None and getattr(node.target, "__name__", "_")[-1] == "_"):
            raise unsupported(node, module)
        path = "" if module is None else str(node.target)
        inplace = bool(node.kwargs.get("inplace")) if module is None else getattr(module, "inplace", False)
        if inplace and (module is None or len(source.users) > 1):
            raise UnsupportedError(f"{path or node.name} changes a tensor in place that others may read")
        if path and reader.formatted(path):
            raise UnsupportedError(f"{path} is a {type(module).__name__} in formats")

        def setting(place: int, name: str, default: float) -> float:
            if module is not None:
                return float(getattr(module, name))
            given: Any = node.args[place] if len(node.args) > place else node.kwargs.get(name, default)
            if not isinstance(given, (int, float)):
                raise unsupported(node, module)
            return float(given)

        value = reader.value(source)
        return reader.emit("bend", (value,), reader.shape(value), path=path, bend=bend(setting))

    return train


RELU = define(
    "relu",
    "max(x, 0).",
    modules=(nn.ReLU,),
    functions=(F.relu, F.relu_, torch.relu),
    names=("relu",),
    operands=(DATA_IN,),
    count=per_input(1),
    call=_relu,
    rectifies=True,
    merge=Merge("rectifier"),
    train=_train_relu,
    onnx=_write_relu,
    integers=lambda r, n: r.limited(n, 0.0, None),
    onnx_integer=_zero_is_zero,
    channels=elementwise,
    kernel="rectifier",
)


#: Of functions that are plain arithmetic, which gives the same bits everywhere.
_EXACT = Merge("elementwise")


def _of_input(function: Callable[[Any, Tensor], Tensor]) -> OperandCall:
    """The call of a module whose only operand is its input, from a function (module, input) → value."""
    return lambda module, operands: function(module, operands["data_in"])


def _call_softmin(module: Any, x: Tensor) -> Tensor:
    return F.softmax(x, -3) if isinstance(module, nn.Softmax2d) else F.softmin(x, module.dim, _stacklevel=5)


def _call_prelu(_: nn.Module, operands: Operands) -> Tensor:
    return F.prelu(operands["data_in"], operands["weight"])


def _prelu(flow: ChannelFollower, call: ChannelCall) -> Layout | None:
    """One slope for all values, or one per channel."""
    x = call.tensor
    weight = None if call.module is None else call.held().get("weight")
    if x is None or weight is None or (weight.numel() > 1 and len(x.dims) < 2):
        return None
    return x if weight.numel() == 1 else per_channel(flow, x, "num_parameters", [weight])


def _softmax(flow: ChannelFollower, call: ChannelCall) -> Layout | None:
    x = call.tensor
    if x is None or not call.constant:
        return None
    dims: Any = call.argument(1, "dim") if call.module is None else getattr(call.module, "dim", -3)
    return mixing(flow, x, dims)


def _activation(name: str, summary: str, module: str = "", **answers: Any) -> None:
    """An activation function of torch, as a module and as a function called `name`. Its exponentials differ in the rest
    of a tensor, unless it says how it merges."""
    common: dict[str, Any] = {
        "names": (name,),
        "count": per_output(1),
        "channels": elementwise,
        "merge": Merge("elementwise", rest_differs=True),
        **ON_INPUT,
    }
    define(name, summary, modules=classes(module), **common | answers)


def _clip(w: OnnxWriter, n: fx.Node, low: float, high: float) -> str:
    bounds = [w.constant(f"{n.name}.{k}", np.array(v, np.float32)) for k, v in (("low", low), ("high", high))]
    return w.add("Clip", [w.value(n), *bounds], n.name)


def _write_hardtanh(w: OnnxWriter, n: fx.Node) -> str:
    low, high = w.setting(n, 1, "min_val", -1.0), w.setting(n, 2, "max_val", 1.0)
    return _clip(w, n, float(low), float(high))


def _lower_hardtanh(r: IntegerReader, n: fx.Node) -> Numbers:
    return r.limited(n, float(r.setting(n, 1, "min_val", -1.0)), float(r.setting(n, 2, "max_val", 1.0)))


def _write_leaky(w: OnnxWriter, n: fx.Node) -> str:
    return w.add("LeakyRelu", [w.value(n)], n.name, alpha=float(w.setting(n, 1, "negative_slope", 0.01)))


def _write_gelu(w: OnnxWriter, n: fx.Node) -> str:
    return w.add("Gelu", [w.value(n)], n.name, approximate=w.setting(n, 1, "approximate", "none"))


def _write_silu(w: OnnxWriter, n: fx.Node) -> str:
    x = w.value(n)
    return w.add("Mul", [x, w.add("Sigmoid", [x], f"{n.name}.gate")], n.name)


def _write_softmax(op: str) -> Write:
    def write(w: OnnxWriter, n: fx.Node) -> str:
        dim = w.setting(n, 1, "dim", None)
        if dim is None:
            raise ExportError(f"{n.name} ({op}): without a dim")
        return w.add(op, [w.value(n)], n.name, axis=int(dim) % w.out.dim())

    return write


_activation(
    "relu6",
    "min(max(x, 0), 6).",
    "ReLU6",
    call=_of_input(lambda _, x: F.relu6(x)),
    rectifies=True,
    merge=Merge("rectifier", ceiling=6.0),
    train=_bending(lambda _: Bend(0.0, 0.0, 6.0)),
    onnx=lambda w, n: _clip(w, n, 0, 6),
    integers=lambda r, n: r.limited(n, 0.0, 6.0),
)
_activation(
    "leaky_relu",
    "x, or a part of it where it is negative.",
    "LeakyReLU",
    merge=_EXACT,
    call=_of_input(lambda m, x: F.leaky_relu(x, m.negative_slope)),
    train=_bending(lambda setting: Bend(0.0, setting(1, "negative_slope", 0.01))),
    onnx=_write_leaky,
    integers=lambda r, n: r.leaked(n, float(r.setting(n, 1, "negative_slope", 0.01))),
)
_activation(
    "prelu",
    "Leaky ReLU with a slope that is learned.",
    "PReLU",
    merge=None,
    operands=(DATA_IN, WEIGHT),
    call=_call_prelu,
    channels=_prelu,
)
_activation(
    "rrelu",
    "Leaky ReLU with a random slope in training.",
    "RReLU",
    merge=None,
    call=_of_input(lambda m, x: F.rrelu(x, m.lower, m.upper, m.training)),
)
_activation("elu", "x, or α(eˣ − 1) where it is negative.", "ELU", call=_of_input(lambda m, x: F.elu(x, m.alpha)))
_activation("selu", "ELU with fixed scales.", "SELU", call=_of_input(lambda _, x: F.selu(x)))
_activation("celu", "ELU with a continuous slope.", "CELU", call=_of_input(lambda m, x: F.celu(x, m.alpha)))
_activation(
    "gelu",
    "x · Φ(x).",
    "GELU",
    call=_of_input(lambda m, x: F.gelu(x, approximate=m.approximate)),
    onnx=_write_gelu,
)
_activation("silu", "x · sigmoid(x).", "SiLU", call=_of_input(lambda _, x: F.silu(x)), onnx=_write_silu)
_activation("mish", "x · tanh(softplus(x)).", "Mish", call=_of_input(lambda _, x: F.mish(x)))
_activation(
    "hardtanh",
    "x within two bounds.",
    "Hardtanh",
    merge=_EXACT,
    call=_of_input(lambda m, x: F.hardtanh(x, m.min_val, m.max_val)),
    train=_bending(lambda setting: Bend(setting(1, "min_val", -1.0), 0.0, setting(2, "max_val", 1.0))),
    onnx=_write_hardtanh,
    integers=_lower_hardtanh,
)
_activation(
    "hardswish",
    "x · relu6(x + 3) / 6.",
    "Hardswish",
    merge=_EXACT,
    call=_of_input(lambda _, x: F.hardswish(x)),
    onnx=unary("HardSwish"),
)
_activation(
    "hardsigmoid",
    "relu6(x + 3) / 6.",
    "Hardsigmoid",
    merge=_EXACT,
    call=_of_input(lambda _, x: F.hardsigmoid(x)),
    onnx=unary("HardSigmoid", alpha=1 / 6, beta=0.5),
    gives="class_probabilities",
)
_activation(
    "sigmoid",
    "1 / (1 + e⁻ˣ).",
    "Sigmoid",
    names=("sigmoid", "expit"),
    call=_of_input(lambda _, x: torch.sigmoid(x)),
    onnx=unary("Sigmoid"),
    gives="class_probabilities",
)
_activation(
    "logsigmoid",
    "Logarithm of the sigmoid.",
    "LogSigmoid",
    names=("logsigmoid", "log_sigmoid"),  # F.logsigmoid is called log_sigmoid
    call=_of_input(lambda _, x: F.logsigmoid(x)),
    gives="class_log_probabilities",
)
_activation("tanh", "Hyperbolic tangent.", "Tanh", call=_of_input(lambda _, x: torch.tanh(x)), onnx=unary("Tanh"))
_activation("tanhshrink", "x − tanh(x).", "Tanhshrink", call=_of_input(lambda _, x: F.tanhshrink(x)))
_activation(
    "softshrink",
    "x moved towards 0 by a bound, and 0 within it.",
    "Softshrink",
    merge=_EXACT,
    call=_of_input(lambda m, x: F.softshrink(x, m.lambd)),
)
_activation("softplus", "log(1 + eˣ).", "Softplus", call=_of_input(lambda m, x: F.softplus(x, m.beta, m.threshold)))
_activation("softsign", "x / (1 + |x|).", "Softsign", merge=_EXACT, call=_of_input(lambda _, x: F.softsign(x)))
_activation(
    "threshold",
    "x above a bound, else a value.",
    "Threshold",
    merge=_EXACT,
    call=_of_input(lambda m, x: F.threshold(x, m.threshold, m.value)),
)


def _train_softmax(reader: ProgramReader, node: fx.Node, module: nn.Module | None) -> int:
    source, given = node.args[0] if node.args else None, node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dim = given if module is None else getattr(module, "dim", None)
    if not isinstance(source, fx.Node) or node.kwargs.get("dtype") is not None or dim not in (1, -1):
        raise unsupported(node, module)
    path, value = "" if module is None else str(node.target), reader.value(source)
    if len(reader.shape(value)) != 1 or (path and reader.formatted(path)):
        raise unsupported(node, module)
    return reader.emit("softmax", (value,), reader.shape(value), path=path)


GLU = define(
    "glu",
    "Half of the channels, gated by the other half.",
    modules=(nn.GLU,),
    names=("glu",),
    count=per_input(1),
    call=_of_input(lambda m, x: F.glu(x, m.dim)),
    **ON_INPUT,
)
_SOFTMAX: dict[str, Any] = {"count": per_input(5), "channels": _softmax, **ON_INPUT}
SOFTMAX = define(
    "softmax",
    "Exponentials, divided by their sum over a dimension.",
    modules=(nn.Softmax,),
    names=("softmax",),
    call=_of_input(lambda m, x: F.softmax(x, m.dim, _stacklevel=5)),
    onnx=_write_softmax("Softmax"),
    gives="probabilities",
    train=_train_softmax,
    **_SOFTMAX,
)
LOG_SOFTMAX = define(
    "log_softmax",
    "Logarithm of the softmax.",
    modules=(nn.LogSoftmax,),
    names=("log_softmax",),
    call=_of_input(lambda m, x: F.log_softmax(x, m.dim, _stacklevel=5)),
    onnx=_write_softmax("LogSoftmax"),
    gives="log_probabilities",
    train=_train_softmax,
    **_SOFTMAX,
)
SOFTMIN = define(
    "softmin",
    "Softmax of −x, and softmax over the channels of an image.",
    modules=(nn.Softmin, nn.Softmax2d),
    names=("softmin",),
    call=_of_input(_call_softmin),
    gives="probabilities",
    **_SOFTMAX,
)
