"""An integer program as C99 without dependencies: a header and a source.

Steps that treat each number alone (a bias, a ReLU, a rounding) are done in the loop of the step before them, so that
sums stay in a register and only rounded numbers are stored. Every buffer is static; buffers whose values are not needed
at the same time share memory. Weights are held in as few bits as the widest one needs: 2, 4, 8, 16 or 32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront.export.program import (
    Add,
    Cut,
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
    Scale,
    Step,
    Value,
    width,
)

#: Steps that treat each number alone.
_ALONE = (Offset, Cut, Limit, Leak, Round, Quantize, Scale)
_INTEGERS = (8, 16, 32, 64)


@dataclass(frozen=True, eq=False)
class Stage:
    """Steps that are one loop: the first reads buffers, the others treat each number alone.

    Attributes:
        steps: numbers of the steps, in order; the result of the last is stored.
        sources: numbers of the values that are read.
    """

    steps: tuple[int, ...]
    sources: tuple[int, ...]

    @property
    def result(self) -> int:
        """The number of the value that is stored."""
        return self.steps[-1]


def stages(program: Program) -> tuple[list[Stage], dict[int, int]]:
    """(the loops of a program in order, value → the value in whose buffer it lies). A step that changes only the shape
    is no loop."""
    users: dict[int, int] = {program.output: 1}
    for step in program.steps:
        for source in step.sources:
            users[source] = users.get(source, 0) + 1
    held: dict[int, int] = {}
    result: list[Stage] = []
    done: set[int] = set()
    followers = {
        step.sources[0]: k for k, step in enumerate(program.steps) if step.sources and isinstance(step, _ALONE)
    }
    for k, step in enumerate(program.steps):
        if k in done:
            continue
        if isinstance(step, Move) and step.reshapes:
            held[k] = held.get(step.sources[0], step.sources[0])
            continue
        chain = [k]
        while users.get(chain[-1]) == 1 and chain[-1] in followers and chain[-1] != program.output:
            chain.append(followers[chain[-1]])
        done.update(chain)
        result.append(Stage(tuple(chain), tuple(held.get(s, s) for s in step.sources)))
    return result, held


def type_of(value: Value) -> str:
    """The C type that holds every number of a value."""
    return "float" if value.floats else integer_type(int(value.low.min(initial=0)), int(value.high.max(initial=0)))


def integer_type(low: int, high: int) -> str:
    """The smallest C type for numbers from `low` to `high`."""
    bits = width(low, high)
    size = next(s for s in _INTEGERS if bits <= s)
    return f"{'' if low < 0 else 'u'}int{size}_t"


SIZES = {"float": 4} | {f"{u}int{s}_t": s // 8 for s in _INTEGERS for u in ("", "u")}


@dataclass
class Tables:
    """The constants of a source, and the bytes that they take."""

    lines: list[str] = field(default_factory=list)
    bytes: int = 0
    names: set[str] = field(default_factory=set)

    def add(self, name: str, values: NDArray[Any]) -> str:
        """A constant array of numbers. Returns its name."""
        flat = values.ravel()
        kind = "float" if flat.dtype.kind == "f" else integer_type(int(flat.min(initial=0)), int(flat.max(initial=0)))
        return self._put(name, kind, flat.tolist(), len(flat))

    def add_weight(self, name: str, weight: Int) -> tuple[str, int]:
        """A weight, packed. Returns (its name, bits of a number)."""
        low, high = int(weight.min(initial=0)), int(weight.max(initial=0))
        bits = max(width(min(low, -1), high), 2)
        bits = next(b for b in (2, 4, 8, 16, 32) if bits <= b)
        flat = weight.ravel()
        if bits >= 8:
            return self._put(name, f"int{bits}_t", flat.tolist(), len(flat)), bits
        each = 8 // bits
        padded = np.concatenate([flat, np.zeros(-len(flat) % each, np.int64)]).reshape(-1, each) & (2**bits - 1)
        packed = (padded << (bits * np.arange(each))).sum(axis=1)
        return self._put(name, "uint8_t", packed.tolist(), len(packed)), bits

    def _put(self, name: str, kind: str, values: Sequence[Any], count: int) -> str:
        while name in self.names:
            name += "_"
        self.names.add(name)
        text = [_number(v) for v in values] or ["0"]
        rows = [", ".join(text[i : i + 16]) for i in range(0, len(text), 16)]
        self.lines.append(f"static const {kind} {name}[{max(1, count)}] = {{\n    " + ",\n    ".join(rows) + "};")
        self.bytes += SIZES[kind] * max(1, count)
        return name


def _number(value: float) -> str:
    if isinstance(value, int):
        if value == -(2**63):
            return "(-9223372036854775807LL - 1)"
        return f"{value}LL" if abs(value) >= 2**31 - 1 else str(value)
    return "INFINITY" if math.isinf(value) and value > 0 else "-INFINITY" if math.isinf(value) else f"{value.hex()}f"


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
    int bits = 0;
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


def helpers(source: Source) -> str:  # noqa: ARG001
    """The functions that a source calls."""
    return "".join(HELPERS.replace("WIDE", wide) for wide in ("int32_t", "int64_t")) + COMMON


class Source:
    """Writes the body of the function, and collects the constants."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.tables = Tables()
        self.stages, self.held = stages(program)
        self.offsets, self.pools = _memory(program, self.stages, self.held)
        self.code: list[str] = []
        for number, stage in enumerate(self.stages):
            self._stage(number, stage)

    @property
    def ram(self) -> int:
        """Bytes of all buffers."""
        return sum(SIZES[kind] * count for kind, count in self.pools.items())

    def buffer(self, number: int) -> str:
        """The buffer of a value, as C."""
        number = self.held.get(number, number)
        if number == self.held.get(self.program.output, self.program.output):
            return "output"
        kind, at = self.offsets[number]
        return f"({_pool(kind)} + {at})" if at else _pool(kind)

    def _stage(self, number: int, stage: Stage) -> None:
        first = self.program.steps[stage.steps[0]]
        self.code.append(f"    /* {self.program.values[stage.result].name} */")
        for kind, write in _WRITERS:
            if isinstance(first, kind):
                write(self, number, stage, first)
                return
        raise TypeError(f"no C for {type(first).__name__}")

    def chain(
        self, number: int, stage: Stage, source: Value | None, place: str, channel: str, skip: int = 1
    ) -> list[str]:
        """The lines that treat the number ``v`` and store it at `place`.

        Args:
            number: of the stage.
            source: what ``v`` is; None: the float input.
            place, channel: the index of the number, and of its first dimension, as C.
            skip: how many steps of the stage are done already.
        """
        lines, current = [], source
        writer = _Alone(self.tables, f"s{number}", place, channel, self.program)
        for k in stage.steps[skip:]:
            lines += writer.lines(self.program.steps[k], current, self.program.values[k])
            current = self.program.values[k]
        result = self.program.values[stage.result]
        return [*lines, f"{self.buffer(stage.result)}[{place}] = ({type_of(result)}){writer.variable};"]


def _pool(kind: str) -> str:
    return "pool_" + kind.removesuffix("_t")


def _memory(
    program: Program, loops: Sequence[Stage], held: dict[int, int]
) -> tuple[dict[int, tuple[str, int]], dict[str, int]]:
    """(value → (type, place in the buffer of that type), type → numbers in its buffer). A place is free again behind
    the last loop that reads it."""
    output = held.get(program.output, program.output)
    last = {stage.result: i for i, stage in enumerate(loops)}
    for i, stage in enumerate(loops):
        for source in stage.sources:
            last[source] = i
    offsets: dict[int, tuple[str, int]] = {}
    pools: dict[str, int] = {}
    for i, stage in enumerate(loops):
        value = program.values[stage.result]
        if stage.result == output:
            continue
        kind, size = type_of(value), math.prod(value.shape)
        # What is read in this loop is still in use while the result is written.
        busy = sorted(
            (at, at + math.prod(program.values[k].shape))
            for k, (other, at) in offsets.items()
            if other == kind and last[k] >= i
        )
        place = 0
        for start, end in busy:
            if place + size <= start:
                break
            place = max(place, end)
        offsets[stage.result] = kind, place
        pools[kind] = max(pools.get(kind, 0), place + size)
    return offsets, pools


class _Alone:
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
            return _number(full.ravel()[0].item()) if full.size else "0"
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
            return [self._new("float", f"{v} < 0 ? scaled({v}, {_number(step.slope)}) : {v}")]
        if isinstance(step, Limit) and result.floats:
            ends = [_number(math.inf * s if e is None else float(e)) for s, e in ((-1, step.low), (1, step.high))]
            return [self._new("float", f"clamped({v}, {ends[0]}, {ends[1]})")]
        wide = _wide(source, result, getattr(step, "shift", 0))
        if isinstance(step, Offset):
            constant = self._entry("bias", step.constant, shape)
            return [self._new(wide, f"{_up(v, wide, step.shift)} + {constant}")]
        if isinstance(step, Cut):
            return [self._new("int64_t", f"cut({v}, {step.digits})")]
        if isinstance(step, Limit):
            value = self._new(wide, _up(v, wide, step.shift))
            low, high = (e if e is None else int(e) for e in (step.low, step.high))
            limits = [f"if ({self.variable} < {low}) {self.variable} = {low};"] if low is not None else []
            limits += [f"if ({self.variable} > {high}) {self.variable} = {high};"] if high is not None else []
            return [value, *limits]
        assert isinstance(step, Leak)
        return [self._new(wide, f"{v} < 0 ? ({wide}){v} * {_number(int(step.slope))} : {_up(v, wide, step.shift)}")]

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
        wide = _wide(source, result, int(max(0, shift.max(initial=0))) + (source.divisor > 1))
        way = {"even": "even", "half_up": "up", "floor": "down"}[step.rounding]
        v = f"({wide}){self.variable}"
        lines = []
        if source.divisor > 1:
            numerator = _power(self._entry("up", np.maximum(shift, 0), shape), wide)
            divisor = _power(self._entry("down", np.maximum(-shift, 0), shape), wide)
            lines.append(self._new(wide, f"{way}_by_{wide}({v} * {numerator}, {source.divisor} * {divisor})"))
        elif (shift >= 0).all():
            lines.append(self._new(wide, f"{v} * {_power(self._entry('up', shift, shape), wide)}"))
        elif (shift < 0).all():
            lines.append(self._new(wide, f"{way}_{wide}({v}, {self._entry('down', -shift, shape)})"))
        else:
            entry = self._entry("shift", shift, shape)
            raised = f"{v} * (({wide})1 << {entry})"
            lines.append(self._new(wide, f"{entry} >= 0 ? {raised} : {way}_{wide}({v}, -{entry})"))
        lines.append(self._new(wide, self._fitted(step, wide, shape)))
        if up.any():
            lines.append(self._new(wide, f"{self.variable} * {_power(self._entry('align', up, shape), wide)}"))
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
            lines = [self._new(wide, f"({wide}){value}"), self._new(wide, self._fitted(step, wide, shape))]
        else:
            low, high = (
                self._entry(what, end.astype(np.float32), shape)
                for what, end in (("lowf", step.low), ("highf", step.high))
            )
            lines = [self._new(wide, f"({wide})clamped({value}, {low}, {high})")]
        if up.any():
            lines.append(self._new(wide, f"{self.variable} * {_power(self._entry('align', up, shape), wide)}"))
        return lines


def _wide(source: Value, result: Value, shift: int) -> str:
    """The type in which a step computes: one bit to spare."""
    return "int32_t" if max(source.bits + shift, result.bits) < 31 and not source.floats else "int64_t"


def _up(v: str, wide: str, shift: int) -> str:
    return f"({wide}){v} * {_power(str(shift), wide)}" if shift else f"({wide}){v}"


def _power(entry: str, wide: str) -> str:
    return f"(({wide})1 << {entry})" if entry != "0" else "1"


# --- the loops --------------------------------------------------------------------------------------------------------

_INDENT = "    "


def _loop(head: Iterable[str], body: Iterable[str]) -> list[str]:
    """Nested loops around a body; `head` has ``index < count`` for each."""
    lines, depth = [], 1
    for each in head:
        index, count = each.split("<")
        lines.append(f"{_INDENT * depth}for (int32_t {index} = 0; {index} < {count}; {index}++) {{")
        depth += 1
    lines += [_INDENT * depth + line for line in body]
    while depth > 1:
        depth -= 1
        lines.append(_INDENT * depth + "}")
    return lines


def _channel(shape: tuple[int, ...], place: str) -> str:
    inner = math.prod(shape[1:])
    return place if inner == 1 else f"({place} / {inner})"


def _write_elementwise(w: Source, number: int, stage: Stage, first: Step) -> None:
    value = w.program.values[stage.result]
    if stage.sources:
        source = w.program.values[first.sources[0]]
        start = f"const {type_of(source)} v = {w.buffer(stage.sources[0])}[i];"
    else:
        source, places = None, getattr(first, "places", None)
        at = "i" if places is None else f"{w.tables.add(f's{number}_places', places)}[i]"
        start = f"const float v = input[{at}];"
    body = w.chain(number, stage, source, "i", _channel(value.shape, "i"), skip=0)
    w.code += _loop([f"i<{math.prod(value.shape)}"], [start, *body])


def _taken(table: str, bits: int, index: str) -> str:
    return f"{table}[{index}]" if bits >= 8 else f"packed{bits}({table}, {index})"


def _write_product(w: Source, number: int, stage: Stage, first: Step) -> None:
    assert isinstance(first, Product)
    sums, x = w.program.values[stage.steps[0]], w.program.values[first.sources[0]]
    table, bits = w.tables.add_weight(f"s{number}_weight", first.weight)
    wide = "int32_t" if sums.bits <= 32 else "int64_t"
    buffer = w.buffer(stage.sources[0])
    if first.window is None:
        (out, inner), rows = first.weight.shape, math.prod(x.shape[:-1])
        line = f"v += ({wide}){_taken(table, bits, f'o * {inner} + k')} * {buffer}[r * {inner} + k];"
        place = f"(r * {out} + o)" if rows > 1 else "o"
        body = [f"{wide} v = 0;", f"for (int32_t k = 0; k < {inner}; k++) {line}"]
        body += w.chain(number, stage, sums, place, _channel(sums.shape, place))
        if rows == 1:
            body = [line.replace(f"r * {inner} + ", "") for line in body]
        w.code += _loop(([f"r<{rows}"] if rows > 1 else []) + [f"o<{out}"], body)
        return
    w.code += _convolution(w, number, stage, first, (table, bits, wide, buffer))


def _plane(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Channels, rows and columns of a sample; a sequence has one row."""
    return (shape[0], 1, shape[1]) if len(shape) == 2 else (shape[0], shape[1], shape[2])


def _pairs(values: tuple[int, ...], fill: int) -> tuple[int, int]:
    return (fill, values[0]) if len(values) == 1 else (values[0], values[1])


def _taps(first: Any, inside: list[str], sizes: tuple[int, int]) -> list[str]:
    """The loops over the taps of a window around (y, x); `inside` may use ``iy``, ``ix``, ``ky`` and ``kx``."""
    window = first.window
    kernel, stride = _pairs(window.kernel, 1), _pairs(window.stride, 1)
    before, dilation = _pairs(window.before, 0), _pairs(window.dilation, 1)
    lines = []
    for axis, (at, k, place, size) in enumerate((("y", "ky", "iy", sizes[0]), ("x", "kx", "ix", sizes[1]))):
        pad = _INDENT * axis
        lines.append(f"{pad}for (int32_t {k} = 0; {k} < {kernel[axis]}; {k}++) {{")
        lines.append(
            f"{pad}{_INDENT}const int32_t {place} = {at} * {stride[axis]} + {k} * {dilation[axis]} - {before[axis]};"
        )
        lines.append(f"{pad}{_INDENT}if ({place} < 0 || {place} >= {size}) continue;")
    return [*lines, *(_INDENT * 2 + line for line in inside), f"{_INDENT}}}", "}"]


def _convolution(w: Source, number: int, stage: Stage, first: Product, held: tuple[str, int, str, str]) -> list[str]:
    table, bits, wide, buffer = held
    assert first.window is not None
    sums, source = w.program.values[stage.steps[0]], w.program.values[first.sources[0]]
    (out, height, width_), (_, rows, columns) = _plane(sums.shape), _plane(source.shape)
    inner, kernel = first.weight.shape[1], _pairs(first.window.kernel, 1)
    group = f"(o / {out // first.groups}) * {inner} + c" if first.groups > 1 else "c"
    index = f"((o * {inner} + c) * {kernel[0]} + ky) * {kernel[1]} + kx"
    data = f"{buffer}[(({group}) * {rows} + iy) * {columns} + ix]"
    place = f"((o * {height} + y) * {width_} + x)"
    taps = _taps(first, [f"v += ({wide}){_taken(table, bits, index)} * {data};"], (rows, columns))
    body = [f"{wide} v = 0;", f"for (int32_t c = 0; c < {inner}; c++) {{", *(_INDENT + t for t in taps), "}"]
    body += w.chain(number, stage, sums, place, "o")
    return _loop([f"o<{out}", f"y<{height}", f"x<{width_}"], body)


def _write_pool(w: Source, number: int, stage: Stage, first: Step) -> None:
    assert isinstance(first, Pool)
    sums, source = w.program.values[stage.steps[0]], w.program.values[first.sources[0]]
    (channels, height, columns), (_, rows, row) = _plane(sums.shape), _plane(source.shape)
    data = f"{w.buffer(stage.sources[0])}[(o * {rows} + iy) * {row} + ix]"
    if first.kind == "sum":
        wide = "int32_t" if sums.bits <= 32 else "int64_t"
        start, inside = f"{wide} v = 0;", [f"v += {data};"]
    else:
        kind = type_of(source)
        least = "-INFINITY" if source.floats else f"({kind})({_number(int(source.low.min(initial=0)))})"
        start, inside = f"{kind} v = {least};", [f"if ({data} > v) v = {data};"]
    place = f"((o * {height} + y) * {columns} + x)"
    body = [start, *_taps(first, inside, (rows, row)), *w.chain(number, stage, sums, place, "o")]
    w.code += _loop([f"o<{channels}", f"y<{height}", f"x<{columns}"], body)


def _write_add(w: Source, number: int, stage: Stage, first: Step) -> None:
    assert isinstance(first, Add)
    value, result = w.program.values[stage.steps[0]], w.program.values[stage.result]
    wide = "float" if value.floats else "int32_t" if value.bits < 31 else "int64_t"
    terms = []
    for source, shift, sign in zip(stage.sources, first.shifts, first.signs, strict=True):
        term = f"{w.buffer(source)}[i]"
        term = term if wide == "float" else _up(term, wide, shift)
        terms.append(f"{'-' if sign < 0 else '+'} {term}")
    line = f"const {wide} v = {' '.join(terms).removeprefix('+ ')};"
    w.code += _loop(
        [f"i<{math.prod(result.shape)}"], [line, *w.chain(number, stage, value, "i", _channel(value.shape, "i"))]
    )


def _write_join(w: Source, number: int, stage: Stage, first: Step) -> None:
    assert isinstance(first, Join)
    value = w.program.values[stage.steps[0]]
    before, at = math.prod(value.shape[: first.dim]), 0
    row = math.prod(value.shape[first.dim :])
    for source, original, shift in zip(stage.sources, first.sources, first.shifts, strict=True):
        size = math.prod(w.program.values[original].shape[first.dim :])
        wide = "float" if value.floats else "int32_t" if value.bits < 31 else "int64_t"
        term = f"{w.buffer(source)}[j * {size} + i]"
        start = f"const {wide} v = {term if value.floats else _up(term, wide, shift)};"
        place = f"(j * {row} + {at} + i)"
        lines = [start, *w.chain(number, stage, value, place, _channel(value.shape, place))]
        w.code += _loop([f"j<{before}", f"i<{size}"], lines)
        at += size


def _write_move(w: Source, number: int, stage: Stage, first: Step) -> None:
    assert isinstance(first, Move)
    value = w.program.values[stage.steps[0]]
    table, kind = w.tables.add(f"s{number}_places", first.places), type_of(value)
    term = f"{w.buffer(stage.sources[0])}[{table}[i]]"
    if (first.places < 0).any():
        term = f"{table}[i] < 0 ? 0 : {term}"
    lines = [f"const {kind} v = {term};", *w.chain(number, stage, value, "i", _channel(value.shape, "i"))]
    w.code += _loop([f"i<{math.prod(value.shape)}"], lines)


_WRITERS: Sequence[tuple[type | tuple[type, ...], Callable[[Source, int, Stage, Any], None]]] = (
    (_ALONE, _write_elementwise),
    (Product, _write_product),
    (Pool, _write_pool),
    (Add, _write_add),
    (Join, _write_join),
    (Move, _write_move),
)
