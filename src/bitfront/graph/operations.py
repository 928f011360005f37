"""How many operations each type of node does, and which types are sites.

One table of rules serves modules and functions alike (``RULES``): a rule looks at the shapes and arguments of one call
and says how many operations it does on the whole batch, and how many of them are multiply-accumulates, which count
once. Biases are ignored, moving data is free; ``docs/metrics.md`` has the conventions in a table. A type without a rule
is reported as not counted, never as zero.

To teach it a type, add its name to ``_MODULE_OPS`` or ``_NAMES`` under the rule that fits, or write a rule.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfront.formats.base import Operand
from bitfront.graph.base import Node, Shape, Site

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
    # These are made by one factory and all have its name.
    F.max_pool1d: "max_pool1d",
    F.max_pool2d: "max_pool2d",
    F.max_pool3d: "max_pool3d",
    F.adaptive_max_pool1d: "adaptive_max_pool1d",
    F.adaptive_max_pool2d: "adaptive_max_pool2d",
    F.adaptive_max_pool3d: "adaptive_max_pool3d",
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


@dataclass(frozen=True)
class Count:
    """Operations, and the multiply-accumulates among them, each of which counts once."""

    operations: int
    macs: int = 0


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module, function or method, on a whole batch.

    Attributes:
        op: a key of RULES, or whatever it is called.
        tensors: shapes of the tensors among the arguments, in order, parameters included.
        output: shape of what it returns; of the first tensor where there are several.
        args, kwargs: the arguments; those of a module's ``forward``.
        module: the module, None for a function or method.
    """

    op: str
    tensors: tuple[Shape, ...]
    output: Shape
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    module: nn.Module | None = None

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """A setting by name: the module's attribute, or the function's argument."""
        if self.module is not None:
            return getattr(self.module, name, default)
        return self.args[position] if position < len(self.args) else (self.kwargs or {}).get(name, default)

    def shape(self, position: int, name: str) -> Shape:
        """The shape of a tensor argument, or of a parameter of the module."""
        return tuple(self.argument(position, name).shape)

    @property
    def n(self) -> int:
        """Elements of the first tensor."""
        return math.prod(self.tensors[0]) if self.tensors else 0

    @property
    def out(self) -> int:
        """Elements of the output."""
        return math.prod(self.output)


Rule = Callable[[Call], Count | None]


def _modules(text: str, op: str) -> dict[type[nn.Module], str]:
    return {getattr(nn, name): op for name in text.split()}


_MODULE_OPS: Mapping[type[nn.Module], str] = {
    **SITE_MODULES,
    nn.Conv3d: "conv3d",
    **_modules("ConvTranspose1d ConvTranspose2d ConvTranspose3d", "conv_transpose"),
    **_modules("BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm", "batch_norm"),
    **_modules("LayerNorm GroupNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d", "layer_norm"),
    nn.RMSNorm: "rms_norm",
    **_modules("MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d LPPool1d LPPool2d LPPool3d", "pool"),
    **_modules("AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d", "adaptive_pool"),
    **_modules("AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d", "adaptive_pool"),
    **_modules(
        "ReLU6 LeakyReLU PReLU RReLU ELU SELU CELU GELU SiLU Mish Hardtanh Hardswish Hardsigmoid", "elementwise"
    ),
    **_modules("Sigmoid LogSigmoid Tanh Tanhshrink Softplus Softsign Threshold", "elementwise"),
    nn.GLU: "glu",
    **_modules("Softmax Softmax2d LogSoftmax Softmin", "softmax"),
    **_modules("Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout Identity", "move"),
    **_modules("Flatten Unflatten PixelShuffle PixelUnshuffle ChannelShuffle Unfold Embedding", "move"),
    **_modules("ZeroPad1d ZeroPad2d ZeroPad3d ConstantPad1d ConstantPad2d ConstantPad3d", "move"),
    **_modules("ReflectionPad1d ReflectionPad2d ReflectionPad3d CircularPad1d CircularPad2d CircularPad3d", "move"),
    **_modules("ReplicationPad1d ReplicationPad2d ReplicationPad3d", "move"),
    **_modules("Upsample UpsamplingNearest2d UpsamplingBilinear2d", "interpolate"),
    nn.MultiheadAttention: "attention",
    **_modules("LSTM GRU RNN LSTMCell GRUCell RNNCell", "recurrent"),
    nn.Bilinear: "bilinear",
}
#: The rule of each function and method, by its name without the underscores of operators and in-place forms.
_NAMES: Mapping[str, str] = {
    name: op
    for op, names in {
        "move": """
            flatten view reshape transpose permute contiguous squeeze unsqueeze cat concat stack chunk split int
            bool double bfloat16 alias narrow select index_select gather take take_along_dim tile repeat hsplit
            vsplit hstack vstack concatenate meshgrid broadcast_to broadcast_tensors split_with_sizes getitem
            getattr get size dropout dropout1d dropout2d dropout3d alpha_dropout expand expand_as identity
            movedim moveaxis swapaxes swapdims unbind clone detach to float type type_as half long
            repeat_interleave roll flip pad unfold im2col t unflatten view_as reshape_as tensor_split embedding
            one_hot pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle arange zeros ones full
            empty eye linspace tensor as_tensor zeros_like ones_like full_like empty_like new_zeros new_ones
            new_full new_empty new_tensor rand randn rand_like randn_like copy fill zero setitem requires_grad
            cpu cuda as_strided diagonal tril triu real imag scatter index_put masked_select nonzero lift_fresh
            set_data data stochastic_depth
        """,
        "elementwise": """
            sigmoid tanh gelu silu relu relu6 leaky_relu prelu rrelu elu selu celu mish hardtanh hardswish
            hardsigmoid logsigmoid softplus softsign tanhshrink threshold clamp clamp_min clamp_max clip ceil
            round trunc sign div truediv true_divide floordiv floor_divide rdiv rtruediv mod remainder fmod pow
            rpow add radd iadd sub rsub isub mul rmul imul itruediv maximum minimum where masked_fill abs neg
            exp expm1 log log1p log2 sqrt rsqrt square reciprocal sin cos tan atan erf floor lt le gt ge eq ne
            isnan isinf isfinite logical_and logical_or logical_not logical_xor and or xor invert rand ror
            bitwise_and bitwise_or bitwise_not bitwise_xor outer lerp
        """,
        "twice": "addcmul addcdiv",
        "layer_norm": "layer_norm group_norm instance_norm",
        "softmax": "softmax log_softmax softmin",
        "pool": "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d lp_pool3d",
        "adaptive_pool": """
            mean sum prod amax amin max min any all argmax argmin cumsum cumprod logsumexp
            adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
            adaptive_max_pool2d adaptive_max_pool3d
        """,
        "variance": "var std",
        "interpolate": "interpolate upsample",
        "conv": "conv1d conv2d conv3d",
        "conv_transpose": "conv_transpose1d conv_transpose2d conv_transpose3d",
        "matmul": "matmul mm bmm mv dot",
        "addmm": "addmm baddbmm",
        "glu": "glu",
        "batch_norm": "batch_norm",
        "rms_norm": "rms_norm",
        "normalize": "normalize",
        "norm": "norm",
        "linear": "linear",
        "einsum": "einsum",
        "bilinear": "bilinear",
        "scaled_dot_product_attention": "scaled_dot_product_attention",
        "multi_head_attention_forward": "multi_head_attention_forward",
    }.items()
    for name in names.split()
}


def module_op(module: nn.Module) -> str:
    """The op of a module: a key of SITE_OPERANDS where it can be a site, its lower-case class name as a last resort."""
    for base, op in _MODULE_OPS.items():
        if isinstance(module, base) and type(module).forward is base.forward:
            return op
    return type(module).__name__.lower()


def has_rule(module: nn.Module) -> bool:
    """Whether operations of that module are counted as a whole."""
    return any(isinstance(module, base) and type(module).forward is base.forward for base in _MODULE_OPS)


def function_op(function: object) -> tuple[str, str]:
    """(op, name) of a function or of a method of tensors; the op is a key of SITE_OPERANDS where it can be a site."""
    name = str(getattr(function, "__name__", function))
    return FUNCTIONS.get(function) or METHODS.get(name) or bare(name), name


def bare(name: str) -> str:
    """``__iadd__``, ``add_`` and ``add`` are one name, ``add`` (``iadd`` where it is written without underscores)."""
    return name.strip("_") or name


def count(call: Call) -> Count | None:
    """What a call does on the whole batch; None where no rule covers it."""
    if call.module is not None:
        rule = RULES.get(call.op) if has_rule(call.module) else None
    else:
        rule = RULES.get(_NAMES.get(call.op, ""))
    return rule(call) if rule is not None else None


def weighted(op: str, weight: Shape, output: Shape) -> int:
    """Multiply-accumulates of a linear or convolution with that weight and output shape."""
    if op == "linear":
        # Every output value is a dot product over the inputs.
        return math.prod(output) * weight[1]
    return math.prod(output) * math.prod(weight[1:])


def shapes_in(value: object) -> tuple[Shape, ...]:
    """Shapes of the tensors in a value that may be nested, in order."""
    return tuple(tuple(t.shape) for t in tensors_in(value))


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in lists, tuples and mappings (such as transformers' outputs), in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)


def _products(macs: int) -> Count:
    return Count(macs, macs)


def _weighted(call: Call) -> Count:
    return _products(weighted("linear" if call.op == "linear" else "conv", call.shape(1, "weight"), call.output))


def _transposed(call: Call) -> Count:
    # Every input value is multiplied by each of the weights that lead from its channel.
    return _products(call.n * math.prod(call.shape(1, "weight")[1:]))


def _matmul(call: Call) -> Count:
    return _products(call.out * call.tensors[0][-1])


def _addmm(call: Call) -> Count:
    macs = call.out * call.tensors[1][-1]
    return Count(macs if call.kwargs is not None and call.kwargs.get("beta") == 0 else macs + call.out, macs)


def _pool(call: Call) -> Count:
    window = call.argument(1, "kernel_size", 1)
    name = call.op if call.module is None else type(call.module).__name__
    dims = next(int(c) for c in reversed(name) if c.isdigit())
    return Count(call.out * (math.prod(window) if isinstance(window, (tuple, list)) else int(window) ** dims))


def _interpolate(call: Call) -> Count | None:
    taps = {"nearest": 0, "nearest-exact": 0, "linear": 2, "bilinear": 4, "trilinear": 8, "bicubic": 16}
    mode = call.argument(3, "mode", "nearest")
    if mode == "area":
        return Count(call.n)
    return Count(call.out * taps[mode]) if mode in taps else None


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
    return _products(total) if len(terms) == 2 else Count(call.n)


def _sdpa(call: Call) -> Count:
    query, key, value = call.tensors[:3]
    scores = math.prod(query[:-1]) * key[-2]
    macs = scores * (query[-1] + value[-1])
    return Count(macs + 5 * scores, macs)


def _attention(call: Call) -> Count:
    """nn.MultiheadAttention: three projections in, scores, softmax, weighted sum, projection out."""
    module: Any = call.module
    return _heads(call.tensors[:3], module.batch_first, module.embed_dim, module.num_heads)


def _functional_attention(call: Call) -> Count:
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


def _recurrent(call: Call) -> Count:
    """Products of both weights of each layer and direction at every step; then, per unit, what the gates do.

    An LSTM's unit adds 4 pairs of sums, has 5 nonlinearities, 3 products and 1 sum; a GRU's 3, 3, 3 and 2; an RNN's
    1 and 1.
    """
    module: Any = call.module
    kind = type(module).__name__.removesuffix("Cell")
    steps = math.prod(call.tensors[0][:-1])
    per_unit = {"LSTM": 13, "GRU": 11, "RNN": 2}[kind]
    # Cells have one layer and one direction.
    layers, directions = getattr(module, "num_layers", 1), 2 if getattr(module, "bidirectional", False) else 1
    matrices = [p for name, p in module.named_parameters() if "weight" in name]
    macs = steps * sum(p.numel() for p in matrices)
    return Count(macs + steps * layers * directions * module.hidden_size * per_unit, macs)


def _bilinear(call: Call) -> Count:
    _, first, second = call.shape(2, "weight")
    return _products(call.out * second * (first + 1))


#: op → how many operations a call of it does.
RULES: Mapping[str, Rule] = {
    "linear": _weighted,
    "conv": _weighted,
    "conv1d": _weighted,
    "conv2d": _weighted,
    "conv3d": _weighted,
    "conv_transpose": _transposed,
    "matmul": _matmul,
    "addmm": _addmm,
    "einsum": _einsum,
    "bilinear": _bilinear,
    "scaled_dot_product_attention": _sdpa,
    "multi_head_attention_forward": _functional_attention,
    "attention": _attention,
    "recurrent": _recurrent,
    "relu": lambda call: Count(call.n),
    "elementwise": lambda call: Count(call.out),
    "twice": lambda call: Count(2 * call.out),
    "glu": lambda call: Count(call.n),
    "batch_norm": lambda call: Count(4 * call.n),
    "layer_norm": lambda call: Count(5 * call.n),
    "rms_norm": lambda call: Count(4 * call.n),
    "normalize": lambda call: Count(3 * call.n),
    "variance": lambda call: Count(4 * call.n),
    "norm": lambda call: Count(2 * call.n),
    "softmax": lambda call: Count(5 * call.n),
    "pool": _pool,
    "adaptive_pool": lambda call: Count(call.n),
    "interpolate": _interpolate,
    "move": lambda _: Count(0),
}


def bit_operations(node: Node, data_bits: Numbers, weight_bits: Numbers) -> Numbers:
    """Multiply-accumulates · weight bits · input bits, and every other operation · input bits, per sample."""
    return node.macs * data_bits * weight_bits + ((node.operations or 0) - node.macs) * data_bits


def fan_in(site: Site) -> int:
    """Products that are summed into one output value of a site; 0 where it multiplies by no weight."""
    if site.op in ("matmul", "bmm"):
        return site.macs // math.prod(site.output)
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
