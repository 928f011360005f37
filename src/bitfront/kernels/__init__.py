"""The inner loops of evaluation: rounding activations to their grids or in blocks, and scoring the logits of many
candidates.

Each has two implementations that give the same bits: C++ compiled on the user's machine (``native``), and torch
(``plain``, ``scaled``). ``score`` is the only definition of loss and accuracy in Bitfront: every evaluation calls it.
Its sums do not depend on the order or number of the parts that they are computed from.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfront.kernels import losses, native, plain, scaled
from bitfront.kernels.losses import Outputs
from bitfront.kernels.scaled import ScaledRounding, Unit, Walk

#: Grids whose bounds are below 2^WIDEST steps are rounded exactly by the kernels, in 32-bit floats.
WIDEST = 22
#: How many numbers say how a block is rounded.
NUMBERS = 7


@functools.cache
def compiled() -> bool:
    """Whether the compiled kernels are in use: they exist, and on a sample they give the same bits as torch."""
    if native.library() is None:
        return False
    generator = torch.Generator().manual_seed(0)
    logits = 8 * torch.randn(3, 7, 333, generator=generator)
    logits[0, 1, 5], logits[1, 2, 6], logits[2, 3, 7] = torch.nan, torch.inf, -torch.inf
    labels = torch.randint(7, (333,), generator=generator, dtype=torch.int32)
    native_score, plain_score = _native_score(logits, labels, False), plain.score(logits, labels, False)
    grid = np.array([[8.0, -16.0, 15.0, 0.125, 0.0, 0.0, way] for way in (1, 2, 0)], np.float32)
    grid[2, :6] = 0.0, 0.0, 255.0, 0.03, 0.03, 99.0
    rounded = torch.empty_like(logits)
    places = np.arange(3, dtype=np.int64) * 7 * 333
    round_blocks(logits, rounded, places, places, (1, 7 * 333, 0), grid)
    weight, x = logits[2, :5, :7], logits[0, :, 7:]
    sums = torch.empty(5, x.shape[1])
    _native_ordered(weight.contiguous(), x.contiguous(), sums)
    return (
        torch.equal(native_score[1][2:], plain_score[1][2:])
        and _same(native_score[0], plain_score[0])
        and _same(rounded, plain.rounded(logits, grid))
        and _same(sums, plain.ordered(weight, x))
        and all(_same_in_blocks(logits, how) for how in _SAMPLE_ROUNDINGS)
    )


#: One rounding of each way, for the sample.
_SAMPLE_ROUNDINGS = (
    ScaledRounding("multiples", 1.0, 1.0, 7.0, 0, Unit(0.25, 2.0**-8, 2.0**8)),
    ScaledRounding("floats", 2.0**-6, 2.0**8, 448.0, 3, Unit(2.0**-8, 2.0**-126, 2.0**127)),
    ScaledRounding("powers", 2.0**-6, 1.0, 1.0, 0, Unit(1.0, 2.0**-8, 2.0**8, upward=True)),
)


def _same_in_blocks(x: Tensor, how: ScaledRounding) -> bool:
    for block in ((1, 2, 1), (1, scaled.WHOLE, 16)):
        walk = scaled.walk(tuple(x.shape), x.stride(), block)
        assert walk is not None
        if not _same(_native_scaled(x, torch.empty_like(x), walk, how), scaled.rounded(x, block, how)):
            return False
    return True


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def ordered(weight: Tensor, x: Tensor) -> Tensor:
    """Matrix products ``weight · x``, each value summed in float64 in the order of the inner dimension, then rounded
    once to float32. So its bits do not depend on what is computed beside it.

    Args:
        weight: float32, shape (rows, inner), or (batch, rows, inner).
        x: float32, shape (batch, inner, columns).

    Returns:
        float32, shape (batch, rows, columns).
    """
    if x.device.type != "cpu" or not compiled():
        return plain.ordered(weight, x)
    out = torch.empty(len(x), weight.shape[-2], x.shape[2])
    _native_ordered(weight.contiguous(), x.contiguous(), out)
    return out


def _native_ordered(weight: Tensor, x: Tensor, out: Tensor) -> None:
    library = native.library()
    assert library is not None
    (rows, inner), columns = weight.shape[-2:], x.shape[-1]
    batch = len(x) if x.dim() == 3 else 1
    stride = rows * inner if weight.dim() == 3 else 0
    arguments = (batch, rows, inner, columns, stride)
    library.bitfront_ordered(x.data_ptr(), weight.data_ptr(), out.data_ptr(), *arguments)


def scale(out: Tensor, scales: Tensor, bias: Tensor | None, *, last: bool) -> None:
    """``out · scale + bias`` in place, two roundings.

    Args:
        out: float32, contiguous, shape (states, channels, samples), or with `last` (states, ..., channels).
        scales: float32, shape (states, channels).
        bias: float32, shape (channels,); None for none.
        last: whether channels are the last dimension of `out`, else the second one.
    """
    if out.device.type != "cpu" or not compiled():
        shape = (len(out), *[1] * (out.dim() - 2), -1) if last else (*scales.shape, *[1] * (out.dim() - 2))
        out.mul_(scales.reshape(shape))
        if bias is not None:
            out.add_(bias if last else bias[:, None])
        return
    library = native.library()
    assert library is not None
    channels = scales.shape[1]
    length = channels if last else out[0, 0].numel()
    rows = out.numel() // max(1, length)
    scales, bias = scales.contiguous(), None if bias is None else bias.contiguous()
    library.bitfront_scale(
        out.data_ptr(), rows, length, max(1, rows // max(1, len(out))), channels, int(last), scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
    )  # fmt: skip


def round_scaled(x: Tensor, block: Sequence[int], how: ScaledRounding) -> Tensor:
    """`x` rounded where the values of a block share a power of two. Same shape and dtype, in new memory.

    Args:
        x: float32 or float64, any shape and any device. NaN stays NaN.
        block: how many neighbours along each dimension share one, ``scaled.WHOLE`` for all of them.
        how: the way, and its numbers.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and not _watched(x) and compiled():
        out = torch.empty_like(x)
        if x.stride() != out.stride():
            # There are gaps or overlaps in memory.
            x = out.copy_(x)
            out = torch.empty_like(x)
        walk = scaled.walk(tuple(x.shape), x.stride(), tuple(block))
        if walk is not None and type(out) is Tensor:
            return _native_scaled(x, out, walk, how)
    return scaled.rounded(x, block, how)


def _watched(x: Tensor) -> bool:
    """Whether somebody must see the operations on a tensor, or its memory does not hold values as they are."""
    return (
        (x.requires_grad and torch.is_grad_enabled())
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch.compiler.is_compiling()
        or x.layout != torch.strided
        or x.is_neg()
        or not x.numel()
        or not _in_memory(x)
    )


def _in_memory(x: Tensor) -> bool:
    """Whether a tensor's values are in memory; those that ``torch.func.vmap`` gives to a function are not."""
    try:
        x.data_ptr()
    except RuntimeError:
        return False
    return True


def _native_scaled(x: Tensor, out: Tensor, walk: Walk, how: ScaledRounding) -> Tensor:
    library = native.library()
    assert library is not None
    library.bitfront_round_scaled(x.data_ptr(), out.data_ptr(), *walk, scaled.WAYS.index(how.way), scaled.numbers(how))
    return out


def score(
    logits: Tensor, labels: Tensor, *, rectify: bool = False, outputs: Outputs = "logits"
) -> tuple[Tensor, Tensor]:
    """Loss and number of correct answers of many candidates on the same samples.

    The loss of each sample, of logits log Σ exp z − z_label, is rounded to a multiple of 2⁻²⁰ (an error of at most
    5·10⁻⁷). So the sum over samples is exact in float64, and the same in any order and in any number of parts.

    Args:
        logits: shape (candidates, classes, samples), float32.
        labels: shape (samples,), int32, each from 0 to classes − 1.
        rectify: whether a ReLU is applied to `logits` before the loss.
        outputs: what `logits` are, where they are something else (``losses``).

    Returns:
        The sum of the samples' losses in nats, float64, shape (candidates,); NaN or infinite where a logit is. And the
        number of samples whose largest logit (the first of equal ones) is the one of the label, int64, shape
        (candidates,).
    """
    if outputs != "logits":
        values = logits.float()
        return losses.score(values.clamp(min=0.0) if rectify else values, labels, outputs)
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


#: A pending batch norm: alpha and beta, each of shape (channels,), and how it is computed (1 separate, 2 fused).
Affine = tuple[Tensor, Tensor, int]


def round_blocks(
    source: Tensor,
    target: Tensor,
    source_places: NDArray[np.int64],
    target_places: NDArray[np.int64],
    shape: tuple[int, int, int],
    grids: NDArray[np.float32],
    affine: Affine | None = None,
) -> None:
    """Rounds blocks of `source` into blocks of `target`. Only where :func:`compiled` is true.

    A float32 target gets clamp(round(x · scale), low, high) · step; or, if the divisor is not 0,
    (clamp(round(x / divisor) + zero, low, high) − zero) · step.

    Args:
        source: float32, on the CPU; the shape is ignored.
        target: float32, on the CPU; the shape is ignored.
        source_places: the first element of each block of `source`, shape (blocks,).
        target_places: the first element of each block of `target`, shape (blocks,).
        shape: rows of a block, elements of a row, and elements from one row of the source to the next. The rows of the
            target are contiguous.
        grids: scale, low, high, step, divisor, zero and the way of rounding (its place in ``whole.ROUNDINGS``) of each
            block, shape (blocks, NUMBERS); low and high within ±2^WIDEST.
        affine: the pending batch norm of the source, one channel per element of a row; None where there is none.
    """
    library = native.library()
    assert library is not None
    source_places, target_places = np.ascontiguousarray(source_places), np.ascontiguousarray(target_places)
    grids = np.ascontiguousarray(grids)
    library.bitfront_round(
        source.data_ptr(),
        target.data_ptr(),
        len(source_places),
        source_places.ctypes.data,
        target_places.ctypes.data,
        *shape,
        grids.ctypes.data,
        *_affine_arguments(affine),
    )


def add_normalised(
    a: Tensor,
    b: Tensor,
    a_affine: Affine | None,
    b_affine: Affine | None,
    *,
    rectify: tuple[bool, bool],
    out: Tensor | None = None,
) -> Tensor:
    """a + b in one pass, each after its batch norm and ReLU. Only where :func:`compiled` is true.

    Args:
        a: float32, shape (..., channels), on the CPU; copied if its rows are not at equal distances in memory.
        b: as `a`, with the same shape.
        a_affine: the pending batch norm of `a`, or None.
        b_affine: the pending batch norm of `b`, or None.
        rectify: whether a ReLU follows the batch norm of `a`, and of `b`.
        out: contiguous, with the same shape; a new tensor where None.
    """
    library = native.library()
    assert library is not None
    out = torch.empty(a.shape) if out is None else out
    (a, a_step), (b, b_step) = _equidistant_rows(a), _equidistant_rows(b)
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
        *_affine_arguments(a_affine),
        floors[0],
        *_affine_arguments(b_affine),
        floors[1],
    )
    return out


def _affine_arguments(affine: Affine | None) -> tuple[int, int, int]:
    return (0, 0, 0) if affine is None else (affine[0].data_ptr(), affine[1].data_ptr(), affine[2])


def _equidistant_rows(x: Tensor) -> tuple[Tensor, int]:
    """`x`, copied if its rows are not at equal distances in memory; and the distance in elements."""
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
