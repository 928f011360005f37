"""How operations are written as ONNX: what a record's rule is given, and what several rules share.

A rule (``Operation.onnx``) gets a writer and a node of the traced graph, adds ONNX nodes, and returns the name of the
tensor that holds the result. The model runs on a sample while it is written, so that a rule may look at shapes.
``export/onnx.py`` has the writer; no operation is registered here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx, nn


class Packed(Protocol):
    """How a tensor is held in bytes: a value is (byte − zero) · scale."""

    @property
    def scale(self) -> NDArray[np.float32]:
        """Shape () or (channels,)."""
        ...

    @property
    def zero(self) -> NDArray[np.int64]:
        """Shape as that of the scale."""
        ...

    @property
    def signed(self) -> bool:
        """Whether bytes are from −128 to 127; else from 0 to 255."""
        ...

    @property
    def axis(self) -> int | None:
        """The dimension that channels lie along; None where there is one scale for all."""
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
        held: what they are.
    """

    name: str
    scale: str
    zero: str
    held: Packed


class OnnxWriter(Protocol):
    """What rules write with. Tensors of the ONNX model are known by their names."""

    #: What the node that is being written computes on the sample.
    out: Tensor
    #: Samples in the sample.
    batch: int

    def add(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """A node with one output, called `name` (numbered where that is taken). Returns the output's name."""
        ...

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """An array that the model holds. Returns its name."""
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

    def source(self, n: fx.Node) -> Tensor:
        """What the first input of a node is on the sample."""
        ...

    def name_of(self, n: fx.Node) -> str:
        """The tensor that a node of the graph computes.

        Raises:
            ExportError: it computes something else than one tensor.
        """
        ...

    def tensor(self, n: fx.Node, position: int = 0, name: str = "input") -> str:
        """The tensor, or number, among the arguments, without the format it may have."""
        ...

    def value(self, n: fx.Node, position: int = 0, name: str = "input") -> str:
        """The same, as the format of that operand holds it. What every rule takes its inputs by."""
        ...

    def parameter(self, n: fx.Node, position: int, name: str) -> str | None:
        """A parameter or buffer that has no format; None where the module or the call has none."""
        ...

    def integer(self, n: fx.Node) -> bool:
        """Whether the node is to be written with integer operators. Its rule ``onnx_integer`` had no objection."""
        ...

    def packed(self, n: fx.Node, position: int = 0, name: str = "input", *, signed: bool = False) -> Bytes:
        """An activation in bytes: unsigned ones, or with `signed` as the format is.

        Raises:
            ExportError: its format has more than 8 bits.
        """
        ...

    def has_weight(self, n: fx.Node) -> bool:
        """Whether the weight is a parameter; else it is an activation."""
        ...

    def packed_weight(self, n: fx.Node, *, turned: bool = False, one_zero: bool = False) -> Bytes:
        """A weight in bytes: transposed if `turned`; with `one_zero` its zero point is one number."""
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
        """A bias in its format; None where there is none. Raises ExportError for one that is computed."""
        ...

    def scaled(self, n: fx.Node, sums: str, scale: NDArray[np.float32], bias: NDArray[np.float32] | None) -> str:
        """32-bit sums → floats: sums · scale + bias."""
        ...


#: (writer, node) → the name of the tensor with the node's result. Raises ExportError for what cannot be written.
Write = Callable[[OnnxWriter, fx.Node], str]
#: Operands that sums are taken over, by name, as they are held → why ONNX has no integer operator for them; "" where
#: it has one.
IntegerObstacle = Callable[[Mapping[str, Packed]], str]


def unary(op: str, **attributes: Any) -> Write:
    """An ONNX operator of one tensor."""
    return lambda w, n: w.add(op, [w.value(n)], n.name, **attributes)


def many(value: Any, dims: int) -> tuple[int, ...]:
    """A number per dimension, given as one for all or as a sequence."""
    return (int(value),) * dims if isinstance(value, int) else tuple(int(v) for v in value)
