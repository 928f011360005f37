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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bitfront.errors import CaptureError
from bitfront.graph.base import Graph, Node, Shape, Site
from bitfront.graph.operations import (
    FUNCTIONS,
    METHODS,
    SITE_OPERANDS,
    count_function,
    count_module,
    module_op,
    weighted,
)


def capture(model: nn.Module, sample: Tensor) -> Graph:
    """Capture `model`, which is not changed.

    Args:
        model: any nn.Module that takes one tensor, shape (batch, *features).
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
        return Graph(own, None, _module_nodes(own, sample), shape, untraced)
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


class _Shapes(fx.Interpreter):
    """Runs the graph and remembers the shape of every tensor, per sample."""

    def __init__(self, module: fx.GraphModule, batch: int) -> None:
        super().__init__(module)
        self.batch = batch
        self.shapes: dict[fx.Node, Shape] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, Tensor):
            self.shapes[n] = _per_sample(out, self.batch, n.op == "get_attr")
        return out


def _per_sample(tensor: Tensor, batch: int, constant: bool = False) -> Shape:
    shape = tuple(tensor.shape)
    return shape if constant or not shape or shape[0] != batch else shape[1:]


def _traced_nodes(model: nn.Module, graph: fx.Graph, sample: Tensor) -> tuple[Node, ...]:
    interpreter = _Shapes(fx.GraphModule(model, graph), sample.shape[0])
    with torch.no_grad():
        interpreter.run(sample.clone())
    nodes = []
    for n in graph.nodes:
        if n.op == "call_module":
            module = model.get_submodule(str(n.target))
            inputs = tuple(interpreter.shapes[a] for a in n.all_input_nodes if a in interpreter.shapes)
            nodes.append(_module_node(n.name, str(n.target), module, inputs, interpreter.shapes.get(n, ())))
        elif n.op in ("call_function", "call_method"):
            nodes.append(_function_node(n, interpreter.shapes))
    return tuple(nodes)


def _module_node(name: str, path: str, module: nn.Module, inputs: tuple[Shape, ...], output: Shape) -> Node:
    op = module_op(module)
    operations = count_module(op, module, inputs, output)
    named = {key: f"{path}.{key}" for key, _ in module.named_parameters()}
    common: dict[str, Any] = {
        "name": name,
        "path": path,
        "op": op,
        "type": type(module).__name__,
        "inputs": inputs,
        "output": output,
        "operations": operations,
        "macs": operations or 0 if "weight" in SITE_OPERANDS.get(op, ()) else 0,
        "parameters": tuple(named.values()),
    }
    if op not in SITE_OPERANDS:
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


def _function_node(n: fx.Node, shapes: Mapping[fx.Node, Shape]) -> Node:
    if n.op == "call_method":
        name, op = str(n.target), METHODS.get(str(n.target), str(n.target))
    else:
        name = getattr(n.target, "__name__", str(n.target))
        op = FUNCTIONS.get(n.target, name)
    inputs = tuple(shapes[a] for a in n.all_input_nodes if a in shapes)
    output = shapes.get(n, ())
    window = n.kwargs.get("kernel_size", n.args[1] if len(n.args) > 1 else 1)
    common: dict[str, Any] = {
        "name": n.name,
        "path": "",
        "op": op,
        "type": name,
        "inputs": inputs,
        "output": output,
    }
    operands = operand_nodes(n, op) if op in SITE_OPERANDS else {}
    tensors = [v for v in operands.values() if v in shapes]
    # x + 1 has no second tensor that could be quantized with the first: plain arithmetic, not a site.
    two = op not in ("relu", "linear", "conv1d", "conv2d")
    if op not in SITE_OPERANDS or not tensors or (two and len(tensors) < 2):
        elementwise = op in ("add", "sub", "mul")
        operations = count_function(op, name, inputs or ((),), output, window) if inputs or not elementwise else 0
        return Node(**common, operations=operations, macs=0)
    parameter = {key: v for key, v in operands.items() if v.op == "get_attr"}
    if op in ("linear", "conv1d", "conv2d"):
        operations = weighted(op, shapes[operands["weight"]], output)
        macs = operations
    else:
        operations = count_function(op, name, inputs, output, window) or 0
        macs = operations if op in ("matmul", "bmm") else 0
    return Site(
        **common,
        operations=operations,
        macs=macs,
        parameters=tuple(str(v.target) for v in parameter.values()),
        operands=tuple(o for o in SITE_OPERANDS[op] if o in operands),
        weight=str(parameter["weight"].target) if "weight" in parameter else None,
        bias=str(parameter["bias"].target) if "bias" in parameter else None,
        weight_shape=shapes[operands["weight"]] if "weight" in operands else (),
        bias_shape=shapes[operands["bias"]] if "bias" in operands else (),
    )


def _module_nodes(model: nn.Module, sample: Tensor) -> tuple[Node, ...]:
    """Leaf modules in the order in which the model calls them on `sample`; each once, however often it is called."""
    batch = sample.shape[0]
    calls: dict[str, tuple[nn.Module, tuple[Shape, ...], Shape, int]] = {}

    def record(path: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            times = calls[path][3] if path in calls else 0
            ins = tuple(_per_sample(t, batch) for t in inputs if isinstance(t, Tensor))
            out = _per_sample(output, batch) if isinstance(output, Tensor) else ()
            calls[path] = (module, ins, out, times + 1)

        return hook

    leaves = [(p, m) for p, m in model.named_modules() if p and not list(m.children())]
    handles = [m.register_forward_hook(record(p)) for p, m in leaves]
    try:
        _run(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    nodes = []
    for path, (module, inputs, output, times) in calls.items():
        node = _module_node(path.replace(".", "_"), path, module, inputs, output)
        counted = None if node.operations is None else node.operations * times
        nodes.append(dataclasses.replace(node, operations=counted, macs=node.macs * times))
    return tuple(nodes)
