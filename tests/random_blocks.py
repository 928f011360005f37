"""Blocks of random models: layers with everything that people write around them. Each keeps the shape of its input.

A block is built from the shape of one sample, ``(features,)``, ``(steps, features)`` or ``(channels, height, width)``, and a
number from 0 to 23 that selects a variant. ``random_parts.py`` has more of them.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

ACTIVATIONS = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.ReLU6,
    nn.Softplus,
    nn.Mish,
    nn.CELU,
    nn.SELU,
    nn.Softsign,
    nn.Hardsigmoid,
    nn.LogSigmoid,
    nn.Tanhshrink,
    nn.PReLU,
)


def layer(shape, n, bias=True):
    """The layer with weights for inputs of a shape, which keeps the shape."""
    if len(shape) == 3:
        kernel = 1 + 2 * (n % 2)
        return nn.Conv2d(shape[0], shape[0], kernel, padding=kernel // 2, bias=bias)
    return nn.Linear(shape[-1], shape[-1], bias=bias)


class Block(nn.Module):
    """Keeps the shape of its input."""

    def __init__(self, shape, n):
        super().__init__()
        self.n = n
        self.a, self.b = layer(shape, n), layer(shape, n + 1, bias=n % 2 == 0)


class Plain(Block):
    def forward(self, x):
        return self.a(x)


class Activated(Block):
    def __init__(self, shape, n):
        super().__init__(shape, n)
        self.act = ACTIVATIONS[n % len(ACTIVATIONS)]()

    def forward(self, x):
        return self.act(self.a(x))


class InPlace(Block):
    def __init__(self, shape, n):
        super().__init__(shape, n)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.b(self.act(self.a(x)))


class Residual(Block):
    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))


class ResidualInPlace(Block):
    def forward(self, x):
        h = F.relu(self.a(x), inplace=True)
        h += x
        return self.b(h).mul_(0.5)


class Reused(Block):
    """One layer, called twice."""

    def forward(self, x):
        return self.a(torch.tanh(self.a(x)))


class Tied(Block):
    """Two layers with one weight."""

    def __init__(self, shape, n):
        super().__init__(shape, n - n % 2)
        self.b = layer(shape, n - n % 2)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class Joined(Block):
    """Halves of the channels, each through functions of its own, and together again."""

    def forward(self, x):
        dim = 1 if x.dim() == 4 else -1
        left, right = self.a(x).chunk(2, dim)
        return torch.cat([torch.sigmoid(right), left.clamp(-1, 1)], dim)


class Functional(nn.Module):
    """Weights that are parameters of its own."""

    def __init__(self, shape, n):
        super().__init__()
        self.image = len(shape) == 3
        channels = shape[0] if self.image else shape[-1]
        self.weight = nn.Parameter(torch.randn(channels, channels, *((1, 1) if self.image else ())) / 2)
        self.scale = nn.Parameter(torch.ones(1) * (1 + n % 3))

    def forward(self, x):
        h = F.conv2d(x, self.weight) if self.image else F.linear(x, self.weight)
        return h * self.scale


class Standardised(nn.Module):
    """A weight that is computed anew in each call."""

    def __init__(self, shape, n):
        super().__init__()
        self.image, self.a = len(shape) == 3, layer(shape, n)
        self.n = n

    def forward(self, x):
        w = self.a.weight - self.a.weight.mean()
        w = w / (w.std() + 0.1)
        return F.conv2d(x, w, self.a.bias, padding=self.a.padding) if self.image else F.linear(x, w, self.a.bias)


class Scaling(nn.Linear):
    """A Linear that does something else."""

    def forward(self, x):
        return super().forward(x) * 0.5


class ScalingConv(nn.Conv2d):
    """A convolution with another helper."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight * 0.5, bias)


class Subclassed(nn.Module):
    def __init__(self, shape, n):
        super().__init__()
        self.a = ScalingConv(shape[0], shape[0], 3, padding=1) if len(shape) == 3 else Scaling(shape[-1], shape[-1])
        self.b = layer(shape, n)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class Hooked(Block):
    """A hook changes what the layer gives."""

    def __init__(self, shape, n):
        super().__init__(shape, n)
        self.a.register_forward_hook(_sine if n % 3 else _observe)
        if n % 4 == 0:
            self.b.register_forward_pre_hook(_halve)

    def forward(self, x):
        return self.b(self.a(x))


def _sine(_module, _inputs, out):
    return torch.sin(2 * out)


def _observe(_module, _inputs, _out):
    return None


def _halve(_module, inputs):
    return (inputs[0] * 0.5,)


class Computed(Block):
    """A weight that torch computes from other parameters."""

    def __init__(self, shape, n):
        super().__init__(shape, n)
        self.a = (weight_norm, parametrizations.weight_norm, _pruned, _symmetric)[n % 4](self.a)

    def forward(self, x):
        return self.b(F.leaky_relu(self.a(x)))


def _pruned(module):
    prune.l1_unstructured(module, "weight", 0.5)
    return module


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def _symmetric(module):
    parametrize.register_parametrization(module, "weight", Doubled())
    return module


class Normed(Block):
    def __init__(self, shape, n):
        super().__init__(shape, n)
        self.image, self.sequence = len(shape) == 3, len(shape) == 2
        channels = shape[0] if self.image else shape[-1]
        if self.image:
            self.norm = (nn.BatchNorm2d(channels), nn.GroupNorm(1, channels), nn.InstanceNorm2d(channels))[n % 3]
        else:
            self.norm = nn.LayerNorm(channels) if self.sequence or n % 2 else nn.BatchNorm1d(channels)
        if isinstance(self.norm, nn.BatchNorm1d | nn.BatchNorm2d):
            self.norm.running_mean.uniform_(-0.5, 0.5)
            self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x):
        return torch.relu(self.norm(self.a(x)))


class Dropping(Block):
    """Dropout, as a module and as a function."""

    def __init__(self, shape, n):
        super().__init__(shape, n)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return F.dropout(self.b(self.drop(self.a(x))), 0.2, self.training)


class Attending(Block):
    """Products of two activations."""

    def forward(self, x):
        flat = x.flatten(1)[:, : (x[0].numel() // 2) * 2].reshape(x.shape[0], 2, -1)
        scores = (flat @ flat.transpose(1, 2)).softmax(-1)
        return self.a(x) * scores.mean((1, 2)).reshape(-1, *[1] * (x.dim() - 1))


class Masked(Block):
    """An additive mask with infinities."""

    def __init__(self, shape, n):
        super().__init__(shape, n)
        self.register_buffer("keep", torch.arange(shape[-1]) % 3 > 0)

    def forward(self, x):
        h = self.a(x)
        h = h.masked_fill(~self.keep, float("-inf")).softmax(-1)
        return self.b(h)


class Nested(Block):
    """Names that clash once dots are underscores, and names that are keywords."""

    def __init__(self, shape, n):
        super().__init__(shape, n)
        self.b_c = layer(shape, n)
        self.b = nn.ModuleDict({"c": layer(shape, n + 1), "class": nn.Sequential(nn.ReLU(), layer(shape, n))})

    def forward(self, x):
        return self.b["class"](self.b["c"](self.b_c(x)))


class Branching(Block):
    """Control flow that depends on data: torch.fx cannot follow it."""

    def forward(self, x):
        h = self.a(x)
        if float(h.abs().sum()) < 0:
            return h
        return self.b(torch.relu(h))


class Overridden(Block):
    """A method of one object, not of its class."""

    def __init__(self, shape, n):
        super().__init__(shape, n)
        forward = self.a.forward
        self.a.forward = _Twice(forward) if n % 2 else forward

    def forward(self, x):
        return self.a(x)


class _Twice:
    def __init__(self, forward):
        self.function = forward

    def __call__(self, x):
        return self.function(x) * 2

    def __deepcopy__(self, memo):
        # A bound method of a copied module is bound to the copy.
        return _Twice(copy.deepcopy(self.function, memo))


class Heads(nn.Module):
    """MultiheadAttention of sequences; a layer of images and vectors."""

    def __init__(self, shape, n):
        super().__init__()
        self.sequence = len(shape) == 2
        self.a = nn.MultiheadAttention(shape[-1], 2, batch_first=True) if self.sequence else layer(shape, n)

    def forward(self, x):
        return self.a(x, x, x, need_weights=False)[0] + x if self.sequence else self.a(x)


BLOCKS = (
    Plain,
    Activated,
    InPlace,
    Residual,
    ResidualInPlace,
    Reused,
    Tied,
    Joined,
    Functional,
    Standardised,
    Subclassed,
    Hooked,
    Computed,
    Normed,
    Dropping,
    Attending,
    Masked,
    Nested,
    Branching,
    Overridden,
    Heads,
)


def models_in(namespace, besides=()):
    """The modules that a test file defines, in its order; not those with a leading underscore, nor those `besides`.

    Args:
        namespace: ``globals()`` of the file.
    """
    return tuple(
        kind
        for kind in namespace.values()
        if isinstance(kind, type)
        and issubclass(kind, nn.Module)
        and kind.__module__ == namespace["__name__"]
        and not kind.__name__.startswith("_")
        and kind not in besides
    )
