"""What the two minifloats share: a sign, a few bits of exponent, the rest mantissa, and an exponent bias.

With w bits, e of them exponent, there are m = w − e − 1 bits of mantissa. A value has d binary digits: the m of the
mantissa, and one more where normal numbers have a leading 1 that is not stored. All codes are numbers, so there is no
infinity and no NaN, and large values saturate. The bias is subtracted from every exponent: one more halves all values.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self, cast

from torch import Tensor

from bitfront import kernels
from bitfront.formats.base import Format, FormatError, FormatParameter, OperandKind, finite, thinned
from bitfront.formats.grid import WHOLE, Grid
from bitfront.kernels.scaled import ScaledRounding

#: Exponents of the smallest and of the largest power of two of all values: those of float32's normal numbers.
SMALLEST_EXPONENT, LARGEST_EXPONENT = -126, 127
#: Significant binary digits of float32.
MOST_DIGITS = 24


@dataclass(frozen=True)
class Minifloat(Format):
    """A floating-point number of `width` bits, saturating. Subclasses say whether its leading 1 is stored."""

    width: int
    exponent_width: int
    exponent_bias: int | Literal["auto"]

    any_memory_order: ClassVar[bool] = True
    #: 1 if the leading 1 of a normal number is not stored, otherwise 0.
    hidden: ClassVar[int]

    parameters: ClassVar[Mapping[str, FormatParameter]] = {
        "width": FormatParameter("bits of a value: sign, exponent and mantissa", low=2, high=32),
        "exponent_width": FormatParameter("bits of the exponent", low=1, high=7),
        "exponent_bias": FormatParameter(
            "what is subtracted from a stored exponent, so that one more halves all values; 'NA' is "
            "2^(exponent_width - 1) - 1; 'auto' is the one with the smallest squared error on the calibration samples",
            default=None,
            low=-126,
            high=127,
            words=("NA", "auto"),
        ),
    }

    @classmethod
    def _build(cls, values: Mapping[str, object], kind: OperandKind, signed: bool) -> Self:  # noqa: ARG003
        width, exponent_width = cast(int, values["width"]), cast(int, values["exponent_width"])
        bias = cast("int | Literal['auto'] | None", values["exponent_bias"])
        form = cls(width, exponent_width, (1 << exponent_width - 1) - 1 if bias is None else bias)
        given = f"width = {width} with exponent_width = {exponent_width}"
        if not 1 <= form.digits <= MOST_DIGITS:
            raise FormatError(
                f"{given} leaves {form.mantissa_width} bits of mantissa; possible: {1 - cls.hidden} to "
                f"{MOST_DIGITS - cls.hidden}"
            )
        low, high = form.biases
        if form.exponent_bias != "auto" and not low <= form.exponent_bias <= high:
            raise FormatError(
                f"{given} and exponent_bias = {bias} has values that are no normal numbers of float32; the bias can be "
                f"from {low} to {high}"
            )
        return form

    @property
    def bits(self) -> int:
        """Bits of one stored value."""
        return self.width

    @property
    def mantissa_width(self) -> int:
        """Bits of the stored mantissa."""
        return self.width - 1 - self.exponent_width

    @property
    def digits(self) -> int:
        """Significant binary digits of a large value."""
        return self.mantissa_width + self.hidden

    @property
    def exponents(self) -> int:
        """How many exponents there are."""
        return 1 << self.exponent_width

    @property
    def standard_bias(self) -> int:
        """The exponent bias of IEEE 754."""
        return self.exponents // 2 - 1

    @property
    def biases(self) -> tuple[int, int]:
        """The smallest and the largest exponent bias, both inclusive, with which all values are float32's."""
        top, bottom = self.exponents - 2 + self.hidden, self.hidden - self.mantissa_width
        return top - LARGEST_EXPONENT, bottom - SMALLEST_EXPONENT

    @property
    @abstractmethod
    def label(self) -> str:
        """A few characters for tables."""

    def _parts(self) -> str:
        """E.g. ``e4m3``, ``e4m3.b5`` with another than the standard bias, ``e4m3.auto`` before calibration."""
        named = f"e{self.exponent_width}m{self.mantissa_width}"
        if self.exponent_bias == self.standard_bias:
            return named
        return f"{named}.auto" if self.exponent_bias == "auto" else f"{named}.b{self.exponent_bias}"

    @property
    def rank(self) -> float:
        """First formats with the standard bias, and those whose bias is learned."""
        return 0.0 if self.exponent_bias == "auto" else abs(self.exponent_bias - self.standard_bias)

    @property
    def steps(self) -> tuple[int, int]:
        """Exponents of the smallest and the largest step between neighbours."""
        if self.exponent_bias == "auto":
            raise FormatError("exponent_bias = 'auto' must be calibrated before it is used", "exponent_bias")
        unit = -self.exponent_bias - self.mantissa_width
        return unit + self.hidden, unit + self.exponents - 1

    def bounds(self, x: Tensor) -> tuple[float, float]:  # noqa: ARG002
        """The smallest and the largest value."""
        largest = math.ldexp(2**self.digits - 1, self.steps[1])
        return -largest, largest

    def round(self, x: Tensor) -> Tensor:
        """`x` rounded half to even to the step of its binade, saturating."""
        above = self.digits - 1
        lowest, highest = (math.ldexp(1.0, step + above) for step in self.steps)
        how = ScaledRounding("floats", lowest, highest, self.bounds(x)[1], above)
        return kernels.round_scaled(x, (WHOLE,) * x.dim(), how)

    @property
    def grid(self) -> Grid | None:
        """Multiples of the smallest step, of which some are values; None where the largest is no code of 64 bits."""
        lowest, highest = self.steps
        largest = (2**self.digits - 1) * 2 ** (highest - lowest)
        if largest >= 2**63:
            return None
        return Grid(math.ldexp(1.0, lowest), -largest, largest, complete=False)

    @property
    def calibrates(self) -> bool:
        """True while the exponent bias is a word."""
        return self.exponent_bias == "auto"

    def calibrated(self, sample: Tensor) -> Self:
        """With the exponent bias that has the smallest squared error on the finite values of `sample`; the standard
        bias where all are zero."""
        return self.calibrated_on(sample, sample)

    def calibrated_on(self, sample: Tensor, ends: Tensor) -> Self:
        """As :meth:`calibrated`; nothing but `ends` says what the largest value is."""
        if not self.calibrates:
            return self
        values, ends = thinned(finite(sample)), finite(ends)
        if not ends.any():
            return replace(self, exponent_bias=self.standard_bias)
        covering = self._covering(float(ends.abs().max()))
        return replace(self, exponent_bias=self._least_error(values, covering) if values.any() else covering)

    def _covering(self, largest: float) -> int:
        """The largest bias under which a positive value does not saturate."""
        fraction, exponent = math.frexp(largest)
        # With this bias, the largest step has the value's binade. One less where rounding leads to the next binade.
        bias = self.exponents - 1 - self.mantissa_width - (exponent - self.digits)
        bias -= int(round(math.ldexp(fraction, self.digits)) == 1 << self.digits)
        low, high = self.biases
        return min(max(bias, low), high)

    def _least_error(self, values: Tensor, covering: int) -> int:
        """The bias with the smallest squared error on `values`; the smaller one among equals, down to the standard."""

        def error(bias: int) -> float:
            return float(((replace(self, exponent_bias=bias).round(values) - values) ** 2).sum())

        def clipped(bias: int) -> float:
            """The error of saturation alone, which only grows with the bias."""
            return float(((values.clamp(*replace(self, exponent_bias=bias).bounds(values)) - values) ** 2).sum())

        # As long as nothing saturates, the values under a bias contain those under a smaller one.
        (low, high), bias = self.biases, covering
        best, least = bias, error(bias)
        while best > max(low, self.standard_bias) and error(best - 1) == least:
            best -= 1
        while bias < high and clipped(bias + 1) < least:
            bias += 1
            loss = error(bias)
            if loss < least:
                best, least = bias, loss
        return best
