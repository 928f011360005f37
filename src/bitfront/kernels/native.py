"""Compiles ``kernels.cpp``, ``training.cpp`` and ``bits.cpp`` for this machine, once, and loads them with ctypes.

Each library is kept in the user's cache directory (``folder.py``), under a name that depends on the source, the
compiler and the processor. Compiling takes some seconds, once. Everything runs on torch alone if there is no compiler,
if the compiled kernels do not give the same bits as ``plain.py``, or if ``BITFRONT_NATIVE=0``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from bitfront.kernels.folder import library_path

#: The two -fno let the compiler vectorise rounding and selection; neither changes a value.
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-w")
#: Tried in this order: a compiler that does not know the first set takes the second.
TUNING = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())
COMPILE_SECONDS = 60
HEADERS = sorted(Path(__file__).parent.glob("*.h"))

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_DOUBLE = ctypes.c_double
_AFFINE = [_POINTER, _POINTER, _INT]
_ROUND = [_POINTER, _POINTER, _LONG, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER, *_AFFINE]
_EVALUATION: dict[str, tuple[list[Any], Any]] = {
    "bitfront_round": (_ROUND, None),
    "bitfront_round_scaled": ([_POINTER, _POINTER, _INT, *[_POINTER] * 3, _INT, _POINTER], None),
    "bitfront_fast_bytes": ([], _INT),
    "bitfront_convolve": ([_POINTER, _LONG, *[_POINTER] * 3, *_AFFINE, _INT, _POINTER], _INT),
    "bitfront_chain": ([*[_LONG, _POINTER] * 3, _POINTER, _POINTER, *[_LONG] * 3], _INT),
    "bitfront_add": ([_POINTER] * 3 + [_LONG] * 4 + [*_AFFINE, _FLOAT] * 2, None),
    "bitfront_ordered": ([_POINTER] * 3 + [_LONG] * 5, None),
    "bitfront_scale": ([_POINTER, *[_LONG] * 4, _INT, _POINTER, _POINTER], None),
    "bitfront_score": ([_POINTER, _POINTER, _LONG, _LONG, _LONG, _INT, _POINTER, _POINTER], None),
}
_TRAINING: dict[str, tuple[list[Any], Any]] = {
    "bitfront_train": ([_POINTER] * 5 + [_LONG] * 4 + [_POINTER] * 2, _LONG),
    "bitfront_logits": ([_POINTER] * 3 + [_LONG] * 2 + [_POINTER], None),
}
_BITS: dict[str, tuple[list[Any], Any]] = {
    "bitfront_learn": (
        [_POINTER] * 4
        + [_LONG]
        + [_POINTER] * 3
        + [_LONG] * 2
        + [_POINTER] * 2
        + [_LONG] * 2
        + [_DOUBLE]
        + [_POINTER] * 2,
        _DOUBLE,
    ),
    "bitfront_learned_logits": ([_POINTER] * 4 + [_LONG, _POINTER, _LONG] + [_POINTER] * 3, _DOUBLE),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels of evaluation, or None if there are none. A call releases Python's lock.

    Compiled without fused multiply-adds, so that results equal those of torch.
    """
    return _load_library("kernels.cpp", "-ffp-contract=off", _EVALUATION)


@functools.cache
def training_library() -> ctypes.CDLL | None:
    """The compiled training steps, or None if there are none. A call releases Python's lock."""
    return _load_library("training.cpp", "-ffp-contract=fast", _TRAINING)


@functools.cache
def bits_library() -> ctypes.CDLL | None:
    """The compiled training of weights with their bits, or None if there is none. A call releases Python's lock."""
    return _load_library("bits.cpp", "-ffp-contract=fast", _BITS)


def _load_library(name: str, contraction: str, signatures: dict[str, tuple[list[Any], Any]]) -> ctypes.CDLL | None:
    if os.environ.get("BITFRONT_NATIVE", "1") == "0":
        return None
    compiler = _compiler()
    if compiler is None:
        return None
    source = Path(__file__).with_name(name)
    try:
        path = library_path(f"{source.stem}-{_fingerprint(compiler, source, contraction)}.so")
        if not path.exists():
            _compile(compiler, source, contraction, path)
        loaded = ctypes.CDLL(str(path))
        for function, (arguments, result) in signatures.items():
            getattr(loaded, function).argtypes = arguments
            getattr(loaded, function).restype = result
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None
    return loaded


def _compiler() -> str | None:
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _fingerprint(compiler: str, source: Path, contraction: str) -> str:
    """A hash of sources, compiler and processor: machines with different processors may share a home directory."""
    real = Path(compiler).resolve()
    texts = [file.read_text(encoding="utf-8") for file in (*HEADERS, source)]
    parts = [*texts, *FLAGS, contraction, str(real), str(real.stat().st_mtime_ns), platform.machine()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        parts += sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    else:
        parts.append(platform.processor())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, source: Path, contraction: str, path: Path) -> None:
    """Write to a temporary file first, because another process may compile the same library at the same time."""
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        for tuning in TUNING:
            command = [compiler, *FLAGS, contraction, *tuning, "-o", temporary, str(source)]
            done = subprocess.run(command, capture_output=True, timeout=COMPILE_SECONDS, check=False)
            if done.returncode == 0:
                Path(temporary).replace(path)
                return
        raise subprocess.SubprocessError(done.stderr.decode(errors="replace"))
    finally:
        Path(temporary).unlink(missing_ok=True)
