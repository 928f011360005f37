"""The training steps of ``training.cpp`` as seen from Python: its structures, field by field, and its two calls.

Everything is float32 on the CPU. Structures hold addresses; whoever makes them keeps the tensors alive.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from bitfront.kernels import native

#: Samples of a vector: rows begin at multiples of it.
LANES = 16
#: The kinds of operations and of optimizers, in the order of the C++ enumerations.
KINDS = ("product", "activate", "norm", "add", "largest", "mean")
OPTIMIZERS = ("adam", "adamw", "sgd")
#: What the clock of ``train`` tells apart.
PARTS = ("products", "elementwise", "batch norm", "loss", "optimizer")

_L, _F, _P = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class Grid(ctypes.Structure):
    """clamp(round(x · scale), low, high) · step; a scale of 0 leaves x as it is."""

    _fields_ = (("scale", _F), ("low", _F), ("high", _F), ("step", _F))


class Lists(ctypes.Structure):
    """Lists of pairs of int32, one list after another."""

    _fields_ = (("starts", _P), ("pairs", _P))


class Operation(ctypes.Structure):
    """One operation on rows; the fields' meaning stands in ``training.cpp``."""

    _fields_ = (
        *((name, _L) for name in ("kind", "input", "input2", "output", "adds", "adds2")),
        *((name, _L) for name in ("channels_in", "channels", "positions_in", "positions", "blocks")),
        *((name, _L) for name in ("weight", "bias", "state", "scratch")),
        *((name, Lists) for name in ("forward", "backward", "pairs")),
        *((name, Grid) for name in ("first", "second")),
        *((name, _F) for name in ("rectify", "momentum", "epsilon")),
    )


class Member(ctypes.Structure):
    """One network with its weights and what its optimizer remembers."""

    _fields_ = (
        ("operations", _P),
        *((name, _L) for name in ("count", "parameters", "logits", "classes")),
        *((name, _P) for name in ("values", "buffers", "moment", "moment2")),
    )


class Scratch(ctypes.Structure):
    """Memory that a step uses and leaves behind; one per thread."""

    _fields_ = (
        *((name, _P) for name in ("rows", "gradients", "packed", "learned")),
        *((name, _L) for name in ("stride", "tile")),
    )


class Optimizer(ctypes.Structure):
    """Which optimizer, how many steps it has taken, and its two numbers."""

    _fields_ = (("kind", _L), ("steps", _L), ("rate", ctypes.c_double), ("decay", ctypes.c_double))


def available() -> bool:
    """Whether there are compiled training steps."""
    return native.training_library() is not None


def train(
    member: Member, scratch: Scratch, optimizer: Optimizer, x: Tensor, labels: Tensor, batch: int, parts: Tensor | None
) -> tuple[Tensor, int]:
    """Optimizer steps on one batch after another.

    Args:
        optimizer: its `steps` are those before the first one here.
        x: shape (steps, features, stride): samples side by side, zeros behind the last of a batch; stride a multiple of
            LANES.
        labels: shape (steps, batch), int32.
        parts: seconds per entry of PARTS are added here, float64; costs some clock readings per operation.

    Returns:
        Each batch's mean cross entropy before its step, float64, shape (steps,); right answers, counted likewise.
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


def logits(member: Member, scratch: Scratch, x: Tensor, samples: int) -> Tensor:
    """What the network says in evaluation mode: float32, shape (classes, samples).

    Args:
        x: shape (features, stride), stride a multiple of LANES.
    """
    library = native.training_library()
    assert library is not None
    out = torch.empty(member.classes, samples)
    library.bitfront_logits(
        ctypes.addressof(member), ctypes.addressof(scratch), x.data_ptr(), samples, x.shape[1], out.data_ptr()
    )
    return out
