"""What a network computes, as the short list of steps that populations know how to train.

A step reads values and makes one; values are numbered, 0 is the input. Rounding of a layer's input is part of the step
before it wherever nobody else reads that: one pass over the activations then does ReLU and rounding. Where a model has
no such list, ``program`` says in words why; it is trained alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from bitfront.formats.base import Format
from bitfront.formats.grid import FixedPoint
from bitfront.transforms.quantize import Quantizer, Twin

Kind = Literal["linear", "conv", "activate", "norm", "add", "largest", "mean", "flatten"]
#: Of one sample: channels, then height and width of an image.
Shape = tuple[int, ...]


@dataclass(frozen=True)
class SlidingWindow:
    """How a convolution or pooling slides over an image; each (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


@dataclass(frozen=True)
class TrainingStep:
    """One operation.

    Attributes:
        path: of the module with the parameters, "" where there are none.
        first, second: activate: rounding before and after the ReLU. linear, conv: of weight and bias.
        rectify: activate: whether there is a ReLU.
    """

    kind: Kind
    inputs: tuple[int, ...]
    output: int
    path: str = ""
    window: SlidingWindow | None = None
    first: FixedPoint | None = None
    rectify: bool = False
    second: FixedPoint | None = None


@dataclass(frozen=True)
class TrainingProgram:
    """A network: its steps in order, the shape of each value, and which value holds the logits."""

    steps: tuple[TrainingStep, ...]
    shapes: tuple[Shape, ...]
    logits: int

    @property
    def normed(self) -> bool:
        """Whether samples of a batch influence each other."""
        return any(step.kind == "norm" for step in self.steps)


class UnsupportedError(Exception):
    """A model is not made of the steps above; the message says where not."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = type(m).__module__ == "bitfront.transforms.quantize"
        return own or super().is_leaf_module(m, module_qualified_name)


#: Graphs that were traced before, by all that tracing can depend on.
Traced = dict[Hashable, fx.Graph]


def program(model: nn.Module, sample_shape: Shape, traced: Traced) -> TrainingProgram:
    """The steps of `model` in training.

    Args:
        traced: of other models of the same call; is added to. Tracing takes longer than all the rest.

    Raises:
        UnsupportedError: it has none, for the reason in the message.
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
    """What tracing depends on: the classes of all modules, and the attributes of those that are looked into. None where
    an attribute is more than a plain value."""
    parts: list[Hashable] = []
    for path, module in model.named_modules():
        parts.append((path, type(module)))
        if path and _LEAVES.is_leaf_module(module, path):
            continue
        own = {name: value for name, value in vars(module).items() if name not in _OF_ANY_MODULE}
        if not all(value is None or isinstance(value, (bool, int, float, str)) for value in own.values()):
            return None
        parts.append(tuple(sorted((name, type(value), value) for name, value in own.items())))
    return tuple(parts)


_OF_ANY_MODULE = frozenset(vars(nn.Module()))
_LEAVES = _Tracer()


def _graph(model: nn.Module) -> fx.Graph:
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = True  # a model may compute something else in training
        return _Tracer().trace(model)
    except Exception as error:
        raise UnsupportedError(f"it cannot be traced: {error}") from error
    finally:
        for module, flag in flags:
            module.training = flag


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
    """Walks a graph once and collects the steps."""

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
                found = node.args[0]
                if not isinstance(found, fx.Node) or len(self.shapes[self.values[found]]) != 1:
                    raise UnsupportedError("it does not return one vector of logits per sample")
                return TrainingProgram(tuple(self.steps), tuple(self.shapes), self.values[found])
            else:
                self.values[node] = self.step_of(node)
        raise UnsupportedError("it returns nothing")

    def step_of(self, node: fx.Node) -> int:
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            rule = _MODULES.get(module.original if isinstance(module, Twin) else type(module))
            if rule is None:
                raise UnsupportedError(f"{node.target} is a {type(module).__name__}")
            (source,) = self.sources(node, 1)
            return rule(self, source, module, str(node.target))
        if node.target in _ADDITIONS and not node.kwargs:
            left, right = (self.values[n] for n in self.sources(node, 2))
            if self.shapes[left] != self.shapes[right]:
                raise UnsupportedError(f"{node.name} adds tensors of different shapes")
            return self.emit("add", (left, right), self.shapes[left])
        if node.target in _RELUS and not node.kwargs.get("inplace") and not set(node.kwargs) - {"inplace"}:
            return self.activate(self.sources(node, 1)[0], rectify=True)
        if node.target in (torch.flatten, "flatten") and (node.args[1:] == (1,) or node.kwargs == {"start_dim": 1}):
            return self.flatten(self.values[cast(fx.Node, node.args[0])])
        raise UnsupportedError(f"{node.name} is a {getattr(node.target, '__name__', node.target)}")

    def sources(self, node: fx.Node, count: int) -> list[fx.Node]:
        if len(node.args) != count or not all(isinstance(a, fx.Node) for a in node.args):
            raise UnsupportedError(f"{node.name} has other arguments than {count} tensors")
        return cast("list[fx.Node]", list(node.args))

    def emit(self, kind: Kind, inputs: tuple[int, ...], shape: Shape, **more: Any) -> int:
        self.shapes.append(shape)
        self.steps.append(TrainingStep(kind, inputs, len(self.shapes) - 1, **more))
        return len(self.shapes) - 1

    def activate(
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
        return self.emit("activate", (value,), self.shapes[value], first=first, rectify=rectify, second=second)

    def flatten(self, value: int) -> int:
        shape = self.shapes[value]
        if len(shape) == 1:
            return value
        return self.emit("flatten", (value,), (shape[0] * shape[1] * shape[2],) if len(shape) == 3 else (-1,))


Rule = Callable[[_ProgramReader, fx.Node, Any, str], int]


def _grid(module: nn.Module, operand: str, path: str) -> FixedPoint | None:
    found = cast("Mapping[str, object]", getattr(module, "formats", {})).get(operand)
    return None if found is None else _grid_of(found, path)


def _grid_of(found: object, path: str) -> FixedPoint:
    grid = found.grid if isinstance(found, Format) and type(found).quantize is Format.quantize else None
    if grid is None or grid.rounding is None:
        label = found.label if isinstance(found, Format) else type(found).__name__
        raise UnsupportedError(f"the format {label} of {path} is no fixed-point grid")
    return grid.rounding


def _linear(reader: _ProgramReader, source: fx.Node, module: nn.Linear, path: str) -> int:
    value = reader.activate(source, second=_grid(module, "data_in", path))
    if len(reader.shapes[value]) != 1:
        raise UnsupportedError(f"{path} is applied to more than one vector per sample")
    grids = {"first": _grid(module, "weight", path), "second": _grid(module, "bias", path)}
    return reader.emit("linear", (value,), (module.out_features,), path=path, **grids)


def _convolution(reader: _ProgramReader, source: fx.Node, module: nn.Conv2d, path: str) -> int:
    value = reader.activate(source, second=_grid(module, "data_in", path))
    plain = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
    if not plain or isinstance(module.padding, str):
        raise UnsupportedError(f"{path} is a grouped, dilated or specially padded convolution")
    window = SlidingWindow(_two(module.kernel_size), _two(module.stride), _two(module.padding))
    grids = {"first": _grid(module, "weight", path), "second": _grid(module, "bias", path)}
    shape = (module.out_channels, *_slid(reader.shapes[value], window, path))
    return reader.emit("conv", (value,), shape, path=path, window=window, **grids)


def _relu(reader: _ProgramReader, source: fx.Node, module: nn.Module, path: str) -> int:
    if getattr(module, "inplace", False) and type(module) is nn.ReLU and len(source.users) > 1:
        raise UnsupportedError(f"{path} changes a tensor in place that others read")
    return reader.activate(source, first=_grid(module, "data_in", path), rectify=True)


def _quantizer(reader: _ProgramReader, source: fx.Node, module: Quantizer, path: str) -> int:
    return reader.activate(source, second=_grid_of(module.rounds, path))


def _norm(reader: _ProgramReader, source: fx.Node, module: nn.BatchNorm1d, path: str) -> int:
    value = reader.values[source]
    if module.momentum is None or not module.track_running_stats:
        raise UnsupportedError(f"{path} keeps no moving averages of its statistics")
    if len(reader.shapes[value]) != (3 if isinstance(module, nn.BatchNorm2d) else 1):
        raise UnsupportedError(f"{path} is applied to values of shape {reader.shapes[value]}")
    return reader.emit("norm", (value,), reader.shapes[value], path=path)


def _same(reader: _ProgramReader, source: fx.Node, module: nn.Module, path: str) -> int:  # noqa: ARG001
    return reader.values[source]


def _dropout(reader: _ProgramReader, source: fx.Node, module: nn.Dropout, path: str) -> int:
    if module.p:
        raise UnsupportedError(f"{path} draws random numbers")
    return reader.values[source]


def _flatten(reader: _ProgramReader, source: fx.Node, module: nn.Flatten, path: str) -> int:
    if (module.start_dim, module.end_dim) != (1, -1):
        raise UnsupportedError(f"{path} flattens some dimensions only")
    return reader.flatten(reader.values[source])


def _max_pool(reader: _ProgramReader, source: fx.Node, module: nn.MaxPool2d, path: str) -> int:
    if module.ceil_mode or module.return_indices or _two(module.dilation) != (1, 1):
        raise UnsupportedError(f"{path} is a dilated pooling, or one with ceil_mode or indices")
    window = SlidingWindow(_two(module.kernel_size), _two(module.stride), _two(module.padding))
    return _pool(reader, "largest", source, window, path)


def _mean_pool(reader: _ProgramReader, source: fx.Node, module: nn.AvgPool2d, path: str) -> int:
    if module.ceil_mode or _two(module.padding) != (0, 0) or module.divisor_override:
        raise UnsupportedError(f"{path} is a pooling with padding, ceil_mode or a divisor of its own")
    return _pool(reader, "mean", source, SlidingWindow(_two(module.kernel_size), _two(module.stride), (0, 0)), path)


def _global_pool(reader: _ProgramReader, source: fx.Node, module: nn.AdaptiveAvgPool2d, path: str) -> int:
    shape = reader.shapes[reader.values[source]]
    if module.output_size not in (1, (1, 1)) or len(shape) != 3:
        raise UnsupportedError(f"{path} pools to more than one pixel")
    return _pool(reader, "mean", source, SlidingWindow((shape[1], shape[2]), (1, 1), (0, 0)), path)


def _pool(
    reader: _ProgramReader, kind: Literal["largest", "mean"], source: fx.Node, window: SlidingWindow, path: str
) -> int:
    value = reader.values[source]
    shape = (reader.shapes[value][0], *_slid(reader.shapes[value], window, path))
    return reader.emit(kind, (value,), shape, window=window)


def _two(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _slid(shape: Shape, window: SlidingWindow, path: str) -> Shape:
    if len(shape) != 3:
        raise UnsupportedError(f"{path} is applied to values of shape {shape}")
    sizes = zip(shape[1:], window.kernel, window.stride, window.padding, strict=True)
    return tuple((size + 2 * padding - kernel) // stride + 1 for size, kernel, stride, padding in sizes)


_ADDITIONS = (operator.add, torch.add, "add")
_RELUS = (torch.relu, F.relu, "relu")
_MODULES: Mapping[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.ReLU: _relu,
    Quantizer: _quantizer,
    nn.BatchNorm1d: _norm,
    nn.BatchNorm2d: _norm,
    nn.Identity: _same,
    nn.Dropout: _dropout,
    nn.Flatten: _flatten,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _mean_pool,
    nn.AdaptiveAvgPool2d: _global_pool,
}
