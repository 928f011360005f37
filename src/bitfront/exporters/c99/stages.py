"""Which steps of a program are one loop, and where in memory its values lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitfront.exporters.c99.tables import type_of
from bitfront.exporters.program import (
    Cut,
    Leak,
    Limit,
    Move,
    Offset,
    Program,
    Quantize,
    Round,
    Scale,
)

#: Steps that treat each number alone.
ALONE = (Offset, Cut, Limit, Leak, Round, Quantize, Scale)


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
    followers = {step.sources[0]: k for k, step in enumerate(program.steps) if step.sources and isinstance(step, ALONE)}
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


def pool_name(kind: str) -> str:
    """The buffer of all values of a type."""
    return "pool_" + kind.removesuffix("_t")


def memory(
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
