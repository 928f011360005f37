"""The step with learned bits once more, for torch's autograd: float64, after the formulas alone.

Only rounding half to even has a derivative that is written by hand: it passes gradients straight through. All others
follow. Nothing of the package is used here.
"""

from dataclasses import dataclass

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
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    weight_bits: torch.Tensor
    bias_bits: torch.Tensor | None
    fractions: torch.Tensor
    integers: torch.Tensor

    def leaves(self):
        return {name: value for name, value in vars(self).items() if value is not None}


def on_grid(x, fractions):
    """Multiples of 2^-f. The derivative by f is ln 2 (x - q) by the rules of powers and products."""
    scale = 2.0 ** nearest(fractions)
    return nearest(x * scale) / scale


def activation(x, fractions, integers, signed):
    """x between its ends, then on its grid; a value beyond them is the end."""
    f, i = nearest(fractions), nearest(integers)
    top = 2.0**i - 2.0**-f
    top = top + (top.clamp(min=0) - top).detach()
    top = top.expand(x.shape)
    inside = torch.where(x > top, top, x)
    inside = torch.where(x < -top, -top, inside) if signed else torch.where(x <= 0, 0.0 * x.detach(), inside)
    return on_grid(inside, fractions)


def lengths(q, fractions):
    """Bits of the magnitudes of what is on a grid; not differentiable."""
    codes = (q * 2.0 ** nearest(fractions)).detach().round().abs().long()
    return torch.tensor([int(code).bit_length() for code in codes.reshape(-1)]).reshape(codes.shape).double()


def weight_widths(q, fractions):
    """Bits of each weight: the most among those that share them, 0 for the value 0; one more with each fractional bit."""
    widest = lengths(q, fractions)
    for axis, size in enumerate(fractions.shape):
        if size == 1:
            widest = widest.amax(axis, keepdim=True).expand(widest.shape)
    f = nearest(fractions)
    return torch.where(q != 0, widest + (f - f.detach()), torch.zeros_like(widest))


def input_widths(fractions, integers, shape):
    width = nearest(fractions) + nearest(integers)
    return torch.where(width > 0, width, 0.0 * width.detach()).expand(shape)


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
        q = on_grid(v.weight, v.weight_bits)
        b = None if v.bias is None else on_grid(v.bias, v.bias_bits)
        bits = weight_widths(q, v.weight_bits)
        data = input_widths(v.fractions, v.integers, x.shape[1:])[None]
        x = activation(x, v.fractions, v.integers, self.signed[path])
        if isinstance(module, nn.Conv2d):
            how = {"stride": module.stride, "padding": module.padding, "groups": module.groups}
            out, products = F.conv2d(x, q, b, **how), F.conv2d(data, bits, **how).sum()
        else:
            out, products = F.linear(x, q, b), F.linear(data, bits).sum()
        self.cost = self.cost + pairs * products + stored * bits.sum()
        if b is not None:
            f = nearest(v.bias_bits)
            widths = lengths(b, v.bias_bits) + f - f.detach()
            # Once where it is stored; once per output where products cost.
            times = out[0, 0].numel() if pairs else 1
            self.cost = self.cost + times * biases * torch.where(b != 0, widths, torch.zeros_like(widths)).sum()
        return out

    def loss(self, forward, x, targets, pressure):
        """Cross entropy with `targets` (probabilities), with the pressure on the cost.

        Args:
            forward: (this, x) → logits.
        """
        self.cost = torch.zeros((), dtype=torch.float64)
        logits = forward(self, x)
        return -(targets * F.log_softmax(logits, 1)).sum(1).mean() + pressure * self.cost
