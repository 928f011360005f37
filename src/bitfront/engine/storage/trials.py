"""Evaluated candidates as columns of arrays: all of a run, or a chunk as it is in the store.

Codes are stored in the smallest integers that hold them, usually one byte per parameter, and errors only of failed
trials. A million trials of a model with four sites and five metrics need some 70 MB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront.spaces.base import Codes

Values = NDArray[np.float64]
PackedCodes = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, eq=False)
class TrialColumns:
    """Evaluated candidates, sorted by number, as columns of equal length.

    Attributes:
        number: the number of each trial, int64, shape (trials,).
        packed: codes in the smallest unsigned integers that hold them, shape (trials, parameters).
        metrics: metric → values, float64, shape (trials,); NaN where it could not be measured.
        complete: whether each trial has all its metrics, bool, shape (trials,).
        duration: time of each evaluation in seconds, shape (trials,).
        errors: number → why the trial failed, for failed trials.
    """

    number: NDArray[np.int64]
    packed: PackedCodes
    metrics: Mapping[str, Values]
    complete: NDArray[np.bool_]
    duration: Values
    errors: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.number)

    @property
    def code(self) -> Codes:
        """Codes of all trials, int64, shape (trials, parameters); a copy."""
        return self.packed.astype(np.int64)

    def codes(self, rows: Sequence[int] | NDArray[np.int64]) -> Codes:
        """Codes of the trials in some rows, int64, shape (rows, parameters)."""
        return self.packed[np.asarray(rows, dtype=np.int64)].astype(np.int64)

    @property
    def first_error(self) -> str:
        """Why the first failed trial failed; empty if none did."""
        return next(iter(self.errors.values()), "")

    def position(self, number: int) -> int | None:
        """The row of the trial with that number; None if there is no such trial."""
        at = int(np.searchsorted(self.number, number))
        return at if at < len(self) and self.number[at] == number else None


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some trials as they are in the file; as ``TrialColumns``, but with one `table` of shape (metrics, trials)."""

    number: NDArray[np.int64]
    packed: PackedCodes
    table: Values
    duration: Values

    def __len__(self) -> int:
        return len(self.number)

    def without(self, rows: NDArray[np.int64]) -> Chunk:
        """The chunk without some rows."""
        return Chunk(
            np.delete(self.number, rows),
            np.delete(self.packed, rows, axis=0),
            np.delete(self.table, rows, axis=1),
            np.delete(self.duration, rows),
        )

    def after(self, row: int) -> Chunk:
        """The rows from a row on."""
        return Chunk(self.number[row:], self.packed[row:], self.table[:, row:], self.duration[row:])

    @staticmethod
    def joined(parts: Sequence[Chunk]) -> Chunk:
        """Several chunks joined into one."""
        if len(parts) == 1:
            return parts[0]
        return Chunk(
            np.concatenate([p.number for p in parts]),
            np.concatenate([p.packed for p in parts]),
            np.concatenate([p.table for p in parts], axis=1),
            np.concatenate([p.duration for p in parts]),
        )


def packed(codes: Codes) -> PackedCodes:
    """Codes in the smallest unsigned integers that hold them."""
    largest = int(codes.max(initial=0))
    width = next(w for w in (1, 2, 4, 8) if largest < 1 << (8 * w))
    return codes.astype(f"<u{width}")
