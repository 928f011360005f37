"""An index of candidates by key, for millions of them: which are known, and in which row.

Keys are rows of 64-bit integers: ``Space.keys``, or codes. Ranges of consecutive numbers, as brute force produces them,
are stored as (first number, first row, length). All other keys are in a hash table of NumPy arrays; a few array
operations look up or add a whole block.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.int64]
Rows = NDArray[np.int64]

#: Shorter ranges of consecutive numbers go into the hash table.
SHORTEST_RANGE = 64


class Index:
    """Distinct keys in the order in which they were added, as rows 0, 1, ... Keys are never removed.

    Args:
        width: number of 64-bit integers per key, 1 or more.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._count = 0
        # Ranges of consecutive numbers, sorted: first number, first row, length.
        self._ranges = np.zeros((0, 3), dtype=np.int64)
        # The other keys with their rows, in the order added; and a table of slots with places in these arrays, or −1.
        self._keys = np.zeros((64, width), dtype=np.int64)
        self._rows = np.zeros(64, dtype=np.int64)
        self._others = 0
        self._slots = np.full(256, -1, dtype=np.int64)

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Memory of the index in bytes."""
        return self._ranges.nbytes + self._keys.nbytes + self._rows.nbytes + self._slots.nbytes

    def find(self, keys: Keys) -> Rows:
        """The row of each key, int64, shape (keys,); −1 for keys that are not in the index.

        Args:
            keys: int64, shape (keys, width).
        """
        rows = np.full(len(keys), -1, dtype=np.int64)
        if len(self._ranges):
            first, row, length = self._ranges.T
            at = np.searchsorted(first, keys[:, 0], side="right") - 1
            offset = keys[:, 0] - first[at]
            inside = (at >= 0) & (offset < length[at])
            rows[inside] = (row[at] + offset)[inside]
        if self._others:
            left = np.flatnonzero(rows < 0)
            slot = self._home(keys[left])
            while len(left):
                place = self._slots[slot]
                hit = (place >= 0) & (self._keys[place] == keys[left]).all(axis=1)
                rows[left[hit]] = self._rows[place[hit]]
                on = (place >= 0) & ~hit
                left, slot = left[on], (slot[on] + 1) & (len(self._slots) - 1)
        return rows

    def add(self, keys: Keys) -> None:
        """Append keys.

        Args:
            keys: int64, shape (keys, width); distinct, and not in the index.

        Raises:
            ValueError: a key is in the index, or occurs twice; the argument of the exception is its place in `keys`.
                After that the index must not be used.
        """
        known = np.flatnonzero(self.find(keys) >= 0)
        if len(known):
            raise ValueError(int(known[0]))
        rows = np.arange(self._count, self._count + len(keys), dtype=np.int64)
        loose = np.ones(len(keys), dtype=bool)
        if self.width == 1 and len(keys) >= SHORTEST_RANGE:
            edges = np.flatnonzero(np.diff(keys[:, 0]) != 1) + 1
            starts, stops = np.concatenate([[0], edges]), np.concatenate([edges, [len(keys)]])
            for i in np.flatnonzero(stops - starts >= SHORTEST_RANGE):
                start, stop = starts[i], stops[i]
                self._add_range(int(keys[start, 0]), int(rows[start]), int(stop - start))
                loose[start:stop] = False
        self._count += len(keys)
        if loose.any():
            self._add_others(keys[loose], rows[loose])
        twice = np.flatnonzero(self.find(keys) != rows)
        if len(twice):
            raise ValueError(int(twice[0]))

    def _add_range(self, number: int, row: int, length: int) -> None:
        at = int(np.searchsorted(self._ranges[:, 0], number))
        if at:
            before = self._ranges[at - 1]
            if before[0] + before[2] == number and before[1] + before[2] == row:
                before[2] += length
                return
        self._ranges = np.insert(self._ranges, at, (number, row, length), axis=0)

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
            self._slots[slot[free]] = left[free]  # of several keys with the same slot, the last one gets it
            on = self._slots[slot] != left
            left, slot = left[on], (slot[on] + 1) & (len(self._slots) - 1)

    def _home(self, keys: Keys) -> NDArray[np.int64]:
        """The slot at which the search for each key begins."""
        mixed = np.zeros(len(keys), dtype=np.uint64)
        for column in keys.T:
            # The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
            mixed += column.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed ^= mixed >> np.uint64(31)
        return (mixed & np.uint64(len(self._slots) - 1)).astype(np.int64)
