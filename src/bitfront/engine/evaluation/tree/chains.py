"""Convolutions and sums that follow each other: one call of a kernel takes a few samples at a time through all of them.

Computed step by step, the states of a step are written to memory before the next step reads them. In a chain they stay
in the cache, only what later steps need is written, and there is one call for all steps. It goes through the candidates
one after the other, so that a state is used soon after it was computed. Each value is computed as in a separate call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from bitfront import kernels
from bitfront.engine.evaluation.tree import rounding
from bitfront.engine.evaluation.tree.activations import BatchedActivations, Ints, Norm, norm_mode, repeated, room
from bitfront.engine.evaluation.tree.convolution import Convolutions, addresses
from bitfront.engine.evaluation.tree.program import Program, Step
from bitfront.engine.evaluation.tree.schedule import Schedule
from bitfront.kernels import convolution
from bitfront.kernels.convolution import Geometry, Stage

#: Fewer steps are computed one by one.
SHORTEST = 2
Live = Mapping[int, BatchedActivations]


@dataclass(frozen=True)
class _Value:
    """The value of a step: that of another step, with a batch norm and a ReLU that are postponed.

    Attributes:
        base: the step whose states are in memory; it is in the chain, or before it.
        size: height, width and channels.
    """

    base: int
    size: tuple[int, int, int]
    norm: Norm | None = None
    rectify: bool = False
    ceiling: float = math.inf


@dataclass(eq=False)
class Chain:
    """Steps from a convolution on that are computed together for a range of candidates.

    Attributes:
        last: the last step.
        computed: the convolutions and sums among the steps, each with its inputs.
        values: the values of all steps of the chain, and of those before it that it takes.
    """

    last: int
    computed: dict[int, tuple[_Value, ...]] = field(default_factory=dict)
    values: dict[int, _Value] = field(default_factory=dict)

    @property
    def last_computed(self) -> int:
        """The last convolution or sum."""
        return max(self.computed)


class Chains:
    """The chains of one pass.

    Args:
        program: the steps.
        convolutions: those that the kernel computes.
        schedule: the states that candidates need.
        samples: their number.
    """

    def __init__(self, program: Program, convolutions: Convolutions, schedule: Schedule, samples: int) -> None:
        self._program, self._convolutions, self._schedule = program, convolutions, schedule
        self._samples = samples

    def starting(self, first: int, start: int, stop: int, live: Live) -> Chain | None:
        """The longest chain for a range of candidates that starts with a step; None if there is none."""
        chain = Chain(first)
        for i in range(first, len(self._program.steps)):
            if not self._extended(chain, i, start, stop, live):
                break
            chain.last = i
        return chain if len(chain.computed) >= SHORTEST else None

    def _extended(self, chain: Chain, i: int, start: int, stop: int, live: Live) -> bool:
        """Add a step to a chain; False if it cannot be in it."""
        step, states = self._program.steps[i], self._schedule.states[i]
        kind = step.kind
        if kind == "convolution":
            x = self._value(chain, step.inputs[0], live)
            if x is None or not states.monotone or (x.norm is not None and not norm_mode()):
                return False
            needed = states.needed(start, stop)
            if not self._convolutions.computes(step, states, needed, x.rectify):
                return False
            height, width = self._geometry(step, x).out
            chain.computed[i] = (x,)
            chain.values[i] = _Value(i, (height, width, step.shape[0]))
            return True
        if kind == "arithmetic":
            return states.monotone and self._extended_by_sum(chain, i, start, stop, live)
        value = chain.values.get(step.inputs[0]) if len(step.inputs) == 1 else None
        if value is None or value.base not in chain.computed or step.corrected:
            return False
        needed = states.needed(start, stop)
        if len(needed) != len(self._schedule.states[step.inputs[0]].needed(start, stop)):
            return False
        if kind == "rectifier" and (step.group is None or self._program.unformatted(step, states.data[needed])):
            value = replace(value, rectify=True, ceiling=min(value.ceiling, step.ceiling))
        elif kind == "norm" and value.norm is None and not value.rectify and norm_mode():
            value = replace(value, norm=self._program.norm(step))
        elif kind != "identity":
            return False
        chain.values[i] = value
        return True

    def _extended_by_sum(self, chain: Chain, i: int, start: int, stop: int, live: Live) -> bool:
        step, states, program = self._program.steps[i], self._schedule.states[i], self._program
        assert step.site is not None
        merge, needed = step.site.operation.merge, states.needed(start, stop)
        sources = _operands(step)
        if len(sources) != 2 or merge is None or merge.function is not torch.add:
            return False
        if not program.unformatted(step, states.data[needed]):
            return False
        if not program.unformatted_second(step, states.parameters[needed]):
            return False
        a, b = (self._value(chain, step.inputs[k], live) for k in sources)
        if a is None or b is None or a.size != b.size or min(a.ceiling, b.ceiling) < math.inf:
            return False
        if (a.norm is not None or b.norm is not None) and not norm_mode():
            return False
        chain.computed[i], chain.values[i] = (a, b), _Value(i, a.size)
        return True

    def _value(self, chain: Chain, i: int, live: Live) -> _Value | None:
        """The value of an input; None if it cannot be taken."""
        if i not in chain.values:
            x = live.get(i)
            if x is None or len(x.features) != 3:
                return None
            depth, height, width = x.features
            pending = (x.norm, x.rectify, x.ceiling) if x.layout == "last" else (None, False, math.inf)
            chain.values[i] = _Value(i, (height, width, depth), *pending)
        return chain.values[i]

    def _geometry(self, step: Step, x: _Value) -> Geometry:
        return self._convolutions.geometry(step, x.size[:2], 1)

    def used(self, chain: Chain) -> list[int]:
        """The steps of a chain whose values later steps take."""
        first = next(iter(chain.computed))
        return [i for i in chain.values if i >= first and self._program.last_use[i] > chain.last]

    def beside(self, chain: Chain) -> int:
        """Number of values per sample that a chain leaves, without those of its last convolution or sum."""
        bases = {chain.values[i].base for i in self.used(chain)} - {chain.last_computed}
        return sum(math.prod(chain.values[i].size) for i in bases)

    def run(self, chain: Chain, start: int, stop: int, live: Live) -> dict[int, BatchedActivations] | None:
        """The values of the chain's steps that later steps take; None if an input has no whole number."""
        return _Run(self, chain, start, stop, live)()


class _Run:
    """The tables that the kernel needs to compute a chain for a range of candidates."""

    def __init__(self, chains: Chains, chain: Chain, start: int, stop: int, live: Live) -> None:
        self._program, self._schedule, self._samples = chains._program, chains._schedule, chains._samples
        self._convolutions, self._chain, self._chains = chains._convolutions, chain, chains
        self._range = start, stop
        self._needed = {i: self._schedule.states[i].needed(start, stop) for i in chain.values}
        self._outside = {
            i: live[i].turned("last") for i, v in chain.values.items() if v.base == i and i not in chain.computed
        }
        counts = [len(self._needed[i]) for i in chain.computed]
        counts += [len(x.states) for x in self._outside.values()]
        ends = np.cumsum([0, *counts]).tolist()
        #: The number of the first place of each step.
        self._first = dict(zip([*chain.computed, *self._outside], ends, strict=False))
        self._inside = ends[len(chain.computed)]
        self._places = np.zeros((ends[-1], 4), dtype=np.int64)
        self._products = np.zeros((self._inside, 5), dtype=np.int64)
        self._stages: list[Stage] = []
        self._tasks: list[Ints] = []
        self._grids: list[NDArray[np.float32]] = []
        self._kept: list[object] = []

    def __call__(self) -> dict[int, BatchedActivations] | None:
        for i, inputs in self._chain.computed.items():
            if self._program.steps[i].kind == "convolution":
                self._convolution(i, *inputs)
            else:
                self._sum(i, *inputs)
        for i, x in self._outside.items():
            table, held = addresses(x, np.arange(len(x.states)))
            self._kept.append(held)
            height, width = x.features[1:]
            here = self._places[self._first[i] : self._first[i] + len(table)]
            here[:, 0], here[:, 2] = table[:, 0], table[:, 1]
            here[:, 1] = 4 * height * width * table[:, 1]
        results = self._results()
        tasks, grids = np.concatenate(self._tasks), np.concatenate(self._grids)
        order = np.argsort(tasks[:, 5], kind="stable")
        tasks, grids = tasks[order, :5], grids[order]
        has_nan = convolution.chain(self._stages, tasks, self._places, self._products, grids, self._samples)
        return None if has_nan else results

    def _results(self) -> dict[int, BatchedActivations]:
        """The values that later steps take, uninitialised; their places are known from now on."""
        chain, parts = self._chain, {}
        sizes: dict[int, int] = {}
        used = self._chains.used(chain)
        for stage, i in zip(self._stages, chain.computed, strict=True):
            here = self._places[self._first[i] : self._first[i] + len(self._needed[i])]
            height, width, depth = chain.values[i].size
            here[:, 2], here[:, 3] = depth, sizes.setdefault(stage.bytes, len(sizes))
            if any(chain.values[j].base == i for j in used):
                parts[i] = room((len(here), self._samples, height, width, 1, depth), "cpu")
                here[:, 1] = stage.bytes
                here[:, 0] = parts[i].data_ptr() + stage.bytes * self._samples * np.arange(len(here))
        results = {}
        for j in used:
            value = chain.values[j]
            pending = value.norm, value.rectify, value.ceiling
            results[j] = BatchedActivations([parts[value.base]], "last", self._needed[j], None, *pending)
        return results

    def _convolution(self, i: int, x: _Value) -> None:
        step, states, needed = self._program.steps[i], self._schedule.states[i], self._needed[i]
        geometry = self._convolutions.geometry(step, x.size[:2], 1)
        grids, table = self._convolutions.operands(step, states, needed, x.rectify)
        begin = self._first[i]
        self._products[begin : begin + len(needed), 1:] = table
        rounded = states.rounded[needed]
        first = np.flatnonzero(np.diff(rounded, prepend=rounded[0] - 1))
        rounding.lower(grids := grids[first], x.ceiling)
        left = self._place(step.inputs[0], x, states.rounded_parent[rounded[first]])
        norm = None if x.norm is None else x.norm.affine(geometry.rows.size[1])
        self._stages.append(Stage(geometry, step.groups > 1, (norm,)))
        self._add(i, grids, left, np.full(len(first), -1), first)

    def _sum(self, i: int, a: _Value, b: _Value) -> None:
        step, states, needed = self._program.steps[i], self._schedule.states[i], self._needed[i]
        height, width, depth = a.size
        dense = all(v.base in self._first and self._dense(v) for v in (a, b))
        length = repeated(height * width, depth) if dense else 1
        one = (1, 1)
        geometry = Geometry(1, (height * width // length, length), (depth, depth), one, one, (0, 0), one, False)
        norms = tuple(None if v.norm is None else v.norm.affine(length) for v in (a, b))
        self._stages.append(Stage(geometry, None, norms, (a.rectify, b.rectify)))
        left, right = (
            self._place(step.inputs[k], v, states.parents[needed, k])
            for k, v in zip(_operands(step), (a, b), strict=True)
        )
        self._add(i, np.zeros((len(needed), kernels.NUMBERS), dtype=np.float32), left, right, np.arange(len(needed)))

    def _dense(self, value: _Value) -> bool:
        """Whether the pixels of a value are neighbours in memory."""
        x = self._outside.get(value.base)
        return x is None or all(p.shape[4] == 1 and p.is_contiguous() for p in x.parts)

    def _place(self, i: int, value: _Value, states: Ints) -> Ints:
        """The places of some states of a step."""
        x = self._outside.get(value.base)
        places: Ints = (states - self._needed[i][0] if x is None else x.positions(states)) + self._first[value.base]
        return places

    def _add(self, i: int, grids: NDArray[np.float32], left: Ints, right: Ints, first: Ints) -> None:
        """The tasks of a stage, the last one that was added; `first` are the first states of each."""
        start, stop = self._range
        needed, number = self._needed[i], len(self._stages) - 1
        of = self._schedule.states[i].of[start:stop]
        tasks = np.empty((len(first), 6), dtype=np.int64)
        tasks[:, 0], tasks[:, 1], tasks[:, 2] = number, left, right
        tasks[:, 3], tasks[:, 4] = first + self._first[i], np.append(first[1:], len(needed)) + self._first[i]
        # A task is due with the first candidate that needs it.
        tasks[:, 5] = np.searchsorted(of, needed[first]) * len(self._chain.computed) + number
        self._tasks.append(tasks)
        self._grids.append(grids)


def _operands(step: Step) -> list[int]:
    """Which inputs of a step its positional arguments are, in their order."""
    return [step.node.all_input_nodes.index(n) for n in step.node.args if isinstance(n, fx.Node)]
