"""What a strategy is, and what it knows: the space's codes and the objectives of those already told. Never a model.

The same calls of ``propose(history, pending, n, rng)``, with histories that grow in the same way, give the same
proposals: a killed search is resumed by replaying it from the start, against the store. Bitfront's own strategies are
functions of their arguments alone. Optuna's samplers have a random state that moves on with every call; their study is
otherwise a cache of the history.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from bitfront.spaces.base import Codes, Space


class History:
    """Candidates told so far, in order, each once. Grows; what is in it never changes.

    Attributes:
        objectives: number of objectives.
    """

    def __init__(self, parameters: int, objectives: int) -> None:
        self.objectives = objectives
        self._codes = np.zeros((64, parameters), dtype=np.int64)
        self._losses = np.zeros((64, objectives))
        self._row: dict[bytes, int] = {}

    def tell(self, codes: Codes, losses: NDArray[np.float64]) -> None:
        """Append candidates with their objectives, all to be minimised; a row of NaN is a failed candidate.

        Raises:
            ValueError: a candidate is known already.
        """
        start, stop = len(self), len(self) + len(codes)
        while stop > len(self._codes):
            self._codes = np.concatenate([self._codes, np.zeros_like(self._codes)])
            self._losses = np.concatenate([self._losses, np.zeros_like(self._losses)])
        self._codes[start:stop], self._losses[start:stop] = codes, losses
        for offset, code in enumerate(codes):
            if self._row.setdefault(code.tobytes(), start + offset) != start + offset:
                raise ValueError(f"candidate {code.tolist()} was told before")

    def __len__(self) -> int:
        return len(self._row)

    @property
    def codes(self) -> Codes:
        """Shape (candidates, parameters)."""
        return self._codes[: len(self)]

    @property
    def losses(self) -> NDArray[np.float64]:
        """Shape (candidates, objectives), smaller is better; NaN where a candidate failed."""
        return self._losses[: len(self)]

    def row(self, code: NDArray[np.int64]) -> int | None:
        """Where a canonical code stands; None if it is not known."""
        return self._row.get(code.tobytes())

    @property
    def known(self) -> dict[bytes, int]:
        """The bytes of every known canonical code, with its row."""
        return self._row


class Strategy(ABC):
    """Decides what to try next.

    Args:
        space: where the codes live.
        objectives: how many values each candidate has, all to be minimised.
        seed: root of whatever is random in it.
    """

    #: How many candidates to ask for at a time. A constant of the strategy, never of the machine: the sequence of
    #: candidates must not depend on the number of workers.
    batch: int = 8

    def __init__(self, space: Space, objectives: int, seed: int) -> None:
        self.space, self.objectives, self.seed = space, objectives, seed

    @abstractmethod
    def propose(self, history: History, pending: Codes, n: int, rng: np.random.Generator) -> Codes:
        """Up to `n` canonical codes to try next.

        Known ones may be among them: leaving these out is the loop's business. An empty array means that nothing is
        left to try.
        """


def unseen_neighbours(
    space: Space, history: History, front: NDArray[np.int64], n: int, rng: np.random.Generator
) -> Codes:
    """Up to `n` unknown candidates: neighbours of the front's members, nearest changes first; else any unknown one.

    Args:
        front: rows of `history` to start from.
    """
    chosen: dict[bytes, NDArray[np.int64]] = {}

    def take(codes: Iterator[NDArray[np.int64]]) -> bool:
        for code in codes:
            if history.row(code) is None:
                chosen.setdefault(code.tobytes(), code)
            if len(chosen) == n:
                return True
        return False

    for member in rng.permutation(front):
        if take(iter(space.neighbours(history.codes[member]))):
            break
    else:
        for _ in range(8):
            if take(iter(space.sample(4 * n, rng))):
                break
        else:
            # So little is left that chance does not find it.
            take(space.unseen(history.known))
    return np.array(list(chosen.values()), dtype=np.int64).reshape(len(chosen), len(space.parameters))
