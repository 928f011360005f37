"""Which candidates are being evaluated, on disk: whoever ends the process by evaluating one is known at the next start.

A candidate may end its process: its code may call ``os._exit``, crash, or need more memory than there is. No ``except``
sees that. So the codes of a block are written to a small file before it is evaluated in the process of the search. What
is in the file when a search goes on was in flight when the process ended: these candidates are *suspects*, and are
evaluated in a process of their own from then on. Those that end it too are remembered.

The file is written without waiting for the disk. It need not survive the machine, only the process, and for that it is
enough that the system has it. So it costs microseconds. It begins with a checksum: what is damaged, or no regular file,
is as if it were not there.
"""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from bitfront.spaces.base import Codes

#: Where the files stand: beside the store, and below its name, so that they go when it goes.
IN_FLIGHT, SUSPECTS = "-inflight", "-suspects"
#: Bytes of the checksum, and of the length of what follows.
_CHECKSUM, _LENGTH = 4, 8


def key_of(code: NDArray[np.int64]) -> bytes:
    """A code as the key of a dict."""
    return np.ascontiguousarray(code, dtype=np.int64).tobytes()


class InFlight:
    """The candidates in flight of one search.

    Args:
        store: the file of the trials, beside which the files of this stand; None: nothing is written.
        sizes: how many values each parameter of the space has; None: codes that are read may be any.

    Attributes:
        suspects: key of a code → how often a process ended while it evaluated this candidate alone. They were in
            flight when a process ended, or ended the process that they were evaluated in.
    """

    def __init__(self, store: Path | None = None, sizes: Sequence[int] | None = None) -> None:
        self._file: BinaryIO | None = None
        self.suspects: dict[bytes, int] = {}
        if store is None:
            return
        self._in_flight, self._kept = (store.with_name(store.name + end) for end in (IN_FLIGHT, SUSPECTS))
        for row in _read(self._kept):
            if _possible(row[1:], sizes):
                self.suspects[key_of(row[1:])] = int(row[0])
        last = [code for code in _read(self._in_flight) if _possible(code, sizes)]
        for code in last:
            self.suspects[key_of(code)] = self.suspects.get(key_of(code), 0) + (len(last) == 1)
        self.save()
        self._file = self._in_flight.open("wb", buffering=0)

    def begin(self, codes: Codes) -> None:
        """These candidates are about to be evaluated in this process, and no others."""
        if self._file is not None:
            self._file.seek(0)
            self._file.write(_packed(codes))
            self._file.truncate()

    def end(self) -> None:
        """Nothing is evaluated now."""
        if self._file is not None:
            self._file.seek(0)
            self._file.truncate()

    def forget(self, keys: Collection[bytes]) -> None:
        """These candidates are no suspects any more."""
        for key in keys:
            self.suspects.pop(key, None)

    def save(self) -> None:
        """Write the suspects down."""
        if not self.suspects:
            self._kept.unlink(missing_ok=True)
            return
        rows = [[count, *np.frombuffer(key, dtype=np.int64).tolist()] for key, count in self.suspects.items()]
        new = self._kept.with_name(self._kept.name + "-new")
        new.write_bytes(_packed(np.array(rows, dtype=np.int64)))
        new.replace(self._kept)

    def close(self) -> None:
        """The search is over, or was stopped: nothing is in flight."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._in_flight.unlink(missing_ok=True)
            self.save()


def _packed(rows: Codes) -> bytes:
    """Rows as they are in a file: checksum, length, and an array in NumPy's format."""
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    data = buffer.getvalue()
    return zlib.crc32(data).to_bytes(_CHECKSUM, "little") + len(data).to_bytes(_LENGTH, "little") + data


def _read(path: Path) -> Codes:
    """The rows in a file; none where it is not there or not whole: then nothing was evaluated yet."""
    none = np.zeros((0, 0), dtype=np.int64)
    if not path.is_file():
        path.unlink(missing_ok=True)  # a pipe or a device would be written to, and might wait for a reader
        return none
    with contextlib.suppress(OSError):
        content = path.read_bytes()
        begin = _CHECKSUM + _LENGTH
        length = int.from_bytes(content[_CHECKSUM:begin], "little")
        data = content[begin : begin + length]
        if data and len(data) == length and zlib.crc32(data) == int.from_bytes(content[:_CHECKSUM], "little"):
            rows: Codes = np.load(io.BytesIO(data), allow_pickle=False)
            return rows
    return none


def _possible(code: NDArray[np.int64], sizes: Sequence[int] | None) -> bool:
    """Whether this is a code of a space whose parameters have so many values."""
    return sizes is None or (len(code) == len(sizes) and bool(((code >= 0) & (code < np.array(sizes))).all()))
