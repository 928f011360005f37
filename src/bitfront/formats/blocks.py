"""Blocks of values that share an exponent or a scale, and powers of two taken from values exactly.

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
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitfront.formats.base import Format, FormatParameter, OperandKind, dimension
from bitfront.formats.floating import binade
from bitfront.formats.grid import WHOLE, Grid, common_grid

#: The exponents of float32's normal numbers.
LOWEST, HIGHEST = -126, 127
#: The most neighbours along a dimension that can be asked for.
LONGEST = 65_536
#: √2 lies between this number and the next one, in float64 and, as float32 rounds it, in float32.
BELOW_ROOT = math.nextafter(math.sqrt(2), 0.0)
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


def largest(x: Tensor, block: Sequence[int]) -> Tensor:
    """The largest absolute value of each block: one element per block along each dimension.

    NaN does not count; infinity counts as the largest finite number.
    """
    size = torch.nan_to_num(x.abs(), nan=0.0)
    if 0 in x.shape:
        return size.new_zeros([min(n, 1) if s == WHOLE else -(-n // s) for n, s in zip(x.shape, block, strict=True)])
    for dim, s in enumerate(block):
        if s == WHOLE:
            size = size.amax(dim, keepdim=True)
        elif s > 1:
            if missing := -size.shape[dim] % s:
                size = pad(size, [0, 0] * (size.dim() - dim - 1) + [0, missing])
            size = size.reshape(*size.shape[:dim], -1, s, *size.shape[dim + 1 :]).amax(dim + 1)
    return size


def spread(per_block: Tensor, shape: Sequence[int], block: Sequence[int]) -> Tensor:
    """Each value's element of what :func:`largest` gives, in a shape that broadcasts to `shape`."""
    for dim, s in enumerate(block):
        if s > 1:
            repeated = [-1] * (dim + 1) + [s] + [-1] * (per_block.dim() - dim - 1)
            per_block = per_block.unsqueeze(dim + 1).expand(repeated).flatten(dim, dim + 1).narrow(dim, 0, shape[dim])
    return per_block


def to_floats(x: Tensor, mantissa: int, lowest: Tensor, highest: Tensor, end: Tensor) -> Tensor:
    """`x` as floating-point numbers with subnormal ones, half to even, saturating.

    Args:
        mantissa: bits behind the leading one.
        lowest, highest: the powers of two of the smallest normal and of the largest number; they broadcast to `x`.
        end: the largest number; likewise.
    """
    least = lowest.clamp(min=2.0 ** (LOWEST + mantissa))
    step = torch.minimum(torch.maximum(binade(x), least), highest) * 2.0**-mantissa
    return torch.maximum(torch.minimum(torch.round(x / step) * step, end), -end)


def to_codes(x: Tensor, step: Tensor, most: int) -> Tensor:
    """`x` as whole multiples of `step`, half to even, saturating at `most` of either sign."""
    return torch.clamp(torch.round(x / step), -most, most) * step


def to_powers(x: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """`x` as powers of two from `lowest` to `highest`, of either sign, rounded to the nearest exponent; 0 where that is
    less than the lowest one.

    With |x| = m · 2^k, 1 ≤ m < 2, the exponent is k + 1 where m > √2.
    """
    power = binade(x)
    power = torch.where(x.abs() > power * BELOW_ROOT, power * 2, power)
    size = torch.where(power < lowest, torch.zeros_like(power), torch.minimum(power, highest))
    return torch.where(x.isnan(), x, torch.copysign(size, x))


def power(exponent: Any, like: Tensor) -> Tensor:
    """2^exponent with the dtype and device of `like`, shape (), for a whole exponent within float32's range."""
    return torch.tensor(2.0**exponent, dtype=like.dtype, device=like.device)


def labelled(head: str, size: Sequence[int]) -> str:
    """A label that names the block: ``head-1x16``; of a long one the number of values."""
    text = f"{head}-{'x'.join(map(str, size))}"
    return text if len(text) <= LABEL else f"{head}-{math.prod(size)}"[:LABEL]


@dataclass(frozen=True)
class BlockFormat(Format):
    """What formats have in common whose values share something, of ``shared_bits``, within a block."""

    width: int
    samples: bool

    @property
    @abstractmethod
    def shared_bits(self) -> int:
        """Bits of what the values of a block share."""

    @abstractmethod
    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """How many neighbours along each dimension of a tensor share something; ``WHOLE`` for all of them."""

    @abstractmethod
    def end(self, x: Tensor) -> Tensor:
        """The largest value that the block of each value of `x` can have; broadcasts to `x`."""

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
