"""Random small classifiers with everything that people write in a model, and their evaluation by hand.

``plans()`` is a hypothesis strategy; ``RandomModel(plan)`` builds the network of a plan, with weights that follow from it.
``by_hand`` evaluates a network under number formats with hooks alone. It shares no code with Bitfront: rounding is
written out from docs/formats.md.
"""

import copy
import itertools
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.overrides import TorchFunctionMode

CLASSES = 3
FEATURES = 6
IMAGE = (2, 6, 6)
SEQUENCE = (4, 6)
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


# --- blocks: modules from any shape (batch, ..., channels last or first) to the same shape --------------------------------


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
    Heads,
)


# --- the network ----------------------------------------------------------------------------------------------------------


class RandomModel(nn.Module):
    """The blocks of a plan, one after the other, and a layer to the classes."""

    def __init__(self, plan):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(plan["seed"])
            self.shape = {"vector": (FEATURES,), "image": IMAGE, "sequence": SEQUENCE}[plan["input"]]
            self.blocks = nn.ModuleList(BLOCKS[kind](self.shape, n) for kind, n in plan["blocks"])
            size = int(torch.tensor(self.shape).prod())
            self.head = nn.Linear(self.shape[0] if plan["input"] == "image" else size, CLASSES)
        self.image = plan["input"] == "image"

    def body(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)) if self.image else x.flatten(1))


class Bare(RandomModel):
    def forward(self, x):
        return self.body(x)


class Temperature(RandomModel):
    def forward(self, x, temperature=2.0):
        return self.body(x) / temperature


class OptionalMask(RandomModel):
    def forward(self, x, mask=None):
        if mask is not None:
            x = x * mask
        return self.body(x)


class Star(RandomModel):
    def forward(self, *inputs):
        return self.body(inputs[0])


class Keywords(RandomModel):
    def forward(self, x, *, gain=1.5, **others):
        return self.body(x * gain) + len(others)


SIGNATURES = (Bare, Bare, Temperature, OptionalMask, Star, Keywords)


@st.composite
def plans(draw):
    """What a network is made of: plain data."""
    return {
        "input": draw(st.sampled_from(["vector", "image", "sequence"])),
        "blocks": draw(
            st.lists(st.tuples(st.integers(0, len(BLOCKS) - 1), st.integers(0, 23)), min_size=1, max_size=4)
        ),
        "signature": draw(st.integers(0, len(SIGNATURES) - 1)),
        "seed": draw(st.integers(0, 999)),
        "format": draw(st.sampled_from(["integer", "affine"])),
        "widths": draw(st.lists(st.sampled_from([2, 3, 4, 6, 8, 12]), min_size=1, max_size=3, unique=True)),
        "operands": draw(
            st.sampled_from([("data_in", "weight", "bias"), ("data_in", "weight"), ("weight",), ("data_in",)])
        ),
    }


def network(plan):
    """The model of a plan, in evaluation mode."""
    return SIGNATURES[plan["signature"]](plan).eval()


def samples(plan, count=90):
    """Splits of random data for the model of a plan."""
    generator = torch.Generator().manual_seed(plan["seed"])
    shape = {"vector": (FEATURES,), "image": IMAGE, "sequence": SEQUENCE}[plan["input"]]
    x = 1.5 * torch.randn(count, *shape, generator=generator)
    y = torch.randint(CLASSES, (count,), generator=generator)
    y[:CLASSES] = y[30 : 30 + CLASSES] = y[60 : 60 + CLASSES] = torch.arange(CLASSES)
    return {"train": (x[:30], y[:30]), "val": (x[30:60], y[30:60]), "test": (x[60:], y[60:])}


def choices(plan):
    """The search space of a plan: its formats at all layers with weights."""
    table = {"name": plan["format"]}
    for operand in plan["operands"]:
        table[f"{operand}_width"] = plan["widths"]
        if plan["format"] == "integer":
            table[f"{operand}_frac_width"] = "auto"
    return {"linear": table, "conv2d": table}


# --- by hand --------------------------------------------------------------------------------------------------------------


def rounded(form, x):
    """`x` in a calibrated format, as docs/formats.md defines it."""
    if hasattr(form, "frac_width"):
        step = 2.0**-form.frac_width
        low, high = (-(2 ** (form.width - 1)), 2 ** (form.width - 1) - 1) if form.signed else (0, 2**form.width - 1)
        return torch.clamp(torch.round(x / step), low, high) * step
    low, high = (-(2 ** (form.width - 1)), 2 ** (form.width - 1) - 1) if form.symmetric else (0, 2**form.width - 1)
    scale, zero = torch.tensor(form.scale), torch.tensor(form.zero_point, dtype=torch.float32)
    if scale.numel() > 1:
        shape = [1] * x.dim()
        shape[form.axis] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    else:
        scale, zero = scale.reshape(()), zero.reshape(())
    return (torch.clamp(torch.round(x / scale) + zero, low, high) - zero) * scale


def plain_weights(copied):
    """`copied` with plain parameters in place of computed weights.

    Its class is changed: a copy of another model with parametrizations would share, and break, the class of that model.
    """
    for module in copied.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            for kind in list(module._forward_pre_hooks.values()):
                if type(kind).__name__ == "WeightNorm":
                    nn.utils.remove_weight_norm(module)
                elif isinstance(kind, prune.BasePruningMethod):
                    prune.remove(module, "weight")
    return copied.eval()


@contextmanager
def _swapped(module, formats):
    kept = {}
    for operand in ("weight", "bias"):
        tensor = getattr(module, operand, None)
        if operand in formats and tensor is not None:
            kept[operand] = tensor.data
            tensor.data = rounded(formats[operand], tensor.data)
    yield
    for operand, data in kept.items():
        getattr(module, operand).data = data


class _FunctionalFormats(TorchFunctionMode):
    """Rounds the operands of ``linear`` and ``conv2d`` where they are called as functions, in the order of the calls."""

    def __init__(self, formats):
        super().__init__()
        self.formats, self.inside = iter(formats), 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.linear, F.conv2d) and not self.inside:
            chosen = next(self.formats)
            args = list(args)
            for place, operand in enumerate(("data_in", "weight", "bias")):
                if operand in chosen and place < len(args) and args[place] is not None:
                    args[place] = rounded(chosen[operand], args[place])
        return func(*args, **(kwargs or {}))


def by_hand(model, calls, functions, x):
    """The outputs of `model` under formats. The model is changed.

    Args:
        calls: path of a module → formats by operand of each of its calls, in the order of the calls.
        functions: the formats of each call of a function, in the order of the calls; None: all stay in float.
    """
    plain = plain_weights(model)
    mode = _FunctionalFormats(itertools.repeat({}) if functions is None else functions)
    leaves = {name for name, m in plain.named_modules() if type(m) in (nn.Linear, nn.Conv2d, nn.MultiheadAttention)}
    for path, formats in {**{name: [{}] for name in leaves}, **calls}.items():
        module = plain.get_submodule(path)
        counter = iter(range(1000))

        def forward(inputs, *rest, inner=module.forward, module=module, formats=formats, counter=counter, **named):
            chosen = formats[min(next(counter), len(formats) - 1)]
            given = rounded(chosen["data_in"], inputs) if "data_in" in chosen else inputs
            mode.inside += 1
            try:
                with _swapped(module, chosen):
                    return inner(given, *rest, **named)
            finally:
                mode.inside -= 1

        module.forward = forward
    with torch.no_grad(), mode:
        return plain(x.clone())
