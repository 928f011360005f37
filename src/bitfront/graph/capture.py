"""From an nn.Module to a Graph: traced by torch.fx, or, where the model cannot be traced, module by module.

Capture runs the model once on a small sample to learn shapes, and checks that what was captured computes the same as
the model. A model that FX cannot trace (control flow on data) is not refused: its Linear, Conv and ReLU modules become
sites, found while the model runs, and ``Graph.untraced`` says which line stopped the tracer.
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
from bitfront.graph.recording import Observed, Recorded, feed, observed, record, record_function
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
    """Capture `model`, which is not changed.

    Args:
        model: any nn.Module that takes one tensor, shape ``(batch, *features)``.
        sample: two or more input samples, on the model's device.

    Raises:
        CaptureError: the model cannot be copied, or fails on `sample`.
    """
    try:
        own = copy.deepcopy(model).eval()
    except Exception as error:
        raise CaptureError(f"the model cannot be copied ({type(error).__name__}: {error})") from error
    expected = _run(own, sample)
    fx_graph, untraced = _trace(own)
    if fx_graph is not None:
        without_inplace = _disable_inplace(copy.deepcopy(own))
        if torch.equal(_run(without_inplace, sample), expected):
            own = without_inplace
        fx_graph = _functional(own, fx_graph, sample, expected)
        traced = fx.GraphModule(own, fx_graph)
        if not torch.allclose(_run(traced, sample), expected, rtol=1e-4, atol=1e-5, equal_nan=True):
            fx_graph, untraced = None, "the traced graph computes something else than the model"
    shape = tuple(sample.shape[1:])
    if fx_graph is None:
        return Graph(own, None, recorded_nodes(own, (sample.clone(),), {}, sample.shape[0]), shape, untraced)
    return Graph(own, fx_graph, _traced_nodes(own, fx_graph, sample), shape)


def _run(model: nn.Module, sample: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            out = model(sample.clone())  # a model may change its input
    except Exception as error:
        raise CaptureError(
            f"the model fails on an input of shape {tuple(sample.shape)} (batch first): {type(error).__name__}: {error}"
        ) from error
    if not isinstance(out, Tensor) or out.dim() < 2 or out.shape[0] != sample.shape[0]:
        found = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise CaptureError(f"the model must return one tensor of shape (batch, classes); it returned {found}")
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
    """The user's line that stopped the tracer: the innermost one outside of torch."""
    torch_home = str(Path(torch.__file__).parent)
    own = str(Path(__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((torch_home, own)) and Path(frame.filename).suffix == ".py":
            line = frame.line or linecache.getline(frame.filename, frame.lineno or 0).strip()
            return f"{frame.filename}:{frame.lineno}: {line}"
    return f"{type(error).__name__}: {error}"


def _disable_inplace(model: nn.Module) -> nn.Module:
    # An in-place ReLU would overwrite an activation that candidates share.
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return model


def _functional(model: nn.Module, graph: fx.Graph, sample: Tensor, expected: Tensor) -> fx.Graph:
    """The same graph without ``inplace=True``, unless the model relies on it."""
    new = copy.deepcopy(graph)
    for node in new.nodes:
        if node.op == "call_function" and node.kwargs.get("inplace"):
            node.update_kwarg("inplace", False)
    same = torch.equal(_run(fx.GraphModule(model, new), sample), expected)
    return new if same else graph


class _Versions(fx.Interpreter):
    """Runs the graph and looks whether a node changes a tensor that it was given."""

    culprit = ""

    def run_node(self, n: fx.Node) -> Any:
        given = [self.env[a] for a in n.all_input_nodes]
        before = [t._version for t in given if isinstance(t, Tensor)]
        out = super().run_node(n)
        if before != [t._version for t in given if isinstance(t, Tensor)]:
            self.culprit = self.culprit or n.name
        return out


def changes_in_place(graph: Graph, sample: Tensor) -> str:
    """The name of a node that changes one of its inputs, so that nobody else may use it; empty if there is none."""
    assert graph.fx_graph is not None
    runner = _Versions(fx.GraphModule(graph.model, graph.fx_graph))
    with torch.no_grad():
        runner.run(sample.clone())
    return runner.culprit


class _ShapeInterpreter(fx.Interpreter):
    """Runs the graph and remembers what every node was given, gave, and did."""

    def __init__(self, module: fx.GraphModule, batch: int) -> None:
        super().__init__(module)
        self.batch = batch
        self.shapes: dict[fx.Node, Shape] = {}
        self.seen: dict[fx.Node, Observed] = {}
        #: Nodes whose value depends on the input, and therefore has one part per sample.
        self.fed: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder" or any(a in self.fed for a in n.all_input_nodes):
            self.fed.add(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        tensors = shapes_in((args, kwargs))  # before the call, which may change a tensor in place
        inputs = tuple(self.shapes[a] for a in n.all_input_nodes if a in self.shapes and a.op != "get_attr")
        for value in (self.env[a] for a in self.fed.intersection(n.all_input_nodes)):
            feed(value)
        out = super().run_node(n)
        found = shapes_in(out)
        counted: Count | None = Count(0)
        if n.op == "call_module":
            module = self.module.get_submodule(str(n.target))
            call = Call(module_name(module), tensors, found[0] if found else (), args, kwargs, module)
            operation = of_module(module)
            inside = operation is None
            counted = self._inside(record(module, args, kwargs, self.batch)) if inside else count(call, operation)
        elif n.op in ("call_function", "call_method") and found:
            target = _target(n)
            counted = count(Call(bare(target), tensors, found[0], args, kwargs), of_function(target))
            if counted is None and callable(n.target):
                counted = self._inside(record_function(n.target, args, kwargs, self.batch))
        seen = observed((), found[0] if found else (), counted, self.batch, n in self.fed)
        self.seen[n] = dataclasses.replace(seen, inputs=inputs)
        if isinstance(out, Tensor):
            self.shapes[n] = seen.output
        return out

    def _inside(self, calls: Sequence[Recorded]) -> Count | None:
        """What a library's block or function does that the tracer does not enter; None unless all of it has rules."""
        # One in which nothing could be seen is unknown, not free.
        if not calls or any(c.seen.operations is None for c in calls):
            return None
        operations, macs = (sum(v) for v in zip(*((c.seen.operations or 0, c.seen.macs) for c in calls), strict=True))
        return Count(self.batch * operations, self.batch * macs)


def _traced_nodes(model: nn.Module, graph: fx.Graph, sample: Tensor) -> tuple[Node, ...]:
    observer = _ShapeInterpreter(fx.GraphModule(model, graph), sample.shape[0])
    with torch.no_grad():
        observer.run(sample.clone())
    nodes = []
    for n in graph.nodes:
        if n.op == "call_module":
            module = model.get_submodule(str(n.target))
            nodes.append(_module_node(n.name, str(n.target), module, observer.seen[n]))
        elif n.op in ("call_function", "call_method"):
            nodes.append(_function_node(n, observer))
    return tuple(nodes)


def _module_node(name: str, path: str, module: nn.Module, seen: Observed) -> Node:
    operation = of_module(module)
    named = {key: f"{path}.{key}" if path else key for key, _ in module.named_parameters()}
    common: dict[str, Any] = {
        "name": name,
        "path": path,
        "op": module_name(module),
        "type": type(module).__name__,
        "inputs": seen.inputs,
        "output": seen.output,
        "operations": seen.operations,
        "macs": seen.macs,
        "parameters": tuple(named.values()),
    }
    if operation is None or not operation.operands:
        return Node(**common)
    has = dict(module.named_parameters(recurse=False))
    flowing = [o.name for o in operation.operands if o.role == "activation"]
    held = [o for o in operation.formatted if o in has]
    return Site(
        **common,
        operands=tuple(o for o in operation.formatted if o in flowing or o in has),
        held=tuple((o, named[o]) for o in held),
        shapes=tuple((o, tuple(has[o].shape)) for o in held),
    )


def node_of(graph: Graph, site: Site) -> fx.Node | None:
    """The site's node of the traced graph; None where there is no such graph."""
    nodes = [] if graph.fx_graph is None else [n for n in graph.fx_graph.nodes if n.name == site.name]
    return nodes[0] if nodes else None


def owns_parameters(site: Site, node: fx.Node | None) -> bool:
    """Whether the site is a linear layer or a convolution whose weight, and bias if it has one, are parameters.

    Args:
        node: the site's; None for a module of a model that could not be traced.
    """
    if site.operation.output_channels is None or not site.weight or "data_in" not in site.operands:
        return False
    return bool(site.path) or node is None or bool(site.bias) or "bias" not in operand_nodes(node, site.operation)


def apply_site(model: nn.Module, site: Site, node: fx.Node | None, operands: Mapping[str, Tensor | None]) -> Tensor:
    """What a site computes with other operands in place of its input and its parameters.

    Args:
        model: whose site it is: it holds stride, padding and the like.
        node: the site's; needed for a function.
        operands: by name; one that is absent is None.
    """
    if site.path:
        assert site.operation.call is not None
        return site.operation.call(model.get_submodule(site.path), operands)
    assert node is not None
    replaced = {n: operands.get(operand) for operand, n in operand_nodes(node, site.operation).items()}
    args: Any = fx.map_arg(node.args, lambda n: replaced[n])
    kwargs: Any = fx.map_arg(node.kwargs, lambda n: replaced[n])
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


def _function_node(n: fx.Node, observer: _ShapeInterpreter) -> Node:
    target, operation = _target(n), of_node(n, observer.module)
    seen, shapes = observer.seen[n], observer.shapes
    common: dict[str, Any] = {
        "name": n.name,
        "path": "",
        "op": function_name(target),
        "type": str(getattr(target, "__name__", target)),
        "inputs": seen.inputs,
        "output": seen.output,
        "operations": seen.operations,
        "macs": seen.macs,
        "parameters": tuple(str(a.target) for a in n.all_input_nodes if a.op == "get_attr"),
    }
    if operation is None or not operation.operands:
        return Node(**common)
    operands = operand_nodes(n, operation)
    tensors = [v for v in operands.values() if v in shapes]
    # x + 1 has no second tensor that could be quantized with the first: plain arithmetic, not a site.
    needed = sum(operand.role in ("activation", "weight") for operand in operation.operands)
    if len(tensors) < (needed if operation.call is None else 1):
        return Node(**common)
    named = {o.name for o in operation.operands if o.role != "activation"}
    return Site(
        **common,
        operands=tuple(o for o in operation.formatted if o in operands),
        held=tuple((o, str(v.target)) for o, v in operands.items() if v.op == "get_attr" and o in named),
        shapes=tuple((o, shapes[v]) for o, v in operands.items() if o in named),
    )


def recorded_nodes(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int) -> tuple[Node, ...]:
    """The nodes of a model found by running it: modules that have a rule, and what happens between them.

    Modules are sites where they can be, each once, however often it is called. Functions are never sites: nothing
    could put a format in front of their operands; those that only move data are left out.
    """
    feed((args, kwargs))
    nodes: dict[str, Node] = {}
    own = {id(p): name for name, p in model.named_parameters()}
    for call in record(model, args, kwargs, batch):
        if call.module is not None:
            name = call.path.replace(".", "_") or type(call.module).__name__.lower()
            node = _module_node(name, call.path, call.module, call.seen)
            before = nodes.get(name)
            if before is not None:
                unknown = before.operations is None or node.operations is None
                operations = None if unknown else (before.operations or 0) + (node.operations or 0)
                node = dataclasses.replace(node, operations=operations, macs=before.macs + node.macs)
        elif call.seen.operations == 0:
            continue
        else:
            stem = "_".join(part for part in (call.path.replace(".", "_"), call.op) if part)
            name, number = stem, 0
            while name in nodes:
                number += 1
                name = f"{stem}_{number}"
            seen, held = call.seen, tuple(own[id(p)] for p in call.parameters if id(p) in own)
            node = Node(name, call.path, call.op, call.type, seen.inputs, seen.output, seen.operations, seen.macs, held)
        nodes[name] = node
    return tuple(nodes.values())
