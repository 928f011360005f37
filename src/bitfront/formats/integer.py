"""Fixed point: integers with a fixed binary point, one for a tensor, or one per channel or element.

The value of x is ``clamp(round(x·2^f), −2^(w−1), 2^(w−1)−1) / 2^f``, unsigned ``clamp(round(x·2^f), 0, 2^w−1) / 2^f``,
rounding half to even: the ``ap_fixed<w, w−f, AP_RND_CONV, AP_SAT>`` of high-level synthesis. Scaling by a power of two
is exact in floating point, so up to 24 bits the result is exact in float32. Hardware is smaller with other roundings
(AP_RND: half up, AP_TRN: floor) and other ways to treat what is out of range (AP_WRAP, AP_SAT_SYM).
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
from bitfront.kernels.whole import Rounding, whole, wrapped

#: Values that share a frac width.
Granularity = Literal["tensor", "channel", "element"]
#: What happens to a value that is out of range.
Overflow = Literal["saturate", "wrap", "saturate_symmetric"]
#: Most bits of a value.
WIDEST = 32
#: Bits that a frac width is stored in, where a tensor has several.
STORED_BITS = 8


@FORMATS.register("integer", "fixed", "int")
@dataclass(frozen=True)
class Integer(Format):
    """Fixed point: a whole number of `width` bits, divided by 2^frac_width.

    Attributes:
        width: bits of a value.
        frac_width: bits behind the binary point, for all values; the rule that learns them; or, once they are learned
            for several channels or elements, one for each of them, in the order of memory.
        signed: whether negative values exist.
        granularity: which values share a frac width.
        axis: the dimension of the channels; 0 unless there is a frac width per channel.
        shape: of several frac widths, as a tensor of them broadcasts against the first dimensions of the operand.
        rounding: how x·2^frac_width becomes a whole number.
        overflow: what happens to a whole number that is out of range.
    """

    width: int
    frac_width: int | Rule | tuple[int, ...]
    signed: bool = True
    granularity: Granularity = "tensor"
    axis: int = 0
    shape: tuple[int, ...] | None = None
    rounding: Rounding = "even"
    overflow: Overflow = "saturate"

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
        "rounding": FormatParameter(
            "how a value becomes a multiple of its step: 'even': the nearest one, half to even; 'half_up': the nearest "
            "one, half upwards, which is smaller in hardware; 'floor': the one below, which is smallest",
            default="even",
            words=get_args(Rounding),
        ),
        "overflow": FormatParameter(
            "what happens to a value out of range: 'saturate': it becomes the nearest end; 'wrap': it comes back on "
            "the other side, modulo 2^width, which takes no hardware, and a learned frac width leaves no calibration "
            "value out of range; 'saturate_symmetric': as 'saturate', and signed values end at -(2^(width-1) - 1)",
            default="saturate",
            words=get_args(Overflow),
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
        overflow = cast("Overflow", values["overflow"])
        # The input of a ReLU has no sign, as negative values may become 0; one that wraps becomes a large number.
        negative = (signed or overflow == "wrap") if chosen is None else bool(chosen)
        if overflow == "saturate_symmetric" and negative and width == 1:
            raise FormatError("a sign and a symmetric range leave only the value 0 in 1 bit")
        # What means the same is one format.
        if isinstance(frac, int) or (granularity == "channel" and kind.channel_axis is None):
            granularity = "tensor"
        if overflow == "saturate_symmetric" and not negative:
            overflow = "saturate"
        if overflow == "wrap" and frac == "percentile":
            frac = "minmax"
        return cls(
            width,
            cast("int | Rule", frac),
            negative,
            granularity,
            (kind.channel_axis or 0) if granularity == "channel" else 0,
            rounding=cast("Rounding", values["rounding"]),
            overflow=overflow,
        )

    @property
    def bits(self) -> int:
        """Bits of one stored value."""
        return self.width

    def overhead_bits(self, shape: tuple[int, ...]) -> int:
        """A byte per frac width where each channel or element has one."""
        if self.granularity == "tensor":
            return 0
        if self.granularity == "element":
            return STORED_BITS * math.prod(shape)
        dim = dimension(self.axis, len(shape))
        return 0 if dim is None else STORED_BITS * shape[dim]

    @property
    def rank(self) -> float:
        """First formats whose frac width is calibrated, then those with the point in the middle; those that wrap come
        last."""
        middle = abs(self.frac_width - self.width / 2) if isinstance(self.frac_width, int) else 0.0
        return middle if self.saturates else middle + 2 * HIGHEST_FRAC_WIDTH

    @property
    def has_sign(self) -> bool:
        """If negative values exist."""
        return self.signed

    @property
    def saturates(self) -> bool:
        """Unless it wraps."""
        return self.overflow != "wrap"

    @property
    def label(self) -> str:
        """E.g. ``int8.4`` or ``uint8.4``; before calibration e.g. ``int8.auto``. With a frac width per channel or
        element ``int8.auto-c`` and ``int8.auto-e``, after calibration with their range, ``int8.3..6-c``. Behind the
        dash there is also what is not the default: ``h`` for half up, ``f`` for floor, ``w`` for wrap, ``s`` for
        saturate_symmetric."""
        start = f"{'' if self.signed else 'u'}int"
        frac = _span(self.frac_width) if isinstance(self.frac_width, tuple) else self.frac_width
        defaults = (self.granularity, "tensor"), (self.rounding, "even"), (self.overflow, "saturate")
        letters = "".join(value[0] for value, default in defaults if value != default)
        return f"{start}{self.width}.{frac}{letters and f'-{letters}'}"

    @property
    def codes(self) -> tuple[int, int]:
        """The smallest and the largest integer before the binary point is applied."""
        if not self.signed:
            return 0, 2**self.width - 1
        high = 2 ** (self.width - 1) - 1
        return (-high if self.overflow == "saturate_symmetric" else -high - 1), high

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
        wraps = not self.saturates
        fracs = learned_frac_widths(values, ends, self.width, self.codes, rule, rounding=self.rounding, wraps=wraps)
        return tuple(fracs.tolist())

    def round(self, x: Tensor) -> Tensor:
        """`x` rounded to the grid of step 2^−frac_width, as `rounding` and `overflow` say."""
        if self.shape is not None or not self.saturates:
            return self.grid.round(x)
        low, high = self.codes
        scale = math.ldexp(1.0, self._frac())
        return torch.clamp(whole(x * scale, self.rounding), low, high) / scale

    @property
    def grid(self) -> Grid:
        """Step 2^−frac_width, one for all values, or per channel or element; no zero point."""
        return self._with_step(math.ldexp(1.0, -self._frac())) if self.shape is None else self._grid

    def _with_step(self, step: float | Tensor, block: tuple[int, ...] = ()) -> Grid:
        return Grid(step, *self.codes, block=block, rounds=self.rounding, wraps=not self.saturates)

    @cached_property
    def _grid(self) -> Grid:
        """That of several frac widths. Where they are all equal, it has one step, as evaluation is faster then."""
        assert self.shape is not None
        assert isinstance(self.frac_width, tuple)
        if len(set(self.frac_width)) <= 1:
            return self._with_step(math.ldexp(1.0, -next(iter(self.frac_width), 0)))
        # A Grid has an element per index of the dimensions that differ, and names no dimension behind them.
        last = max(d for d, size in enumerate(self.shape) if size > 1)
        shape = self.shape[: last + 1]
        block = tuple(1 if size > 1 else WHOLE for size in shape)
        steps = [math.ldexp(1.0, -frac) for frac in self.frac_width]
        step = torch.tensor(steps, dtype=torch.float64).reshape(shape)
        return self._with_step(step, block)

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
        step = torch.exp2(self._used())
        if step.dim():
            step = step.reshape(*step.shape, *[1] * (x.dim() - step.dim()))
        steps, codes = x / step, self.start.codes
        if self.start.saturates:
            return rounded(steps, *codes, self.start.rounding) * step
        low, high = (torch.tensor(float(code), dtype=torch.float64, device=x.device) for code in codes)
        inside = wrapped(whole(steps.detach().double(), self.start.rounding), low, high).to(x.dtype)
        return (inside - (steps.detach() - steps)) * step

    def settle(self) -> None:
        """Stop learning the exponents."""
        self.settled.copy_(self._used().detach())

    def frozen(self) -> Integer:
        """The learned range as a format."""
        fracs = (-self._used().detach()).round().long().flatten().tolist()
        return replace(self.start, frac_width=fracs[0] if self.start.shape is None else tuple(fracs))


def _span(numbers: tuple[int, ...]) -> str:
    """The smallest and the largest of some numbers."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}..{high}"
