"""Affine integers: a scale and a zero point per tensor, channel or group, as ONNX QuantizeLinear defines them.

The value of x is ``(saturate(round(x / scale) + zero_point) − zero_point) · scale``, rounding half to even (ONNX
operator QuantizeLinear, opset 21). The scale comes from the calibration samples: the full range (``minmax``), or the
part of it that covers 99.9 % of the absolute values (``percentile``), minimises the squared error (``mse``), or the
divergence of the quantized histogram (``entropy``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from bitfront.formats import FORMATS
from bitfront.formats.base import (
    FLOAT_BITS,
    Format,
    FormatError,
    FormatParameter,
    OperandKind,
    all_finite,
    channel_rows,
    dimension,
    finite,
    thinned_rows,
)
from bitfront.formats.grid import WHOLE, Grid
from bitfront.formats.groups import (
    block_of,
    check_kind,
    dimensions,
    grouped,
    known,
    laid,
    number_of_groups,
    size_parameter,
)
from bitfront.formats.learned import LearnedRange, rounded
from bitfront.formats.ranges import SHRINKS, entropy_reach, least_error, percentile_ends
from bitfront.formats.scales import SMALLEST_SCALE

Range = Literal["minmax", "percentile", "mse", "entropy"]
_RANGES: Mapping[object, Range] = {
    None: "minmax",
    "minmax": "minmax",
    "percentile": "percentile",
    "mse": "mse",
    "entropy": "entropy",
    "auto": "mse",
}


@FORMATS.register("affine")
@dataclass(frozen=True)
class Affine(Format):
    """Integers with a scale and a zero point, per tensor, channel or group (ONNX QuantizeLinear)."""

    width: int
    symmetric: bool
    granularity: Literal["tensor", "channel", "group"]
    range: Range
    axis: int
    scale: tuple[float, ...] | None = None
    zero_point: tuple[int, ...] | None = None
    #: Of groups: how many neighbours along the input dimension are one, and the shape of scales and zero points.
    group_size: int | None = None
    shape: tuple[int, ...] | None = None
    #: Of groups: the dimension of the sums; None: dimension 1.
    summed: int | None = None

    parameters: ClassVar[Mapping[str, FormatParameter]] = {
        "width": FormatParameter("bits of a value", low=2, high=16),
        "symmetric": FormatParameter(
            "zero point fixed at 0; 'NA' is true for weights and biases, false for inputs",
            default=None,
            words=("NA",),
            boolean=True,
        ),
        "granularity": FormatParameter(
            "one scale per 'tensor', per 'channel', or per 'group' of `group_size`; 'NA' is per group if there is a "
            "group_size, else per channel for weights that are parameters, else per tensor",
            default=None,
            words=("NA", "tensor", "channel", "group"),
        ),
        "group_size": size_parameter(
            "neighbours along the input dimension that share a scale, for weights that are parameters; the last group "
            "may be shorter",
            None,
        ),
        "range": FormatParameter(
            "the scale covers the whole range of the calibration samples ('minmax', 'NA'), the part of it that holds "
            "99.9 % of the absolute values ('percentile'), that with the smallest squared error ('mse', 'auto'), or "
            "that with the smallest Kullback-Leibler divergence ('entropy', for inputs with one scale)",
            default=None,
            words=("NA", "minmax", "percentile", "mse", "entropy", "auto"),
        ),
    }

    @classmethod
    def _build(cls, values: Mapping[str, object], kind: OperandKind, signed: bool) -> Self:  # noqa: ARG003
        symmetric, granularity, size = values["symmetric"], values["granularity"], values["group_size"]
        if granularity == "group" or size is not None:
            check_kind(kind, "granularity" if size is None else "group_size")
            if size is None or granularity not in (None, "group"):
                raise FormatError(
                    f"granularity = {granularity or 'NA'!r} does not go with group_size = {size or 'NA'!r}"
                )
            granularity = "group"
        elif granularity is None:
            granularity = "channel" if kind.stored_weight else "tensor"
        if granularity == "channel" and kind.channel_axis is None:
            granularity = "tensor"
        if values["range"] == "entropy" and (not kind.samples or granularity == "channel"):
            what = "one scale per channel" if kind.samples else kind
            raise FormatError(f"'entropy' is for inputs with one scale, not for {what}; take 'mse' there", "range")
        return cls(
            width=cast(int, values["width"]),
            symmetric=kind.role != "activation" if symmetric is None else bool(symmetric),
            granularity=cast("Literal['tensor', 'channel', 'group']", granularity),
            range=_RANGES[values["range"]],
            axis=kind.channel_axis or 0,
            group_size=cast("int | None", size),
            summed=kind.sums if granularity == "group" else None,
        )

    @property
    def bits(self) -> int:
        """Bits of one stored value."""
        return self.width

    def overhead_bits(self, shape: tuple[int, ...]) -> int:
        """A float32 scale per tensor, channel or group, and a zero point of `width` bits if it is not fixed at 0."""
        dim = self._channels(len(shape))
        scales = 1 if dim is None else shape[dim]
        if self.group_size is not None:
            scales = number_of_groups(shape, self.group_size, self.axis, self.summed)
        return scales * (FLOAT_BITS + (0 if self.symmetric else self.width))

    @property
    def has_sign(self) -> bool:
        """Codes without a zero point are signed, others are not."""
        return self.symmetric

    @property
    def label(self) -> str:
        """E.g. ``affine8`` (asymmetric, per tensor), ``affine8sc`` (symmetric, per channel), ``affine4sg64`` (groups
        of 64), ``affine8-mse``, ``affine8-p99.9``, ``affine8-kl``."""
        rule = {"minmax": "", "percentile": "-p99.9", "mse": "-mse", "entropy": "-kl"}[self.range]
        part = {"tensor": "", "channel": "c", "group": f"g{self.group_size}"}[self.granularity]
        return f"affine{self.width}{'s' * self.symmetric}{part}{rule}"

    @property
    def codes(self) -> tuple[int, int]:
        """The smallest and the largest integer: signed where symmetric, unsigned otherwise."""
        return (-(2 ** (self.width - 1)), 2 ** (self.width - 1) - 1) if self.symmetric else (0, 2**self.width - 1)

    @property
    def calibrates(self) -> bool:
        """True while there is no scale."""
        return self.scale is None

    def calibrated(self, sample: Tensor) -> Self:
        """With scale and zero point from the finite values of `sample`; its channels lie along `axis`. The smallest
        scale there is for a channel that has none but zeros."""
        return self.calibrated_on(sample, sample)

    def calibrated_on(self, sample: Tensor, ends: Tensor) -> Self:
        """As :meth:`calibrated`; nothing but `ends` says what the largest values are."""
        if not self.calibrates:
            return self
        if self.group_size is not None:
            return self._by_group(sample, self.group_size)
        dim = self._channels(sample.dim())
        rows = channel_rows(sample, dim)
        outer = rows if ends is sample else channel_rows(ends, dim)
        if all_finite(rows) and (outer is rows or all_finite(outer)):
            scale, zero = self._learned(rows, outer)
        else:
            pairs = [self._learned(finite(r)[None], finite(o)[None]) for r, o in zip(rows, outer, strict=True)]
            scale, zero = (torch.cat(each) for each in zip(*pairs, strict=True))
        axis = self.axis if dim is None else dim
        return replace(self, scale=tuple(scale.tolist()), zero_point=tuple(zero.tolist()), axis=axis)

    def _channels(self, rank: int) -> int | None:
        """The dimension of a tensor of this rank that has a scale per index; None: there is none."""
        return dimension(self.axis, rank) if self.granularity == "channel" else None

    def _learned(self, rows: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points of some rows of finite values; the largest values of each are those of `outer`."""
        if not outer.shape[1]:
            return self._cover(*torch.zeros(2, len(outer), dtype=torch.float64))
        low, high = outer.amin(dim=1).double(), outer.amax(dim=1).double()
        if self.range == "entropy":
            low, high = self._least_divergence(rows, low, high)
        elif self.range != "minmax":
            rows = thinned_rows(rows)
            if self.range == "percentile" and rows.shape[1]:
                low, high = percentile_ends(rows, low, high)
        # Zero must be representable, or padding and ReLU would shift.
        low, high = low.clamp(max=0), high.clamp(min=0)
        return self._least_error(rows, low, high) if self.range == "mse" else self._cover(low, high)

    def _least_divergence(self, rows: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of one row, cut to what ``entropy_reach`` says. An unsigned range has all codes for its values."""
        one_sided = not self.symmetric and bool(low >= 0)
        largest = float(torch.maximum(-low, high))
        reach = entropy_reach(rows, largest, 2**self.width if one_sided else 2 ** (self.width - 1))
        return low.clamp(min=-reach), high.clamp(max=reach)

    def _by_group(self, sample: Tensor, size: int) -> Self:
        """With a scale and a zero point per group; nothing but the finite values of a group decides them."""
        rows, inputs = dimensions(sample.dim(), self.axis, self.summed)
        values = grouped(sample, size, rows, inputs)
        finite_values = known(values)
        low, high = finite_values.amin(dim=-1).clamp(max=0), finite_values.amax(dim=-1).clamp(min=0)
        if self.range == "percentile":
            low, high = percentile_ends(values, low, high)
        shape = tuple(low.shape)
        if self.range == "mse":
            scale, zero = self._least_error(finite_values.flatten(0, -2), low.flatten(), high.flatten())
        else:
            scale, zero = self._cover(low.flatten(), high.flatten())
        scale, zero = laid(scale.reshape(shape), rows, inputs), laid(zero.reshape(shape), rows, inputs)
        return replace(
            self,
            axis=rows,
            summed=None if self.summed is None else inputs,
            scale=tuple(scale.flatten().tolist()),
            zero_point=tuple(zero.flatten().tolist()),
            shape=tuple(scale.shape),
        )

    def _least_error(self, values: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points of the part of the range with the smallest squared error; the largest among equals.

        Args:
            values: finite, shape (rows, values).
            low, high: the ends of each row.
        """
        parts = torch.tensor(SHRINKS, dtype=torch.float64, device=low.device)
        scales, zeros = self._cover(low[:, None] * parts, high[:, None] * parts)
        chosen = least_error(values, scales, zeros, self.codes)[:, None]
        return scales.gather(1, chosen)[:, 0], zeros.gather(1, chosen)[:, 0]

    def _cover(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scales, float64, and zero points, int64, of ranges that contain 0; of the same shape."""
        first, last = self.codes
        scale = torch.maximum(-low, high) / last if self.symmetric else (high - low) / (last - first)
        # Kept as the float32 that the deployed model will hold.
        scale = scale.clamp(min=SMALLEST_SCALE).float().double()
        if self.symmetric:
            return scale, torch.zeros_like(scale).long()
        return scale, (first - low / scale).round().clamp(first, last).long()

    @cached_property
    def grid(self) -> Grid:
        """A step and a zero point for all values, or per channel or group."""
        if self.scale is None or self.zero_point is None:
            raise FormatError("an affine format must be calibrated before it is used")
        if self.shape is not None and self.group_size is not None:
            step = torch.tensor(self.scale, dtype=torch.float64).reshape(self.shape)
            zero = torch.tensor(self.zero_point).reshape(self.shape)
            dims = len(self.shape), *dimensions(len(self.shape), self.axis, self.summed)
            return Grid(step, *self.codes, zero=zero, block=block_of(dims[0], self.group_size, *dims[1:]))
        if len(self.scale) == 1:
            return Grid(self.scale[0], *self.codes, zero=self.zero_point[0])
        block = (*[WHOLE] * self.axis, 1)
        shape = (*[1] * self.axis, -1)
        step = torch.tensor(self.scale, dtype=torch.float64).reshape(shape)
        return Grid(step, *self.codes, zero=torch.tensor(self.zero_point).reshape(shape), block=block)

    def round(self, x: Tensor) -> Tensor:
        """`x` through QuantizeLinear and DequantizeLinear."""
        return self.grid.round(x)

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest representable value, per channel where there are several."""
        return self.grid.ends(x)

    def learned_range(self) -> LearnedAffine:
        """A module that learns the scales."""
        return LearnedAffine(self)


class LearnedAffine(LearnedRange):
    """Affine integers with scales that are learned; zero points stay.

    Args:
        start: calibrated; the first scales.
    """

    def __init__(self, start: Affine) -> None:
        super().__init__()
        assert start.scale is not None
        self.start = start
        self.exponent = nn.Parameter(torch.log2(torch.tensor(start.scale)))

    def quantize(self, x: Tensor) -> Tensor:
        """`x` rounded with the current scales."""
        (first, last), grid = self.start.codes, self.start.grid
        scale = torch.exp2(self.exponent)
        scale = grid.along(scale.reshape(grid.step.shape if isinstance(grid.step, Tensor) else ()), x)
        zero = grid.along(0 if grid.zero is None else grid.zero, x)
        return (rounded(x / scale + zero, first, last) - zero) * scale

    def frozen(self) -> Affine:
        """The learned range as a format."""
        return replace(self.start, scale=tuple(torch.exp2(self.exponent.detach()).tolist()))
