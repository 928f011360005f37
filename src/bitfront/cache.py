"""Where Bitfront keeps what can be made or fetched again: downloads, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``BITFRONT_CACHE``, else ``XDG_CACHE_HOME/bitfront``, else ``~/.cache/bitfront``."""
    own = os.environ.get("BITFRONT_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "bitfront"
