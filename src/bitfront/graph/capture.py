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
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bitfront.errors import CaptureError
from bitfront.graph.base import Graph, Node, Shape, Site
from bitfront.graph.operations import (
    SITE_OPERANDS,
    Call,
    Count,
    count,
    function_op,
    has_rule,
    module_op,
    shapes_in,
)
from bitfront.graph.recording import Observed, Recorded, feed, observed, record, record_function


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


def _trace(model: nn.Module) -> tuple[fx.Graph | None, str]:
    try:
        return fx.Tracer().trace(model), ""
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
            call = Call(module_op(module), tensors, found[0] if found else (), args, kwargs, module)
            counted = count(call) if has_rule(module) else self._inside(record(module, args, kwargs, self.batch))
        elif n.op in ("call_function", "call_method") and found:
            op, _ = _function(n)
            counted = count(Call(op, tensors, found[0], args, kwargs))
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
    op = module_op(module)
    named = {key: f"{path}.{key}" if path else key for key, _ in module.named_parameters()}
    common: dict[str, Any] = {
        "name": name,
        "path": path,
        "op": op,
        "type": type(module).__name__,
        "inputs": seen.inputs,
        "output": seen.output,
        "operations": seen.operations,
        "macs": seen.macs,
        "parameters": tuple(named.values()),
    }
    if op not in SITE_OPERANDS or not has_rule(module):
        return Node(**common)
    has = dict(module.named_parameters(recurse=False))
    return Site(
        **common,
        operands=tuple(o for o in SITE_OPERANDS[op] if o == "data_in" or o in has),
        weight=named.get("weight"),
        bias=named.get("bias"),
        weight_shape=tuple(has["weight"].shape) if "weight" in has else (),
        bias_shape=tuple(has["bias"].shape) if "bias" in has else (),
    )


def operand_nodes(node: fx.Node, op: str) -> Mapping[str, fx.Node]:
    """The graph nodes behind the operands of a functional site; data_in_2 is the second input of an addition."""
    names = {
        "linear": ("data_in", "weight", "bias"),
        "conv1d": ("data_in", "weight", "bias"),
        "conv2d": ("data_in", "weight", "bias"),
        "relu": ("data_in",),
        "matmul": ("data_in", "weight"),
        "bmm": ("data_in", "weight"),
    }.get(op, ("data_in", "data_in_2"))
    found: dict[str, fx.Node] = {}
    for position, name in enumerate(names):
        value = node.args[position] if position < len(node.args) else node.kwargs.get(name)
        if isinstance(value, fx.Node):
            found[name] = value
    return found


def node_of(graph: Graph, site: Site) -> fx.Node | None:
    """The site's node of the traced graph; None where there is no such graph."""
    nodes = [] if graph.fx_graph is None else [n for n in graph.fx_graph.nodes if n.name == site.name]
    return nodes[0] if nodes else None


def owns_parameters(site: Site, node: fx.Node | None) -> bool:
    """Whether the site is a linear layer or a convolution whose weight, and bias if it has one, are parameters.

    Args:
        node: the site's; None for a module of a model that could not be traced.
    """
    if site.op not in ("linear", "conv1d", "conv2d") or not site.weight or "data_in" not in site.operands:
        return False
    return bool(site.path) or node is None or bool(site.bias) or "bias" not in operand_nodes(node, site.op)


def apply_site(
    model: nn.Module, site: Site, node: fx.Node | None, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """What a site that owns its parameters computes, with other operands in their place.

    Args:
        model: whose site it is: it holds stride, padding and the like.
        node: the site's; needed for a function.
    """
    if site.path:
        module: Any = model.get_submodule(site.path)
        out: Tensor = F.linear(x, weight, bias) if site.op == "linear" else module._conv_forward(x, weight, bias)
        return out
    assert node is not None
    values = {"data_in": x, "weight": weight, "bias": bias}
    replaced = {n: values[operand] for operand, n in operand_nodes(node, site.op).items()}
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


def _function(n: fx.Node) -> tuple[str, str]:
    return function_op(str(n.target) if n.op == "call_method" else n.target)


def _function_node(n: fx.Node, observer: _ShapeInterpreter) -> Node:
    op, name = _function(n)
    seen, shapes = observer.seen[n], observer.shapes
    held = tuple(str(a.target) for a in n.all_input_nodes if a.op == "get_attr")
    common: dict[str, Any] = {
        "name": n.name,
        "path": "",
        "op": op,
        "type": name,
        "inputs": seen.inputs,
        "output": seen.output,
        "operations": seen.operations,
        "macs": seen.macs,
        "parameters": held,
    }
    operands = operand_nodes(n, op) if op in SITE_OPERANDS else {}
    tensors = [v for v in operands.values() if v in shapes]
    # x + 1 has no second tensor that could be quantized with the first: plain arithmetic, not a site.
    two = op not in ("relu", "linear", "conv1d", "conv2d")
    if op not in SITE_OPERANDS or not tensors or (two and len(tensors) < 2):
        return Node(**common)
    parameter = {key: v for key, v in operands.items() if v.op == "get_attr"}
    return Site(
        **common,
        operands=tuple(o for o in SITE_OPERANDS[op] if o in operands),
        weight=str(parameter["weight"].target) if "weight" in parameter else None,
        bias=str(parameter["bias"].target) if "bias" in parameter else None,
        weight_shape=shapes[operands["weight"]] if "weight" in operands else (),
        bias_shape=shapes[operands["bias"]] if "bias" in operands else (),
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
