"""How states are rounded: many at once by the kernels where a format lies on one grid, else one by one by the format.

A pending batch norm or ReLU is done in the same pass over memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bitfront import kernels
from bitfront.engine.evaluation.tree.activations import (
    COLUMNS,
    BatchedActivations,
    Ints,
    MemoryLayout,
    from_plain,
    norm_mode,
    repeated,
    room,
    to_plain,
)
from bitfront.formats.base import Format
from bitfront.kernels import plain
from bitfront.kernels.whole import whole_by_row

#: Columns of the numbers of a rounding (``kernels.round_blocks``).
SCALE, LOW, HIGH, STEP, DIVISOR, ZERO, WAY = range(kernels.NUMBERS)


@dataclass(frozen=True, eq=False)
class Rounding:
    """How states are rounded.

    Attributes:
        grids: the numbers of each format of the site's input (``kernels.round_blocks``), shape (formats, NUMBERS).
        covered: which formats the kernels can round to, shape (formats,).
        format: number of a format → the format; None for an input that stays in float.
    """

    grids: NDArray[np.float32]
    covered: NDArray[np.bool_]
    format: Callable[[int], Format | None]


def rounded(
    x: BatchedActivations,
    at: Ints,
    formats: Ints,
    rounding: Rounding,
    layout: MemoryLayout,
    *,
    extra: int = 0,
    rectify: bool = False,
) -> Tensor:
    """States, each rounded to a format, in one block.

    Args:
        at: positions of the states in `x`.
        formats: for each state the number of its format.
        layout: the layout of the result.
        extra: number of features that are added in layout ``first``; the caller fills them.
        rectify: whether to apply a ReLU afterwards, beside the one that is pending.

    Returns:
        Shape (states, ...) with the rest as in `layout`, without columns.
    """
    if layout != x.layout:
        values = rounded(x, at, formats, rounding, x.layout, rectify=rectify)
        in_plain = to_plain(values.unsqueeze(COLUMNS[x.layout]), x.layout)
        if layout != "first":
            return from_plain(in_plain, layout).squeeze(COLUMNS[layout])
        out = room((len(at), values.shape[-1] + extra, values.shape[1]), values.device)
        out[:, : values.shape[-1]] = values.transpose(1, 2)
        return out
    shape = list(x.parts[0].shape[1:])
    del shape[COLUMNS[layout] - 1]
    if layout == "first":
        shape[0] += extra
    out = room((len(at), *shape), x.parts[0].device)
    bulk = np.flatnonzero(rounding.covered[formats])
    if len(bulk):
        grids = rounding.grids[formats[bulk]]
        if rectify or x.rectify:
            grids[:, LOW] = np.maximum(grids[:, LOW], grids[:, ZERO])
        lower(grids, x.ceiling)
        if out.device.type == "cpu" and kernels.compiled() and (x.norm is None or norm_mode()):
            _round_native(x, at[bulk], grids, out, bulk * out[0].numel())
        else:
            _round_plain(x, at[bulk], grids, out, bulk)
    for k in np.flatnonzero(~rounding.covered[formats]).tolist():
        form = rounding.format(int(formats[k]))
        if form is None and x.norm is None:
            value = x.rectified(x.block(int(at[k])))
        else:
            # A format that wraps does not commute with a ReLU, so the pending one comes first.
            # Per-channel formats need the axes in the order of the deployed model.
            value = x.viewed(int(at[k])) if form is not None and form.any_memory_order else x.tensor(int(at[k]))
            value = value if form is None else form.quantize(value)
            value = value.t() if layout == "first" else value.permute(0, 2, 3, 1) if layout == "last" else value
        target = out[k, : value.shape[0]] if layout == "first" else out[k]
        target.copy_(F.relu(value) if rectify else value)
    return out


def lower(grids: NDArray[np.float32], ceiling: float) -> None:
    """Let the numbers of roundings cut off at a ceiling, in place. Rounding is monotonic, so the order does not matter.

    Args:
        grids: as in ``Rounding``.
    """
    if ceiling == math.inf:
        return
    scale, divisor, value = grids[:, SCALE], grids[:, DIVISOR], np.float32(ceiling)
    coded = divisor != 0
    codes = np.where(coded, value / np.where(coded, divisor, np.float32(1)), value * scale)
    whole = whole_by_row(torch.from_numpy(codes), torch.from_numpy(grids[:, WAY])).numpy()
    grids[:, HIGH] = np.minimum(grids[:, HIGH], whole + np.where(coded, grids[:, ZERO], np.float32(0)))


def _round_native(x: BatchedActivations, at: Ints, grids: NDArray[np.float32], out: Tensor, target: Ints) -> None:
    where, axis = x.where[at], COLUMNS[x.layout]
    for index, part in enumerate(x.parts):
        here: Any = slice(None) if len(x.parts) == 1 else where[:, 0] == index
        rows, columns = where[here, 1], where[here, 2]
        if not len(rows):
            continue
        shape = rows_of(part, x.layout, dense=x.norm is None)
        if shape is None:
            part = part.contiguous()
            shape = rows_of(part, x.layout, dense=x.norm is None)
            assert shape is not None
        affine = None
        if x.norm is not None:
            count, length, step = shape
            repeats = repeated(count, length) if step == length else 1
            shape = (count // repeats, length * repeats, step * repeats)
            affine = x.norm.affine(repeats)
        places = rows * part.stride(0) + columns * part.stride(axis)
        kernels.round_blocks(part, out, places, target[here], shape, grids[here], affine)


def rows_of(part: Tensor, layout: MemoryLayout, dense: bool) -> tuple[int, int, int] | None:
    """A state of a part as rows in memory: (number, length, distance). None if it is not stored as such rows."""
    block = part[0].select(COLUMNS[layout] - 1, 0)
    if dense and block.is_contiguous():
        return (1, block.numel(), 0)
    if layout == "first":
        return None
    if layout == "samples":
        return (len(block), block[0].numel(), block.stride(0)) if block[0].is_contiguous() else None
    samples, height, width, depth = block.shape
    if block.is_contiguous():
        return (samples * height * width, depth, depth)  # whatever the strides of dimensions of size 1
    step = block.stride(2)
    if block.stride(3) == 1 and block.stride(1) == width * step and block.stride(0) == height * width * step:
        return (samples * height * width, depth, step)
    return None


def _round_plain(x: BatchedActivations, at: Ints, grids: NDArray[np.float32], out: Tensor, target: Ints) -> None:
    x = x.settled()
    values = torch.stack([x.block(int(k)) for k in at])
    values = plain.rounded(values, grids)
    if len(target) == len(out):
        out[:, : values.shape[1]] = values
    else:
        out[torch.from_numpy(target).to(out.device), : values.shape[1]] = values
