"""What the C of a candidate needs: bytes of flash and of RAM, and cycles; without writing it.

The numbers are those of the source that ``loops.Source`` writes. What loops need is kept by the loop, so that of many
candidates each loop is looked at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bitfront.exporters.c99.cycles import cycles
from bitfront.exporters.c99.early import Memo, rounded_early
from bitfront.exporters.c99.loops import Source
from bitfront.exporters.c99.stages import Stage, memory, stages
from bitfront.exporters.program import Program
from bitfront.exporters.repeated import Programs
from bitfront.exporters.walking import SiteFormats
from bitfront.graph import Graph

#: Bytes of ranges that are kept between candidates, and candidates whose memory is; beyond that all is forgotten.
_MOST, _CANDIDATES = 2**29, 100_000


@dataclass(frozen=True)
class Needs:
    """What a source needs.

    Attributes:
        flash: bytes of constants, without the code.
        ram: bytes of all buffers.
        cycles: for one sample, by the model of ``cycles.py``.
    """

    flash: int
    ram: int
    cycles: float


def needs(program: Program) -> Needs:
    """What the C of a program needs, as ``Source`` writes it."""
    source = Source(program)
    return Needs(source.tables.bytes, source.ram, sum(cycles(source.program, stage) for stage in source.stages))


class CandidateNeeds:
    """What the C of each candidate of a network needs.

    Args:
        graph: the captured model, with its weights; on the CPU. It must not change.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph, self._asked = graph, 0
        self._forget()

    def _forget(self) -> None:
        self._programs = Programs(self._graph)
        self._early: Memo = {}
        self._loops: dict[tuple[int, ...], tuple[object, int, int, float]] = {}
        self._memory: dict[tuple[object, ...], tuple[object, int]] = {}

    def of(self, formats: Mapping[str, SiteFormats]) -> Needs:
        """What a candidate needs: as ``needs`` of its program with full ranges.

        Args:
            formats: site name → formats by operand, calibrated.

        Raises:
            ExportError: it has no program; the message names the node and says what to do.
        """
        self._asked += 1
        if self._asked % 64 == 0 and (self._programs.bytes > _MOST or len(self._memory) > _CANDIDATES):
            self._forget()
        program = rounded_early(self._programs.of(formats), self._early)
        loops, held = stages(program)
        flash, row, total = 0, 0, 0.0
        for number, stage in enumerate(loops):
            alive = (
                *(program.steps[k] for k in stage.steps),
                *(program.values[k] for k in (s for k in stage.steps for s in (k, *program.steps[k].sources))),
            )
            key = tuple(map(id, alive))
            if key not in self._loops:
                self._loops[key] = alive, *Source.constants(program, number, stage), cycles(program, stage)
            _, constants, unpacked, taken = self._loops[key]
            flash, row, total = flash + constants, max(row, unpacked), total + taken
        return Needs(flash, self._ram(program, loops, held) + row, total)

    def _ram(self, program: Program, loops: list[Stage], held: dict[int, int]) -> int:
        values = [program.values[stage.result] for stage in loops]
        order = tuple((stage.steps, stage.sources, stage.added) for stage in loops)
        key = (*map(id, values), order, held.get(program.output, program.output))
        if key not in self._memory:
            self._memory[key] = values, memory(program, loops, held).bytes
        return self._memory[key][1]
