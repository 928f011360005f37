"""From a program to the operations of the compiled training steps: what each takes, gives, and needs of memory.

The compiled steps work on a table with a row per element of an intermediate value and a column per sample. A product
(linear layer or convolution) has lists that say which elements of its input meet which weights.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitfront.formats.grid import FixedPoint
from bitfront.kernels import training as steps
from bitfront.operations.training import Shape, SlidingWindow
from bitfront.population.programs import TrainingProgram, TrainingStep


@dataclass(frozen=True)
class CompiledProgram:
    """A program as the compiled steps take it.

    Attributes:
        operations: array of ``NativeOperation``, in the order of execution; it points into the tensors of `held`.
        held: tensors that must live as long as the operations.
        parameters: id of a parameter of the model → its place among the member's values.
        rows: number of rows of the table of intermediate values, 1 or more.
        packed: number of floats of packed weights, 1 or more.
        logits: first row of the logits.
    """

    operations: Any
    held: tuple[Tensor, ...]
    parameters: dict[int, int]
    rows: int
    packed: int
    logits: int


def compile_program(
    model: nn.Module, program: TrainingProgram, places: dict[int, int], states: dict[str, int]
) -> CompiledProgram:
    """The operations of a program.

    Args:
        model: the model of the program.
        program: its steps.
        places: id of a parameter of the model → its place among the member's values.
        states: module path of a batch norm → place of its running statistics among the member's buffers.
    """
    rows = _Rows(program)
    held: list[Tensor] = []
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
        packed += rounded_up(size, steps.LANES)
        held += tensors
        operations.append(operation)
    mark_gradients(operations)
    array = (steps.NativeOperation * len(operations))(*operations)
    return CompiledProgram(array, tuple(held), places, max(1, rows.count), max(1, packed), rows.of[program.logits])


class _Rows:
    """The first row of each value in the table. The input is not in the table. A flattened value keeps its rows."""

    def __init__(self, program: TrainingProgram) -> None:
        self.of: dict[int, int] = {0: -1}
        self.count = 0
        for step in program.steps:
            if step.kind == "flatten":
                self.of[step.output] = self.of[step.inputs[0]]
            else:
                self.of[step.output] = self.count
                self.count += math.prod(program.shapes[step.output])


def mark_gradients(operations: Sequence[steps.NativeOperation]) -> None:
    """In the backward pass the first operation that gives a value its gradient writes it, and the others add to it."""
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
    operation, tensors = operation_of(step, source, target)
    operation.state = states.get(step.path, -1)
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
    # Rounded up to 8, the largest number of channels that a kernel takes at a time on any machine.
    outs, ins = rounded_up(target[0], 8), rounded_up(source[0], 8)
    size = outs * source[0] * operation.blocks + outs + ins * target[0] * operation.blocks
    return operation, size, tensors


def operation_of(step: TrainingStep, source: Shape, target: Shape) -> tuple[steps.NativeOperation, list[Tensor]]:
    """The operation of a step, without its parameters, and the tensors it points into.

    Args:
        source, target: shape of a sample of its first input and of its output.
    """
    operation = steps.NativeOperation(
        kind=steps.KINDS.index("product" if step.kind in ("linear", "conv") else step.kind),
        channels_in=source[0],
        channels=target[0],
        positions_in=math.prod(source[1:]),
        positions=math.prod(target[1:]),
        blocks=1 if step.window is None else math.prod(step.window.kernel),
        weight=-1,
        bias=-1,
        state=-1,
        first=_grid(step.first),
        second=_grid(step.second),
        rectify=step.rectify,
    )
    if step.bend is not None:
        operation.first = steps.NativeGrid(0.0, step.bend.low, step.bend.high, step.bend.slope)
    if step.kind in ("activate", "bend", "add", "norm"):
        return operation, []
    lists = _lists(source[1:], target[1:], step.window)
    for name, (starts, pairs) in zip(("forward", "backward", "pairs"), lists, strict=True):
        setattr(operation, name, steps.NativeLists(starts.data_ptr(), pairs.data_ptr()))
    return operation, [tensor for pair in lists for tensor in pair]


@functools.lru_cache(maxsize=256)
def _lists(source: Shape, target: Shape, window: SlidingWindow | None) -> tuple[tuple[Tensor, Tensor], ...]:
    """Which elements a sliding window multiplies, as three sets of lists.

    Args:
        source, target: sizes of a channel of the input and of the output; empty for vectors.
        window: None for vectors.

    Returns:
        Per position of the output the pairs (weight of the kernel, position of the input); per position of the input
        the pairs (weight, position of the output); per weight the pairs (position of the output, position of the
        input). Each as (start of each list, pairs), int32.
    """
    products = [(0, 0, 0)] if window is None else list(_products(source, target, window))
    weights = 1 if window is None else math.prod(window.kernel)
    return (
        _listed(math.prod(target), [(out, weight, position) for weight, out, position in products]),
        _listed(math.prod(source), [(position, weight, out) for weight, out, position in products]),
        _listed(weights, products),
    )


def _products(source: Shape, target: Shape, window: SlidingWindow) -> Iterator[tuple[int, int, int]]:
    """(weight, position of the output, position of the input) of every product, weights in the order of the kernel."""
    weights = list(itertools.product(*map(range, window.kernel)))
    for out, place in enumerate(itertools.product(*map(range, target))):
        for weight, offset in enumerate(weights):
            axes = zip(source, place, window.stride, offset, window.steps, window.padding, strict=True)
            position, inside = 0, True
            for size, p, stride, o, step, padding in axes:
                at = p * stride + o * step - padding
                inside &= 0 <= at < size
                position = position * size + at
            if inside:
                yield weight, out, position


def _listed(count: int, entries: Sequence[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    """Entries (list, first, second) as `count` lists of pairs: (start of each list, pairs), int32."""
    lists: list[list[int]] = [[] for _ in range(count)]
    for which, first, second in entries:
        lists[which] += [first, second]
    starts = [0, *itertools.accumulate(len(pairs) // 2 for pairs in lists)]
    flat = list(itertools.chain.from_iterable(lists))
    return torch.tensor(starts, dtype=torch.int32), torch.tensor(flat or [0], dtype=torch.int32)


def _grid(grid: FixedPoint | None) -> steps.NativeGrid:
    return steps.NativeGrid() if grid is None else steps.NativeGrid(*grid.row)


def rounded_up(number: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `number`."""
    return -(-number // multiple) * multiple
