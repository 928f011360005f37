"""From an nn.Module to a Graph: traced by torch.fx, or, where the model cannot be traced, module by module.

Capture runs the model once on a small sample to learn the shapes, and checks that the traced graph computes the same as
the model. A model that FX cannot trace (its control flow depends on data) is captured too: its modules, such as Linear,
Conv and ReLU, are recorded while the model runs and become sites. ``Graph.untraced`` says which line stopped the
tracer.
"""

from __future__ import annotations

import copy
import dataclasses
import linecache
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitfront.errors import CaptureError
from bitfront.graph.base import Graph, Node, Site
from bitfront.graph.recording import (
    CallSummary,
    RecordedCall,
    mark_as_input,
    per_sample,
    record,
    record_function,
)
from bitfront.operations.base import Call, Count, Shape
from bitfront.operations.lookup import (
    bare,
    count,
    function_name,
    is_leaf,
    module_name,
    of_function,
    of_module,
    of_node,
    operand_nodes,
    shapes_in,
)


def capture(model: nn.Module, sample: Tensor) -> Graph:
    """Capture a copy of `model`; the model itself is not changed.

    Args:
        model: any nn.Module that takes one tensor, shape ``(batch, *features)``.
        sample: two or more input samples, on the model's device.

    Raises:
        CaptureError: the model cannot be copied, fails on `sample`, or does not return one tensor of shape
            ``(batch, classes)``.
    """
    try:
        copied = copy.deepcopy(model).eval()
    except Exception as error:
        raise CaptureError(f"the model cannot be copied ({type(error).__name__}: {error})") from error
    expected = _logits(copied, sample)
    fx_graph, untraced = _trace(copied)
    if fx_graph is not None:
        without_inplace = _disable_inplace(copy.deepcopy(copied))
        if torch.equal(_logits(without_inplace, sample), expected):
            copied = without_inplace
        fx_graph = _without_inplace(copied, fx_graph, sample, expected)
        traced = fx.GraphModule(copied, fx_graph)
        if not torch.allclose(_logits(traced, sample), expected, rtol=1e-4, atol=1e-5, equal_nan=True):
            fx_graph, untraced = None, "the traced graph computes something else than the model"
    shape = tuple(sample.shape[1:])
    if fx_graph is None:
        return Graph(copied, None, recorded_nodes(copied, (sample.clone(),), {}, sample.shape[0]), shape, untraced)
    return Graph(copied, fx_graph, _traced_nodes(copied, fx_graph, sample), shape)


def _logits(model: nn.Module, sample: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            out = model(sample.clone())  # a model may change its input
    except Exception as error:
        raise CaptureError(
            f"the model fails on an input of shape {tuple(sample.shape)} (batch first): {type(error).__name__}: {error}"
        ) from error
    if not isinstance(out, Tensor) or out.dim() < 2 or out.shape[0] != sample.shape[0]:
        returned = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise CaptureError(f"the model must return one tensor of shape (batch, classes); it returned {returned}")
    return out


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m) or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module) -> tuple[fx.Graph | None, str]:
    try:
        return _Tracer().trace(model), ""
    except Exception as error:
        return None, _culprit(error)


def _culprit(error: Exception) -> str:
    """The user's line that stopped the tracer: the innermost one that is neither in torch nor in this folder."""
    library_folders = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(library_folders) and Path(frame.filename).suffix == ".py":
            line = frame.line or linecache.getline(frame.filename, frame.lineno or 0).strip()
            return f"{frame.filename}:{frame.lineno}: {line}"
    return f"{type(error).__name__}: {error}"


def _disable_inplace(model: nn.Module) -> nn.Module:
    # An in-place ReLU would overwrite an activation that candidates share.
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return model


def _without_inplace(model: nn.Module, graph: fx.Graph, sample: Tensor, expected: Tensor) -> fx.Graph:
    """The graph without ``inplace=True``; unchanged where the model relies on it."""
    changed = copy.deepcopy(graph)
    for node in changed.nodes:
        if node.op == "call_function" and node.kwargs.get("inplace"):
            node.update_kwarg("inplace", False)
    same = torch.equal(_logits(fx.GraphModule(model, changed), sample), expected)
    return changed if same else graph


class _InPlaceDetector(fx.Interpreter):
    """Runs the graph and notes the first node that changes one of its input tensors."""

    culprit = ""

    def run_node(self, n: fx.Node) -> Any:
        inputs = [self.env[a] for a in n.all_input_nodes]
        before = [tensor._version for tensor in inputs if isinstance(tensor, Tensor)]
        out = super().run_node(n)
        if before != [tensor._version for tensor in inputs if isinstance(tensor, Tensor)]:
            self.culprit = self.culprit or n.name
        return out


def changes_in_place(graph: Graph, sample: Tensor) -> str:
    """The name of a node that changes one of its inputs in place; empty if there is none.

    Such an input cannot be shared by other nodes or candidates.

    Args:
        graph: a traced graph.
        sample: input samples, on the model's device.
    """
    assert graph.fx_graph is not None
    detector = _InPlaceDetector(fx.GraphModule(graph.model, graph.fx_graph))
    with torch.no_grad():
        detector.run(sample.clone())
    return detector.culprit


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
            return count(Call(module_name(module), inputs, output, args, kwargs, module), operation)
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


def _traced_nodes(model: nn.Module, graph: fx.Graph, sample: Tensor) -> tuple[Node, ...]:
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
    return tuple(nodes)


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
    if operation is None or not operation.operands:
        return Node(**common)
    parameters = dict(module.named_parameters(recurse=False))
    activations = [operand.name for operand in operation.operands if operand.role == "activation"]
    formatted_parameters = [name for name in operation.formatted if name in parameters]
    return Site(
        **common,
        operands=tuple(name for name in operation.formatted if name in activations or name in parameters),
        operand_parameters=tuple((name, full_names[name]) for name in formatted_parameters),
        shapes=tuple((name, tuple(parameters[name].shape)) for name in formatted_parameters),
    )


def node_of(graph: Graph, site: Site) -> fx.Node | None:
    """The node of `site` in the traced graph; None where there is no traced graph."""
    nodes = [] if graph.fx_graph is None else [n for n in graph.fx_graph.nodes if n.name == site.name]
    return nodes[0] if nodes else None


def owns_parameters(site: Site, node: fx.Node | None) -> bool:
    """Whether the site is a linear layer or a convolution whose weight, and bias if it has one, are parameters.

    Args:
        site: the site.
        node: its node in the traced graph; None for a module of a model that could not be traced.
    """
    if site.operation.output_channels is None or not site.weight or "data_in" not in site.operands:
        return False
    return bool(site.path) or node is None or bool(site.bias) or "bias" not in operand_nodes(node, site.operation)


def apply_site(model: nn.Module, site: Site, node: fx.Node | None, operands: Mapping[str, Tensor | None]) -> Tensor:
    """The output of a site for given operands, which replace its input and its parameters.

    Args:
        model: the model of the site; stride, padding and other settings are taken from it.
        site: the site.
        node: its node in the traced graph; needed for a function.
        operands: by name; a missing one is None.
    """
    if site.path:
        assert site.operation.call is not None
        return site.operation.call(model.get_submodule(site.path), operands)
    assert node is not None
    values = {n: operands.get(operand) for operand, n in operand_nodes(node, site.operation).items()}
    args: Any = fx.map_arg(node.args, lambda n: values[n])
    kwargs: Any = fx.map_arg(node.kwargs, lambda n: values[n])
    function: Any = node.target
    result: Tensor = function(*args, **kwargs)
    return result


def parameter(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of `model` by its full name, detached."""
    path, _, key = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), key)
    assert isinstance(tensor, Tensor)
    return tensor.detach()


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
    operands = operand_nodes(n, operation)
    tensors = [v for v in operands.values() if v in shapes]
    # x + 1 has no second tensor to quantize, so it is not a site.
    needed = sum(operand.role in ("activation", "weight") for operand in operation.operands)
    if len(tensors) < (needed if operation.call is None else 1):
        return Node(**common)
    fixed = {name: node for name, node in operands.items() if operation.operand(name).role != "activation"}
    return Site(
        **common,
        operands=tuple(name for name in operation.formatted if name in operands),
        operand_parameters=tuple((name, str(node.target)) for name, node in fixed.items() if node.op == "get_attr"),
        shapes=tuple((name, shapes[node]) for name, node in fixed.items()),
    )


def recorded_nodes(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int) -> tuple[Node, ...]:
    """The nodes of a model that is run instead of traced: its modules, and the functions called between them.

    A module is one node, however often it is called, and a site if its operation has operands. Functions are never
    sites, because their operands cannot be replaced. Functions that only move data are left out.

    Args:
        model: in evaluation mode.
        args: its arguments; their tensors hold samples.
        kwargs: its keyword arguments.
        batch: samples in these tensors.
    """
    mark_as_input((args, kwargs))
    nodes: dict[str, Node] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for call in record(model, args, kwargs, batch):
        if call.module is not None:
            name = call.path.replace(".", "_") or type(call.module).__name__.lower()
            node = _module_node(name, call.path, call.module, call.summary)
            earlier = nodes.get(name)
            if earlier is not None:
                unknown = earlier.operations is None or node.operations is None
                operations = None if unknown else (earlier.operations or 0) + (node.operations or 0)
                node = dataclasses.replace(node, operations=operations, macs=earlier.macs + node.macs)
        elif call.summary.operations == 0:
            continue
        else:
            stem = "_".join(part for part in (call.path.replace(".", "_"), call.op) if part)
            name, number = stem, 0
            while name in nodes:
                number += 1
                name = f"{stem}_{number}"
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
    return tuple(nodes.values())
