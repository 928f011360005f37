"""Ranges that are learned with the weights: what a format offers for fine-tuning, and the gradients it is made of.

A step 2^e is trained through its exponent: rounding passes gradients straight through, so the exponent gets the sum of
what rounding and saturation cost (TQT, Jain et al. 2019, arXiv:1903.08066, eq. 5 to 8; for steps that are no powers of
two LSQ, Esser et al. 2019, arXiv:1902.08153, in the logarithm). A step that must be a power of two is rounded to one in
the forward pass, and each time that rounding flips, all values on the grid jump by a factor of two. So such a range is
settled at some time, and the weights then adapt to a grid that stays (TQT, section 5.2, freezes them one by one).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from bitfront.formats.base import Format


class LearnedRange(nn.Module, ABC):
    """Rounds as a format does, with a range that is a parameter of this module.

    ``Format.learned_range`` makes one per operand when fine-tuning begins. It stands in the model in place of the
    format, is trained and put into the state dict with it, and at the end gives the format that it has become.
    """

    @abstractmethod
    def quantize(self, x: Tensor) -> Tensor:
        """`x` in the range at hand, with gradients for `x` and for the range: same shape and dtype. Called in every
        forward pass. Before anything is learned it rounds as the format does that it began with, to within float error.
        """

    def settle(self) -> None:
        """Learn no further what jumps while it is learned, such as a step that must be a power of two. Called once,
        after a part of the epochs. What is settled must stand in the state dict: the best epoch may be an earlier one.
        """

    @abstractmethod
    def frozen(self) -> Format:
        """What was learned, as a calibrated format of the same kind and bits, which rounds as this module does. Called
        once, after the best epoch's state was loaded."""


def straight_through(value: Tensor, as_if: Tensor) -> Tensor:
    """`value`, with the gradient of `as_if`."""
    return as_if + (value - as_if).detach()


def rounded(x: Tensor, low: int, high: int) -> Tensor:
    """Rounded half to even and clamped; gradients pass where nothing saturates."""
    return torch.clamp(straight_through(torch.round(x), x), low, high)
