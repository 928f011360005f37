"""Types and constants of a C source: the smallest type that holds a value, packed weights, numbers as C spells them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront.exporters.program import (
    Int,
    Value,
    width,
)

_INTEGERS = (8, 16, 32, 64)


def type_of(value: Value) -> str:
    """The C type that holds every number of a value."""
    return "float" if value.floats else integer_type(*value.ends)


def integer_type(low: int, high: int) -> str:
    """The smallest C type for numbers from `low` to `high`."""
    bits = width(low, high)
    size = next(s for s in _INTEGERS if bits <= s)
    return f"{'' if low < 0 else 'u'}int{size}_t"


SIZES = {"float": 4} | {f"{u}int{s}_t": s // 8 for s in _INTEGERS for u in ("", "u")}


@dataclass(frozen=True, eq=False)
class HeldWeight:
    """How a weight is held: each number is the sum of a packed one, in a table of all, and of one in a list of few.

    Attributes:
        table: the packed numbers, a row after the other; None where the list has all that is not 0.
        bits: of a packed number.
        starts: where the list of each row begins, and the end of the last; None without lists.
        gaps: by how much the place in the row grows, for each entry.
        values: what is added there, packed.
        value_bits: of such a number.
        entries: of all lists.
    """

    table: str | None
    bits: int
    starts: str | None = None
    gaps: str = ""
    values: str = ""
    value_bits: int = 8
    entries: int = 0


#: Largest gap between two entries of a list.
_GAP = 255


@dataclass
class Tables:
    """The constants of a source, and the bytes that they take."""

    bytes: int = 0
    _arrays: dict[str, tuple[str, NDArray[Any]]] = field(default_factory=dict)

    @property
    def lines(self) -> list[str]:
        """The constants, as C."""
        lines = []
        for name, (kind, values) in self._arrays.items():
            text = [spelled(v) for v in values.tolist()] or ["0"]
            rows = [", ".join(text[i : i + 16]) for i in range(0, len(text), 16)]
            lines.append(f"static const {kind} {name}[{len(text)}] = {{\n    " + ",\n    ".join(rows) + "};")
        return lines

    def add(self, name: str, values: NDArray[Any]) -> str:
        """A constant array of numbers. Returns its name."""
        flat = values.ravel()
        kind = "float" if flat.dtype.kind == "f" else integer_type(int(flat.min(initial=0)), int(flat.max(initial=0)))
        return self._put(name, kind, flat)

    def add_weight(self, name: str, weight: Int) -> HeldWeight:
        """A weight, shape (rows, ...), in the form that takes the fewest bytes.

        All numbers are packed in so many bits; what some of them have beyond these is in lists, a list for each row. So
        few wide numbers among narrow ones, as learned bits have them, do not make all of them wide. In no bits at all,
        the lists have all numbers that are not 0.
        """
        rows = weight.reshape(len(weight), -1)
        least = _packed_bits(rows)
        sizes = {bits: _weight_bytes(rows, bits) for bits in (0, 2, 4, 8, 16, 32) if bits <= least}
        # Where it saves nothing, the form with fewer lists, which is the faster one.
        bits = min(sizes, key=lambda b: (sizes[b], -b))
        table = self._pack(f"{name}", rows, bits) if bits else None
        rest = rows - _kept(rows, bits)
        if not rest.any() and bits:
            return HeldWeight(table, bits)
        starts, gaps, values = _lists(rest)
        value_bits = _packed_bits(values)
        return HeldWeight(
            table,
            bits,
            self.add(f"{name}_starts", starts),
            self._put(f"{name}_gaps", "uint8_t", gaps),
            self._pack(f"{name}_values", values, value_bits),
            value_bits,
            len(gaps),
        )

    def _pack(self, name: str, numbers: Int, bits: int) -> str:
        flat = _kept(numbers, bits).ravel()
        if bits >= 8:
            return self._put(name, f"int{bits}_t", flat)
        each = 8 // bits
        padded = np.concatenate([flat, np.zeros(-len(flat) % each, np.int64)]).reshape(-1, each) & (2**bits - 1)
        return self._put(name, "uint8_t", (padded << (bits * np.arange(each))).sum(axis=1))

    def _put(self, name: str, kind: str, values: NDArray[Any]) -> str:
        while name in self._arrays:
            name += "_"
        self._arrays[name] = kind, values
        self.bytes += SIZES[kind] * max(1, len(values))
        return name


def _packed_bits(numbers: Int) -> int:
    """Bits in which every number is packed."""
    bits = max(width(min(int(numbers.min(initial=0)), -1), int(numbers.max(initial=0))), 2)
    return next(b for b in (2, 4, 8, 16, 32) if bits <= b)


def _kept(numbers: Int, bits: int) -> Int:
    """What of each number so many bits hold."""
    return np.clip(numbers, -(1 << (bits - 1)), (1 << (bits - 1)) - 1) if bits else np.zeros_like(numbers)


def _weight_bytes(rows: Int, bits: int) -> int:
    """Bytes of a weight of which so many bits of each number are packed, and the rest is in lists."""
    dense = max(1, -(-rows.size * bits // 8)) if bits else 0
    rest = rows - _kept(rows, bits)
    if not rest.any() and bits:
        return dense
    starts, gaps, values = _lists(rest)
    lists = starts.size * SIZES[integer_type(0, int(starts[-1]))] + max(1, gaps.size)
    return dense + lists + max(1, -(-values.size * _packed_bits(values) // 8))


def _lists(rows: Int) -> tuple[Int, Int, Int]:
    """(where the list of each row begins, and the end of the last; the gap before each entry; its number). Between
    entries that are far apart there are others, with the number 0."""
    row, place = np.nonzero(rows)
    before = np.where(np.diff(row, prepend=-1) != 0, 0, np.roll(place, 1)) if len(row) else place
    gaps = place - before
    far = np.maximum(0, (gaps - 1) // _GAP)
    last = np.cumsum(far + 1) - 1
    total = int(last[-1]) + 1 if len(last) else 0
    all_gaps, values = np.full(total, _GAP, np.int64), np.zeros(total, np.int64)
    all_gaps[last], values[last] = gaps - _GAP * far, rows[row, place]
    counts = np.bincount(row, weights=far + 1, minlength=len(rows)).astype(np.int64)
    return np.concatenate([[0], np.cumsum(counts)]), all_gaps, values


def spelled(value: float) -> str:
    """A number as C has it."""
    if isinstance(value, int):
        if value == -(2**63):
            return "(-9223372036854775807LL - 1)"
        return f"{value}LL" if abs(value) >= 2**31 - 1 else str(value)
    return "INFINITY" if math.isinf(value) and value > 0 else "-INFINITY" if math.isinf(value) else f"{value.hex()}f"
