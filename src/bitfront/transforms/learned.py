"""Number formats whose ranges are learned with the weights: what fine-tuning puts in place of calibrated ones.

A step 2^e is trained through its exponent: rounding passes gradients straight through, so the exponent gets the sum of
what rounding and saturation cost (TQT, Jain et al. 2019, arXiv:1903.08066, eq. 5 to 8; for steps that are no powers of
two LSQ, Esser et al. 2019, arXiv:1902.08153, in the logarithm). A format of powers of two stays one: its exponent is
rounded in the forward pass, and each time that rounding flips, all values on the grid jump by a factor of two. So such
exponents are settled at some time, and the weights then adapt to grids that stay (TQT, section 5.2, freezes them one by
one). What was learned is frozen into a plain format again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from bitfront.formats.affine import Affine
from bitfront.formats.base import Format, Operand
from bitfront.formats.integer import LOWEST_FRAC_WIDTH, Integer
from bitfront.graph import Graph
from bitfront.transforms.correct import Correction
from bitfront.transforms.quantize import Rounds, rebuilt


class LearnedInteger(nn.Module):
    """Fixed point with a frac width that is learned, at most `width`.

    Args:
        start: calibrated; the first range.
    """

    def __init__(self, start: Integer) -> None:
        super().__init__()
        self.start = start
        self.exponent = nn.Parameter(torch.tensor(-float(start.frac_width)))
        #: The exponent once it is settled; NaN before. In the state dict, as it belongs to what was trained.
        self.settled: Tensor
        self.register_buffer("settled", torch.tensor(math.nan))

    def _used(self) -> Tensor:
        limited = self.exponent.clamp(-self.start.width, -LOWEST_FRAC_WIDTH)
        return torch.where(self.settled.isnan(), _straight_through(torch.round(limited), limited), self.settled)

    def quantize(self, x: Tensor) -> Tensor:
        """`x` on the grid of the exponent at hand."""
        low, high = self.start.codes
        step = torch.exp2(self._used())
        return _rounded(x / step, low, high) * step

    def settle(self) -> None:
        """Learn the exponent no further."""
        self.settled.copy_(self._used().detach())

    def frozen(self) -> Integer:
        """What was learned, as a format."""
        return replace(self.start, frac_width=-round(float(self._used().detach())))


class LearnedAffine(nn.Module):
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
        """`x` through the scales at hand."""
        first, last = self.start.codes
        scale, zero = torch.exp2(self.exponent), torch.tensor(self.start.zero_point or (0,), dtype=x.dtype)
        zero = zero.to(x.device)
        if len(self.exponent) == 1:
            scale, zero = scale.reshape(()), zero.reshape(())
        else:
            shape = [1] * x.dim()
            shape[self.start.axis] = -1
            scale, zero = scale.reshape(shape), zero.reshape(shape)
        return (_rounded(x / scale + zero, first, last) - zero) * scale

    def frozen(self) -> Affine:
        """What was learned, as a format."""
        return replace(self.start, scale=tuple(torch.exp2(self.exponent.detach()).tolist()))


def _straight_through(value: Tensor, as_if: Tensor) -> Tensor:
    """`value`, with the gradient of `as_if`."""
    return as_if + (value - as_if).detach()


def _rounded(x: Tensor, low: int, high: int) -> Tensor:
    """Rounded half to even and clamped; gradients pass where nothing saturates."""
    return torch.clamp(_straight_through(torch.round(x), x), low, high)


def learning(format_: Format) -> Rounds:
    """A calibrated format with a range that is learned; formats without one as they are."""
    if isinstance(format_, Integer):
        return LearnedInteger(format_)
    return LearnedAffine(format_) if isinstance(format_, Affine) else format_


def learning_model(
    graph: Graph, formats: Mapping[str, Mapping[Operand, Format]], corrections: Mapping[str, Correction]
) -> tuple[nn.Module, dict[str, dict[Operand, Rounds]]]:
    """As ``quantize(graph, formats, corrections=...)``, for training: ranges are parameters of the model.

    Args:
        formats: site name → calibrated formats by operand.

    Returns:
        The model, and what rounds in it, by site and operand.
    """
    rounds = {site: {o: learning(f) for o, f in own.items()} for site, own in formats.items()}
    model = rebuilt(graph, rounds, corrections)
    for module in list(model.modules()):
        for operand, own in getattr(module, "formats", {}).items():
            if isinstance(own, nn.Module):
                module.add_module(f"{operand}_range", own)
    return model, rounds


def settle(rounds: Mapping[str, Mapping[Operand, Rounds]]) -> None:
    """Formats of powers of two stay as they are from now on; whatever else is learned goes on."""
    for own in rounds.values():
        for each in own.values():
            if isinstance(each, LearnedInteger):
                each.settle()


def frozen(rounds: Mapping[str, Mapping[Operand, Rounds]]) -> dict[str, dict[Operand, Format]]:
    """Site → operand → the format that was learned."""
    found: dict[str, dict[Operand, Format]] = {}
    for site, own in rounds.items():
        for operand, each in own.items():
            learned = each.frozen() if isinstance(each, LearnedInteger | LearnedAffine) else each
            assert isinstance(learned, Format)
            found.setdefault(site, {})[operand] = learned
    return found


def shadow(graph: Graph, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float weights behind a trained model of ``learning_model``: a state dict of the graph's own model."""
    own = {name: state[name] for name in graph.model.state_dict() if name in state}
    for site in graph.sites:
        # A functional site with a corrected bias trains that one.
        corrected = f"{site.name}_bias_corrected"
        if corrected in state and site.bias:
            own[site.bias] = state[corrected]
    return own
