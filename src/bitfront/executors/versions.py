"""What a worker must have in common with the process that gives it work, so that it computes the same bits."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import socket
from dataclasses import dataclass, fields
from pathlib import Path

import bitfront

#: Field of ``Versions`` → what a message calls it.
WORDS = {
    "python": "Python",
    "torch": "torch",
    "numpy": "NumPy",
    "bitfront": "bitfront",
    "source": "source files of bitfront (a digest)",
    "processor": "processor features that torch uses",
    "kernels": "compiled kernels",
}


@dataclass(frozen=True)
class Versions:
    """Versions, as texts: what could change the last bit of a result."""

    python: str
    torch: str
    numpy: str
    bitfront: str
    source: str
    processor: str
    kernels: str

    def difference(self, other: Versions) -> str:
        """What the two have not in common, in words; empty if nothing."""
        pairs = [(WORDS[f.name], getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return "; ".join(f"{word}: {here!r} here, {there!r} there" for word, here, there in pairs if here != there)


@functools.cache
def of_this_process() -> Versions:
    """The versions of this process."""
    import numpy as np
    import torch

    from bitfront.kernels import native

    return Versions(
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=np.__version__,
        bitfront=importlib.metadata.version("bitfront"),
        source=_digest(Path(bitfront.__file__).parent),
        processor=torch.backends.cpu.get_cpu_capability(),
        kernels="compiled" if native.library() is not None else "none, plain Python",
    )


def worker_name() -> str:
    """The worker that this is, for messages: its machine and its process."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for end in ("*.py", "*.cpp", "*.h") for p in folder.rglob(end)):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
