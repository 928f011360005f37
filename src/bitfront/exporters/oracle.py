"""What an integer program computes, in NumPy: the judge of every target.

Every value is int64. Sums of products are computed in float64 where they are below 2^53, which is exact and many times
as fast, and in int64 elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from bitfront.errors import ExportError
from bitfront.exporters.program import (
    Add,
    Cut,
    Floats,
    Int,
    Join,
    Leak,
    Limit,
    Move,
    Offset,
    Overflow,
    Pool,
    Product,
    Program,
    Quantize,
    Round,
    Scale,
    Step,
    Value,
    Window,
)
from bitfront.kernels.whole import Rounding

#: float64 holds all whole numbers below this one.
EXACT = 2**53
#: Below every number of a program.
_LEAST = np.iinfo(np.int64).min
#: Samples that are computed at a time.
CHUNK = 1024


def run(program: Program, x: Floats, chunk: int = CHUNK) -> Int:
    """The output of a program.

    Args:
        program: the program.
        x: float32, shape (samples, ``*program.input_shape``); finite.
        chunk: samples that are computed at a time.

    Returns:
        int64, or float32 where the program ends in floats; shape (samples, ``*program.result.shape``).

    Raises:
        ExportError: an input is not finite.
    """
    parts = [every_value(program, x[at : at + chunk])[program.output] for at in range(0, len(x), chunk)]
    return np.concatenate(parts) if parts else np.zeros((0, *program.result.shape), np.int64)


def every_value(program: Program, x: Floats) -> list[Int]:
    """What every step of a program gives, each of shape (samples, *value.shape). Arguments and errors as of ``run``."""
    if not np.isfinite(x).all():
        raise ExportError("an input is infinite or not a number, and an integer program has no such values")
    values: list[Int] = []
    for step in program.steps:
        if isinstance(step, Round | Quantize) and not step.sources:
            values.append(rounded_input(step, x))
        else:
            sources = [program.values[number] for number in step.sources]
            values.append(apply(step, [values[number] for number in step.sources], sources))
    return values


def as_floats(value: Value, numbers: NDArray[Any]) -> Floats:
    """The numbers of a value as the deployed model has them, float32."""
    if value.floats:
        return numbers
    if value.scale is not None:
        scaled: Floats = numbers.astype(np.float32) * value.scale
        return scaled
    divided: Floats = numbers.astype(np.float32) / np.float32(value.divisor)
    result: Floats = np.ldexp(divided, -value.point)
    return result


@singledispatch
def apply(step: Step, given: Sequence[Int], sources: Sequence[Value]) -> Int:  # noqa: ARG001
    """What a step gives.

    Args:
        step: the step.
        given: the numbers of its sources, int64, each of shape (samples, *shape).
        sources: what they are.

    Returns:
        int64, shape (samples, *shape).
    """
    raise TypeError(f"there is no rule for {type(step).__name__}")


def divided(numerator: Int, divisor: Int | int, rounding: Rounding) -> Int:
    """`numerator` / `divisor` as a whole number; the divisor is positive."""
    below = np.floor_divide(numerator, divisor)
    if rounding == "floor":
        return below
    twice = 2 * (numerator - below * divisor)
    up = twice > divisor if rounding == "even" else twice >= divisor
    if rounding == "even":
        up = up | ((twice == divisor) & (below % 2 != 0))
    return below + up


def fitted(codes: Int, low: Int, high: Int, overflow: Overflow) -> Int:
    """Codes within the ends of a grid."""
    if overflow == "wrap":
        return low + (codes - low) % (high - low + 1)
    return np.clip(codes, low, high)


def rounded_input(step: Round | Quantize, x: Floats) -> Int:
    """The input of a network, float32 of shape (samples, *shape), as the numbers of a rounding."""
    x = x if step.places is None else x.reshape(len(x), -1)[:, step.places]
    if isinstance(step, Quantize):
        return quantized(step, x)
    scaled = np.ldexp(x.astype(np.float64), step.points.astype(np.int32))
    whole = np.rint(scaled) if step.rounding == "even" else np.floor(scaled + (0.5 * (step.rounding == "half_up")))
    if step.overflow == "saturate":
        whole = np.clip(whole, step.low, step.high)
    else:
        whole = np.fmod(whole, step.high - step.low + 1)  # exact, and within int64
    return np.left_shift(fitted(whole.astype(np.int64), step.low, step.high, step.overflow), _up(step))


def quantized(step: Quantize, x: Floats) -> Int:
    """Floats of shape (samples, *shape) as the numbers of a grid."""
    codes = np.rint(x / step.step) + step.zero.astype(np.float32)
    centred: Int = np.clip(codes, step.low, step.high).astype(np.int64) - step.zero
    return centred


def _up(step: Round) -> Int:
    """By how much the codes of a rounding are shifted to the common binary point; 0 where there is only the value 0."""
    return np.maximum(step.point - step.points, 0)


@apply.register
def _(step: Round, given: Sequence[Int], sources: Sequence[Value]) -> Int:
    (x,), (source,) = given, sources
    numerator = np.left_shift(x, np.maximum(step.points - source.point, 0))
    divisor = np.left_shift(np.int64(source.divisor), np.maximum(source.point - step.points, 0))
    codes = divided(numerator, divisor, step.rounding)
    return np.left_shift(fitted(codes, step.low, step.high, step.overflow), _up(step))


@apply.register
def _(step: Quantize, given: Sequence[Any], sources: Sequence[Value]) -> Int:  # noqa: ARG001
    return quantized(step, given[0])


@apply.register
def _(step: Scale, given: Sequence[Int], sources: Sequence[Value]) -> Any:  # noqa: ARG001
    x = given[0].astype(np.float32)
    x = (x if step.divisor == 1 else x / np.float32(step.divisor)) * step.scale
    return x if step.bias is None else x + step.bias


@apply.register
def _(step: Product, given: Sequence[Int], sources: Sequence[Value]) -> Int:
    (x,), (source,) = given, sources
    largest = max(abs(int(source.low.min(initial=0))), abs(int(source.high.max(initial=0))))
    longest = int(np.abs(step.weight).reshape(len(step.weight), -1).sum(axis=1).max(initial=0)) * largest
    return products(step, x, np.float64 if longest < EXACT else np.int64)


def products(step: Product, x: Int, kind: type[np.float64] | type[np.int64] = np.int64) -> Int:
    """The sums of a product, computed in numbers of a kind."""
    weight: NDArray[Any] = step.weight.astype(kind)
    if step.window is None:
        dense: Int = (x.astype(kind) @ weight.T).astype(np.int64)
        return dense
    seen = windows(x, step.window, 0)  # (samples, channels, *places, *kernel)
    dims = len(step.window.kernel)
    places = seen.shape[2 : 2 + dims]
    columns = np.moveaxis(seen, 1, 1 + dims).reshape(len(x), *places, step.groups, -1)
    columns = np.moveaxis(columns, -2, 1).reshape(len(x), step.groups, -1, columns.shape[-1]).astype(kind)
    rows = weight.reshape(step.groups, len(weight) // step.groups, -1)
    # (samples, groups, out / groups, places)
    sums: Int = np.matmul(rows, columns.swapaxes(-1, -2)).astype(np.int64)
    return sums.reshape(len(x), len(weight), *places)


def windows(x: Int, window: Window, beyond: float) -> Int:
    """The windows over a value: shape (samples, channels, *places, *kernel).

    Args:
        x: shape (samples, channels, *sizes).
        beyond: what padding is.
    """
    dims = len(window.kernel)
    pads = [(0, 0), (0, 0), *zip(window.before, window.after, strict=True)]
    padded = np.pad(x, pads, constant_values=beyond)
    axes = tuple(range(2, 2 + dims))
    spans = tuple(d * (k - 1) + 1 for k, d in zip(window.kernel, window.dilation, strict=True))
    seen = sliding_window_view(padded, spans, axis=axes)
    steps = [slice(None, None, s) for s in window.stride]
    taps = [slice(None, None, d) for d in window.dilation]
    result: Int = seen[(slice(None), slice(None), *steps, *taps)]
    return result


@apply.register
def _(step: Offset, given: Sequence[Int], sources: Sequence[Value]) -> Int:  # noqa: ARG001
    return _shifted(given[0], step.shift) + step.constant


@apply.register
def _(step: Cut, given: Sequence[Int], sources: Sequence[Value]) -> Int:  # noqa: ARG001
    _, exponent = np.frexp(given[0].astype(np.float64))
    unit = np.left_shift(np.int64(1), np.maximum(exponent - step.digits, 0).astype(np.int64))
    cut: Int = divided(given[0], unit, "even") * unit
    return cut


@apply.register
def _(step: Limit, given: Sequence[Int], sources: Sequence[Value]) -> Int:  # noqa: ARG001
    x = _shifted(given[0], step.shift)
    x = x if step.low is None else np.maximum(x, x.dtype.type(step.low))
    return x if step.high is None else np.minimum(x, x.dtype.type(step.high))


@apply.register
def _(step: Leak, given: Sequence[Int], sources: Sequence[Value]) -> Int:  # noqa: ARG001
    x = given[0]
    return np.where(x < 0, x * x.dtype.type(step.slope), _shifted(x, step.shift))


@apply.register
def _(step: Add, given: Sequence[Int], sources: Sequence[Value]) -> Int:  # noqa: ARG001
    first, *others = (
        _shifted(x, by) * x.dtype.type(s) for x, by, s in zip(given, step.shifts, step.signs, strict=True)
    )
    for other in others:
        first = first + other
    return first


@apply.register
def _(step: Join, given: Sequence[Int], sources: Sequence[Value]) -> Int:  # noqa: ARG001
    return np.concatenate([_shifted(x, by) for x, by in zip(given, step.shifts, strict=True)], axis=1 + step.dim)


@apply.register
def _(step: Pool, given: Sequence[Int], sources: Sequence[Value]) -> Int:  # noqa: ARG001
    axes = tuple(range(-len(step.window.kernel), 0))
    if step.kind == "sum":
        total: Int = windows(given[0], step.window, 0).sum(axis=axes)
        return total
    least = _LEAST if given[0].dtype == np.int64 else -np.inf
    largest: Int = windows(given[0], step.window, least).max(axis=axes)
    return largest


@apply.register
def _(step: Move, given: Sequence[Int], sources: Sequence[Value]) -> Int:  # noqa: ARG001
    flat = given[0].reshape(len(given[0]), -1)
    return np.where(step.places < 0, flat.dtype.type(0), flat[:, step.places])


def _shifted(x: Int, by: int) -> Int:
    return x if by == 0 else np.left_shift(x, by)
