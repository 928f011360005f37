"""Batched activations: the tensors of one node in many states, and how they are rounded.

The states of a node are stored in as few blocks of memory ("parts") as possible, in the layout in which the product
computes them. A batch norm or a ReLU that follows is postponed ("pending"): it costs nothing in the same pass over
memory as the next rounding or addition.

A part holds a table of `rows` × `columns` states: a product of several inputs (rows) with several weights (columns)
gives such a table. Layouts of a part:

======== ============================================== =========================================
samples  (rows, samples, columns, *features)             anything
first    (rows, columns, features, samples)              linear layers on flat samples
last     (rows, samples, height, width, columns, depth)  two-dimensional convolutions
======== ============================================== =========================================
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfront import kernels

Ints = NDArray[np.int64]
MemoryLayout = Literal["samples", "first", "last"]
#: Rows of this many elements are long enough for a kernel to run at full speed.
LONG_ROW = 1024
_TILING = threading.Lock()
#: Size of a cache line in bytes.
ALIGNMENT = 64
#: Layout → the axis of a part that counts columns.
COLUMNS = {"samples": 2, "first": 1, "last": 4}


@dataclass(frozen=True, eq=False)
class Norm:
    """A batch norm in evaluation mode: x · alpha + beta per channel, both of shape (channels,)."""

    module: nn.Module
    alpha: Tensor
    beta: Tensor
    _tiled: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, module: Any) -> Norm:
        """The norm of a module, from what torch computes: 0 gives beta, and 2^60 gives alpha · 2^60, because beta is
        too small to change that."""
        x = torch.zeros(2, module.num_features, *(1,) * (2 if isinstance(module, nn.BatchNorm2d) else 0))
        x[1] = 2.0**60
        with torch.no_grad():
            beta, large = module(x.to(module.running_mean.device)).flatten(1).clone()
        return cls(module, large * 2.0**-60, beta)

    def affine(self, repeats: int = 1) -> kernels.Affine:
        """The norm as the kernels take it, for rows of `repeats` pixels. Long rows are faster."""
        with _TILING:
            if repeats not in self._tiled:
                self._tiled[repeats] = (self.alpha.repeat(repeats), self.beta.repeat(repeats))
            return (*self._tiled[repeats], norm_mode() or 0)


def repeated(rows: int, length: int) -> int:
    """How many consecutive rows a kernel takes as one."""
    repeats = 1
    while rows % (2 * repeats) == 0 and 2 * repeats * length <= LONG_ROW:
        repeats *= 2
    return repeats


@cache
def norm_mode() -> int | None:
    """How torch computes a batch norm on this machine: 1 with separate product and sum, 2 with both fused.

    None if there is no compiled kernel, or if its results differ from torch's in both modes.
    """
    if not kernels.compiled():
        return None
    generator = torch.Generator().manual_seed(0)
    module: Any = nn.BatchNorm2d(19).eval()
    for tensor in (module.weight, module.bias, module.running_mean):
        nn.init.normal_(tensor, generator=generator)
    nn.init.uniform_(module.running_var, 0.1, 3.0, generator=generator)
    x = 5 * torch.randn(64, 19, 5, 7, generator=generator)
    with torch.no_grad():
        whole, turned = module(x), module(x.contiguous(memory_format=torch.channels_last))
        norm = Norm.of(module)
    dense = x.permute(0, 2, 3, 1).contiguous()
    zero = torch.zeros_like(dense)
    for mode in (1, 2):
        out = kernels.add_normalised(dense, zero, (norm.alpha, norm.beta, mode), None, rectify=(False, False))
        if torch.equal(out.permute(0, 3, 1, 2), whole) and torch.equal(turned, whole):
            return mode
    return None


@dataclass(eq=False)
class BatchedActivations:
    """The tensors of one step in several states.

    Attributes:
        parts: blocks of states.
        states: the numbers of the states, ascending.
        irregular: per state its part, row and column, shape (states, 3); None if the states fill the only part row by
            row.
        norm: a pending batch norm; in layout ``last`` only.
        rectify: whether a ReLU is pending, after the norm.
        ceiling: what the pending ReLU cuts off above, as ReLU6 does; infinite where it does not.
    """

    parts: list[Tensor]
    layout: MemoryLayout
    states: Ints
    irregular: Ints | None = None
    norm: Norm | None = None
    rectify: bool = False
    ceiling: float = math.inf

    @property
    def features(self) -> tuple[int, ...]:
        """Shape per sample."""
        shape = self.parts[0].shape
        if self.layout == "first":
            return (shape[2],)
        return (shape[5], shape[2], shape[3]) if self.layout == "last" else tuple(shape[3:])

    @cached_property
    def where(self) -> Ints:
        """Per state its part, row and column, shape (states, 3)."""
        if self.irregular is not None:
            return self.irregular
        rows, columns = np.divmod(np.arange(len(self.states)), self.parts[0].shape[COLUMNS[self.layout]])
        return np.stack([np.zeros_like(rows), rows, columns], axis=1)

    @property
    def whole(self) -> bool:
        """Whether every row and column of every part is one of these states."""
        axis = COLUMNS[self.layout]
        return self.irregular is None or len(self.states) == sum(p.shape[0] * p.shape[axis] for p in self.parts)

    def positions(self, states: Ints) -> Ints:
        """Where states of these numbers stand in ``states``."""
        if len(self.states) == self.states[-1] - self.states[0] + 1:
            shifted: Ints = states - self.states[0]
            return shifted
        positions: Ints = np.searchsorted(self.states, states)
        return positions

    def raw(self, position: int) -> Tensor:
        """The tensor of the state at a position, a view of shape (samples, *features), without pending operations."""
        part, row, column = (int(i) for i in self.where[position])
        block = self.parts[part][row]
        if self.layout == "first":
            return block[column].t()
        return block[..., column, :].permute(0, 3, 1, 2) if self.layout == "last" else block[:, column]

    def tensor(self, position: int) -> Tensor:
        """The tensor of the state at a position with pending operations done, as in the deployed model."""
        x = aligned(self.raw(position))
        if self.norm is not None:
            x = self.norm.module(x)
        return self.rectified(x)

    def viewed(self, position: int) -> Tensor:
        """As :meth:`tensor`, but in any order in memory, so that nothing need be copied."""
        return self.tensor(position) if self.norm is not None else self.rectified(self.raw(position))

    def rectified(self, x: Tensor) -> Tensor:
        """`x` after the pending ReLU."""
        if self.ceiling < math.inf:
            return F.hardtanh(x, 0.0, self.ceiling)
        return F.relu(x) if self.rectify else x

    def restricted(self, needed: Ints) -> BatchedActivations:
        """The activations of fewer states. Parts are cut where that needs no copy."""
        if len(needed) == len(self.states):
            return self
        at, axis = self.positions(needed), COLUMNS[self.layout]
        start, stop = int(at[0]), int(at[-1]) + 1
        width = self.parts[0].shape[axis]
        if self.irregular is None and stop - start == len(at) and start % width == stop % width == 0:
            return replace(self, parts=[self.parts[0][start // width : stop // width]], states=needed)
        where = self.where[at]
        parts, moved = [], where.copy()
        for number, index in enumerate(np.unique(where[:, 0])):
            here = where[:, 0] == index
            rows, columns = where[here, 1], where[here, 2]
            r, c = int(rows.min()), int(columns.min())
            part = self.parts[index][r : int(rows.max()) + 1]
            parts.append(part.narrow(axis, c, int(columns.max()) + 1 - c))
            moved[here] = np.stack([np.full(len(rows), number), rows - r, columns - c], axis=1)
        return replace(self, parts=parts, states=needed, irregular=moved)

    def compact(self) -> BatchedActivations:
        """The same states without the rows and columns of parts that are not needed."""
        if self.whole:
            return self
        return filled(torch.stack([self.block(k) for k in range(len(self.states))]), self.layout, self)

    def block(self, position: int) -> Tensor:
        """The state at a position, a view in this layout without row and column, without pending operations."""
        part, row, column = (int(i) for i in self.where[position])
        return self.parts[part][row].select(COLUMNS[self.layout] - 1, column)

    def settled(self) -> BatchedActivations:
        """The same states with pending operations done."""
        if self.norm is None and not self.rectify:
            return self
        compact, parts = self.compact(), []
        for part in compact.parts:
            if compact.norm is not None:
                rows, samples, height, width, columns, depth = part.shape
                flat = part.reshape(rows * samples, height, width, columns * depth).permute(0, 3, 1, 2)
                part = _normed(compact.norm.module, flat, columns).permute(0, 2, 3, 1).view(part.shape)
            parts.append(compact.rectified(part))
        return replace(compact, parts=parts, norm=None, rectify=False, ceiling=math.inf)

    def turned(self, layout: MemoryLayout) -> BatchedActivations:
        """The same states in another layout, with pending operations done; itself if it has that layout."""
        if layout == self.layout:
            return self
        old = self.settled().compact()
        return replace(old, parts=[from_plain(to_plain(p, old.layout), layout) for p in old.parts], layout=layout)


def room(shape: Sequence[int], device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised tensor.

    On the CPU its memory comes from numpy. torch asks for aligned memory, and the C library often does not reuse such
    memory after it is freed (glibc bug 14581), so that the heap grows to many times what is in use.
    """
    size = math.prod(shape)
    if torch.device(device).type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    width = dtype.itemsize
    raw = np.empty(size * width + ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return torch.from_numpy(raw[start : start + size * width]).view(dtype).view(tuple(shape))


def aligned(x: Tensor) -> Tensor:
    """`x` in memory like a new tensor of torch: contiguous, and starting at a cache line. Both affect how a matrix
    product of floats is rounded."""
    x = x.contiguous()
    return x if x.device.type != "cpu" or x.data_ptr() % ALIGNMENT == 0 else x.clone()


def filled(blocks: Tensor, layout: MemoryLayout, like: BatchedActivations) -> BatchedActivations:
    """The activations of the states of `like`, with its pending operations, in one part.

    Args:
        blocks: shape (states, ...), the rest as in `layout` without columns.
    """
    return replace(like, parts=[blocks.unsqueeze(COLUMNS[layout])], layout=layout, irregular=None)


def to_plain(part: Tensor, layout: MemoryLayout) -> Tensor:
    """A part as (rows, samples, columns, *features)."""
    if layout == "first":
        return part.permute(0, 3, 1, 2)
    return part.permute(0, 1, 4, 5, 2, 3) if layout == "last" else part


def from_plain(part: Tensor, layout: MemoryLayout) -> Tensor:
    """A part of shape (rows, samples, columns, *features) in another layout, contiguous."""
    if layout == "first":
        return part.permute(0, 2, 3, 1).contiguous()
    return part.permute(0, 1, 4, 5, 2, 3).contiguous() if layout == "last" else part.contiguous()


def _normed(module: Any, x: Tensor, columns: int) -> Tensor:
    """The value of a batch norm for `x` of shape (samples, columns · channels, height, width)."""
    parameters = [module.running_mean, module.running_var, module.weight, module.bias]
    mean, var, weight, bias = (None if p is None else p.repeat(columns) for p in parameters)
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, module.eps)


def added(a: BatchedActivations, b: BatchedActivations, at: tuple[Ints, Ints]) -> Tensor:
    """Sums of states of `a` and `b`, which have the same layout; pending operations of both are done.

    Args:
        at: positions of the states in `a` and in `b`.

    Returns:
        Shape (states, ...), as in the layout, without columns.
    """
    a, b = (s.settled() if s.ceiling < math.inf else s for s in (a, b))
    first = a.block(int(at[0][0]))
    out = room((len(at[0]), *first.shape), first.device)
    native = out.device.type == "cpu" and kernels.compiled() and (norm_mode() or (a.norm is None and b.norm is None))
    if not native:
        a, b = a.settled(), b.settled()
    for k, (i, j) in enumerate(zip(*(p.tolist() for p in at), strict=True)):
        left, right = a.block(i), b.block(j)
        if not native:
            torch.add(left, right, out=out[k])
            continue
        length = left.shape[-1]
        dense = left.is_contiguous() and right.is_contiguous()
        repeats = repeated(left.numel() // length, length) if dense else 1
        if repeats > 1:
            left, right = left.view(-1, length * repeats), right.view(-1, length * repeats)
        norms = [None if s.norm is None else s.norm.affine(repeats) for s in (a, b)]
        kernels.add_normalised(left, right, *norms, rectify=(a.rectify, b.rectify), out=out[k])
    return out
