"""The safetensors format: a JSON header with names, dtypes, shapes and offsets, and then the bytes of the tensors.

Nothing in such a file can be code, and there is no checksum in it. Whatever the header says is held against the file
before a tensor is made: the tensors must lie one after the other, without a gap, from the first byte to the last.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfront.errors import CheckpointError, one_of, parsing
from bitfront.files import safetensors

#: Bytes of the length of the header, in front of it.
_LENGTH = 8
#: The format's own limit of the header, in bytes.
_LARGEST_HEADER = 100_000_000
#: More dimensions has no tensor.
_DIMENSIONS = 32
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def is_safetensors(data: bytes, path: Path) -> bool:
    """Whether the bytes of a file are of this format, by its name or by how it begins."""
    return path.suffix == ".safetensors" or data[_LENGTH : _LENGTH + 2] in (b'{"', b"{}", b"{ ")


def read_safetensors(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors in the bytes of a file, by name, on the CPU; `path` is what messages call it.

    Raises:
        CheckpointError: the header is damaged, or does not describe what follows.
    """
    remedy = "the file is damaged; get or save it again"
    with parsing(CheckpointError, f"{path} cannot be read as safetensors", remedy):
        length = int.from_bytes(data[:_LENGTH], "little")
        if len(data) < _LENGTH or length > min(len(data) - _LENGTH, _LARGEST_HEADER):
            raise ValueError(f"its header would have {length:,} bytes, and the file has {len(data):,}")
        header = json.loads(data[_LENGTH : _LENGTH + length].decode("utf-8"), object_pairs_hook=_once)
        if not isinstance(header, dict):
            raise ValueError("its header is no table of tensors")
        body = memoryview(data)[_LENGTH + length :]
        entries = {name: _Entry(name, entry) for name, entry in header.items() if name != "__metadata__"}
        at = 0
        for entry in sorted(entries.values(), key=lambda e: (e.begin, e.end)):
            if entry.begin != at:
                raise ValueError(f"{entry.name!r} begins at byte {entry.begin:,} instead of {at:,}")
            at = entry.end
        if at != len(body):
            raise ValueError(f"its tensors have {at:,} bytes, and {len(body):,} follow the header")
        if sys.byteorder != "little":
            raise ValueError("this machine is big-endian")
        return {name: entry.tensor(body) for name, entry in entries.items()}


def written_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as a file of this format: the largest types first, as the format wants it for aligned reading.

    Args:
        tensors: by name, on the CPU.

    Raises:
        CheckpointError: the format has no such dtype.
    """
    kinds = {dtype: kind for kind, dtype in _DTYPES.items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in kinds:
            raise CheckpointError(f"{name!r} is {tensor.dtype}, which safetensors does not have; {one_of(kinds)}")
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    data = {name: tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in ordered}
    # Transformers reads a file only if it says which framework wrote it.
    return safetensors(((n, kinds[t.dtype], t.shape, data[n]) for n, t in ordered), {"format": "pt"})


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("its header has a name twice")
    return table


class _Entry:
    """One tensor as the header describes it. Raises ValueError where that is not possible."""

    def __init__(self, name: str, entry: Any) -> None:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name!r} is not described by dtype, shape and data_offsets")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name!r} has the dtype {entry['dtype']!r}; {one_of(_DTYPES)}")
        if not _whole(shape) or len(shape) > _DIMENSIONS or not _whole(offsets) or len(offsets) != 2:
            raise ValueError(f"{name!r} has the shape {shape!r} and the offsets {offsets!r}")
        self.name, self.shape = name, shape
        self.dtype = _DTYPES[entry["dtype"]]
        self.begin, self.end = offsets
        needed = math.prod(shape) * self.dtype.itemsize
        if self.end - self.begin != needed:
            raise ValueError(f"{name!r} has {self.end - self.begin:,} bytes, and its shape needs {needed:,}")

    def tensor(self, body: memoryview) -> Tensor:
        part = bytearray(body[self.begin : self.end])
        if self.dtype == torch.bool and max(part, default=0) > 1:
            raise ValueError(f"{self.name!r} has a byte that is neither true nor false")
        flat = torch.frombuffer(part, dtype=self.dtype) if part else torch.zeros(0, dtype=self.dtype)
        return flat.reshape(self.shape)


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
