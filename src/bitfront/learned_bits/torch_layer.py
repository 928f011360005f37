"""A layer whose bits are learned, in torch: its rounded operands with their gradients, and what its bits cost.

The formulas are those of the compiled steps (``kernels/bits.h``): straight through for values, and
d q / d f = ln 2 (x - q) for fractional bits (Sun et al. 2024, arXiv:2405.00645).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor

from bitfront.kernels.bits import MOST_BITS
from bitfront.kernels.whole import Rounding
from bitfront.kernels.whole import whole as to_whole
from bitfront.learned_bits.program import Layer
from bitfront.learned_bits.state import Cost, Places
from bitfront.learned_bits.torch_program import TorchLayer
from bitfront.operations.base import Rounds
from bitfront.strategies.learned_bits import Granularity

LN2 = math.log(2.0)


class _Whole(torch.autograd.Function):
    """Numbers of bits, half to even and within ± MOST_BITS; gradients pass straight through."""

    @staticmethod
    def forward(ctx: Any, bits: Tensor) -> Tensor:  # noqa: ARG004
        return bits.round().clamp(-MOST_BITS, MOST_BITS)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return gradient


class _RoundParameter(torch.autograd.Function):
    """Multiples of 2^-f, half to even, up to a magnitude of most · 2^-f. The derivative by f is ln 2 (w - q)."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, f: Tensor, most: Tensor) -> Tensor:
        codes = (w * power_of_two(f)).round()
        q = torch.minimum(torch.maximum(codes, -most), most) * power_of_two(-f)
        ctx.save_for_backward(w - q)
        ctx.shape = f.shape
        return q

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (rest,) = ctx.saved_tensors
        return gradient, (LN2 * rest * gradient).sum_to_size(ctx.shape), None


class _RoundInput(torch.autograd.Function):
    """Multiples of 2^-f up to 2^i - 2^-f, which is high · 2^-f, and down to its negative if signed, otherwise to 0.

    A value beyond them is the end, and gives its gradient to the end: ln 2 2^-f to f and ln 2 2^i to i.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor, i: Tensor, high: Tensor, signed: bool, rounding: Rounding) -> Tensor:
        low = -high if signed else torch.zeros_like(high)
        q = torch.minimum(torch.maximum(to_whole(x * power_of_two(f), rounding), low), high) * power_of_two(-f)
        ctx.save_for_backward(x, q, f, i, high)
        ctx.signed = signed
        return q

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, q, f, i, high = ctx.saved_tensors
        step = power_of_two(-f)
        most = high * step
        over, under = x > most, x < -most if ctx.signed else x <= 0
        edge = torch.where(over, gradient, -gradient if ctx.signed else torch.zeros_like(gradient))
        outside = over | under
        nothing = torch.zeros_like(gradient)
        of_f = LN2 * torch.where(outside, edge * step, gradient * (x - q))
        of_i = LN2 * torch.where(outside, edge * power_of_two(i), nothing)
        down = torch.where(outside, nothing, gradient)
        return down, of_f.sum_to_size(f.shape), of_i.sum_to_size(i.shape), None, None, None


def whole(bits: Tensor) -> Tensor:
    """Learned numbers of bits as whole numbers."""
    return cast(Tensor, _Whole.apply(bits))  # type: ignore[no-untyped-call]


@dataclass(frozen=True, eq=False)
class Bits:
    """Numbers of bits of values that spread over a tensor, as whole numbers in float32.

    Attributes:
        fractions: fractional bits, with gradients.
        width: bits without a sign; it has gradients where fewer would cost less.
        most: the largest magnitude, as a multiple of 2^-fractions; infinite if there is none.
    """

    fractions: Tensor
    width: Tensor
    most: Tensor


def parameter_bits(w: Tensor, fractions: Tensor, widths: int) -> Bits:
    """Bits of a weight or bias: those that it needs, or the supported ones in their place.

    Args:
        w: the parameter; its gradients are not used.
        fractions: learned fractional bits, whole numbers that spread over its shape.
        widths: the supported ones (``widths.magnitudes``); 0: any.
    """
    with torch.no_grad():
        codes = (w * power_of_two(fractions)).round()
        lengths = torch.frexp(codes).exponent.float()
        if widths:
            least = torch.full_like(lengths, -2 * MOST_BITS)
            # A value below its grid: more fractional bits bring it back.
            below = (fractions + torch.frexp(w).exponent).clamp(-2 * MOST_BITS, 0)
            lengths = torch.where(codes != 0, lengths, torch.where(w != 0, below, least))
        shared = [axis for axis, size in enumerate(fractions.shape) if size == 1 and lengths.shape[axis] > 1]
        lengths = lengths.amax(shared, keepdim=True) if shared else lengths
        chosen, shrinks = supported(lengths, widths)
        moved = (fractions + chosen - lengths).clamp(-MOST_BITS, MOST_BITS) - fractions
        most = power_of_two(chosen) - 1 if widths else torch.full_like(lengths, math.inf)
    change = fractions - fractions.detach()
    return Bits(fractions + moved if widths else fractions, chosen + change * shrinks, most)


def input_bits(fractions: Tensor, integers: Tensor, widths: int) -> Bits:
    """Bits of an input: learned ones, or the supported ones in their place. Arguments as in ``parameter_bits``."""
    with torch.no_grad():
        learned = (fractions + integers).clamp(0, MOST_BITS)
        chosen, shrinks = supported(learned, widths)
        moved = (chosen - integers).clamp(-MOST_BITS, MOST_BITS) - fractions
    change = (fractions - fractions.detach()) + (integers - integers.detach())
    width = torch.where(chosen > 0, chosen + change * shrinks, 0.0)
    return Bits(fractions + moved if widths else fractions, width, power_of_two(chosen) - 1)


def supported(lengths: Tensor, widths: int) -> tuple[Tensor, Tensor]:
    """(the supported width at or above each length, else the largest; whether fewer bits can cost less)."""
    if not widths:
        return lengths, torch.ones_like(lengths)
    each = torch.tensor([float(k) for k in range(widths.bit_length()) if widths >> k & 1], device=lengths.device)
    places = torch.searchsorted(each, lengths.contiguous()).clamp(max=len(each) - 1)
    return each[places], (lengths > each[0]).to(lengths.dtype)


def round_parameter(w: Tensor, bits: Bits) -> Tensor:
    """A weight or bias, rounded."""
    return cast(Tensor, _RoundParameter.apply(w, bits.fractions, bits.most))  # type: ignore[no-untyped-call]


def round_input(x: Tensor, bits: Bits, integers: Tensor, signed: bool, rounding: Rounding = "even") -> Tensor:
    """An input, rounded, of these integer bits, whole numbers that spread over the shape of a sample."""
    given = x, bits.fractions, integers, bits.most, signed, rounding
    return cast(Tensor, _RoundInput.apply(*given))  # type: ignore[no-untyped-call]


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent of whole numbers in float32, exact on every device."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


class RoundedLayer:
    """A layer whose bits are learned, on the device: its parameters, and its rounded operands of the coming calls."""

    def __init__(self, layer: TorchLayer) -> None:
        self.layer, self.module, shared = layer, layer.module, layer.shared
        self.weight_shape = _spread(shared.weight, layer.weight_shape, layer.output_axis)
        self.data_shape = _spread(shared.data_in, layer.source, layer.input_axis)
        self.leaves: dict[str, Tensor] = {}
        self.slots: Tensor | None = None
        #: Rounded weight and bias, the bits behind all operands, and the integer bits of the input, with gradients.
        self.now: dict[str, Tensor] = {}
        self.bits: dict[str, Bits] = {}
        self.integers = torch.zeros(0)
        self.rounds: dict[str, Rounds] = {"data_in": _Data(self), "weight": _Parameter(self, "weight")}
        if layer.bias:
            self.rounds["bias"] = _Parameter(self, "bias")

    def load(self, places: Places, slots: Tensor | None, leaf: Callable[[slice], Tensor]) -> None:
        """Take over parameters.

        Args:
            places: where they are.
            slots: the places of the live weights; None if all are.
            leaf: gives the parameters of a place.
        """
        self.slots = slots
        self.leaves = {f.name: leaf(getattr(places, f.name)) for f in fields(places)}

    def prepare(self) -> None:
        """Round weight and bias."""
        leaves, layer = self.leaves, self.layer
        weight = self._spread_out(leaves["weight"], layer.weight_shape)
        each = layer.shared.weight == "element"
        learned = self._spread_out(leaves["weight_bits"], self.weight_shape) if each else leaves["weight_bits"]
        fractions, self.integers = (whole(leaves[name]).view(self.data_shape) for name in ("fractions", "integers"))
        self.bits = {
            "data_in": input_bits(fractions, self.integers, layer.magnitudes["data_in"]),
            "weight": parameter_bits(weight, whole(learned).view(self.weight_shape), layer.magnitudes["weight"]),
        }
        self.now = {"weight": round_parameter(weight, self.bits["weight"])}
        if layer.bias:
            self.bits["bias"] = parameter_bits(leaves["bias"], whole(leaves["bias_bits"]), layer.magnitudes["bias"])
            self.now["bias"] = round_parameter(leaves["bias"], self.bits["bias"])

    def _spread_out(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Values of live weights as a tensor of all weights, zero elsewhere."""
        if self.slots is None:
            return values.view(shape)
        nothing = torch.zeros(math.prod(shape), device=values.device)
        return nothing.index_copy(0, self.slots, values).view(shape)

    def data(self, x: Tensor) -> Tensor:
        """An input, rounded."""
        layer = self.layer
        return round_input(x, self.bits["data_in"], self.integers, layer.signed, layer.shared.data_in_rounding)

    def cost(self, cost: Cost) -> Tensor:
        """What its bits cost, with the derivatives that the pressure has: those of a bit more."""
        layer, alive, width = self.layer, self.now["weight"] != 0, self.bits["weight"].width
        # Zeros among weights that share bits are stored like the others.
        shared = [axis for axis, size in enumerate(width.shape) if size < alive.shape[axis]]
        stored = alive.any(shared, keepdim=True) if shared else alive
        total = cost.stored * layer.sharing * torch.where(stored, width, 0.0).sum()
        if cost.pairs:
            data = self.bits["data_in"].width.expand(layer.source)[None]
            total = total + cost.pairs * layer.applied(data, torch.where(alive, width, 0.0), self.module).sum()
        if layer.bias and cost.biases:
            # A zero is stored like the others, and nothing presses on it.
            bits = self.bits["bias"].width
            bits = torch.where(self.now["bias"] != 0, bits, bits.detach())
            total = total + cost.biases * uses_of_bias(layer, cost) * bits.sum()
        return total


def _spread(granularity: Granularity, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The shape in which learned bits spread over values of `shape`, whose channels are along `axis`."""
    if granularity == "element":
        return shape
    return tuple(size if granularity == "channel" and i == axis else 1 for i, size in enumerate(shape))


class _Data:
    """Rounds the input of a layer."""

    def __init__(self, rounded: RoundedLayer) -> None:
        self.rounded = rounded

    def quantize(self, x: Tensor) -> Tensor:
        """`x` with the bits of the layer."""
        return self.rounded.data(x)


class _Parameter:
    """Gives the rounded weight or bias of a layer, whatever the module holds."""

    def __init__(self, rounded: RoundedLayer, name: str) -> None:
        self.rounded, self.name = rounded, name

    def quantize(self, _: Tensor) -> Tensor:
        """The parameter with its bits."""
        return self.rounded.now[self.name]


def uses_of_bias(layer: Layer, cost: Cost) -> int:
    """Once where it is stored; once per output that it is added to where products cost."""
    return math.prod(layer.target) // layer.outputs if cost.pairs > 0 else 1
