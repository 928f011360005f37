"""Layouts of tensors: the input and output of rules for channels.

To analyse the widths of a model, it is run once on a small batch. Each tensor has a ``Layout``: the channels that each
of its dimensions consists of. At every call of an operation, the ``channels`` of its record is called. It reads the
layouts from the ``ChannelCall``, tells the ``ChannelFollower`` which dimensions must keep the same elements and which
can no longer change, and returns the layout of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn

#: (variable, repeat): for each channel of a variable number of channels, `repeat` elements side by side.
Piece = tuple[int, int]
#: A dimension of a tensor, from its first element to its last; ``graph/segments.py`` has the arithmetic.
Dim = tuple[Piece, ...]


@dataclass(frozen=True)
class Layout:
    """A tensor: its dimensions, with the batch, and its id if it is a parameter or buffer."""

    dims: tuple[Dim, ...]
    owned: int | None = None


@dataclass(frozen=True)
class Extent:
    """An integer: the size of a dimension."""

    dim: Dim


#: The layout of a value; None if it does not depend on widths.
Followed: TypeAlias = "Layout | Extent | tuple[Followed, ...] | None"


@dataclass(frozen=True, eq=False)
class ChannelCall:
    """One call of a module, function or method: the argument of a rule.

    Attributes:
        name: the class of the module, or the name of the function or method as in ``names`` of the record.
        function: the function; for a method, the function that takes the tensor as first argument.
        args, kwargs: the arguments, with layouts for tensors and extents for sizes of tensors. Computed numbers stay
            numbers: the sizes that they were computed from can no longer change.
        output: the result on the batch on which the model runs.
        module: the module, None for a function or method.
    """

    name: str
    function: Callable[..., object]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: object
    module: nn.Module | None = None

    @property
    def first(self) -> Any:
        """The first argument."""
        return self.args[0] if self.args else self.kwargs.get("input")

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the output; None if it is not a tensor."""
        return tuple(self.output.shape) if isinstance(self.output, Tensor) else None

    @property
    def tensor(self) -> Layout | None:
        """The layout of the first argument; None if the first argument or the output is not a tensor."""
        return self.first if isinstance(self.first, Layout) and self.shape is not None else None

    @property
    def constant(self) -> bool:
        """Whether all arguments but the first are written in the model, none computed from shapes or tensors."""
        return is_constant((self.args[1:], self.kwargs))

    @property
    def extents(self) -> bool:
        """Whether an argument is a size of a tensor."""
        return any(isinstance(each, Extent) for each in inside((self.args, self.kwargs)))

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument of a function or method, by position or keyword."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def held(self) -> Mapping[str, Tensor]:
        """The parameters and buffers that the module itself has, by name."""
        assert self.module is not None
        every = {**self.module._parameters, **self.module._buffers}
        return {name: tensor for name, tensor in every.items() if tensor is not None}


class ChannelFollower(Protocol):
    """The part that follows channels, at one call. A dimension is fixed for a reason `why`, which continues the title
    of the call, as in "conv (Conv2d) slides over it"."""

    def size(self, dim: Dim) -> int:
        """The number of elements of a dimension."""

    def is_fixed(self, dim: Dim) -> bool:
        """Whether no part of a dimension may change."""

    def same(self, a: Dim, b: Dim) -> bool:
        """Whether both are known to have the same elements, however widths change."""

    def unify(self, a: Dim, b: Dim) -> None:
        """From now on both have the same elements, in the same order; if that is not possible, both are fixed."""

    def fix(self, dim: Dim, why: str) -> None:
        """From now on the dimension keeps its size."""

    def new(self, sizes: Iterable[int]) -> tuple[Dim, ...]:
        """New dimensions, without channels of any layer; they are fixed."""

    def hold(self, tensor: Tensor) -> Layout:
        """The layout of a parameter or buffer of the module."""

    def hold_values(self, tensor: Tensor) -> Layout:
        """The same, for one that is used value by value, like a bias: a copied channel needs a copy of its value."""

    def contract(self, weight: Layout, over: int, incoming: Dim, outgoing: Dim, blocks: int = 1) -> bool:
        """The call is a layer that sums over dimension `over` of a weight.

        Args:
            weight: a parameter or buffer.
            over: the dimension that meets `incoming`.
            incoming: the channels that it takes.
            outgoing: the channels of its output.
            blocks: number of equal blocks of both; a block of outputs takes one block of inputs only.

        Returns:
            Whether the weight can be followed: False if another call reads it in other blocks.
        """

    def repeat(self, weight: Layout, incoming: Dim, outgoing: Dim) -> bool:
        """The call is a layer without a sum over channels, such as a depthwise convolution: `outgoing`, the first
        dimension of the weight, has a whole number of elements for each channel of `incoming`. Returns as ``contract``.
        """

    def cut(self, dim: Dim, blocks: int) -> None:
        """The call needs the dimension in this number of equal blocks."""

    def take_statistics(self, dims: Iterable[Dim]) -> None:
        """The call is a norm whose mean or variance is taken over these dimensions."""

    def remember(self, attribute: str, *dims: Dim) -> None:
        """The attribute of the module holds the size of a dimension, or is a tuple of the sizes of several."""


#: (follower, call) → the layout of the output; None: the effect of the call on channels is unknown.
ChannelRule = Callable[[ChannelFollower, ChannelCall], Followed]


def inside(values: object) -> Iterable[Layout | Extent]:
    """Every layout and extent in nested arguments."""
    if isinstance(values, (Layout, Extent)):
        yield values
    elif isinstance(values, Mapping):
        yield from inside(tuple(values.values()))
    elif isinstance(values, slice):
        yield from inside((values.start, values.stop, values.step))
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from inside(value)


def is_constant(values: object) -> bool:
    """Whether nested arguments are all written in the model, none computed from shapes or tensors."""
    return not any(True for _ in inside(values))


def repeated(dim: Dim, times: int) -> Dim:
    """Each element of `dim` replaced by `times` of them, side by side."""
    return tuple((v, r * times) for v, r in dim)
