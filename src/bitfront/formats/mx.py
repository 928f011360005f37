"""Microscaling (MX): small floating-point numbers or integers, 32 of which share a power of two.

OCP Microscaling Formats Specification v1.0 (2023): MXFP8 (e4m3, e5m2), MXFP6 (e2m3, e3m2), MXFP4 (e2m1) and MXINT8,
with blocks of 32 and scales of 8 bits without mantissa (e8m0). The scale is X = 2^(⌊log2 max⌋ − emax) of the block's
largest absolute value, where emax is the exponent of the largest number of an element (section 6.3); the value of x is
X times the nearest element to x / X, half to even, saturating. Elements have no infinities or NaN here, and MXINT8
leaves out −2, as the specification allows, so that its range is symmetric.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self, cast

from bitfront.formats import FORMATS
from bitfront.formats.base import FormatError, FormatParameter, OperandKind
from bitfront.formats.blocks import BlockFormat
from bitfront.formats.grid import WHOLE
from bitfront.kernels.scaled import HIGHEST, LOWEST, ScaledRounding, Unit

#: Values that share a scale.
BLOCK = 32
#: Bits of a scale.
SCALE_BITS = 8


class Element(NamedTuple):
    """What is stored of a value.

    Attributes:
        name: as in the specification.
        mantissa: bits behind the binary point.
        emin, emax: the exponents of the smallest normal and of the largest number; both 0 for an integer.
        largest: the largest number.
    """

    name: str
    mantissa: int
    emin: int
    emax: int
    largest: float


#: (width, exponent width) → element (section 5.3 of the specification). The first of a width is its default.
ELEMENTS: Mapping[tuple[int, int], Element] = {
    (8, 4): Element("e4m3", 3, -6, 8, 448.0),
    (8, 5): Element("e5m2", 2, -14, 15, 57344.0),
    (8, 0): Element("int8", 6, 0, 0, 2 - 2.0**-6),
    (6, 2): Element("e2m3", 3, 0, 2, 7.5),
    (6, 3): Element("e3m2", 2, -2, 4, 28.0),
    (4, 2): Element("e2m1", 1, 0, 2, 6.0),
}


@FORMATS.register("mx")
@dataclass(frozen=True)
class Mx(BlockFormat):
    """Microscaling (OCP MX v1.0): elements of 8, 6 or 4 bits, and one scale per 32 of them."""

    exponent_width: int
    axis: int | None
    #: Where the axis is not given: the dimension of the sums; None: as the parameter says.
    summed: int | None = None

    parameters: ClassVar[Mapping[str, FormatParameter]] = {
        "width": FormatParameter("bits of an element: 8, 6 or 4", low=4, high=8),
        "exponent_width": FormatParameter(
            "bits of an element's exponent: 4 (e4m3), 5 (e5m2) or 0 (int8) of 8 bits, 2 (e2m3) or 3 (e3m2) of 6 bits, "
            "2 (e2m1) of 4 bits; 'NA' is the first of these",
            default=None,
            low=0,
            high=5,
            words=("NA",),
        ),
        "axis": FormatParameter(
            "the dimension along which 32 neighbours share a scale, which should be that of the sums; 'NA' is that of "
            "the sums where the operation knows it, else the last one, and that of the channels, 1, for kernels of "
            "convolutions and for inputs with 4 or more dimensions; not 0 for inputs",
            default=None,
            low=-4,
            high=4,
            words=("NA",),
        ),
    }

    @classmethod
    def _build(cls, values: Mapping[str, object], kind: OperandKind, signed: bool) -> Self:  # noqa: ARG003
        width, exponent_width = cast(int, values["width"]), values["exponent_width"]
        if exponent_width is None:
            exponent_width = next((e for w, e in ELEMENTS if w == width), None)
        if (width, exponent_width) not in ELEMENTS:
            known = ", ".join(f"{element.name} ({w} bits)" for (w, _), element in ELEMENTS.items())
            chosen = "" if exponent_width is None else f" with exponent_width = {exponent_width}"
            raise FormatError(f"MX has no element of {width} bits{chosen}; it has {known}")
        samples, axis = kind.samples, cast("int | None", values["axis"])
        if samples and axis == 0:
            raise FormatError("axis = 0 is not possible: it is the samples, and they share no scale", "axis")
        return cls(width, samples, cast(int, exponent_width), axis, None if samples else kind.sums)

    @property
    def element(self) -> Element:
        """What is stored of a value."""
        return ELEMENTS[self.width, self.exponent_width]

    @property
    def label(self) -> str:
        """E.g. ``mx-e4m3``; with an axis that is not the default ``mx-e4m3.0``."""
        return f"mx-{self.element.name}" + ("" if self.axis is None else f".{self.axis}")

    @property
    def shared_bits(self) -> int:
        """Those of a scale."""
        return SCALE_BITS

    @property
    def rounding(self) -> ScaledRounding:
        """To elements times the scale of the block."""
        element, integer = self.element, self.exponent_width == 0
        # An integer's step is a part of the scale, and must be a number of float32 too.
        low = LOWEST + (element.mantissa if integer else 0)
        unit = Unit(2.0**-element.emax, 2.0**low, 2.0**HIGHEST)
        if integer:
            return ScaledRounding("multiples", 2.0**-element.mantissa, 1.0, element.largest, unit=unit)
        ends = 2.0**element.emin, 2.0**element.emax
        return ScaledRounding("floats", *ends, element.largest, element.mantissa, unit)

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """32 along one dimension; no two samples share."""
        dims = len(shape)
        axis = self.summed if self.axis is None else self.axis
        if axis is None:
            axis = 1 if dims >= (4 if self.samples else 3) else -1
        axis = min(max(axis + dims if axis < 0 else axis, 0), dims - 1)
        shares = not (self.samples and axis == 0)
        along = WHOLE if dims and shape[axis] <= BLOCK else BLOCK
        return tuple(along if dim == axis and shares else 1 for dim in range(dims))
