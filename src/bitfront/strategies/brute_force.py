"""Every candidate of the space, once, in the space's own order."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from bitfront.spaces.base import Codes, Space
from bitfront.strategies import STRATEGIES
from bitfront.strategies.base import History, Strategy, StrategySettings

#: Numbers looked at in one go at least: where nearly everything is known, going one by one would take for ever.
STRIDE = 256


class BruteForceSettings(StrategySettings):
    """Brute force's keys of ``[search.strategy.setup]``."""

    max_size: int = Field(
        1_000_000, ge=1, exclude=True, description="larger spaces are refused, unless n_trials is set"
    )


@STRATEGIES.register("brute_force", "brute", "bruteforce", "exhaustive", "grid")
class BruteForce(Strategy):
    """Enumerates the whole space in a fixed order."""

    Settings = BruteForceSettings
    exhaustive = True
    limit = "max_size"
    #: Large, so that a block holds whole subtrees of the tree of shared prefixes.
    batch = 2**16
    looks_back = False

    def __init__(self, space: Space, objectives: int, seed: int, settings: BruteForceSettings | None = None) -> None:
        super().__init__(space, objectives, seed, settings)
        # A cache of the history: everything before the cursor is known. Starting at 0 again only costs time.
        self._cursor = 0

    def propose(self, history: History, n: int, rng: np.random.Generator) -> Codes:  # noqa: ARG002
        """The next `n` candidates that are not known; empty at the end of the space."""
        found: list[Codes] = []
        missing, cursor = n, self._cursor
        while missing > 0 and cursor < self.space.size:
            block = self.space.numbered(cursor, cursor + max(missing, STRIDE))
            cursor += len(block)
            new = history.rows(block) < 0
            if not found and not new.any():
                self._cursor = cursor
            own = block[:missing] if new[:missing].all() else block[new][:missing]
            found.append(own)
            missing -= len(own)
        return np.concatenate(found) if found else np.zeros((0, len(self.space.parameters)), dtype=np.int64)
