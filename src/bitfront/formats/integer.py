"""Fixed point: integers with a fixed binary point, one for a tensor, or one per channel or element.

The value of x is ``clamp(round(x·2^f), −2^(w−1), 2^(w−1)−1) / 2^f``, unsigned ``clamp(round(x·2^f), 0, 2^w−1) / 2^f``,
rounding half to even: the ``ap_fixed<w, w−f, AP_RND_CONV, AP_SAT>`` of high-level synthesis. Scaling by a power of two
is exact in floating point, so up to 24 bits the result is exact in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from bitfront.formats import FORMATS
from bitfront.formats.base import Format, FormatError, FormatParameter, OperandKind, channel_rows, dimension, finite
from bitfront.formats.frac_widths import HIGHEST_FRAC_WIDTH, LOWEST_FRAC_WIDTH, Rule, learned_frac_widths
from bitfront.formats.grid import WHOLE, Grid
from bitfront.formats.learned import LearnedRange, rounded, straight_through

#: Values that share a frac width.
Granularity = Literal["tensor", "channel", "element"]
#: Most bits of a value.
WIDEST = 32
#: Bits that a frac width is stored in, where a tensor has several.
STORED_BITS = 8


@FORMATS.register("integer", "fixed", "int")
@dataclass(frozen=True)
class Integer(Format):
    """Fixed point: a whole number of `width` bits, divided by 2^frac_width.

    Attributes:
        width: bits of a value; of the widest one where widths differ.
        frac_width: bits behind the binary point, for all values; the rule that learns them; or, once they are learned
            for several channels or elements, one for each of them, in the order of memory.
        signed: whether negative values exist.
        granularity: which values share a frac width.
        axis: the dimension of the channels; 0 unless there is a frac width per channel.
        shape: of several frac widths, as a tensor of them broadcasts against the first dimensions of the operand.
        widths: bits of each value where they differ, one for each frac width; 0 for a value that is always 0. See
            :meth:`of_arrays`.
    """

    width: int
    frac_width: int | Rule | tuple[int, ...]
    signed: bool = True
    granularity: Granularity = "tensor"
    axis: int = 0
    shape: tuple[int, ...] | None = None
    widths: tuple[int, ...] | None = None

    parameters: ClassVar[Mapping[str, FormatParameter]] = {
        "width": FormatParameter("bits of a value, sign included", low=1, high=WIDEST),
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
        "granularity": FormatParameter(
            "one learned frac width per 'tensor' ('NA'), per 'channel', or per 'element' of a weight or bias; with a "
            "number as frac_width there is one for all",
            default=None,
            words=("NA", *get_args(Granularity)),
        ),
    }

    @classmethod
    def _build(cls, values: Mapping[str, object], kind: OperandKind, signed: bool) -> Self:
        width = cast(int, values["width"])
        frac = values["frac_width"]
        frac = width // 2 if frac is None else frac
        chosen = values["signed"]
        granularity = cast("Granularity", values["granularity"] or "tensor")
        if granularity == "element" and kind.samples:
            raise FormatError(
                f"'element' is for weights and biases that are parameters, not for {kind}; take 'channel' there",
                "granularity",
            )
        if isinstance(frac, int) or (granularity == "channel" and kind.channel_axis is None):
            granularity = "tensor"  # what means the same is one format
        return cls(
            width,
            cast("int | Rule", frac),
            signed if chosen is None else bool(chosen),
            granularity,
            (kind.channel_axis or 0) if granularity == "channel" else 0,
        )

    @classmethod
    def of_arrays(cls, width: Tensor, frac_width: Tensor, *, signed: bool = True) -> Self:
        """A format with a width and a frac width for each value, or for some values each, as learned bit-widths need.

        It is calibrated, and no setting of a TOML. A value of 0 bits is always 0.

        Args:
            width: whole numbers from 0 to 32; its shape broadcasts against the operand, with as many dimensions, or
                with the first ones only. For an input the first size is 1.
            frac_width: whole numbers from -96 to 96; its shape broadcasts against that of `width`.
            signed: whether negative values exist.

        Raises:
            FormatError: a number is out of range, no whole number, or there is none.
        """
        shape = torch.broadcast_shapes(width.shape, frac_width.shape)  # type: ignore[no-untyped-call]
        widths, fracs = (given.detach().cpu().broadcast_to(shape) for given in (width, frac_width))
        _check_array("width", widths, 0, WIDEST)
        _check_array("frac_width", fracs, LOWEST_FRAC_WIDTH, HIGHEST_FRAC_WIDTH)
        return cls(
            max(1, int(widths.max())),
            tuple(int(f) for f in fracs.flatten().tolist()),
            signed,
            "element",
            shape=tuple(widths.shape) or (1,),
            widths=tuple(int(w) for w in widths.flatten().tolist()),
        )

    @property
    def bits(self) -> int:
        """Bits of one stored value; of the widest one where they differ."""
        return self.width

    def bits_of(self, shape: tuple[int, ...]) -> int:
        """Bits of all values of a tensor: the sum of their widths."""
        if self.widths is None:
            return super().bits_of(shape)
        return sum(self.widths) * math.prod(shape) // len(self.widths)

    def overhead_bits(self, shape: tuple[int, ...]) -> int:
        """A byte per frac width where each channel or element has one. None where widths differ too: values of
        different widths are wired, not stored."""
        if self.granularity == "tensor" or self.widths is not None:
            return 0
        if self.granularity == "element":
            return STORED_BITS * math.prod(shape)
        dim = dimension(self.axis, len(shape))
        return 0 if dim is None else STORED_BITS * shape[dim]

    @property
    def rank(self) -> float:
        """First formats whose frac width is calibrated, then those with the point in the middle."""
        return abs(self.frac_width - self.width / 2) if isinstance(self.frac_width, int) else 0.0

    @property
    def label(self) -> str:
        """E.g. ``int8.4`` or ``uint8.4``; before calibration e.g. ``int8.auto``. With a frac width per channel or
        element ``int8.auto-c`` and ``int8.auto-e``, after calibration with their range, ``int8.3..6-c``; where widths
        differ with the range of these, ``int0..6-e``."""
        start = f"{'' if self.signed else 'u'}int"
        if self.widths is not None:
            return f"{start}{_span(self.widths)}-e"
        frac = _span(self.frac_width) if isinstance(self.frac_width, tuple) else self.frac_width
        return f"{start}{self.width}.{frac}{'' if self.granularity == 'tensor' else f'-{self.granularity[0]}'}"

    @property
    def codes(self) -> tuple[int, int]:
        """The smallest and the largest integer before the binary point is applied; of the widest value."""
        return _codes(self.width, self.signed)

    @property
    def calibrates(self) -> bool:
        """True while the frac width is a word."""
        return isinstance(self.frac_width, str)

    def calibrated(self, sample: Tensor) -> Self:
        """With the frac widths that the rule finds in the finite values of `sample`; width // 2 where all are zero."""
        return self.calibrated_on(sample, sample)

    def calibrated_on(self, sample: Tensor, ends: Tensor) -> Self:
        """As :meth:`calibrated`; nothing but `ends` says what the largest values are."""
        rule = self.frac_width
        if not isinstance(rule, str):
            return self
        if self.granularity == "element" and sample.dim():
            rows = sample.detach().reshape(-1, 1)
            return replace(self, frac_width=self._learned(rows, rows, rule), shape=tuple(sample.shape))
        dim = dimension(self.axis, sample.dim()) if self.granularity == "channel" else None
        if dim is None:
            (frac,) = self._learned(finite(sample)[None], finite(ends)[None], rule)
            return replace(self, frac_width=frac)
        fracs = self._learned(channel_rows(sample, dim), channel_rows(ends, dim), rule)
        return replace(self, frac_width=fracs, axis=dim, shape=(*[1] * dim, len(fracs)))

    def _learned(self, values: Tensor, ends: Tensor, rule: Rule) -> tuple[int, ...]:
        return tuple(learned_frac_widths(values, ends, self.width, self.codes, rule).tolist())

    def round(self, x: Tensor) -> Tensor:
        """`x` rounded half to even to the grid of step 2^−frac_width, saturating."""
        if self.shape is not None:
            return self.grid.round(x)
        low, high = self.codes
        scale = math.ldexp(1.0, self._frac())
        return torch.clamp(torch.round(x * scale), low, high) / scale

    @property
    def grid(self) -> Grid:
        """Step 2^−frac_width, one for all values, or per channel or element; no zero point."""
        return Grid(math.ldexp(1.0, -self._frac()), *self.codes) if self.shape is None else self._grid

    @cached_property
    def _grid(self) -> Grid:
        """That of several frac widths. Where they are all equal, it has one step, as evaluation is faster then."""
        assert self.shape is not None
        assert isinstance(self.frac_width, tuple)
        pairs = set(zip(self.frac_width, self.widths or (self.width,) * len(self.frac_width), strict=True))
        if len(pairs) <= 1:
            frac, width = pairs.pop() if pairs else (0, self.width)
            return Grid(math.ldexp(1.0, -frac), *_codes(width, self.signed))
        # A Grid has an element per index of the dimensions that differ, and names no dimension behind them.
        last = max(d for d, size in enumerate(self.shape) if size > 1)
        shape = self.shape[: last + 1]
        block = tuple(1 if size > 1 else WHOLE for size in shape)
        steps = [math.ldexp(1.0, -frac) for frac in self.frac_width]
        step = torch.tensor(steps, dtype=torch.float64).reshape(shape)
        if self.widths is None:
            return Grid(step, *self.codes, block=block)
        low, high = torch.tensor([_codes(width, self.signed) for width in self.widths]).T
        return Grid(step, low.reshape(shape), high.reshape(shape), block=block)

    def bounds(self, x: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """The smallest and the largest representable value, per channel or element where they differ."""
        if self.shape is not None:
            return self.grid.ends(x)
        low, high = self.codes
        scale = math.ldexp(1.0, self._frac())
        return low / scale, high / scale

    def learned_range(self) -> LearnedInteger:
        """A module that learns the frac widths."""
        return LearnedInteger(self)

    def _frac(self) -> int:
        if not isinstance(self.frac_width, int):
            raise FormatError(f"frac_width = {self.frac_width!r} must be calibrated before it is used", "frac_width")
        return self.frac_width


class LearnedInteger(LearnedRange):
    """Fixed point with frac widths that are learned.

    Args:
        start: calibrated; the first range.
    """

    def __init__(self, start: Integer) -> None:
        super().__init__()
        self.start = start
        fracs = torch.tensor(start.frac_width, dtype=torch.float32)
        self.exponent = nn.Parameter(-fracs.reshape(start.shape or ()))
        #: The exponents once they are settled; NaN before. They are in the state dict, because they are a result of
        #: training.
        self.settled: Tensor
        self.register_buffer("settled", torch.full_like(self.exponent.detach(), math.nan))

    def _used(self) -> Tensor:
        limited = self.exponent.clamp(-HIGHEST_FRAC_WIDTH, -LOWEST_FRAC_WIDTH)
        return torch.where(self.settled.isnan(), straight_through(torch.round(limited), limited), self.settled)

    def quantize(self, x: Tensor) -> Tensor:
        """`x` rounded to the grid of the current exponents."""
        grid, step = self.start.grid, torch.exp2(self._used())
        low, high = (e if isinstance(e, int) else grid.along(e, x) for e in (grid.low, grid.high))
        if step.dim():
            step = step.reshape(*step.shape, *[1] * (x.dim() - step.dim()))
        return rounded(x / step, low, high) * step

    def settle(self) -> None:
        """Stop learning the exponents."""
        self.settled.copy_(self._used().detach())

    def frozen(self) -> Integer:
        """The learned range as a format."""
        fracs = (-self._used().detach()).round().long().flatten().tolist()
        return replace(self.start, frac_width=fracs[0] if self.start.shape is None else tuple(fracs))


def _codes(width: int, signed: bool) -> tuple[int, int]:
    """The smallest and the largest integer of so many bits."""
    if not (width and signed):
        return 0, 2**width - 1
    return -(2 ** (width - 1)), 2 ** (width - 1) - 1


def _span(numbers: tuple[int, ...]) -> str:
    """The smallest and the largest of some numbers."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}..{high}"


def _check_array(name: str, values: Tensor, low: int, high: int) -> None:
    """Raises FormatError unless all of at least one values are whole numbers in a range."""
    whole = bool((values == values.round()).all()) if values.is_floating_point() else values.dtype != torch.bool
    if not values.numel() or not whole or not low <= int(values.min()) <= int(values.max()) <= high:
        raise FormatError(f"{name} must hold whole numbers from {low} to {high}, at least one", name)
