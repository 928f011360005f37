"""What a captured model is: an immutable list of nodes in execution order, some of which are sites.

A node is anything that computes; a site is a node that can be configured. Names are those of FX nodes
(``seq_blocks_2``); the module path (``seq_blocks.2``) is accepted wherever a user names one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import fx, nn

from bitfront.formats.base import Operand
from bitfront.operations import OPERATIONS
from bitfront.operations.base import Operation, Shape


@dataclass(frozen=True)
class Node:
    """One step of the model.

    Attributes:
        name: the FX node's name; unique.
        path: the module's path; for a function empty, or, where the model was not traced, the path of the module it
            was called in.
        op: what it is, in lower case: ``linear``, ``conv2d``, ``relu``, ``batch_norm``, ``flatten`` ...
        type: the module's class or the function's name, for tables.
        inputs: shapes of the tensors that flow in, per sample (without the batch dimension); parameters and buffers
            do not flow.
        output: shape of the tensor that flows out, per sample.
        operations: operations per sample (a multiply-accumulate counts once); None where no rule covers the type.
        macs: the multiply-accumulates among them.
        parameters: names of the model's parameters that this node uses, e.g. ``("fc.weight", "fc.bias")``.
    """

    name: str
    path: str
    op: str
    type: str
    inputs: tuple[Shape, ...]
    output: Shape
    operations: int | None
    macs: int
    parameters: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Name and type, for messages."""
        return f"{self.name} ({self.type})"


@dataclass(frozen=True)
class Site(Node):
    """A node that can be configured.

    Attributes:
        operands: names of what can have a format, in the order in which options are enumerated.
        held: (operand, name of the model's parameter behind it), for the operands that are parameters.
        shapes: (operand, shape) of the weights, biases and states, be they parameters or computed.
    """

    operands: tuple[Operand, ...] = ()
    held: tuple[tuple[Operand, str], ...] = ()
    shapes: tuple[tuple[Operand, Shape], ...] = ()

    @property
    def operation(self) -> Operation:
        """The record of its operation."""
        return OPERATIONS.get(self.op)

    @property
    def weight(self) -> str | None:
        """Name of the parameter that is its weight; None where it is computed, or where there is none."""
        return dict(self.held).get("weight")

    @property
    def bias(self) -> str | None:
        """Name of the parameter that is its bias."""
        return dict(self.held).get("bias")

    @property
    def weight_shape(self) -> Shape:
        """Shape of its weight, computed or not; () where there is none."""
        return dict(self.shapes).get("weight", ())

    @property
    def negative_inputs_matter(self) -> bool:
        """False for a ReLU: whatever is negative in its input is cut off anyway."""
        return not self.operation.rectifies

    def parameter(self, operand: Operand) -> tuple[str, Shape] | None:
        """(name, shape) of the parameter behind `operand`, None where it is an activation."""
        name = dict(self.held).get(operand)
        return None if name is None else (name, dict(self.shapes)[operand])


@dataclass(frozen=True, eq=False)
class Graph:
    """A captured model. Nothing in it is ever changed.

    Attributes:
        model: the model in evaluation mode: a private copy, so that the user's may change.
        fx_graph: the traced graph, None where tracing failed.
        nodes: every computing step, in execution order.
        sample_shape: shape of one input sample.
        untraced: why and where tracing failed ("file.py:12: if x.sum() > 0"), empty if it did not. Sites are then
            modules alone, and candidates are evaluated whole.
    """

    model: nn.Module
    fx_graph: fx.Graph | None
    nodes: tuple[Node, ...]
    sample_shape: Shape
    untraced: str = ""

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The nodes that can be configured, in execution order."""
        return tuple(n for n in self.nodes if isinstance(n, Site))

    @cached_property
    def uncounted(self) -> tuple[Node, ...]:
        """Nodes whose operations no rule counts."""
        return tuple(n for n in self.nodes if n.operations is None)

    def site(self, name: str) -> Site:
        """The site of that FX name or module path. Raises KeyError."""
        found = [s for s in self.sites if s.name == name] or [s for s in self.sites if s.path == name]
        if not found:
            raise KeyError(name)
        return found[0]
