"""Runs a captured model on a sample, node by node, so that another form of it can be written meanwhile.

Everything that is not a tensor (a size, a list of dimensions) is known while the graph runs. The rules of operations
ask the walker for settings, parameters and formats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from bitfront.errors import ExportError
from bitfront.formats.base import Format, Operand
from bitfront.graph import Graph, Site
from bitfront.graph.capture import parameter
from bitfront.operations.base import OperandSpec, Operation
from bitfront.operations.lookup import of_node, unusual

SiteFormats = Mapping[Operand, Format]
#: Number of samples in the run. It is unlikely to be a size in the model.
BATCH = 3


class Walker(fx.Interpreter):
    """Runs the graph; each node is offered to ``visit``.

    Args:
        graph: the captured model; on the CPU.
        formats: site name → formats by operand, calibrated; sites that are absent stay in float.
        written: what is done with the graph, for messages: ``written as ONNX``.
        missing: what is said of a node whose record has no rule: ``has no counterpart in ONNX here``.

    Raises:
        ExportError: the model could not be traced.
    """

    def __init__(self, graph: Graph, formats: Mapping[str, SiteFormats], written: str, missing: str) -> None:
        if graph.fx_graph is None:
            raise ExportError(
                f"the model cannot be traced, so it cannot be {written}: {graph.untraced}; write this line without a "
                "decision about values of the input, or leave every layer in float for the target onnx"
            )
        super().__init__(fx.GraphModule(graph.model, graph.fx_graph))
        self.extra_traceback = False  # it would add the tracer's state to messages
        self.captured, self.formats = graph, formats
        self.as_what, self.missing = written, missing
        self.sites = {s.name: s for s in graph.sites}
        #: The operands of the current node whose formats its rule has used.
        self.written: set[str] = set()
        self.out, self.batch = torch.empty(0), BATCH

    def walk(self) -> None:
        """Run the graph on a sample of zeros."""
        with torch.no_grad():
            self.run(torch.zeros(BATCH, *self.captured.sample_shape))

    def visit(self, n: fx.Node, value: Any) -> None:
        """Called for each node, with its value on the sample."""
        raise NotImplementedError

    def run_node(self, n: fx.Node) -> Any:
        """As of ``fx.Interpreter``. Raises ExportError for a node that changes a tensor that others read."""
        versions = {m: t._version for m, t in self.env.items() if isinstance(t, Tensor)}
        value = super().run_node(n)
        read_later = versions.keys() - self.user_to_last_uses.get(n, [])
        if any(self.env[m]._version != versions[m] for m in read_later):
            raise ExportError(f"{n.name} ({self.kind(n)}) changes a tensor in place that others read")
        if isinstance(value, Tensor):
            self.out = value
        self.written = set()
        self.visit(n, value)
        return value

    def refuse(self, n: fx.Node, why: str) -> ExportError:
        """The error that names a node."""
        return ExportError(f"{n.name} ({self.kind(n)}): {why}")

    def without_rule(self, n: fx.Node) -> ExportError:
        """The error for a node whose record has no rule."""
        module = self.module_of(n)
        why = unusual(module) if module is not None else ""
        return ExportError(f"{n.name} ({self.kind(n)}) {self.missing}{why and f': {why}'}")

    def check_all_written(self, n: fx.Node) -> None:
        """Raises ExportError if the rule of a node has left a format out."""
        forgotten = self.formats.get(n.name, {}).keys() - self.written
        if forgotten:
            raise self.refuse(n, f"the format of {min(forgotten)} cannot be {self.as_what} here")

    def operation(self, n: fx.Node) -> Operation | None:
        """The record of a node; None if it has none."""
        return of_node(n, self.captured.model)

    def kind(self, n: fx.Node) -> str:
        """The class of the module, or the name of the function, that a node calls."""
        module = self.module_of(n)
        return type(module).__name__ if module is not None else str(getattr(n.target, "__name__", n.target))

    def module_of(self, n: fx.Node) -> nn.Module | None:
        """The module that a node calls; None for a function or method."""
        module: nn.Module | None = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        return module

    def arguments(self, n: fx.Node) -> tuple[Any, ...]:
        """The values of the positional arguments."""
        return self.fetch_args_kwargs_from_env(n)[0]

    def setting(self, n: fx.Node, position: int, name: str, default: Any = None) -> Any:
        """A setting of a module, or the argument of that place or name."""
        module = self.module_of(n)
        if module is not None:
            return getattr(module, name, default)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return args[position] if position < len(args) else kwargs.get(name, default)

    def argument(self, n: fx.Node, position: int, name: str) -> Any:
        """An argument as it stands in the graph: a node, or a value."""
        return n.args[position] if position < len(n.args) else n.kwargs.get(name)

    def sample(self, n: fx.Node, position: int, name: str) -> Any:
        """The value of an argument of a call on the sample, also of one of a module; None if it is left out."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return args[position] if position < len(args) else kwargs.get(name)

    def source(self, n: fx.Node) -> Tensor:
        """The value of the first input of a node on the sample."""
        value: Tensor = self.env[n.all_input_nodes[0]]
        return value

    def tensors(self, n: fx.Node) -> list[Tensor]:
        """The values of all inputs of a node on the sample."""
        return [self.env[source] for source in n.all_input_nodes]

    def operand_at(self, n: fx.Node, position: int) -> str:
        """The name of the operand at a position; "" if there is none."""
        operation = self.operation(n)
        operands = () if operation is None else operation.operands
        return next((o.name for o in operands if o.position == position), "")

    def operand_named(self, n: fx.Node, name: str) -> OperandSpec:
        """The operand of that name. Raises ExportError if the node has none."""
        operation = self.operation(n)
        operands = () if operation is None else operation.operands_in(self.module_of(n))
        spec = next((o for o in operands if o.name == name), None)
        if spec is None:
            raise self.without_rule(n)
        return spec

    def format_of(self, n: fx.Node, operand: str) -> Format | None:
        """The format of an operand, which counts as written now; None in float."""
        self.written.add(operand)
        return self.formats.get(n.name, {}).get(operand)

    def site(self, n: fx.Node) -> Site:
        """The site that a node is. Raises ExportError."""
        if n.name not in self.sites:
            raise self.without_rule(n)
        return self.sites[n.name]

    def weight(self, n: fx.Node) -> Tensor:
        """The weight of a site, not rounded. Raises ExportError if it is computed."""
        site = self.site(n)
        if not site.weight:
            raise ExportError(f"{n.name} ({site.type}): its weight is computed, not a parameter")
        return parameter(self.captured.model, site.weight)

    def places(self, n: fx.Node, shape: tuple[int, ...]) -> tuple[list[NDArray[np.int64]], bool]:
        """(for each tensor that a node gives, which value of its first input comes where; whether it gives several).

        The node is run on the numbers of places in place of its input, so it must be one that moves values and computes
        nothing. −1 is a 0 that the node adds.

        Args:
            n: the node.
            shape: of a sample of its first input.

        Raises:
            ExportError: it moves values from one sample to another.
        """
        size = math.prod(shape)
        marks = torch.arange(1, BATCH * size + 1, dtype=torch.float64).reshape(BATCH, *shape)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        result = getattr(self, n.op)(n.target, (marks, *args[1:]), kwargs)
        several = isinstance(result, (tuple, list))
        found = []
        for part in result if several else (result,):
            all_places = part.numpy().astype(np.int64) - 1
            first = all_places[0] if len(all_places) == BATCH else all_places
            expected = np.where(first < 0, -1, first + size)
            if len(all_places) != BATCH or (first >= size).any() or (all_places[1] != expected).any():
                raise self.refuse(n, "it moves values from one sample to another")
            found.append(first)
        return found, several

    def held_bias(self, n: fx.Node) -> Tensor | None:
        """The bias of a site, not rounded; None if there is none. Raises ExportError if it is computed."""
        tensor: Tensor | None = self.setting(n, 2, "bias")
        if tensor is None:
            return None
        site = self.site(n)
        if site.path == "" and site.bias is None:
            raise ExportError(f"{n.name} ({site.type}): its bias is computed, not a parameter")
        return tensor.detach()
