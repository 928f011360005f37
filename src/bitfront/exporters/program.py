"""A candidate as a program of integer operations: what hardware computes, step by step, with the range of every value.

A program takes the float inputs of a network and rounds them to whole numbers. In fixed point, every step after that
takes whole numbers and gives whole numbers: a number n of a ``Value`` stands for ``n / (2^point · divisor)``. The
divisor is 1 except behind a mean, whose sum is not divided: the next rounding does that.

Scales that are no powers of two, as affine formats have them, take two more steps, as integer kernels have them too:
``Scale`` makes float32 numbers of sums, and ``Quantize`` makes whole numbers of float32 ones. What is between them
computes in float32, one operation per number, so it has one result on every processor. ``Program.floats`` names such
values; a target without float arithmetic refuses them.

The values of a program are those of the deployed model (``transforms.quantize``), to the bit. Where a float32 of the
deployed model cannot hold a sum, the program has a step that cuts the number to 24 significant bits, as float32 does.
Ranges hold for every input: they are computed from the formats and the weights, not observed.

``lowering.py`` makes a program of a captured model and formats, ``oracle.py`` computes it, ``targets/`` write it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitfront.kernels.whole import Rounding

Int = NDArray[np.int64]
Floats = NDArray[np.float32]
Overflow = Literal["saturate", "wrap"]

#: Bits of a whole number that a float32 holds.
FLOAT_DIGITS = 24


@dataclass(frozen=True, eq=False)
class Value:
    """Numbers of one sample: n stands for ``n / (2^point · divisor)``.

    Attributes:
        name: the node of the captured graph that they come from.
        shape: of one sample.
        low, high: the smallest and the largest number at each place, of that shape; int64, or float32 of floats.
        point: bits behind the binary point; may be negative.
        divisor: 1, or of a mean the number of its values.
        scale: n stands for ``n · scale`` (float32, of a shape that broadcasts against the values), where that is no
            power of two; None elsewhere.
        floats: whether the numbers are float32, and stand for themselves.
    """

    name: str
    shape: tuple[int, ...]
    low: NDArray[Any] = field(repr=False)
    high: NDArray[Any] = field(repr=False)
    point: int = 0
    divisor: int = 1
    scale: Floats | None = field(default=None, repr=False)
    floats: bool = False

    @property
    def signed(self) -> bool:
        """Whether a number can be negative."""
        return bool((self.low < 0).any())

    @property
    def whole(self) -> bool:
        """Whether it is in fixed point: whole numbers that no float scales."""
        return not self.floats and self.scale is None

    @property
    def bits(self) -> int:
        """Bits that hold every number, with the sign where there is one: the width of the accumulator; at least 1. A
        float has 32."""
        if self.floats:
            return 32
        return max(1, width(int(self.low.min(initial=0)), int(self.high.max(initial=0))))


def width(low: int, high: int) -> int:
    """Bits of two's complement for all numbers from `low` to `high`; unsigned where `low` is not negative."""
    return high.bit_length() if low >= 0 else 1 + max(max(high, 0).bit_length(), (-low - 1).bit_length())


@dataclass(frozen=True, eq=False)
class Window:
    """How a kernel slides over the last dimensions of a sample: a number per dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    dilation: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Step:
    """One operation.

    Attributes:
        sources: numbers of the values that it takes, in ``Program.values``; a rounding without one takes the input of
            the network.
    """

    sources: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Round(Step):
    """Rounds each value to a grid: ``clamp(round(x · 2^points), low, high) · 2^(point − points)``.

    Attributes:
        points: bits behind the binary point, at each place; int64, of the shape of a sample.
        low, high: the ends of the grid at each place, in its steps.
        rounding: half to even, half up, or down.
        overflow: what is beyond the ends is cut to them, or wraps around as in two's complement.
        point: of the result; no less than any of `points` that has more than the value 0.
        places: without a source, which value of the flattened input comes here, int64 of the shape of a sample; None:
            they are in the order of the input.
    """

    points: Int
    low: Int
    high: Int
    rounding: Rounding
    overflow: Overflow
    point: int
    places: Int | None = None


@dataclass(frozen=True, eq=False)
class Quantize(Step):
    """Rounds float32 numbers to a grid: ``clamp(round(x / step) + zero, low, high) − zero``, half to even.

    Attributes:
        step: float32; zero, low, high: int64; each of a shape that broadcasts against a sample.
        places: as of ``Round``.
    """

    step: Floats
    zero: Int
    low: Int
    high: Int
    places: Int | None = None


@dataclass(frozen=True, eq=False)
class Scale(Step):
    """``float32(x) / divisor · scale + bias``, each operation rounded to float32; no sum without a bias.

    Attributes:
        scale, bias: float32, of a shape that broadcasts against a sample.
        divisor: of the source.
    """

    scale: Floats
    bias: Floats | None = None
    divisor: int = 1


@dataclass(frozen=True, eq=False)
class Product(Step):
    """Sums of products with a constant weight: a linear layer, or a convolution where there is a window.

    Attributes:
        weight: int64, shape (out, in), or (out, in / groups, *kernel).
        weight_point: its bits behind the binary point.
        window: of a convolution; None: the last dimension of a sample is summed.
        groups: of a convolution.
    """

    weight: Int
    weight_point: int
    window: Window | None = None
    groups: int = 1


@dataclass(frozen=True, eq=False)
class Offset(Step):
    """Adds a constant: ``(x << shift) + constant``.

    Attributes:
        constant: int64, of a shape that broadcasts against a sample.
    """

    constant: Int
    shift: int = 0


@dataclass(frozen=True, eq=False)
class Cut(Step):
    """Keeps the leading `digits` bits of each number, rounded half to even, as a float of so many bits does."""

    digits: int = FLOAT_DIGITS


@dataclass(frozen=True, eq=False)
class Limit(Step):
    """``min(max(x << shift, low), high)``: a ReLU, with an upper end or without.

    Attributes:
        low, high: in steps of the result; None where there is no end.
    """

    low: float | None
    high: float | None
    shift: int = 0


@dataclass(frozen=True, eq=False)
class Leak(Step):
    """``x << shift`` where x is not negative, ``x · slope`` elsewhere; the slope is not negative."""

    slope: float
    shift: int


@dataclass(frozen=True, eq=False)
class Add(Step):
    """Σ ``sign · (x << shift)`` of values of one shape.

    Attributes:
        shifts, signs: of each source; a sign is 1 or −1.
    """

    shifts: tuple[int, ...]
    signs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Join(Step):
    """Values joined along a dimension of a sample, each ``x << shift``.

    Attributes:
        shifts: of each source.
        dim: counted from the first dimension of a sample.
    """

    shifts: tuple[int, ...]
    dim: int


@dataclass(frozen=True, eq=False)
class Pool(Step):
    """The largest value, or the sum, of each window of each channel. Padding counts as 0 in a sum, and not in a
    maximum."""

    kind: Literal["largest", "sum"]
    window: Window


@dataclass(frozen=True, eq=False)
class Move(Step):
    """The same numbers at other places: a flatten, a permutation, a part, a padding.

    Attributes:
        places: int64, of the shape of the result: which number of the flattened sample comes here; −1: 0.
    """

    places: Int

    @property
    def reshapes(self) -> bool:
        """Whether the result is the source, or its first numbers, in their order, so that nothing moves in memory."""
        return bool((self.places.ravel() == np.arange(self.places.size)).all())


@dataclass(frozen=True, eq=False)
class Program:
    """A candidate as integer operations.

    Attributes:
        input_shape: of one sample, float32.
        steps: in an order in which each finds what it needs.
        values: what each step gives, in the same order.
        output: the number of the value that is the output of the network.
        notes: what a reader of the program should know.
    """

    input_shape: tuple[int, ...]
    steps: tuple[Step, ...]
    values: tuple[Value, ...]
    output: int
    notes: tuple[str, ...] = ()

    @property
    def result(self) -> Value:
        """The output of the network."""
        return self.values[self.output]

    @property
    def widest(self) -> int:
        """Bits of the widest accumulator."""
        return max(value.bits for value in self.values if not value.floats)

    @property
    def floats(self) -> tuple[str, ...]:
        """The names of the nodes whose values are float32 numbers."""
        return tuple(dict.fromkeys(value.name for value in self.values if value.floats))
