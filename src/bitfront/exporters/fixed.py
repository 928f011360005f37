"""Types of fixed-point numbers, and how an integer program's constants and windows look in a QONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront.exporters.program import FLOAT_DIGITS, Int, Move, Offset, Program, Round, Value, width


@dataclass(frozen=True)
class Fixed:
    """A type of fixed-point numbers: `bits` of them, with the sign, of which `point` are behind the binary point."""

    bits: int
    point: int
    signed: bool

    @classmethod
    def of(cls, value: Value) -> Fixed:
        """The narrowest type that holds every number of a value in fixed point."""
        return cls(value.bits, value.point, value.signed)

    @property
    def whole(self) -> int:
        """Bits before the binary point, with the sign."""
        return self.bits - self.point

    def wider(self, whole: int) -> Fixed:
        """With at least so many bits before the binary point."""
        return Fixed(max(self.whole, whole) + self.point, self.point, self.signed)

    def beside(self, other: Fixed) -> Fixed:
        """The narrowest type that holds the numbers of both."""
        signed = self.signed or other.signed
        whole = max(t.whole + (signed and not t.signed) for t in (self, other))
        point = max(self.point, other.point)
        return Fixed(max(whole + point, 1), point, signed)


def input_type(program: Program) -> tuple[Fixed, bool]:
    """(a type of the network's input that changes no result, whether it rounds: it is the grid to which the input is
    rounded then, half to even).

    Where the input is rounded to several grids, it has so many bits behind the binary point that every float32 lies on
    the same side of each half as before.
    """
    rounds = [step for step in program.steps if isinstance(step, Round) and not step.sources]
    ends = [np.ldexp(end.astype(np.float64), -step.points) for step in rounds for end in (step.low, step.high)]
    points = np.concatenate([step.points.ravel() for step in rounds])
    finest, low, high = int(points.max()), min(e.min() for e in ends), max(e.max() for e in ends)
    codes = [int(np.ldexp(end, finest)) for end in (low, high)]
    grid = Fixed(max(width(*codes), 2 if low < 0 else 1), finest, bool(low < 0))
    if (points == finest).all() and all(step.rounding == "even" for step in rounds):
        return grid, True
    bits = grid.bits + (0 if grid.signed else 1)  # it has a sign, whether the grid has one or not
    return Fixed(bits + FLOAT_DIGITS + 1, finest + FLOAT_DIGITS + 1, True), False


def placed(numbers: NDArray[Any], channels_last: bool) -> NDArray[Any]:
    """Numbers of one sample as they lie in a tensor: (channels, *places) → (height, width, channels), if that is asked
    for and there are places."""
    if not channels_last or numbers.ndim < 2:
        return numbers
    image = numbers[:, None] if numbers.ndim == 2 else numbers
    return np.moveaxis(image, 0, -1)


def types_of(program: Program) -> list[Fixed]:
    """The type of each value, with enough bits before the binary point for the roundings that take it: the emulation of
    ``ap_fixed`` cannot round where all bits of a number lie behind those that are kept."""
    types = [Fixed.of(value) for value in program.values]
    for number in reversed(range(len(types))):
        step = program.steps[number]
        for source in step.sources:
            if isinstance(step, Round):
                types[source] = types[source].wider(1 - int(step.points.min()))
            elif isinstance(step, Move):
                # hls4ml takes a reshaped value to be the value itself.
                types[source] = types[source].wider(types[number].whole)
    return types


def offset_of(program: Program, number: int) -> int | None:
    """The number of the offset that is added to a value; None if the value is also used without it, or has none."""
    users = [i for i, step in enumerate(program.steps) if number in step.sources]
    if len(users) != 1 or number == program.output or not isinstance(program.steps[users[0]], Offset):
        return None
    return users[0]


def step_of(point: int) -> np.float32:
    """The step of a grid with so many bits behind the binary point."""
    return np.float32(np.ldexp(1.0, -point))


def as_one(entries: NDArray[Any]) -> NDArray[Any]:
    """Entries as a scalar, if all are the same."""
    return entries.ravel()[0].reshape(()) if (entries == entries.ravel()[0]).all() else entries


def ends_of(step: Round) -> tuple[int, bool, bool] | None:
    """(bits, signed, narrow) of a Quant node that has the ends of a rounding; None if none has them."""
    if any(entries.size == 0 or (entries != entries.ravel()[0]).any() for entries in (step.low, step.high)):
        return None
    low, high = int(step.low.ravel()[0]), int(step.high.ravel()[0])
    bits = width(low, high)
    if low == 0:
        return (bits, False, False) if bits and high == 2**bits - 1 else None
    # A signed Quant of one bit has the values −1 and 1.
    if bits < 2 or high != 2 ** (bits - 1) - 1 or low not in (-high, -high - 1):
        return None
    return bits, True, low == -high


def ungrouped(weight: Int, groups: int) -> Int:
    """The weight of a convolution in groups as that of one without, with zeros between the groups."""
    outputs, inputs = len(weight) // groups, weight.shape[1]
    whole = np.zeros((len(weight), groups * inputs, *weight.shape[2:]), np.int64)
    for g in range(groups):
        rows = slice(g * outputs, (g + 1) * outputs)
        whole[rows, g * inputs : (g + 1) * inputs] = weight[rows]
    return whole


def as_image(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of windows over a sequence, for an image of height 1."""
    before = {"kernel_shape": 1, "strides": 1, "dilations": 1}
    result = {k: [before[k], *v] if k in before else v for k, v in attributes.items()}
    first, second = attributes["pads"]
    return {**result, "pads": [0, first, 0, second]}
