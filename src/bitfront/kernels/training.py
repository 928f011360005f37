"""The training steps of ``training.cpp`` for Python: its structures, field by field, and its two functions.

Everything is float32 on the CPU. The structures hold addresses: the caller keeps the tensors behind them alive.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from bitfront.kernels import native

#: Samples in a vector: rows begin at multiples of it.
LANES = 16
#: The kinds of operations and of optimizers, in the order of the C++ enumerations.
KINDS = ("product", "activate", "norm", "add", "largest", "mean", "round", "sparse", "bend")
OPTIMIZERS = ("adam", "adamw", "sgd")
#: The parts of a step whose time ``train`` measures.
PARTS = ("products", "elementwise", "batch norm", "loss", "optimizer")

_LONG, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class NativeGrid(ctypes.Structure):
    """clamp(round(x · scale), low, high) · step; with a scale of 0 x is not rounded. The way of rounding is a place in
    ``whole.ROUNDINGS``."""

    _fields_ = (("scale", _FLOAT), ("low", _FLOAT), ("high", _FLOAT), ("step", _FLOAT), ("way", _FLOAT))


class NativeLists(ctypes.Structure):
    """Lists of pairs of int32, one list after another."""

    _fields_ = (("starts", _POINTER), ("pairs", _POINTER))


class NativeOperation(ctypes.Structure):
    """One operation on rows; ``network.h`` explains the fields."""

    _fields_ = (
        *((name, _LONG) for name in ("kind", "input", "input2", "output", "adds", "adds2")),
        *((name, _LONG) for name in ("channels_in", "channels", "positions_in", "positions", "blocks")),
        *((name, _LONG) for name in ("weight", "bias", "state", "scratch")),
        *((name, NativeLists) for name in ("forward", "backward", "pairs")),
        *((name, NativeGrid) for name in ("first", "second")),
        *((name, _FLOAT) for name in ("rectify", "momentum", "epsilon")),
        *((name, _LONG) for name in ("fractions", "integers", "bias_fractions", "slots", "source")),
        ("groups", _POINTER),
        *((name, _LONG) for name in ("widths", "bias_widths", "sharing", "way")),
    )


class NativeMember(ctypes.Structure):
    """One network with its parameters, its running statistics and the optimizer's moments."""

    _fields_ = (
        ("operations", _POINTER),
        *((name, _LONG) for name in ("count", "parameters", "logits", "classes")),
        *((name, _POINTER) for name in ("values", "buffers", "first_moment", "second_moment")),
    )


class NativeScratch(ctypes.Structure):
    """Memory for intermediate values; one per thread, any content."""

    _fields_ = (
        *((name, _POINTER) for name in ("rows", "row_gradients", "packed", "parameter_gradients")),
        *((name, _LONG) for name in ("stride", "tile")),
    )


class NativeOptimizer(ctypes.Structure):
    """The kind of optimizer, the number of steps taken so far, learning rate and weight decay."""

    _fields_ = (("kind", _LONG), ("steps", _LONG), ("rate", ctypes.c_double), ("decay", ctypes.c_double))


def available() -> bool:
    """Whether the training steps are compiled on this machine."""
    return native.training_library() is not None


def train_batches(
    member: NativeMember,
    scratch: NativeScratch,
    optimizer: NativeOptimizer,
    x: Tensor,
    labels: Tensor,
    batch: int,
    parts: Tensor | None,
) -> tuple[Tensor, int]:
    """One optimizer step per batch, in the order of the batches. Changes the member's values, buffers and moments.

    Args:
        optimizer: its `steps` are the steps taken before this call.
        x: shape (steps, features, stride), float32: samples side by side, zeros behind the last sample of a batch; the
            stride is a multiple of LANES.
        labels: shape (steps, batch), int32.
        batch: samples per batch.
        parts: the seconds of each entry of PARTS are added to it, float64; None to measure nothing, which is faster.

    Returns:
        The mean cross entropy of each batch before its step, float64, shape (steps,); and the number of correct
        answers, also before the steps.
    """
    library = native.training_library()
    assert library is not None
    steps, features, stride = x.shape
    losses = torch.empty(steps, dtype=torch.float64)
    correct = library.bitfront_train(
        ctypes.addressof(member),
        ctypes.addressof(scratch),
        ctypes.addressof(optimizer),
        x.data_ptr(),
        labels.data_ptr(),
        steps,
        features,
        batch,
        stride,
        losses.data_ptr(),
        None if parts is None else parts.data_ptr(),
    )
    return losses, int(correct)


def logits(member: NativeMember, scratch: NativeScratch, x: Tensor, samples: int) -> Tensor:
    """Logits of the network in evaluation mode, float32, shape (classes, samples).

    Args:
        x: shape (features, stride), float32; the stride is a multiple of LANES.
        samples: how many columns of `x` are samples.
    """
    library = native.training_library()
    assert library is not None
    out = torch.empty(member.classes, samples)
    library.bitfront_logits(
        ctypes.addressof(member), ctypes.addressof(scratch), x.data_ptr(), samples, x.shape[1], out.data_ptr()
    )
    return out
