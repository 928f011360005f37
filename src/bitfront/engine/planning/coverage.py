"""What a search leaves in float: in every candidate, and in each one by its choice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bitfront.engine.evaluation.interface import Evaluator
from bitfront.engine.evaluation.trained import open_evaluator
from bitfront.engine.storage.records import InFloat
from bitfront.graph.base import Graph
from bitfront.metrics.base import RunnerSettings
from bitfront.metrics.configured import ConfiguredRunner
from bitfront.metrics.coverage import FloatShares, all_products, all_weights
from bitfront.spaces.base import Codes
from bitfront.spaces.model_space import ModelSpace

#: How many parts are named.
NAMED = 3


def in_float(space: ModelSpace) -> InFloat:
    """What stays in float in every candidate, of the model with its widths; nothing in a search without formats."""
    if not _has_formats(space):
        return InFloat()
    formats = space.quantization(space.graph)
    weights, macs = all_weights(formats), list(all_products(formats))
    all_elements = max(1, sum(weight.elements for weight in weights))
    all_macs = max(1, sum(products.node.macs for products in macs))
    parts: dict[str, tuple[float, float]] = {}
    for weight in weights:
        if not weight.offered and weight.elements:
            _add(parts, _holder(space.graph, weight.name), weight.elements / all_elements, 0.0)
    for products in macs:
        if (least := float(products.in_float.min())) > 0:
            node = products.node
            title = _modules(space.graph).get(node.path) if node.path else None
            _add(parts, title or node.title, 0.0, least / all_macs)
    largest = sorted(parts, key=lambda title: -max(parts[title]))[:NAMED]
    sums = np.array(list(parts.values())).reshape(-1, 2).sum(axis=0)
    return InFloat(float(sums[0]), float(sums[1]), tuple(largest), len(parts) - len(largest))


def float_shares(evaluator: Evaluator, codes: Codes) -> NDArray[np.float64]:
    """What candidates leave in float, whether they choose it or not: shares of the weights and of the
    multiply-accumulates of their networks, 0 to 1, shape (candidates, 2). Zeros in a search without formats."""
    if not _has_formats(evaluator.space):
        return np.zeros((len(codes), 2))
    runner = ConfiguredRunner("float_shares", "hw_runner", FloatShares, RunnerSettings())
    asked = open_evaluator(replace(evaluator.job, runners=(runner,)), evaluator.space)
    names = [metric.name for metric in FloatShares.produces]
    values = asked.closed_form_values(codes, names)
    return np.stack([values[name] for name in names], axis=1)


def _has_formats(space: ModelSpace) -> bool:
    """Whether formats are a choice here; a search of widths alone has none."""
    return any(formats for options in space.quantization(space.graph).site_formats for formats in options)


def _add(parts: dict[str, tuple[float, float]], title: str, weights: float, macs: float) -> None:
    before = parts.get(title, (0.0, 0.0))
    parts[title] = (before[0] + weights, before[1] + macs)


def _modules(graph: Graph) -> dict[str, str]:
    """Path of a module → its name and type, for modules that compute a node, and for layers that are left out."""
    titles = {layer.path: f"{layer.path} ({layer.type})" for layer in graph.left_out}
    for node in graph.nodes:
        # Where the model was not traced, the path of a function is that of the module that calls it.
        if node.path and type(graph.model.get_submodule(node.path)).__name__ == node.type:
            titles[node.path] = f"{node.path} ({node.type})"
    return titles


def _holder(graph: Graph, name: str) -> str:
    """Name and type of the layer that a parameter belongs to; of the parameter, if the user's code holds it itself."""
    titles = _modules(graph)
    for path in (name, *_parents(name)):
        if path in titles:
            return titles[path]
    path = name.rpartition(".")[0]
    module = graph.model.get_submodule(path)
    if path and type(module).__module__.startswith("torch.nn."):
        return f"{path} ({type(module).__name__})"  # nothing runs it
    return f"{name} (parameter)"


def _parents(name: str) -> Iterable[str]:
    while name := name.rpartition(".")[0]:
        yield name
