"""How operations are written as ONNX: the writer that rules use, and parts that several rules share.

A rule (``Operation.onnx``) gets a writer and a node of the traced graph, adds ONNX nodes, and returns the name of the
tensor that holds the result. The model runs on a sample while it is written, so that a rule may look at shapes.
``exporters/onnx.py`` has the writer; no operation is registered here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx, nn

#: ONNX's number for 64-bit integers, such as indices.
INT64 = 7


class Packed(Protocol):
    """A tensor in bytes: a value is (byte − zero) · scale."""

    @property
    def scale(self) -> NDArray[np.float32]:
        """Shape () or (channels,)."""
        ...

    @property
    def zero(self) -> NDArray[np.int64]:
        """The same shape as the scale."""
        ...

    @property
    def signed(self) -> bool:
        """Whether bytes are from −128 to 127; else from 0 to 255."""
        ...

    @property
    def axis(self) -> int | None:
        """The dimension that channels lie along; None if there is one scale for all."""
        ...

    @property
    def symmetric(self) -> bool:
        """Whether the byte 0 is the value 0."""
        ...


@dataclass(frozen=True, eq=False)
class Bytes:
    """A tensor of bytes in the ONNX model.

    Attributes:
        name, scale, zero: names of the tensor, its scale and its zero point in the model.
        held: their values.
    """

    name: str
    scale: str
    zero: str
    held: Packed


class OnnxWriter(Protocol):
    """The writer that rules use. Tensors of the ONNX model are referred to by name."""

    #: The value of the current node on the sample.
    out: Tensor
    #: Number of samples in that run.
    batch: int

    def add(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """A node with one output, called `name` (with a number if that is taken). Returns the output's name."""
        ...

    def add_several(self, op: str, inputs: Sequence[str], names: Sequence[str], **attributes: Any) -> list[str]:
        """A node with an output for each of `names`. Returns the outputs' names."""
        ...

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """A constant array in the model. Returns its name."""
        ...

    def kind(self, n: fx.Node) -> str:
        """The class of the module, or the name of the function, that a node calls."""
        ...

    def module_of(self, n: fx.Node) -> nn.Module | None:
        """The module that a node calls; None for a function or method."""
        ...

    def arguments(self, n: fx.Node) -> tuple[Any, ...]:
        """The values of the positional arguments."""
        ...

    def setting(self, n: fx.Node, position: int, name: str, default: Any = None) -> Any:
        """A setting of a module, or the argument of that place or name."""
        ...

    def argument(self, n: fx.Node, position: int, name: str) -> Any:
        """An argument as it stands in the graph: a node, or a value; None if it is left out."""
        ...

    def sample(self, n: fx.Node, position: int, name: str) -> Any:
        """The value of an argument of a call on the sample, also of one of a module; None if it is left out."""
        ...

    def sample_dims(self, n: fx.Node, position: int = 0, name: str = "input") -> set[int]:
        """The dimensions of a tensor among the arguments that depend on the number of samples."""
        ...

    def flows(self, n: fx.Node, position: int, name: str) -> bool:
        """Whether an argument depends on the samples."""
        ...

    def source(self, n: fx.Node) -> Tensor:
        """The value of the first input of a node on the sample."""
        ...

    def name_of(self, n: fx.Node) -> str:
        """The tensor that a node of the graph computes.

        Raises:
            ExportError: it does not compute one tensor.
        """
        ...

    def tensor(self, n: fx.Node, position: int = 0, name: str = "input") -> str:
        """A tensor or number among the arguments, without its format."""
        ...

    def values(self, n: fx.Node, position: int, name: str) -> list[str]:
        """The tensors of an argument that is a list, each rounded by the format of the operand that it is."""
        ...

    def value(self, n: fx.Node, position: int = 0, name: str = "input") -> str:
        """The same, in the format of the operand. Every rule gets its inputs by this method."""
        ...

    def parameter(self, n: fx.Node, position: int, name: str) -> str | None:
        """A parameter or buffer without a format; None if the module or the call has no such tensor."""
        ...

    def held(self, n: fx.Node, operand: str) -> str | None:
        """A weight or bias of any operation in its format, as float; None if the module or the call has no such tensor.

        Raises:
            ExportError: it depends on the samples, or its format has more than 8 bits.
        """
        ...

    def has_format(self, n: fx.Node, operand: str) -> bool:
        """Whether an operand has a format."""
        ...

    def inner(self, n: fx.Node, operand: str, tensor: str, shape: tuple[int, ...]) -> str:
        """A value that an operation computes on its way, in the format of that operand; itself if it has none."""
        ...

    def moved(self, n: fx.Node) -> list[str]:
        """The tensors that a node gives which moves values of a sample and computes nothing, as a choice of values.

        Raises:
            ExportError: it moves values from one sample to another, or samples do not lie along the first dimension.
        """
        ...

    def integer(self, n: fx.Node) -> bool:
        """Whether the node is to be written with integer operators. Its rule ``onnx_integer`` has returned no reason
        against it."""
        ...

    def packed(self, n: fx.Node, position: int = 0, name: str = "input", *, signed: bool = False) -> Bytes:
        """An activation in bytes: unsigned, or, with `signed`, signed if the format is.

        Raises:
            ExportError: its format has more than 8 bits.
        """
        ...

    def unpacked(self, stored: Bytes, name: str, dims: int = 0) -> str:
        """Bytes as floats, in a tensor called `name`. `dims`: dimensions of the tensor; needed with a scale per
        channel."""
        ...

    def has_weight(self, n: fx.Node) -> bool:
        """Whether the weight is a parameter; else it is an activation."""
        ...

    def packed_weight(
        self, n: fx.Node, *, turned: bool = False, one_zero: bool = False, unsigned: bool = False
    ) -> Bytes:
        """A weight in bytes.

        Args:
            turned: whether it is transposed.
            one_zero: whether it has a single zero point, and not one per channel.
            unsigned: whether large bytes are unsigned, for a product with unsigned ones on its left, which no processor
                gets wrong then.
        """
        ...

    def weights(self, n: fx.Node, *, turned: bool = False) -> str:
        """A weight as float, in its format; transposed if `turned`.

        Raises:
            ExportError: it is computed, not a parameter, or its format has more than 8 bits.
        """
        ...

    def weight_shape(self, n: fx.Node) -> tuple[int, ...]:
        """Shape of the weight, a parameter. Raises as ``weights``."""
        ...

    def bias(self, n: fx.Node) -> NDArray[np.float32] | None:
        """A bias in its format; None if there is none. Raises ExportError if it is computed."""
        ...

    @property
    def fuses(self) -> bool:
        """Whether operators are chosen so that a runtime fuses them with the rounding around them."""
        ...

    def bias_of(self, n: fx.Node, data: str) -> str | None:
        """A bias as a tensor of the model, None if there is none; where `fuses`, in whole numbers of 32 bits, if it is
        a multiple of the steps of the sums. Raises as ``bias``.

        Args:
            data: the tensor that is multiplied with the weight.
        """
        ...

    def scaled(self, n: fx.Node, sums: str, scale: NDArray[np.float32], bias: NDArray[np.float32] | None) -> str:
        """32-bit sums → floats: sums · scale + bias."""
        ...


#: Names of the tensors that a node gives, nested as in torch; None for one that nothing reads.
Named: TypeAlias = "str | tuple[Named | None, ...]"
#: (writer, node) → the name of the tensor with the node's result. Raises ExportError if it cannot be written.
Write = Callable[[OnnxWriter, fx.Node], str]
#: The same for an operation that may give several tensors.
WriteSeveral = Callable[[OnnxWriter, fx.Node], Named]
#: Operand → its form in bytes, for the operands of the sum → why ONNX has no integer operator for them; "" if it has
#: one.
IntegerObstacle = Callable[[Mapping[str, Packed]], str]


def unary(op: str, **attributes: Any) -> Write:
    """An ONNX operator of one tensor."""
    return lambda w, n: w.add(op, [w.value(n)], n.name, **attributes)


def many(value: Any, dims: int) -> tuple[int, ...]:
    """A number per dimension, given as one for all or as a sequence."""
    return (int(value),) * dims if isinstance(value, int) else tuple(int(v) for v in value)


def reads(n: fx.Node, place: int) -> bool:
    """Whether something reads that place of the tensors that a node gives."""
    return any(user.target is operator.getitem and user.args[1] == place for user in n.users)
