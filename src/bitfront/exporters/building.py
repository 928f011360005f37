"""Adds steps to an integer program that is being made, with the range of what each gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from bitfront.errors import ExportError
from bitfront.exporters.oracle import apply
from bitfront.exporters.program import FLOAT_DIGITS, Cut, Program, Scale, Step, Value

#: Bits of the largest whole number that a step may have on its way.
MOST = 62


def largest(value: Value) -> int:
    """The largest absolute number of a value of whole numbers."""
    return max(-int(value.low.min(initial=0)), int(value.high.max(initial=0)))


def _with_sources(step: Step, sources: tuple[int, ...]) -> Step:
    return replace(step, sources=sources)


def pruned(
    input_shape: tuple[int, ...],
    steps: Sequence[Step],
    values: Sequence[Value],
    output: int,
    moved: Callable[[Step, tuple[int, ...]], Step] = _with_sources,
) -> Program:
    """A program without the steps that its output does not need.

    Args:
        input_shape: of one sample.
        steps, values: in order.
        output: the number of the value that is the output.
        moved: (step, sources) → the step with these sources.
    """
    needed, ahead = {output}, [output]
    while ahead:
        fresh = set(steps[ahead.pop()].sources) - needed
        needed |= fresh
        ahead += fresh
    kept = sorted(needed)
    place = {number: i for i, number in enumerate(kept)}
    remaining = tuple(moved(steps[k], tuple(place[s] for s in steps[k].sources)) for k in kept)
    return Program(input_shape, remaining, tuple(values[k] for k in kept), place[output])


class Builder:
    """The steps and values so far. Values are referred to by number."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.values: list[Value] = []
        #: The node of the captured graph whose steps are added.
        self.node = ""

    def emit(self, step: Step, point: int, divisor: int = 1) -> int:
        """Add a step whose result grows with its sources."""
        sources = [self.values[number] for number in step.sources]
        low, high = (
            apply(step, [getattr(source, end)[None] for source in sources], sources)[0] for end in ("low", "high")
        )
        return self.add(step, Value("", low.shape, low, high, point, divisor))

    def add(self, step: Step, value: Value) -> int:
        """Add a step that gives a value, which gets the name of the node."""
        self.steps.append(step)
        self.values.append(replace(value, name=self.node))
        return len(self.steps) - 1

    def emit_floats(self, step: Step) -> int:
        """Add a step whose result is float32 numbers, and grows with its sources."""
        sources = [self.values[number] for number in step.sources]
        low, high = (
            apply(step, [getattr(source, end)[None] for source in sources], sources)[0] for end in ("low", "high")
        )
        return self.add(step, Value("", low.shape, low, high, floats=True))

    def alike(self, step: Step, x: Value) -> int:
        """A step that changes no number of its source."""
        return self.emit_floats(step) if x.floats else self.emit(step, x.point, x.divisor)

    def in_floats(self, number: int) -> int:
        """A value as float32 numbers."""
        x = self.values[number]
        if x.floats:
            return number
        scale = np.asarray(np.ldexp(np.float32(1), -x.point)) if x.scale is None else x.scale
        return self.emit_floats(Scale((number,), scale, divisor=x.divisor))

    def plain(self, number: int) -> int:
        """A value that is float32 numbers if its scale is no power of two."""
        return number if self.values[number].scale is None else self.in_floats(number)

    def check_size(self, source: Value, shift: int) -> None:
        """Raises ExportError if a value that is shifted left has too many bits."""
        if largest(source) << shift >= 2**MOST:
            raise ExportError(f"{self.node}: its numbers need more than {MOST} bits; take formats of fewer bits")

    def cut(self, number: int) -> int:
        """A value as a float32 holds it."""
        value = self.values[number]
        if largest(value) <= 2**FLOAT_DIGITS:
            return number
        return self.emit(Cut((number,)), value.point, value.divisor)

    def aligned(self, sources: Sequence[int]) -> tuple[Sequence[int], int, tuple[int, ...]]:
        """(some values as numbers of one kind, their common binary point, by how much each is shifted for it)."""
        if any(self.values[number].floats for number in sources):
            return [self.in_floats(number) for number in sources], 0, (0,) * len(sources)
        given = [self.values[number] for number in sources]
        if any(x.divisor != 1 for x in given):
            raise ExportError(
                f"{self.node}: a mean without a format of its own is no whole number; give the operand one"
            )
        point = max(x.point for x in given)
        for x in given:
            self.check_size(x, point - x.point + 1)
        return sources, point, tuple(point - x.point for x in given)
