"""Zip archives that somebody else wrote: what they declare is held against the file before anything is unpacked.

NumPy's ``.npz`` and PyTorch's checkpoints are zip archives. A few hundred kilobytes can declare, and unpack to, more
than a machine has. The checksum in the archive shows a single wrong bit.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

from bitfront.errors import UserError

#: So much may be unpacked from any file.
FREE_BYTES = 1 << 26
#: Beyond that, at most so many times the size of the file: zip reaches 1000 on zeros, and 3 to 30 on data.
RATIO = 200
#: The attribute of a part that is a folder.
_FOLDER = 0x10


def check_sizes(path: Path, sizes: Sequence[int], held: int, kind: type[UserError]) -> None:
    """Refuse a file whose parts unpack to far more than it holds, or to more than this machine has.

    Args:
        path: the file, for the message.
        sizes: bytes of each part, as the file declares them.
        held: bytes of the file itself.
        kind: which error is raised.
    """
    total = sum(sizes)
    if min(sizes, default=0) < 0 or total > max(FREE_BYTES, RATIO * held):
        raise kind(
            f"{path} has {held:,} bytes and declares {total:,}, which no data of that size unpacks to; it is damaged, "
            "or made to fill the memory. If it is neither, save it without compression"
        )
    memory = machine_bytes()
    if memory and total > memory:
        raise kind(
            f"{path} declares {total / 2**30:,.1f} GiB, and this machine has {memory / 2**30:,.1f} GiB of memory; use "
            "a part of it, or a larger machine"
        )


def machine_bytes() -> int:
    """The memory of this machine in bytes; 0 where that is not known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def check_members(path: Path, archive: zipfile.ZipFile, held: int, kind: type[UserError]) -> list[zipfile.ZipInfo]:
    """The members of an archive of `held` bytes, once their sizes are possible and each name is there once.

    Raises:
        UserError: of that kind.
    """
    members = archive.infolist()
    names = [member.filename for member in members]
    double = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if double is not None:
        raise kind(f"{path} has the part {double!r} twice; it is damaged, save it again")
    check_sizes(path, [member.file_size for member in members], held, kind)
    return members


def check_contents(path: Path, archive: zipfile.ZipFile, held: int, kind: type[UserError]) -> None:
    """Read every member and compare its checksum, where the archive has checksums.

    Raises:
        UserError: of that kind; a part differs from its checksum.
        zipfile.BadZipFile, OSError, RuntimeError: the archive is damaged in another way.
    """
    members = check_members(path, archive, held, kind)
    folder = next((member.filename for member in members if member.external_attr & _FOLDER and member.file_size), None)
    if folder is not None:
        # torch takes such a part for empty, and gives a tensor of whatever was in the memory.
        raise kind(f"{path} is damaged: its part {folder!r} is marked as a folder; get or save the file again")
    if all(member.CRC == 0 for member in members):
        return  # torch.serialization.set_crc32_options(False) writes none
    damaged = archive.testzip()
    if damaged is not None:
        raise kind(f"{path} is damaged: its part {damaged!r} differs from its checksum; get or save the file again")
