"""What left a network without the channels that do nothing: a table of its layers, and lines in words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bitfront.report.tables import Sheet

if TYPE_CHECKING:
    from bitfront.engine.rebuild import Transformed


def table(result: Transformed) -> Sheet:
    """Per layer, what it had and has without the channels that do nothing: outputs, inputs, weights."""
    assert result.smaller is not None
    rows = []
    for path, (before, now) in result.smaller.layers.items():
        pairs = [(before[0], now[0]), (before[1], now[1]), (math.prod(before), math.prod(now))]
        rows.append([path, *(f"{a:,}" if a == b else f"{a:,} → {b:,}" for a, b in pairs)])
    columns = ["layer", "outputs", "inputs", "weights"]
    return Sheet(columns, rows, right=columns[1:])


def lines(result: Transformed) -> list[str]:
    """What was compared, what costs changed, and what stays."""
    small = result.smaller
    assert small is not None
    before, now = (sum(math.prod(shapes[k]) for shapes in small.layers.values()) for k in (0, 1))
    if before == now:
        what = "no channel leaves, so the smaller network is the same one"
    else:
        what = f"the smaller network has {now:,} of {before:,} weights"
    known = result.trial.metrics if result.trial else {}
    costs = [
        f"{name} {known[name]:,.10g} → {value:,.10g}"
        for name, value in result.smaller_metrics.items()
        if name in known and value != known[name]
    ]
    return [
        f"{what}; its outputs are equal to the bit on all {small.samples:,} samples",
        *([", ".join(costs)] if costs else []),
        *(f"stays: {note}" for note in small.stays),
        f"the smaller network is saved to {result.folder / 'smaller'}",
    ]
