"""Weights of options that are kept, because it takes time to compute them again, within a limit of memory.

The weights of an option, rounded and as the numbers that products take, are computed when a candidate first needs them.
Together they can be many times as large as the model. So all evaluators of a search keep them in one place. Where they
take more than they may, those that were not used for the longest time are forgotten, and computed again when they are
needed. That takes time, and changes no number. How much that is comes from an estimate of what else a search takes, so
the process is looked at after each block of candidates too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from bitfront.transforms.arithmetic import WholeProduct
from bitfront.transforms.direct import DirectProduct, Kept

T = TypeVar("T")
#: What is kept is counted when so many bytes, as a share of the limit, were added.
COUNTED = 1 / 128
#: Freed memory is returned where a process takes this share of what it may, and again after so much more.
NEAR, MORE = 0.85, 0.02
#: Where it takes this share of what it may after that, less is kept.
FULL = 0.95
_NUMBERS = count()


@dataclass(eq=False)
class KeptWeights:
    """What is computed of weights, the most recently used last. Picklable, without what it holds.

    Attributes:
        limit: how many bytes all of it may take; None: no limit.
        process: how many bytes the process may take, with everything else in it; None: no limit was stated.
        least: `limit` is not lowered below this: what one layer needs while it is computed.
        forgotten: how often something was forgotten so far.
    """

    limit: int | None = None
    process: int | None = None
    least: int = 0
    forgotten: int = 0
    _things: OrderedDict[Hashable, Any] = field(default_factory=OrderedDict, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    _added: int = 0
    _after_return: int = 0

    def __getstate__(self) -> dict[str, int | None]:
        return {"limit": self.limit, "process": self.process, "least": self.least}

    def __setstate__(self, state: dict[str, int | None]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def shelf(self, owner: object, others: Iterable[Tensor] = ()) -> Shelf:
        """A place for what belongs to `owner`; it is forgotten with it.

        Args:
            others: tensors that are in memory anyway, such as parameters of the model.
        """
        shelf = Shelf(self, next(_NUMBERS), frozenset(_place(t) for t in others))
        weakref.finalize(owner, self._forget_all, shelf)
        return shelf

    def _get(self, shelf: Shelf, key: Hashable, make: Callable[[], T]) -> T:
        whole = shelf, key
        if self.limit is None:
            known = self._things.get(whole)
            if known is not None:
                return cast(T, known)
        with self._lock:
            self._stay_below_limit()
            known = self._things.get(whole)
            if known is None:
                known = self._things[whole] = make()
                if self.limit is not None:
                    self._added += sum(_sizes(shelf, known).values())
                    if self._added > self.limit * COUNTED:
                        self._trim()
            elif self.limit is not None:
                self._things.move_to_end(whole)
            return cast(T, known)

    def _stay_below_limit(self) -> None:
        """Return freed memory to the system where the process is near its limit, and forget what is too much then.

        Activations of many sizes come and go, and the C library keeps their places. After a search of a transformer of
        36 million parameters the process took 2.4 GB, and 1.15 GB once they were returned.
        """
        if self.process is None:
            return
        taken = resident() or 0
        if taken > max(NEAR * self.process, self._after_return + MORE * self.process):
            return_freed_memory()
            self._forget_excess(FULL)
            taken = self._after_return = resident() or 0
        self._after_return = min(self._after_return, taken)

    def _forget_excess(self, share: float) -> None:
        """Keep less from now on, where the process takes more than a share of what it may: by as much as that is."""
        assert self.process is not None
        excess = _excess(int(share * self.process))
        if excess > 0:
            self.limit = max(self.least, self.bytes - excess)
            self._trim(in_use=0)

    def _trim(self, in_use: int = 1) -> None:
        """Forget what was not used for the longest time, until the rest fits; the last `in_use` stay."""
        assert self.limit is not None
        self._added = 0
        sizes = {whole: _sizes(whole[0], thing) for whole, thing in self._things.items()}  # type: ignore[index]
        holders = Counter(place for places in sizes.values() for place in places)
        bytes_of = {place: size for places in sizes.values() for place, size in places.items()}
        taken = sum(bytes_of.values())
        for whole, places in list(sizes.items())[: len(sizes) - in_use]:
            if taken <= self.limit:
                break
            del self._things[whole]
            self.forgotten += 1
            for place in places:
                holders[place] -= 1
                taken -= 0 if holders[place] else bytes_of[place]
        return_freed_memory()

    @property
    def bytes(self) -> int:
        """How many bytes all of it takes."""
        with self._lock:
            places = {p: s for whole, thing in self._things.items() for p, s in _sizes(whole[0], thing).items()}  # type: ignore[index]
        return sum(places.values())

    def settle(self) -> None:
        """Return freed memory to the system, where there is a limit: after work that freed much."""
        if self.limit is not None:
            return_freed_memory()

    def hold(self) -> int:
        """Keep less from now on, where the process takes more than it may: by as much as that is.

        Returns:
            The bytes that the process takes then, if that is still too much; else 0.
        """
        if self.process is None or _excess(self.process) <= 0:
            return 0
        return_freed_memory()
        with self._lock:
            self._forget_excess(1.0)
        return self.process + excess if (excess := _excess(self.process)) > 0 else 0

    def make_room(self, size: int | None = None) -> None:
        """Forget everything, where there is a limit: something else needs the memory.

        Args:
            size: how many bytes it needs; nothing is forgotten where the process is not nearly full with so many more.
                None: it needs all there is.
        """
        self.settle()
        if size is not None and (self.process is None or _excess(int(FULL * self.process)) + size <= 0):
            return
        if self.limit is not None:
            with self._lock:
                self.forgotten += len(self._things)
                self._things.clear()
            return_freed_memory()

    def _forget_all(self, shelf: Shelf) -> None:
        with self._lock:
            for whole in [w for w in self._things if w[0] is shelf]:  # type: ignore[index]
                del self._things[whole]


def return_freed_memory() -> None:
    """Let the C library return what is freed to the system, if it is glibc.

    It keeps blocks of up to 32 MB, and often does not use them again where memory is aligned (glibc bug 14581). So a
    process would take many times what is in use.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such function
        ctypes.CDLL(None).malloc_trim(0)


def bytes_of(model: nn.Module) -> int:
    """How many bytes the parameters and buffers of a model take."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def resident() -> int | None:
    """The memory that this process takes, in bytes; None where the system does not say it (it is not Linux)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError):
        return None


def _excess(limit: int) -> int:
    """By how many bytes this process takes more than a limit; 0 or less where it does not."""
    return (resident() or 0) - limit


@dataclass(frozen=True, eq=False)
class Shelf:
    """The part of ``KeptWeights`` that belongs to one owner."""

    store: KeptWeights
    number: int
    others: frozenset[int]

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is kept under a key; it is made where nothing is. It may be forgotten at any time."""
        return self.store._get(self, key, make)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _sizes(shelf: Shelf, thing: object) -> dict[int, int]:
    """Place in memory → bytes, of the tensors that something holds and that would not be in memory without it."""
    storages = {_place(t): t.untyped_storage().nbytes() for t in _tensors(thing)}
    return {place: size for place, size in storages.items() if place not in shelf.others}


def _tensors(thing: object) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, tuple | list):
        for part in thing:
            yield from _tensors(part)
    elif isinstance(thing, dict):
        yield from _tensors(list(thing.values()))
    elif isinstance(thing, WholeProduct):
        yield from _tensors([thing.weight.numbers, vars(thing).get("digits")])
    elif isinstance(thing, Kept):
        yield from _tensors([thing.parameters, thing.products, thing.direct])
    elif isinstance(thing, DirectProduct):
        yield from _tensors(thing.operands)
    elif isinstance(thing, nn.Module):
        yield from _tensors([list(thing.parameters()), vars(thing).get("kept")])
