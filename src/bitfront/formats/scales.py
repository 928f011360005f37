"""Scales per tensor, per channel or per group: how values are laid out to learn them, and the steps of their grids.

Means are summed in float64 by NumPy, which divides no sum among threads: a scale depends on the sample alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfront.formats.base import FLOAT_BITS, Format, FormatParameter, OperandKind, dimension
from bitfront.formats.grid import WHOLE

#: A smaller scale becomes this one, also that of zeros alone.
SMALLEST_SCALE = 2.0**-100
#: Values that share a scale.
Granularity = Literal["tensor", "channel"]
GRANULARITY = FormatParameter(
    "one scale per 'tensor' or per 'channel'; 'NA' is per channel for weights that are parameters, else per tensor",
    default=None,
    words=("NA", "tensor", "channel"),
)


def granularity(values: Mapping[str, object], kind: OperandKind) -> Granularity:
    """What the parameter ``GRANULARITY`` says for an operand; per tensor where there are no channels."""
    given = values["granularity"]
    by_channel = kind.stored_weight if given is None else given == "channel"
    return "channel" if by_channel and kind.channel_axis is not None else "tensor"


def channel_dimension(rank: int, granularity: Granularity, axis: int) -> int | None:
    """The dimension of a tensor of this rank that has a scale per index; None: there is one scale."""
    return dimension(axis, rank) if granularity == "channel" else None


def scales_of(shape: tuple[int, ...], granularity: Granularity, axis: int) -> int:
    """Number of scales of a tensor of this shape, whose channels lie along `axis`."""
    dim = channel_dimension(len(shape), granularity, axis)
    return 1 if dim is None else shape[dim]


def channel_steps(scales: tuple[float, ...], axis: int) -> tuple[float | Tensor, tuple[int, ...]]:
    """(step, block) of a grid with one scale for all values, or one per index of `axis`, which is not negative."""
    if len(scales) == 1:
        return scales[0], ()
    shape = (*[1] * axis, -1)
    return torch.tensor(scales, dtype=torch.float64).reshape(shape), (*[WHOLE] * axis, 1)


def magnitudes(sample: Tensor, granularity: Granularity, axis: int) -> NDArray[np.float64]:
    """Absolute values, a row per channel or one for the tensor; NaN where a value is not finite."""
    x = sample.detach().cpu().double().abs()
    dim = channel_dimension(x.dim(), granularity, axis)
    x = x[None] if dim is None else x.movedim(dim, 0)
    rows: NDArray[np.float64] = x.reshape(len(x), x[:1].numel()).numpy()
    return np.where(np.isfinite(rows), rows, np.nan)


def mean_of(rows: NDArray[np.float64], above: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """The mean of each row, or of those of its values that are larger than `above`; NaN does not count. 0 of none.

    Args:
        rows: shape (rows, values).
        above: a value per row.

    Returns:
        Shape (rows,); float64 that float32 can hold, as the deployed model does.
    """
    kept = ~np.isnan(rows) if above is None else rows > above[:, None]
    means: NDArray[np.float64] = np.where(kept, rows, 0.0).sum(axis=1) / np.maximum(kept.sum(axis=1), 1)
    return means.astype(np.float32).astype(np.float64)


def as_scale(means: NDArray[np.float64]) -> tuple[float, ...]:
    """Means as scales, which are never 0."""
    return tuple(np.maximum(means, SMALLEST_SCALE).tolist())


def keep_nan(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, but NaN where `x` is NaN."""
    return torch.where(x.isnan(), x, rounded)


@dataclass(frozen=True)
class MeanFormat(Format):
    """What formats have in common whose scales are means of absolute values, per tensor or per channel."""

    granularity: Granularity
    axis: int

    covers_range: ClassVar[bool] = False

    @property
    @abstractmethod
    def scales_each(self) -> int:
        """How many scales a tensor, or a channel, has."""

    @abstractmethod
    def _learned(self, sizes: NDArray[np.float64]) -> Self:
        """The calibrated format, from what :func:`magnitudes` gives."""

    def overhead_bits(self, shape: tuple[int, ...]) -> int:
        """A float32 number per scale."""
        return FLOAT_BITS * self.scales_each * scales_of(shape, self.granularity, self.axis)

    def calibrated(self, sample: Tensor) -> Self:
        """With means over the finite values of `sample`, per channel along `axis` or over all."""
        if not self.calibrates:
            return self
        dim = channel_dimension(sample.dim(), self.granularity, self.axis)
        learned = self._learned(magnitudes(sample, self.granularity, self.axis))
        return learned if dim is None else replace(learned, axis=dim)

    def calibrated_on(self, sample: Tensor, ends: Tensor) -> Self:  # noqa: ARG002
        """As :meth:`calibrated`: a mean does not depend on the ends."""
        return self.calibrated(sample)
