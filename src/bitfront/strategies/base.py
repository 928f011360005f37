"""What a strategy is, and what it knows: the space's codes and the objectives of those already told. Never a model.

The same calls of ``propose(history, n, rng)``, with histories that grow in the same way, give the same
proposals: a killed search is resumed by replaying it from the start, against the store. Bitfront's own strategies are
functions of their arguments alone. Optuna's samplers have a random state that moves on with every call; their study is
otherwise a cache of the history.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bitfront.config import Table
from bitfront.spaces.base import Codes, Space
from bitfront.spaces.index import Index, Keys

#: Candidates looked through at a time for the last unknown ones of a space.
SCANNED = 4096


class History:
    """Candidates told so far, in order, each once. Grows; what is in it never changes.

    Args:
        parameters: number of columns of a code.
        objectives: number of objectives.
        space: where the codes live. With it, what tells them apart is kept as their numbers, 8 bytes each, and nothing
            at all for stretches of consecutive ones; without, as whole codes.
        forgets: keep neither codes nor losses, for strategies that do not look at them: any number of candidates then
            takes no memory but what the index needs.
    """

    def __init__(self, parameters: int, objectives: int, space: Space | None = None, *, forgets: bool = False) -> None:
        self.objectives, self.forgets = objectives, forgets
        self._space = space
        self._codes = np.zeros((0 if forgets else 64, parameters), dtype=np.int64)
        self._losses = np.zeros((len(self._codes), objectives))
        self._violation = np.zeros(len(self._codes))
        self._index: Index | None = None
        #: Whether there are constraints.
        self.constrained = False

    def tell(self, codes: Codes, losses: NDArray[np.float64], violation: NDArray[np.float64] | None = None) -> None:
        """Append candidates with their objectives, all to be minimised; a row of NaN is a candidate that failed, or,
        if it violates a constraint, one that was never evaluated.

        Args:
            violation: by how much each misses the constraints, 0 where it fulfils them; None: there are none.

        Raises:
            ValueError: a candidate is known already.
        """
        start, stop = len(self), len(self) + len(codes)
        keys = self._keys(codes)
        if self._index is None:
            self._index = Index(keys.shape[1])
        try:
            self._index.add(keys)
        except ValueError as error:
            raise ValueError(f"candidate {codes[error.args[0]].tolist()} was told before") from None
        if self.forgets:
            return
        while stop > len(self._codes):
            self._codes = np.concatenate([self._codes, np.zeros_like(self._codes)])
            self._losses = np.concatenate([self._losses, np.zeros_like(self._losses)])
            self._violation = np.concatenate([self._violation, np.zeros_like(self._violation)])
        self._codes[start:stop], self._losses[start:stop] = codes, losses
        self.constrained |= violation is not None
        self._violation[start:stop] = 0.0 if violation is None else violation

    def __len__(self) -> int:
        return 0 if self._index is None else len(self._index)

    @property
    def codes(self) -> Codes:
        """Shape (candidates, parameters)."""
        assert not self.forgets, "this strategy said that it does not look back"
        return self._codes[: len(self)]

    @property
    def losses(self) -> NDArray[np.float64]:
        """Shape (candidates, objectives), smaller is better; NaN where a candidate failed or was not evaluated."""
        assert not self.forgets, "this strategy said that it does not look back"
        return self._losses[: len(self)]

    @property
    def violation(self) -> NDArray[np.float64]:
        """Shape (candidates,): by how much each misses the constraints; 0 where it fulfils them."""
        assert not self.forgets, "this strategy said that it does not look back"
        return self._violation[: len(self)]

    def row(self, code: NDArray[np.int64]) -> int | None:
        """Where a canonical code stands; None if it is not known."""
        row = int(self.rows(code[None])[0])
        return None if row < 0 else row

    def rows(self, codes: Codes) -> NDArray[np.int64]:
        """Where canonical codes stand, shape (codes,); −1 for those that are not known."""
        if self._index is None:
            return np.full(len(codes), -1, dtype=np.int64)
        return self._index.find(self._keys(codes))

    def fresh(self, codes: Codes) -> Codes:
        """`codes` without those that are known and without repeats, in their order."""
        keys = self._keys(codes)
        unknown = np.ones(len(codes), dtype=bool) if self._index is None else self._index.find(keys) < 0
        if not (keys.shape[1] == 1 and (np.diff(keys[:, 0]) > 0).all()):
            first = np.zeros(len(codes), dtype=bool)
            axis = 0 if keys.shape[1] > 1 else None
            first[np.unique(keys, axis=axis, return_index=True)[1]] = True
            unknown &= first
        return codes if unknown.all() else codes[unknown]

    def _keys(self, codes: Codes) -> Keys:
        if self._space is not None:
            return self._space.keys(codes)
        return codes if codes.shape[1] else np.zeros((len(codes), 1), dtype=np.int64)


class StrategySettings(Table):
    """Settings of a strategy; this class has none. Unknown keys are errors.

    A strategy with settings extends it, a field per key of ``[search.strategy.setup]``, each with a default and a
    description (``Field(0.5, gt=0, description="...")``). Trials of a run folder belong to one choice of settings;
    a field with ``exclude=True`` is one that proposals do not depend on, such as a limit, and may change.
    The keys that every search has (``config.StrategySetup``) cannot be settings of a strategy.
    """

    @property
    def instead(self) -> str | None:
        """The name of another strategy, where that is what these settings ask for."""
        return None


class Strategy(ABC):
    """Decides what to try next.

    **When it is called.** A strategy is made once per search, when everything that can be wrong has been checked, and
    once per run of a comparison; resuming a search makes it anew. The loop (``engine.search.loop``) then asks
    ``propose`` for up to `batch` candidates, evaluates those that are new, tells the history of them, and asks again,
    until the budget or the space is used up. Candidates that the strategy did not propose are told too: those that the
    loop begins with, and neighbours of the front where a strategy proposes nothing new several times in a row. A part
    of what was proposed may never be told: time was up, or the candidate was known.

    **What it is given.** Codes of a space, and losses: never a model, a metric's name or data. Everything that it
    decides by is in the arguments: with the same settings, seed and calls it proposes the same. That is how a search is
    resumed: its calls are made again, answered from the store. State beside the arguments may be a cache of the
    history, or the random state of a sampler that moves with every call.

    **What it may not do.** Change the history or the space; draw from any generator but `rng` and one that it seeds
    with `seed`; look at a clock, at the number of processes or at the machine; print.

    ``bitfront.testing.check_strategy`` tests all that.

    Class attributes:
        Settings: its keys of ``[search.strategy.setup]``; they arrive as `settings`.
        variant: the setting that may stand behind a colon: with ``variant = "sampler"``, ``optuna:tpe`` is strategy
            ``optuna`` with ``sampler = "tpe"``. Empty for strategies without variants.
        variants: what may stand there → what it is, in one line.
        exhaustive: whether it goes through the whole space in its order, each candidate once. Its budget is the whole
            space, unless another one is given.
        limit: for an exhaustive one, the setting that says how large a space may be; larger ones are refused before any
            work, unless a budget is given. Empty: any.
        batch: how many candidates to ask for at a time. A constant of the strategy, or of its settings, never of the
            machine: the sequence of candidates must not depend on the number of workers.
        looks_back: whether `propose` looks at the codes and losses of the history. One that does not (it may ask
            whether a candidate is known: ``history.rows``, ``history.fresh``) gets a history without them.

    Args:
        space: where the codes live.
        objectives: how many values each candidate has, all to be minimised.
        seed: root of whatever is random in it, from 0 on.
        settings: an instance of `Settings`; None: the defaults.
    """

    Settings: ClassVar[type[StrategySettings]] = StrategySettings
    settings: StrategySettings
    variant: ClassVar[str] = ""
    variants: ClassVar[Mapping[str, str]] = MappingProxyType({})
    exhaustive: ClassVar[bool] = False
    limit: ClassVar[str] = ""
    batch: int = 8
    looks_back: bool = True

    def __init__(self, space: Space, objectives: int, seed: int, settings: StrategySettings | None = None) -> None:
        self.space, self.objectives, self.seed = space, objectives, seed
        self.settings = self.Settings() if settings is None else settings

    @abstractmethod
    def propose(self, history: History, n: int, rng: np.random.Generator) -> Codes:
        """Candidates to try next.

        Args:
            history: everything told so far, in order; candidates that failed are among it, with losses of NaN. It is
                not to be changed.
            n: how many at most; at least 1.
            rng: fresh for every call, made of the search's seed and the number of the call.

        Returns:
            Up to `n` canonical codes of the space, int64 of shape (candidates, parameters), the most promising first.
            Known ones and repeats may be among them: the loop leaves them out, and they cost nothing. An empty array
            means that nothing is left to try.

        An exception ends the search; what was told by then is kept.
        """


def unseen_neighbours(
    space: Space, history: History, front: NDArray[np.int64], n: int, rng: np.random.Generator
) -> Codes:
    """Up to `n` unknown candidates: neighbours of the front's members, nearest changes first; else any unknown one.

    Args:
        front: rows of `history` to start from.
    """
    chosen = np.zeros((0, len(space.parameters)), dtype=np.int64)

    def take(codes: Codes) -> bool:
        nonlocal chosen
        chosen = History(len(space.parameters), 0).fresh(np.concatenate([chosen, history.fresh(codes)]))[:n]
        return len(chosen) == n

    for member in rng.permutation(front):
        if take(space.neighbours(history.codes[member])):
            return chosen
    for _ in range(8):
        if take(space.sample(4 * n, rng)):
            return chosen
    # So little is left that chance does not find it.
    for start in range(0, space.size, SCANNED):
        if take(space.numbered(start, start + SCANNED)):
            break
    return chosen
