"""Products of quantized operands, as hardware computes them: whole numbers summed exactly, then scaled.

Let x and w be two operands in formats whose values are ``(code − zero) · step``, with one step per tensor for x, and
one per tensor or per output channel j for w. Then

    y_j = float32( Σ (cx − zx) (cw − zw) ) · float32(sx · sw_j) + b_j

The sum is exact, and each of the three operations on it rounds once, in float32. So the result does not depend on the
order of summation, the batch, the number of threads or the device, and it is what integer kernels compute (Jacob et al.
2018, arXiv:1712.05877, equation 4; ONNX MatMulInteger and ConvInteger, followed by Cast, Mul and Add). If both steps
are powers of two, this is the exact sum of products of the values, rounded to float32 once, plus the bias.

Where steps differ within a sum (groups and blocks along the summed dimension, an input with a step per channel), but
are all powers of two without a zero point, values are whole multiples of the finest step, which takes their place.

An exact sum has no such form where an operand is in float, or where other steps differ within a sum. Then

    y_j = float32( Σ_k x_k w_jk in float64, in the order of k ) + b_j

where k runs over a row of the weight in the order of memory. Each product is exact in float64, and the sums have one
order, so that nothing else changes their bits. Where all sums are exact in float64, both definitions agree for steps
that are powers of two.

In training mode products are those of torch, whose float32 sums differ from these in the last bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from bitfront.formats.base import Format
from bitfront.formats.grid import LARGEST_CODE, Grid
from bitfront.operations.base import Product

#: Sums up to here are exact in float32, in any order.
EXACT = 2**24
#: Of the numbers that every unit computes with in full; some take smaller ones for 0.
SMALLEST_STEP = 2.0**-126
#: The most digits that a weight is cut into, so that sums of each digit are exact in float32.
DIGITS = 4

#: (x, weight, bias or None) → the operation's result, in the dtype of x.
Compute = Callable[[Tensor, Tensor, Tensor | None], Tensor]
#: Why the sums of a product are not whole numbers.
FLOAT = "an operand is left in float"
MIXED = "steps that differ within a sum"
NO_STEP = "a format whose values have no common step"


@dataclass(frozen=True, eq=False)
class Whole:
    """How the values of an operand are whole numbers times a step.

    Attributes:
        grid: of the values.
        coded: whether products are computed of codes, less the zero point, and scaled afterwards. Otherwise they are
            computed of the values, whose steps are powers of two.
        step: of the numbers that are multiplied with: of values; 1 for codes. A tensor has one per output channel,
            float64, shape (channels,).
        low, high: ends of the values in steps; the zero point is at 0.
    """

    grid: Grid
    coded: bool
    step: float | Tensor
    low: float
    high: float

    @property
    def smallest(self) -> float:
        """The smallest step."""
        return float(torch.as_tensor(self.grid.step).min())

    def numbers(self, x: Tensor) -> Tensor:
        """What to multiply with: the values, or whole numbers. Same shape and dtype as `x`, which is rounded."""
        return self.grid.centred(x) if self.coded else x

    def scale(self, like: Tensor) -> Tensor:
        """What a sum is multiplied by for this operand: float32, shape () or (channels,), on the device of `like`."""
        step = self.grid.step if self.coded else 1.0
        return torch.as_tensor(step, dtype=torch.float64).flatten().float().to(like.device).squeeze()


def whole(grid: Grid | None, channels: int | None = None) -> Whole | None:
    """How operands on a grid are whole numbers; None if there is no grid, or its steps differ otherwise than along the
    dimension `channels` and have no finest one."""
    if grid is None:
        return None
    step = grid.step
    powers = grid.zero is None and (_is_power(step) if not isinstance(step, Tensor) else bool(_are_powers(step)))
    if not (grid.uniform or (channels is not None and grid.axis == channels)):
        return _in_finest_steps(grid, channels) if powers else None
    low, high = _centred_end(grid.low, grid.zero, min), _centred_end(grid.high, grid.zero, max)
    if powers:
        return Whole(grid, False, step.flatten() if isinstance(step, Tensor) else step, low, high)
    # Of a grid that is not complete, only what is rounded already has codes; inputs may be rounded to codes at once.
    return Whole(grid, True, 1.0, low, high) if grid.complete or channels is not None else None


def _in_finest_steps(grid: Grid, channels: int | None) -> Whole:
    """Operands whose steps are different powers of two, as multiples of the finest one, or of that of each channel."""
    steps = torch.as_tensor(grid.step, dtype=torch.float64)
    finest = steps.min()
    if channels is not None and channels < steps.dim() and grid.block[channels] == 1:
        finest = steps.amin([d for d in range(steps.dim()) if d != channels], keepdim=True)
    low, high = (torch.as_tensor(end) * (steps / finest) for end in (grid.low, grid.high))
    step = finest.flatten() if finest.dim() else float(finest)
    return Whole(grid, False, step, float(low.min()), float(high.max()))


def _centred_end(end: int | Tensor, zero: int | Tensor | None, choose: Callable[[float, float], float]) -> float:
    ends = torch.as_tensor(end) - (0 if zero is None else torch.as_tensor(zero))
    return choose(float(ends.min()), float(ends.max()))


def _is_power(step: float) -> bool:
    return math.frexp(step)[0] == 0.5


def _are_powers(steps: Tensor) -> Tensor:
    return (torch.frexp(steps).mantissa == 0.5).all()


@dataclass(frozen=True, eq=False)
class Weight:
    """A rounded weight whose values are whole numbers times a step.

    Attributes:
        whole: how.
        numbers: what is multiplied with, float32, of the shape of the weight.
        rule: of the product.
    """

    whole: Whole
    numbers: Tensor
    rule: Product

    @classmethod
    def of(cls, form: Format, rounded: Tensor, rule: Product, flows: bool) -> Weight | None:
        """A weight that `form` has rounded; None if its values are not whole numbers (``whole``)."""
        # What a sum is must not depend on the samples, so of a weight that does only the format counts.
        grid = form.grid if flows else form.grid_of(rounded)
        known = whole(grid, rule.channels % rounded.dim())
        return None if known is None else cls(known, known.numbers(rounded), rule)

    def rows(self, numbers: Tensor) -> Tensor:
        """Numbers of the shape of the weight in steps, one row per sum: float64, shape (sums, products)."""
        step = self.whole.step
        values = numbers.detach().double()
        values = values / (self._along(step, values) if isinstance(step, Tensor) else step)
        if self.rule.matrix:
            return values.transpose(-1, -2).flatten(0, -2)
        return values.movedim(self.rule.channels, 0).flatten(1)

    def _along(self, step: Tensor, like: Tensor) -> Tensor:
        channels = self.rule.channels % like.dim()
        return step.to(like).reshape([-1 if d == channels else 1 for d in range(like.dim())])

    def most(self, x: Whole) -> float:
        """The largest absolute value that a sum can have, in steps of the product, whatever the values of the weight
        are."""
        terms = self.numbers.shape[-2] if self.rule.matrix else self.numbers[0].numel()
        return terms * max(-x.low, x.high) * max(-self.whole.low, self.whole.high)

    def longest(self, x: Whole, numbers: Tensor | None = None, *, rectified: bool = False) -> float:
        """The largest absolute value that a part of a sum can have, in steps of the product.

        Args:
            x: the input; every value of its grid may occur.
            numbers: a part of the weight, in its place.
            rectified: whether no input is negative.
        """
        rows = self.rows(self.numbers if numbers is None else numbers)
        up, down = rows.clamp(min=0).sum(dim=1), -rows.clamp(max=0).sum(dim=1)
        high, low = x.high, 0.0 if rectified else -x.low
        sums = torch.maximum(up * high + down * low, up * low + down * high)
        return float(sums.max()) if len(sums) else 0.0

    def digits(self, x: Whole) -> list[Tensor] | None:
        """The weight as a sum of a few tensors, such that the sums of each are exact in float32; None if that takes
        more than ``DIGITS`` of them."""
        step = self.whole.step
        if isinstance(step, Tensor):
            step = self._along(step, self.numbers)
        bits = math.frexp(float(self.rows(self.numbers).abs().max()))[1]
        for count in range(2, DIGITS + 1):
            width = -(-bits // count)
            parts, rest = [], self.numbers
            for k in range(count - 1, 0, -1):
                digit = step * 2.0 ** (width * k)
                parts.append(torch.round(rest / digit) * digit)
                rest = rest - parts[-1]
            parts.append(rest)
            # A digit is a multiple of 2^(width · k) steps, and so are its sums.
            sizes = [self.longest(x, p) / 2.0 ** (width * (count - 1 - i)) for i, p in enumerate(parts)]
            if max(sizes) <= EXACT:
                return parts
        return None


def scaled(sums: Tensor, scale: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    """``float32(sums) · scale + bias``, each operation rounded once; channels lie along `dim`, counted from the end."""
    shape = (-1, *[1] * (-dim - 1))
    out = sums.float()
    if scale.dim() and out.dim() >= -dim and len(scale) < out.shape[dim]:
        scale = scale.repeat(out.shape[dim] // len(scale))  # groups of channels that share the scales of a weight
    if scale.dim() or float(scale) != 1.0:
        out = out * (scale.view(shape) if scale.dim() else scale)
    return out if bias is None else out + bias.view(shape)


@dataclass(frozen=True, eq=False)
class WholeProduct:
    """How a product of whole numbers is computed: what follows from its formats and its weight, whatever the samples.

    Attributes:
        inputs: how the input is whole numbers.
        weight: the weight.
        longest: the largest absolute value that a part of a sum can have, in steps of the product; at most 2^53.
    """

    inputs: Whole
    weight: Weight
    longest: float

    @cached_property
    def scale(self) -> Tensor:
        """What the sums are multiplied by, float32, shape () or (channels,)."""
        return self.inputs.scale(self.weight.numbers) * self.weight.whole.scale(self.weight.numbers)

    @cached_property
    def digits(self) -> list[Tensor] | None:
        """What of the weight is multiplied with, one after the other; None where that takes float64."""
        return [self.weight.numbers] if self.longest <= EXACT else self.weight.digits(self.inputs)

    def sums(self, compute: Compute, x: Tensor) -> Tensor:
        """The exact sums of products.

        Args:
            compute: the operation.
            x: what to multiply with of the input (``Whole.numbers``), float32.

        Returns:
            float32 if sums need no more than 24 bits, else float64; exact in either.
        """
        if self.digits is None:
            return compute(x.double(), self.weight.numbers.double(), None)
        total = compute(x, self.digits[0], None)
        if len(self.digits) > 1:
            total = total.double()
        for digit in self.digits[1:]:
            total += compute(x, digit, None)
        return total


#: (format of the input, format of the weight) → how a product with one weight is computed, or why its sums are not of
#: whole numbers. Filled as it is asked for.
KnownProducts = dict[tuple[Format | None, Format | None], WholeProduct | str]


def product(
    rule: Product,
    compute: Compute,
    operands: tuple[Tensor, Tensor, Tensor | None],
    formats: tuple[Format | None, Format | None],
    *,
    flows: bool = False,
    module: nn.Module | None = None,
    known: KnownProducts | None = None,
) -> Tensor:
    """The result of an operation that sums products of its operands.

    Args:
        rule: of the operation.
        compute: the operation as torch computes it.
        operands: input, weight and bias, rounded to their formats.
        formats: of the input and the weight; None for float.
        flows: whether the weight depends on the samples too.
        module: the module of the operation; None for a function.
        known: what is known of products with this weight, which stays the same.

    Returns:
        As the module's docstring defines it, float32; what torch computes in training mode, without any format, for
        other dtypes than float32, and where the record has no fixed order for sums that are not whole numbers.
    """
    x, weight, bias = operands
    if formats == (None, None) or not x.dtype == weight.dtype == torch.float32:
        return compute(x, weight, bias)
    with torch.no_grad():
        exact = _exact(rule, compute, (x.detach(), weight.detach(), bias), formats, flows, module, known)
    if exact is None:
        return compute(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        plain = compute(x, weight, bias)
        return exact - (plain.detach() - plain)
    return exact


def _exact(
    rule: Product,
    compute: Compute,
    operands: tuple[Tensor, Tensor, Tensor | None],
    formats: tuple[Format | None, Format | None],
    flows: bool,
    module: nn.Module | None,
    known: KnownProducts | None,
) -> Tensor | None:
    x, weight, bias = operands
    way = known_product(rule, lambda: weight, formats, {} if known is None else known, flows)
    if not isinstance(way, str):
        return scaled(way.sums(compute, way.inputs.numbers(x)), way.scale, bias, rule.output)
    ordered = None if rule.ordered is None else rule.ordered(module, x, weight)
    return None if ordered is None else scaled(ordered, torch.ones(()), bias, rule.output)


def known_product(
    rule: Product,
    weight: Callable[[], Tensor],
    formats: tuple[Format | None, Format | None],
    known: KnownProducts,
    flows: bool = False,
) -> WholeProduct | str:
    """What ``whole_product`` says, looked up or added to what is known of products with one weight.

    Args:
        weight: gives the rounded weight.
    """
    if formats not in known:
        before = [w.weight for (_, form), w in known.items() if form == formats[1] and not isinstance(w, str)]
        known[formats] = whole_product(rule, weight(), formats, flows, before[0] if before else None)
    return known[formats]


def whole_product(
    rule: Product,
    weight: Tensor,
    formats: tuple[Format | None, Format | None],
    flows: bool = False,
    numbers: Weight | None = None,
) -> WholeProduct | str:
    """How a product of whole numbers is computed, or why its sums are not of whole numbers.

    Args:
        rule: of the operation.
        weight: rounded.
        formats: of the input and the weight; None for float.
        flows: whether the weight depends on the samples. The answer depends on its format alone then.
        numbers: the weight as whole numbers, where that is known already.
    """
    x_format, w_format = formats
    if x_format is None or w_format is None:
        return FLOAT
    inputs = whole(x_format.grid)
    numbers = Weight.of(w_format, weight, rule, flows) if numbers is None else numbers
    if inputs is None or numbers is None:
        unknown = x_format.grid is None or (w_format.grid if flows else w_format.grid_of(weight)) is None
        return NO_STEP if unknown else MIXED
    if not inputs.smallest * numbers.whole.smallest >= SMALLEST_STEP:
        return "steps whose product is smaller than the numbers of float32"
    longest = numbers.longest(inputs)
    # What a sum may be must not depend on the samples; how it is computed may, because every way is exact.
    if not (numbers.most(inputs) if flows else longest) <= LARGEST_CODE:
        return "sums of more than the 53 bits that float64 holds"
    return WholeProduct(inputs, numbers, longest)
