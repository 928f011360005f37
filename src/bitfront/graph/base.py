"""A captured model: an immutable list of nodes in execution order, some of which are sites.

A node is one computing step; a site is a node that can be configured. Names are those of FX nodes
(``seq_blocks_2``). Users may also write the module path (``seq_blocks.2``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from torch import fx, nn

from bitfront.formats.base import Operand
from bitfront.kernels.losses import Outputs
from bitfront.operations import OPERATIONS
from bitfront.operations.base import DATA_OUT, Chosen, OperandSpec, Operation, Products, Shape, result_of


@dataclass(frozen=True)
class Node:
    """One computing step of a model.

    Attributes:
        name: the FX node's name; unique.
        path: the module's path. Empty for a function; where the model was not traced and the function is no site, the
            path of the module that called it.
        op: the operation, in lower case: ``linear``, ``conv2d``, ``relu``, ``batch_norm``, ``flatten`` ...
        type: the module's class or the function's name, for tables.
        inputs: shapes of the input tensors, per sample (without the batch dimension); without parameters and buffers.
        output: shape of the output tensor, per sample.
        operations: operations per sample (a multiply-accumulate counts once); None where no rule covers the type.
        macs: the multiply-accumulates among them.
        parameters: names of the model's parameters that this node uses, e.g. ``("fc.weight", "fc.bias")``.
        if_named: the site that it is where something names it; None if it cannot be one, or is one.
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
    if_named: Site | None = None

    @property
    def title(self) -> str:
        """Name and type, for messages."""
        return f"{self.name} ({self.type})"


@dataclass(frozen=True)
class WeightProducts:
    """The multiply-accumulates of a site with one of its weights.

    Attributes:
        weight: the operand; in an attention also what takes the place of a weight, such as the keys.
        data: the operand that it is multiplied with; empty for values that always are in float.
        macs: the multiply-accumulates per sample.
        shape: of the weight; () for a value that is computed on the way.
        fan_in: the number of products in the sum of one output value; where values differ in it, as in a transposed
            convolution, their mean, rounded down.
    """

    weight: Operand
    data: Operand
    macs: int
    shape: Shape
    fan_in: int


@dataclass(frozen=True)
class Site(Node):
    """A node that can be configured.

    Attributes:
        specs: the operands that can have a format, in the order in which options are enumerated; the result, which can
            have one too, is not among them (``operand``).
        operand_parameters: (operand, name of the model's parameter), for the operands that are parameters.
        shapes: (operand, shape) of the weights, biases and states, whether they are parameters or computed.
        computed_from: names of the parameters that the weight is computed from, where it is computed and does not
            depend on the model's input. Such a weight is stored, like one that is a parameter.
        flowing: the operands that depend on the samples, and have these along their first dimension: inputs, and the
            second factor of a product of two activations.
        caller: of a function in a model that is not traced, the path of the module that calls it.
        earlier_calls: how many calls of the same operation this module does before it.
        counted: the multiply-accumulates by the operands that are multiplied, per sample, where the record says them;
            empty: ``products`` follow from the weights.
    """

    specs: tuple[OperandSpec, ...] = ()
    operand_parameters: tuple[tuple[Operand, str], ...] = ()
    shapes: tuple[tuple[Operand, Shape], ...] = ()
    computed_from: tuple[str, ...] = ()
    flowing: tuple[Operand, ...] = ()
    caller: str = ""
    earlier_calls: int = 0
    counted: tuple[Products, ...] = ()

    @property
    def operation(self) -> Operation:
        """The record of the site's operation."""
        return OPERATIONS.get(self.op)

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Names of the operands that can have a format, without the result."""
        return tuple(spec.name for spec in self.specs)

    def has(self, name: Operand) -> bool:
        """Whether `name` is that of one operand, or of the result; names of several operands are not."""
        return name == DATA_OUT or name in self.operands

    def operand(self, name: Operand) -> OperandSpec:
        """The operand of that name; for a name of several operands the record's entry, or, if it has none, the first of
        these operands; for ``data_out`` the result. Raises KeyError."""
        if name == DATA_OUT:
            return result_of(self.specs)
        exact = next((spec for spec in self.specs if spec.name == name), None)
        if exact is None and name not in self.operation.formatted:
            exact = next((spec for spec in self.specs if name in spec.names), None)
        return exact or self.operation.operand(name)

    def for_operands(self, formats: Mapping[Operand, Chosen]) -> dict[Operand, Chosen]:
        """`formats` with the entry of a name of several operands (``weight``, for all weights of an LSTM) given to each
        of these operands that has no more exact entry."""
        groups = {name: form for name, form in formats.items() if not self.has(name)}
        shared = {spec.name: spec.chosen(groups) for spec in self.specs if spec.name not in formats} if groups else {}
        named = {name: form for name, form in formats.items() if name not in groups}
        return named | {name: form for name, form in shared.items() if form is not None}

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
    def stored_weights(self) -> int:
        """How many weights the site has: values of a parameter, or computed from parameters; not those of an input."""
        held, shapes = dict(self.operand_parameters), dict(self.shapes)
        weights = [s.name for s in self.specs if s.role == "weight" and (s.name in held or self.computed_from)]
        return sum(math.prod(shapes[name]) for name in weights)

    @property
    def products(self) -> tuple[WeightProducts, ...]:
        """The products of a site with multiply-accumulates, empty for other sites: those that its record counts. If it
        names none, one per weight, with its share of the site's: every value of a weight is multiplied equally often.
        """
        if not self.macs:
            return ()
        shapes = dict(self.shapes)
        if self.counted:
            return tuple(
                WeightProducts(p.right, p.left, p.macs, shapes.get(p.right, ()), max(1, p.terms)) for p in self.counted
            )
        specs = [spec for spec in self.specs if spec.role == "weight"]
        sizes = [math.prod(shapes[spec.name]) for spec in specs]
        products = []
        for spec, size in zip(specs, sizes, strict=True):
            macs, shape = self.macs * size // sum(sizes), shapes[spec.name]
            # The shape of another weight does not say which dimensions are summed over.
            rows = self.operation.call is not None and spec.channel_axis == 0
            fan_in = math.prod(shape[1:]) if rows else max(1, self.macs // math.prod(self.output))
            products.append(WeightProducts(spec.name, spec.multiplies, macs, shape, fan_in))
        return tuple(products)

    @property
    def negative_inputs_matter(self) -> bool:
        """Whether negative inputs change the output; false for a ReLU."""
        return not self.operation.rectifies

    @property
    def unnamed(self) -> Node:
        """The node that it is where nothing names it: itself, unless its operation is a site only where it is named."""
        if self.operation.by_default:
            return self
        return Node(**{f.name: getattr(self, f.name) for f in fields(Node)} | {"if_named": self})

    def flows(self, operand: Operand) -> bool:
        """Whether `operand` depends on the samples, rather than being the same for all of them."""
        return bool(self.flowing) if operand == DATA_OUT else operand in self.flowing

    def parameter(self, operand: Operand) -> tuple[str, Shape] | None:
        """(name, shape) of the parameter that is `operand`; None where the operand is computed."""
        name = dict(self.operand_parameters).get(operand)
        return None if name is None else (name, dict(self.shapes)[operand])


@dataclass(frozen=True)
class LeftOut:
    """A layer that stays in float, though layers of its class are sites: it computes something beside its class.

    Attributes:
        path: of the module.
        type: its class.
        why: what it does beside, in words.
        weights: how many weights it has, 32 bits each.
        macs: its multiply-accumulates per sample.
    """

    path: str
    type: str
    why: str
    weights: int
    macs: int


@dataclass(frozen=True)
class Switch:
    """An argument of a node that is another one in training, such as ``training`` of a functional dropout.

    Attributes:
        node: the node's name.
        argument: its place among the arguments, or its keyword.
        in_training, in_evaluation: its values.
    """

    node: str
    argument: int | str
    in_training: Any
    in_evaluation: Any


@dataclass(frozen=True, eq=False)
class Graph:
    """A captured model. Immutable.

    Attributes:
        model: a private copy of the model, in evaluation mode; the user's model may change later.
        fx_graph: the traced graph; None where tracing failed.
        nodes: every computing step, in execution order.
        sample_shape: shape of one input sample.
        untraced: why and where tracing failed ("file.py:12: if x.sum() > 0"); empty if it succeeded. Without a traced
            graph only modules, and the products that they call as functions, are sites, and every candidate is
            evaluated as a whole model.
        switches: what is otherwise in training, as arguments of nodes; ``fx_graph`` has those of evaluation.
        not_in_training: what is otherwise in training beside, in a graph that was captured for training; functions are
            then no sites, so that whatever is trained is a model of the user's own class. Empty if nothing is.
        baked: weights that are computed from other parameters in the user's model, and parameters in this one.
        left_out: layers that stay in float because they compute something beside their class.
        outputs: what the model's outputs are; the loss of every candidate, and of its training, follows from it.
        ending: the operation at the end that says so, for messages; empty for logits.
        unfused: whether the user's model gives other bits, because torch's encoder layers take a fused kernel there. In
            this one they call their layers, to which formats apply.
    """

    model: nn.Module
    fx_graph: fx.Graph | None
    nodes: tuple[Node, ...]
    sample_shape: Shape
    untraced: str = ""
    switches: tuple[Switch, ...] = ()
    not_in_training: str = ""
    baked: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    outputs: Outputs = "logits"
    ending: str = ""
    unfused: bool = False

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The nodes that can be configured, in execution order."""
        return tuple(n for n in self.nodes if isinstance(n, Site))

    @cached_property
    def nameable(self) -> tuple[Site, ...]:
        """The nodes that are no sites because nothing names them, each as the site that it would be."""
        return tuple(n.if_named for n in self.nodes if n.if_named is not None)

    def naming(self, names: Collection[str]) -> Graph:
        """The same graph, where the nodes of these names are sites too, if they can be. Itself where they are already.

        Args:
            names: FX names; others than those of ``nameable`` are ignored.
        """
        if not any(site.name in names for site in self.nameable):
            return self
        nodes = tuple(n.if_named if n.if_named is not None and n.name in names else n for n in self.nodes)
        return replace(self, nodes=nodes)

    def naming_only(self, names: Collection[str]) -> Graph:
        """The same graph, where of the nodes that are sites only if they are named, exactly these are."""
        unwanted = {s.name for s in self.sites if s.unnamed is not s and s.name not in names}
        if not unwanted:
            return self.naming(names)
        nodes = tuple(n.unnamed if isinstance(n, Site) and n.name in unwanted else n for n in self.nodes)
        return replace(self, nodes=nodes).naming(names)

    @cached_property
    def _calls(self) -> Counter[str]:
        return Counter(site.path for site in (*self.sites, *self.nameable))

    def is_rewritten_for(self, site: Site) -> bool:
        """Whether formats of a site need a rewritten graph: it is a function, or one of several calls of a module."""
        return not site.path or self._calls[site.path] > 1

    @cached_property
    def read_by_code(self) -> frozenset[str]:
        """Names of the parameters that something beside their modules reads: the model's code, or a function's site."""
        if self.fx_graph is None:
            # A function has the path of its caller, unless it is a site.
            functions = [n for n in self.nodes if type(self.model.get_submodule(n.path)).__name__ != n.type]
            targets = {name for node in functions for name in node.parameters}
        else:
            targets = {str(node.target) for node in self.fx_graph.nodes if node.op == "get_attr"}
        named = dict(self.model.named_parameters(remove_duplicate=False))
        read = {id(named[target]) for target in targets if target in named}
        return frozenset(name for name, parameter in named.items() if id(parameter) in read)

    @cached_property
    def uncounted(self) -> tuple[Node, ...]:
        """Nodes whose operations are not counted, because no rule covers their type."""
        return tuple(n for n in self.nodes if n.operations is None)

    def site(self, name: str) -> Site:
        """The site with that FX name or module path, whether it is named already or could be.

        Raises:
            KeyError: there is none.
        """
        sites = (*self.sites, *self.nameable)
        matches = [s for s in sites if s.name == name] or [s for s in sites if s.path == name]
        if not matches:
            raise KeyError(name)
        return matches[0]
