"""The loops of a C source: one for each stage of a program."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bitfront.exporters.c99.early import rounded_early
from bitfront.exporters.c99.numbers import Alone, added, raised
from bitfront.exporters.c99.stages import ALONE, Stage, coded_input, member, memory, stages
from bitfront.exporters.c99.tables import HeldWeight, Tables, spelled, type_of
from bitfront.exporters.program import (
    Add,
    Join,
    Move,
    Pool,
    Product,
    Program,
    Step,
    Value,
)


class Source:
    """Writes the loops, and collects the constants.

    Attributes:
        code: the lines of all loops but that of `coded`.
        coded: the number of the rounding of the input, where there is one alone.
        row: bytes of the buffer for a row of an unpacked weight.
        rounding: the lines that give its number ``i`` of ``input``, and the name of the variable that holds it.
    """

    def __init__(self, program: Program) -> None:
        self._begin(rounded_early(program))
        for number, stage in enumerate(self.stages):
            self._stage(number, stage)

    @classmethod
    def constants(cls, program: Program, number: int, stage: Stage) -> tuple[int, int]:
        """(bytes of the constants, bytes of an unpacked row) of one loop of a program whose roundings are early."""
        source = cls.__new__(cls)
        source._begin(program)
        source._stage(number, stage)
        return source.tables.bytes, source.row

    def _begin(self, program: Program) -> None:
        self.program, self.tables = program, Tables()
        self.stages, self.held = stages(self.program)
        self.memory = memory(self.program, self.stages, self.held)
        self.output = self.held.get(self.program.output, self.program.output)
        coded = coded_input(self.program)
        self.coded = None if coded == self.output else coded
        self.rounding: tuple[list[str], str] = [], ""
        self.code: list[str] = []
        self.row = 0

    @property
    def ram(self) -> int:
        """Bytes of all buffers."""
        return self.memory.bytes + self.row

    def at(self, number: int, index: str) -> str:
        """A number of a value, as C."""
        number = self.held.get(number, number)
        if number == self.output:
            return f"output[{index}]"
        kind, place = self.memory.places[number]
        return f"arena.{member(kind)}[{f'{place} + ' if place else ''}{index}]"

    def _stage(self, number: int, stage: Stage) -> None:
        first = self.program.steps[stage.steps[0]]
        if stage.steps == (self.coded,):
            self.rounding = _input_rounding(self, number, stage, first)
            return
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
        lines, variable = self.treated(number, stage, source, place, channel, skip)
        kind = type_of(self.program.values[stage.result])
        return [*lines, f"{self.at(stage.result, place)} = ({kind}){variable};"]

    def treated(
        self, number: int, stage: Stage, source: Value | None, place: str, channel: str, skip: int
    ) -> tuple[list[str], str]:
        """(the lines that treat the number ``v``, the variable with the result); as of ``chain``."""
        lines, current = [], source
        writer = Alone(self.tables, f"s{number}", place, channel, self.program)
        for before, k in zip((-1, *stage.steps), stage.steps, strict=False):
            if k in stage.steps[:skip]:
                continue
            step = self.program.steps[k]
            if isinstance(step, Add):
                terms = [writer.variable if s == before else self.at(s, place) for s in step.sources]
                lines.append(writer.added(step, terms, self.program.values[k]))
            else:
                lines += writer.lines(step, current, self.program.values[k])
            current = self.program.values[k]
        return lines, writer.variable


# --- the loops --------------------------------------------------------------------------------------------------------

_INDENT = "    "


def _loop(head: Iterable[str], body: Iterable[str], outside: int = 1) -> list[str]:
    """Nested loops around a body; `head` has ``index < count`` for each. `outside` is how deep they stand."""
    lines, depth = [], outside
    for each in head:
        index, count = each.split("<")
        lines.append(f"{_INDENT * depth}for (int32_t {index} = 0; {index} < {count}; {index}++) {{")
        depth += 1
    lines += [_INDENT * depth + line for line in body]
    while depth > outside:
        depth -= 1
        lines.append(_INDENT * depth + "}")
    return lines


def _channel(shape: tuple[int, ...], place: str) -> str:
    inner = math.prod(shape[1:])
    return place if inner == 1 else f"({place} / {inner})"


def _input(w: Source, number: int, first: Step) -> str:
    """The line that reads a number of the input."""
    places = getattr(first, "places", None)
    at = "i" if places is None else f"{w.tables.add(f's{number}_places', places)}[i]"
    return f"const float v = input[{at}];"


def _input_rounding(w: Source, number: int, stage: Stage, first: Step) -> tuple[list[str], str]:
    start, value = _input(w, number, first), w.program.values[stage.result]
    lines, variable = w.treated(number, stage, None, "i", _channel(value.shape, "i"), skip=0)
    return [start, *lines], variable


def _write_elementwise(w: Source, number: int, stage: Stage, first: Step) -> None:
    value = w.program.values[stage.result]
    if stage.sources:
        source = w.program.values[first.sources[0]]
        start = f"const {type_of(source)} v = {w.at(stage.sources[0], 'i')};"
    else:
        source, start = None, _input(w, number, first)
    body = w.chain(number, stage, source, "i", _channel(value.shape, "i"), skip=0)
    w.code += _loop([f"i<{math.prod(value.shape)}"], [start, *body])


def _taken(table: str, bits: int, index: str) -> str:
    return f"{table}[{index}]" if bits >= 8 else f"packed{bits}({table}, {index})"


def _write_product(w: Source, number: int, stage: Stage, first: Step) -> None:
    assert isinstance(first, Product)
    sums, x = w.program.values[stage.steps[0]], w.program.values[first.sources[0]]
    held = w.tables.add_weight(f"s{number}_weight", first.weight)
    wide = "int32_t" if sums.bits <= 32 else "int64_t"
    if first.window is not None:
        w.code += _convolution(w, number, stage, first, (held, wide))
        return
    (out, inner), rows = first.weight.shape, math.prod(x.shape[:-1])
    data = w.at(stage.sources[0], f"r * {inner} + k" if rows > 1 else "k")
    body = [f"{wide} v = 0;"]
    if held.table is not None:
        weight = _taken(held.table, held.bits, f"o * {inner} + k")
        body.append(f"for (int32_t k = 0; k < {inner}; k++) v += ({wide}){weight} * {data};")
    body += _listed(held, [f"v += ({wide}){_taken(held.values, held.value_bits, 'e')} * {data};"])
    place = f"(r * {out} + o)" if rows > 1 else "o"
    body += w.chain(number, stage, sums, place, _channel(sums.shape, place))
    w.code += _loop(([f"r<{rows}"] if rows > 1 else []) + [f"o<{out}"], body)


def _listed(held: HeldWeight, inside: list[str]) -> list[str]:
    """The loop over the list of row ``o``; `inside` may use the entry ``e`` and its place ``k`` in the row."""
    if held.starts is None:
        return []
    loop = f"for (int32_t e = {held.starts}[o], k = 0; e < {held.starts}[o + 1]; e++) {{"
    return [loop, f"{_INDENT}k += {held.gaps}[e];", *(_INDENT + line for line in inside), "}"]


def plane(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Channels, rows and columns of a sample; a sequence has one row."""
    return (shape[0], 1, shape[1]) if len(shape) == 2 else (shape[0], shape[1], shape[2])


def pairs(values: tuple[int, ...], fill: int) -> tuple[int, int]:
    """A setting of a window for rows and columns; `fill` for the one row of a sequence."""
    return (fill, values[0]) if len(values) == 1 else (values[0], values[1])


def _taps(first: Any, inside: list[str], sizes: tuple[int, int]) -> list[str]:
    """The loops over the taps of a window around (y, x); `inside` may use ``iy``, ``ix``, ``ky`` and ``kx``."""
    kernel, lines = pairs(first.window.kernel, 1), []
    for axis, k in enumerate(("ky", "kx")):
        pad = _INDENT * axis
        lines.append(f"{pad}for (int32_t {k} = 0; {k} < {kernel[axis]}; {k}++) {{")
        lines += [f"{pad}{_INDENT}{line}" for line in _seen(first, axis, sizes[axis])]
    return [*lines, *(_INDENT * 2 + line for line in inside), f"{_INDENT}}}", "}"]


def _seen(first: Any, axis: int, size: int) -> list[str]:
    """The lines that give the row (axis 0) or the column (1) of a tap, and go on where it is padding."""
    window, at = first.window, "yx"[axis]
    stride, before, dilation = pairs(window.stride, 1), pairs(window.before, 0), pairs(window.dilation, 1)
    place = f"{at} * {stride[axis]} + k{at} * {dilation[axis]} - {before[axis]}"
    lines = [f"const int32_t i{at} = {place};"]
    if before[axis] or pairs(window.after, 0)[axis]:
        lines.append(f"if (i{at} < 0 || i{at} >= {size}) continue;")
    return lines


def _convolution(w: Source, number: int, stage: Stage, first: Product, how: tuple[HeldWeight, str]) -> list[str]:
    held, wide = how
    assert first.window is not None
    sums, source = w.program.values[stage.steps[0]], w.program.values[first.sources[0]]
    (out, height, width_), (_, rows, columns) = plane(sums.shape), plane(source.shape)
    inner, kernel = first.weight.shape[1], pairs(first.window.kernel, 1)
    group = f"(o / {out // first.groups}) * {inner} + c" if first.groups > 1 else "c"
    index = f"((o * {inner} + c) * {kernel[0]} + ky) * {kernel[1]} + kx"
    data = w.at(stage.sources[0], f"(({group}) * {rows} + iy) * {columns} + ix")
    place = f"((o * {height} + y) * {width_} + x)"
    body, before = [f"{wide} v = 0;"], []
    if held.table is not None:
        weight = _taken(held.table, held.bits, index)
        if unpacked_rows(held.bits, height * width_):
            # Every place takes the same row of the weight, so it is unpacked once.
            length = first.weight[0].size
            w.row = max(w.row, length)
            unpacked = f"row[k] = (int8_t){_taken(held.table, held.bits, f'o * {length} + k')};"
            before = [f"for (int32_t k = 0; k < {length}; k++) {unpacked}"]
            weight = f"row[(c * {kernel[0]} + ky) * {kernel[1]} + kx]"
        taps = _taps(first, [f"v += ({wide}){weight} * {data};"], (rows, columns))
        body += [f"for (int32_t c = 0; c < {inner}; c++) {{", *(_INDENT + t for t in taps), "}"]
    taken = [
        f"const int32_t c = k / {kernel[0] * kernel[1]}, ky = k / {kernel[1]} % {kernel[0]}, kx = k % {kernel[1]};",
        *_seen(first, 0, rows),
        *_seen(first, 1, columns),
        f"v += ({wide}){_taken(held.values, held.value_bits, 'e')} * {data};",
    ]
    body += [*_listed(held, taken), *w.chain(number, stage, sums, place, "o")]
    return _loop([f"o<{out}"], [*before, *_loop([f"y<{height}", f"x<{width_}"], body, 0)])


def unpacked_rows(bits: int, places: int) -> bool:
    """Whether a convolution unpacks a row of its weight for all places."""
    return bits < 8 and places > 1


def _write_pool(w: Source, number: int, stage: Stage, first: Step) -> None:
    assert isinstance(first, Pool)
    sums, source = w.program.values[stage.steps[0]], w.program.values[first.sources[0]]
    (channels, height, columns), (_, rows, row) = plane(sums.shape), plane(source.shape)
    data = w.at(stage.sources[0], f"(o * {rows} + iy) * {row} + ix")
    if first.kind == "sum":
        wide = "int32_t" if sums.bits <= 32 else "int64_t"
        start, inside = f"{wide} v = 0;", [f"v += {data};"]
    else:
        kind = type_of(source)
        least = "-INFINITY" if source.floats else f"({kind})({spelled(int(source.low.min(initial=0)))})"
        start, inside = f"{kind} v = {least};", [f"if ({data} > v) v = {data};"]
    place = f"((o * {height} + y) * {columns} + x)"
    body = [start, *_taps(first, inside, (rows, row)), *w.chain(number, stage, sums, place, "o")]
    w.code += _loop([f"o<{channels}", f"y<{height}", f"x<{columns}"], body)


def _write_add(w: Source, number: int, stage: Stage, first: Step) -> None:
    assert isinstance(first, Add)
    value, result = w.program.values[stage.steps[0]], w.program.values[stage.result]
    wide, total = added(first, [w.at(source, "i") for source in stage.sources], value)
    line = f"const {wide} v = {total};"
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
        term = w.at(source, f"j * {size} + i")
        start = f"const {wide} v = {term if value.floats else raised(term, wide, shift)};"
        place = f"(j * {row} + {at} + i)"
        lines = [start, *w.chain(number, stage, value, place, _channel(value.shape, place))]
        w.code += _loop([f"j<{before}", f"i<{size}"], lines)
        at += size


def _write_move(w: Source, number: int, stage: Stage, first: Step) -> None:
    assert isinstance(first, Move)
    value = w.program.values[stage.steps[0]]
    table, kind = w.tables.add(f"s{number}_places", first.places), type_of(value)
    term = w.at(stage.sources[0], f"{table}[i]")
    if (first.places < 0).any():
        term = f"{table}[i] < 0 ? 0 : {term}"
    lines = [f"const {kind} v = {term};", *w.chain(number, stage, value, "i", _channel(value.shape, "i"))]
    w.code += _loop([f"i<{math.prod(value.shape)}"], lines)


_WRITERS: Sequence[tuple[type | tuple[type, ...], Callable[[Source, int, Stage, Any], None]]] = (
    (ALONE, _write_elementwise),
    (Product, _write_product),
    (Pool, _write_pool),
    (Add, _write_add),
    (Join, _write_join),
    (Move, _write_move),
)
