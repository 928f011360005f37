"""What a captured model's outputs are: logits, or what a softmax, a sigmoid or a logarithm of one makes of them.

The operation at the end says what it gives (``Operation.gives``). What only moves values, or cuts them off, is passed
by on the way back from the output. The values must agree: a softmax over another dimension than the classes makes no
probabilities of them. Values that are not negative and sum to 1 are probabilities, whatever computed them (the mean of
several softmaxes, a softmax by hand).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from bitfront.graph.base import Graph
from bitfront.graph.recording import record
from bitfront.kernels.losses import FLOOR, LOSSES, Outputs
from bitfront.operations.base import Operation, free
from bitfront.operations.lookup import bare, of_function, of_module, of_node

#: (what the outputs are as far as the operations say, the operation that says so)
Ending = tuple[Outputs, str]
#: How far sums of probabilities may be from 1 where an operation says that they are some; half precision is coarse.
_NEAR, _EXACTLY = 2e-2, 1e-4
#: What a network ends in that changes values which were probabilities, one by one.
_CHANGED = "arithmetic with probabilities"
_LOGARITHMS: dict[Outputs, Outputs] = {
    "probabilities": "log_probabilities",
    "class_probabilities": "class_log_probabilities",
}
#: Records of arithmetic, value by value.
_ARITHMETIC = ("add", "sub", "mul", "elementwise")
#: What keeps probabilities, except for those at an end of their range.
_CUTS = ("clamp", "clip", "clamp_min", "clamp_max", "nan_to_num", "dequantize", "to_dense")


def outputs_of(model: nn.Module, graph: fx.Graph | None, sample: Tensor, values: Tensor) -> Ending:
    """What the outputs of a model are, and the operation at the end that says so; logits and "" where none does.

    Args:
        model: in evaluation mode.
        graph: its traced graph; None where it cannot be traced: then its last calls are looked at.
        sample: input samples.
        values: the model's outputs for them, shape (samples, classes).
    """
    outputs, where = _traced(model, graph) if graph is not None else _called(model, sample)
    if outputs != "logits" and not values.isnan().any():
        return (outputs, where) if _agrees(outputs, values) else ("logits", where)
    if outputs == "logits" and _distributions(values, _EXACTLY):
        return "probabilities", "values that sum to 1"
    changed = not where and _agrees("class_probabilities", values) and graph is not None and _changed(model, graph)
    return outputs, _CHANGED if changed else where


def _traced(model: nn.Module, graph: fx.Graph) -> Ending:
    node = next(n for n in graph.nodes if n.op == "output")
    logarithm = False
    while len(node.all_input_nodes) == 1:
        operation = of_node(node, model)
        gives = None if operation is None else operation.gives
        if gives is not None:
            return _named(gives, _title(node, model), logarithm)
        name = bare(node.target)
        if node.op != "output" and not _passes(operation, name):
            if logarithm or not _is_logarithm(node.target):
                break
            logarithm = True
        node = node.all_input_nodes[0]
    return "logits", ""


def _changed(model: nn.Module, graph: fx.Graph) -> bool:
    """Whether probabilities come to the output through arithmetic alone, value by value."""
    waiting = list(next(n for n in graph.nodes if n.op == "output").all_input_nodes)
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        operation = of_node(node, model)
        if operation is None:
            continue
        if operation.gives is not None:
            return True
        if operation.name in _ARITHMETIC or _passes(operation, bare(node.target)):
            waiting += [n for n in node.all_input_nodes if n not in seen]
            seen.update(node.all_input_nodes)
    return False


def _called(model: nn.Module, sample: Tensor) -> Ending:
    """The same of the calls that a model makes, the last one first."""
    logarithm = False
    for call in reversed(record(model, (sample.clone(),), {}, sample.shape[0])):
        operation = of_module(call.module) if call.module is not None else of_function(call.op)
        if operation is not None and operation.gives is not None:
            return _named(operation.gives, f"{call.path} ({call.type})".strip(), logarithm)
        if not _passes(operation, call.op):
            if logarithm or call.op != "log":
                break
            logarithm = True
    return "logits", ""


def _named(gives: Outputs, title: str, logarithm: bool) -> Ending:
    if not logarithm:
        return gives, title
    after = _LOGARITHMS.get(gives)
    return ("logits", "") if after is None else (after, f"the logarithm of {title}")


def _title(node: fx.Node, model: nn.Module) -> str:
    kind = type(model.get_submodule(str(node.target))).__name__ if node.op == "call_module" else bare(node.target)
    return f"{node.name} ({kind})"


def _is_logarithm(target: object) -> bool:
    return target in (torch.log, torch.Tensor.log, "log", "log_")


def _passes(operation: Operation | None, name: str) -> bool:
    return name in _CUTS or (operation is not None and (operation.view or operation.count is free))


def _agrees(outputs: Outputs, values: Tensor) -> bool:
    """Whether values can be what an operation says they are."""
    if outputs == "probabilities":
        return _distributions(values, _NEAR)
    if outputs == "log_probabilities":
        return _distributions(values.exp(), _NEAR)
    p = values if outputs == "class_probabilities" else values.exp()
    return bool(((p >= 0) & (p <= 1)).all())


def _distributions(values: Tensor, tolerance: float) -> bool:
    """Whether each row, or each pixel, is a distribution over two classes or more: dimension 1."""
    if values.dim() < 2 or values.shape[1] < 2 or not values.is_floating_point():
        return False
    sums = values.double().sum(dim=1)
    return bool((values >= 0).all() and ((sums - 1).abs() <= tolerance).all())


def outputs_note(graph: Graph) -> str:
    """What the user should know about the outputs of a captured model; empty where they are logits."""
    if graph.outputs != "logits":
        return (
            f"the network ends in {graph.ending}: its outputs are {graph.outputs.replace('_', ' ')}, no logits. `loss` "
            f"and training go by them: {LOSSES[graph.outputs]}; a logarithm is at least {FLOOR:g}"
        )
    if graph.ending == _CHANGED:
        return (
            f"the network ends in {graph.ending}, and all outputs are from 0 to 1 on some samples: they are taken for "
            "logits, and `loss` is the cross entropy of these. Where they are probabilities, let nn.Sigmoid or "
            "nn.Softmax be the last operation, or leave it out"
        )
    if graph.ending:
        return (
            f"the network ends in {graph.ending}, but its outputs are not what that gives over the classes (dimension "
            "1): they are taken for logits, and `loss` is the cross entropy of these"
        )
    return ""
