"""Activation functions: one value in, one value out; and softmax, which looks at a whole dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfront.operations.base import DATA_IN, Merge, classes, define, per_input, per_output
from bitfront.operations.channels import elementwise, mixing, per_channel
from bitfront.operations.layout import ChannelCall, ChannelFollower, Layout


def _relu(_: nn.Module, operands: Mapping[str, Tensor | None]) -> Tensor:
    x = operands["data_in"]
    assert x is not None
    return F.relu(x)


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
    channels=elementwise,
    kernel="rectifier",
)


def _prelu(flow: ChannelFollower, call: ChannelCall) -> Layout | None:
    """One slope for everything, or one per channel."""
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
    """An activation function of torch, as a module and as a function called `name`."""
    common: dict[str, Any] = {"count": per_output(1), "channels": elementwise}
    define(name, summary, modules=classes(module), names=(name,), **common | answers)


_activation("relu6", "min(max(x, 0), 6).", "ReLU6")
_activation("leaky_relu", "x, or a part of it where it is negative.", "LeakyReLU")
_activation("prelu", "Leaky ReLU with a slope that is learned.", "PReLU", channels=_prelu)
_activation("rrelu", "Leaky ReLU with a random slope in training.", "RReLU")
_activation("elu", "x, or α(eˣ − 1) where it is negative.", "ELU")
_activation("selu", "ELU with fixed scales.", "SELU")
_activation("celu", "ELU with a continuous slope.", "CELU")
_activation("gelu", "x · Φ(x).", "GELU")
_activation("silu", "x · sigmoid(x).", "SiLU")
_activation("mish", "x · tanh(softplus(x)).", "Mish")
_activation("hardtanh", "x within two bounds.", "Hardtanh")
_activation("hardswish", "x · relu6(x + 3) / 6.", "Hardswish")
_activation("hardsigmoid", "relu6(x + 3) / 6.", "Hardsigmoid")
_activation("sigmoid", "1 / (1 + e⁻ˣ).", "Sigmoid")
_activation("logsigmoid", "Logarithm of the sigmoid.", "LogSigmoid")
_activation("tanh", "Hyperbolic tangent.", "Tanh")
_activation("tanhshrink", "x − tanh(x).", "Tanhshrink")
_activation("softshrink", "x moved towards 0 by a bound, and 0 within it.", "Softshrink")
_activation("softplus", "log(1 + eˣ).", "Softplus")
_activation("softsign", "x / (1 + |x|).", "Softsign")
_activation("threshold", "x above a bound, else a value.", "Threshold")
GLU = define(
    "glu", "Half of the channels, gated by the other half.", modules=(nn.GLU,), names=("glu",), count=per_input(1)
)
SOFTMAX = define(
    "softmax",
    "Softmax, its logarithm, or that of −x.",
    modules=classes("Softmax Softmax2d LogSoftmax Softmin"),
    names=("softmax", "log_softmax", "softmin"),
    count=per_input(5),
    channels=_softmax,
)
