"""The folder for files that can be computed or downloaded again: data sets, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path

from bitfront.errors import UserError


def cache_dir() -> Path:
    """``BITFRONT_CACHE``, else ``XDG_CACHE_HOME/bitfront``, else ``~/.cache/bitfront``; it may not exist yet.

    Raises:
        UserError: neither is set, and the user has no home directory.
    """
    folder = os.environ.get("BITFRONT_CACHE")
    user_caches = os.environ.get("XDG_CACHE_HOME")
    try:
        if folder:
            return Path(folder).expanduser()
        return (Path(user_caches) if user_caches else Path.home() / ".cache") / "bitfront"
    except RuntimeError:  # no HOME, and a user id that the system does not know
        raise UserError(
            "there is no home directory for the cache of this user; set BITFRONT_CACHE to a folder that can be written"
        ) from None
