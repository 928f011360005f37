"""The inner loops of an evaluation: rounding many activations to their grids, and scoring many candidates' logits.

Each has two implementations that agree to the last bit: C++ compiled on the spot (``native``), and torch (``plain``).
``score`` is the one definition of loss and accuracy in Bitfront: whoever evaluates, by whatever way, calls it, and its
sums do not depend on the order or number of the parts they are made of.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfront.kernels import native, plain

#: From this width on, rounding with 32-bit floats is not what the kernels' formula says.
WIDEST = 22


@functools.cache
def compiled() -> bool:
    """Whether the compiled kernels are in use: there are some, and on a sample they compute what torch does."""
    if native.library() is None:
        return False
    generator = torch.Generator().manual_seed(0)
    logits = 8 * torch.randn(3, 7, 333, generator=generator)
    logits[0, 1, 5], logits[1, 2, 6], logits[2, 3, 7] = torch.nan, torch.inf, -torch.inf
    labels = torch.randint(7, (333,), generator=generator, dtype=torch.int32)
    ours, theirs = _native_score(logits, labels, False), plain.score(logits, labels, False)
    grid = np.array([[8.0, -16.0, 15.0, 0.125]] * 3, dtype=np.float32)
    rounded = torch.empty_like(logits)
    places = np.arange(3, dtype=np.int64) * 7 * 333
    round_blocks(logits, rounded, places, places, (1, 7 * 333, 0), grid)
    wanted = torch.clamp(torch.round(logits * 8), -16, 15) * 0.125
    return (
        torch.equal(ours[1][2:], theirs[1][2:])
        and torch.allclose(ours[0], theirs[0], rtol=0, atol=0, equal_nan=True)
        and torch.allclose(rounded, wanted, rtol=0, atol=0, equal_nan=True)
    )


def score(logits: Tensor, labels: Tensor, *, rectify: bool = False) -> tuple[Tensor, Tensor]:
    """Cross entropy and right answers of many candidates on the same samples.

    Every sample's loss, log Σ exp z − z_label, is rounded to a multiple of 2⁻²⁰ (an error of at most 5·10⁻⁷), so that
    the sum over samples is exact in float64, and the same in whatever order and in however many parts it is taken.

    Args:
        logits: shape (candidates, classes, samples), float32.
        labels: shape (samples,), each from 0 to classes − 1; int32.
        rectify: whether a ReLU stands between `logits` and the loss.

    Returns:
        Sum of the samples' losses in nats, float64, shape (candidates,), NaN or infinite where a logit is; number of
        samples whose largest logit (of equals the first) is the label's, int64, shape (candidates,).
    """
    logits = logits.contiguous()
    if logits.device.type == "cpu" and logits.dtype == torch.float32 and compiled():
        return _native_score(logits, labels, rectify)
    return plain.score(logits.float(), labels, rectify)


def _native_score(logits: Tensor, labels: Tensor, rectify: bool) -> tuple[Tensor, Tensor]:
    library = native.library()
    assert library is not None
    states, classes, samples = logits.shape
    loss = torch.empty(states, dtype=torch.float64)
    correct = torch.empty(states, dtype=torch.int64)
    library.bitfront_score(
        logits.data_ptr(),
        labels.data_ptr(),
        states,
        classes,
        samples,
        int(rectify),
        loss.data_ptr(),
        correct.data_ptr(),
    )
    return loss, correct


#: A batch norm still to be applied: alpha and beta, each of shape (channels,), and how (1 separate, 2 fused).
Affine = tuple[Tensor, Tensor, int]


def round_blocks(
    source: Tensor,
    target: Tensor,
    source_places: NDArray[np.int64],
    target_places: NDArray[np.int64],
    shape: tuple[int, int, int],
    grids: NDArray[np.float32],
    affine: Affine | None = None,
) -> bool:
    """Round blocks of `source` into blocks of `target`: clamp(round(x · scale), low, high) · step; into bytes
    clamp(round(x · scale), low, high) + offset. For compiled kernels only.

    Args:
        source, target: on the CPU, float32, the target perhaps uint8; only their memory counts.
        source_places, target_places: where block b begins, in elements, shape (blocks,).
        shape: rows of a block, elements of a row, elements from one row of the source to the next. The target's rows
            follow each other.
        grids: scale, low, high and step (or offset) of each block, shape (blocks, 4); low and high within ±2^WIDEST.
        affine: of the channels of a row.

    Returns:
        Whether a NaN was met on the way to bytes, which cannot hold it.
    """
    library = native.library()
    assert library is not None
    run = library.bitfront_round_bytes if target.dtype == torch.uint8 else library.bitfront_round
    source_places, target_places = np.ascontiguousarray(source_places), np.ascontiguousarray(target_places)
    grids = np.ascontiguousarray(grids)
    found = run(
        source.data_ptr(),
        target.data_ptr(),
        len(source_places),
        source_places.ctypes.data,
        target_places.ctypes.data,
        *shape,
        grids.ctypes.data,
        *_affine(affine),
    )
    return bool(found)


def added(
    a: Tensor,
    b: Tensor,
    a_affine: Affine | None,
    b_affine: Affine | None,
    *,
    rectify: tuple[bool, bool],
    out: Tensor | None = None,
) -> Tensor:
    """a + b, each after its batch norm and ReLU, in one pass. For compiled kernels only.

    Args:
        a, b: float32 of one shape, (..., channels); each is taken as rows of channels evenly apart, or copied.
        out: contiguous.
    """
    library = native.library()
    assert library is not None
    out = torch.empty(a.shape) if out is None else out
    (a, a_step), (b, b_step) = _evenly(a), _evenly(b)
    length = a.shape[-1]
    floors = [0.0 if r else -float("inf") for r in rectify]
    library.bitfront_add(
        a.data_ptr(),
        b.data_ptr(),
        out.data_ptr(),
        a.numel() // length,
        length,
        a_step,
        b_step,
        *_affine(a_affine),
        floors[0],
        *_affine(b_affine),
        floors[1],
    )
    return out


def _affine(affine: Affine | None) -> tuple[int, int, int]:
    return (0, 0, 0) if affine is None else (affine[0].data_ptr(), affine[1].data_ptr(), affine[2])


def _evenly(x: Tensor) -> tuple[Tensor, int]:
    """As rows that are the same distance apart."""
    step = x.stride(-2) if x.dim() > 1 else x.shape[-1]
    expected = step
    for axis in range(x.dim() - 2, -1, -1):
        if x.stride(axis) != expected:
            break
        expected *= x.shape[axis]
    else:
        if x.stride(-1) == 1:
            return x, step
    return x.contiguous(), x.shape[-1]
