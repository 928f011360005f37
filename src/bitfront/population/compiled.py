"""Populations on the CPU: every member is trained by the compiled steps, in one thread, out of the cache.

Members share the batches, gathered once for all of them and laid out with samples side by side, and nothing else. So a
member's weights cannot depend on who else is trained; members may differ in widths, formats and even structure; and a
thread that is done with one takes the next.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfront import kernels
from bitfront.formats.grid import FixedPoint
from bitfront.kernels import training as steps
from bitfront.population.programs import Shape, SlidingWindow, TrainingProgram, TrainingStep
from bitfront.training import StateDict, TrainSettings, snapshot

#: Batches are gathered in pieces of at most this size.
GATHERED_BYTES = 16 << 20
#: Activations and gradients of a tile of samples should stay in a core's own cache.
TILE_BYTES = 1 << 19
SMALLEST_TILE = 64


@dataclass(frozen=True)
class EpochOutcome:
    """What an epoch of one member brought: the losses of its batches, right answers among their samples, and loss and
    right answers (as means) on the val samples."""

    losses: Tensor
    correct: int
    val_loss: float
    val_accuracy: float


@dataclass(frozen=True)
class _Layout:
    """A program as the compiled steps want it: operations, and how much memory they use, in floats or rows."""

    operations: Any
    kept: tuple[Tensor, ...]
    parameters: dict[int, int]
    rows: int
    packed: int
    logits: int


@dataclass
class CompiledMember:
    """A network in training.

    Attributes:
        values, buffers: its parameters and running statistics, one after another.
        norms: path, place in `buffers`, channels, and calls per step of its batch norms.
        taken: optimizer steps so far.
    """

    model: nn.Module
    structure: steps.NativeMember
    layout: _Layout
    values: Tensor
    buffers: Tensor
    moments: tuple[Tensor, Tensor]
    norms: tuple[tuple[str, int, int, int], ...]
    taken: int = 0

    @staticmethod
    def of(model: nn.Module, program: TrainingProgram) -> CompiledMember:
        """`model`, ready to be trained; it is not changed."""
        places: dict[int, int] = {}
        place = 0
        for parameter in model.parameters():
            places[id(parameter)] = place
            place += parameter.numel()
        values = torch.cat([p.detach().reshape(-1).cpu() for p in model.parameters()])
        norms: list[tuple[str, int, int, int]] = []
        statistics: list[Tensor] = []
        calls = [step.path for step in program.steps if step.kind == "norm"]
        for path in dict.fromkeys(calls):
            norm = model.get_submodule(path)
            mean, variance = norm.get_buffer("running_mean").cpu(), norm.get_buffer("running_var").cpu()
            norms.append((path, sum(s.numel() for s in statistics), len(mean), calls.count(path)))
            statistics += [mean, variance]
        buffers = torch.cat(statistics).clone() if statistics else torch.zeros(1)
        layout = _laid_out(model, program, places, {path: place for path, place, _, _ in norms})
        moments = (torch.zeros_like(values), torch.zeros_like(values))
        structure = steps.NativeMember(
            ctypes.addressof(layout.operations),
            len(layout.operations),
            len(values),
            layout.logits,
            program.shapes[program.logits][0],
            values.data_ptr(),
            buffers.data_ptr(),
            moments[0].data_ptr(),
            moments[1].data_ptr(),
        )
        return CompiledMember(model, structure, layout, values, buffers, moments, tuple(norms))

    def state(self) -> StateDict:
        """The state dict as it is now, on the CPU."""
        found = snapshot(self.model)
        named = dict(self.model.named_parameters(remove_duplicate=False))
        for key, parameter in named.items():
            if key in found:
                place = self.layout.parameters[id(parameter)]
                found[key] = self.values[place : place + parameter.numel()].reshape(parameter.shape).clone()
        for path, place, channels, calls in self.norms:
            prefix = f"{path}." if path else ""
            found[f"{prefix}running_mean"] = self.buffers[place : place + channels].clone()
            found[f"{prefix}running_var"] = self.buffers[place + channels : place + 2 * channels].clone()
            found[f"{prefix}num_batches_tracked"] += calls * self.taken
        return found

    def tile(self, batch: int) -> int:
        """How many samples of a batch go through the network together: all where they influence each other."""
        whole = _rounded_up(batch, steps.LANES)
        if self.norms:
            return whole
        fitting = TILE_BYTES // (8 * self.layout.rows) // steps.LANES * steps.LANES
        return min(whole, max(SMALLEST_TILE, fitting))


class CpuTrainer:
    """Models in training, by their numbers. `parts`: see ``train_population``."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        programs: Sequence[TrainingProgram],
        settings: TrainSettings,
        parts: dict[str, float] | None,
    ) -> None:
        self.members = [CompiledMember.of(m, p) for m, p in zip(models, programs, strict=True)]
        self.settings = settings
        self.parts = parts

    def epoch(
        self,
        going: Sequence[int],
        x: Tensor,
        y: Tensor,
        val: tuple[Tensor, Tensor],
        batches: Sequence[Tensor],
        rate: float,
    ) -> list[EpochOutcome]:
        """One pass of the members `going` over `batches`, indices into x and y, and their scores on `val`."""
        members = [self.members[i] for i in going]
        return train_epoch(members, x, y, val, batches, self.settings, rate, self.parts)

    def state(self, member: int) -> StateDict:
        """The state dict of a model as it is now, on the CPU."""
        return self.members[member].state()


def train_epoch(
    members: Sequence[CompiledMember],
    x: Tensor,
    y: Tensor,
    val: tuple[Tensor, Tensor],
    batches: Sequence[Tensor],
    settings: TrainSettings,
    rate: float,
    parts: dict[str, float] | None = None,
) -> list[EpochOutcome]:
    """One pass of every member over `batches`, indices into x and y, and its scores on `val`.

    As many threads as torch may use share out the members; each member is worked on by one at a time, by the same
    instructions whoever else there is.
    """
    labels, val_labels = y.int(), val[1].int()
    losses: list[list[Tensor]] = [[] for _ in members]
    correct = [0] * len(members)
    val_x = _side_by_side(val[0].flatten(1).numpy()[None])
    memories = [_Memory(members, max(len(b) for b in batches)) for _ in range(_threads(len(members)))]
    scores = [(0.0, 0.0)] * len(members)

    def learn(i: int, memory: _Memory, part: tuple[Tensor, Tensor, int]) -> None:
        member = members[i]
        kind = steps.OPTIMIZERS.index(settings.optimizer)
        optimizer = steps.NativeOptimizer(kind, member.taken, rate, settings.weight_decay)
        seconds = memory.seconds if parts is not None else None
        found, right = steps.train_batches(
            member.structure, memory.scratch(member.tile(part[2])), optimizer, *part, seconds
        )
        member.taken += len(found)
        losses[i].append(found)
        correct[i] += right

    def judge(i: int, memory: _Memory) -> None:
        logits = steps.logits(members[i].structure, memory.scratch(memory.tile), val_x[0], len(val_labels))
        loss, right = kernels.score(logits.unsqueeze(0), val_labels)
        scores[i] = float(loss) / len(val_labels), int(right) / len(val_labels)

    with ThreadPoolExecutor(len(memories)) as pool:
        for part in _gathered(x, labels, batches):
            _share_out(functools.partial(learn, part=part), len(members), memories, pool)
        _share_out(judge, len(members), memories, pool)
    if parts is not None:
        for memory in memories:
            for name, seconds in zip(steps.PARTS, memory.seconds.tolist(), strict=True):
                parts[name] = parts.get(name, 0.0) + seconds
    return [
        EpochOutcome(torch.cat(own), right, *score) for own, right, score in zip(losses, correct, scores, strict=True)
    ]


def _threads(members: int) -> int:
    return max(1, min(torch.get_num_threads(), members))


def _share_out(
    work: Callable[[int, _Memory], None], count: int, memories: Sequence[_Memory], pool: ThreadPoolExecutor
) -> None:
    """work(i, memory) for every i below `count`, a thread per memory; who is done with one takes the next."""
    turns = iter(range(count))

    def run(memory: _Memory) -> None:
        for i in turns:
            work(i, memory)

    others = [pool.submit(run, memory) for memory in memories[1:]]
    run(memories[0])
    for other in others:
        other.result()


class _Memory:
    """What one thread works in: enough for any of the members."""

    def __init__(self, members: Sequence[CompiledMember], batch: int) -> None:
        self.tile = max(member.tile(batch) for member in members)
        rows = max(member.layout.rows for member in members)
        stride = _stride(self.tile)
        self._rows = torch.zeros(rows, stride)
        self._gradients = torch.zeros(rows + 1, stride)
        self._packed = torch.zeros(max(member.layout.packed for member in members))
        self._learned = torch.zeros(max(len(member.values) for member in members))
        self.seconds = torch.zeros(len(steps.PARTS), dtype=torch.float64)

    def scratch(self, tile: int) -> steps.NativeScratch:
        stride = _stride(tile)
        return steps.NativeScratch(
            self._rows.data_ptr(),
            self._gradients.data_ptr() + 4 * stride,
            self._packed.data_ptr(),
            self._learned.data_ptr(),
            stride,
            tile,
        )


def _stride(samples: int) -> int:
    """Floats from row to row: an odd number of cache lines, so that the rows of a column do not share one set."""
    return (_rounded_up(samples, steps.LANES) // steps.LANES | 1) * steps.LANES


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _gathered(x: Tensor, labels: Tensor, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(samples, labels, batch size) of batches of one size after another, in pieces of bounded size."""
    # NumPy, because torch would wake its own threads for this, and on a busy machine wait for them.
    samples, classes = x.flatten(1).numpy(), labels.numpy()
    begin = 0
    while begin < len(batches):
        size = len(batches[begin])
        most = max(1, GATHERED_BYTES // (4 * samples.shape[1] * size))
        end = begin
        while end < len(batches) and end - begin < most and len(batches[end]) == size:
            end += 1
        wanted = np.concatenate([batch.numpy() for batch in batches[begin:end]])
        piece = samples[wanted].reshape(end - begin, size, -1)
        yield _side_by_side(piece), torch.from_numpy(classes[wanted]).view(end - begin, size), size
        begin = end


def _side_by_side(x: NDArray[np.float32]) -> Tensor:
    """(steps, samples, features) → (steps, features, stride), zeros behind the samples."""
    count, samples, features = x.shape
    out = np.zeros((count, features, _stride(samples)), dtype=np.float32)
    out[:, :, :samples] = x.transpose(0, 2, 1)
    return torch.from_numpy(out)


# -- a program's layout


def _laid_out(model: nn.Module, program: TrainingProgram, places: dict[int, int], states: dict[str, int]) -> _Layout:
    rows = _Rows(program)
    kept: list[Tensor] = []
    operations: list[steps.NativeOperation] = []
    packed = 0
    for step in program.steps:
        if step.kind == "flatten":
            continue
        operation, size, tensors = _operation(model, program, step, places, states)
        operation.input = rows.of[step.inputs[0]]
        operation.input2 = rows.of[step.inputs[-1]]
        operation.output = rows.of[step.output]
        operation.scratch = packed
        packed += _rounded_up(size, steps.LANES)
        kept += tensors
        operations.append(operation)
    _mark_gradients(operations)
    array = (steps.NativeOperation * len(operations))(*operations)
    return _Layout(array, tuple(kept), places, max(1, rows.count), max(1, packed), rows.of[program.logits])


class _Rows:
    """Where each value stands in the table of rows; the input does not. A flattened value stands where it stood."""

    def __init__(self, program: TrainingProgram) -> None:
        self.of: dict[int, int] = {0: -1}
        self.count = 0
        for step in program.steps:
            if step.kind == "flatten":
                self.of[step.output] = self.of[step.inputs[0]]
            else:
                self.of[step.output] = self.count
                self.count += math.prod(program.shapes[step.output])


def _mark_gradients(operations: Sequence[steps.NativeOperation]) -> None:
    """Backward, the first to give a value its gradient writes it, the others add."""
    written: set[int] = set()

    def mark(place: int) -> int:
        if place < 0:
            return -1
        seen = place in written
        written.add(place)
        return int(seen)

    add = steps.KINDS.index("add")
    for operation in reversed(operations):
        operation.adds = mark(operation.input)
        operation.adds2 = mark(operation.input2) if operation.kind == add else -1


def _operation(
    model: nn.Module, program: TrainingProgram, step: TrainingStep, places: dict[int, int], states: dict[str, int]
) -> tuple[steps.NativeOperation, int, list[Tensor]]:
    """(operation, floats of scratch it needs, tensors it points into)."""
    source, target = program.shapes[step.inputs[0]], program.shapes[step.output]
    operation = steps.NativeOperation(
        kind=steps.KINDS.index("product" if step.kind in ("linear", "conv") else step.kind),
        channels_in=source[0],
        channels=target[0],
        positions_in=math.prod(source[1:]),
        positions=math.prod(target[1:]),
        blocks=1,
        weight=-1,
        bias=-1,
        state=states.get(step.path, -1),
        first=_grid(step.first),
        second=_grid(step.second),
        rectify=step.rectify,
    )
    if step.path:
        module = model.get_submodule(step.path)
        for name in ("weight", "bias"):
            parameter = getattr(module, name)
            setattr(operation, name, -1 if parameter is None else places[id(parameter)])
        if step.kind == "norm":
            operation.momentum, operation.epsilon = module.momentum, module.eps
            return operation, 2 * target[0], []
    if step.kind in ("activate", "add"):
        return operation, 0, []
    operation.blocks = 1 if step.window is None else math.prod(step.window.kernel)
    lists = _lists(source[1:], target[1:], step.window)
    for name, (starts, pairs) in zip(("forward", "backward", "pairs"), lists, strict=True):
        setattr(operation, name, steps.NativeLists(starts.data_ptr(), pairs.data_ptr()))
    # Rounded up to the most channels that any machine's kernels take at a time.
    outs, ins = _rounded_up(target[0], 8), _rounded_up(source[0], 8)
    size = outs * source[0] * operation.blocks + outs + ins * target[0] * operation.blocks
    return operation, size, [tensor for pair in lists for tensor in pair]


@functools.lru_cache(maxsize=256)
def _lists(source: Shape, target: Shape, window: SlidingWindow | None) -> tuple[tuple[Tensor, Tensor], ...]:
    """What meets in a window sliding over an image, three ways: per position of the output (weight of the kernel,
    position of the input), per position of the input (weight, position of the output), and per weight (position of the
    output, position of the input). Each as (starts of the lists, pairs).

    Args:
        source, target: height and width of the two images; empty, as is the window, for vectors.
    """
    met = [(0, 0, 0)] if window is None else list(_met(source, target, window))
    weights = 1 if window is None else math.prod(window.kernel)
    return (
        _listed(math.prod(target), [(out, weight, position) for weight, out, position in met]),
        _listed(math.prod(source), [(position, weight, out) for weight, out, position in met]),
        _listed(weights, met),
    )


def _met(source: Shape, target: Shape, window: SlidingWindow) -> Iterator[tuple[int, int, int]]:
    """(weight, position of the output, position of the input), in the order of the kernel."""
    for down, across in itertools.product(*map(range, target)):
        for i, j in itertools.product(*map(range, window.kernel)):
            y = down * window.stride[0] + i - window.padding[0]
            x = across * window.stride[1] + j - window.padding[1]
            if 0 <= y < source[0] and 0 <= x < source[1]:
                yield i * window.kernel[1] + j, down * target[1] + across, y * source[1] + x


def _listed(count: int, entries: Sequence[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    lists: list[list[int]] = [[] for _ in range(count)]
    for which, first, second in entries:
        lists[which] += [first, second]
    starts = [0, *itertools.accumulate(len(own) // 2 for own in lists)]
    flat = list(itertools.chain.from_iterable(lists))
    return torch.tensor(starts, dtype=torch.int32), torch.tensor(flat or [0], dtype=torch.int32)


def _grid(grid: FixedPoint | None) -> steps.NativeGrid:
    return steps.NativeGrid() if grid is None else steps.NativeGrid(*grid.row)
