"""Every candidate of the space, once, in the space's own order."""

from __future__ import annotations

import numpy as np

from bitfront.spaces.base import Codes, Space
from bitfront.strategies import STRATEGIES
from bitfront.strategies.base import History, Strategy


@STRATEGIES.register("brute_force", "brute", "bruteforce", "exhaustive", "grid")
class BruteForce(Strategy):
    """Enumerates the whole space in a fixed order."""

    batch = 1024

    def __init__(self, space: Space, objectives: int, seed: int) -> None:
        super().__init__(space, objectives, seed)
        # A cache of the history: everything before the cursor is known. Starting at 0 again only costs time.
        self._cursor = 0

    def propose(self, history: History, pending: Codes, n: int, rng: np.random.Generator) -> Codes:  # noqa: ARG002
        """The next `n` candidates that are not known; empty at the end of the space."""
        skip = {code.tobytes() for code in pending}
        found: list[Codes] = []
        missing, cursor = n, self._cursor
        while missing > 0 and cursor < self.space.size:
            block = self.space.numbered(cursor, cursor + max(missing, 256))
            new = np.array([r.tobytes() not in history.known and r.tobytes() not in skip for r in block], dtype=bool)
            if not found and not new.any():
                self._cursor = cursor + len(block)
            rows = np.flatnonzero(new)[:missing]
            found.append(block[rows])
            missing -= len(rows)
            cursor += len(block)
        return np.concatenate(found) if found else np.zeros((0, len(self.space.parameters)), dtype=np.int64)
