"""From a network to a short list of steps, which is what population training can train.

A step reads values and computes one; values are numbered, and 0 is the input. If only one layer reads a value, the
rounding of this layer's input is part of the step that computes the value: one pass then does both ReLU and rounding.
If a model has no such list, ``program`` gives the reason, and the model is trained alone. The record of an operation
says which steps it consists of.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import fx, nn

from bitfront.formats.base import Format
from bitfront.formats.grid import FixedPoint
from bitfront.graph.tracing import OneInputTracer, trace
from bitfront.operations.base import DATA_OUT
from bitfront.operations.lookup import departure, of_class, of_function
from bitfront.operations.training import Bend, Shape, SlidingWindow, TrainingStepKind, UnsupportedError, unsupported
from bitfront.transforms.quantize import Quantizer, Twin


@dataclass(frozen=True)
class TrainingStep:
    """One operation.

    Attributes:
        path: path of the module with the parameters, "" if there are none.
        groups: of a convolution.
        bend: in bend: the function.
        first, second: rounding. In activate: before and after the ReLU; in linear and conv: of weight and bias.
        rectify: in activate: whether there is a ReLU.
    """

    kind: TrainingStepKind
    inputs: tuple[int, ...]
    output: int
    path: str = ""
    window: SlidingWindow | None = None
    groups: int = 1
    bend: Bend | None = None
    first: FixedPoint | None = None
    rectify: bool = False
    second: FixedPoint | None = None


@dataclass(frozen=True)
class TrainingProgram:
    """A network: its steps in order, the shape of each value, and the number of the value with the logits."""

    steps: tuple[TrainingStep, ...]
    shapes: tuple[Shape, ...]
    logits: int

    @property
    def normed(self) -> bool:
        """Whether samples of a batch influence each other."""
        return any(step.kind == "norm" for step in self.steps)

    @property
    def beyond_populations(self) -> str:
        """Which step a population cannot train, though learned bits can, in words; empty if it can train them all."""
        for step in self.steps:
            name, window = step.path or "a function", step.window
            if step.kind == "bend":
                return f"{name} is a ReLU with bounds or a slope"
            if step.kind == "softmax":
                return f"{name} is a softmax"
            if step.kind == "concatenate":
                return f"{name} joins values"
            if step.groups > 1 or (window is not None and window.dilated):
                return f"{name} is a grouped or dilated convolution"
            if window is not None and len(window.kernel) != 2:
                return f"{name} slides over a series"
            source = self.shapes[step.inputs[0]]
            if step.kind == "flatten" and len(source) != 3:
                return f"it flattens values of shape {source}, which are no images"
        return ""


class _TwinTracer(OneInputTracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (Twin, Quantizer)) or super().is_leaf_module(m, module_qualified_name)


#: Graphs traced before. The key is everything that tracing can depend on.
Traced = dict[Hashable, fx.Graph]


def program(model: nn.Module, sample_shape: Shape, traced: Traced) -> TrainingProgram:
    """The steps of `model` in training.

    Args:
        traced: graphs of other models of this call; the graph of this model is added. Tracing takes most of the time.

    Raises:
        UnsupportedError: there is no such list; the message gives the reason.
    """
    _check_modules(model)
    key = _traced_by(model)
    graph = traced.get(key)
    if graph is None:
        graph = _graph(model)
        if key is not None:
            traced[key] = graph
    return _ProgramReader(model, sample_shape).read(graph)


def _traced_by(model: nn.Module) -> Hashable:
    """What tracing depends on: the classes of all modules, and the attributes of those that are traced into. None if an
    attribute is not a plain value."""
    parts: list[Hashable] = []
    for path, module in model.named_modules():
        parts.append((path, type(module)))
        if path and _LEAVES.is_leaf_module(module, path):
            continue
        attributes = {name: value for name, value in vars(module).items() if name not in _OF_ANY_MODULE}
        if not all(value is None or isinstance(value, (bool, int, float, str)) for value in attributes.values()):
            return None
        parts.append(tuple(sorted((name, type(value), value) for name, value in attributes.items())))
    return tuple(parts)


_OF_ANY_MODULE = frozenset(vars(nn.Module()))
_LEAVES = _TwinTracer()


def _graph(model: nn.Module) -> fx.Graph:
    # A model may compute something else in training.
    graph, why = trace(model, training=True, tracer=_TwinTracer)
    if graph is None:
        raise UnsupportedError(f"it cannot be traced: {why}")
    return graph


def _check_modules(model: nn.Module) -> None:
    for path, module in model.named_modules():
        hooks = (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        if any(hooks):
            raise UnsupportedError(f"{path or 'the model'} has hooks")
        if type(module).train is not nn.Module.train:
            raise UnsupportedError(
                f"{path or 'the model'} has a method train of its class, which may keep parts of it in evaluation"
            )
        why = "" if isinstance(module, Twin) else departure(module)
        if why:
            raise UnsupportedError(f"{path or 'the model'}: {why}")
    if len(list(model.parameters())) < len(list(model.named_parameters(remove_duplicate=False))):
        raise UnsupportedError("some of its modules share parameters")
    for path, parameter in model.named_parameters():
        if not parameter.requires_grad:
            raise UnsupportedError(f"{path} is not trained")
        if parameter.dtype != torch.float32:
            raise UnsupportedError(f"{path} is {parameter.dtype}")
        if parameter._backward_hooks:
            raise UnsupportedError(f"{path} has hooks")


class _ProgramReader:
    """Reads a graph once and collects the steps: an ``operations.training.ProgramReader``."""

    def __init__(self, model: nn.Module, sample_shape: Shape) -> None:
        self.model = model
        self.steps: list[TrainingStep] = []
        self.shapes: list[Shape] = [tuple(sample_shape)]
        self.values: dict[fx.Node, int] = {}

    def read(self, graph: fx.Graph) -> TrainingProgram:
        for node in graph.nodes:
            if node.op == "placeholder":
                if self.values:
                    raise UnsupportedError("it takes more than one input")
                self.values[node] = 0
            elif node.op == "output":
                last = node.args[0]
                if not isinstance(last, fx.Node) or len(self.shapes[self.values[last]]) != 1:
                    raise UnsupportedError("it does not return one vector of logits per sample")
                return TrainingProgram(tuple(self.steps), tuple(self.shapes), self.values[last])
            else:
                self.values[node] = self._value_of(node)
        raise UnsupportedError("it returns nothing")

    def _value_of(self, node: fx.Node) -> int:
        module = self.model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if (rounded := _result_in_format(node, module)) is not None:
            raise UnsupportedError(f"the result of {rounded} has a format (data_out), and what is compiled rounds none")
        if isinstance(module, Quantizer):
            path = str(node.target)
            return self._activate(self.sources(node, 1)[0], second=_grid_of(module.rounds, path))
        if module is not None:
            kind = module.original if isinstance(module, Twin) else type(module)
            operation = of_class(kind)
            # A subclass may store its parameters differently.
            known = operation is not None and kind in operation.modules
        else:
            operation = of_function(node.target) if node.op in ("call_function", "call_method") else None
            known = operation is not None
        if operation is None or operation.train is None or not known:
            raise unsupported(node, module)
        return operation.train(self, node, module)

    # --- what the rules of operations use -----------------------------------------------------------------------------

    def sources(self, node: fx.Node, count: int) -> list[fx.Node]:
        if len(node.args) != count or not all(isinstance(a, fx.Node) for a in node.args):
            raise UnsupportedError(f"{node.name} has other arguments than {count} tensors")
        return cast("list[fx.Node]", list(node.args))

    def value(self, node: fx.Node) -> int:
        return self.values[node]

    def shape(self, value: int) -> Shape:
        return self.shapes[value]

    def formatted(self, path: str) -> bool:
        return bool(getattr(self.model.get_submodule(path), "formats", {}))

    def rounded(self, source: fx.Node, path: str) -> int:
        return self._activate(source, second=self._grid(path, "data_in"))

    def rectified(self, source: fx.Node, path: str = "") -> int:
        return self._activate(source, first=self._grid(path, "data_in"), rectify=True)

    def emit(
        self,
        kind: TrainingStepKind,
        inputs: tuple[int, ...],
        shape: Shape,
        *,
        path: str = "",
        window: SlidingWindow | None = None,
        groups: int = 1,
        bend: Bend | None = None,
    ) -> int:
        weight, bias = self._grid(path, "weight"), self._grid(path, "bias")
        step = TrainingStep(kind, inputs, len(self.shapes), path, window, groups, bend, first=weight, second=bias)
        return self._add(step, shape)

    def _add(self, step: TrainingStep, shape: Shape) -> int:
        self.shapes.append(shape)
        self.steps.append(step)
        return step.output

    def _grid(self, path: str, operand: str) -> FixedPoint | None:
        formats = getattr(self.model.get_submodule(path), "formats", {}) if path else {}
        return _grid_of(formats[operand], path) if operand in formats else None

    def _activate(
        self,
        source: fx.Node,
        *,
        first: FixedPoint | None = None,
        rectify: bool = False,
        second: FixedPoint | None = None,
    ) -> int:
        value = self.values[source]
        if first is None and not rectify:
            if second is None:
                return value
            before = self.steps[-1] if self.steps else None
            alone = len(source.users) == 1 and before is not None and before.output == value
            if before is not None and alone and before.kind == "activate" and before.second is None:
                self.steps[-1] = replace(before, second=second)
                return value
        step = TrainingStep("activate", (value,), len(self.shapes), first=first, rectify=rectify, second=second)
        return self._add(step, self.shapes[value])

    def flatten(self, value: int) -> int:
        shape = self.shapes[value]
        if len(shape) == 1:
            return value
        return self.emit("flatten", (value,), (math.prod(shape),))


def _result_in_format(node: fx.Node, module: nn.Module | None) -> object:
    """What has a format for its result: a twin, or what a quantizer takes; None for anything else."""
    if isinstance(module, Quantizer):
        return node.args[0] if module.operand.role == "result" else None
    return node.target if DATA_OUT in getattr(module, "formats", {}) else None


def _grid_of(rounds: object, path: str) -> FixedPoint:
    grid = rounds.grid if isinstance(rounds, Format) and type(rounds).quantize is Format.quantize else None
    if grid is None or grid.rounding is None:
        label = rounds.label if isinstance(rounds, Format) else type(rounds).__name__
        wraps = grid is not None and grid.wraps
        why = "wraps, and compiled steps saturate" if wraps else "is no fixed-point grid with one step"
        raise UnsupportedError(f"the format {label} of {path} {why}")
    return grid.rounding
