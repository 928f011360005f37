"""Fixed point: integers with a fixed binary point.

The value of x is ``clamp(round(x·2^f), −2^(w−1), 2^(w−1)−1) / 2^f``, unsigned ``clamp(round(x·2^f), 0, 2^w−1) / 2^f``,
rounding half to even: the ``ap_fixed<w, w−f, AP_RND_CONV, AP_SAT>`` of high-level synthesis. Scaling by a power of two
is exact in floating point, so up to 24 bits the result is exact in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from bitfront.formats import FORMATS
from bitfront.formats.base import Format, FormatError, FormatParameter, OperandKind, finite, percentile_range, thinned
from bitfront.formats.grid import Grid
from bitfront.formats.learned import LearnedRange, rounded, straight_through

#: Any step from 2^-96 to 2^96: with codes of up to 32 bits, all values are float32's.
LOWEST_FRAC_WIDTH, HIGHEST_FRAC_WIDTH = -96, 96
#: How a frac width is learned.
Rule = Literal["auto", "minmax", "percentile"]


@FORMATS.register("integer", "fixed", "int")
@dataclass(frozen=True)
class Integer(Format):
    """Fixed point: a whole number of `width` bits, divided by 2^frac_width."""

    width: int
    frac_width: int | Rule
    signed: bool = True

    parameters: ClassVar[Mapping[str, FormatParameter]] = {
        "width": FormatParameter("bits of a value, sign included", low=1, high=32),
        "frac_width": FormatParameter(
            "bits behind the binary point, more than `width` for small values, negative for large ones; 'NA' is "
            "width // 2; learned from the calibration samples: 'auto' is the one with the smallest squared error, "
            "'minmax' the largest at which nothing is cut off, 'percentile' the largest at which 99.9 % of the "
            "absolute values are not",
            default=None,
            low=LOWEST_FRAC_WIDTH,
            high=HIGHEST_FRAC_WIDTH,
            words=("NA", *get_args(Rule)),
        ),
        "signed": FormatParameter(
            "whether negative values exist; 'NA' is true, except for the input of a ReLU",
            default=None,
            words=("NA",),
            boolean=True,
        ),
    }

    @classmethod
    def _build(cls, values: Mapping[str, object], kind: OperandKind, signed: bool) -> Self:  # noqa: ARG003
        width = cast(int, values["width"])
        frac = values["frac_width"]
        frac = width // 2 if frac is None else frac
        own = values["signed"]
        return cls(width, cast("int | Rule", frac), signed if own is None else bool(own))

    @property
    def bits(self) -> int:
        """Bits of one stored value."""
        return self.width

    @property
    def rank(self) -> float:
        """First formats whose frac width is calibrated, then those with the point in the middle."""
        return abs(self.frac_width - self.width / 2) if isinstance(self.frac_width, int) else 0.0

    @property
    def label(self) -> str:
        """E.g. ``int8.4`` or ``uint8.4``; before calibration e.g. ``int8.auto``."""
        return f"{'' if self.signed else 'u'}int{self.width}.{self.frac_width}"

    @property
    def codes(self) -> tuple[int, int]:
        """The smallest and the largest integer before the binary point is applied."""
        return (-(2 ** (self.width - 1)), 2 ** (self.width - 1) - 1) if self.signed else (0, 2**self.width - 1)

    @property
    def calibrates(self) -> bool:
        """True while the frac width is a word."""
        return not isinstance(self.frac_width, int)

    def calibrated(self, sample: Tensor) -> Self:
        """With the frac width that the rule finds in the finite values of `sample`; width // 2 where all are zero."""
        return self.calibrated_on(sample, sample)

    def calibrated_on(self, sample: Tensor, ends: Tensor) -> Self:
        """As :meth:`calibrated`; nothing but `ends` says what the largest values are."""
        if not self.calibrates:
            return self
        values, ends = finite(sample), finite(ends)
        # An unsigned format cuts off negative values on purpose, so they do not count for the frac width.
        seen, ends = (values, ends) if self.signed else (values.clamp(min=0), ends.clamp(min=0))
        if not ends.any():
            return replace(self, frac_width=self.width // 2)
        if self.frac_width == "auto":
            part = thinned(values)
            if (part != 0 if self.signed else part > 0).any():
                return replace(self, frac_width=self._least_error(part))
        low, high = percentile_range(seen, ends) if self.frac_width == "percentile" else _ends(ends)
        return replace(self, frac_width=self._covering(low, high))

    def _covering(self, smallest: float, largest: float) -> int:
        """The largest frac width under which both ends, one of which is not zero, round without saturating."""
        low, high = self.codes
        beyond = self.width + 1 - math.frexp(max(-smallest, largest))[1]
        frac = max(LOWEST_FRAC_WIDTH, min(HIGHEST_FRAC_WIDTH, beyond))
        while frac > LOWEST_FRAC_WIDTH and not (
            low <= round(smallest * 2.0**frac) and round(largest * 2.0**frac) <= high
        ):
            frac -= 1
        return frac

    def _least_error(self, values: Tensor) -> int:
        """The frac width with the smallest squared error on `values`; the smaller one among equals."""
        low, high = self.codes

        def error(frac: int) -> float:
            return float(((replace(self, frac_width=frac).round(values) - values) ** 2).sum())

        def clipped(frac: int) -> float:
            """The error of saturation alone, which only grows with the frac width."""
            scale = math.ldexp(1.0, frac)
            return float(((values.clamp(low / scale, high / scale) - values) ** 2).sum())

        # As long as nothing saturates, a finer grid contains the coarser one, so its error is not larger.
        frac = self._covering(*_ends(values))
        best, least = frac, error(frac)
        while best > LOWEST_FRAC_WIDTH and error(best - 1) == least:
            best -= 1
        while frac < HIGHEST_FRAC_WIDTH and clipped(frac + 1) < least:
            frac += 1
            loss = error(frac)
            if loss < least:
                best, least = frac, loss
        return best

    def round(self, x: Tensor) -> Tensor:
        """`x` rounded half to even to the grid of step 2^−frac_width, saturating."""
        low, high = self.codes
        scale = math.ldexp(1.0, self._frac())
        return torch.clamp(torch.round(x * scale), low, high) / scale

    @property
    def grid(self) -> Grid:
        """Step 2^−frac_width, one for all values; no zero point."""
        return Grid(math.ldexp(1.0, -self._frac()), *self.codes)

    def bounds(self, x: Tensor) -> tuple[float, float]:  # noqa: ARG002
        """The smallest and the largest representable value."""
        low, high = self.codes
        scale = math.ldexp(1.0, self._frac())
        return low / scale, high / scale

    def learned_range(self) -> LearnedInteger:
        """A module that learns the frac width."""
        return LearnedInteger(self)

    def _frac(self) -> int:
        if not isinstance(self.frac_width, int):
            raise FormatError(f"frac_width = {self.frac_width!r} must be calibrated before it is used", "frac_width")
        return self.frac_width


class LearnedInteger(LearnedRange):
    """Fixed point with a frac width that is learned.

    Args:
        start: calibrated; the first range.
    """

    def __init__(self, start: Integer) -> None:
        super().__init__()
        self.start = start
        self.exponent = nn.Parameter(torch.tensor(-float(start.frac_width)))
        #: The exponent once it is settled; NaN before. It is in the state dict, because it is a result of training.
        self.settled: Tensor
        self.register_buffer("settled", torch.tensor(math.nan))

    def _used(self) -> Tensor:
        limited = self.exponent.clamp(-HIGHEST_FRAC_WIDTH, -LOWEST_FRAC_WIDTH)
        return torch.where(self.settled.isnan(), straight_through(torch.round(limited), limited), self.settled)

    def quantize(self, x: Tensor) -> Tensor:
        """`x` rounded to the grid of the current exponent."""
        low, high = self.start.codes
        step = torch.exp2(self._used())
        return rounded(x / step, low, high) * step

    def settle(self) -> None:
        """Stop learning the exponent."""
        self.settled.copy_(self._used().detach())

    def frozen(self) -> Integer:
        """The learned range as a format."""
        return replace(self.start, frac_width=-round(float(self._used().detach())))


def _ends(values: Tensor) -> tuple[float, float]:
    return float(values.min()), float(values.max())
