"""Pruning by magnitude: the smallest weights of a captured model become zero, before formats are calibrated on them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from bitfront.graph import Graph
from bitfront.graph.memory import stored_tensors

Scope = Literal["local", "global"]


@dataclass(frozen=True, eq=False)
class Pruned:
    """A model with pruned weights.

    Attributes:
        graph: captured, with a copy of the model.
        layers: site → name of the parameter that is its weight, for those whose weights were looked at.
        skipped: names of weights that stay as they are, because several names share their memory in part.
    """

    graph: Graph
    layers: Mapping[str, str]
    skipped: tuple[str, ...]


def pruned(graph: Graph, sparsity: float, scope: Scope) -> Pruned:
    """The model whose smallest weights are zero.

    Args:
        graph: the captured model, not changed.
        sparsity: the share that becomes zero, 0 to below 1, rounded down to whole weights.
        scope: this share of each layer's weights ("local"), or of all together ("global"), where the smallest of all
            layers are taken.
    """
    model = copy.deepcopy(graph.model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    layers, skipped = _weights(graph, parameters)
    tensors = {id(parameters[name]): parameters[name].detach() for name in layers.values()}.values()
    groups = [[tensor] for tensor in tensors] if scope == "local" else [list(tensors)]
    for group in groups:
        _prune(group, sparsity)
    return Pruned(replace(graph, model=model), layers, skipped)


def _weights(graph: Graph, parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, str], tuple[str, ...]]:
    """(site → its weight, names of weights that cannot be changed alone)."""
    layers: dict[str, str] = {}
    skipped: list[str] = []
    for tensor in stored_tensors(graph):
        users = [use.site for use in tensor.uses if use.role == "weight"]
        names = [name for name in tensor.names if name in parameters]
        if not users or not names:
            continue
        if len({id(parameters[name]) for name in names}) > 1 or len(names) < len(tensor.names):
            skipped += tensor.names
        else:
            layers |= dict.fromkeys(users, names[0])
    order = [site.name for site in graph.sites if site.name in layers]
    return {name: layers[name] for name in order}, tuple(skipped)


def _prune(tensors: list[Tensor], sparsity: float) -> None:
    """Set the smallest values of some tensors to zero, in place; of equal ones the first."""
    if not tensors:
        return
    magnitudes = torch.cat([tensor.abs().flatten() for tensor in tensors])
    smallest = magnitudes.argsort(stable=True)[: int(sparsity * len(magnitudes))]
    chosen = torch.zeros(len(magnitudes), dtype=torch.bool, device=magnitudes.device)
    chosen[smallest] = True
    ends = [0, *itertools.accumulate(tensor.numel() for tensor in tensors)]
    for tensor, start, end in zip(tensors, ends, ends[1:], strict=False):
        tensor.masked_fill_(chosen[start:end].reshape(tensor.shape), 0)
