"""The folder for files that can be computed or downloaded again: data sets, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``BITFRONT_CACHE``, else ``XDG_CACHE_HOME/bitfront``, else ``~/.cache/bitfront``; it may not exist yet."""
    folder = os.environ.get("BITFRONT_CACHE")
    if folder:
        return Path(folder).expanduser()
    user_caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(user_caches) if user_caches else Path.home() / ".cache") / "bitfront"
