"""Where compiled kernels are kept, and whose files are loaded: the user's own, which nobody else can write.

A compiled library runs with all rights of the user. So it is trusted by its owner, never by its path: a folder that
another user owns or can write, for example below /tmp, may hold anything.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import stat
import tempfile
import warnings
from pathlib import Path

from bitfront.cache import cache_dir
from bitfront.errors import UserError

#: Root may write everything anyway.
ROOT = 0
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def library_path(name: str) -> Path:
    """Where the library `name` is, or is to be compiled: in the cache folder, or in a temporary folder of this process
    where the cache folder cannot be trusted, or where there is none."""
    try:
        folder = cache_dir().resolve()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (UserError, OSError):
        return private_folder() / name
    path = (folder / name).resolve()
    # A link inside the folder may lead to another one.
    suspect = next((p for p in (folder, path.parent, path) if p.exists() and not trusted(p)), None)
    if suspect is None:
        return path
    warnings.warn(
        f"{suspect}: another user owns it or can write it, so compiled kernels in it are not loaded; they are compiled "
        f"anew for this process. To keep them, give yourself the folder (chown, chmod go-w), or set BITFRONT_CACHE",
        RuntimeWarning,
        stacklevel=2,
    )
    return private_folder() / name


def trusted(path: Path) -> bool:
    """Whether only this user, and root, can write the file or folder at `path`, a path without links."""
    if not hasattr(os, "getuid"):
        return True  # Windows: the folders of a user are private
    owner, mode = owner_and_mode(path)
    return owner in (os.getuid(), ROOT) and not mode & WRITABLE_BY_OTHERS


def owner_and_mode(path: Path) -> tuple[int, int]:
    """(user id of the owner, permission bits) of what is at `path`."""
    status = path.stat()
    return status.st_uid, stat.S_IMODE(status.st_mode)


@functools.cache
def private_folder() -> Path:
    """A temporary folder that only this user can enter; it is removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="bitfront-kernels-")  # mode 0700
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder).resolve()
