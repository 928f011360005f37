"""An integer program as logic: every number is a signal, every step what the FPGA does in the same moment.

The logic takes whole numbers: those that the program's first roundings give (``numbers_in``). It gives the numbers of
the program's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront.errors import ExportError
from bitfront.exporters import fabric, oracle
from bitfront.exporters.fabric import Signals
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
    Pool,
    Product,
    Program,
    Quantize,
    Round,
    Step,
    Value,
)


def laid_out(program: Program) -> Any:
    """The logic of a program without floats, alkaid's ``CombLogic``.

    Raises:
        ExportError: a step cannot be laid out; the message names its node and says what to do.
        MissingExtraError: alkaid is not installed.
    """
    signals: list[Signals] = []
    sources: list[Signals] = []
    for step, value in zip(program.steps, program.values, strict=True):
        if step.sources:
            given = [program.values[number] for number in step.sources]
            try:
                signals.append(lay_out(step, [signals[number] for number in step.sources], given))
            except ExportError as error:
                raise ExportError(f"{value.name}: {error}") from None
        else:
            signals.append(_entering(step, value))
            sources.append(signals[-1].ravel())
    return fabric.traced(np.concatenate(sources), signals[program.output].ravel())


def check(program: Program) -> None:
    """Raises ExportError for a step that cannot be laid out, with the name of its node; nothing is laid out."""
    for step, value in zip(program.steps, program.values, strict=True):
        given = [program.values[number] for number in step.sources]
        divisor = given[0].divisor if given else 1
        if isinstance(step, Cut):
            raise ExportError(
                f"{value.name}: its sums have up to {given[0].bits} bits, and the network that was searched cuts them "
                f"to {step.digits} digits, as float32 does, which is no arithmetic for logic; take formats of fewer "
                "bits, or fewer bits behind the point of the bias"
            )
        if isinstance(step, Round) and divisor & (divisor - 1):
            raise ExportError(
                f"{value.name}: it rounds a mean of {divisor} values, and logic divides by powers of two only; take a "
                "window of such a size"
            )
        if isinstance(step, Round) and step.sources and step.overflow == "wrap":
            _bits(step)


def numbers_in(program: Program, x: Floats) -> Int:
    """The whole numbers that the logic takes for some inputs, int64 of shape (samples, inputs).

    Args:
        x: float32, shape (samples, *features).
    """
    parts = [oracle.rounded_input(step, x) for step in entering(program)]
    # Where every sample has the same number, a rounding may have no axis of samples.
    return np.concatenate([np.broadcast_to(p, (len(x), *p.shape[1:])).reshape(len(x), -1) for p in parts], axis=1)


def entering(program: Program) -> list[Round | Quantize]:
    """The first roundings, in the order in which their numbers enter the logic."""
    return [step for step in program.steps if isinstance(step, Round | Quantize) and not step.sources]


def _entering(step: Step, value: Value) -> Signals:
    """The signals that a first rounding gives."""
    grain = np.ones(value.shape)
    if isinstance(step, Round):
        grain = np.broadcast_to(2.0 ** np.maximum(step.point - step.points, 0), value.shape).astype(np.float64)
    return fabric.inputs(value.low.astype(np.float64), value.high.astype(np.float64), grain)


@singledispatch
def lay_out(step: Step, given: Sequence[Signals], sources: Sequence[Value]) -> Signals:  # noqa: ARG001
    """The signals that a step gives, of the shape of its value.

    Args:
        step: the step.
        given: the signals of its sources.
        sources: what they are.
    """
    raise ExportError(f"{type(step).__name__} cannot be laid out as logic")


def _bits(step: Round) -> tuple[Int, bool]:
    """(bits at each place, whether there is a sign) of a rounding that wraps around."""
    counts = step.high - step.low + 1
    bits = np.round(np.log2(counts)).astype(np.int64)
    signed = bool((step.low < 0).any())
    if not np.array_equal(2**bits, counts) or not np.array_equal(step.low, -(counts // 2) * signed):
        raise ExportError("its numbers wrap around at ends that are no powers of two")
    return bits, signed


@lay_out.register
def _(step: Round, given: Sequence[Signals], sources: Sequence[Value]) -> Signals:
    scale = 2.0 ** (step.points - sources[0].point) / sources[0].divisor
    up = 2.0 ** np.maximum(step.point - step.points, 0)
    ends = (step.low, step.high)
    if step.overflow == "wrap":
        bits, signed = _bits(step)
        ends = (bits, np.full(bits.shape, signed))
    columns = [np.broadcast_to(c, given[0].shape).ravel().tolist() for c in (scale, *ends, up)]

    def one(signal: Any, factor: float, first: int, second: int, shift: float) -> Any:
        if step.overflow == "wrap":
            code = fabric.wrapped(fabric.on_grid(signal * factor, 1.0, step.rounding), first, bool(second))
        else:
            code = fabric.rounded(signal * factor, float(first), float(second), 1.0, step.rounding)
        return code * shift

    return _array([one(*row) for row in zip(given[0].ravel(), *columns, strict=True)], given[0].shape)


@lay_out.register
def _(step: Product, given: Sequence[Signals], sources: Sequence[Value]) -> Signals:  # noqa: ARG001
    (x,), weight = given, step.weight.astype(np.float64)
    if step.window is None:
        rows = x.reshape(-1, x.shape[-1])
        sums = [fabric.product(row, weight.T) for row in rows]
        return _array([s for row in sums for s in row], (*x.shape[:-1], len(weight)))
    index = oracle.windows(np.arange(x.size).reshape(1, *x.shape), step.window, -1)[0]
    dims = len(step.window.kernel)
    places = index.shape[1 : 1 + dims]
    columns = np.moveaxis(index, 0, dims).reshape(-1, step.groups, weight[0].size)  # (places, groups, inputs of a sum)
    padded = np.append(x.ravel(), fabric.constant(0.0))
    matrices = weight.reshape(step.groups, -1, weight[0].size)
    sums = [
        np.concatenate([fabric.product(padded[row[g]], matrices[g].T) for g in range(step.groups)]) for row in columns
    ]
    return np.stack(sums, axis=1).reshape(len(weight), *places)


@lay_out.register
def _(step: Offset, given: Sequence[Signals], sources: Sequence[Value]) -> Signals:  # noqa: ARG001
    constants = np.broadcast_to(step.constant, given[0].shape).ravel().tolist()
    shifted = _shifted(given[0], step.shift).ravel()
    return _array([fabric.plus(s, float(c)) for s, c in zip(shifted, constants, strict=True)], given[0].shape)


@lay_out.register
def _(step: Limit, given: Sequence[Signals], sources: Sequence[Value]) -> Signals:  # noqa: ARG001
    x = _shifted(given[0], step.shift)
    return _array([fabric.limited(s, step.low, step.high) for s in x.ravel()], x.shape)


@lay_out.register
def _(step: Leak, given: Sequence[Signals], sources: Sequence[Value]) -> Signals:  # noqa: ARG001
    if step.slope > 2**step.shift:
        raise ExportError("its slope is more than 1, which is not laid out")
    pairs = [(s * 2.0**step.shift, s * float(step.slope)) for s in given[0].ravel()]
    return _array([fabric.largest(pair) for pair in pairs], given[0].shape)


@lay_out.register
def _(step: Add, given: Sequence[Signals], sources: Sequence[Value]) -> Signals:  # noqa: ARG001
    terms = zip(given, step.shifts, step.signs, strict=True)
    flat = [[s * (sign * 2.0**shift) for s in x.ravel()] for x, shift, sign in terms]
    return _array([fabric.sum_of(one) for one in zip(*flat, strict=True)], given[0].shape)


@lay_out.register
def _(step: Join, given: Sequence[Signals], sources: Sequence[Value]) -> Signals:  # noqa: ARG001
    return np.concatenate([_shifted(x, by) for x, by in zip(given, step.shifts, strict=True)], axis=step.dim)


@lay_out.register
def _(step: Pool, given: Sequence[Signals], sources: Sequence[Value]) -> Signals:  # noqa: ARG001
    (x,) = given
    index = oracle.windows(np.arange(x.size).reshape(1, *x.shape), step.window, -1)[0]
    dims = len(step.window.kernel)
    flat = x.ravel()
    together = fabric.largest if step.kind == "largest" else fabric.sum_of
    found = [
        together([flat[i] for i in row if i >= 0])
        for row in index.reshape(-1, *index.shape[-dims:]).reshape(-1, int(np.prod(index.shape[-dims:])))
    ]
    return _array(found, index.shape[:-dims])


@lay_out.register
def _(step: Move, given: Sequence[Signals], sources: Sequence[Value]) -> Signals:  # noqa: ARG001
    moved: Signals = np.append(given[0].ravel(), fabric.constant(0.0))[step.places]
    return moved


def _shifted(x: Signals, by: int) -> Signals:
    return _array([s * 2.0**by for s in x.ravel()], x.shape) if by else x


def _array(signals: Sequence[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    found = np.empty(len(signals), dtype=object)
    found[:] = signals
    return found.reshape(shape)
