"""The memory that activations need: the largest set of tensors that must be in memory at one time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from torch import fx

from bitfront.formats.base import FLOAT_BITS, Operand
from bitfront.graph import Graph, Site
from bitfront.metrics import RUNNERS
from bitfront.metrics.base import EvaluationContext, Metric, Runner, Side, Values
from bitfront.operations.base import DATA_OUT
from bitfront.operations.lookup import nodes_of_operands, of_node
from bitfront.spaces.base import Codes


@dataclass(frozen=True)
class Activation:
    """An activation, and the steps in which it is in memory.

    Attributes:
        name: of the node that computes it.
        values: number of values per sample.
        uses: (group of the space, input) of the sites that take it; it is stored in the widest of their formats.
        floats: whether a node takes it in float.
        result: the group of the site whose result it is: it is stored in no more bits than its format has; None for
            others.
        first: the step that computes it.
        last: the last step that uses it.
    """

    name: str
    values: int
    uses: tuple[tuple[int, Operand], ...]
    floats: bool
    result: int | None
    first: int
    last: int


@RUNNERS.register("peak_memory")
class PeakMemory(Runner):
    """Largest number of bytes of activations that are in memory at one time, for one sample."""

    side: ClassVar[Side] = "hw_runner"
    closed_form: ClassVar[bool] = True
    produces = (
        Metric(
            "peak_memory",
            "bytes",
            "minimize",
            "modelled",
            "largest set of activations in memory at one time, each in the widest format that uses it, one sample",
        ),
    )

    def measure(self, context: EvaluationContext, codes: Codes) -> Mapping[str, Values]:
        """Bytes for each candidate. Each tensor ends on a whole byte."""
        space = context.space
        tensors = activations(space.graph)
        options = space.options(codes)
        bits = {operand: space.bits(operand) for operand in {DATA_OUT, *(o for t in tensors for _, o in t.uses)}}
        steps = max((tensor.last for tensor in tensors), default=0) + 1
        in_memory = np.zeros((steps, len(codes)))
        for tensor in tensors:
            width = np.full(len(codes), FLOAT_BITS if tensor.floats else 0)
            for g, operand in tensor.uses:
                width = np.maximum(width, bits[operand][g][options[:, g]])
            if tensor.result is not None:
                width = np.minimum(width, bits[DATA_OUT][tensor.result][options[:, tensor.result]])
            # Where values have bits of their own, the width is their mean, and the product whole up to its last digits.
            in_memory[tensor.first : tensor.last + 1] += np.ceil(np.round(tensor.values * width, 3) / 8)
        return {"peak_memory": in_memory.max(axis=0)}


@lru_cache(maxsize=8)
def activations(graph: Graph) -> tuple[Activation, ...]:
    """Every activation of a model: when it is in memory, and in whose formats.

    The inputs and the output of a step are in memory together: no step works in place. For a model that cannot be
    traced only the inputs and the output of each module are known, not what waits for a later module (a residual).
    """
    groups = {site.name: g for g, site in enumerate(graph.sites)}
    nodes = {n.name: n for n in graph.nodes}
    if graph.fx_graph is None:
        return tuple(_untraced(graph, groups))
    order = [n for n in graph.fx_graph.nodes if n.op != "get_attr"]
    step = {n: i for i, n in enumerate(order)}
    #: Node → the groups that use its output, whether a node uses it in float, and the last step that uses it.
    uses: dict[fx.Node, tuple[set[tuple[int, Operand]], bool, int]] = {}
    for node in reversed(order):
        users, floats, last = set[tuple[int, Operand]](), False, step[node]
        for user in node.users:
            last = max(last, step[user])
            if user.name in groups:
                users |= {(groups[user.name], operand) for operand in _taken_as(node, user, graph)}
            elif _is_view(user, graph):
                users |= uses[user][0]
                floats, last = floats or uses[user][1], max(last, uses[user][2])
            else:
                floats = True
        uses[node] = (users, floats, last)
    tensors = []
    for node in order:
        info = nodes.get(node.name)
        if node.op == "output" or _is_view(node, graph):
            continue
        shape = graph.sample_shape if node.op == "placeholder" else info.output if info else ()
        users, floats, last = uses[node]
        values, result = math.prod(shape), groups.get(node.name)
        tensors.append(Activation(node.name, values, tuple(sorted(users)), floats, result, step[node], last))
    return tuple(tensors)


def _taken_as(node: fx.Node, user: fx.Node, graph: Graph) -> set[Operand]:
    """As which inputs a site takes a node's output."""
    operation = of_node(user, graph.model)
    if operation is None:
        return {"data_in"}
    shared = {operand.name for operand in operation.operands if operand.format_of}
    taken = nodes_of_operands(user, operation)
    found = {o if o in shared else "data_in" for o, nodes in taken.items() if node in nodes}
    return found or {"data_in"}


def _is_view(node: fx.Node, graph: Graph) -> bool:
    """Whether a node's output is its input in another shape, so that it needs no memory."""
    operation = of_node(node, graph.model)
    return operation is not None and operation.view


def _untraced(graph: Graph, groups: Mapping[str, int]) -> list[Activation]:
    tensors = []
    for step, node in enumerate(graph.nodes):
        users = ((groups[node.name], node.operands[0]),) if isinstance(node, Site) else ()
        values, result = math.prod(node.output), groups.get(node.name)
        for k, shape in enumerate(node.inputs):
            tensors.append(Activation(f"{node.name}.{k}", math.prod(shape), users, not users, None, step, step))
        tensors.append(Activation(node.name, values, (), True, result, step, step))
    return tensors
