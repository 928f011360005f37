"""Grids: each value of a format is ``(code − zero) · step``, with a whole-number code from low to high.

A grid describes all values of a tensor. One step can belong to the whole tensor, to a channel, to a group or block, or
to a single value; the same holds for zero, low and high. Code that computes in whole numbers uses the grid: it adds up
codes exactly and scales the sum once. If all values share a step that is a power of two, sums of products are exact in
floating point too; see :attr:`Grid.fixed_point`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bitfront.kernels import scaled
from bitfront.kernels.whole import ROUNDINGS, Rounding, whole, wrapped

#: float64 holds all whole numbers up to this one.
LARGEST_CODE = 2**53
#: In ``Grid.block``: all values along the dimension share a step.
WHOLE = scaled.WHOLE


@dataclass(frozen=True)
class FixedPoint:
    """The numbers step · k for whole k from low to high. The step is a power of two; `rounds` is the way to them."""

    step: float
    low: int
    high: int
    rounds: Rounding = "even"

    @property
    def row(self) -> tuple[float, int, int, float, int]:
        """The arguments of the training kernels: 1 / step, low, high, step, and the way of rounding."""
        return 1 / self.step, self.low, self.high, self.step, ROUNDINGS.index(self.rounds)


@dataclass(frozen=True, eq=False)
class Grid:
    """The numbers (code − zero) · step for whole codes from low to high.

    An entry is a number that all values share, or a tensor that has one element per block of the values.

    Attributes:
        step: positive; a tensor is float64.
        low, high: the smallest and the largest code, both inclusive; a tensor is int64.
        zero: the code of the value 0; a tensor is int64. None if the format has no zero point: 0 is code 0, and
            rounding keeps the sign of a zero.
        block: how many neighbours along each dimension share an element of the tensors, ``WHOLE`` for all of them.
            Dimensions after the last one that is named are whole. ``()``: no entry is a tensor. ``(1,)``: one per index
            of dimension 0, the channels of a weight. ``(WHOLE, 1)``: one per index of dimension 1, the channels of an
            input. ``(1, 32)``: groups of 32 along dimension 1 of a weight. ``(1, 1)``: one per element
            of a matrix. A tensor has as many dimensions as `block` has entries.
        complete: every code is a value, and the format rounds as `rounds` and `wraps` say. Otherwise only some of these
            numbers are values, as in a floating-point format.
        rounds: how x / step becomes a whole number.
        wraps: whether a code out of range comes back on the other side, modulo the number of codes; otherwise it
            becomes the nearest code.
    """

    step: float | Tensor
    low: int | Tensor
    high: int | Tensor
    zero: int | Tensor | None = None
    block: tuple[int, ...] = ()
    complete: bool = True
    rounds: Rounding = "even"
    wraps: bool = False

    def __post_init__(self) -> None:
        for name in ("step", "low", "high", "zero"):
            entry = getattr(self, name)
            if isinstance(entry, Tensor) and (not self.block or entry.dim() != len(self.block)):
                raise ValueError(f"{name} has shape {tuple(entry.shape)}, which does not fit block = {self.block}")

    @property
    def uniform(self) -> bool:
        """Whether all values share one step, one zero and one range."""
        return not self.block

    @property
    def axis(self) -> int | None:
        """The only dimension along which entries differ, with one element per index; None if there is none."""
        *before, last = self.block or (WHOLE,)
        return len(before) if last == 1 and not any(before) else None

    @property
    def fixed_point(self) -> FixedPoint | None:
        """Fixed-point numbers that contain all values: sums and products of them can be exact in floating point.

        None if steps differ or are no powers of two, and for formats with a zero point.
        """
        step, low, high = self.step, self.low, self.high
        if isinstance(step, Tensor) or isinstance(low, Tensor) or isinstance(high, Tensor) or self.zero is not None:
            return None
        return FixedPoint(step, low, high, self.rounds) if math.frexp(step)[0] == 0.5 else None

    @property
    def rounding(self) -> FixedPoint | None:
        """Fixed-point numbers such that the format's rounding is ``clamp(whole(x / step), low, high) · step``, where
        ``whole`` is the way that they name. None for any other rounding."""
        return self.fixed_point if self.complete and not self.wraps else None

    @property
    def usual(self) -> bool:
        """Whether it rounds half to even and saturates, as runtimes do."""
        return self.rounds == "even" and not self.wraps

    def rounding_row(self, *, coded: bool = False) -> tuple[float, ...] | None:
        """The numbers with which the kernels round to the grid (``kernels.round_blocks``): scale, low, high, step,
        divisor, zero and the rounding. None if it is not complete, if it wraps, or if entries differ.

        Args:
            coded: round to codes, less the zero point, and not to values.
        """
        step, low, high, zero = self.step, self.low, self.high, self.zero
        if not self.complete or self.wraps or any(isinstance(e, Tensor) for e in (step, low, high, zero)):
            return None
        assert not isinstance(step, Tensor)
        rounds = ROUNDINGS.index(self.rounds)
        if self.fixed_point is not None:
            return (1 / step, low, high, 1.0 if coded else step, 0.0, 0.0, rounds)  # type: ignore[return-value]
        return (0.0, low, high, 1.0 if coded else step, step, zero or 0, rounds)  # type: ignore[return-value]

    def codes(self, x: Tensor) -> Tensor:
        """The code of each value of `x`, rounded and brought into range as `rounds` and `wraps` say. Same shape and
        dtype.

        If the grid is not complete, `x` must be rounded already.
        """
        if self.wraps:
            return self._wrapped_codes(x.double()).to(x.dtype)
        codes = whole(x / self.along(self.step, x), self.rounds)
        if self.zero is not None:
            codes = codes + self.along(self.zero, x)
        low, high = (e if isinstance(e, int) else self.along(e, x) for e in (self.low, self.high))
        return torch.clamp(codes, low, high)  # type: ignore[arg-type]

    def _wrapped_codes(self, x: Tensor) -> Tensor:
        """Of float64, in which no code of a float32 overflows."""
        codes = whole(x / self.along(self.step, x), self.rounds)
        if self.zero is not None:
            codes = codes + self.along(self.zero, x)
        return wrapped(codes, self.along(self.low, x), self.along(self.high, x))

    def centred(self, x: Tensor) -> Tensor:
        """The codes of `x` less the zero point: 0 is the value 0. Same shape and dtype."""
        codes = self.codes(x)
        return codes if self.zero is None else codes - self.along(self.zero, x)

    def values(self, codes: Tensor) -> Tensor:
        """The values of codes. Same shape and dtype."""
        return self._scaled(codes, codes)

    def round(self, x: Tensor) -> Tensor:
        """`x` mapped to numbers of the grid. Same shape and dtype."""
        if x.dtype in (torch.float16, torch.bfloat16):
            # Their few bits do not hold the codes.
            return self.round(x.float()).to(x.dtype)
        return self._scaled(self.codes(x), x)

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest number of the grid, broadcastable to `x`."""
        return self._scaled(self.along(self.low, x), x), self._scaled(self.along(self.high, x), x)

    def _scaled(self, codes: Tensor, x: Tensor) -> Tensor:
        """The numbers of codes that broadcast against `x`."""
        if self.zero is not None:
            codes = codes - self.along(self.zero, x)
        return codes * self.along(self.step, x)

    def along(self, entry: float | Tensor, x: Tensor) -> Tensor:
        """An entry of the grid with the dtype and device of `x`, in a shape that broadcasts against `x`."""
        if not isinstance(entry, Tensor):
            return torch.tensor(entry, dtype=x.dtype, device=x.device)
        if entry.dim() > x.dim():
            raise ValueError(
                f"a tensor of shape {tuple(x.shape)} has no dimension {entry.dim() - 1} to divide into blocks"
            )
        laid = entry.to(x)
        for dim, size in enumerate(self.block):
            if size > 1:
                laid = laid.repeat_interleave(size, dim).narrow(dim, 0, x.shape[dim])
        return laid.reshape(*laid.shape, *[1] * (x.dim() - laid.dim()))


def common_grid(rounded: Tensor) -> Grid | None:
    """The coarsest grid with a power of two as its step that all values of a tensor lie on; None if its codes would not
    be exact in float64, or a value is not finite. For ``Format.grid_of``, where steps depend on the tensor.

    Args:
        rounded: any shape, float32 or float64, rounded already.
    """
    values = rounded.detach()[rounded != 0].double()
    if not len(values):
        return Grid(1.0, 0, 0, complete=False)
    if not bool(values.isfinite().all()):
        return None
    mantissa, exponent = torch.frexp(values)
    whole = (mantissa.abs() * LARGEST_CODE).long()
    # The lowest bit that is set says of which powers of two a whole number is a multiple.
    lowest = int((torch.frexp((whole & -whole).double()).exponent + exponent).min()) - 54
    most = math.ldexp(float(values.abs().max()), -lowest)
    return Grid(math.ldexp(1.0, lowest), -int(most), int(most), complete=False) if most <= LARGEST_CODE else None
