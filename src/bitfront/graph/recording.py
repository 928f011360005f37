"""Records the calls that a model makes when it runs: for models that torch.fx cannot trace.

A module whose operation has a record (``bitfront.operations``) is one call. Functions of torch called between such
modules, such as the matrix products in the attention of a transformer, are recorded by ``TorchFunctionMode``, under the
names that torch.fx uses. So no computation is missed, whatever types of modules a library has.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bitfront.operations.base import Call, Count, Products, Shape
from bitfront.operations.lookup import bare, count, function_name, module_name, of_function, of_module, tensors_in


@dataclass(frozen=True)
class CallSummary:
    """One call, per sample: the shapes of its input and output tensors, and its operations.

    `operations` is None where no rule covers the call; `macs` are the multiply-accumulates among the operations, and
    `products` says between which operands.
    """

    inputs: tuple[Shape, ...]
    output: Shape
    operations: int | None
    macs: int
    products: tuple[Products, ...] = ()


@dataclass(frozen=True, eq=False)
class TakenTensor:
    """A tensor that a function takes as an operand: its shape, whether it depends on the samples, and the parameter
    that it is, if it is one."""

    shape: Shape
    flows: bool
    parameter: nn.Parameter | None


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """One call in a run of a model.

    Attributes:
        path: the module's path; for a function the path of the module that called it.
        op: the operation, in lower case.
        type: the module's class or the function's name.
        summary: shapes and operations, per sample.
        module: the module; None for a function.
        parameters: the parameters among a function's arguments.
        taken: the tensors among a function's arguments, by operand.
        earlier_calls: how many functions of the same operation the module called before, since it was entered.
    """

    path: str
    op: str
    type: str
    summary: CallSummary
    module: nn.Module | None = None
    parameters: tuple[nn.Parameter, ...] = ()
    taken: Mapping[str, TakenTensor] = field(default_factory=dict)
    earlier_calls: int = 0


def per_sample(
    inputs: tuple[Shape, ...], output: Shape, counted: Count | None, batch: int, from_input: bool
) -> CallSummary:
    """The summary of a call on a whole batch.

    Args:
        inputs: shapes of the input tensors, for the whole batch.
        output: shape of the output tensor, for the whole batch.
        counted: operations on the whole batch; None where no rule covers the call.
        batch: samples in the batch.
        from_input: whether the call depends on the model's input. A call that does not (a product of two parameters,
            for example) runs once per batch, and counts as if it ran for every sample.
    """
    shapes = tuple(shape_per_sample(shape, batch, from_input) for shape in inputs)
    result = shape_per_sample(output, batch, from_input)
    if counted is None:
        return CallSummary(shapes, result, None, 0)
    operations, macs = (_share(v, batch, from_input) for v in (counted.operations, counted.macs))
    products = tuple(replace(p, macs=_share(p.macs, batch, from_input)) for p in counted.products)
    return CallSummary(shapes, result, operations, macs, products)


def _share(value: int, batch: int, from_input: bool) -> int:
    # The result of a reduction over the batch does not divide by it; it is computed once.
    return value // batch if from_input and value % batch == 0 else value


def shape_per_sample(shape: Shape, batch: int, from_input: bool = True) -> Shape:
    """`shape` without the batch, which may be the first dimension, another one, or a factor of one (heads · batch)."""
    if not from_input or not shape or math.prod(shape) % batch:
        return shape
    if shape[0] == batch:
        return shape[1:]
    for i, size in enumerate(shape):
        if size % batch == 0:
            return (*shape[:i], size // batch, *shape[i + 1 :])
    return shape


#: The attribute that marks tensors computed from the model's input.
_FROM_INPUT = "_bitfront_from_input"


def _depends_on_input(value: object) -> bool:
    return any(getattr(tensor, _FROM_INPUT, False) for tensor in tensors_in(value))


def mark_as_input(value: object) -> None:
    """Mark the tensors in `value` as the model's input, or as computed from it."""
    for tensor in tensors_in(value):
        setattr(tensor, _FROM_INPUT, True)


class _FunctionRecorder(TorchFunctionMode):
    """Records every call of a torch function, except those inside a module that is recorded as one call."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.calls: list[RecordedCall] = []
        self.paths: list[str] = [""]  # pre-hooks of the model run before it is entered
        self.earlier: list[Counter[str]] = [Counter()]
        self.depth = 0  # how many modules that are recorded as one call enclose the current one

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = list(tensors_in((args, kwargs)))
        shapes = tuple(tuple(tensor.shape) for tensor in inputs)
        from_input = _depends_on_input(inputs)
        out = func(*args, **kwargs)
        outputs = list(tensors_in(out))
        if from_input:
            mark_as_input(outputs)
            if getattr(func, "__name__", "") in ("__setitem__", "copy_"):
                mark_as_input(args[0])
        if outputs and not self.depth:
            op, name, output = function_name(func), str(getattr(func, "__name__", func)), tuple(outputs[0].shape)
            counted = count(Call(bare(func), shapes, output, args, kwargs), of_function(func))
            activations = tuple(s for t, s in zip(inputs, shapes, strict=True) if not isinstance(t, nn.Parameter))
            summary = per_sample(activations, output, counted, self.batch, from_input)
            parameters = tuple(tensor for tensor in inputs if isinstance(tensor, nn.Parameter))
            taken, earlier = _taken(func, args, kwargs), self.earlier[-1][op]
            self.earlier[-1][op] += 1
            self.calls.append(RecordedCall(self.paths[-1], op, name, summary, None, parameters, taken, earlier))
        return out


def _taken(function: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, TakenTensor]:
    operation = of_function(function)
    taken: dict[str, TakenTensor] = {}
    if operation is None or (operation.refuses and operation.refuses(Call(bare(function), (), (), args, kwargs))):
        return taken
    for operand in operation.operands:
        place = operand.taken_from(args, kwargs)
        if operand.role != "inner" and isinstance(place, Tensor):
            owned = place if isinstance(place, nn.Parameter) else None
            taken[operand.name] = TakenTensor(tuple(place.shape), _depends_on_input(place), owned)
    return taken


def record(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int) -> list[RecordedCall]:
    """Run `model` and return the calls that it makes, in order.

    Args:
        model: in evaluation mode; it gets hooks, which are removed again.
        args: its arguments; the tensors that hold samples are marked by :func:`mark_as_input`.
        kwargs: its keyword arguments.
        batch: samples in these tensors.
    """
    recorder = _FunctionRecorder(batch)
    counts_on_entry: list[int] = []

    def one_call(path: str, module: nn.Module) -> bool:
        # The root cannot be a site: there is no module in which it could be replaced by a quantized one.
        operation = of_module(module)
        return operation is not None and (bool(path) or not operation.operands or not operation.by_default)

    def enter(path: str) -> Any:
        def hook(module: nn.Module, *_: Any) -> None:
            recorder.paths.append(path)
            recorder.earlier.append(Counter())
            recorder.depth += one_call(path, module)
            counts_on_entry.append(len(recorder.calls))

        return hook

    def leave(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
            calls_inside = len(recorder.calls) - counts_on_entry.pop()
            recorder.paths.pop()
            recorder.earlier.pop()
            recorder.depth -= one_call(path, module)
            # A module without children and without recorded calls does not compute with torch's functions.
            opaque = not calls_inside and not list(module.children()) and of_module(module) is None
            if recorder.depth or not (one_call(path, module) or opaque):
                return
            inputs, outputs = list(tensors_in((args, kwargs))), list(tensors_in(result))
            if opaque and (not outputs or all(any(o is i for i in inputs) for o in outputs)):
                return  # it returns its input
            shapes = tuple(tuple(tensor.shape) for tensor in inputs)
            output = tuple(outputs[0].shape) if outputs else ()
            op = module_name(module)
            counted = None if opaque else count(Call(op, shapes, output, args, kwargs, module), of_module(module))
            summary = per_sample(shapes, output, counted, batch, _depends_on_input(inputs))
            recorder.calls.append(RecordedCall(path, op, type(module).__name__, summary, module))

        return hook

    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(path), with_kwargs=True))
        handles.append(module.register_forward_hook(leave(path), with_kwargs=True))
    try:
        with torch.no_grad(), recorder:
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.calls


def record_function(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int
) -> list[RecordedCall]:
    """The calls that a function makes; the function itself, if it is one of torch's functions.

    Args:
        function: called with `args` and `kwargs`.
        args: its arguments; the tensors that hold samples are marked by :func:`mark_as_input`.
        kwargs: its keyword arguments.
        batch: samples in these tensors.
    """
    recorder = _FunctionRecorder(batch)
    with torch.no_grad(), recorder:
        function(*args, **kwargs)
    return recorder.calls
