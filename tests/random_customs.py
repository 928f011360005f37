"""Blocks of random models with states, hooks and computed weights, and with code around their layers.

Built like those in ``random_blocks.py``.
"""

import functools
import types
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm
from torch.utils.checkpoint import checkpoint

from random_blocks import Block, layer, models_in
from random_parts import channels


class Counting(Block):
    """Counts its calls."""

    def __init__(self, shape, n):
        super().__init__(shape, n)
        self.calls = 0
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.last = None

    def forward(self, x):
        self.calls += 1
        if self.n % 2:
            self.seen += len(x)
        self.last = self.a(x)
        return torch.relu(self.last)


class Flagged(Block):
    """What it computes depends on self.training."""

    def forward(self, x):
        h = self.a(x)
        if self.training:
            return F.dropout(h, 0.3) if self.n % 2 else h * 2
        return self.b(h) if self.n % 3 == 0 else h


class Skipping(Block):
    """Stochastic depth."""

    def forward(self, x):
        if self.training and float(torch.rand(1)) < 0.3:
            return x
        return x + self.a(x)


class Closed(Block):
    """A function that holds parameters."""

    def __init__(self, shape, n):
        super().__init__(shape, n)
        gain = self.gain = nn.Parameter(torch.tensor(1.5))
        self.function = (lambda h: h * gain) if n % 2 else (lambda h: self.b(h))

    def forward(self, x):
        return self.function(torch.relu(self.a(x)))


class Replaced(Block):
    """``forward`` of one object is another function."""

    def __init__(self, shape, n):
        super().__init__(shape, n)
        if n % 3 == 0:
            self.a.forward = types.MethodType(_shifted, self.a)
        elif n % 3 == 1:
            self.forward = types.MethodType(_backwards, self)
        else:
            self.a.forward = functools.partial(_doubled, self.a.weight)

    def forward(self, x):
        return self.b(self.a(x))


def _shifted(module, x):
    return type(module).forward(module, x) + 0.5


def _backwards(block, x):
    return block.a(F.relu(block.b(x)))


def _doubled(weight, x):
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2) if weight.dim() == 4 else F.linear(x, weight)


class Defaulted(Block):
    """An argument with a tensor as its default."""

    def forward(self, x, shift=torch.tensor([0.5]), *, scale=torch.tensor(2.0)):  # noqa: B008
        return self.a(x * scale + shift)


class NamedHooks(Block):
    """Hooks that are given keywords."""

    def __init__(self, shape, n):
        super().__init__(shape, n)
        self.act = nn.ReLU()
        if n % 3 == 0:
            self.a.register_forward_pre_hook(_halve_named, with_kwargs=True)
        elif n % 3 == 1:
            self.a.register_forward_hook(_sine_named, with_kwargs=True, always_call=True)
        else:
            self.register_forward_hook(_sine_named, with_kwargs=True)
            self.act.register_forward_hook(_negative)

    def forward(self, x):
        return self.b(self.act(self.a(input=x) if self.n % 4 == 0 else self.a(x)))


def _halve_named(_module, inputs, named):
    return tuple(x * 0.5 for x in inputs), {name: x * 0.5 for name, x in named.items()}


def _sine_named(_module, _inputs, _named, out):
    return torch.sin(2 * out)


def _negative(_module, _inputs, out):
    return -out


class OwnSequential(nn.Sequential):
    def __init__(self, shape, n):
        super().__init__(layer(shape, n), nn.ReLU(), layer(shape, n + 1))

    def forward(self, x):
        h = x
        for module in self:
            h = h + module(h)
        return h


class Listed(nn.Module):
    """ParameterList, ParameterDict, ModuleList and a list that torch does not know."""

    def __init__(self, shape, n):
        super().__init__()
        c, _ = channels(shape)
        self.image, self.n = len(shape) == 3, n
        more = (1, 1) if self.image else ()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(c, c, *more) / 2) for _ in range(2)])
        self.others = nn.ParameterDict({"if": nn.Parameter(torch.randn(c) / 2)})
        self.layers = nn.ModuleList([layer(shape, n), nn.ReLU()])
        self.hidden = [layer(shape, n)] if n % 3 == 0 else []

    def forward(self, x):
        for weight in self.weights:
            x = F.conv2d(x, weight, self.others["if"]) if self.image else F.linear(x, weight, self.others["if"])
        for module in (*self.layers, *self.hidden):
            x = module(x)
        return x


class Recomputed(Block):
    """More weights that something else computes."""

    def __init__(self, shape, n):
        super().__init__(shape, n)
        self.a = (spectral_norm, parametrizations.spectral_norm, _orthogonal, _chained, _pruned_twice, _weight_buffer)[
            n % 6
        ](self.a)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def _orthogonal(module):
    return parametrizations.orthogonal(module) if module.weight.dim() == 2 else spectral_norm(module)


class Centred(nn.Module):
    def forward(self, weight):
        return weight - weight.mean()


class Squashed(nn.Module):
    def forward(self, weight):
        return torch.tanh(weight)


def _chained(module):
    parametrize.register_parametrization(module, "weight", Centred())
    parametrize.register_parametrization(module, "weight", Squashed())
    return module


def _pruned_twice(module):
    prune.random_unstructured(module, "weight", 0.3)
    prune.ln_structured(module, "weight", 0.4, n=2, dim=0)
    if module.bias is not None:
        prune.l1_unstructured(module, "bias", 0.5)
    return module


def _weight_buffer(module):
    weight = module.weight.detach().clone()
    del module.weight
    module.register_buffer("weight", weight)
    return module


class StandardConv(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-3), self.bias)


class Lowered(nn.Linear):
    @property
    def scale(self):
        return 0.5

    def forward(self, input):
        return F.linear(input, self.weight * self.scale, self.bias)


class SubclassedAgain(nn.Module):
    def __init__(self, shape, n):
        super().__init__()
        c, _ = channels(shape)
        self.a = StandardConv(c, c, 3, padding=1) if len(shape) == 3 else Lowered(c, c)
        self.b = layer(shape, n)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class Sharing(nn.Module):
    """One module at two paths, one parameter at a layer and in a function."""

    def __init__(self, shape, n):
        super().__init__()
        self.a, self.n, self.image = layer(shape, 0), n, len(shape) == 3
        self.b = nn.Sequential(self.a, nn.ReLU(), self.a if n % 2 else layer(shape, n))
        self.weight = self.a.weight if n % 3 else None

    def forward(self, x):
        h = self.b(self.a(x))
        if self.weight is None:
            return h
        return h + (F.conv2d(x, self.weight) if self.image else x @ self.weight)


class Frozen(Block):
    """Parts run without gradients, or are computed anew in the backward pass."""

    def forward(self, x):
        if self.n % 3 == 0:
            with torch.no_grad():
                h = self.a(x)
        elif self.n % 3 == 1:
            h = self.a(x).detach()
        else:
            h = checkpoint(self.a, x, use_reentrant=False)
        return self.b(torch.relu(h))


class _Signs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Customised(Block):
    """A function with its backward pass; one that torch compiled."""

    def forward(self, x):
        h = self.a(x)
        return self.b(_Signs.apply(h) if self.n % 2 else _scripted(h))


def _swish(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    _scripted = torch.jit.script(_swish)


class Passing(nn.Module):
    """Modules that give tuples and dicts, and take several tensors."""

    def __init__(self, shape, n):
        super().__init__()
        self.two, self.join, self.n = _Two(shape, n), _Join(shape, n), n

    def forward(self, x):
        out = self.two(x)
        return self.join(out["h"], scale=out["x"]) if self.two.named else self.join(*out)


class _Two(Block):
    def __init__(self, shape, n):
        super().__init__(shape, n)
        self.named = n % 2 == 0

    def forward(self, x):
        h = self.a(x)
        return {"h": h, "x": x} if self.named else (h, x)


class _Join(Block):
    def forward(self, h, scale=None):
        return self.a(h * scale) + h


class Trying(Block):
    """try and with around layers, a loop that depends on a parameter."""

    def forward(self, x):
        try:
            h = self.a(x)
        except RuntimeError:
            h = x
        for _ in range(int(self.a.weight.abs().sum() > 0) + 1):
            h = torch.tanh(h)
        return self.b(h)


CUSTOMS = models_in(globals(), (Centred, Squashed, StandardConv, Lowered))
