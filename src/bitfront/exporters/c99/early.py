"""Rounds before the largest of a window is taken, and before numbers are moved, not after it.

A rounding grows with its number, so the largest of rounded numbers is the rounded largest one: both orders give the
same numbers. Rounded first, the large buffer between a convolution and its pooling holds the few bits of the next
layer, not those of a sum.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront.exporters.c99.tables import SIZES, type_of
from bitfront.exporters.oracle import apply
from bitfront.exporters.program import Limit, Move, Pool, Program, Quantize, Round, Step, Value

#: Two steps and their values, in the other order.
Swapped = tuple[Step, Value, Step, Value]
#: What was swapped before, by the identity of what it was, which it keeps alive.
Memo = dict[tuple[int, ...], tuple[tuple[object, ...], Swapped | None]]


def rounded_early(program: Program, memo: Memo | None = None) -> Program:
    """The same program, with roundings and limits moved before poolings and moves where what lies between is smaller.

    Args:
        program: the program.
        memo: what calls before have swapped; equal steps then become the same objects.
    """
    memo = {} if memo is None else memo
    steps, values = list(program.steps), list(program.values)
    users: dict[int, list[int]] = {program.output: [-1]}
    for k, step in enumerate(steps):
        for source in step.sources:
            users.setdefault(source, []).append(k)
    pending = [k for k, step in enumerate(steps) if isinstance(step, Pool | Move)]
    while pending:
        k = pending.pop()
        (source,) = steps[k].sources
        if len(users[k]) != 1 or len(users[source]) != 1 or users[k][0] < 0:
            continue
        after = users[k][0]
        swapped = _swapped(memo, steps[k], steps[after], (values[source], values[k], values[after]))
        if swapped is None:
            continue
        steps[k], values[k], steps[after], values[after] = swapped
        # What was moved forward may stand behind another one now, and what was moved back before another one.
        pending += [j for j in (source, after) if isinstance(steps[j], Pool | Move)]
    return replace(program, steps=tuple(steps), values=tuple(values))


def _swapped(memo: Memo, mover: Step, each: Step, around: tuple[Value, Value, Value]) -> Swapped | None:
    if not isinstance(each, Round | Quantize | Limit):
        return None
    given = (mover, each, *around)
    key = tuple(map(id, given))
    if key not in memo:
        memo[key] = given, _other_order(mover, each, around)
    return memo[key][1]


def _other_order(mover: Step, each: Round | Quantize | Limit, around: tuple[Value, Value, Value]) -> Swapped | None:
    """The steps in the other order; None where they give other numbers then, or where nothing is saved."""
    source, between, result = around
    if isinstance(mover, Pool) and mover.kind != "largest":
        return None
    alike = _per_channel if isinstance(mover, Pool) else _everywhere
    entries = {name: alike(value, result.shape) for name, value in _entries(each).items()}
    scale = None if result.scale is None else alike(result.scale, result.shape)
    if any(entry is None for entry in entries.values()) or (result.scale is not None and scale is None):
        return None
    if isinstance(each, Round) and each.overflow == "wrap":
        return None
    wide: Any = {
        name: np.broadcast_to(entry.reshape(-1, *[1] * (len(source.shape) - 1)), source.shape)
        for name, entry in entries.items()
        if entry is not None
    }
    first = replace(each, sources=mover.sources, **wide)
    low, high = (apply(first, [end[None]], [source])[0] for end in (source.low, source.high))
    if isinstance(mover, Move) and (mover.places < 0).any():
        zero = np.zeros((1, *source.shape), source.low.dtype)
        if apply(first, [zero], [source]).any():
            return None
    early = replace(
        result, shape=source.shape, low=low, high=high, scale=None if scale is None else np.asarray(scale.ravel()[0])
    )
    if scale is not None and scale.size > 1:
        early = replace(early, scale=scale.reshape(-1, *[1] * (len(source.shape) - 1)))
    before, after = SIZES[type_of(source)], SIZES[type_of(early)]
    if after > before or (after == before and not isinstance(each, Limit)):
        return None
    # The places in the program stay: the step that moves now reads what the other one gives.
    return first, early, replace(mover, sources=each.sources), replace(result, name=between.name)


def _entries(step: Round | Quantize | Limit) -> dict[str, NDArray[Any]]:
    """The arrays of a step: numbers for each place."""
    if isinstance(step, Round):
        return {"points": step.points, "low": step.low, "high": step.high}
    if isinstance(step, Quantize):
        return {"step": step.step, "zero": step.zero, "low": step.low, "high": step.high}
    return {}


def _per_channel(entry: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any] | None:
    """A number per channel, or one; None where it differs within a channel."""
    full = np.broadcast_to(entry, shape).reshape(shape[0], -1)
    if not full.size or (full != full[:, :1]).any():
        return None
    return full[:1, 0] if (full[:, 0] == full[0, 0]).all() else full[:, 0]


def _everywhere(entry: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any] | None:
    """The one number; None where there are several."""
    full = np.broadcast_to(entry, shape).ravel()
    return full[:1] if full.size and (full == full[0]).all() else None
