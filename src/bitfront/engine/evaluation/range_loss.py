"""What ranges lose of the calibration samples: operands that become all zeros, saturate often, or are no numbers.

Each is found when a format is calibrated, and said once per search, in a line per kind that names the worst operands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from bitfront.errors import first_few
from bitfront.formats.base import Format, Operand, all_finite
from bitfront.graph import Site

Kind = Literal["zeros", "saturated", "wrapped", "no numbers"]
#: (title of the site, operand, what is lost) → (share of its values, label of the format where it is largest).
RangeLosses = Mapping[tuple[str, Operand, Kind], tuple[float, str]]
#: A larger share of saturating values is worth a note.
SATURATED = 0.01
#: So many operands are named in a note.
NAMED = 3
_TEXTS: Mapping[Kind, str] = {
    "no numbers": "NaN or infinite values among the calibration values (finite ones decide the range)",
    "zeros": "all zeros once rounded",
    "wrapped": "calibration values are out of range and come back on the other side",
    "saturated": "more than 1 % of the calibration values saturate",
}


def lost(form: Format, values: Tensor, negative_matters: bool) -> dict[Kind, float]:
    """What a calibrated format loses of the values it was calibrated on, as shares of them.

    Args:
        values: of the operand, with channels where the format has them.
        negative_matters: false where negative values are meant to be cut off, as in front of a ReLU.
    """
    known = None if all_finite(values) else values.isfinite()  # None: all of them

    def among(chosen: Tensor) -> Tensor:
        return chosen if known is None else chosen & known

    number = max(1, values.numel() if known is None else int(known.sum()))
    losses: dict[Kind, float] = {}
    if known is not None:
        losses["no numbers"] = 1 - number / values.numel()
    rounded = form.round(values)
    if not bool(among(rounded != 0).any()) and bool(among(values != 0 if negative_matters else values > 0).any()):
        losses["zeros"] = 1.0
        return losses
    if not form.covers_range:
        return losses
    low, high = (torch.as_tensor(end, dtype=values.dtype) for end in form.bounds(values))
    # What lies within half a step of the ends is rounded, not cut off.
    grid = form.grid
    slack = 0.0 if grid is None else grid.along(grid.step, values) * (0.5 + 1e-6)
    if not form.saturates:
        # What is rounded moves by a step at most, what wraps by more.
        share = int(among((rounded - values).abs() > 2 * slack).sum()) / number
        return {**losses, "wrapped": share} if share else losses
    down = grid is not None and grid.rounds == "floor"
    cut = values > high + (2 * slack if down else slack)
    if negative_matters:
        cut |= values < (low if down else low - slack)
    share = int(among(cut).sum()) / number
    if share > SATURATED:
        losses["saturated"] = share
    return losses


def merged(parts: Iterable[RangeLosses]) -> dict[tuple[str, Operand, Kind], tuple[float, str]]:
    """All of several, each at its worst."""
    result: dict[tuple[str, Operand, Kind], tuple[float, str]] = {}
    for part in parts:
        for key, loss in part.items():
            result[key] = max(loss, result.get(key, loss))
    return result


def losses_of(
    site: Site, operand: Operand, form: Format, values: Tensor
) -> dict[tuple[str, Operand, Kind], tuple[float, str]]:
    """What a calibrated format loses at an operand; empty where that is little."""
    matters = operand != "data_in" or site.negative_inputs_matter
    return {(site.title, operand, kind): (share, form.label) for kind, share in lost(form, values, matters).items()}


def remarks(losses: RangeLosses) -> list[str]:
    """A line per kind of loss, for the user."""
    lines = []
    for kind, text in _TEXTS.items():
        worst = sorted((-share, *key[:2], label) for key, (share, label) in losses.items() if key[2] == kind)
        if worst:
            shown = [
                f"{operand} of {site} as {label}"
                + {"saturated": f" ({-share:.0%})", "wrapped": f" ({-share:.2g} of them)"}.get(kind, "")
                for share, site, operand, label in worst
            ]
            lines.append(f"{text}: {first_few(shown, NAMED)}")
    return lines
