"""How many operations each type of node does, and which types are sites.

Operations per sample, n = input elements (the conventions of ``docs/metrics.md``): Linear weight·rows, Conv output·
window·C_in/groups, ReLU n, BatchNorm 4n, LayerNorm 5n, pooling output·window, elementwise n; a multiply-accumulate
counts once, biases are ignored. Moving data is free. A type without a rule is reported as not counted, never as zero.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from bitfront.formats.base import Operand
from bitfront.graph.base import Shape, Site

#: A number, or an array of them, one per option or candidate.
Numbers = float | NDArray[Any]

SITE_OPERANDS: Mapping[str, tuple[Operand, ...]] = {
    "linear": ("data_in", "weight", "bias"),
    "conv1d": ("data_in", "weight", "bias"),
    "conv2d": ("data_in", "weight", "bias"),
    "relu": ("data_in",),
    "add": ("data_in",),
    "sub": ("data_in",),
    "mul": ("data_in",),
    # The second factor of a product is its weight, be it a parameter or an activation.
    "matmul": ("data_in", "weight"),
    "bmm": ("data_in", "weight"),
}
#: Modules that are sites. A subclass counts only if it leaves `forward` alone: a transform replaces that.
SITE_MODULES: Mapping[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.ReLU: "relu",
}
FUNCTIONS: Mapping[object, str] = {
    F.linear: "linear",
    F.conv1d: "conv1d",
    torch.conv1d: "conv1d",
    F.conv2d: "conv2d",
    torch.conv2d: "conv2d",
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    operator.sub: "sub",
    torch.sub: "sub",
    operator.mul: "mul",
    torch.mul: "mul",
    operator.matmul: "matmul",
    torch.matmul: "matmul",
    torch.bmm: "bmm",
}
METHODS: Mapping[str, str] = {
    "relu": "relu",
    "relu_": "relu",
    "add": "add",
    "add_": "add",
    "sub": "sub",
    "mul": "mul",
    "matmul": "matmul",
    "bmm": "bmm",
}
_MODULE_OPS: Mapping[type[nn.Module], str] = {
    **SITE_MODULES,
    nn.Conv3d: "conv3d",
    nn.BatchNorm1d: "batch_norm",
    nn.BatchNorm2d: "batch_norm",
    nn.BatchNorm3d: "batch_norm",
    nn.LayerNorm: "layer_norm",
    nn.GroupNorm: "layer_norm",
    nn.MaxPool1d: "pool",
    nn.MaxPool2d: "pool",
    nn.AvgPool1d: "pool",
    nn.AvgPool2d: "pool",
    nn.AdaptiveAvgPool1d: "adaptive_pool",
    nn.AdaptiveAvgPool2d: "adaptive_pool",
    nn.AdaptiveMaxPool2d: "adaptive_pool",
    nn.ReLU6: "elementwise",
    nn.LeakyReLU: "elementwise",
    nn.Sigmoid: "elementwise",
    nn.Tanh: "elementwise",
    nn.GELU: "elementwise",
    nn.SiLU: "elementwise",
    nn.Hardtanh: "elementwise",
    nn.Hardswish: "elementwise",
    nn.Softmax: "softmax",
    nn.LogSoftmax: "softmax",
    nn.Embedding: "move",
    nn.Dropout: "move",
    nn.Dropout1d: "move",
    nn.Dropout2d: "move",
    nn.Identity: "move",
    nn.Flatten: "move",
    nn.Unflatten: "move",
}
_MOVES = frozenset(
    "flatten view reshape transpose permute contiguous squeeze unsqueeze cat stack concat chunk split getitem "
    "getattr size dropout expand identity movedim swapaxes unbind clone detach to float type_as".split()
)
_ELEMENTWISE = frozenset("sigmoid tanh gelu silu relu6 leaky_relu hardtanh clamp abs neg exp sqrt".split())
_POOLS = frozenset("max_pool1d max_pool2d avg_pool1d avg_pool2d boolean_dispatch".split())
_REDUCTIONS = frozenset("mean sum amax amin adaptive_avg_pool1d adaptive_avg_pool2d".split())


def module_op(module: nn.Module) -> str:
    """The op of a module: a key of SITE_OPERANDS where it can be a site, its lower-case class name as a last resort."""
    for base, op in _MODULE_OPS.items():
        if isinstance(module, base) and type(module).forward is base.forward:
            return op
    return type(module).__name__.lower()


def count_module(op: str, module: nn.Module, inputs: tuple[Shape, ...], output: Shape) -> int | None:
    """Operations per sample of a module; None where no rule covers it."""
    if op in ("linear", "conv1d", "conv2d", "conv3d"):
        return weighted(op, tuple(module.weight.shape), output)  # type: ignore[arg-type]
    window: object = getattr(module, "kernel_size", 1)
    dims = 2 if "2d" in type(module).__name__ else 1
    return _count(op, inputs, output, window, dims)


def count_function(op: str, name: str, inputs: tuple[Shape, ...], output: Shape, window: object) -> int | None:
    """Operations per sample of a function or method; None where no rule covers it."""
    if op in ("matmul", "bmm"):
        return math.prod(output) * inputs[0][-1] if inputs and inputs[0] else None
    if name in _MOVES:
        return 0
    if name in _ELEMENTWISE:
        return _count("elementwise", inputs, output, 1, 1)
    if name in _POOLS:
        return _count("pool", inputs, output, window, 1 if "1d" in name else 2)
    if name in _REDUCTIONS:
        return _count("adaptive_pool", inputs, output, 1, 1)
    if name in ("softmax", "log_softmax"):
        return _count("softmax", inputs, output, 1, 1)
    return _count(op, inputs, output, 1, 1)


def weighted(op: str, weight: Shape, output: Shape) -> int:
    """Multiply-accumulates per sample of a linear or convolution with that weight and output shape."""
    if op == "linear":
        # Every output value is a dot product over the inputs.
        return math.prod(output) * weight[1]
    return math.prod(output) * math.prod(weight[1:])


def _count(op: str, inputs: tuple[Shape, ...], output: Shape, window: object, dims: int) -> int | None:
    n = math.prod(inputs[0]) if inputs else 0
    if op in ("add", "sub", "mul"):
        return math.prod(output)
    size = math.prod(window) if isinstance(window, tuple) else int(window) ** dims  # type: ignore[call-overload]
    rules: Mapping[str, Callable[[], int]] = {
        "relu": lambda: n,
        "elementwise": lambda: n,
        "batch_norm": lambda: 4 * n,
        "layer_norm": lambda: 5 * n,
        "softmax": lambda: 5 * n,
        "pool": lambda: math.prod(output) * size,
        "adaptive_pool": lambda: n,
        "move": lambda: 0,
    }
    return rules[op]() if op in rules else None


def fan_in(site: Site) -> int:
    """Products that are summed into one output value of a site; 0 where it multiplies by no weight."""
    if site.op in ("matmul", "bmm"):
        return site.inputs[0][-1]
    return math.prod(site.weight_shape[1:]) if site.macs else 0


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
