"""The record of an operation, its operands, and a call of it.

``Operation`` is plain data and a few functions. The functions that make an operation fast or exportable take the
caller (the part that writes ONNX, follows channels or reads a training program) as an argument. The methods of the
caller that they may use are a protocol in this folder: ``layout.py``, ``training.py``, ``onnx.py``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor, nn

from bitfront.formats.base import FACTOR, OperandKind
from bitfront.kernels.losses import Outputs
from bitfront.operations import DATA_OUT as DATA_OUT
from bitfront.operations import OPERATIONS
from bitfront.operations.integers import Lower
from bitfront.operations.layout import ChannelRule
from bitfront.operations.onnx import IntegerObstacle, WriteSeveral
from bitfront.operations.training import TrainRule

Shape = tuple[int, ...]
Role = Literal["activation", "weight", "bias", "inner", "result"]
Chosen = TypeVar("Chosen")


@dataclass(frozen=True)
class OperandSpec:
    """A tensor that an operation takes and that can have a format.

    Attributes:
        name: prefix of its keys in the TOML: ``weight`` in ``weight_width``. A record whose operands depend on the
            module (``Operation.operands_of``) has names of several operands beside: ``weight`` for all weights of an
            LSTM.
        role: an activation (an argument), a weight or a bias, or ``inner``: a value that the operation computes on its
            way, such as the state of a recurrence or the scores of an attention. Records never name the ``result``
            (``result_of``): every operation with operands has one.
        position: its place among the arguments of the operation's functions, and of a module's ``forward`` if it is an
            activation.
        argument: its keyword there.
        channel_axis: the dimension along which a format per channel has its scales, the output channels of a weight;
            negative: counted from the end; None: the operand has no channels.
        summed_axis: the dimension along which the operation sums products, the input channels of a weight; likewise
            negative. None: of a weight whose channels are not dimension 0, the one before them; otherwise as each
            format says.
        format_of: whose choice it shares unless it has keys of its own, as the second input of an addition does: that
            of the first of these names that has keys. They need not be operands of the operation: the inputs of
            ``scaled_dot_product_attention`` have the keys of ``data_in``. What its format learns, it learns from its
            own values.
        sample_axis: for an activation: the dimension that holds the samples.
        multiplies: for a weight: the operand that it is multiplied with; empty for one that always is in float. Not
            asked where the record's count names the operands (``Count.products``).
        parameter: the parameter that it is, as a path below the module (``out_proj.weight``), where its name is
            another one.
        several: whether the argument is a list of tensors, as in a concatenation. All of them get one format, which
            learns from all of them.
    """

    name: str
    role: Role = "activation"
    position: int = 0
    argument: str = "input"
    channel_axis: int | None = None
    summed_axis: int | None = None
    format_of: tuple[str, ...] = ()
    sample_axis: int = 0
    multiplies: str = "data_in"
    parameter: str = ""
    several: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names under which a file can have keys for it, the exact one first."""
        return (self.name, *self.format_of)

    def chosen(self, choices: Mapping[str, Chosen]) -> Chosen | None:
        """What `choices`, by name, have for it: under the first of its names that they have."""
        return next((choices[name] for name in self.names if name in choices), None)

    def taken_from(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a call gives as it; None where it is left out."""
        return args[self.position] if self.position < len(args) else kwargs.get(self.argument)

    def put_into(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> None:
        """Let a call that gives something as it give `value`."""
        if self.position < len(args):
            args[self.position] = value
        elif self.argument in kwargs:
            kwargs[self.argument] = value

    @property
    def held_as(self) -> str:
        """The path of the parameter below the module, of an operand that is a weight or a bias."""
        return self.parameter or self.name

    def held_by(self, module: nn.Module) -> Tensor | None:
        """The tensor that it is in a module; None where the module has none, or the operand is no parameter."""
        if self.role not in ("weight", "bias"):
            return None
        *path, name = self.held_as.split(".")
        holder: nn.Module | None = module
        for part in path:
            holder = None if holder is None else holder._modules.get(part)
        if holder is None:
            return None
        # A tracer sees whatever is looked up as an attribute.
        held = holder._parameters[name] if name in holder._parameters else getattr(holder, name, None)
        return held if isinstance(held, Tensor) else None

    def kind(self, *, from_samples: bool = False) -> OperandKind:
        """What its formats must know of it.

        Args:
            from_samples: whether a weight or a bias is no parameter but computed from the samples, as the second factor
                of a product of activations is. Then its dimensions are those of an activation.
        """
        if self.role == "weight" or self.role == "bias":
            if from_samples:
                return OperandKind(self.role, True, FACTOR.channel_axis)
            return OperandKind(self.role, False, self.channel_axis, self.summed_axis)
        return OperandKind("activation", True, self.channel_axis, self.summed_axis)


DATA_IN = OperandSpec("data_in", "activation", 0, "input", channel_axis=1)


def result_of(operands: Iterable[OperandSpec]) -> OperandSpec:
    """The result of an operation with these operands, as an operand: its axes are those of its first input."""
    first = next((operand for operand in operands if operand.role == "activation"), DATA_IN)
    return OperandSpec(DATA_OUT, "result", channel_axis=first.channel_axis, sample_axis=first.sample_axis)


@dataclass(frozen=True)
class Products:
    """Multiply-accumulates between values of the same two operands.

    Attributes:
        macs: how many.
        left, right: names of the operands.
        terms: how many products one sum has.
    """

    macs: int
    left: str
    right: str
    terms: int


@dataclass(frozen=True)
class Count:
    """Operations, and the multiply-accumulates among them, each of which counts once.

    Attributes:
        products: the multiply-accumulates by operands; empty: all are between data_in and weight.
    """

    operations: int
    macs: int = 0
    products: tuple[Products, ...] = ()


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module, function or method, on a whole batch.

    Attributes:
        op: the name of the operation; without a record, the name of the function.
        tensors: shapes of the tensors among the arguments, in order, parameters included.
        output: shape of the result; of the first tensor if there are several.
        args, kwargs: the arguments; those of a module's ``forward``.
        module: the module, None for a function or method.
    """

    op: str
    tensors: tuple[Shape, ...]
    output: Shape
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    module: nn.Module | None = None

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """A setting by name: the module's attribute, or the function's argument."""
        if self.module is not None:
            return getattr(self.module, name, default)
        return self.args[position] if position < len(self.args) else (self.kwargs or {}).get(name, default)

    def shape(self, position: int, name: str) -> Shape:
        """The shape of a tensor argument, or of a parameter of the module."""
        return tuple(self.argument(position, name).shape)

    @property
    def n(self) -> int:
        """Elements of the first tensor."""
        return math.prod(self.tensors[0]) if self.tensors else 0

    @property
    def out(self) -> int:
        """Elements of the output."""
        return math.prod(self.output)


class Rounds(Protocol):
    """Rounds an operand: a format, a learned range or an observer."""

    def quantize(self, x: Tensor) -> Tensor:
        """`x` as the operation gets it."""
        ...


@dataclass(frozen=True, eq=False)
class Operands:
    """The operands of one call of a module.

    Attributes:
        values: activations and parameters by name, rounded already; None for a parameter that the module lacks.
        rounds: what rounds the inner operands, by name; a missing one stays in float.
        args, kwargs: the arguments of the module's ``forward``, activations rounded; for what is no operand, such as a
            mask.
    """

    values: Mapping[str, Tensor | None]
    rounds: Mapping[str, Rounds] = field(default_factory=dict)
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        value = self.values[name]
        assert value is not None
        return value

    def get(self, name: str) -> Tensor | None:
        """The operand; None if there is none."""
        return self.values.get(name)

    def round(self, name: str, x: Tensor) -> Tensor:
        """`x`, the value of an inner operand, in its format."""
        rounds = self.rounds.get(name)
        return x if rounds is None else rounds.quantize(x)


#: (the module, or None for a function; x; weight; both float32) → the result without its bias, float32. Each sum of
#: products is taken in float64, in the order in which the weight lies in memory, and rounded once. None where the
#: arguments do not say enough.
OrderedSums = Callable[[nn.Module | None, Tensor, Tensor], Tensor | None]


@dataclass(frozen=True)
class Product:
    """That the results of an operation are sums of products of its operands ``data_in`` and ``weight``, plus its bias.
    They are then computed in whole numbers wherever formats allow (``transforms.arithmetic``).

    Attributes:
        ordered: its sums in a fixed order, for operands that are no whole numbers; None: torch's are used.
        channels: the dimension of the weight that holds the output channels.
        output: the dimension of the result that holds them, counted from the end.
        matrix: whether the weight is a matrix (..., inner, channels), one per leading index; otherwise the products of
            a sum are all values of the weight of one channel.
    """

    ordered: OrderedSums | None = None
    channels: int = 0
    output: int = -1
    matrix: bool = False


CountRule = Callable[[Call], Count | None]
#: (module, its operands) → what the module computes with these operands in place of its inputs and parameters; or
#: (function, its operands), which are its arguments.
OperandCall = Callable[[Any, Operands], Any]


MergeKind = Literal[
    "dense", "convolution", "rectifier", "arithmetic", "identity", "flatten", "selection", "norm", "elementwise"
]


@dataclass(frozen=True)
class Merge:
    """How the tree evaluator computes many states of an operation at once. With every kind, each state gets the same
    bits as in a separate call.

    Attributes:
        kind: ``dense`` and ``convolution``: one product for all inputs and all weights, if sums are exact;
            ``rectifier``: max(x, 0), at most `ceiling`, done in the next pass over memory; ``arithmetic``: `function`
            of two tensors of the same shape, element by element; ``identity``: nothing is computed; ``flatten``: all
            features of a sample in a row; ``selection``: picks values of a sample, and commutes with a rectifier;
            ``norm``: a product and a sum per channel, done in the next pass; ``elementwise``: a function of each value,
            in the memory layout that the states have.
        function: for ``arithmetic``.
        ceiling: for ``rectifier``.
        rest_differs: for ``elementwise``: whether torch computes the values behind the last full vector of a tensor by
            other instructions, which give other last bits, as it does with exponentials.
    """

    kind: MergeKind
    function: Callable[..., Tensor] | None = None
    ceiling: float = math.inf
    rest_differs: bool = False


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation, or several that all parts treat alike.

    Attributes:
        name: unique; the key for its sites in the TOML with ``by = "type"``.
        summary: one line, for lists and docs.
        modules: classes of modules that are this operation. A subclass with another ``forward`` is not.
        module_names: full names of more such classes, in packages that are not imported for it:
            ``package.module.Class``.
        functions: function objects that are this operation and cannot be recognised by name.
        names: names of torch's functions and of tensor methods that are this operation, without the underscores of
            operators and in-place forms.
        operands: the tensors that can have a format, in the order in which options are enumerated; empty: it is no
            site.
        by_default: whether the key ``default`` of a file gives its sites formats. If not, they are sites only where a
            key names them, and nodes like any other elsewhere.
        refuses: why a call that it matches is no site, whatever the formats, in words; empty if it is one. Of a module
            it gets the settings alone, of a function the arguments; None: every call is one.
        operands_of: for modules that have other numbers of operands (layers and directions of an LSTM): the operands of
            a module, in the same order. `operands` are then the names under which files have keys for them.
        count: operations of a call on the whole batch; None: not counted.
        call: how one of its modules is called with other operands; needed if it has operands and modules, or inner
            operands. For a function, it is called where an inner operand has a format.
        product: that its results are sums of products; None: they are not.
        view: whether it computes no new values, but gives its input another shape.
        gives: what a network that ends in it gives (``kernels.losses``); None: logits, as far as is known.
        rectifies: whether it removes negative values, so that the format of its input needs none.
        merge: how the tree merges it; None: one call per state.
        train: how a population trains it (``operations/training.py``); None: models with it are trained alone.
        onnx: how it is written as ONNX (``operations/onnx.py``); None: torch.onnx writes it, in float.
        integers: how it is computed in whole numbers (``operations/integers.py``); None: there is no integer program.
        onnx_integer: why ONNX's integer operators cannot take its operands in some formats; None: there are no such
            operators for it.
        channels: how channels flow through it (``operations/layout.py``); None: widths around it are fixed.
        kernel: its kernel of bytes (``exporters/integer.py``); None: there is none.
    """

    name: str
    summary: str
    modules: tuple[type[nn.Module], ...] = ()
    module_names: tuple[str, ...] = ()
    functions: tuple[object, ...] = ()
    names: tuple[str, ...] = ()
    operands: tuple[OperandSpec, ...] = ()
    by_default: bool = True
    refuses: Callable[[Call], str] | None = None
    operands_of: Callable[[nn.Module], tuple[OperandSpec, ...]] | None = None
    count: CountRule | None = None
    call: OperandCall | None = None
    product: Product | None = None
    view: bool = False
    rectifies: bool = False
    gives: Outputs | None = None
    merge: Merge | None = None
    train: TrainRule | None = None
    onnx: WriteSeveral | None = None
    integers: Lower | None = None
    onnx_integer: IntegerObstacle | None = None
    channels: ChannelRule | None = None
    kernel: Literal["linear", "convolution", "rectifier"] | None = None

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        """The line in lists."""
        return self.summary

    def operand(self, name: str) -> OperandSpec:
        """The operand of that name. Raises KeyError."""
        for operand in self.operands:
            if operand.name == name:
                return operand
        raise KeyError(name)

    def operands_in(self, module: nn.Module | None) -> tuple[OperandSpec, ...]:
        """The operands of a call of `module`; of a function or method, if None. Whoever wants the operands of a module
        asks here."""
        if module is None or self.operands_of is None:
            return self.operands
        return self.operands_of(module)

    @property
    def formatted(self) -> tuple[str, ...]:
        """Names of the operands."""
        return tuple(o.name for o in self.operands)


def define(name: str, summary: str, **answers: Any) -> Operation:
    """Create the record of an operation and register it.

    Args:
        answers: fields of ``Operation``.

    Raises:
        ValueError: the name is taken.
    """
    return OPERATIONS.register(name, file=sys._getframe(1).f_code.co_filename)(Operation(name, summary, **answers))


def extend(name: str, **answers: Any) -> Operation:
    """Set more fields of an operation that exists, e.g. operands for one that could not be quantized.

    Raises:
        UnknownNameError: there is no such operation.
    """
    return OPERATIONS.replace(name, replace(OPERATIONS.get(name), **answers))


def classes(names: str) -> tuple[type[nn.Module], ...]:
    """Classes of ``torch.nn`` by their names, separated by blanks."""
    return tuple(getattr(nn, name) for name in names.split())


#: Fields of an operation of one tensor that stays in float unless a key names it.
ON_INPUT: Mapping[str, Any] = {"operands": (DATA_IN,), "by_default": False}


# --- counts that families share --------------------------------------------------------------------------------------


def products(macs: int) -> Count:
    """Only multiply-accumulates."""
    return Count(macs, macs)


def per_input(operations: int) -> CountRule:
    """This many operations per input value."""
    return lambda call: Count(operations * call.n)


def per_output(operations: int) -> CountRule:
    """This many operations per output value."""
    return lambda call: Count(operations * call.out)


def free(_: Call) -> Count:
    """Moving data counts nothing."""
    return Count(0)


def weighted(call: Call) -> Count:
    """Every output value is a dot product over all dimensions of the weight but the first; biases are ignored."""
    return products(call.out * math.prod(call.shape(1, "weight")[1:]))
