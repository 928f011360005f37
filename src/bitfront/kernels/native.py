"""Compiles ``kernels.cpp`` and ``training.cpp`` for this very machine, once, and loads them with ctypes.

Each library is kept in the user's cache directory under a name that depends on the source, the compiler and the
processor. It takes about a second to make. Where there is no compiler, or what it made does not compute to the last bit
what ``plain.py`` does, everything runs on torch alone. ``BITFRONT_NATIVE=0`` asks for that.
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

from bitfront.cache import cache_dir

#: The two -fno let rounding and selection be vectorised; neither changes a value.
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-w")
#: Tried in this order: a compiler that does not know the first set takes the second.
TUNING = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())
COMPILE_SECONDS = 60
HEADER = Path(__file__).with_name("floats.h")

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_AFFINE = [_POINTER, _POINTER, _INT]
_ROUND = [_POINTER, _POINTER, _LONG, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER, *_AFFINE]
_SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "bitfront_round": (_ROUND, None),
    "bitfront_round_bytes": (_ROUND, _INT),
    "bitfront_add": ([_POINTER] * 3 + [_LONG] * 4 + [*_AFFINE, _FLOAT] * 2, None),
    "bitfront_score": ([_POINTER, _POINTER, _LONG, _LONG, _LONG, _INT, _POINTER, _POINTER], None),
}


_TRAINING: dict[str, tuple[list[Any], Any]] = {
    "bitfront_train": ([_POINTER] * 5 + [_LONG] * 4 + [_POINTER] * 2, _LONG),
    "bitfront_logits": ([_POINTER] * 3 + [_LONG] * 2 + [_POINTER], None),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels of evaluation; None where they cannot be had. Calling into them releases Python's lock.

    Without fused multiply-adds, so that results equal those of torch."""
    return _loaded("kernels.cpp", "-ffp-contract=off", _SIGNATURES)


@functools.cache
def training_library() -> ctypes.CDLL | None:
    """The compiled training steps; None where they cannot be had. Calling into them releases Python's lock."""
    return _loaded("training.cpp", "-ffp-contract=fast", _TRAINING)


def _loaded(name: str, contraction: str, signatures: dict[str, tuple[list[Any], Any]]) -> ctypes.CDLL | None:
    if os.environ.get("BITFRONT_NATIVE", "1") == "0":
        return None
    compiler = _compiler()
    if compiler is None:
        return None
    source = Path(__file__).with_name(name)
    path = cache_dir() / f"{source.stem}-{_fingerprint(compiler, source, contraction)}.so"
    try:
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
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _fingerprint(compiler: str, source: Path, contraction: str) -> str:
    """A home directory may be shared by machines whose processors differ."""
    real = Path(compiler).resolve()
    texts = [file.read_text(encoding="utf-8") for file in (HEADER, source)]
    parts = [*texts, *FLAGS, contraction, str(real), str(real.stat().st_mtime_ns), platform.machine()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        parts += sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    else:
        parts.append(platform.processor())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, source: Path, contraction: str, path: Path) -> None:
    """Into a file of its own first: another process may be doing the same."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        for tuning in TUNING:
            command = [compiler, *FLAGS, contraction, *tuning, "-o", name, str(source)]
            done = subprocess.run(command, capture_output=True, timeout=COMPILE_SECONDS, check=False)
            if done.returncode == 0:
                Path(name).replace(path)
                return
        raise subprocess.SubprocessError(done.stderr.decode(errors="replace"))
    finally:
        Path(name).unlink(missing_ok=True)
