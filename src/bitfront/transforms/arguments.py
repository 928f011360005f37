"""The arguments of one call of a site, with each operand rounded by its format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitfront.formats.base import Format, Operand
from bitfront.operations.base import DATA_OUT, Operands, OperandSpec, Operation, Rounds, result_of
from bitfront.transforms.arithmetic import product


def through(rounds: Rounds, x: Tensor) -> Tensor:
    """A weight in its format, with the gradients of the float weight (the plain straight-through estimator, Bengio et
    al. 2013, arXiv:1308.3432). With clipped gradients, a weight that is cut off would never change again. Learned
    ranges define other gradients."""
    rounded = rounds.quantize(x)
    if not (isinstance(rounds, Format) and torch.is_grad_enabled() and x.requires_grad):
        return rounded
    return rounded.detach() - (x.detach() - x)


def rounded(operand: OperandSpec, rounds: Rounds, x: Tensor) -> Tensor:
    """An activation in its format, which takes the samples along the first dimension."""
    if not 0 < operand.sample_axis < x.dim() - 1:
        return rounds.quantize(x)
    return rounds.quantize(x.movedim(operand.sample_axis, 0)).movedim(0, operand.sample_axis)


def operands_of(
    operation: Operation,
    module: nn.Module,
    inputs: Sequence[Any],
    named: Mapping[str, Any],
    rounds: Mapping[Operand, Rounds],
) -> Operands:
    """The rounded operands of one call of a module.

    Args:
        operation: of the module.
        inputs, named: the arguments of its ``forward``.
        rounds: operand → what rounds it; operands that are missing stay in float.
    """
    args, kwargs = list(inputs), dict(named)
    values: dict[str, Tensor | None] = {}
    done: list[tuple[Tensor, Rounds | None, Tensor]] = []
    operands = operation.operands_in(module)
    for operand in operands:
        rounding = rounds.get(operand.name)
        if operand.role == "activation":
            x = operand.taken_from(args, kwargs)
            if not isinstance(x, Tensor):
                continue  # an argument that is left out
            # What rounding keeps for its gradients must not change with the input.
            x = x.clone() if getattr(module, "inplace", False) else x
            # One tensor that is given twice stays one, where both have one format: torch computes other bits for two.
            result = next((r for t, f, r in done if t is x and _same(f, rounding)), None)
            if result is None:
                result = x if rounding is None else rounded(operand, rounding, x)
                done.append((x, rounding, result))
            values[operand.name] = result
            operand.put_into(args, kwargs, result)
        elif operand.role != "inner":
            held = operand.held_by(module)
            values[operand.name] = held if held is None or rounding is None else through(rounding, held)
    return Operands(values, inner_rounds(operands, rounds), tuple(args), kwargs)


def rounded_arguments(
    operation: Operation, inputs: Sequence[Any], named: Mapping[str, Any], rounds: Mapping[Operand, Rounds]
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a function, with the operands among them rounded.

    Args:
        operation: of the function.
        inputs, named: the arguments.
        rounds: operand → what rounds it; operands that are missing stay in float.
    """
    args, kwargs = list(inputs), dict(named)
    for operand in operation.operands:
        rounding = rounds.get(operand.name)
        given = operand.taken_from(args, kwargs)
        if rounding is None:
            continue
        if operand.several and isinstance(given, (list, tuple)):
            operand.put_into(args, kwargs, type(given)(map(rounding.quantize, given)))
        elif operand.role != "inner" and isinstance(given, Tensor):
            owned = isinstance(given, nn.Parameter)
            value = through(rounding, given) if owned else rounded(operand, rounding, given)
            operand.put_into(args, kwargs, value)
    return args, kwargs


def called(
    operation: Operation,
    function: Any,
    inputs: Sequence[Any],
    named: Mapping[str, Any],
    inner: Mapping[Operand, Rounds],
) -> Any:
    """What a function computes, with rounded values on its way.

    Args:
        operation: of the function.
        function: the function, or the name of a method.
        inputs, named: its arguments, rounded already.
        inner: what rounds the inner operands, by name.
    """
    assert operation.call is not None
    values = {}
    for operand in operation.operands:
        given = operand.taken_from(inputs, named)
        if operand.role != "inner" and isinstance(given, Tensor):
            values[operand.name] = given
    return operation.call(function, Operands(values, inner, tuple(inputs), named))


def rounded_result(operands: Iterable[OperandSpec], rounds: Mapping[Operand, Rounds], result: Any) -> Any:
    """What a call gives, in the format of its result; of several tensors, the first one is rounded.

    Args:
        operands: of the operation.
        rounds: operand → what rounds it; without an entry ``data_out`` the result stays as it is.
        result: a tensor, or a tuple or list that begins with one.
    """
    rounding = rounds.get(DATA_OUT)
    return result if rounding is None else first_rounded(result_of(operands), rounding, result)


def first_rounded(operand: OperandSpec, rounds: Rounds, result: Any) -> Any:
    """`result` with its first tensor rounded as `operand`."""
    if isinstance(result, Tensor):
        return rounded(operand, rounds, result)
    first, *others = result
    return type(result)((first_rounded(operand, rounds, first), *others))


def inner_rounds(operands: Iterable[OperandSpec], rounds: Mapping[Operand, Rounds]) -> dict[Operand, Rounds]:
    """What rounds the inner ones among some operands, by name; those in float are absent."""
    return {o.name: rounds[o.name] for o in operands if o.role == "inner" and o.name in rounds}


def _same(a: Rounds | None, b: Rounds | None) -> bool:
    return a is b or (isinstance(a, Format) and isinstance(b, Format) and a == b)


def formats_of(rounds: Mapping[Operand, Rounds]) -> tuple[Format | None, Format | None]:
    """The formats of the input and the weight of a product; None for float, and for what is no format."""
    data, weight = (c if isinstance(c, Format) else None for c in (rounds.get("data_in"), rounds.get("weight")))
    return data, weight


def called_function(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of a function, or of a method of the first argument, given by its name."""
    if isinstance(function, str):
        return getattr(args[0], function)(*args[1:], **kwargs)
    return function(*args, **kwargs)


def function_product(
    operation: Operation,
    function: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    formats: tuple[Format | None, Format | None],
    flows: bool,
) -> Any:
    """The result of a function that sums products, in whole numbers where formats allow.

    Args:
        operation: of the function; it has a rule for products.
        function, args, kwargs: its call, with operands rounded already.
        formats: of its input and its weight.
        flows: whether its weight depends on the samples.
    """
    assert operation.product is not None
    specs = {o.name: o for o in operation.operands}
    given: Any = tuple(
        specs[name].taken_from(args, kwargs) if name in specs else None for name in ("data_in", "weight", "bias")
    )

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        new_args, new_kwargs = list(args), dict(kwargs)
        for name, value in (("data_in", x), ("weight", weight), ("bias", bias)):
            if name in specs:
                specs[name].put_into(new_args, new_kwargs, value)
        result: Tensor = called_function(function, new_args, new_kwargs)
        return result

    return product(operation.product, compute, given, formats, flows=flows)
