"""How operations are computed in whole numbers: the reader that rules use, and rules that several records share.

A rule (``Operation.integers``) gets a reader and a node of the traced graph, adds steps to an integer program, and
returns the number of the value that holds the result. The model runs on a sample while it is read, so that a rule may
look at shapes. ``exporters/lowering.py`` has the reader; no operation is registered here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor, fx, nn

#: The number of a value in the program; of a node that gives several tensors, one for each.
Numbers = int | tuple[int, ...]


class IntegerReader(Protocol):
    """The reader that rules use. Values of the program are referred to by number."""

    #: The value of the current node on the sample.
    out: Tensor

    def module_of(self, n: fx.Node) -> nn.Module | None:
        """The module that a node calls; None for a function or method."""
        ...

    def setting(self, n: fx.Node, position: int, name: str, default: Any = None) -> Any:
        """A setting of a module, or the argument of that place or name."""
        ...

    def source(self, n: fx.Node) -> Tensor:
        """The value of the first input of a node on the sample."""
        ...

    def tensors(self, n: fx.Node) -> list[Tensor]:
        """The values of all inputs of a node on the sample."""
        ...

    def refuse(self, n: fx.Node, why: str) -> Exception:
        """The error that names the node; to be raised."""
        ...

    def value(self, n: fx.Node, position: int = 0, name: str = "input") -> int:
        """A tensor among the arguments, in the format of the operand. Every rule gets its inputs by this method.

        Raises:
            ExportError: it is no value of the program, or its format is not fixed point.
        """
        ...

    def values(self, n: fx.Node, position: int, name: str) -> list[int]:
        """The tensors of an argument that is a list, each in the format of the operand that it is."""
        ...

    def product(self, n: fx.Node, spatial: bool = False) -> int:
        """The sums of products of ``data_in`` and ``weight``, and the bias added: of a convolution, or of vectors."""
        ...

    def limited(self, n: fx.Node, low: float | None, high: float | None) -> int:
        """The first input, within two bounds."""
        ...

    def leaked(self, n: fx.Node, slope: float) -> int:
        """The first input, times a slope of at least 0 where it is negative."""
        ...

    def added(self, sources: Sequence[int], signs: Sequence[int]) -> int:
        """A sum of values of one shape, each with the sign 1 or −1."""
        ...

    def joined(self, sources: Sequence[int], dim: int) -> int:
        """Values joined along a dimension, counted with that of the batch."""
        ...

    def pooled(self, n: fx.Node, kind: Literal["largest", "mean"], geometry: Geometry) -> int:
        """The largest value or the mean of each window of the first input."""
        ...

    def reshaped(self, number: int, shape: tuple[int, ...]) -> int:
        """A value in another shape of a sample."""
        ...

    def moved(self, n: fx.Node) -> Numbers:
        """The first input with its numbers at other places: as the node moves them."""
        ...


#: Of windows: kernel, stride, padding and dilation, a number per dimension.
Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]
#: (reader, node) → the number of the value with the node's result. Raises ExportError if it has no whole numbers.
Lower = Callable[[IntegerReader, fx.Node], Numbers]


def moving(r: IntegerReader, n: fx.Node) -> Numbers:
    """The rule of operations that move numbers and compute nothing."""
    return r.moved(n)


def same(r: IntegerReader, n: fx.Node) -> Numbers:
    """The rule of operations that are the identity in evaluation."""
    return r.value(n)
