"""How operations are trained in a population: what a record's rule is given, and the words it answers in.

A rule (``Operation.train``) adds the steps of one call to a program and returns the number of the value that holds the
result. ``population/programs.py`` has the reader that collects them; no operation is registered here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import fx, nn

Kind = Literal["linear", "conv", "activate", "norm", "add", "largest", "mean", "flatten"]
#: Of one sample: channels, then height and width of an image.
Shape = tuple[int, ...]


@dataclass(frozen=True)
class SlidingWindow:
    """How a convolution or pooling slides over an image; each (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


class UnsupportedError(Exception):
    """A population cannot train a model; the message says what in it stands in the way."""


class ProgramReader(Protocol):
    """What rules add steps with. Values are numbered; they are of one sample."""

    def sources(self, node: fx.Node, count: int) -> list[fx.Node]:
        """The inputs of a node. Raises UnsupportedError where it has other arguments than `count` tensors."""
        ...

    def value(self, node: fx.Node) -> int:
        """The value that a node computes."""
        ...

    def shape(self, value: int) -> Shape:
        """The shape of a value."""
        ...

    def rounded(self, source: fx.Node, path: str) -> int:
        """The value of `source` as the module at `path` rounds its input; as it is where the module does not.

        Raises:
            UnsupportedError: the input's format is no fixed-point grid.
        """
        ...

    def rectified(self, source: fx.Node, path: str = "") -> int:
        """The same, or with no `path` the value itself, through a ReLU."""
        ...

    def emit(
        self, kind: Kind, inputs: tuple[int, ...], shape: Shape, *, path: str = "", window: SlidingWindow | None = None
    ) -> int:
        """Add a step. Returns the number of its value, of shape `shape`.

        Args:
            path: of the module with the parameters, in their formats; "" where there are none.

        Raises:
            UnsupportedError: a parameter's format is no fixed-point grid.
        """
        ...

    def flatten(self, value: int) -> int:
        """All features of a value in a row. Raises UnsupportedError where it is neither a vector nor an image."""
        ...


#: (reader, node, its module or None for a function) → the number of its value. Raises UnsupportedError.
TrainRule = Callable[[ProgramReader, fx.Node, nn.Module | None], int]


def for_modules(rule: Callable[[ProgramReader, fx.Node, Any, str], int]) -> TrainRule:
    """A rule of modules alone, from (reader, the module's input, module, its path) → value."""

    def train(reader: ProgramReader, node: fx.Node, module: nn.Module | None) -> int:
        if module is None:
            raise unsupported(node, module)
        return rule(reader, reader.sources(node, 1)[0], module, str(node.target))

    return train


def unsupported(node: fx.Node, module: nn.Module | None) -> UnsupportedError:
    """The error that names a node which no rule covers."""
    if module is not None:
        return UnsupportedError(f"{node.target} is a {type(module).__name__}")
    return UnsupportedError(f"{node.name} is a {getattr(node.target, '__name__', node.target)}")


def two(size: Any) -> tuple[int, int]:
    """A number for both dimensions of an image, or one for each."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def slid(shape: Shape, window: SlidingWindow, path: str) -> Shape:
    """Height and width of what a window makes of an image.

    Raises:
        UnsupportedError: the value is no image.
    """
    if len(shape) != 3:
        raise UnsupportedError(f"{path} is applied to values of shape {shape}")
    sizes = zip(shape[1:], window.kernel, window.stride, window.padding, strict=True)
    return tuple((size + 2 * padding - kernel) // stride + 1 for size, kernel, stride, padding in sizes)
