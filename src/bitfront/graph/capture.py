"""From an nn.Module to a Graph: traced by torch.fx, or, where the model cannot be traced, module by module.

Capture runs the model once on a small sample to learn the shapes, and checks that the traced graph computes the same as
the model. A model that FX cannot trace (its control flow depends on data) is captured too: its modules, such as Linear,
Conv and ReLU, and the products that they call are recorded while the model runs and become sites. ``Graph.untraced``
says which line stopped the tracer.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitfront.errors import CaptureError
from bitfront.graph.baking import bake, has_computed_weights, private_copy, untouched
from bitfront.graph.base import Graph, Node, Site, Switch
from bitfront.graph.checking import deployed, first_difference, same_bits
from bitfront.graph.composites import call_layers
from bitfront.graph.memory import remember_places
from bitfront.graph.nodes import left_out, recorded_nodes, traced_nodes
from bitfront.graph.outputs import outputs_of
from bitfront.graph.readiness import hint_for_failure, refuse_unready
from bitfront.graph.tracing import input_name, other_inputs, seeded, switches_of, trace
from bitfront.operations.base import Operands
from bitfront.operations.lookup import operand_nodes


def capture(model: nn.Module, sample: Tensor, *, training: bool = False) -> Graph:
    """Capture a copy of `model`; the model itself is not changed.

    Args:
        model: any nn.Module that can be called with one tensor, shape ``(batch, *features)``.
        sample: two or more input samples, on the model's device.
        training: whether candidates will be trained. What the graph cannot express of the model in training is then
            no site (``Graph.not_in_training``).

    Raises:
        CaptureError: the model cannot be copied, fails on `sample`, needs more than one tensor, or does not return one
            tensor of shape ``(batch, classes)``.
    """
    refuse_unready(model)
    try:
        copied = private_copy(model).eval()
    except Exception as error:
        raise CaptureError(f"the model cannot be copied ({type(error).__name__}: {error})") from error
    expected = _logits(copied, sample)
    remember_places(model, copied)
    copied, baked = _with_plain_weights(copied, sample, expected)
    fused, expected = expected, call_layers(copied, partial(_logits, sample=sample), expected)
    unfused = not same_bits(fused, expected)
    fx_graph, untraced = trace(copied)
    switches: tuple[Switch, ...] = ()
    differs = ""
    if fx_graph is not None:
        switches, differs = switches_of(copied, fx_graph)
        without_inplace = _disable_inplace(copy.deepcopy(copied))
        if same_bits(_logits(without_inplace, sample), expected):
            copied = without_inplace
        fx_graph = _without_inplace(copied, fx_graph, sample, expected)
        untraced = _difference(copied, fx_graph, sample, expected)
        fx_graph = None if untraced else fx_graph
    with untouched(copied):
        shape, (outputs, ending) = tuple(sample.shape[1:]), outputs_of(copied, fx_graph, sample, expected)
    if fx_graph is None:
        with untouched(copied):
            nodes = recorded_nodes(copied, (sample.clone(),), {}, sample.shape[0])
        others = left_out(copied, nodes)
        graph = Graph(
            copied,
            None,
            nodes,
            shape,
            untraced,
            baked=baked,
            left_out=others,
            outputs=outputs,
            ending=ending,
            unfused=unfused,
        )
        return _calling_the_same(graph, sample) if training else graph
    with untouched(copied):
        nodes = traced_nodes(copied, fx_graph, sample)
    others = left_out(copied, nodes)
    graph = Graph(copied, fx_graph, nodes, shape, "", switches, "", baked, others, outputs, ending, unfused)
    return _for_training(graph, differs, sample) if training else graph


def _with_plain_weights(model: nn.Module, sample: Tensor, expected: Tensor) -> tuple[nn.Module, tuple[str, ...]]:
    """The model with computed weights as parameters, and which they are, if it still gives the same bits."""
    if not has_computed_weights(model):
        return model, ()
    changed = copy.deepcopy(model)
    baked = bake(changed)
    return (changed, baked) if same_bits(_logits(changed, sample), expected) else (model, ())


def _difference(model: nn.Module, graph: fx.Graph, sample: Tensor, expected: Tensor) -> str:
    """What the traced graph computes otherwise than the model, in words; empty where the bits are the same."""
    try:
        if same_bits(_logits(fx.GraphModule(model, graph), sample), expected):
            return ""
    except (CaptureError, SyntaxError) as error:
        return f"the traced graph does not run: {error}"
    other = first_difference(copy.deepcopy(model), fx.GraphModule(copy.deepcopy(model), graph), sample)
    return f"the traced graph computes something else than the model: {other}"


def _for_training(graph: Graph, differs: str, sample: Tensor) -> Graph:
    """The graph, without sites that would be trained otherwise than in the user's model."""
    rewritten = [site for site in (*graph.sites, *graph.nameable) if graph.is_rewritten_for(site)]
    if not rewritten:
        return graph
    differs = differs or first_difference(copy.deepcopy(graph.model), deployed(graph), sample, training=True)
    if not differs:
        return graph
    # What would need a rewritten graph cannot be named, and that alone is no reason to tell users.
    never = {site.name for site in rewritten}
    nodes = tuple(dataclasses.replace(n, if_named=None) if n.name in never else n for n in graph.nodes)
    graph = dataclasses.replace(graph, nodes=nodes)
    if not any(graph.is_rewritten_for(site) for site in graph.sites):
        return graph
    if any(site.path and graph.is_rewritten_for(site) for site in graph.sites):
        # A module that is called several times is one site only where the model is run as it is.
        with untouched(graph.model):
            nodes = recorded_nodes(graph.model, (sample.clone(),), {}, sample.shape[0])
        why = f"candidates are trained, and {differs}"
        return dataclasses.replace(graph, fx_graph=None, nodes=nodes, untraced=why, switches=())
    nodes = tuple(_no_site(node) if isinstance(node, Site) and not node.path else node for node in graph.nodes)
    return dataclasses.replace(graph, nodes=nodes, not_in_training=differs, switches=())


def _calling_the_same(graph: Graph, sample: Tensor) -> Graph:
    """An untraced graph, without functions as sites if the model calls others in training."""
    called = {n.name for n in graph.nodes if isinstance(n, Site) and not n.path}
    model = copy.deepcopy(graph.model).train()
    with seeded(0):
        nodes = recorded_nodes(model, (sample.clone(),), {}, sample.shape[0]) if called else ()
    if called == {n.name for n in nodes if isinstance(n, Site) and not n.path}:
        return graph
    left = tuple(_no_site(n) if isinstance(n, Site) and n.name in called else n for n in graph.nodes)
    return dataclasses.replace(graph, nodes=left, not_in_training="the model calls other functions in training")


def _no_site(site: Site) -> Node:
    return Node(**{field.name: getattr(site, field.name) for field in dataclasses.fields(Node)})


def _logits(model: nn.Module, sample: Tensor) -> Tensor:
    try:
        with torch.no_grad(), untouched(model):
            out = model(sample.clone())  # a model may change its input
    except Exception as error:
        others = other_inputs(model)
        if others:
            raise CaptureError(
                f"the forward of {type(model).__name__} needs {len(others) + 1} inputs ({input_name(model)}, "
                f"{', '.join(others)}), and a model is given one tensor here, of shape {tuple(sample.shape)} (batch "
                f"first). Give {' and '.join(others)} a default, or give the data by the names of these inputs, "
                f"{{{input_name(model)!r}: array, {others[0]!r}: array}}, or wrap the model in a module whose forward "
                "takes one tensor"
            ) from error
        raise CaptureError(
            f"the model fails on an input of shape {tuple(sample.shape)} (batch first): {type(error).__name__}: {error}"
            + hint_for_failure(model)
        ) from error
    if not isinstance(out, Tensor) or out.dim() < 2 or out.shape[0] != sample.shape[0]:
        returned = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise CaptureError(f"the model must return one tensor of shape (batch, classes); it returned {returned}")
    return out


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
    try:
        same = same_bits(_logits(fx.GraphModule(model, changed), sample), expected)
    except (CaptureError, SyntaxError):
        same = False
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
    model = fx.GraphModule(graph.model, graph.fx_graph)
    detector = _InPlaceDetector(model)
    with torch.no_grad(), untouched(model):
        detector.run(sample.clone())
    return detector.culprit


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
    product = site.operation.product
    if product is None or product.matrix or not site.weight or "data_in" not in site.operands:
        return False
    if node is None:
        return bool(site.path)
    return bool(site.path) or bool(site.bias) or "bias" not in operand_nodes(node, site.operation)


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
        called: Tensor = site.operation.call(model.get_submodule(site.path), Operands(operands))
        return called
    assert node is not None
    values = {n: operands.get(operand) for operand, n in operand_nodes(node, site.operation).items()}
    args: Any = fx.map_arg(node.args, lambda n: values[n])
    kwargs: Any = fx.map_arg(node.kwargs, lambda n: values[n])
    function: Any = node.target
    result: Tensor = function(*args, **kwargs)
    return result


def holding_nan(state: Mapping[str, Tensor]) -> str:
    """Which tensor of a state dict holds NaN, and how many; empty if none does."""
    for name, tensor in state.items():
        number = int(tensor.isnan().sum()) if tensor.is_floating_point() else 0
        if number:
            return f"{name} holds NaN in {number:,} of its {tensor.numel():,} values"
    return ""


def check_weights(model: nn.Module) -> None:
    """Raises CaptureError if a parameter or buffer of `model` holds NaN, of which no number format knows the value."""
    bad = holding_nan(model.state_dict())
    if bad:
        raise CaptureError(f"the model's {bad}: train it again, or load weights from before they became NaN")


def parameter(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of `model` by its full name, detached."""
    path, _, key = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), key)
    assert isinstance(tensor, Tensor)
    return tensor.detach()
