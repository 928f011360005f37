"""A call: what travels to a worker, what the worker does with it, and what comes back.

A call is small: a function, an argument, and the digest of what all calls share (the model, the data). What is shared
is read by each worker once, from a file that it can see, and kept by its digest. A worker that cannot see the file says
so, and gets the call again with the content. Before anything else a worker compares its versions with those of the
process that asks: another version could compute other bits, so such a worker refuses.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import importlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitfront import interrupts
from bitfront.errors import BitfrontError
from bitfront.executors.versions import Versions, of_this_process, worker_name
from bitfront.registry import import_object

#: How many shared objects a worker keeps.
KEPT = 2


@dataclass(frozen=True)
class Shared:
    """What many calls share: bytes, by their content.

    Attributes:
        digest: SHA-256 of the bytes, in hexadecimal digits.
        path: a file with the bytes; empty if there is none.
        content: the bytes themselves, for a worker that cannot read the file.
    """

    digest: str
    path: str = ""
    content: bytes | None = None

    @staticmethod
    def of(content: bytes, folder: Path | None) -> Shared:
        """The digest of `content`, and a file with it in `folder`, named by its content; None: no file.

        Raises:
            OSError: the file cannot be written.
        """
        digest = hashlib.sha256(content).hexdigest()
        if folder is None:
            return Shared(digest)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{digest[:32]}.job"
        if not path.exists():
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_bytes(content)
            part.replace(path)
        return Shared(digest, str(path.absolute()))

    def read(self) -> bytes | None:
        """The bytes; None if this process has no way to them, or the file has other ones."""
        if self.content is not None:
            return self.content
        if not self.path:
            return None
        try:
            content = Path(self.path).read_bytes()
        except OSError:
            return None
        return content if hashlib.sha256(content).hexdigest() == self.digest else None


@dataclass(frozen=True)
class Call:
    """A call of a method of a shared object.

    Attributes:
        shared: the bytes that the object is made of.
        opener: ``module:function``, which makes the object from the bytes.
        method: of the object.
        argument: of the method.
        versions: those of the process that asks.
        process: the number of that process, which a worker that is a thread of it shares.
        limit: seconds after which the worker ends itself; None: never.
        warming: seconds that a worker may take longer for its first call.
        mark: a file that the worker writes when it is about to call the method; empty: none.
    """

    shared: Shared
    opener: str
    method: str
    argument: Any
    versions: Versions
    process: int
    limit: float | None = None
    warming: float = 0.0
    mark: str = ""


@dataclass(frozen=True)
class Answer:
    """What came out.

    Attributes:
        value: what the method returned.
        worker: the name of the worker.
        seconds: how long the method took.
        error: what the method raised, if that is for the user; the call must not be repeated.
    """

    value: Any
    worker: str
    seconds: float = 0.0
    error: BitfrontError | None = None


@dataclass(frozen=True)
class Missing:
    """The worker cannot read what is shared; it must get the content."""

    worker: str


@dataclass(frozen=True)
class Refused:
    """The worker has other versions.

    Attributes:
        difference: what differs, in words.
    """

    worker: str
    difference: str


_OPENED: OrderedDict[tuple[str, str], Any] = OrderedDict()
#: Digests of objects with which a method was called in this process.
_CALLED: set[str] = set()
#: Evaluators are not made for several threads at a time.
_ONE_AT_A_TIME = threading.Lock()


def carry_out(call: Call) -> Answer | Missing | Refused:
    """Do in a worker what a call asks for."""
    name, here = worker_name(), of_this_process()
    if here != call.versions:
        return Refused(name, call.versions.difference(here))
    with _ONE_AT_A_TIME:
        if os.getpid() != call.process:
            interrupts.ignore()
        try:
            opened = _opened(call)
            if opened is None:
                return Missing(name)
            _mark(call)
            with _limited(call):
                began = time.perf_counter()
                value = getattr(opened, call.method)(call.argument)
            return Answer(value, name, time.perf_counter() - began)
        except BitfrontError as error:
            return Answer(None, name, error=error)


def _mark(call: Call) -> None:
    """Note that the method is about to be called, where the worker sees the folder of the mark."""
    if call.mark:
        with contextlib.suppress(OSError):
            Path(call.mark).touch()


def _opened(call: Call) -> Any:
    """The shared object of a call; None if this process cannot read it."""
    key = call.shared.digest, call.opener
    if key in _OPENED:
        _OPENED.move_to_end(key)
        return _OPENED[key]
    content = call.shared.read()
    if content is None:
        return None
    opener = import_object(call.opener, "opener")
    assert callable(opener)
    opened = _OPENED[key] = opener(content)
    while len(_OPENED) > KEPT:
        _OPENED.popitem(last=False)
    return opened


@contextlib.contextmanager
def _limited(call: Call) -> Iterator[None]:
    """Within this, the process ends itself when the time of the call is over, whatever its code does."""
    if call.limit is None:
        yield
        return
    first = call.shared.digest not in _CALLED
    with Path(os.devnull).open("w") as nowhere:
        faulthandler.dump_traceback_later(call.limit + (call.warming if first else 0.0), exit=True, file=nowhere)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
    _CALLED.add(call.shared.digest)


def begin_worker() -> None:
    """What a process does that works for nobody else: it leaves Ctrl-C to the process that asks, and makes no semaphore
    that would stay in the system after it was killed, as tqdm does by itself, which torch uses."""
    interrupts.ignore()
    with contextlib.suppress(ImportError):
        importlib.import_module("tqdm").tqdm.set_lock(threading.RLock())


@dataclass(frozen=True)
class Prepare:
    """Opens what calls share before the first of them; an executor may have its workers do that when they start."""

    call: Call

    def __call__(self) -> None:
        """Open it. What goes wrong is said by the first call."""
        begin_worker()
        with contextlib.suppress(Exception):
            if of_this_process() == self.call.versions:
                _opened(self.call)
