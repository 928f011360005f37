"""Which steps of a program are one loop, and where in memory its values lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitfront.exporters.c99.tables import SIZES, type_of
from bitfront.exporters.program import (
    Add,
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
    """Steps that are one loop: the first reads buffers, the others treat each number alone, or add others to it.

    Attributes:
        steps: numbers of the steps, in order; the result of the last is stored.
        sources: numbers of the values that the first step reads.
        added: numbers of the values that are added by later ones.
    """

    steps: tuple[int, ...]
    sources: tuple[int, ...]
    added: tuple[int, ...] = ()

    @property
    def result(self) -> int:
        """The number of the value that is stored."""
        return self.steps[-1]


def coded_input(program: Program) -> int | None:
    """The number of the rounding of the input, where there is one, so that the network can take rounded inputs; None
    where there are several, or where it is the output."""
    found = [k for k, step in enumerate(program.steps) if not step.sources]
    return found[0] if len(found) == 1 and len(program.steps) > 1 and found[0] != program.output else None


def stages(program: Program) -> tuple[list[Stage], dict[int, int]]:
    """(the loops of a program in order, value → the value in whose buffer it lies). A step that changes only the shape
    is no loop; the one rounding of the input is one of its own."""
    users: dict[int, int] = {program.output: 1}
    for step in program.steps:
        for source in step.sources:
            users[source] = users.get(source, 0) + 1
    held: dict[int, int] = {}
    result: list[Stage] = []
    done: set[int] = set()
    alone = coded_input(program)
    followers = {s: k for k, step in enumerate(program.steps) for s in step.sources}
    for k, step in enumerate(program.steps):
        if k in done:
            continue
        if isinstance(step, Move) and step.reshapes:
            held[k] = held.get(step.sources[0], step.sources[0])
            continue
        chain = [k]
        while (
            chain != [alone]
            and chain[-1] != program.output
            and users.get(chain[-1]) == 1
            and _goes_on(program, chain, followers.get(chain[-1]))
        ):
            chain.append(followers[chain[-1]])
        done.update(chain)
        inside, later = set(chain), [s for j in chain[1:] for s in program.steps[j].sources]
        sources, added = step.sources, (s for s in later if s not in inside)
        result.append(Stage(tuple(chain), *(tuple(held.get(s, s) for s in some) for some in (sources, added))))
    return result, held


def _goes_on(program: Program, chain: list[int], after: int | None) -> bool:
    """Whether the loop of a chain can do the step `after` too: it treats each number alone, or adds what is there when
    the loop begins."""
    if after is None:
        return False
    step = program.steps[after]
    return isinstance(step, ALONE) or (
        isinstance(step, Add) and all(s == chain[-1] or s < chain[0] for s in step.sources)
    )


@dataclass(frozen=True, eq=False)
class Memory:
    """Where the values of a program lie: in one array of bytes, which C sees as a union of arrays of every type.

    Attributes:
        places: value → (its type, its place in numbers of that type); without the output, which the caller has.
        bytes: of the array.
    """

    places: dict[int, tuple[str, int]]
    bytes: int

    @property
    def kinds(self) -> tuple[str, ...]:
        """The types in it."""
        return tuple(sorted({kind for kind, _ in self.places.values()}))


def member(kind: str) -> str:
    """The array of a type in the union."""
    return "f32" if kind == "float" else kind.removesuffix("_t").replace("uint", "u").replace("int", "i")


def memory(program: Program, loops: Sequence[Stage], held: dict[int, int]) -> Memory:
    """Where values lie. A place is free again behind the last loop that reads it. The largest value is placed first,
    each at the lowest place at which nothing lies that is needed at the same time."""
    output = held.get(program.output, program.output)
    first = {stage.result: i for i, stage in enumerate(loops)}
    last = dict(first)
    for i, stage in enumerate(loops):
        for source in (*stage.sources, *stage.added):
            last[source] = i
    kinds = {k: type_of(program.values[k]) for k in first if k != output}
    sizes = {k: SIZES[kind] * math.prod(program.values[k].shape) for k, kind in kinds.items()}
    begins: dict[int, int] = {}
    for k in sorted(kinds, key=lambda k: (-sizes[k], k)):
        # What is read in a loop is still in use while its result is written.
        busy = sorted(
            (at, at + sizes[other])
            for other, at in begins.items()
            if first[other] <= last[k] and first[k] <= last[other]
        )
        step, place = SIZES[kinds[k]], 0
        for start, end in busy:
            if place + sizes[k] <= start:
                break
            place = max(place, -(-end // step) * step)
        begins[k] = place
    widest = max((SIZES[kind] for kind in kinds.values()), default=1)
    used = max((at + sizes[k] for k, at in begins.items()), default=0)
    places = {k: (kinds[k], at // SIZES[kinds[k]]) for k, at in begins.items()}
    return Memory(places, -(-used // widest) * widest)
