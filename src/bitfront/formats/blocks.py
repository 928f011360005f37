"""Blocks of values that share an exponent or a scale: a power of two per block, taken from its values exactly.

A format with blocks lists how many neighbours along each dimension share one (``block_size``), aligned with the last
dimension: dimensions that the list does not name are whole, and an entry larger than its dimension is cut to it. Values
of two samples never share anything: where the first dimension holds samples, its entry is 1. So a result does not
depend on the batch.

Steps are powers of two from 2^-126, float32's smallest normal number, upward. So scaling is exact in float32, on every
device.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from bitfront import kernels
from bitfront.formats.base import Format, FormatParameter, OperandKind, dimension
from bitfront.formats.grid import WHOLE, Grid, common_grid
from bitfront.kernels.scaled import ScaledRounding, units

#: The most neighbours along a dimension that can be asked for.
LONGEST = 65_536
#: The longest label (``Format.label``).
LABEL = 20

BLOCK_SIZE = FormatParameter(
    "how many neighbours along each dimension share one, aligned with the last dimension: [16] or [1, 16]; dimensions "
    "not named are whole, and samples never share; a weight whose output channels come after the dimension of the sums "
    "counts with the two exchanged",
    low=1,
    high=LONGEST,
    listed=True,
)


def block_of(
    shape: Sequence[int], size: Sequence[int], samples: bool, exchanged: tuple[int, int] | None = None
) -> tuple[int, ...]:
    """How many neighbours share along each dimension of a tensor; ``WHOLE`` for all of them.

    Args:
        shape: shape of the tensor.
        size: as in the TOML, aligned with the last dimension.
        samples: whether the first dimension holds samples.
        exchanged: (axis of the output channels, axis of the sums) of a weight whose channels come after the sums:
            `size` is for the weight with these two exchanged, so that it means the same for every kind of layer.
    """
    places = list(range(len(shape)))
    if exchanged is not None:
        channels, sums = (dimension(axis, len(shape)) for axis in exchanged)
        if channels is not None and sums is not None and channels > sums:
            places[channels], places[sums] = sums, channels
    named = dict(zip(reversed(places), reversed(size), strict=False))
    sizes = [named[d] if d in named and named[d] < n else WHOLE for d, n in enumerate(shape)]
    return (1, *sizes[1:]) if samples and sizes else tuple(sizes)


def exchanged_of(kind: OperandKind) -> tuple[int, int] | None:
    """What ``block_of`` exchanges for an operand: None unless it is a weight whose channels are not dimension 0."""
    if not kind.stored_weight or not kind.channel_axis or kind.sums is None:
        return None
    return kind.channel_axis, kind.sums


def number_of_blocks(shape: Sequence[int], block: Sequence[int]) -> int:
    """How many blocks a tensor of a shape has."""
    return math.prod(1 if s == WHOLE else -(-n // s) for n, s in zip(shape, block, strict=True))


def labelled(head: str, size: Sequence[int]) -> str:
    """A label that names the block: ``head-1x16``; of a long one the number of values."""
    text = f"{head}-{'x'.join(map(str, size))}"
    return text if len(text) <= LABEL else f"{head}-{math.prod(size)}"[:LABEL]


@dataclass(frozen=True)
class BlockFormat(Format):
    """What formats have in common whose values share something, of ``shared_bits``, within a block."""

    width: int
    samples: bool

    any_memory_order: ClassVar[bool] = True

    @property
    @abstractmethod
    def shared_bits(self) -> int:
        """Bits of what the values of a block share."""

    @abstractmethod
    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """How many neighbours along each dimension of a tensor share something; ``WHOLE`` for all of them."""

    @property
    @abstractmethod
    def rounding(self) -> ScaledRounding:
        """How values are rounded, given what their block shares."""

    def round(self, x: Tensor) -> Tensor:
        """`x` rounded to the nearest values (or exponents) that its block has, saturating."""
        return kernels.round_scaled(x, self.block(x.shape), self.rounding)

    def end(self, x: Tensor) -> Tensor:
        """The largest value that the block of each value of `x` can have; broadcasts to `x`."""
        rounding = self.rounding
        return units(x, self.block(x.shape), rounding) * rounding.end

    @property
    def bits(self) -> int:
        """Bits of one stored value, without its part of what its block shares."""
        return self.width

    def overhead_bits(self, shape: tuple[int, ...]) -> int:
        """The bits that blocks share."""
        return number_of_blocks(shape, self.block(shape)) * self.shared_bits

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value that the block of each value can have."""
        end = self.end(x)
        return -end, end

    def grid_of(self, x: Tensor) -> Grid | None:
        """The grid of the smallest step in use."""
        return common_grid(self.round(x))


@dataclass(frozen=True)
class SizedBlockFormat(BlockFormat):
    """A block format whose blocks have the size of its parameter ``block_size``."""

    block_size: tuple[int, ...]
    exchanged: tuple[int, int] | None = field(default=None, kw_only=True)

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """As ``block_of``."""
        return block_of(shape, self.block_size, self.samples, self.exchanged)
