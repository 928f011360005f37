"""Fixed point with a width and a binary point of its own for every value, as learned bits give it.

The value of x is ``clamp(round(x·2^f), −(2^m−1), 2^m−1) / 2^f`` with m = w − 1 bits of magnitude, unsigned
``clamp(round(x·2^f), 0, 2^w−1) / 2^f``, rounding half to even unless it says otherwise; w and f belong to the value.
Negative saturation is symmetric. A value of 0 bits is 0. (Sun et al. 2024, arXiv:2405.00645, section III.)
"""

from __future__ import annotations

import base64
import functools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfront.formats import FORMATS
from bitfront.formats.base import Format, FormatError, FormatParameter, OperandKind
from bitfront.formats.grid import WHOLE, Grid
from bitfront.kernels.whole import Rounding


@FORMATS.register("fixed_map")
@dataclass(frozen=True)
class FixedMap(Format):
    """Fixed point with bits of its own for each value, as ``learned_bits`` gives it; no file can name it.

    Attributes:
        shape: of the operand, without the samples.
        packed: widths and binary points, as ``pack`` gives them.
        signed: whether negative values exist; then a width counts the sign.
        samples: whether the first dimension of the operand is the samples.
        rounding: how x·2^f becomes a whole number.
    """

    shape: tuple[int, ...]
    packed: str
    signed: bool
    samples: bool
    rounding: Rounding = "even"

    parameters: ClassVar[Mapping[str, FormatParameter]] = {}
    bits_parameter: ClassVar[str | None] = None

    @classmethod
    def of(
        cls,
        widths: NDArray[np.int8],
        points: NDArray[np.int8],
        *,
        signed: bool,
        samples: bool,
        rounding: Rounding = "even",
    ) -> Self:
        """The format with these bits.

        Args:
            widths: bits of each value, with the sign where there is one; 0: the value is 0.
            points: bits behind the binary point of each value, of the same shape.
            signed, samples, rounding: see the attributes.
        """
        return cls(tuple(widths.shape), pack(widths, points), signed, samples, rounding)

    def with_bits(self, widths: NDArray[np.int8], points: NDArray[np.int8]) -> Self:
        """The format with other bits, also of another shape."""
        return replace(self, shape=tuple(widths.shape), packed=pack(widths, points))

    @classmethod
    def _build(cls, values: Mapping[str, object], kind: OperandKind, signed: bool) -> Self:  # noqa: ARG003
        raise FormatError("is learned by the strategy learned_bits; a file cannot name it")

    @property
    def widths(self) -> NDArray[np.int8]:
        """Bits of each value, int8, of the format's shape."""
        return _unpacked(self.packed, self.shape)[0]

    @property
    def points(self) -> NDArray[np.int8]:
        """Bits behind the binary point of each value, int8, of the format's shape."""
        return _unpacked(self.packed, self.shape)[1]

    @property
    def bits(self) -> float:  # type: ignore[override]
        """Bits of one stored value, on average."""
        return float(self.widths.mean(dtype=np.float64)) if self.widths.size else 0.0

    @property
    def value_bits(self) -> NDArray[np.int64]:
        """Bits of the magnitude of each value, int64, of the format's shape."""
        widths = self.widths.astype(np.int64)
        return np.maximum(widths - 1, 0) if self.signed else widths

    @property
    def has_sign(self) -> bool:
        """If negative values exist."""
        return self.signed

    @property
    def label(self) -> str:
        """E.g. ``fix~3.1``: the mean of the widths; ``fix~3.1-h`` rounds half up, ``fix~3.1-f`` down."""
        end = "" if self.rounding == "even" else f"-{self.rounding[0]}"
        return f"{'' if self.signed else 'u'}fix~{self.bits:.3g}{end}"

    @property
    def grid(self) -> Grid:
        """A step, and the largest code, of each value."""
        return _grid(self)

    def round(self, x: Tensor) -> Tensor:
        """`x` rounded, each value to its own grid, saturating."""
        self._check(x)
        return self.grid.round(x)

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest number of each value."""
        self._check(x)
        return self.grid.ends(x)

    def _check(self, x: Tensor) -> None:
        shape = tuple(x.shape[1:] if self.samples else x.shape)
        if shape != self.shape:
            raise FormatError(f"these bits are of values of shape {self.shape}, not {shape}")


def pack(widths: NDArray[np.int8], points: NDArray[np.int8]) -> str:
    """Two arrays of int8 of one shape as text: base64 of zlib of the bytes of both, one after the other."""
    whole = np.stack([widths, points]).astype(np.int8)
    return base64.b64encode(zlib.compress(whole.tobytes(), 9)).decode()


@functools.lru_cache(maxsize=1024)
def _unpacked(packed: str, shape: tuple[int, ...]) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    values = np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype=np.int8).reshape(2, *shape)
    return values[0], values[1]


@functools.lru_cache(maxsize=1024)
def _grid(form: FixedMap) -> Grid:
    shape = (1, *form.shape) if form.samples else form.shape
    points = torch.from_numpy(form.points.astype(np.int64)).reshape(shape)
    high = torch.from_numpy(2**form.value_bits - 1).reshape(shape)
    step = torch.ldexp(torch.ones(shape, dtype=torch.float64), -points)
    block = (WHOLE, *[1] * len(form.shape)) if form.samples else (1,) * len(form.shape)
    return Grid(step, -high if form.signed else torch.zeros_like(high), high, block=block, rounds=form.rounding)
