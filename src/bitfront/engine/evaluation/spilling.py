"""Outputs of layers that are kept on disk, where there is no room for them in memory.

It pays where computing an output again takes longer than writing it once and reading it back. The file has no name, so
nothing is left of it whatever ends the process. What is read back has the same bits, in the same order in memory: both
matter to the sums of the next layer.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from bitfront.operations.lookup import tensors_in

#: Bytes per second that a disk is taken to write and read before it was tried.
DISK_SPEED = 2e8
#: Seconds that a write or a read takes beside that.
DELAY = 1e-3
#: Computing again must take so many times as long as the disk does.
WORTH = 2.0
#: So much of a disk stays free, in bytes.
LEFT_FREE = 2 << 30


@dataclass(frozen=True, eq=False)
class Spilled:
    """An output on disk: the place, shape, strides and type of each of its tensors, and the output without them."""

    places: tuple[tuple[int, torch.Size, tuple[int, ...], torch.dtype], ...]
    shell: Any


@dataclass(eq=False)
class Spill:
    """A file of outputs.

    Attributes:
        folder: where the file is; None: where temporary files are.
        speed: bytes per second, as measured.
        written: number of outputs that were written.
    """

    folder: Path | None = None
    speed: float = DISK_SPEED
    written: int = 0
    _file: IO[bytes] | None = None
    _end: int = 0
    _free: dict[int, list[int]] = field(default_factory=dict)

    def pays(self, size: int, runs: int, seconds: float) -> bool:
        """Whether writing `size` bytes and reading them `runs` times is cheaper than to compute them each time, which
        takes `seconds`."""
        return runs * seconds > WORTH * (runs + 1) * (DELAY + size / self.speed)

    def write(self, value: Any) -> Spilled | None:
        """Write an output; None where that is not possible: no room, or a tensor with gaps in memory."""
        tensors = list(tensors_in(value))
        dense = all(_is_dense(t) and t.device.type == "cpu" for t in tensors)
        size = sum(t.numel() * t.element_size() for t in tensors)
        if not tensors or not dense or not self._has_room(size):
            return None
        began, places = time.perf_counter(), []
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            for tensor in tensors:
                start = self._place(tensor.numel() * tensor.element_size())
                self._file.seek(start)
                self._file.write(_bytes(tensor).numpy().tobytes())
                places.append((start, tensor.shape, tensor.stride(), tensor.dtype))
        except OSError:
            return None
        self._measured(size, began)
        self.written += 1
        return Spilled(tuple(places), _shell(value))

    def read(self, spilled: Spilled) -> Any:
        """The output again."""
        assert self._file is not None
        began, tensors = time.perf_counter(), []
        for start, shape, stride, dtype in spilled.places:
            tensor = torch.empty_strided(shape, stride, dtype=dtype)
            self._file.seek(start)
            self._file.readinto(_bytes(tensor).numpy())  # type: ignore[attr-defined]
            tensors.append(tensor)
        self._measured(sum(t.numel() * t.element_size() for t in tensors), began)
        return _filled(spilled.shell, tensors)

    def forget(self, spilled: Spilled) -> None:
        """Let another output take the place of this one."""
        for start, shape, _, dtype in spilled.places:
            self._free.setdefault(shape.numel() * dtype.itemsize, []).append(start)

    def _place(self, size: int) -> int:
        if self._free.get(size):
            return self._free[size].pop()
        self._end += size
        return self._end - size

    def _has_room(self, size: int) -> bool:
        return shutil.disk_usage(self.folder or tempfile.gettempdir()).free > size + LEFT_FREE

    def _measured(self, size: int, began: float) -> None:
        seconds = max(1e-9, time.perf_counter() - began)
        self.speed = min(self.speed, size / seconds) if size / seconds < self.speed / 2 else self.speed


def _is_dense(tensor: Tensor) -> bool:
    """Whether the values of a tensor fill a piece of memory, in some order."""
    return tensor.numel() > 0 and torch.ops.aten.is_non_overlapping_and_dense(tensor)


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a dense tensor as bytes."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8)


def _shell(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_shell(v) for v in value)
    return _HOLE if isinstance(value, Tensor) else value


def _filled(shell: Any, tensors: Sequence[Tensor]) -> Any:
    left = iter(tensors)

    def fill(part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple(fill(p) for p in part)
        return next(left) if part is _HOLE else part

    return fill(shell)


_HOLE = object()
