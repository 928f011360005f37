"""The compiled training of weights with their bits (``bits.cpp``) for Python.

Everything is float32 on the CPU. The structures hold addresses: the caller keeps the tensors behind them alive.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfront.kernels import native
from bitfront.kernels.training import LANES, NativeMember, NativeScratch

#: Learned numbers of bits stay within ± this.
MOST_BITS = 20
#: Samples in a tile at most.
LARGEST_TILE = 1024


class NativePressure(ctypes.Structure):
    """What the bits cost: per product of bits, per bit of a weight, per bit of a bias."""

    _fields_ = (("pairs", ctypes.c_double), ("stored", ctypes.c_double), ("biases", ctypes.c_double))


@dataclass(frozen=True, eq=False)
class Workspace:
    """Memory for the intermediate values of one member. ``scratch`` points into the tensors.

    Attributes:
        scratch: as the compiled steps take it.
        gathered: a row per feature and class.
        widths: a number per group of weights that share their bits.
        held: the other tensors.
    """

    scratch: NativeScratch
    gathered: Tensor
    widths: Tensor
    held: tuple[Tensor, ...]

    @staticmethod
    def of(rows: int, packed: int, parameters: int, columns: int, groups: int, tile: int) -> Workspace:
        """Memory for `rows` rows of values, and `columns` features and classes, of `tile` samples.

        Args:
            groups: the most groups of weights that share their bits, of a layer; those without a live weight included.
        """
        # An odd number of cache lines from row to row, so that columns use all sets of the cache.
        stride = (-(-tile // LANES) | 1) * LANES
        table, gradients = torch.zeros(rows, stride), torch.zeros(rows + 1, stride)
        whole, learned = torch.zeros(packed), torch.zeros(parameters)
        scratch = NativeScratch(
            table.data_ptr(),
            gradients.data_ptr() + 4 * stride,
            whole.data_ptr(),
            learned.data_ptr(),
            stride,
            tile,
        )
        held = (table, gradients, whole, learned)
        return Workspace(scratch, torch.zeros(columns, stride), torch.zeros(max(1, groups)), held)


def available() -> bool:
    """Whether it is compiled on this machine."""
    return native.bits_library() is not None


def learn(
    member: NativeMember,
    workspace: Workspace,
    pressure: NativePressure,
    x: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    order: Tensor,
    batch: int,
    rates: NDArray[np.float64],
    betas: NDArray[np.float64],
    taken: int,
    first_bits: int,
    bits_rate: float,
) -> float:
    """One step of Adam per batch. Changes the member's values and moments.

    Args:
        x: samples, float32, shape (samples, features), contiguous.
        labels: int32, shape (samples,).
        targets: probabilities in place of labels, float32, shape (samples, classes), contiguous; None for labels.
        order: places of samples, int32; a batch is `batch` of them, the last one may be smaller.
        rates, betas: learning rate and pressure of each step, float64.
        taken: number of steps before this call.
        first_bits: parameters from here on are bits, and learn `bits_rate` times as fast.

    Returns:
        The mean of the losses before the steps, without what the bits cost.
    """
    library = native.bits_library()
    assert library is not None
    steps = -(-len(order) // batch)
    assert len(rates) == len(betas) == steps
    total = library.bitfront_learn(
        *map(ctypes.addressof, (member, workspace.scratch, pressure)),
        x.data_ptr(),
        x.shape[1],
        order.data_ptr(),
        labels.data_ptr(),
        None if targets is None else targets.data_ptr(),
        len(order),
        batch,
        rates.ctypes.data,
        betas.ctypes.data,
        taken,
        first_bits,
        bits_rate,
        workspace.gathered.data_ptr(),
        workspace.widths.data_ptr(),
    )
    return float(total) / len(order)


def logits(
    member: NativeMember, workspace: Workspace, pressure: NativePressure, x: Tensor, order: Tensor
) -> tuple[Tensor, float]:
    """(logits of some samples, float32, shape (classes, samples); what the bits cost).

    Args:
        x: samples, float32, shape (samples, features), contiguous.
        order: places of the samples, int32.
    """
    library = native.bits_library()
    assert library is not None
    out = torch.empty(member.classes, len(order))
    cost = library.bitfront_learned_logits(
        *map(ctypes.addressof, (member, workspace.scratch, pressure)),
        x.data_ptr(),
        x.shape[1],
        order.data_ptr(),
        len(order),
        workspace.gathered.data_ptr(),
        workspace.widths.data_ptr(),
        out.data_ptr(),
    )
    return out, float(cost)
