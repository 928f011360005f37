"""Many candidates through one graph, sharing whatever they share.

``TreeScorer`` computes every state that a batch of candidates needs (``schedule.py``) once: depth first, cutting
candidates and samples so that what is held at a time stays within ``WorkLimits.bytes``. All states and all weight
options of a site go through one product, wherever its sums are exact (``program.py``); convolutions of narrow operands
go through it as bytes. What is not exact is computed alone, with the call, shapes and samples of the deployed model.
Either way each candidate gets, to the last bit, the numbers that it gets alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from bitfront import kernels
from bitfront.engine.evaluation.tree import activations as activations
from bitfront.engine.evaluation.tree.activations import BatchedActivations, Ints, Layout
from bitfront.engine.evaluation.tree.program import PER_SAMPLE, PRODUCTS, Program, Step
from bitfront.engine.evaluation.tree.schedule import Schedule, States
from bitfront.formats.base import Format
from bitfront.graph import Graph
from bitfront.graph.capture import apply_site
from bitfront.operations.base import OperandSpec
from bitfront.operations.lookup import operand_nodes
from bitfront.spaces.base import Codes

#: The largest activation of the samples that go through together: small enough for a cache, large enough for a call.
ACTIVATION_BYTES = 4 << 20
#: Activations that one step makes at a time: enough that calling it costs little beside them.
STACK_BYTES = 32 << 20
#: Less work than this is done by one thread: threads take turns at running Python, and lose more than they save.
THREAD_SECONDS = 0.1
#: What a core does with small matrices, and with one value in a pass over memory, for the estimate of the work.
OPERATIONS_PER_SECOND = 3e10
PASS_SECONDS = 1e-9


@dataclass(frozen=True)
class WorkLimits:
    """How work is cut. It decides about time and memory.

    Attributes:
        samples: how many go through the graph together. What is not exact depends on it in the last bits.
        bytes: activations that one step may make at a time, unless a single state needs more.
        threads: how many share the work.
    """

    samples: int
    bytes: int
    threads: int

    @classmethod
    def fitting(cls, graph: Graph, threads: int, device: str = "cpu") -> WorkLimits:
        """So that on a CPU the largest activation, and a few states of it, stay in the cache; on a GPU so that every
        kernel is large. The number of samples depends on the graph alone."""
        largest = max([int(np.prod(s)) for n in graph.nodes for s in (*n.inputs, n.output)], default=1) * 4
        if device != "cpu":
            return cls(8192, 1 << 30, 1)
        samples = 1 << max(4, min(11, int(np.log2(max(1, ACTIVATION_BYTES // max(1, largest))))))
        return cls(samples, STACK_BYTES, threads)


@dataclass(eq=False)
class SeparateActivations:
    """Values of any type, one per state."""

    values: list[Any]
    have: Ints

    def positions(self, states: Ints) -> Ints:
        """Where states of these numbers stand in ``have``."""
        return np.searchsorted(self.have, states)

    def restricted(self, needed: Ints) -> SeparateActivations:
        """For fewer states."""
        return SeparateActivations([self.values[i] for i in self.positions(needed)], needed)


Live = dict[int, BatchedActivations | SeparateActivations]
#: Numbers of some final states, their losses, their right answers.
Scored = tuple[Ints, Tensor, Tensor]


class TreeScorer:
    """Scores batches of candidates."""

    def __init__(self, program: Program, effort: WorkLimits) -> None:
        self.program, self.effort = program, effort
        self._pool: ThreadPoolExecutor | None = None

    def scores(self, options: Codes, x: Tensor, y: Tensor) -> tuple[NDArray[np.float64], Ints]:
        """Sum of losses, and number of right answers, of each candidate.

        Args:
            options: shape (candidates, groups).
            x: samples, shape (samples, *features), on the program's device.
            y: labels, int32, shape (samples,).
        """
        schedule = Schedule(self.program, options)
        final = schedule.states[self.program.output]
        loss, correct = np.zeros(final.count), np.zeros(final.count, dtype=np.int64)
        chunks = list(zip(torch.split(x, self.effort.samples), torch.split(y, self.effort.samples), strict=True))
        threads = self._threads(schedule, len(y))
        # Threads that share out samples lose nothing; those that share out candidates do some of the work twice.
        pieces = _even(len(schedule), 1 if len(chunks) >= threads else threads)
        tasks = [(xs, ys, piece) for xs, ys in chunks for piece in pieces]
        done = self._map(schedule, tasks, threads)
        for _ in chunks:
            # A state that two pieces need was computed by both, and counts once.
            own_loss, own_correct = np.zeros(final.count), np.zeros(final.count, dtype=np.int64)
            for _ in pieces:
                for have, part_loss, part_correct in next(done):
                    own_loss[have], own_correct[have] = part_loss.cpu().numpy(), part_correct.cpu().numpy()
            loss += own_loss
            correct += own_correct
        at = np.empty(len(schedule), dtype=np.int64)
        at[schedule.order] = final.of
        return loss[at], correct[at]

    def _map(self, schedule: Schedule, tasks: Sequence[Any], threads: int) -> Iterator[list[Scored]]:
        if threads == 1 or len(tasks) == 1:
            yield from (self._task(schedule, *t) for t in tasks)
            return
        if self._pool is None:
            # Kept: a thread's first tensor operation costs milliseconds.
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="bitfront")
        yield from self._pool.map(lambda t: self._task(schedule, *t), tasks)

    def _threads(self, schedule: Schedule, samples: int) -> int:
        seconds = sum(
            states.count * samples * (step.operations / OPERATIONS_PER_SECOND + int(np.prod(step.shape)) * PASS_SECONDS)
            for step, states in zip(self.program.steps, schedule.states, strict=True)
        )
        return self.effort.threads if seconds > THREAD_SECONDS else 1

    def _task(self, schedule: Schedule, x: Tensor, y: Tensor, piece: tuple[int, int]) -> list[Scored]:
        effort = self.effort
        while True:
            try:
                with torch.inference_mode():
                    return _Pass(self.program, schedule, effort, x, y).run(piece)
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                if effort.bytes > 4096:
                    effort = replace(effort, bytes=effort.bytes // 2)
                    continue
            # A single state does not fit: fewer samples at a time.
            if len(y) == 1:
                raise MemoryError("one sample of one candidate does not fit into memory")
            half = len(y) // 2
            parts = [self._task(schedule, x[:half], y[:half], piece), self._task(schedule, x[half:], y[half:], piece)]
            return _added(parts)


def _added(parts: Sequence[list[Scored]]) -> list[Scored]:
    """The scores of several sets of samples as those of all of them."""
    losses: dict[int, Tensor] = {}
    hits: dict[int, Tensor] = {}
    for scored in parts:
        own = {int(h): (a, b) for have, loss, right in scored for h, a, b in zip(have, loss, right, strict=True)}
        for h, (a, b) in own.items():
            losses[h] = losses[h] + a if h in losses else a
            hits[h] = hits[h] + b if h in hits else b
    return [(np.array(list(losses)), torch.stack(list(losses.values())), torch.stack(list(hits.values())))]


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _even(count: int, parts: int) -> list[tuple[int, int]]:
    edges = np.linspace(0, count, min(parts, count) + 1).astype(int).tolist()
    return list(itertools.pairwise(edges))


class _Pass:
    """Some samples through the graph, for ranges of the schedule's candidates."""

    def __init__(self, program: Program, schedule: Schedule, effort: WorkLimits, x: Tensor, y: Tensor) -> None:
        self.program, self.schedule, self.effort = program, schedule, effort
        self.x, self.y, self.samples = x, y, len(y)
        self.scored: list[Scored] = []

    def run(self, piece: tuple[int, int]) -> list[Scored]:
        """The scores of the candidates of a range."""
        self._descend(0, *piece, {})
        return self.scored

    def _descend(self, first: int, start: int, stop: int, live: Live) -> None:
        program = self.program
        for i in range(first, len(program.steps)):
            edges = self._cuts(i, start, stop)
            if len(edges) > 2:
                for a, b in itertools.pairwise(edges):
                    needed = {j: self.schedule.states[j].needed(a, b) for j in live}
                    self._descend(i, a, b, {j: v.restricted(needed[j]) for j, v in live.items()})
                return
            live[i] = self._step(i, self.schedule.states[i].needed(start, stop), live)
            for j in [j for j in live if program.last_use[j] <= i]:
                del live[j]
        self._score(live[program.output])

    def _cuts(self, i: int, start: int, stop: int) -> list[int]:
        """Edges of the ranges in which step i is made; [start, stop] if at once."""
        if stop - start <= 1:
            return [start, stop]
        step, states = self.program.steps[i], self.schedule.states[i]
        # The rounded inputs of a product take memory too.
        source = self.program.steps[step.inputs[0]].shape if step.kind in PRODUCTS else ()
        size = 4 * self.samples * (int(np.prod(step.shape)) + int(np.prod(source)) // 4)
        room = max(1, self.effort.bytes // max(1, size))
        of = states.of[start:stop]
        count = int(of[-1] - of[0]) + 1 if states.monotone else len(np.unique(of))
        if count <= room:
            return [start, stop]
        fresh = np.diff(of, prepend=of[0] - 1) != 0
        # Cut between parents, so that all their options stay together; within one only if it alone is too much.
        parents = states.parents[of]
        borders = np.flatnonzero((np.diff(parents, axis=0) != 0).any(axis=1)) + 1 if parents.shape[1] else of[:0]
        if not len(borders):
            borders = np.flatnonzero(fresh)[1:]
        made = np.cumsum(fresh).tolist()
        edges, previous = [0], 0
        for border in [*borders.tolist(), len(of)]:
            if made[border - 1] - (made[edges[-1]] - 1) > room and previous > edges[-1]:
                edges.append(previous)
            previous = border
        return [start + e for e in edges] + [stop]

    # --- the steps ---

    def _step(self, i: int, needed: Ints, live: Live) -> BatchedActivations | SeparateActivations:
        step, states = self.program.steps[i], self.schedule.states[i]
        if step.kind == "input":
            return BatchedActivations([self.x.reshape(1, self.samples, 1, *self.x.shape[1:])], "samples", needed)
        if step.kind == "constant":
            return SeparateActivations([_attribute(self.program.model, str(step.node.target))], needed)
        inputs = [live[j] for j in step.inputs]
        tensors = [self._stacked(v) for v in inputs]
        x = tensors[0] if tensors else None
        result: BatchedActivations | None = None
        if x is not None:
            if step.kind in PRODUCTS:
                result = self._product(i, states, needed, x)
            elif step.kind == "rectifier":
                result = self._relu(i, states, needed, x)
            elif step.kind == "arithmetic" and all(t is not None for t in tensors):
                result = self._sum(i, states, needed, [t for t in tensors if t is not None])
            elif step.corrected:
                result = self._corrected(i, states, needed, x)
            elif step.kind in PER_SAMPLE:
                result = self._module(step, needed, x)
        return self._call(i, states, needed, inputs) if result is None else result

    def _stacked(self, value: BatchedActivations | SeparateActivations) -> BatchedActivations | None:
        """As a stack, where it can be one: one tensor per sample and state."""
        if isinstance(value, BatchedActivations):
            return value
        if all(isinstance(v, Tensor) and v.dim() >= 2 and len(v) == self.samples for v in value.values):
            where = np.zeros((len(value.values), 3), dtype=np.int64)
            where[:, 0] = np.arange(len(value.values))
            return BatchedActivations([v.unsqueeze(0).unsqueeze(2) for v in value.values], "samples", value.have, where)
        return None

    def _layout(self, step: Step, x: BatchedActivations) -> Layout:
        """In which a product is made."""
        if step.kind == "dense" and len(x.features) == 1:
            return "first"
        return "last" if step.kind == "convolution" and len(x.features) == 3 else "samples"

    def _product(self, i: int, states: States, needed: Ints, x: BatchedActivations) -> BatchedActivations:
        step = self.program.steps[i]
        layout = self._layout(step, x)
        if layout == "last":
            x = x.turned("last")
        rounded, parameters = states.rounded[needed], states.parameters[needed]
        if step.groups == 1 and layout != "samples":
            members, counts = np.unique(rounded, return_counts=True)
            columns = counts[0]
            chosen = parameters[:columns]
            # States are numbered by rounded input, then by parameters: often they are a full table of the two.
            if (counts == columns).all() and (parameters.reshape(-1, columns) == chosen).all():
                subset = tuple(chosen.tolist())
                formats = np.unique(states.rounded_data[members]).tolist()
                if all(self.program.exact(step, d, p) for d in formats for p in subset):
                    return BatchedActivations([self._merged(i, subset, members, states, x, layout)], layout, needed)
        return self._scattered(i, states, needed, x, layout)

    def _scattered(
        self, i: int, states: States, needed: Ints, x: BatchedActivations, layout: Layout
    ) -> BatchedActivations:
        """Products for any set of rounded inputs and parameters: those inputs that need the same parameters together,
        and what is not exact alone."""
        step = self.program.steps[i]
        rounded, parameters = states.rounded[needed].tolist(), states.parameters[needed].tolist()
        place = {pair: k for k, pair in enumerate(zip(rounded, parameters, strict=True))}
        exact: dict[int, list[int]] = {}
        alone: list[tuple[int, int]] = []
        for r, p in place:
            if layout != "samples" and self.program.exact(step, int(states.rounded_data[r]), p):
                exact.setdefault(r, []).append(p)
            else:
                alone.append((r, p))
        groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for r, chosen in exact.items():
            # A convolution of bytes takes inputs of one format.
            own = int(states.rounded_data[r]) if layout == "last" else -1
            for subset in [tuple(chosen)] if step.groups == 1 else [(p,) for p in chosen]:
                groups.setdefault((subset, own), []).append(r)
        parts: list[Tensor] = []
        where = np.zeros((len(needed), 3), dtype=np.int64)
        for number, ((subset, _), members) in enumerate(groups.items()):
            parts.append(self._merged(i, subset, np.array(members), states, x, layout))
            for row, r in enumerate(members):
                for column, p in enumerate(subset):
                    where[place[r, p]] = (number, row, column)
        last: tuple[int, Tensor] = (-1, self.x)
        for r, p in alone:
            if last[0] != r:
                value = x.tensor(int(x.positions(states.rounded_parent[r : r + 1])[0]))
                rounds = self.program.data_format(step, int(states.rounded_data[r]))
                last = (r, value if rounds is None else rounds.quantize(value))
            result = self._apply(step, last[1], *self.program.parameters(step, p))
            where[place[r, p]] = (len(parts), 0, 0)
            if layout == "first":
                parts.append(result.t().contiguous()[None, None])
            else:
                parts.append(activations.from_plain(result[None, :, None], layout))
        return BatchedActivations(parts, layout, needed, where)

    def _merged(
        self, i: int, subset: tuple[int, ...], members: Ints, states: States, x: BatchedActivations, layout: Layout
    ) -> Tensor:
        """One product for some rounded inputs and parameter options, all exact: a part of the result."""
        step, program = self.program.steps[i], self.program
        at, formats = x.positions(states.rounded_parent[members]), states.rounded_data[members]
        if layout == "last":
            done = self._bytes(i, subset, at, formats, x)
            if done is not None:
                return done
            weight, bias = program.merged(step, subset)
            inputs = activations.rounded(x, at, formats, program.rounding(step), "last")
            out = self._apply(step, inputs.flatten(0, 1).permute(0, 3, 1, 2), weight, bias)
            return self._table(out, len(members), len(subset))
        weight, bias = program.merged(step, subset)
        features = x.features[0]
        ones = weight.shape[1] - features
        inputs = activations.rounded(x, at, formats, program.rounding(step), "first", extra=ones)
        if ones:
            inputs[:, features:] = 1.0
        out = activations.room((len(members), len(weight), self.samples), program.device)
        torch.bmm(weight.expand(len(members), *weight.shape), inputs, out=out)
        return out.view(len(members), len(subset), -1, self.samples)

    def _bytes(self, i: int, subset: tuple[int, ...], at: Ints, formats: Ints, x: BatchedActivations) -> Tensor | None:
        """A merged convolution whose operands fit bytes; None if they do not."""
        step, program = self.program.steps[i], self.program
        parts: list[tuple[Ints, Tensor]] = []
        for own in np.unique(formats).tolist():
            rows = np.flatnonzero(formats == own)
            convolution = program.bytes(step, own, subset, x.rectify)
            if convolution is None:
                return None
            grids = np.repeat(convolution.grid[None], len(rows), axis=0)
            inputs = activations.rounded_bytes(x, at[rows], grids)
            if inputs is None:
                return None
            parts.append((rows, convolution(inputs.flatten(0, 1).permute(0, 3, 1, 2))))
        if len(parts) == 1:
            return self._table(parts[0][1], len(at), len(subset))
        tables = [self._table(out, len(rows), len(subset)) for rows, out in parts]
        whole = activations.room((len(at), *tables[0].shape[1:]), "cpu")
        for (rows, _), table in zip(parts, tables, strict=True):
            whole[torch.from_numpy(rows)] = table
        return whole

    def _table(self, out: Tensor, rows: int, columns: int) -> Tensor:
        """The result of a merged convolution, (rows · samples, columns · depth, height, width), as a part."""
        last = out.permute(0, 2, 3, 1).contiguous()
        return last.view(rows, self.samples, *last.shape[1:3], columns, -1)

    def _apply(self, step: Step, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert step.site is not None
        return apply_site(self.program.model, step.site, step.node, {"data_in": x, "weight": weight, "bias": bias})

    def _relu(self, i: int, states: States, needed: Ints, x: BatchedActivations) -> BatchedActivations:
        step = self.program.steps[i]
        formats = states.data[needed]
        if self.program.unformatted(step, formats) and len(needed) == len(x.have):
            return replace(x, rectify=True, have=needed)
        at = x.positions(states.parents[needed, 0])
        out = activations.rounded(x, at, formats, self.program.rounding(step), x.layout, rectify=True)
        return BatchedActivations([out.unsqueeze(activations.COLUMNS[x.layout])], x.layout, needed)

    def _sum(self, i: int, states: States, needed: Ints, inputs: list[BatchedActivations]) -> BatchedActivations | None:
        """Elementwise arithmetic on two tensors of one shape; None where it is something else (broadcasting)."""
        step = self.program.steps[i]
        nodes = [n for n in step.node.args if isinstance(n, fx.Node)]
        order = [step.node.all_input_nodes.index(n) for n in nodes]
        if len(order) != 2 or inputs[order[0]].features != inputs[order[1]].features:
            return None
        a, b = (inputs[k] for k in order)
        layout: Layout = "last" if "last" in (a.layout, b.layout) else a.layout
        a, b = a.turned(layout), b.turned(layout)
        at = (a.positions(states.parents[needed, order[0]]), b.positions(states.parents[needed, order[1]]))
        formats = states.data[needed]
        assert step.site is not None
        merge = step.site.operation.merge
        assert merge is not None
        assert merge.function is not None
        if merge.function is torch.add and self.program.unformatted(step, formats):
            out = activations.added(a, b, at)
        else:
            rounding = self.program.rounding(step)
            out = activations.rounded(a, at[0], formats, rounding, layout)
            right = activations.rounded(b, at[1], formats, rounding, layout)
            merge.function(out, right, out=out)
        return BatchedActivations([out.unsqueeze(activations.COLUMNS[layout])], layout, needed)

    def _module(self, step: Step, needed: Ints, x: BatchedActivations) -> BatchedActivations | None:
        """A module that treats every value, or every window of a channel, alone."""
        module: Any = self.program.model.get_submodule(str(step.node.target))
        normalises = step.kind == "norm"
        if step.kind == "identity" or (step.kind == "flatten" and len(x.features) == 1):
            return replace(x, have=needed)
        if normalises and x.layout == "last":
            x = x.settled()
            return replace(x, have=needed, norm=self.program.norm(step))
        x = x.compact()
        if x.layout == "last" and step.kind == "selection":
            parts = []
            for part in (x if x.norm is None else x.settled()).parts:
                rows, samples, height, width, columns, depth = part.shape
                flat = part.reshape(rows * samples, height, width, columns * depth).permute(0, 3, 1, 2)
                out = module(flat).permute(0, 2, 3, 1).contiguous()
                parts.append(out.view(rows, samples, *out.shape[1:3], columns, depth))
            # A maximum and a ReLU may change places.
            return BatchedActivations(parts, "last", needed, x.irregular, rectify=x.rectify and x.norm is None)
        rectify = x.rectify and not normalises and x.norm is None
        plain = (replace(x, rectify=False) if rectify else x.settled()).turned("samples")
        parts = []
        for part in plain.parts:
            out = module(part.reshape(-1, *part.shape[3:]))
            parts.append(out.view(*part.shape[:3], *out.shape[1:]))
        return BatchedActivations(parts, "samples", needed, plain.irregular, rectify=rectify)

    def _corrected(self, i: int, states: States, needed: Ints, x: BatchedActivations) -> BatchedActivations:
        """A batch norm whose statistics depend on the option of the site before it: states of an option together."""
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
        """Per state of a corrected batch norm the data and the parameter option of the site before it."""
        site = self.schedule.states[self.program.steps[i].inputs[0]]
        parents = states.parents[needed, 0]
        return np.stack([site.data[parents], site.parameters[parents]], axis=1)

    def _call(
        self, i: int, states: States, needed: Ints, inputs: Sequence[BatchedActivations | SeparateActivations]
    ) -> SeparateActivations:
        """Anything else: state by state, as the deployed model does it."""
        step, program = self.program.steps[i], self.program
        node = step.node
        function: Any = node.target
        values: list[Any] = []
        for state in needed.tolist():
            own: dict[fx.Node, Any] = {}
            for n, value, parent in zip(node.all_input_nodes, inputs, states.parents[state], strict=True):
                k = int(value.positions(np.array([parent]))[0])
                own[n] = value.tensor(k) if isinstance(value, BatchedActivations) else value.values[k]
            args, kwargs = self._quantized(step, states, state, own)
            if step.kind in PRODUCTS:
                values.append(self._apply(step, args[0], *program.parameters(step, int(states.parameters[state]))))
            elif step.corrected:
                ((data, parameters),) = self._options_before(i, states, np.array([state])).tolist()
                values.append(program.normalise(step, program.steps[step.inputs[0]], data, parameters, args[0]))
            elif node.op == "call_module" and step.site is not None:
                values.append(self._call_site(step, int(states.parameters[state]), args))
            elif node.op == "call_module":
                values.append(program.model.get_submodule(str(node.target))(*args, **kwargs))
            elif node.op == "call_method":
                values.append(getattr(args[0], str(node.target))(*args[1:], **kwargs))
            else:
                values.append(function(*args, **kwargs))
        return SeparateActivations(values, needed)

    def _quantized(
        self, step: Step, states: States, state: int, own: Mapping[fx.Node, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of a call, those of a site quantized."""
        node = step.node
        args, kwargs = _mapped(node, own)
        if step.site is None or step.group is None:
            return args, kwargs
        formats = self._formats(step, int(states.data[state]), int(states.parameters[state]))
        if step.site.path:
            flowing = [o for o in step.site.operation.operands if o.role == "activation"]
            for position, spec in enumerate(flowing[: len(args)]):
                args[position] = _quantized(formats, spec, args[position])
            return args, kwargs
        for name in operand_nodes(node, step.site.operation):
            spec = step.site.operation.operand(name)
            if spec.position < len(args):
                args[spec.position] = _quantized(formats, spec, args[spec.position])
            else:
                kwargs[spec.argument] = _quantized(formats, spec, kwargs[spec.argument])
        return args, kwargs

    def _formats(self, step: Step, data: int, parameters: int) -> dict[str, Format]:
        """The formats of all operands of a site under an option of its input and one of its other operands."""
        formats = dict(self.program.parameter_formats(step, parameters))
        data_format = self.program.data_format(step, data)
        return formats if data_format is None else {**formats, "data_in": data_format}

    def _call_site(self, step: Step, parameters: int, args: Sequence[Any]) -> Tensor:
        """A module that can be quantized, and that nothing merges: its own operation, on quantized operands.

        Args:
            args: its inputs, quantized.
        """
        assert step.site is not None
        operation, formats = step.site.operation, self.program.parameter_formats(step, parameters)
        assert operation.call is not None
        module = self.program.model.get_submodule(str(step.node.target))
        flowing = iter(args)
        operands: dict[str, Tensor | None] = {}
        for spec in operation.operands:
            held = spec.role != "activation"
            value = getattr(module, spec.name, None) if held else next(flowing)
            operands[spec.name] = _quantized(formats, spec, value) if held and value is not None else value
        return operation.call(module, operands)

    # --- the end ---

    def _score(self, value: BatchedActivations | SeparateActivations) -> None:
        stack = self._stacked(value)
        if stack is None or len(stack.features) != 1:
            raise TypeError("the model's output is no tensor of shape (samples, classes)")
        if not stack.whole:
            stack = stack.compact()
        if stack.layout == "first":
            logits = [p.flatten(0, 1) for p in stack.parts]
        else:
            logits = [p.permute(0, 2, 3, 1).flatten(0, 1) for p in stack.parts]
        results = [kernels.score(z, self.y, rectify=stack.rectify) for z in logits]
        if stack.irregular is None:
            self.scored.append((stack.have, *results[0]))
            return
        loss, correct = (torch.cat(column) for column in zip(*results, strict=True))
        widths = np.array([p.shape[activations.COLUMNS[stack.layout]] for p in stack.parts])
        offsets = np.concatenate([[0], np.cumsum([len(z) for z in logits])])
        part, row, column = stack.where.T
        index = torch.from_numpy(offsets[part] + row * widths[part] + column).to(loss.device)
        self.scored.append((stack.have, loss[index], correct[index]))


def _quantized(formats: Mapping[str, Format], spec: OperandSpec, value: Any) -> Any:
    rounds = formats.get(spec.format_of or spec.name)
    return value if rounds is None else rounds.quantize(value)


def _mapped(node: fx.Node, values: Mapping[fx.Node, Any]) -> tuple[list[Any], dict[str, Any]]:
    """A node's arguments with values in place of nodes."""
    args: Any = fx.map_arg(node.args, lambda n: values[n])
    kwargs: Any = fx.map_arg(node.kwargs, lambda n: values[n])
    return list(args), dict(kwargs)


def _attribute(model: nn.Module, target: str) -> Any:
    path, _, name = target.rpartition(".")
    return getattr(model.get_submodule(path), name)
