"""Brute force: every candidate of the space, once, in the space's order."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from bitfront.spaces.base import Codes, Space
from bitfront.strategies import STRATEGIES
from bitfront.strategies.base import History, Strategy, StrategySettings

#: The smallest number of candidates to look at together. If nearly all are known, one by one would take too long.
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
    #: Large, so that a block contains whole subtrees of candidates that share the same first options.
    batch = 2**16
    looks_back = False

    def __init__(self, space: Space, objectives: int, seed: int, settings: BruteForceSettings | None = None) -> None:
        super().__init__(space, objectives, seed, settings)
        # A cache of the history: all candidates before the cursor are known. A new object starts at 0 and skips them.
        self._cursor = 0

    def propose(self, history: History, n: int, rng: np.random.Generator) -> Codes:  # noqa: ARG002
        """The next `n` unknown candidates, shape (candidates, parameters); none at the end of the space."""
        parts: list[Codes] = []
        missing, cursor = n, self._cursor
        while missing > 0 and cursor < self.space.size:
            block = self.space.numbered(cursor, cursor + max(missing, STRIDE))
            cursor += len(block)
            unknown = history.rows(block) < 0
            if not parts and not unknown.any():
                self._cursor = cursor
            part = block[:missing] if unknown[:missing].all() else block[unknown][:missing]
            parts.append(part)
            missing -= len(part)
        return np.concatenate(parts) if parts else np.zeros((0, len(self.space.parameters)), dtype=np.int64)
