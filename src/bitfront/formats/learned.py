"""Ranges that are learned together with the weights in fine-tuning, and their gradients.

A step 2^e is trained through its exponent e. Rounding passes gradients unchanged, so the exponent gets the sum of the
gradients from rounding and saturation (TQT, Jain et al. 2019, arXiv:1903.08066, eq. 5 to 8; for steps that are no
powers of two LSQ, Esser et al. 2019, arXiv:1902.08153, in the logarithm). A step that must be a power of two is rounded
to one in the forward pass. Each time this rounding changes, all values on the grid change by a factor of two. So such a
range is settled after some epochs, and the weights adapt to the fixed grid (TQT, section 5.2, freezes them one by one).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bitfront.kernels.whole import Rounding, whole

if TYPE_CHECKING:
    from bitfront.formats.base import Format


class LearnedRange(nn.Module, ABC):
    """Rounds like a format, with a range that is a parameter of this module.

    ``Format.learned_range`` creates one per operand when fine-tuning begins. It replaces the format in the model, is
    trained and stored with the model, and is turned into a format again at the end.
    """

    @abstractmethod
    def quantize(self, x: Tensor) -> Tensor:
        """`x` rounded in the current range, with gradients for `x` and for the range: same shape and dtype.

        Called in every forward pass. Before training it rounds like the original format, within float error.
        """

    def settle(self) -> None:
        """Stop learning what changes in jumps, such as a step that must be a power of two.

        Called once, after a part of the epochs. The settled values must be in the state dict: the best epoch may be an
        earlier one.
        """

    @abstractmethod
    def frozen(self) -> Format:
        """The learned range as a calibrated format with the same class and bits, which rounds like this module.

        Called once, after the state of the best epoch was loaded.
        """


def straight_through(value: Tensor, as_if: Tensor) -> Tensor:
    """`value`, with the gradient of `as_if`."""
    return as_if + (value - as_if).detach()


def rounded(x: Tensor, low: int, high: int, rounding: Rounding = "even") -> Tensor:
    """Rounded and clamped; gradients pass where nothing saturates."""
    return torch.clamp(straight_through(whole(x, rounding), x), low, high)
