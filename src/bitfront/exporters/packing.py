"""Formats of at most 8 bits as bytes with a scale and a zero point, as runtimes store them.

Activations are always unsigned bytes: oneDNN and ONNX Runtime multiply unsigned activations by signed weights several
times faster than signed by signed. A signed format becomes unsigned by moving its zero point by 128, which changes no
value. Formats narrower than 8 bits use a part of the range of a byte, and rounding must clip to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfront.formats.base import Format, Operand

#: Bits of a byte.
WIDEST = 8


@dataclass(frozen=True, eq=False)
class Packing:
    """A value is ``(byte − zero) · scale``.

    Attributes:
        scale: float32, shape () or (channels,).
        zero: int64, same shape; within the range of the byte.
        low, high: the smallest and the largest byte in use.
        signed: int8, else uint8.
        axis: the dimension that the channels lie along; None if there is one scale for all.
        form: rounds a tensor before it is packed; None where packing rounds it in the same way.
    """

    scale: NDArray[np.float32]
    zero: NDArray[np.int64]
    low: int
    high: int
    signed: bool
    axis: int | None
    form: Format | None = None

    @property
    def narrow(self) -> bool:
        """Whether a byte can hold more values than the format has."""
        return self.high - self.low < 255

    @property
    def four_bits(self) -> bool:
        """Whether the codes fit into 4 bits: −8 to 7 if signed, else 0 to 15."""
        return (self.low >= -8 and self.high <= 7) if self.signed else self.high <= 15

    @property
    def saturates(self) -> bool:
        """Whether two products of these bytes, signed, and unsigned ones may be more than 16 bits hold."""
        return self.signed and 2 * 255 * max(-self.low, self.high) > 2**15 - 1

    @property
    def unsigned(self) -> Packing:
        """The same values in unsigned bytes."""
        if not self.signed:
            return self
        return replace(self, zero=self.zero + 128, low=self.low + 128, high=self.high + 128, signed=False)

    @property
    def symmetric(self) -> bool:
        """Whether the byte 0 is the value 0."""
        return not self.zero.any()

    @property
    def range(self) -> tuple[np.float32, np.float32]:
        """The smallest and the largest value; only for a single scale."""
        zero = int(self.zero)
        return np.float32((self.low - zero) * self.scale), np.float32((self.high - zero) * self.scale)

    def pack(self, x: Tensor) -> NDArray[np.uint8] | NDArray[np.int8]:
        """A tensor as bytes: same shape."""
        x = x if self.form is None else self.form.round(x)
        shape = [1] * x.dim()
        if self.axis is not None:
            shape[self.axis] = -1
        scale = torch.from_numpy(np.atleast_1d(self.scale)).reshape(shape)
        zero = torch.from_numpy(np.atleast_1d(self.zero)).reshape(shape)
        codes = torch.clamp(torch.round(x.detach().cpu().float() / scale) + zero, self.low, self.high)
        values: NDArray[np.float32] = codes.numpy()
        return values.astype(np.int8) if self.signed else values.astype(np.uint8)


def instead(form: Format) -> str:
    """What to do where a format has no form in bytes, for the end of a message; empty where the message says it."""
    if form.value_bits is None:
        return ""
    return (
        "; bits of each value, as strategy 'learned_bits' learns them, are for logic such as an FPGA's: take the "
        "weights and formats that `bitfront transform` saves, or search formats with one width, such as affine"
    )


def otherwise(form: Format, operand: Operand) -> str:
    """Why no runtime rounds an operand that it computes to a format, with what to do; empty if the rounding is no
    obstacle. A parameter is rounded before it is written, in whatever way."""
    grid = form.grid
    if grid is None or grid.usual:
        return ""
    does = {"even": "half to even", "half_up": "half up", "floor": "down (floor)"}[grid.rounds]
    return (
        f"{operand} is {form.label}, which rounds {does} and {'wraps' if grid.wraps else 'saturates'}, and runtimes "
        f"round half to even and saturate: search with {operand}_rounding = 'even' and {operand}_overflow = 'saturate'"
    )


def packing(form: Format, *, activation: bool) -> Packing | None:
    """The form of a calibrated format in bytes; None if it has none.

    Args:
        activation: whether the bytes are always unsigned; otherwise they are signed if the format is.
    """
    grid = None if form.bits > WIDEST else form.grid
    if grid is None or not grid.complete or not (grid.uniform or grid.axis is not None):
        return None
    low, high = grid.low, grid.high
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return None
    steps, zeros = np.broadcast_arrays(np.asarray(grid.step), np.asarray(0 if grid.zero is None else grid.zero))
    signed = low < 0
    # The byte of the value 0 must be in use, because padding consists of it.
    if not (-128 if signed else 0) <= low <= zeros.min() or not zeros.max() <= high <= (127 if signed else 255):
        return None
    shape = () if grid.uniform else (-1,)
    scale, zero = steps.astype(np.float32).reshape(shape), zeros.astype(np.int64).reshape(shape)
    first = None if grid.usual else form
    if activation and signed:
        return Packing(scale, zero + 128, low + 128, high + 128, False, grid.axis, first)
    return Packing(scale, zero, low, high, signed, grid.axis, first)
