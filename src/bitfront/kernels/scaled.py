"""Rounding where the values of a block share a power of two: what it is, and how torch computes it.

There are three ways to round a value: to multiples of a step, to floating-point numbers, and to powers of two. All
numbers that say how are powers of two times a *unit*, one per block, which follows from the largest absolute value in
the block; without blocks the unit is 1. The compiled kernel (``scaled.h``) gives the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

#: How many neighbours along a dimension share something, in a list with one entry per dimension: all of them.
WHOLE = 0
#: The exponents of float32's normal numbers.
LOWEST, HIGHEST = -126, 127
#: √2 lies between this number and the next one, in float64 and, as float32 rounds it, in float32.
BELOW_ROOT = math.nextafter(math.sqrt(2), 0.0)
#: As in ``scaled.h``: the ways, and the most dimensions.
WAYS = ("multiples", "floats", "powers")
MOST_DIMENSIONS = 8
#: dtype → (integers of the same size, the bits of the exponent).
_EXPONENTS = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}


@dataclass(frozen=True)
class Unit:
    """The power of two of a block: ``clamp(p · factor, low, high)``, where p is the largest power of two that is not
    above the block's largest absolute value.

    Attributes:
        factor, low, high: powers of two.
        upward: p is the smallest power of two that is not below the largest absolute value instead.
    """

    factor: float
    low: float
    high: float
    upward: bool = False


@dataclass(frozen=True)
class ScaledRounding:
    """How values are rounded; each number but `mantissa` is in units of the block.

    Attributes:
        way: ``multiples``: to the nearest multiple of `lowest`, half to even, saturating at `end`. ``floats``: to the
            nearest floating-point number with `mantissa` bits behind the leading one, half to even, with subnormal
            numbers, saturating at `end`. ``powers``: to the power of two with the nearest exponent, of either sign,
            saturating at `highest`; 0 where that is less than `lowest`.
        lowest: of multiples the step, of floats the smallest normal number, of powers the smallest one.
        highest: the largest power of two of a value. Of multiples, not in use.
        end: the largest value.
        unit: the units of blocks; None where there are no blocks, and the unit is 1.
    """

    way: Literal["multiples", "floats", "powers"]
    lowest: float
    highest: float
    end: float
    mantissa: int = 0
    unit: Unit | None = None


class Walk(NamedTuple):
    """The dimensions of a tensor in the order of memory, as few as possible, for the compiled kernel.

    Attributes:
        dimensions: how many.
        sizes, strides, blocks: arrays of int64, one entry per dimension; a block is at least 1 and at most the size.
    """

    dimensions: int
    sizes: Any
    strides: Any
    blocks: Any


@functools.lru_cache(maxsize=4096)
def walk(shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]) -> Walk | None:
    """How the kernel walks over a tensor with elements; None where the values of its last dimension are not neighbours
    in memory, or too many dimensions are left.

    Args:
        strides: of a tensor without gaps or overlaps, in elements.
        block: how many neighbours along each dimension share a unit, ``WHOLE`` for all of them.
    """
    axes = [(s, n, min(b or n, n)) for n, s, b in zip(shape, strides, block, strict=True) if n > 1]
    merged: list[tuple[int, int, int]] = []
    for stride, size, shared in sorted(axes, reverse=True):
        if merged:
            outer_stride, outer_size, outer_shared = merged[-1]
            # A dimension that is whole, or none of two shares: then the two are one row of memory with its blocks.
            if outer_stride == size * stride and (shared == size or outer_shared == shared == 1):
                block_size = outer_shared * size if shared == size else 1
                merged[-1] = (stride, outer_size * size, block_size)
                continue
        merged.append((stride, size, shared))
    merged = merged or [(1, 1, 1)]
    if merged[-1][0] != 1 or len(merged) > MOST_DIMENSIONS:
        return None
    arrays = [(ctypes.c_int64 * len(merged))(*(axis[k] for axis in merged)) for k in (1, 0, 2)]
    return Walk(len(merged), *arrays)


@functools.lru_cache(maxsize=1024)
def numbers(how: ScaledRounding) -> Any:
    """What the kernel reads of a rounding, an array of float32 in the order of ``scaled.h``."""
    unit = how.unit or Unit(1.0, 1.0, 1.0)
    end = how.end / how.lowest if how.way == "multiples" else how.end
    fraction, least = 2.0**-how.mantissa, 2.0 ** (LOWEST + how.mantissa)
    row = (unit.factor, unit.low, unit.high, unit.upward, how.unit is not None, how.lowest, how.highest, end)
    return (ctypes.c_float * 10)(*row, fraction, least)


def rounded(x: Tensor, block: Sequence[int], how: ScaledRounding) -> Tensor:
    """See :func:`bitfront.kernels.round_scaled`."""
    unit = units(x, block, how)
    if how.way == "multiples":
        step, most = unit * how.lowest, how.end / how.lowest
        return torch.clamp(torch.round(x / step), -most, most) * step
    if how.way == "powers":
        return _to_powers(x, unit * how.lowest, unit * how.highest)
    least = (unit * how.lowest).clamp(min=2.0 ** (LOWEST + how.mantissa))
    step = torch.minimum(torch.maximum(binade(x), least), unit * how.highest) * 2.0**-how.mantissa
    end = unit * how.end
    return torch.maximum(torch.minimum(torch.round(x / step) * step, end), -end)


def _to_powers(x: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """With |x| = m · 2^k, 1 ≤ m < 2, the nearest exponent is k + 1 where m > √2."""
    power = binade(x)
    power = torch.where(x.abs() > power * BELOW_ROOT, power * 2, power)
    size = torch.where(power < lowest, torch.zeros_like(power), torch.minimum(power, highest))
    return torch.where(x.isnan(), x, torch.copysign(size, x))


def units(x: Tensor, block: Sequence[int], how: ScaledRounding) -> Tensor:
    """The unit of the block of each value; it broadcasts to `x`."""
    if how.unit is None:
        return torch.ones((), dtype=x.dtype, device=x.device)
    unit, size = how.unit, largest(x, block)
    power = binade(size)
    if unit.upward:
        power = torch.where(size > power, power * 2, power)
    return spread((power * unit.factor).clamp(unit.low, unit.high), x.shape, block)


def binade(x: Tensor) -> Tensor:
    """The largest power of two that is not above ``|x|``: same shape and dtype.

    It is 0 for 0 and for subnormal numbers of the dtype, infinite for infinities and NaN.

    Args:
        x: float32 or float64.
    """
    # The value without sign and mantissa. torch.frexp says the same, in about six times the time.
    whole, exponent = _EXPONENTS[x.dtype]
    return (x.detach().resolve_neg().view(whole) & exponent).view(x.dtype)


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
