"""Which candidates are known, and where each stands: an index of keys, for millions of them.

Keys are rows of 64-bit integers: ``Space.keys``, or codes themselves. Stretches of consecutive numbers, such as brute
force goes through, are kept as (first number, first row, length), whatever their length; all other keys are in a hash
table of NumPy arrays, in which a whole block is looked up or added by a few array operations.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.int64]
Rows = NDArray[np.int64]

#: Shorter stretches of consecutive numbers go into the hash table.
STRETCH = 64


class Index:
    """Keys in the order in which they were added: row 0, 1, ...; each once. Grows; nothing is ever taken out.

    Args:
        width: 64-bit integers per key, 1 or more.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._count = 0
        # Stretches of consecutive numbers, sorted: first number, first row, length.
        self._stretches = np.zeros((0, 3), dtype=np.int64)
        # The others: their keys and rows in the order added, and a table of slots with places in these, or −1.
        self._keys = np.zeros((64, width), dtype=np.int64)
        self._rows = np.zeros(64, dtype=np.int64)
        self._others = 0
        self._slots = np.full(256, -1, dtype=np.int64)

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Memory that the index takes."""
        return self._stretches.nbytes + self._keys.nbytes + self._rows.nbytes + self._slots.nbytes

    def find(self, keys: Keys) -> Rows:
        """The row of each key, shape (keys,); −1 where it is not known."""
        found = np.full(len(keys), -1, dtype=np.int64)
        if len(self._stretches):
            first, row, length = self._stretches.T
            at = np.searchsorted(first, keys[:, 0], side="right") - 1
            offset = keys[:, 0] - first[at]
            inside = (at >= 0) & (offset < length[at])
            found[inside] = (row[at] + offset)[inside]
        if self._others:
            left = np.flatnonzero(found < 0)
            slot = self._home(keys[left])
            while len(left):
                place = self._slots[slot]
                hit = (place >= 0) & (self._keys[place] == keys[left]).all(axis=1)
                found[left[hit]] = self._rows[place[hit]]
                on = (place >= 0) & ~hit
                left, slot = left[on], (slot[on] + 1) & (len(self._slots) - 1)
        return found

    def add(self, keys: Keys) -> None:
        """Append keys.

        Raises:
            ValueError: one of them is known, or comes twice; its place among `keys` is the exception's argument. The
                index must not be used any more.
        """
        known = np.flatnonzero(self.find(keys) >= 0)
        if len(known):
            raise ValueError(int(known[0]))
        rows = np.arange(self._count, self._count + len(keys), dtype=np.int64)
        loose = np.ones(len(keys), dtype=bool)
        if self.width == 1 and len(keys) >= STRETCH:
            edges = np.flatnonzero(np.diff(keys[:, 0]) != 1) + 1
            starts, stops = np.concatenate([[0], edges]), np.concatenate([edges, [len(keys)]])
            for i in np.flatnonzero(stops - starts >= STRETCH):
                start, stop = starts[i], stops[i]
                self._add_stretch(int(keys[start, 0]), int(rows[start]), int(stop - start))
                loose[start:stop] = False
        self._count += len(keys)
        if loose.any():
            self._add_others(keys[loose], rows[loose])
        twice = np.flatnonzero(self.find(keys) != rows)
        if len(twice):
            raise ValueError(int(twice[0]))

    def _add_stretch(self, number: int, row: int, length: int) -> None:
        at = int(np.searchsorted(self._stretches[:, 0], number))
        if at:
            before = self._stretches[at - 1]
            if before[0] + before[2] == number and before[1] + before[2] == row:
                before[2] += length
                return
        self._stretches = np.insert(self._stretches, at, (number, row, length), axis=0)

    def _add_others(self, keys: Keys, rows: Rows) -> None:
        start, stop = self._others, self._others + len(keys)
        while stop > len(self._keys):
            self._keys = np.concatenate([self._keys, np.zeros_like(self._keys)])
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        self._keys[start:stop], self._rows[start:stop] = keys, rows
        self._others = stop
        if 2 * stop > len(self._slots):
            self._slots = np.full(1 << (4 * stop - 1).bit_length(), -1, dtype=np.int64)
            start = 0
        left = np.arange(start, stop, dtype=np.int64)
        slot = self._home(self._keys[start:stop])
        while len(left):
            free = self._slots[slot] < 0
            self._slots[slot[free]] = left[free]  # where several want the same one, the last of them has it
            on = self._slots[slot] != left
            left, slot = left[on], (slot[on] + 1) & (len(self._slots) - 1)

    def _home(self, keys: Keys) -> NDArray[np.int64]:
        """The slot at which to begin to look for each key."""
        mixed = np.zeros(len(keys), dtype=np.uint64)
        for column in keys.T:
            # The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
            mixed += column.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed ^= mixed >> np.uint64(31)
        return (mixed & np.uint64(len(self._slots) - 1)).astype(np.int64)
