"""Evaluated candidates as columns of arrays: all those of a run, or a chunk of them as they lie in the store.

Codes are kept in as few bytes as hold them, one per parameter as a rule, and errors only where there are any: a million
trials of a model with four sites and five metrics are some 70 MB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront.spaces.base import Codes

Values = NDArray[np.float64]
Packed = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, eq=False)
class TrialColumns:
    """Evaluated candidates, by number. Columns of equal length.

    Attributes:
        packed: codes as they are stored, shape (trials, parameters), in as few bytes as hold them.
        metrics: metric name → values; NaN where it could not be measured.
        complete: whether the trial has all its metrics.
        duration: seconds.
        errors: number → why it failed, for those that did.
    """

    number: NDArray[np.int64]
    packed: Packed
    metrics: Mapping[str, Values]
    complete: NDArray[np.bool_]
    duration: Values
    errors: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.number)

    @property
    def code(self) -> Codes:
        """Codes of all trials, shape (trials, parameters); a copy."""
        return self.packed.astype(np.int64)

    def codes(self, rows: Sequence[int] | NDArray[np.int64]) -> Codes:
        """Codes of the trials in some rows, shape (rows, parameters)."""
        return self.packed[np.asarray(rows, dtype=np.int64)].astype(np.int64)

    @property
    def first_error(self) -> str:
        """Why the first of those that failed did; empty if none did."""
        return next(iter(self.errors.values()), "")

    def position(self, number: int) -> int | None:
        """Row of the trial of that number."""
        at = int(np.searchsorted(self.number, number))
        return at if at < len(self) and self.number[at] == number else None


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some trials, as they lie in the file: `packed` as in ``TrialColumns``, `table` of shape (metrics, trials)."""

    number: NDArray[np.int64]
    packed: Packed
    table: Values
    duration: Values

    def __len__(self) -> int:
        return len(self.number)

    def without(self, rows: NDArray[np.int64]) -> Chunk:
        """All but some rows."""
        return Chunk(
            np.delete(self.number, rows),
            np.delete(self.packed, rows, axis=0),
            np.delete(self.table, rows, axis=1),
            np.delete(self.duration, rows),
        )

    def after(self, row: int) -> Chunk:
        """All from a row on."""
        return Chunk(self.number[row:], self.packed[row:], self.table[:, row:], self.duration[row:])

    @staticmethod
    def joined(parts: Sequence[Chunk]) -> Chunk:
        """Several as one."""
        if len(parts) == 1:
            return parts[0]
        return Chunk(
            np.concatenate([p.number for p in parts]),
            np.concatenate([p.packed for p in parts]),
            np.concatenate([p.table for p in parts], axis=1),
            np.concatenate([p.duration for p in parts]),
        )


def packed(codes: Codes) -> Packed:
    """Codes in as few bytes as hold them."""
    largest = int(codes.max(initial=0))
    width = next(w for w in (1, 2, 4, 8) if largest < 1 << (8 * w))
    return codes.astype(f"<u{width}")
