"""Cross-layer equalisation: channels between two layers get weights of similar size on both sides.

A channel that a layer makes 1 / s times as large, and the next one takes s times as large, computes the same if nothing
but a ReLU is between them. With s = sqrt(r1 / r2) both sides get the range sqrt(r1 · r2) of the two (Nagel et al. 2019,
arXiv:1906.04721, section 4.1). Formats with one scale per tensor then waste less on small channels.

Here s is the nearest power of two, so that not a single bit of the float function changes, and doing it again changes
nothing. Layers with something else between them (a batch norm, a pooling, a residual sum) stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from bitfront.graph import Graph
from bitfront.graph.memory import stored_tensors
from bitfront.operations.lookup import hooks, of_node

#: The layers, by the name of their operation. Dimension 0 of a weight is its outputs, dimension 1 its inputs.
LAYERS = ("linear", "conv1d", "conv2d", "conv3d")
#: In a chain of layers the ranges settle after a few rounds.
ROUNDS = 32


def equalised(graph: Graph) -> Graph:
    """The graph with equalised weights, in a new model; itself where no two layers can be equalised."""
    pairs = list(pairs_of(graph))
    if not pairs:
        return graph
    model = copy.deepcopy(graph.model)
    with torch.no_grad():
        for _ in range(ROUNDS):
            changed = [_equalise(model.get_submodule(a), model.get_submodule(b)) for a, b in pairs]
            if not any(changed):
                break
    return replace(graph, model=model)


def pairs_of(graph: Graph) -> Iterator[tuple[str, str]]:
    """Paths of two layers whose channels are only between them, with nothing or a ReLU in the way."""
    if graph.fx_graph is None:
        return
    alone = layers_alone(graph)
    for node in graph.fx_graph.nodes:
        if node.name not in alone or len(node.users) != 1:
            continue
        (following,) = node.users
        operation = of_node(following, graph.model)
        if operation is not None and operation.rectifies and following.name not in alone and len(following.users) == 1:
            (following,) = following.users
        first, second = graph.site(node.name), alone.get(following.name)
        if second is not None and graph.site(following.name).op == first.op:
            yield first.path, second


def layers_alone(graph: Graph) -> dict[str, str]:
    """Node → path of its module, of layers whose parameters nobody else uses."""
    shared = {
        name for stored in stored_tensors(graph) if len(stored.uses) != 1 or stored.floats for name in stored.names
    }
    layers = {}
    for site in graph.sites:
        if site.op not in LAYERS or not site.path or graph.is_rewritten_for(site):
            continue
        module = graph.model.get_submodule(site.path)
        held = {f"{site.path}.{name}" for name, _ in module.named_parameters()}
        if (
            not hooks(module)
            and site.weight
            and not held & shared
            and held <= {name for _, name in site.operand_parameters}
        ):
            layers[site.name] = site.path
    return layers


def _equalise(first: nn.Module, second: nn.Module) -> bool:
    """Equalise two layers in place. Returns whether something changed."""
    weight, after = _parameter(first, "weight"), _parameter(second, "weight")
    groups = int(getattr(second, "groups", 1))
    # (groups, outputs of a group, inputs of a group, places): input channels are counted through the groups.
    laid = after.view(groups, len(after) // groups, after.shape[1], -1)
    ranges = weight.flatten(1).abs().amax(dim=1).double(), laid.abs().amax(dim=(1, 3)).flatten().double()
    known = (ranges[0] > 0) & (ranges[1] > 0) & ranges[0].isfinite() & ranges[1].isfinite()
    exponent = torch.where(known, torch.log2(ranges[0] / ranges[1]) / 2, torch.zeros_like(ranges[0])).round()
    factor = torch.exp2(exponent).to(weight.dtype)
    weight.div_(factor.view(-1, *[1] * (weight.dim() - 1)))
    if getattr(first, "bias", None) is not None:
        _parameter(first, "bias").div_(factor)
    laid.mul_(factor.view(groups, 1, -1, 1))
    return bool((exponent != 0).any())


def _parameter(module: nn.Module, name: str) -> Tensor:
    held = getattr(module, name)
    assert isinstance(held, Tensor)
    return held.data
