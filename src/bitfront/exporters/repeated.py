"""The programs of many candidates of one network: what candidates share is made once.

The steps of a node depend on its formats and on the values that it takes, so they are kept by these. Equal values are
the same object, and so are equal steps: whoever counts something per step can keep it by identity.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from torch import fx

from bitfront.errors import ExportError
from bitfront.exporters.building import pruned
from bitfront.exporters.lowering import reader_of
from bitfront.exporters.program import Program, Step, Value, Window
from bitfront.exporters.walking import SiteFormats, Walker
from bitfront.graph import Graph

#: What a node gives: the number of a value, or several, or a part of the input in float.
_Numbers = Any


@dataclass(frozen=True, eq=False)
class _Made:
    """What was made of a node: its steps, whose sources are the values that it takes, in order, and after them its
    results; and the numbers that it gives, counted likewise. Or why it has no form."""

    steps: tuple[Step, ...] = ()
    values: tuple[Value, ...] = ()
    numbers: _Numbers = None
    refused: str = ""


class Programs:
    """Makes the program of one candidate after the other, with full ranges (``lowering.lowered``).

    Otherwise what a layer may give depends on all layers before it, and little would be the same for two candidates.

    Args:
        graph: the captured model, with its weights; on the CPU. It must not change.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._kept: Walker | None = None
        self._made: dict[tuple[object, ...], _Made] = {}
        #: Content → the one object that has it.
        self._values: dict[object, Value] = {}
        self._steps: dict[object, Step] = {}
        self._placed: dict[tuple[int, tuple[int, ...]], tuple[Step, Step]] = {}

    @property
    def bytes(self) -> int:
        """Bytes of the ranges that are kept."""
        return sum(value.low.nbytes + value.high.nbytes for value in self._values.values())

    def of(self, formats: Mapping[str, SiteFormats]) -> Program:
        """The program of a candidate.

        Args:
            formats: site name → formats by operand, calibrated.

        Raises:
            ExportError: as of ``lowering.lowered``.
        """
        if self._kept is None:
            kept = _Kept(self._graph)
            kept.walk()
            self._kept = kept
        steps: list[Step] = []
        values: list[Value] = []
        numbers: dict[fx.Node, _Numbers] = {}
        for n in self._kept.graph.nodes:
            taken = [numbers[source] for source in n.all_input_nodes if source in numbers]
            if n.op != "placeholder" and not taken:
                continue
            flat = [k for given in taken for k in _each(given)]
            key = (n, tuple(formats.get(n.name, {}).items()), tuple(_token(given, values) for given in taken))
            if key not in self._made:
                self._made[key] = self._make(n, formats, numbers, values)
            made = self._made[key]
            if made.refused:
                raise ExportError(made.refused)
            place = [*flat, *range(len(steps), len(steps) + len(made.steps))]
            for step, value in zip(made.steps, made.values, strict=True):
                steps.append(self._at(step, tuple(place[s] for s in step.sources)))
                values.append(value)
            if made.numbers is not None:
                numbers[n] = _moved(made.numbers, place)
        (output,) = (numbers[n] for n in numbers if n.op == "output")
        return pruned(self._graph.sample_shape, steps, values, output, self._at)

    def _make(
        self, n: fx.Node, formats: Mapping[str, SiteFormats], numbers: Mapping[fx.Node, _Numbers], values: list[Value]
    ) -> _Made:
        assert self._kept is not None
        reader = reader_of(self._graph, formats, full_ranges=True)
        reader.env, reader.out = self._kept.env, self._kept.env[n]
        for source in n.all_input_nodes:
            if source in numbers:
                first = len(reader.build.steps)
                for k in _each(numbers[source]):
                    reader.build.steps.append(Step(()))
                    reader.build.values.append(values[k])
                given = numbers[source]
                local: _Numbers = given
                if isinstance(given, int):
                    local = first
                elif isinstance(given, tuple):
                    local = tuple(range(first, first + len(given)))
                reader.numbers[source] = local
        count = len(reader.build.steps)
        try:
            reader.visit(n, reader.env[n])
        except ExportError as error:
            return _Made(refused=str(error))
        steps = tuple(self._steps.setdefault(_content(step), step) for step in reader.build.steps[count:])
        made = tuple(self._values.setdefault(_content(value), value) for value in reader.build.values[count:])
        return _Made(steps, made, reader.numbers.get(n))

    def _at(self, step: Step, sources: tuple[int, ...]) -> Step:
        """A step with these sources; the same object each time."""
        if step.sources == sources:
            return step
        key = id(step), sources
        if key not in self._placed:
            self._placed[key] = step, replace(step, sources=sources)
        return self._placed[key][1]


class _Kept(Walker):
    """Runs the graph once, and keeps the value of every node on the sample."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph, {}, "computed in whole numbers", "has no form in whole numbers")
        self.garbage_collect_values = False

    def visit(self, n: fx.Node, value: Any) -> None:
        """Nothing."""


def _content(thing: object) -> object:
    """What is equal for equal steps, values and arrays."""
    if isinstance(thing, np.ndarray):
        return thing.dtype.str, thing.shape, hashlib.sha256(thing.tobytes()).digest()
    if isinstance(thing, (Step, Value, Window)):
        return type(thing), *(_content(getattr(thing, field.name)) for field in fields(thing))
    return thing


def _each(given: _Numbers) -> tuple[int, ...]:
    """The numbers of values in what a node gives."""
    return (given,) if isinstance(given, int) else given if isinstance(given, tuple) else ()


def _token(given: _Numbers, values: list[Value]) -> object:
    """What tells apart what a node takes. A part of the input is one object for all candidates."""
    return tuple(id(values[k]) for k in _each(given)) or id(given)


def _moved(given: _Numbers, place: list[int]) -> _Numbers:
    """Numbers of a node, in the program."""
    if isinstance(given, int):
        return place[given]
    return tuple(place[k] for k in given) if isinstance(given, tuple) else given
