"""Finds out what a model computes by running it: for models that torch.fx cannot trace.

Modules that have a rule (``bitfront.operations``) are taken as a whole; torch's functions called between them, such as
the matrix products in the attention of a transformer, are seen through ``TorchFunctionMode``, under the names that
torch.fx uses too. So nothing that computes goes unseen, whatever types of modules a library has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bitfront.operations.base import Call, Count, Shape
from bitfront.operations.lookup import bare, count, function_name, module_name, of_function, of_module, tensors_in


@dataclass(frozen=True)
class Observed:
    """What one call was given, gave and did, per sample; operations are None where no rule covers it."""

    inputs: tuple[Shape, ...]
    output: Shape
    operations: int | None
    macs: int


@dataclass(frozen=True, eq=False)
class Recorded:
    """One call seen while a model ran.

    Attributes:
        path: of the module; of the one it was called in, for a function.
        module: None for a function.
        parameters: the parameters that a function was given.
    """

    path: str
    op: str
    type: str
    seen: Observed
    module: nn.Module | None = None
    parameters: tuple[nn.Parameter, ...] = ()


def observed(inputs: tuple[Shape, ...], output: Shape, counted: Count | None, batch: int, fed: bool) -> Observed:
    """A call on a whole batch, per sample.

    Args:
        inputs, output: shapes for the whole batch.
        counted: operations on the whole batch.
        fed: whether it depends on the input. What does not (a product of two parameters, say) is done once per batch,
            and counts as if it were done for every sample.
    """
    if counted is None:
        operations, macs = None, 0
    else:
        operations, macs = (_share(v, batch, fed) for v in (counted.operations, counted.macs))
    per_sample = tuple(shape_per_sample(s, batch, fed) for s in inputs)
    return Observed(per_sample, shape_per_sample(output, batch, fed), operations, macs)


def _share(value: int, batch: int, fed: bool) -> int:
    # What a reduction over the batch leaves behind does not divide: done once.
    return value // batch if fed and value % batch == 0 else value


def shape_per_sample(shape: Shape, batch: int, fed: bool = True) -> Shape:
    """`shape` without the batch, which may be the first dimension, another one, or a factor of one (heads · batch)."""
    if not fed or not shape or math.prod(shape) % batch:
        return shape
    if shape[0] == batch:
        return shape[1:]
    for i, size in enumerate(shape):
        if size % batch == 0:
            return (*shape[:i], size // batch, *shape[i + 1 :])
    return shape


#: Set on tensors that were made from the model's input.
_FED = "_bitfront_fed"


def _is_fed(value: object) -> bool:
    return any(getattr(t, _FED, False) for t in tensors_in(value))


def feed(value: object) -> None:
    """Say that the tensors in `value` come from the model's input."""
    for tensor in tensors_in(value):
        setattr(tensor, _FED, True)


class _Mode(TorchFunctionMode):
    """Sees every function of torch, except those within a module that is taken as a whole."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.calls: list[Recorded] = []
        self.paths: list[str] = []
        self.within = 0  # how many modules that are taken as a whole we are in

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = list(tensors_in((args, kwargs)))
        shapes = tuple(tuple(t.shape) for t in given)
        fed = _is_fed(given)
        out = func(*args, **kwargs)
        found = list(tensors_in(out))
        if fed:
            feed(found)
            if getattr(func, "__name__", "") in ("__setitem__", "copy_"):
                feed(args[0])
        if found and not self.within:
            op, name = function_name(func), str(getattr(func, "__name__", func))
            counted = count(Call(bare(func), shapes, tuple(found[0].shape), args, kwargs), of_function(func))
            flowing = tuple(s for t, s in zip(given, shapes, strict=True) if not isinstance(t, nn.Parameter))
            seen = observed(flowing, tuple(found[0].shape), counted, self.batch, fed)
            own = tuple(t for t in given if isinstance(t, nn.Parameter))
            self.calls.append(Recorded(self.paths[-1], op, name, seen, None, own))
        return out


def record(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int) -> list[Recorded]:
    """Run `model` on inputs and give what it called, in order.

    Args:
        model: in evaluation mode; it gets hooks, which are removed again.
        args, kwargs: what it is called with: of what is fed (:func:`feed`), `batch` samples.
    """
    mode = _Mode(batch)
    before: list[int] = []

    def whole(path: str, module: nn.Module) -> bool:
        # The root as a site would have no place in which a quantized twin could be put.
        operation = of_module(module)
        return operation is not None and (bool(path) or not operation.operands)

    def enter(path: str) -> Any:
        def hook(module: nn.Module, *_: Any) -> None:
            mode.paths.append(path)
            mode.within += whole(path, module)
            before.append(len(mode.calls))

        return hook

    def leave(path: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> None:
            seen_inside = len(mode.calls) - before.pop()
            mode.paths.pop()
            mode.within -= whole(path, module)
            # A module without parts in which nothing of torch was seen computes with something else.
            opaque = not seen_inside and not list(module.children()) and of_module(module) is None
            if mode.within or not (whole(path, module) or opaque):
                return
            given, found = list(tensors_in((inputs, named))), list(tensors_in(output))
            if opaque and (not found or all(any(f is g for g in given) for f in found)):
                return  # gives back what it was given
            shapes = tuple(tuple(t.shape) for t in given)
            out = tuple(found[0].shape) if found else ()
            op = module_name(module)
            counted = None if opaque else count(Call(op, shapes, out, inputs, named, module), of_module(module))
            seen = observed(shapes, out, counted, batch, _is_fed(given))
            mode.calls.append(Recorded(path, op, type(module).__name__, seen, module))

        return hook

    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(path), with_kwargs=True))
        handles.append(module.register_forward_hook(leave(path), with_kwargs=True))
    try:
        with torch.no_grad(), mode:
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return mode.calls


def record_function(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int
) -> list[Recorded]:
    """The same for what a function calls; the function itself, if it is one of torch's own."""
    mode = _Mode(batch)
    mode.paths.append("")
    with torch.no_grad(), mode:
        function(*args, **kwargs)
    return mode.calls
