"""Replay: the trials of earlier sessions of a search, for a session that resumes it.

A resumed search asks for the same candidates in the order in which they are stored. As long as it does, the file is
read block by block, and nothing is held in memory. When it asks for another candidate (failed ones are tried again, and
then come later), the rest of the file is read and indexed in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from bitfront.engine.storage.trials import Chunk, Values
from bitfront.spaces.base import Codes
from bitfront.spaces.index import Index, Keys


class ReplayCursor:
    """Looks up the complete trials of earlier sessions, each of them once.

    Args:
        chunks: the trials, in the order of their numbers.
        count: number of trials.
        metrics: number of metrics of each trial.
        keys: from codes to keys that identify candidates, as ``Space.keys``.
    """

    def __init__(self, chunks: Iterator[Chunk], count: int, metrics: int, keys: Callable[[Codes], Keys]) -> None:
        self._chunks, self._count, self._metrics, self._keys = chunks, count, metrics, keys
        self._recalled = 0
        #: The part of the chunk read last that was not asked for yet.
        self._ahead: Chunk | None = None
        self._index: Index | None = None
        self._table = np.zeros((metrics, 0))

    def __len__(self) -> int:
        return self._count

    def recall(self, codes: Codes) -> tuple[NDArray[np.bool_], Values]:
        """The metrics of candidates that are stored.

        Args:
            codes: candidates, int64, shape (candidates, parameters).

        Returns:
            (whether each candidate is stored, bool, shape (candidates,); metrics, float64, shape (metrics,
            candidates), NaN for candidates that are not).
        """
        known = np.zeros(len(codes), dtype=bool)
        table = np.full((self._metrics, len(codes)), np.nan)
        done = self._along(codes, table) if self._index is None else 0
        known[:done] = True
        if done < len(codes) and self._recalled < self._count:
            index = self._index = self._index or self._read_all()
            rows = index.find(self._keys(codes[done:]))
            known[done:] = rows >= 0
            table[:, np.flatnonzero(rows >= 0) + done] = self._table[:, rows[rows >= 0]]
            self._recalled += int((rows >= 0).sum())
        if self._recalled >= self._count:
            self._index, self._table = None, self._table[:, :0].copy()
        return known, table

    def _along(self, codes: Codes, table: Values) -> int:
        """Fill `table` for the first of `codes`, as far as they are the next ones in the file; return their number."""
        done = 0
        while done < len(codes):
            self._ahead = self._ahead or next(self._chunks, None)
            if self._ahead is None:
                break
            length = min(len(self._ahead), len(codes) - done)
            differs = (self._ahead.packed[:length] != codes[done : done + length]).any(axis=1)
            same = int(differs.argmax()) if differs.any() else length
            table[:, done : done + same] = self._ahead.table[:, :same]
            self._ahead = self._ahead.after(same) if same < len(self._ahead) else None
            self._recalled += same
            done += same
            if same < length:
                break
        return done

    def _read_all(self) -> Index:
        """Read and index the rest of the file."""
        index: Index | None = None
        tables = [self._table]
        ahead = iter([self._ahead] if self._ahead else [])
        for part in (*ahead, *self._chunks):
            keys = self._keys(part.packed.astype(np.int64))
            index = index or Index(keys.shape[1])
            index.add(keys)
            tables.append(part.table)
        self._ahead, self._table = None, np.concatenate(tables, axis=1)
        return index or Index(1)
