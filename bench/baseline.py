"""A baseline for ``networks.py``: sensitivities of single layers, an additive model, its exact front, verified.

Every layer takes each of its options alone, all others the last one, which has the most bits. What the loss grows by
is added over layers; the front of that sum against the cost is exact, by dynamic programming. Its members within ten
points of the best are evaluated, evenly along it, and nothing is learned from them. Each sensitivity is an evaluation.
"""

from __future__ import annotations

import numpy as np

from bitfront.spaces.base import Codes
from bitfront.strategies import STRATEGIES
from bitfront.strategies.base import History, Strategy, unseen_neighbours
from bitfront.strategies.prediction import cost_tables
from bitfront.strategies.separable import front

NAME = "sensitivities"
#: Members of the predicted front may lose so much accuracy.
WITHIN = 0.10


@STRATEGIES.register(NAME)
class Sensitivities(Strategy):
    """Sensitivities of single layers, added; the exact front of the sums is evaluated."""

    def propose(self, history: History, n: int, rng: np.random.Generator) -> Codes:
        """Single changes first, then members of the predicted front, evenly spread."""
        last = np.array([[group.size - 1 for group in self.space.groups]], dtype=np.int64)
        alone = np.repeat(last, sum(group.size for group in self.space.groups), axis=0)
        end = 0
        for g, group in enumerate(self.space.groups):
            alone[end : end + group.size, g] = np.arange(group.size)
            end += group.size
        codes = self.space.codes(alone)
        fresh = history.fresh(codes)
        if len(fresh):
            return fresh[:n]
        grown = history.losses[history.rows(codes), 0] - history.losses[history.rows(self.space.codes(last)), 0]
        ends = np.cumsum([group.size for group in self.space.groups])[:-1]
        values = [np.maximum(np.nan_to_num(part, nan=1.0), 0.0) for part in np.split(grown, ends)]
        solved = front(values, cost_tables(self.space, self.knowledge.costs[1], last))
        members = history.fresh(self.space.codes(solved.options[solved.values <= WITHIN]))
        if not len(members):
            return unseen_neighbours(self.space, history, np.zeros(0, dtype=np.int64), n, rng)
        return members[np.unique(np.linspace(0, len(members) - 1, n).astype(np.int64))]
