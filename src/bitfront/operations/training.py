"""How operations are trained in a population: the reader that rules use, and the steps that they add.

A rule (``Operation.train``) adds the steps of one call to a program and returns the number of the value that holds the
result. ``population/programs.py`` has the reader that collects them; no operation is registered here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import fx, nn

TrainingStepKind = Literal["linear", "conv", "activate", "norm", "add", "largest", "mean", "flatten"]
#: Shape of one sample: channels, then height and width of an image.
Shape = tuple[int, ...]


@dataclass(frozen=True)
class SlidingWindow:
    """How a convolution or pooling slides over an image; each is (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


class UnsupportedError(Exception):
    """A population cannot train a model; the message gives the reason."""


class ProgramReader(Protocol):
    """The reader with which rules add steps. Values are numbered, and belong to one sample."""

    def sources(self, node: fx.Node, count: int) -> list[fx.Node]:
        """The inputs of a node. Raises UnsupportedError if its arguments are not `count` tensors."""
        ...

    def value(self, node: fx.Node) -> int:
        """The value that a node computes."""
        ...

    def shape(self, value: int) -> Shape:
        """The shape of a value."""
        ...

    def formatted(self, path: str) -> bool:
        """Whether any operand of the module at `path` has a format."""
        ...

    def rounded(self, source: fx.Node, path: str) -> int:
        """The value of `source`, rounded like the input of the module at `path`; unchanged if that rounds no input.

        Raises:
            UnsupportedError: the input's format is no fixed-point grid.
        """
        ...

    def rectified(self, source: fx.Node, path: str = "") -> int:
        """The same, followed by a ReLU; without a `path` nothing is rounded."""
        ...

    def emit(
        self,
        kind: TrainingStepKind,
        inputs: tuple[int, ...],
        shape: Shape,
        *,
        path: str = "",
        window: SlidingWindow | None = None,
    ) -> int:
        """Add a step. Returns the number of its value, of shape `shape`.

        Args:
            path: path of the module with the parameters and their formats; "" if there are none.

        Raises:
            UnsupportedError: a parameter's format is no fixed-point grid.
        """
        ...

    def flatten(self, value: int) -> int:
        """All features of a value as a vector. Raises UnsupportedError if it is neither a vector nor an image."""
        ...


#: (reader, node, its module or None for a function) → the number of its value. Raises UnsupportedError.
TrainRule = Callable[[ProgramReader, fx.Node, nn.Module | None], int]


def for_modules(rule: Callable[[ProgramReader, fx.Node, Any, str], int]) -> TrainRule:
    """A rule for modules only, from a function (reader, input of the module, module, its path) → value."""

    def train(reader: ProgramReader, node: fx.Node, module: nn.Module | None) -> int:
        if module is None:
            raise unsupported(node, module)
        return rule(reader, reader.sources(node, 1)[0], module, str(node.target))

    return train


def unsupported(node: fx.Node, module: nn.Module | None) -> UnsupportedError:
    """The error for a node that no rule covers."""
    if module is not None:
        return UnsupportedError(f"{node.target} is a {type(module).__name__}")
    return UnsupportedError(f"{node.name} is a {getattr(node.target, '__name__', node.target)}")


def two(size: Any) -> tuple[int, int]:
    """A number for both dimensions of an image, or one for each."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def slid(shape: Shape, window: SlidingWindow, path: str) -> Shape:
    """Height and width of the output of a window on an image.

    Raises:
        UnsupportedError: the value is no image.
    """
    if len(shape) != 3:
        raise UnsupportedError(f"{path} is applied to values of shape {shape}")
    sizes = zip(shape[1:], window.kernel, window.stride, window.padding, strict=True)
    return tuple((size + 2 * padding - kernel) // stride + 1 for size, kernel, stride, padding in sizes)
