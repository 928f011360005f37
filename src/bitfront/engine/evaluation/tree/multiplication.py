"""Computes the products of a step for all states that are needed: merged where ``products.py`` allows it, or alone."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitfront import kernels
from bitfront.engine.evaluation.tree import activations, calls, rounding
from bitfront.engine.evaluation.tree.activations import BatchedActivations, Ints, MemoryLayout
from bitfront.engine.evaluation.tree.convolution import Convolutions
from bitfront.engine.evaluation.tree.products import ORDERED, WHOLE, Kind, Products
from bitfront.engine.evaluation.tree.program import Program, Step
from bitfront.engine.evaluation.tree.schedule import States


class Multiplication:
    """The products of one pass.

    Args:
        program: the steps.
        products: how their products are computed.
        convolutions: those that a kernel computes.
        samples: the number of samples in the pass.
    """

    def __init__(self, program: Program, products: Products, convolutions: Convolutions, samples: int) -> None:
        self.program, self.products, self.samples = program, products, samples
        self._convolutions = convolutions

    def _layout(self, step: Step, x: BatchedActivations) -> MemoryLayout:
        """The layout in which a product is computed."""
        if step.kind == "dense" and len(x.features) == 1:
            return "first"
        return "last" if step.kind == "convolution" and len(x.features) == 3 else "samples"

    def __call__(self, i: int, states: States, needed: Ints, x: BatchedActivations) -> BatchedActivations:
        """The values of step `i`, for the states `needed`, from its input."""
        step = self.program.steps[i]
        layout = self._layout(step, x)
        if layout == "last":
            x = x.turned("last")
            computed, part = self._convolutions(step, states, needed, x, self.samples)
            if part is not None:
                if computed.all():
                    return BatchedActivations([part], layout, needed)
                rest = self._merged_or_not(i, states, needed[~computed], x, layout)
                where = np.zeros((len(needed), 3), dtype=np.int64)
                where[computed, 1] = np.arange(len(part))
                where[~computed] = rest.where + np.array([1, 0, 0])
                return BatchedActivations([part, *rest.parts], layout, needed, where)
        return self._merged_or_not(i, states, needed, x, layout)

    def _merged_or_not(
        self, i: int, states: States, needed: Ints, x: BatchedActivations, layout: MemoryLayout
    ) -> BatchedActivations:
        """Products that the kernel of convolutions does not compute."""
        step = self.program.steps[i]
        rounded, parameters = states.rounded[needed], states.parameters[needed]
        if step.groups == 1 and layout != "samples":
            members, counts = np.unique(rounded, return_counts=True)
            columns = counts[0]
            chosen = parameters[:columns]
            # States are numbered by rounded input, then by parameters. Often they are a full table of both.
            if (counts == columns).all() and (parameters.reshape(-1, columns) == chosen).all():
                subset = tuple(chosen.tolist())
                formats = np.unique(states.rounded_data[members]).tolist()
                (kind, *others) = {self.products.kind(step, d, p) for d in formats for p in subset}
                if kind != "alone" and not others:
                    part = self._merged(i, subset, members, states, x, layout, kind)
                    return BatchedActivations([part], layout, needed)
        return self._scattered(i, states, needed, x, layout)

    def _scattered(
        self, i: int, states: States, needed: Ints, x: BatchedActivations, layout: MemoryLayout
    ) -> BatchedActivations:
        """Products for any set of pairs of rounded input and parameters. Inputs that need the same parameters are
        computed together, and pairs that cannot be merged one by one."""
        step = self.program.steps[i]
        rounded, parameters = states.rounded[needed].tolist(), states.parameters[needed].tolist()
        place = {pair: k for k, pair in enumerate(zip(rounded, parameters, strict=True))}
        merged: dict[tuple[int, Kind], list[int]] = {}
        alone: list[tuple[int, int]] = []
        for r, p in place:
            kind = self.products.kind(step, int(states.rounded_data[r]), p)
            # Vectors that are not samples alone are rows of a matrix, whose sums a library takes in any order.
            if kind == "alone" or (layout == "samples" and (step.kind != "dense" or kind in ORDERED)):
                alone.append((r, p))
            else:
                merged.setdefault((r, kind), []).append(p)
        groups: dict[tuple[tuple[int, ...], Kind], list[int]] = {}
        for (r, kind), chosen in merged.items():
            together = step.groups == 1 and layout != "samples"
            for subset in [tuple(chosen)] if together else [(p,) for p in chosen]:
                groups.setdefault((subset, kind), []).append(r)
        parts: list[Tensor] = []
        where = np.zeros((len(needed), 3), dtype=np.int64)
        for number, ((subset, kind), members) in enumerate(groups.items()):
            parts.append(self._merged(i, subset, np.array(members), states, x, layout, kind))
            for row, r in enumerate(members):
                for column, p in enumerate(subset):
                    where[place[r, p]] = (number, row, column)
        last: tuple[int, Tensor] = (-1, torch.empty(0))
        for r, p in alone:
            data = int(states.rounded_data[r])
            if last[0] != r:
                value = x.tensor(int(x.positions(states.rounded_parent[r : r + 1])[0]))
                rounds = self.program.data_format(step, data)
                last = (r, value if rounds is None else rounds.quantize(value))
            where[place[r, p]] = (len(parts), 0, 0)
            parts.append(self._alone(step, data, p, last[1], layout))
        return BatchedActivations(parts, layout, needed, where)

    def _alone(self, step: Step, data: int, parameters: int, rounded: Tensor, layout: MemoryLayout) -> Tensor:
        """A part with the product of one input, which is rounded, as the deployed model computes it."""
        result = calls.single(self.program, step, data, parameters, rounded)
        if layout == "first":
            return result.t().contiguous()[None, None]
        return activations.from_plain(result[None, :, None], layout)

    def _merged(
        self,
        i: int,
        subset: tuple[int, ...],
        members: Ints,
        states: States,
        x: BatchedActivations,
        layout: MemoryLayout,
        kind: Kind,
    ) -> Tensor:
        """One product for some rounded inputs and parameter options, all of one kind; it is a part of the result."""
        step, program = self.program.steps[i], self.program
        at, formats = x.positions(states.rounded_parent[members]), states.rounded_data[members]
        joined = kind == "exact" and layout == "first"
        weight, bias = self.products.weights(step, subset, kind, joined=joined)
        how = program.rounding(step, coded=kind in WHOLE)
        if layout == "samples":
            inputs = rounding.rounded(x, at, formats, how, layout)
            sums = F.linear(inputs, weight, bias if kind == "exact" else None)
            return self._scaled_rows(step, sums, formats, subset, bias, kind).unsqueeze(activations.COLUMNS[layout])
        if layout == "last":
            if kind in ORDERED:
                return self._one_by_one(i, subset, members, states, x)
            inputs = rounding.rounded(x, at, formats, how, "last").flatten(0, 1).permute(0, 3, 1, 2)
            sums = calls.apply(program, step, inputs, weight, bias if kind == "exact" else None)
            out = self._table(sums, len(members), len(subset))
            return self._scaled_rows(step, out, formats, subset, bias, kind)
        ones = weight.shape[1] - x.features[0]
        inputs = rounding.rounded(x, at, formats, how, "first", extra=ones)
        if ones:
            inputs[:, -ones:] = 1.0
        if kind in ORDERED:
            out = kernels.ordered(weight, inputs)
        else:
            out = activations.room((len(members), len(weight), self.samples), program.device)
            torch.bmm(weight.expand(len(members), *weight.shape), inputs, out=out)
        if kind != "exact":
            kernels.scale(out, self.products.scales(step, formats, subset, kind), bias, last=False)
        return out.view(len(members), len(subset), -1, self.samples)

    def _scaled_rows(
        self, step: Step, out: Tensor, formats: Ints, subset: tuple[int, ...], bias: Tensor | None, kind: Kind
    ) -> Tensor:
        """Sums, scaled and with their biases, in place; channels are the last dimensions, columns and depth.

        Args:
            out: contiguous, one row per format of an input.
        """
        if kind != "exact":
            scales = self.products.scales(step, formats, subset, kind)
            kernels.scale(out.view(len(out), -1, scales.shape[1]), scales, bias, last=True)
        return out

    def _one_by_one(
        self, i: int, subset: tuple[int, ...], members: Ints, states: States, x: BatchedActivations
    ) -> Tensor:
        """What ``_merged`` returns for layout ``last``, each pair computed alone."""
        step, rows = self.program.steps[i], []
        for r in members.tolist():
            data = int(states.rounded_data[r])
            value = x.tensor(int(x.positions(states.rounded_parent[r : r + 1])[0]))
            rounds = self.program.data_format(step, data)
            value = value if rounds is None else rounds.quantize(value)
            parts = [self._alone(step, data, p, value, "last") for p in subset]
            rows.append(torch.cat(parts, activations.COLUMNS["last"]))
        return torch.cat(rows)

    def _table(self, out: Tensor, rows: int, columns: int) -> Tensor:
        """The result of a merged convolution as a part.

        Args:
            out: shape (rows · samples, columns · depth, height, width).
        """
        last = out.permute(0, 2, 3, 1).contiguous()
        return last.view(rows, self.samples, *last.shape[1:3], columns, -1)
