"""Computes one step in one state as the deployed model does: the same call, with operands in their formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitfront.engine.evaluation.tree.activations import BatchedActivations, Ints
from bitfront.engine.evaluation.tree.program import PRODUCTS, Program, Step
from bitfront.graph.capture import apply_site
from bitfront.operations.lookup import of_node
from bitfront.transforms.arguments import (
    called,
    called_function,
    function_product,
    inner_rounds,
    rounded_arguments,
    rounded_result,
)
from bitfront.transforms.arithmetic import product


def arguments(
    program: Program, step: Step, data: int, parameters: int, values: Mapping[fx.Node, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a step's call. If the step is a site, its operands are rounded to their formats.

    Args:
        data: number of the data option, which gives the format of the input.
        parameters: number of the parameter option, which gives the formats of the other operands.
        values: the values of the nodes that the step takes.
    """
    args, kwargs = _mapped(step.node, values)
    if step.site is None or step.group is None or step.hooked:
        return args, kwargs
    formats = program.formats(step, data, parameters)
    operation = step.site.operation
    if step.site.path:
        return args, kwargs  # the twin rounds them
    for name, value in (program.replaced(step, parameters) if formats else {}).items():
        operation.operand(name).put_into(args, kwargs, value)
    return rounded_arguments(operation, args, kwargs, formats)


def call(
    program: Program, step: Step, data: int, parameters: int, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """The value of a step for its arguments.

    Args:
        data: number of the data option, which gives the format of its input.
        parameters: number of the parameter option, which gives the formats of its other operands.
    """
    result = _called(program, step, data, parameters, args, kwargs)
    if step.site is None or step.site.path or step.group is None:
        return result  # a twin rounds what it gives
    return rounded_result(step.site.specs, program.parameter_formats(step, parameters), result)


def _called(
    program: Program, step: Step, data: int, parameters: int, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    if step.hooked:
        return program.twin(step, data, parameters)(*args, **kwargs)
    node = step.node
    if step.kind in PRODUCTS and node.op != "call_module":
        return single(program, step, data, parameters, args[0])
    if node.op == "call_module" and step.site is not None:
        return program.twin(step, data, parameters)(*args, **kwargs)
    if node.op == "call_module":
        return program.model.get_submodule(str(node.target))(*args, **kwargs)
    function = str(node.target) if node.op == "call_method" else node.target
    if step.site is not None:
        inner = inner_rounds(step.site.specs, program.formats(step, data, parameters))
        if inner:
            return called(step.site.operation, function, args, kwargs, inner)
    if step.site is not None and step.site.operation.product is not None:
        formats = program.data_format(step, data), program.parameter_formats(step, parameters).get("weight")
        return function_product(step.site.operation, function, args, kwargs, formats, step.site.flows("weight"))
    return called_function(function, args, kwargs)


def single(program: Program, step: Step, data: int, parameters: int, rounded: Tensor) -> Tensor:
    """The value of a linear layer or convolution for an input that is rounded already, as the deployed model computes
    it."""
    assert step.site is not None
    rule = step.site.operation.product
    assert rule is not None
    weight, bias = program.parameters(step, parameters)
    formats = program.data_format(step, data), program.parameter_formats(step, parameters).get("weight")
    module = program.model.get_submodule(step.site.path) if step.site.path else None

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return apply(program, step, x, weight, bias)

    known = program.kept(step, parameters).products
    return product(rule, compute, (rounded, weight, bias), formats, module=module, known=known)


def apply(program: Program, step: Step, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The value of a linear layer or convolution with the given weight and bias."""
    assert step.site is not None
    return apply_site(program.model, step.site, step.node, {"data_in": x, "weight": weight, "bias": bias})


#: Steps whose results lie in memory without gaps, whatever their inputs.
_DENSE = (*PRODUCTS, "norm", "rectifier", "arithmetic", "selection", "elementwise")
#: A multiple of how many values torch computes at a time on any processor.
VECTORS = 64


def elementwise(program: Program, step: Step, needed: Ints, x: BatchedActivations) -> BatchedActivations | None:
    """An activation function of all states at once, in their layout.

    Returns:
        None where a value can have other last bits than in a call of one state: of a function whose ``rest_differs``,
        unless all values of every call fill vectors.
    """
    operation = of_node(step.node, program.model)
    assert operation is not None
    assert operation.merge is not None
    if operation.merge.rest_differs and x.parts[0].device.type == "cpu":
        whole = x.block(0).numel() % VECTORS == 0 and torch.get_num_threads() == 1  # each thread has a rest
        if not whole or program.steps[step.inputs[0]].kind not in _DENSE:
            return None
    (source,) = step.node.all_input_nodes
    settled, parts = x.compact().settled(), []
    for part in settled.parts:
        args, kwargs = _mapped(step.node, {source: part.contiguous()})
        parts.append(call(program, step, 0, 0, args, kwargs))
    return replace(settled, parts=parts, states=needed)


def attribute(model: nn.Module, target: str) -> Any:
    """A parameter, buffer or constant of the model by its full name."""
    path, _, name = target.rpartition(".")
    return getattr(model.get_submodule(path), name)


def _mapped(node: fx.Node, values: Mapping[fx.Node, Any]) -> tuple[list[Any], dict[str, Any]]:
    """A node's arguments, with each node replaced by its value."""
    args: Any = fx.map_arg(node.args, lambda n: values[n])
    kwargs: Any = fx.map_arg(node.kwargs, lambda n: values[n])
    return list(args), dict(kwargs)
