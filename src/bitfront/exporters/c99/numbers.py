"""The lines of C that treat each number alone: a bias, a ReLU, a rounding; and the functions that they call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront.exporters.c99.tables import Tables, spelled
from bitfront.exporters.program import (
    Add,
    Cut,
    Int,
    Leak,
    Limit,
    Offset,
    Program,
    Quantize,
    Round,
    Scale,
    Step,
    Value,
)

HELPERS = """\
/* The quotient by 2^bits, half to even, half up, or down. */
static inline WIDE even_WIDE(WIDE v, int bits)
{
    WIDE below = v >> bits, rest = v - below * ((WIDE)1 << bits), half = (WIDE)1 << (bits - 1);
    return below + (rest > half || (rest == half && (below & 1)));
}
static inline WIDE up_WIDE(WIDE v, int bits) { return (v + ((WIDE)1 << (bits - 1))) >> bits; }
static inline WIDE down_WIDE(WIDE v, int bits) { return v >> bits; }
/* The quotient by a positive number, rounded in the same ways. */
static inline WIDE below_WIDE(WIDE v, WIDE by) { return v / by - (v % by < 0); }
static inline WIDE even_by_WIDE(WIDE v, WIDE by)
{
    WIDE below = below_WIDE(v, by), twice = 2 * (v - below * by);
    return below + (twice > by || (twice == by && (below & 1)));
}
static inline WIDE up_by_WIDE(WIDE v, WIDE by) { return below_WIDE(2 * v + by, 2 * by); }
static inline WIDE down_by_WIDE(WIDE v, WIDE by) { return below_WIDE(v, by); }
static inline WIDE within_WIDE(WIDE v, WIDE low, WIDE high) { return v < low ? low : v > high ? high : v; }
static inline WIDE wrapped_WIDE(WIDE v, WIDE low, WIDE count) { return v - below_WIDE(v - low, count) * count; }
"""
COMMON = """\
/* The leading bits of a number, as a float holds them. */
static inline int64_t cut(int64_t v, int digits)
{
    int64_t size = v < 0 ? -v : v;
    int bits = digits;
    while (size >> bits) bits++;
    return bits <= digits ? v : even_int64_t(v, bits - digits) * ((int64_t)1 << (bits - digits));
}
static inline int32_t packed4(const uint8_t *w, int32_t i)
{
    int32_t v = (w[i >> 1] >> (4 * (i & 1))) & 15;
    return v - 2 * (v & 8);
}
static inline int32_t packed2(const uint8_t *w, int32_t i)
{
    int32_t v = (w[i >> 2] >> (2 * (i & 3))) & 3;
    return v - 2 * (v & 2);
}
/* Each operation of its own, so that no compiler fuses two into one that rounds once. */
static inline float scaled(float v, float scale) { volatile float product = v * scale; return product; }
static inline float clamped(float v, float low, float high) { return v < low ? low : v > high ? high : v; }
"""


def helpers() -> str:
    """The functions that every source has."""
    return "".join(HELPERS.replace("WIDE", wide) for wide in ("int32_t", "int64_t")) + COMMON


class Alone:
    """Writes steps that treat each number alone."""

    def __init__(self, tables: Tables, name: str, place: str, channel: str, program: Program) -> None:
        self.tables, self.name, self.place, self.channel, self.program = tables, name, place, channel, program
        self.count = 0
        self.variable = "v"

    def _new(self, kind: str, text: str) -> str:
        self.count += 1
        self.variable = f"v{self.count}"
        return f"{kind} {self.variable} = {text};"

    def _entry(self, what: str, values: NDArray[Any], shape: tuple[int, ...]) -> str:
        """A constant at the place of the number: a number, or an element of a table."""
        values = np.asarray(values)
        full = np.broadcast_to(values, shape)
        if not full.size or (full == full.ravel()[0]).all():
            return spelled(full.ravel()[0].item()) if full.size else "0"
        if len(shape) > 1 and (full == full.reshape(shape[0], -1)[:, :1].reshape(-1, *[1] * (len(shape) - 1))).all():
            table = full.reshape(shape[0], -1)[:, 0]
            return f"{self.tables.add(f'{self.name}_{what}', table)}[{self.channel}]"
        return f"{self.tables.add(f'{self.name}_{what}', full)}[{self.place}]"

    def lines(self, step: Step, source: Value | None, result: Value) -> list[str]:
        """The lines of one step."""
        v, shape = self.variable, result.shape
        if isinstance(step, Round):
            return self._round(step, source, result)
        if isinstance(step, Quantize):
            return [self._quantized(step, shape)]
        if isinstance(step, Scale):
            value = f"(float){v}"
            if step.divisor != 1:
                value = f"scaled({value} / {float(step.divisor)}f, 1.0f)"
            value = f"scaled({value}, {self._entry('scale', step.scale, shape)})"
            lines = [self._new("float", value)]
            if step.bias is not None:
                lines.append(self._new("float", f"{self.variable} + {self._entry('bias', step.bias, shape)}"))
            return lines
        assert source is not None
        if isinstance(step, Leak) and result.floats:
            return [self._new("float", f"{v} < 0 ? scaled({v}, {spelled(step.slope)}) : {v}")]
        if isinstance(step, Limit) and result.floats:
            ends = [spelled(math.inf * s if e is None else float(e)) for s, e in ((-1, step.low), (1, step.high))]
            return [self._new("float", f"clamped({v}, {ends[0]}, {ends[1]})")]
        wide = wide_type(source, result, getattr(step, "shift", 0))
        if isinstance(step, Offset):
            constant = self._entry("bias", step.constant, shape)
            return [self._new(wide, f"{raised(v, wide, step.shift)} + {constant}")]
        if isinstance(step, Cut):
            return [self._new("int64_t", f"cut({v}, {step.digits})")]
        if isinstance(step, Limit):
            value = self._new(wide, raised(v, wide, step.shift))
            low, high = (e if e is None else int(e) for e in (step.low, step.high))
            limits = [f"if ({self.variable} < {low}) {self.variable} = {low};"] if low is not None else []
            limits += [f"if ({self.variable} > {high}) {self.variable} = {high};"] if high is not None else []
            return [value, *limits]
        assert isinstance(step, Leak)
        return [self._new(wide, f"{v} < 0 ? ({wide}){v} * {spelled(int(step.slope))} : {raised(v, wide, step.shift)}")]

    def added(self, step: Add, terms: Sequence[str], result: Value) -> str:
        """The line of a sum, of which one term is the number."""
        return self._new(*added(step, terms, result))

    def _quantized(self, step: Quantize, shape: tuple[int, ...]) -> str:
        zero = step.zero.astype(np.float32)
        codes = f"rintf({self.variable} / {self._entry('step', step.step, shape)}) + {self._entry('zero', zero, shape)}"
        low, high = (
            self._entry(what, end.astype(np.float32), shape) for what, end in (("low", step.low), ("high", step.high))
        )
        less = self._entry("zeros", step.zero, shape)
        return self._new("int32_t", f"(int32_t)clamped({codes}, {low}, {high}) - {less}")

    def _round(self, step: Round, source: Value | None, result: Value) -> list[str]:
        shape, up = result.shape, np.maximum(step.point - step.points, 0)
        if source is None:
            return self._round_input(step, shape, up)
        shift = step.points - source.point
        wide = wide_type(source, result, int(max(0, shift.max(initial=0))) + (source.divisor > 1))
        way = {"even": "even", "half_up": "up", "floor": "down"}[step.rounding]
        v = f"({wide}){self.variable}"
        lines = []
        if source.divisor > 1:
            numerator = power(self._entry("up", np.maximum(shift, 0), shape), wide)
            divisor = power(self._entry("down", np.maximum(-shift, 0), shape), wide)
            lines.append(self._new(wide, f"{way}_by_{wide}({v} * {numerator}, {source.divisor} * {divisor})"))
        elif (shift >= 0).all():
            lines.append(self._new(wide, f"{v} * {power(self._entry('up', shift, shape), wide)}"))
        elif (shift < 0).all():
            lines.append(self._new(wide, f"{way}_{wide}({v}, {self._entry('down', -shift, shape)})"))
        else:
            entry = self._entry("shift", shift, shape)
            raised = f"{v} * (({wide})1 << {entry})"
            lines.append(self._new(wide, f"{entry} >= 0 ? {raised} : {way}_{wide}({v}, -{entry})"))
        lines.append(self._new(wide, self._fitted(step, wide, shape)))
        if up.any():
            lines.append(self._new(wide, f"{self.variable} * {power(self._entry('align', up, shape), wide)}"))
        return lines

    def _fitted(self, step: Round, wide: str, shape: tuple[int, ...]) -> str:
        low = self._entry("low", step.low, shape)
        if step.overflow == "wrap":
            count = self._entry("count", step.high - step.low + 1, shape)
            return f"wrapped_{wide}({self.variable}, {low}, {count})"
        return f"within_{wide}({self.variable}, {low}, {self._entry('high', step.high, shape)})"

    def _round_input(self, step: Round, shape: tuple[int, ...], up: Int) -> list[str]:
        factor = self._entry("factor", np.ldexp(np.float32(1), step.points.astype(np.int32)), shape)
        way = {"even": "rintf({})", "half_up": "floorf({} + 0.5f)", "floor": "floorf({})"}[step.rounding]
        if step.rounding == "half_up":
            # In float, what is a little less than a half would be rounded up with the sum.
            way = "(float)floor((double){} + 0.5)"
        value = way.format(f"({self.variable} * {factor})")
        wide = "int64_t" if step.overflow == "wrap" else "int32_t"
        if step.overflow == "wrap":
            # In double no product overflows, and a remainder is exact, however large the input is.
            way = {"even": "rint({})", "half_up": "floor({} + 0.5)", "floor": "floor({})"}[step.rounding]
            count = self._entry("countf", (step.high - step.low + 1).astype(np.float32), shape)
            value = f"fmod({way.format(f'((double){self.variable} * {factor})')}, {count})"
            lines = [self._new(wide, f"({wide}){value}"), self._new(wide, self._fitted(step, wide, shape))]
        else:
            low, high = (
                self._entry(what, end.astype(np.float32), shape)
                for what, end in (("lowf", step.low), ("highf", step.high))
            )
            lines = [self._new(wide, f"({wide})clamped({value}, {low}, {high})")]
        if up.any():
            lines.append(self._new(wide, f"{self.variable} * {power(self._entry('align', up, shape), wide)}"))
        return lines


def added(step: Add, terms: Sequence[str], result: Value) -> tuple[str, str]:
    """(the type of a sum, the sum as C)."""
    wide = "float" if result.floats else "int32_t" if result.bits < 31 else "int64_t"
    signed = [
        f"{'-' if sign < 0 else '+'} {term if result.floats else raised(term, wide, shift)}"
        for term, shift, sign in zip(terms, step.shifts, step.signs, strict=True)
    ]
    return wide, " ".join(signed).removeprefix("+ ")


def wide_type(source: Value, result: Value, shift: int) -> str:
    """The type in which a step computes: one bit to spare."""
    return "int32_t" if max(source.bits + shift, result.bits) < 31 and not source.floats else "int64_t"


def raised(v: str, wide: str, shift: int) -> str:
    """A number, shifted left, in a type."""
    return f"({wide}){v} * {power(str(shift), wide)}" if shift else f"({wide}){v}"


def power(entry: str, wide: str) -> str:
    """Two to the power of a constant."""
    return f"(({wide})1 << {entry})" if entry != "0" else "1"
