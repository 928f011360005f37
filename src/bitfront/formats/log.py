"""Logarithmic numbers: powers of two of either sign, and 0.

The value of x is ``sign(x) · 2^clamp(round(log2 |x|), 1 − b, 2^(w−1) − 1 − b)``, with w − 1 bits for the exponent, of
which b is subtracted. A power of two cannot be 0, so the lowest exponent, −b, stands for 0 instead: what would round to
it or to less, |x| < 2^(½ − b), is 0. MASE's format has no 0; its smallest number is 2^−b. (Miyashita et al. 2016,
arXiv:1603.01025, round and clip exponents the same way, and map 0 to 0.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, cast

from torch import Tensor

from bitfront import kernels
from bitfront.formats import FORMATS
from bitfront.formats.base import Format, FormatError, FormatParameter, OperandKind
from bitfront.formats.grid import LARGEST_CODE, WHOLE, Grid
from bitfront.kernels.scaled import HIGHEST, LOWEST, ScaledRounding


@FORMATS.register("log")
@dataclass(frozen=True)
class Log(Format):
    """Powers of two of either sign, and 0."""

    width: int
    exponent_bias: int

    any_memory_order: ClassVar[bool] = True

    parameters: ClassVar[Mapping[str, FormatParameter]] = {
        "width": FormatParameter("bits of a value: a sign and an exponent", low=2, high=8),
        "exponent_bias": FormatParameter(
            "what the stored exponent is larger by; 'NA' is 2^(width - 2) - 1",
            default=None,
            low=-HIGHEST,
            high=HIGHEST,
            words=("NA",),
        ),
    }

    @classmethod
    def _build(cls, values: Mapping[str, object], kind: OperandKind, signed: bool) -> Self:  # noqa: ARG003
        width, bias = cast(int, values["width"]), values["exponent_bias"]
        form = cls(width, 2 ** (width - 2) - 1 if bias is None else cast(int, bias))
        low, high = form.exponents
        if low < LOWEST or high > HIGHEST:
            raise FormatError(
                f"exponent_bias = {bias} gives the exponents {low} to {high} in width = {width}; "
                f"float32 has {LOWEST} to {HIGHEST}"
            )
        return form

    @property
    def bits(self) -> int:
        """Bits of one stored value."""
        return self.width

    @property
    def exponents(self) -> tuple[int, int]:
        """The smallest and the largest exponent, both inclusive."""
        return 1 - self.exponent_bias, int(2 ** (self.width - 1)) - 1 - self.exponent_bias

    @property
    def label(self) -> str:
        """E.g. ``log5``; with a bias that is not the default ``log5b12``."""
        return f"log{self.width}" + (
            "" if self.exponent_bias == 2 ** (self.width - 2) - 1 else f"b{self.exponent_bias}"
        )

    def round(self, x: Tensor) -> Tensor:
        """`x` rounded to the nearest exponent, saturating; 0 below the lowest one."""
        low, high = (2.0**exponent for exponent in self.exponents)
        return kernels.round_scaled(x, (WHOLE,) * x.dim(), ScaledRounding("powers", low, high, high))

    def bounds(self, x: Tensor) -> tuple[float, float]:  # noqa: ARG002
        """The smallest and the largest representable value."""
        end = 2.0 ** self.exponents[1]
        return -end, end

    @property
    def grid(self) -> Grid | None:
        """All values are multiples of the smallest one; None where float64 cannot count them."""
        low, high = self.exponents
        most = int(2 ** (high - low))
        return Grid(2.0**low, -most, most, complete=False) if most <= LARGEST_CODE else None
