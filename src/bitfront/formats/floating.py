"""What floating-point formats share: rounding to so many binary digits, and the formats that PyTorch has a dtype for.

A floating-point number has a step that depends on its size: numbers from 2^k up to 2^(k+1), a *binade*, are multiples
of one power of two. So a value is rounded in two moves: find its binade, then round it to a multiple of the binade's
step, half to even. The binade is read from the bits of the value. A logarithm would be inexact near powers of two.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from bitfront.formats.base import Format, FormatParameter, OperandKind
from bitfront.kernels.scaled import binade


def rounded_to_digits(x: Tensor, digits: int, lowest: int, highest: int) -> Tensor:
    """`x` rounded half to even to `digits` binary digits: same shape and dtype, exact. Nothing saturates.

    Args:
        x: float32 or float64; an infinity or NaN stays what it is.
        digits: significant binary digits of a value, at least 1.
        lowest, highest: exponents of the smallest and the largest step, 2^lowest and 2^highest. Smaller values have
            the smallest step (subnormal numbers), larger ones the largest. 2^lowest is a normal number of the dtype.
    """
    above = digits - 1
    step = binade(x).clamp_(math.ldexp(1.0, lowest + above), math.ldexp(1.0, highest + above))
    step *= math.ldexp(1.0, -above)
    return torch.round(x / step) * step


class _Unchanged(torch.autograd.Function):
    """`rounded`, with the gradient of `x`: what a sum and a difference give, but for infinities too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:  # noqa: ARG004
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None


@dataclass(frozen=True)
class StandardFloat(Format):
    """A format that is a dtype of PyTorch: no parameters, infinities where a value is too large."""

    dtype: ClassVar[torch.dtype]
    parameters: ClassVar[Mapping[str, FormatParameter]] = {}
    bits_parameter: ClassVar[str | None] = None

    @classmethod
    def _build(cls, values: Mapping[str, object], kind: OperandKind, signed: bool) -> Self:  # noqa: ARG003
        return cls()

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of one stored value."""

    @property
    def label(self) -> str:
        """The name of the dtype."""
        return str(self.dtype).removeprefix("torch.")

    def round(self, x: Tensor) -> Tensor:
        """`x` rounded half to even; infinite from half a step above the largest finite value on (IEEE 754)."""
        if x.dtype != torch.float64 or self.dtype == torch.float32:
            return x.to(self.dtype, copy=True).to(x.dtype)
        # PyTorch goes from 64 to 16 bits through 32, and rounds twice.
        limits = torch.finfo(self.dtype)
        digits = 2 - math.frexp(limits.eps)[1]
        lowest, highest = (math.frexp(end)[1] - digits for end in (limits.tiny, limits.max))
        out = rounded_to_digits(x, digits, lowest, highest)
        return torch.where(out.abs() > limits.max, torch.copysign(torch.full_like(out, math.inf), out), out)

    def bounds(self, x: Tensor) -> tuple[float, float]:  # noqa: ARG002
        """The infinities, which are values of the format."""
        return -math.inf, math.inf

    def quantize(self, x: Tensor) -> Tensor:
        """``round(x)``; gradients pass everywhere."""
        rounded = self.round(x.detach())
        if not (torch.is_grad_enabled() and x.requires_grad):
            return rounded
        return cast(Tensor, _Unchanged.apply(x, rounded))  # type: ignore[no-untyped-call]
