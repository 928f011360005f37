"""The nodes of a captured model, with their shapes and operations: from its traced graph, or from a run of it.

A module whose class has a record is one node; so is each function. Which of them are sites their records say.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitfront.graph.base import LeftOut, Node, Site
from bitfront.graph.recording import (
    CallSummary,
    RecordedCall,
    mark_as_input,
    per_sample,
    record,
    record_function,
)
from bitfront.operations import OPERATIONS
from bitfront.operations.base import Call, Count, Shape
from bitfront.operations.lookup import (
    bare,
    count,
    departure,
    function_name,
    hooks,
    module_name,
    nodes_of_operands,
    of_function,
    of_module,
    of_node,
    operation_it_resembles,
    shapes_in,
)


class _ShapeInterpreter(fx.Interpreter):
    """Runs the graph and stores a summary of every node: its shapes and its operations."""

    def __init__(self, module: fx.GraphModule, batch: int) -> None:
        super().__init__(module)
        self.batch = batch
        self.shapes: dict[fx.Node, Shape] = {}
        self.summaries: dict[fx.Node, CallSummary] = {}
        #: Nodes whose value depends on the input, and therefore has one part per sample.
        self.from_input: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder" or any(a in self.from_input for a in n.all_input_nodes):
            self.from_input.add(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        tensors = shapes_in((args, kwargs))  # before the call, which may change a tensor in place
        inputs = tuple(self.shapes[a] for a in n.all_input_nodes if a in self.shapes and a.op != "get_attr")
        for value in (self.env[a] for a in self.from_input.intersection(n.all_input_nodes)):
            mark_as_input(value)
        out = super().run_node(n)
        outputs = shapes_in(out)
        counted = self._counted(n, tensors, outputs, args, kwargs)
        summary = per_sample((), outputs[0] if outputs else (), counted, self.batch, n in self.from_input)
        self.summaries[n] = dataclasses.replace(summary, inputs=inputs)
        if isinstance(out, Tensor):
            self.shapes[n] = summary.output
        return out

    def _counted(
        self,
        n: fx.Node,
        inputs: tuple[Shape, ...],
        outputs: tuple[Shape, ...],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Count | None:
        """The operations of a node, for the whole batch; None where no rule covers them."""
        if n.op == "call_module":
            module = self.module.get_submodule(str(n.target))
            operation = of_module(module)
            if operation is None:
                return self._sum(record(module, args, kwargs, self.batch))
            output = outputs[0] if outputs else ()
            counted = count(Call(module_name(module), inputs, output, args, kwargs, module), operation)
            if counted is None or not hooks(module):
                return counted
            whole = self._sum(record(module, args, kwargs, self.batch))  # with what its hooks do
            return counted if whole is None else Count(whole.operations, counted.macs)
        if n.op in ("call_function", "call_method") and outputs:
            target = _target(n)
            counted = count(Call(bare(target), inputs, outputs[0], args, kwargs), of_function(target))
            if counted is None and callable(n.target):
                return self._sum(record_function(n.target, args, kwargs, self.batch))
            return counted
        return Count(0)

    def _sum(self, calls: Sequence[RecordedCall]) -> Count | None:
        """The operations inside a block or function of a library that the tracer does not enter.

        None where a call is not covered by a rule, or where no call is recorded: its operations are then unknown.
        """
        summaries = [call.summary for call in calls]
        if not summaries or any(summary.operations is None for summary in summaries):
            return None
        operations = sum(summary.operations or 0 for summary in summaries)
        return Count(self.batch * operations, self.batch * sum(summary.macs for summary in summaries))


def traced_nodes(model: nn.Module, graph: fx.Graph, sample: Tensor) -> tuple[Node, ...]:
    """The nodes of a traced graph, in its order."""
    interpreter = _ShapeInterpreter(fx.GraphModule(model, graph), sample.shape[0])
    with torch.no_grad():
        interpreter.run(sample.clone())
    nodes = []
    for n in graph.nodes:
        if n.op == "call_module":
            module = model.get_submodule(str(n.target))
            nodes.append(_module_node(n.name, str(n.target), module, interpreter.summaries[n]))
        elif n.op in ("call_function", "call_method"):
            nodes.append(_function_node(n, interpreter))
    return tuple(n.unnamed if isinstance(n, Site) else n for n in nodes)


def _module_node(name: str, path: str, module: nn.Module, summary: CallSummary) -> Node:
    operation = of_module(module)
    full_names = {key: f"{path}.{key}" if path else key for key, _ in module.named_parameters()}
    common: dict[str, Any] = {
        "name": name,
        "path": path,
        "op": module_name(module),
        "type": type(module).__name__,
        "inputs": summary.inputs,
        "output": summary.output,
        "operations": summary.operations,
        "macs": summary.macs,
        "parameters": tuple(full_names.values()),
    }
    # The root of a model that is not traced has no module around it, in which it could be replaced.
    if operation is None or not operation.operands or not path:
        return Node(**common)
    operands = operation.operands_in(module)
    computed = [operand.name for operand in operands if operand.role in ("activation", "inner")]
    held = {o.name: (full_names.get(o.held_as), o.held_by(module)) for o in operands}
    parameters = [(name, full, tensor) for name, (full, tensor) in held.items() if full and tensor is not None]
    names = {name for name, _, _ in parameters}
    return Site(
        **common,
        specs=tuple(operand for operand in operands if operand.name in computed or operand.name in names),
        operand_parameters=tuple((name, full) for name, full, _ in parameters),
        shapes=tuple((name, tuple(tensor.shape)) for name, _, tensor in parameters),
        flowing=tuple(computed),
        counted=summary.products,
    )


def _target(n: fx.Node) -> object:
    return str(n.target) if n.op == "call_method" else n.target


def _function_node(n: fx.Node, interpreter: _ShapeInterpreter) -> Node:
    target, operation = _target(n), of_node(n, interpreter.module)
    summary, shapes = interpreter.summaries[n], interpreter.shapes
    common: dict[str, Any] = {
        "name": n.name,
        "path": "",
        "op": function_name(target),
        "type": str(getattr(target, "__name__", target)),
        "inputs": summary.inputs,
        "output": summary.output,
        "operations": summary.operations,
        "macs": summary.macs,
        "parameters": tuple(str(a.target) for a in n.all_input_nodes if a.op == "get_attr"),
    }
    if operation is None or not operation.operands:
        return Node(**common)
    if operation.refuses is not None and operation.refuses(Call(bare(target), (), (), n.args, n.kwargs)):
        return Node(**common)
    listed = nodes_of_operands(n, operation)
    operands = {name: several[0] for name, several in listed.items()}
    tensors = [name for name, several in listed.items() if all(v in shapes for v in several)]
    # x + 1 has no second tensor to quantize, so it is not a site.
    needed = sum(operand.role in ("activation", "weight") for operand in operation.operands)
    if len(tensors) < (needed if operation.call is None else 1):
        return Node(**common)
    fixed = {name: node for name, node in operands.items() if operation.operand(name).role != "activation"}
    inner = [operand.name for operand in operation.operands if operand.role == "inner"]
    return Site(
        **common,
        specs=tuple(operand for operand in operation.operands if operand.name in operands or operand.role == "inner"),
        operand_parameters=tuple((name, str(node.target)) for name, node in fixed.items() if node.op == "get_attr"),
        shapes=tuple((name, shapes[node]) for name, node in fixed.items()),
        flowing=(
            *(name for name, several in listed.items() if interpreter.from_input.intersection(several)),
            *inner,
        ),
        counted=summary.products,
        computed_from=_computed_from(operands.get("weight"), interpreter),
    )


def _computed_from(weight: fx.Node | None, interpreter: _ShapeInterpreter) -> tuple[str, ...]:
    """The parameters behind a weight that is computed, and does not depend on the model's input."""
    if weight is None or weight.op == "get_attr" or weight in interpreter.from_input:
        return ()
    names: dict[str, None] = {}
    todo = [weight]
    while todo:
        node = todo.pop()
        if node.op == "get_attr":
            names[str(node.target)] = None
        todo += node.all_input_nodes
    return tuple(names)


def recorded_nodes(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int) -> tuple[Node, ...]:
    """The nodes of a model that is run instead of traced: its modules, and the functions called between them.

    A module is one node, however often it is called, and a site if its operation has operands. A function is a site if
    it multiplies. Functions that only move data are left out.

    Args:
        model: in evaluation mode.
        args: its arguments; their tensors hold samples.
        kwargs: its keyword arguments.
        batch: samples in these tensors.
    """
    mark_as_input((args, kwargs))
    nodes: dict[str, Node] = {}
    by_path: dict[str, str] = {}
    departed = {path for path, module in model.named_modules() if departure(module)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for call in record(model, args, kwargs, batch):
        if call.module is not None:
            earlier = nodes.get(by_path.get(call.path, ""))
            name = earlier.name if earlier else _free_name(call.path or type(call.module).__name__.lower(), nodes)
            by_path[call.path] = name
            node = _module_node(name, call.path, call.module, call.summary)
            node = _summed(earlier, node)
        elif call.summary.operations == 0 and not call.parameters:
            continue
        elif call.path not in departed and _is_product(call):
            key = f"{call.path}:{call.op}:{call.earlier_calls}"
            known = nodes.get(by_path.get(key, ""))
            name = known.name if known else _free_name("_".join(part for part in (call.path, call.op) if part), nodes)
            by_path[key] = name
            node = _summed(known, _called_site(name, call, names))
        else:
            name = _free_name("_".join(part for part in (call.path, call.op) if part), nodes)
            node = Node(
                name=name,
                path=call.path,
                op=call.op,
                type=call.type,
                inputs=call.summary.inputs,
                output=call.summary.output,
                operations=call.summary.operations,
                macs=call.summary.macs,
                parameters=tuple(names[id(p)] for p in call.parameters if id(p) in names),
            )
        nodes[name] = node
    return tuple(n.unnamed if isinstance(n, Site) else n for n in nodes.values())


def _is_product(call: RecordedCall) -> bool:
    """Whether a function that a model calls is a site: it multiplies tensors that can have formats, and writes into
    none of them."""
    operation = OPERATIONS.get(call.op) if call.op in OPERATIONS else None
    if operation is None or not call.summary.macs or not any(tensor.flows for tensor in call.taken.values()):
        return False
    if call.type.startswith("__i") or (call.type.endswith("_") and not call.type.endswith("__")):
        return False
    needed = sum(operand.role in ("activation", "weight") for operand in operation.operands)
    return len(call.taken) >= (needed if operation.call is None else 1)


def _called_site(name: str, call: RecordedCall, names: Mapping[int, str]) -> Site:
    """The site of a function that a model calls which is not traced.

    Args:
        names: of the model's parameters, by their ids.
    """
    operation, summary = OPERATIONS.get(call.op), call.summary
    inner = [operand.name for operand in operation.operands if operand.role == "inner"]
    held = {
        o: names[id(t.parameter)] for o, t in call.taken.items() if t.parameter is not None and id(t.parameter) in names
    }
    return Site(
        name=name,
        path="",
        op=call.op,
        type=call.type,
        inputs=summary.inputs,
        output=summary.output,
        operations=summary.operations,
        macs=summary.macs,
        parameters=tuple(names[id(p)] for p in call.parameters if id(p) in names),
        specs=tuple(o for o in operation.operands if o.name in call.taken or o.role == "inner"),
        operand_parameters=tuple(held.items()),
        shapes=tuple((o, t.shape) for o, t in call.taken.items() if operation.operand(o).role != "activation"),
        flowing=(*(o for o, t in call.taken.items() if t.flows), *inner),
        caller=call.path,
        earlier_calls=call.earlier_calls,
        counted=summary.products,
    )


def _summed(earlier: Node | None, node: Node) -> Node:
    """A node that is called several times, with the operations of all calls."""
    if earlier is None:
        return node
    unknown = earlier.operations is None or node.operations is None
    operations = None if unknown else (earlier.operations or 0) + (node.operations or 0)
    summed = dataclasses.replace(node, operations=operations, macs=earlier.macs + node.macs)
    if isinstance(earlier, Site) and isinstance(summed, Site) and len(earlier.counted) == len(summed.counted):
        pairs = zip(earlier.counted, summed.counted, strict=True)
        counted = tuple(dataclasses.replace(new, macs=old.macs + new.macs) for old, new in pairs)
        summed = dataclasses.replace(summed, counted=counted)
    return summed


def _free_name(path: str, taken: Mapping[str, Node]) -> str:
    """A name for a node that no other has: the path as torch.fx writes it, with a number where that is taken."""
    stem = re.sub("[^0-9a-zA-Z_]", "_", path)
    name, number = stem, 0
    while name in taken:
        number += 1
        name = f"{stem}_{number}"
    return name


def left_out(model: nn.Module, nodes: Sequence[Node]) -> tuple[LeftOut, ...]:
    """Modules whose class could be a site, and that are none because they compute something beside it."""
    configured = {name for node in nodes if isinstance(node, Site) for name in (*node.parameters, *node.computed_from)}
    found = []
    for path, module in model.named_modules():
        operation = operation_it_resembles(module)
        why = departure(module)
        names = {f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)}
        if operation is None or not operation.operands or not operation.by_default or not why or names & configured:
            continue
        weights = [o.held_by(module) for o in operation.operands_in(module) if o.role == "weight"]
        count = sum(w.numel() for w in weights if w is not None)
        macs = sum(node.macs for node in nodes if node.path == path)
        if path and (count or any(node.path == path for node in nodes)):
            found.append(LeftOut(path, type(module).__name__, why, count, macs))
    return tuple(found)
