"""A captured model: an immutable list of nodes in execution order, some of which are sites.

A node is one computing step; a site is a node that can be configured. Names are those of FX nodes
(``seq_blocks_2``). Users may also write the module path (``seq_blocks.2``).
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
    """One computing step of a model.

    Attributes:
        name: the FX node's name; unique.
        path: the module's path. Empty for a function; where the model was not traced, the path of the module that
            called the function.
        op: the operation, in lower case: ``linear``, ``conv2d``, ``relu``, ``batch_norm``, ``flatten`` ...
        type: the module's class or the function's name, for tables.
        inputs: shapes of the input tensors, per sample (without the batch dimension); without parameters and buffers.
        output: shape of the output tensor, per sample.
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
        operands: names of the operands that can have a format, in the order in which options are enumerated.
        operand_parameters: (operand, name of the model's parameter), for the operands that are parameters.
        shapes: (operand, shape) of the weights, biases and states, whether they are parameters or computed.
    """

    operands: tuple[Operand, ...] = ()
    operand_parameters: tuple[tuple[Operand, str], ...] = ()
    shapes: tuple[tuple[Operand, Shape], ...] = ()

    @property
    def operation(self) -> Operation:
        """The record of the site's operation."""
        return OPERATIONS.get(self.op)

    @property
    def weight(self) -> str | None:
        """Name of the parameter that is the weight; None where the weight is computed, or where there is none."""
        return dict(self.operand_parameters).get("weight")

    @property
    def bias(self) -> str | None:
        """Name of the parameter that is the bias; None where there is none."""
        return dict(self.operand_parameters).get("bias")

    @property
    def weight_shape(self) -> Shape:
        """Shape of the weight, computed or not; () where there is none."""
        return dict(self.shapes).get("weight", ())

    @property
    def negative_inputs_matter(self) -> bool:
        """Whether negative inputs change the output; false for a ReLU."""
        return not self.operation.rectifies

    def parameter(self, operand: Operand) -> tuple[str, Shape] | None:
        """(name, shape) of the parameter that is `operand`; None where the operand is computed."""
        name = dict(self.operand_parameters).get(operand)
        return None if name is None else (name, dict(self.shapes)[operand])


@dataclass(frozen=True, eq=False)
class Graph:
    """A captured model. Immutable.

    Attributes:
        model: a private copy of the model, in evaluation mode; the user's model may change later.
        fx_graph: the traced graph; None where tracing failed.
        nodes: every computing step, in execution order.
        sample_shape: shape of one input sample.
        untraced: why and where tracing failed ("file.py:12: if x.sum() > 0"); empty if it succeeded. Without a traced
            graph only modules are sites, and every candidate is evaluated as a whole model.
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
        """Nodes whose operations are not counted, because no rule covers their type."""
        return tuple(n for n in self.nodes if n.operations is None)

    def site(self, name: str) -> Site:
        """The site with that FX name or module path.

        Raises:
            KeyError: there is none.
        """
        matches = [s for s in self.sites if s.name == name] or [s for s in self.sites if s.path == name]
        if not matches:
            raise KeyError(name)
        return matches[0]
