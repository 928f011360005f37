"""How operations are trained in a population: the reader that rules use, and the steps that they add.

A rule (``Operation.train``) adds the steps of one call to a program and returns the number of the value that holds the
result. ``population/programs.py`` has the reader that collects them; no operation is registered here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import fx, nn

TrainingStepKind = Literal[
    "linear", "conv", "activate", "bend", "norm", "add", "concatenate", "largest", "mean", "flatten", "softmax"
]
#: Shape of one sample: channels, then the length of a series, or the height and width of an image.
Shape = tuple[int, ...]


@dataclass(frozen=True)
class SlidingWindow:
    """How a convolution or pooling slides over a series or an image; each has a number per dimension.

    Attributes:
        kernel: number of places under the window.
        stride: from window to window.
        padding: zeros before the first value and behind the last one.
        dilation: from place to place; () for 1.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...] = ()

    @property
    def steps(self) -> tuple[int, ...]:
        """From place to place, a number per dimension."""
        return self.dilation or (1,) * len(self.kernel)

    @property
    def dilated(self) -> bool:
        """Whether there is something between the places."""
        return any(step != 1 for step in self.steps)


@dataclass(frozen=True)
class Bend:
    """A function of two bends: low + slope · (x − low) below `low`, `high` above `high`, else x."""

    low: float = -math.inf
    slope: float = 0.0
    high: float = math.inf

    @property
    def positive(self) -> bool:
        """Whether no value is below 0."""
        return self.low >= 0 and self.slope == 0


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
        groups: int = 1,
        bend: Bend | None = None,
    ) -> int:
        """Add a step. Returns the number of its value, of shape `shape`.

        Args:
            path: path of the module with the parameters and their formats; "" if there are none.
            window: of a convolution or pooling.
            groups: of a convolution.
            bend: of a step that bends.

        Raises:
            UnsupportedError: a parameter's format is no fixed-point grid.
        """
        ...

    def flatten(self, value: int) -> int:
        """All features of a value as a vector."""
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


def slid(shape: Shape, window: SlidingWindow, path: str) -> Shape:
    """Sizes of the output of a window on a series or an image.

    Raises:
        UnsupportedError: the value has another number of dimensions than the window.
    """
    if len(shape) != 1 + len(window.kernel):
        raise UnsupportedError(f"{path} is applied to values of shape {shape}")
    sizes = zip(shape[1:], window.kernel, window.stride, window.padding, window.steps, strict=True)
    return tuple((size + 2 * pad - step * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, pad, step in sizes)
