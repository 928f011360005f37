"""Types and constants of a C source: the smallest type that holds a value, packed weights, numbers as C spells them."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
        text = [spelled(v) for v in values] or ["0"]
        rows = [", ".join(text[i : i + 16]) for i in range(0, len(text), 16)]
        self.lines.append(f"static const {kind} {name}[{max(1, count)}] = {{\n    " + ",\n    ".join(rows) + "};")
        self.bytes += SIZES[kind] * max(1, count)
        return name


def spelled(value: float) -> str:
    """A number as C has it."""
    if isinstance(value, int):
        if value == -(2**63):
            return "(-9223372036854775807LL - 1)"
        return f"{value}LL" if abs(value) >= 2**31 - 1 else str(value)
    return "INFINITY" if math.isinf(value) and value > 0 else "-INFINITY" if math.isinf(value) else f"{value.hex()}f"
