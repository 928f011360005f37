"""Files that are there whole or as they were before, and the leftovers of processes that were killed while writing.

A file is written under a temporary name beside its place, brought to the disk, and renamed. The temporary name has the
number of the process in it, so that whoever uses the folder next can tell what a dead process has left there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from bitfront.errors import RunError, UserError

#: ``.NAME.PROCESS.part``, and the temporary names of Bitfront 0.1.
_PART = re.compile(r"^\..+\.(?:(?P<process>\d+)\.part|[0-9a-f]{32}\.tmp)$")
#: Folders in the folder for temporary files.
_SCRATCH = re.compile(r"^bitfront-(?P<process>\d+)-")


@contextlib.contextmanager
def whole(path: Path, kind: type[UserError] = RunError) -> Iterator[Path]:
    """Where to write a file that is to be there whole, or as it was before: it becomes `path` if nothing goes wrong.

    Args:
        path: the file; its folder must exist.
        kind: which error is raised where it cannot be written.

    Raises:
        UserError: of that kind; the file cannot be written, and the message names it.
    """
    if path.is_dir():
        raise kind(f"{shown(path)}: Is a directory; name a file in it")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
        _to_disk(path.parent)
    except OSError as error:
        raise kind(f"{shown(path)}: cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str, kind: type[UserError] = RunError) -> None:
    """Write `text` as UTF-8, whole or not at all. Raises as :func:`whole`."""
    with whole(path, kind) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def _to_disk(folder: Path) -> None:
    """Make a rename in `folder` outlive a power cut, where the system can do that."""
    with contextlib.suppress(OSError):  # some file systems cannot
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def scratch(purpose: str) -> Iterator[Path]:
    """A folder for temporary files, deleted at the end; first those are deleted that dead processes have left."""
    sweep_scratch()
    with tempfile.TemporaryDirectory(prefix=f"bitfront-{os.getpid()}-{purpose}-") as folder:
        yield Path(folder)


def sweep(folder: Path) -> None:
    """Delete what processes that are dead were writing in `folder`, at any depth, and in the folder for temporary
    files. What cannot be deleted stays."""
    for path in folder.rglob(".*"):
        _delete_if_dead(path, _PART.match(path.name))
    sweep_scratch()


def sweep_scratch() -> None:
    """Delete the temporary folders of processes that are dead."""
    with contextlib.suppress(OSError):
        for path in Path(tempfile.gettempdir()).iterdir():
            _delete_if_dead(path, _SCRATCH.match(path.name))


def _delete_if_dead(path: Path, name: re.Match[str] | None) -> None:
    if name is None or _alive(name["process"]):
        return
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _alive(process: str | None) -> bool:
    """Whether a process of this number runs; a name without a number is of no process that runs."""
    if process is None:
        return False
    if os.name != "posix":
        return int(process) == os.getpid()  # asking would end it there
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # of another user
    return True


def shown(path: Path) -> Path:
    """`path` as a user reads it: relative to the working directory where it is below that."""
    try:
        return path.relative_to(Path.cwd())
    except (ValueError, OSError):
        return path


def short_name(name: str) -> str:
    """A model or dataset as a part of a file's name: of a path its last part, without its ending."""
    prefix, colon, place = name.rpartition(":")
    if place.startswith((".", "/", "~")):
        name = f"{prefix}{colon}{Path(place).stem or 'here'}"
    return name.replace(":", "-").replace("/", "-")


def safetensors(
    tensors: Iterable[tuple[str, str, Sequence[int], bytes]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """A file of the safetensors format: the length of a JSON header, the header, then the bytes of the tensors.

    Args:
        tensors: (name, dtype as the format spells it, shape, bytes) in the order in which they are stored.
        metadata: texts that stand in the header.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at, parts = 0, []
    for name, kind, shape, data in tensors:
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        parts.append(data)
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text + b"".join(parts)
