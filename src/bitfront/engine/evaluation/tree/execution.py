"""One pass of some samples through the graph: each step is computed for all states that a range of candidates needs.

How a step is computed depends on how its operation merges. Exact products are one product for all inputs and all
weights. A norm or a rectifier is postponed to the next pass over memory. Everything else is one call per state, the
same call that the deployed model does (``calls.py``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, fx

from bitfront.engine.evaluation.tree import activations, calls
from bitfront.engine.evaluation.tree.activations import BatchedActivations, Ints, MemoryLayout
from bitfront.engine.evaluation.tree.chains import Chain, Chains
from bitfront.engine.evaluation.tree.convolution import Convolutions
from bitfront.engine.evaluation.tree.multiplication import Multiplication
from bitfront.engine.evaluation.tree.products import Products
from bitfront.engine.evaluation.tree.program import PER_SAMPLE, PRODUCTS, Program, Step
from bitfront.engine.evaluation.tree.rounding import rounded
from bitfront.engine.evaluation.tree.schedule import Schedule, States


@dataclass(eq=False)
class SeparateActivations:
    """Values of any type, one per state."""

    values: list[Any]
    states: Ints

    def positions(self, states: Ints) -> Ints:
        """Where states of these numbers stand in ``states``."""
        return np.searchsorted(self.states, states)

    def restricted(self, needed: Ints) -> SeparateActivations:
        """For fewer states."""
        return SeparateActivations([self.values[i] for i in self.positions(needed)], needed)


Value = BatchedActivations | SeparateActivations
LiveValues = dict[int, Value]
T = TypeVar("T")
#: (the outputs of the model in some final states, the targets of the samples) → what is made of them (``ending.py``).
End = Callable[[Value, Tensor], T]


def batched(value: Value, samples: int) -> BatchedActivations | None:
    """A value as batched activations; None if it is not one tensor per state whose first axis is the samples."""
    if isinstance(value, BatchedActivations):
        return value
    if all(isinstance(v, Tensor) and v.dim() >= 2 and len(v) == samples for v in value.values):
        where = np.zeros((len(value.values), 3), dtype=np.int64)
        where[:, 0] = np.arange(len(value.values))
        return BatchedActivations([v.unsqueeze(0).unsqueeze(2) for v in value.values], "samples", value.states, where)
    return None


class Pass(Generic[T]):
    """Takes some samples through the graph, for ranges of the schedule's candidates.

    Args:
        program: the steps.
        products: how its products are computed.
        convolutions: those that a kernel computes.
        schedule: the states that candidates need.
        bytes_at_once: size of the activations that one step may compute at a time, unless a single state needs more.
        x, y: the samples, and their targets.
        end: what is made of the last values.
    """

    def __init__(
        self,
        program: Program,
        products: Products,
        convolutions: Convolutions,
        schedule: Schedule,
        bytes_at_once: int,
        x: Tensor,
        y: Tensor,
        end: End[T],
    ) -> None:
        self.program, self.schedule, self.bytes_at_once = program, schedule, bytes_at_once
        self._chains = Chains(program, convolutions, schedule, len(y))
        self._multiply = Multiplication(program, products, convolutions, len(y))
        # Results must not depend on the samples' address in memory. So they are aligned, as in the deployed model.
        self.x, self.y, self.samples = activations.aligned(x), y, len(y)
        self._end = end
        self._ended: list[T] = []

    def run(self, piece: tuple[int, int]) -> list[T]:
        """What is made of the outputs of the candidates of a range; each of their final states is in one of them."""
        self._descend(0, *piece, {})
        return self._ended

    def _descend(self, first: int, start: int, stop: int, live: LiveValues) -> None:
        program, i = self.program, first
        while i < len(program.steps):
            chain = self._chain(i, start, stop, live)
            if chain is None:
                edges = self._cuts(i, start, stop)
            else:
                edges = self._cuts(chain.last_computed, start, stop, self._chains.beside(chain))
            if len(edges) > 2:
                for a, b in itertools.pairwise(edges):
                    needed = {j: self.schedule.states[j].needed(a, b) for j in live}
                    self._descend(i, a, b, {j: v.restricted(needed[j]) for j, v in live.items()})
                return
            results = None if chain is None else self._chains.run(chain, start, stop, self._batches(live))
            if chain is None or results is None:
                live[i] = self._step(i, self.schedule.states[i].needed(start, stop), live)
            else:
                live.update(results)
                i = chain.last
            for j in [j for j in live if program.last_use[j] <= i]:
                del live[j]
            i += 1
        self._ended.append(self._end(live[program.output], self.y))

    def _chain(self, i: int, start: int, stop: int, live: LiveValues) -> Chain | None:
        """The steps from step i on that are computed together, if it is a convolution that starts some."""
        if self.program.steps[i].kind != "convolution":
            return None
        return self._chains.starting(i, start, stop, self._batches(live))

    def _batches(self, live: LiveValues) -> dict[int, BatchedActivations]:
        """The values that are batched activations."""
        return {j: b for j, v in live.items() if (b := batched(v, self.samples)) is not None}

    def _cuts(self, i: int, start: int, stop: int, beside: int = 0) -> list[int]:
        """Edges of the ranges in which step i is computed; [start, stop] if one range is enough.

        Args:
            beside: number of values per sample that are computed together with it.
        """
        if stop - start <= 1:
            return [start, stop]
        step, states = self.program.steps[i], self.schedule.states[i]
        # The rounded inputs of a product take memory too.
        source = self.program.steps[step.inputs[0]].shape if step.kind in PRODUCTS else ()
        size = 4 * self.samples * (int(np.prod(step.shape)) + int(np.prod(source)) // 4 + beside)
        room = max(1, self.bytes_at_once // max(1, size))
        of = states.of[start:stop]
        count = int(of[-1] - of[0]) + 1 if states.monotone else len(np.unique(of))
        if count <= room:
            return [start, stop]
        fresh = np.diff(of, prepend=of[0] - 1) != 0
        # Cut between parents, so that all options of a parent stay together. Cut within a parent only if there is one.
        parents = states.parents[of]
        borders = np.flatnonzero((np.diff(parents, axis=0) != 0).any(axis=1)) + 1 if parents.shape[1] else of[:0]
        if not len(borders):
            borders = np.flatnonzero(fresh)[1:]
        computed = np.cumsum(fresh).tolist()
        edges, previous = [0], 0
        for border in [*borders.tolist(), len(of)]:
            if computed[border - 1] - (computed[edges[-1]] - 1) > room and previous > edges[-1]:
                edges.append(previous)
            previous = border
        return [start + e for e in edges] + [stop]

    # --- the steps ---

    def _step(self, i: int, needed: Ints, live: LiveValues) -> BatchedActivations | SeparateActivations:
        step, states = self.program.steps[i], self.schedule.states[i]
        if step.kind == "input":
            return BatchedActivations([self.x.reshape(1, self.samples, 1, *self.x.shape[1:])], "samples", needed)
        if step.kind == "constant":
            return SeparateActivations([calls.attribute(self.program.model, str(step.node.target))], needed)
        inputs = [live[j] for j in step.inputs]
        tensors = [batched(v, self.samples) for v in inputs]
        x = tensors[0] if tensors else None
        result: BatchedActivations | None = None
        if x is not None:
            if step.kind in PRODUCTS:
                result = self._multiply(i, states, needed, x)
            elif step.kind == "rectifier":
                result = self._relu(i, states, needed, x)
            elif step.kind == "arithmetic" and all(t is not None for t in tensors):
                result = self._sum(i, states, needed, [t for t in tensors if t is not None])
            elif step.corrected:
                result = self._corrected(i, states, needed, x)
            elif step.kind == "elementwise":
                result = calls.elementwise(self.program, step, needed, x)
            elif step.kind in PER_SAMPLE:
                result = self._module(step, needed, x)
        return self._call(i, states, needed, inputs) if result is None else result

    def _relu(self, i: int, states: States, needed: Ints, x: BatchedActivations) -> BatchedActivations | None:
        step = self.program.steps[i]
        ceiling = min(x.ceiling, step.ceiling)
        later = replace(x, rectify=True, ceiling=ceiling, states=needed) if len(needed) == len(x.states) else None
        if step.group is None:
            return later
        formats = states.data[needed]
        if later is not None and self.program.unformatted(step, formats):
            return later
        at = x.positions(states.parents[needed, 0])
        out = rounded(x, at, formats, self.program.rounding(step), x.layout, rectify=True)
        part = out.unsqueeze(activations.COLUMNS[x.layout])
        return BatchedActivations([part], x.layout, needed, rectify=step.ceiling < math.inf, ceiling=step.ceiling)

    def _sum(self, i: int, states: States, needed: Ints, inputs: list[BatchedActivations]) -> BatchedActivations | None:
        """Elementwise arithmetic on two tensors of the same shape; None for anything else (broadcasting)."""
        step = self.program.steps[i]
        nodes = [n for n in step.node.args if isinstance(n, fx.Node)]
        order = [step.node.all_input_nodes.index(n) for n in nodes]
        if len(order) != 2 or inputs[order[0]].features != inputs[order[1]].features:
            return None
        a, b = (inputs[k] for k in order)
        layout: MemoryLayout = "last" if "last" in (a.layout, b.layout) else a.layout
        a, b = a.turned(layout), b.turned(layout)
        at = (a.positions(states.parents[needed, order[0]]), b.positions(states.parents[needed, order[1]]))
        formats, second = states.data[needed], states.parameters[needed]
        assert step.site is not None
        merge = step.site.operation.merge
        assert merge is not None
        assert merge.function is not None
        program = self.program
        if (
            merge.function is torch.add
            and program.unformatted(step, formats)
            and program.unformatted_second(step, second)
        ):
            out = activations.added(a, b, at)
        else:
            out = rounded(a, at[0], formats, program.rounding(step), layout)
            right = rounded(b, at[1], second, program.second_rounding(step), layout)
            merge.function(out, right, out=out)
        return BatchedActivations([out.unsqueeze(activations.COLUMNS[layout])], layout, needed)

    def _module(self, step: Step, needed: Ints, x: BatchedActivations) -> BatchedActivations | None:
        """A module that treats every value, or every window of a channel, separately."""
        module: Any = self.program.model.get_submodule(str(step.node.target))
        normalises = step.kind == "norm"
        if step.kind == "identity" or (step.kind == "flatten" and len(x.features) == 1):
            return replace(x, states=needed)
        if normalises and x.layout == "last":
            x = x.settled()
            return replace(x, states=needed, norm=self.program.norm(step))
        x = x.compact()
        if x.layout == "last" and step.kind == "selection":
            parts = []
            for part in (x if x.norm is None else x.settled()).parts:
                rows, samples, height, width, columns, depth = part.shape
                flat = part.reshape(rows * samples, height, width, columns * depth).permute(0, 3, 1, 2)
                out = module(flat).permute(0, 2, 3, 1).contiguous()
                parts.append(out.view(rows, samples, *out.shape[1:3], columns, depth))
            # A maximum and a ReLU can be exchanged, so the ReLU stays postponed.
            return self._rectified_later(BatchedActivations(parts, "last", needed, x.irregular), x)
        later = not normalises and x.norm is None
        plain = (replace(x, rectify=False, ceiling=math.inf) if later else x.settled()).turned("samples")
        parts = []
        for part in plain.parts:
            out = module(part.reshape(-1, *part.shape[3:]))
            parts.append(out.view(*part.shape[:3], *out.shape[1:]))
        done = BatchedActivations(parts, "samples", needed, plain.irregular)
        return self._rectified_later(done, x) if later else done

    @staticmethod
    def _rectified_later(done: BatchedActivations, x: BatchedActivations) -> BatchedActivations:
        """`done`, with the ReLU that is pending in `x`, unless a norm was pending before it: both are done then."""
        return replace(done, rectify=x.rectify, ceiling=x.ceiling) if x.norm is None else done

    def _corrected(self, i: int, states: States, needed: Ints, x: BatchedActivations) -> BatchedActivations:
        """A batch norm whose statistics depend on the option of the site before it. States with the same option are
        computed together."""
        step = self.program.steps[i]
        x = x.turned("samples").settled()
        at = x.positions(states.parents[needed, 0])
        pairs, group = np.unique(self._options_before(i, states, needed), axis=0, return_inverse=True)
        parts, where = [], np.zeros((len(needed), 3), dtype=np.int64)
        for number, (data, parameters) in enumerate(pairs.tolist()):
            rows = np.flatnonzero(group.reshape(-1) == number)
            blocks = torch.stack([x.block(int(k)) for k in at[rows]])
            before = self.program.steps[step.inputs[0]]
            out = self.program.normalise(step, before, data, parameters, blocks.flatten(0, 1))
            parts.append(out.view(blocks.shape).unsqueeze(2))
            where[rows, 0], where[rows, 1] = number, np.arange(len(rows))
        return BatchedActivations(parts, "samples", needed, where)

    def _options_before(self, i: int, states: States, needed: Ints) -> Ints:
        """The data option and the parameter option of the site before a corrected batch norm, shape (states, 2)."""
        site = self.schedule.states[self.program.steps[i].inputs[0]]
        parents = states.parents[needed, 0]
        return np.stack([site.data[parents], site.parameters[parents]], axis=1)

    def _call(
        self, i: int, states: States, needed: Ints, inputs: Sequence[BatchedActivations | SeparateActivations]
    ) -> SeparateActivations:
        """Any other step, computed state by state as the deployed model does it."""
        step, program = self.program.steps[i], self.program
        values: list[Any] = []
        for state in needed.tolist():
            taken: dict[fx.Node, Any] = {}
            for n, value, parent in zip(step.node.all_input_nodes, inputs, states.parents[state], strict=True):
                k = int(value.positions(np.array([parent]))[0])
                taken[n] = value.tensor(k) if isinstance(value, BatchedActivations) else value.values[k]
            data, parameters = (0, 0) if step.group is None else (states.data[state], states.parameters[state])
            args, kwargs = calls.arguments(program, step, int(data), int(parameters), taken)
            if step.corrected:
                ((data, parameters),) = self._options_before(i, states, np.array([state])).tolist()
                values.append(program.normalise(step, program.steps[step.inputs[0]], data, parameters, args[0]))
            else:
                values.append(calls.call(program, step, int(data), int(parameters), args, kwargs))
        return SeparateActivations(values, needed)
