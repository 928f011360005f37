"""The step with learned bits once more, for torch's autograd: float64, after the formulas alone.

Only rounding half to even has a derivative that is written by hand: it passes gradients straight through. All others
follow. Nothing of the package is used here.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F


class Nearest(torch.autograd.Function):
    """Half to even, straight through."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


nearest = Nearest.apply


@dataclass
class Values:
    """The parameters of a layer: float64 leaves. Bits have the shapes that spread over their values.

    Attributes:
        weight, bias: as in the layer; `bias` may be None.
        weight_bits, bias_bits: fractional bits.
        fractions, integers: fractional and integer bits of the input.
        supported: operand -> the supported widths without signs; what is missing may have any.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    weight_bits: torch.Tensor
    bias_bits: torch.Tensor | None
    fractions: torch.Tensor
    integers: torch.Tensor
    supported: dict = field(default_factory=dict)

    def leaves(self):
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}


def through(x, value):
    """`value`, with the derivative of `x`."""
    return x + (value - x).detach()


def next_width(lengths, widths):
    """The supported width at or above each length, else the largest; without any, the length."""
    if not widths:
        return lengths.detach()
    each = [min((w for w in widths if w >= n), default=max(widths)) for n in lengths.detach().reshape(-1).tolist()]
    return torch.tensor(each).double().reshape(lengths.shape)


def pressed(lengths, widths):
    """Whether fewer bits would cost less."""
    return lengths.detach() > min(widths, default=0)


def on_grid(x, fractions, widths=()):
    """Multiples of 2^-f. The derivative by f is ln 2 (x - q) by the rules of powers and products."""
    f = nearest(fractions)
    whole = nearest(x * 2.0**f)
    if not widths:
        return whole / 2.0**f
    most = shared_lengths(x, fractions, widths)
    width = next_width(most, widths)
    f = through(f, f + (width - most))
    whole = nearest(x * 2.0**f)
    return through(whole, torch.minimum(torch.maximum(whole, 1 - 2.0**width), 2.0**width - 1)) / 2.0**f


def shared_lengths(x, fractions, widths):
    """Bits of the longest of the values that share theirs, in the shape of `fractions`. With supported widths negative
    for values below the grid."""
    x, f = x.detach(), nearest(fractions).detach()
    whole = nearest(x * 2.0**f)
    widest = lengths(whole, 0 * f)
    if widths:
        below = torch.floor(torch.log2(x.abs())).clamp(min=-200) + 1 + f
        widest = torch.where(whole == 0, below.clamp(-40, 0), widest)
    for axis, size in enumerate(fractions.shape):
        if size == 1:
            widest = widest.amax(axis, keepdim=True)
    return widest


def activation(x, fractions, integers, signed, widths=()):
    """x between its ends, then on its grid; a value beyond them is the end."""
    f, i = nearest(fractions), nearest(integers)
    if widths:
        f = through(f, next_width((f + i).clamp(min=0), widths) - i)
    top = 2.0**i - 2.0**-f
    top = top + (top.clamp(min=0) - top).detach()
    top = top.expand(x.shape)
    inside = torch.where(x > top, top, x)
    inside = torch.where(x < -top, -top, inside) if signed else torch.where(x <= 0, 0.0 * x.detach(), inside)
    return nearest(inside * 2.0**f) / 2.0**f


def lengths(q, fractions):
    """Bits of the magnitudes of what is on a grid; not differentiable."""
    codes = (q * 2.0 ** nearest(fractions)).detach().round().abs().long()
    return torch.tensor([int(code).bit_length() for code in codes.reshape(-1)]).reshape(codes.shape).double()


def weight_widths(x, q, fractions, widths=()):
    """(bits of each weight, those that its group stores): the most among those that share them, one more with each
    fractional bit. A value 0 has none, and is stored like the others of its group."""
    f = nearest(fractions)
    learned = shared_lengths(x, fractions, widths)
    width = next_width(learned, widths)
    width = torch.where(pressed(learned, widths), width + (f - f.detach()), width).expand(q.shape)
    some = q != 0
    for axis, size in enumerate(fractions.shape):
        if size == 1:
            some = some.any(axis, keepdim=True)
    zero = torch.zeros_like(q)
    return torch.where(q != 0, width, zero.detach()), torch.where(some.expand(q.shape), width, zero.detach())


def input_widths(fractions, integers, shape, widths=()):
    learned = (nearest(fractions) + nearest(integers)).clamp(min=0)
    width = next_width(learned, widths)
    return torch.where(pressed(learned, widths), through(learned, width), width).expand(shape)


class Reference:
    """A network whose layers are rounded; what is between them is called as it is.

    Args:
        model: its layers are called with the values of `values`.
        values: path of a layer → its parameters.
        signed: path → whether its input may be negative.
        costs: (per product of bits, per bit of a weight, per bit of a bias).
    """

    def __init__(self, model, values, signed, costs):
        self.model, self.values, self.signed, self.costs = model, values, signed, costs
        self.cost = torch.zeros((), dtype=torch.float64)

    def layer(self, path, x):
        module, v = self.model.get_submodule(path), self.values[path]
        pairs, stored, biases = self.costs
        of_weight, of_data, of_bias = (v.supported.get(o, ()) for o in ("weight", "data_in", "bias"))
        q = on_grid(v.weight, v.weight_bits, of_weight)
        b = None if v.bias is None else on_grid(v.bias, v.bias_bits, of_bias)
        bits, kept = weight_widths(v.weight, q, v.weight_bits, of_weight)
        data = input_widths(v.fractions, v.integers, x.shape[1:], of_data)[None]
        x = activation(x, v.fractions, v.integers, self.signed[path], of_data)
        if isinstance(module, nn.Conv2d):
            how = {"stride": module.stride, "padding": module.padding, "groups": module.groups}
            out, products = F.conv2d(x, q, b, **how), F.conv2d(data, bits, **how).sum()
        else:
            out, products = F.linear(x, q, b), F.linear(data, bits).sum()
        self.cost = self.cost + pairs * products + stored * kept.sum()
        if b is not None:
            widths, _ = weight_widths(v.bias, b, v.bias_bits, of_bias)
            if of_bias:  # a zero is stored like the others
                widths = torch.where(b != 0, widths, next_width(lengths(b, v.bias_bits), of_bias))
            # Once where it is stored; once per output where products cost.
            times = out[0, 0].numel() if pairs else 1
            self.cost = self.cost + times * biases * widths.sum()
        return out

    def loss(self, forward, x, targets, pressure):
        """Cross entropy with `targets` (probabilities), with the pressure on the cost.

        Args:
            forward: (this, x) → logits.
        """
        self.cost = torch.zeros((), dtype=torch.float64)
        logits = forward(self, x)
        return -(targets * F.log_softmax(logits, 1)).sum(1).mean() + pressure * self.cost
