"""The memory that activations need: the largest set of tensors that must be held at one time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from torch import fx

from bitfront.formats.base import FLOAT_BITS
from bitfront.graph import Graph
from bitfront.metrics import RUNNERS
from bitfront.metrics.base import EvaluationContext, Metric, Runner, Side, Values
from bitfront.operations.lookup import of_node
from bitfront.spaces.base import Codes


@dataclass(frozen=True)
class Tensor:
    """An activation.

    Attributes:
        name: of the node that makes it.
        values: how many, per sample.
        groups: groups of the space whose data_in formats take it; the widest of them is what must be held.
        floats: whether somebody takes it in float.
        first, last: from which step to which it is held.
    """

    name: str
    values: int
    groups: tuple[int, ...]
    floats: bool
    first: int
    last: int


@RUNNERS.register("peak_memory")
class PeakMemory(Runner):
    """Bytes of the activations that are held at the worst moment, for one sample."""

    side: ClassVar[Side] = "hw_runner"
    closed_form: ClassVar[bool] = True
    produces = (
        Metric(
            "peak_memory",
            "bytes",
            "minimize",
            "modelled",
            "largest set of activations held at one time, each in the widest format that takes it, one sample",
        ),
    )

    def measure(self, subject: EvaluationContext, codes: Codes) -> Mapping[str, Values]:
        """Bytes for each candidate. Each tensor ends on a whole byte."""
        space = subject.space
        tensors = activations(space.graph)
        options, bits = space.options(codes), space.bits("data_in")
        steps = max((t.last for t in tensors), default=0) + 1
        held = np.zeros((steps, len(codes)))
        for tensor in tensors:
            width = np.full(len(codes), FLOAT_BITS if tensor.floats else 0)
            for g in tensor.groups:
                width = np.maximum(width, bits[g][options[:, g]])
            held[tensor.first : tensor.last + 1] += np.ceil(tensor.values * width / 8)
        return {"peak_memory": held.max(axis=0)}


@lru_cache(maxsize=8)
def activations(graph: Graph) -> tuple[Tensor, ...]:
    """Every activation of a model, when it is held and in whose formats.

    A step holds its inputs and its output at once: nothing works in place. Of a model that cannot be traced it is
    only known that each module holds its inputs and its output; what waits beside it (a residual) is not.
    """
    groups = {site.name: g for g, site in enumerate(graph.sites)}
    nodes = {n.name: n for n in graph.nodes}
    if graph.fx_graph is None:
        return tuple(_unordered(graph, groups))
    order = [n for n in graph.fx_graph.nodes if n.op != "get_attr"]
    step = {n: i for i, n in enumerate(order)}
    #: Node → the groups that take what it makes, whether somebody takes it in float, and its last use.
    uses: dict[fx.Node, tuple[set[int], bool, int]] = {}
    for node in reversed(order):
        own, floats, last = set[int](), False, step[node]
        for user in node.users:
            last = max(last, step[user])
            if user.name in groups:
                own.add(groups[user.name])
            elif _is_view(user, graph):
                own |= uses[user][0]
                floats, last = floats or uses[user][1], max(last, uses[user][2])
            else:
                floats = True
        uses[node] = (own, floats, last)
    tensors = []
    for node in order:
        info = nodes.get(node.name)
        if node.op == "output" or _is_view(node, graph):
            continue
        shape = graph.sample_shape if node.op == "placeholder" else info.output if info else ()
        own, floats, last = uses[node]
        tensors.append(Tensor(node.name, math.prod(shape), tuple(sorted(own)), floats, step[node], last))
    return tuple(tensors)


def _is_view(node: fx.Node, graph: Graph) -> bool:
    """Whether a node makes no tensor of its own: what comes out is what went in, seen in another shape."""
    operation = of_node(node, graph.model)
    return operation is not None and operation.view


def _unordered(graph: Graph, groups: Mapping[str, int]) -> list[Tensor]:
    tensors = []
    for step, node in enumerate(graph.nodes):
        own = (groups[node.name],) if node.name in groups else ()
        for k, shape in enumerate(node.inputs):
            tensors.append(Tensor(f"{node.name}.{k}", math.prod(shape), own, not own, step, step))
        tensors.append(Tensor(node.name, math.prod(node.output), (), True, step, step))
    return tensors
