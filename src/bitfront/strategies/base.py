"""The interface of strategies, and the history that they see: codes and objectives of candidates, never a model.

The same calls of ``propose(history, n, rng)``, with the same histories, give the same proposals. So a killed search is
resumed by replaying it from the start with the results in the store. Evolution and brute force are functions of their
arguments alone. Optuna's samplers have a random state that changes with every call; apart from that their study is a
cache of the history.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from bitfront.config import Table
from bitfront.spaces.base import Codes, Space
from bitfront.spaces.index import Index, Keys
from bitfront.spaces.margins import Margins

if TYPE_CHECKING:
    from bitfront.tasks.base import TaskMetric

#: Number of candidates that are looked at together to find the last unknown ones of a space.
SCANNED = 4096


@dataclass(frozen=True, eq=False)
class Resolution:
    """The smallest differences of losses that the samples of a search tell apart, of two candidates on the same ones.

    Attributes:
        losses: per objective, float64, shape (objectives,), 0 or more; 0 for what does not depend on samples.
        text: the same in words.
    """

    losses: NDArray[np.float64]
    text: str


@dataclass(frozen=True, eq=False)
class Knowledge:
    """What is known of the candidates of a search before any is evaluated.

    Attributes:
        costs: objective → its losses, for objectives in closed form: a function of canonical codes, int64, shape
            (candidates, parameters), that returns float64, shape (candidates,).
        violation: total violation of the constraints on metrics in closed form, as a function of canonical codes; None
            if there are none.
        float_losses: the losses of the float model, float64, shape (objectives,); NaN where it has none. None: unknown.
        points: by how much the loss of each objective rises if the metric of the task that leads gets worse by a
            percentage point, or, where it is no share, by a hundredth of the float model's value: float64, shape
            (objectives,); NaN for all other metrics. None: unknown.
        sufficient: losses that are as good as any smaller one, float64, shape (objectives,); −infinity where there are
            none. None: of no objective.
        noise: per group an estimate of how much each option disturbs the model's outputs, float64, shape (options,), 0
            or more; that of several groups adds up. None: unknown.
        margins: what each option alone does to the outputs for some samples of a classification. None: unknown.
        resolution: the resolution of the samples near some candidates with results, int64, shape (candidates,
            parameters), which are evaluated once more for that. None: unknown.
        seconds: what measuring noise and margins took, when it was done.
    """

    costs: Mapping[int, Callable[[Codes], NDArray[np.float64]]] = field(default_factory=dict)
    violation: Callable[[Codes], NDArray[np.float64]] | None = None
    float_losses: NDArray[np.float64] | None = None
    points: NDArray[np.float64] | None = None
    sufficient: NDArray[np.float64] | None = None
    noise: Sequence[NDArray[np.float64]] | None = None
    margins: Margins | None = None
    resolution: Callable[[Codes], Resolution] | None = None
    seconds: float = 0.0


class History:
    """The candidates that a search has results for, in order, each once. It grows; its entries never change.

    Args:
        parameters: number of columns of a code.
        objectives: number of objectives.
        space: the space of the codes. With it, the index of known candidates stores their numbers (8 bytes each, and
            nothing for ranges of consecutive numbers); without it, whole codes.
        forgets: whether codes and losses are dropped, for strategies that do not look at them. Then only the index
            needs memory.
    """

    def __init__(self, parameters: int, objectives: int, space: Space | None = None, *, forgets: bool = False) -> None:
        self.objectives, self.forgets = objectives, forgets
        self._space = space
        self._codes = np.zeros((0 if forgets else 64, parameters), dtype=np.int64)
        self._losses = np.zeros((len(self._codes), objectives))
        self._violation = np.zeros(len(self._codes))
        self._margins = np.zeros((len(self._codes), 0))
        self._index: Index | None = None
        #: Whether there are constraints.
        self.constrained = False

    def tell(
        self,
        codes: Codes,
        losses: NDArray[np.float64],
        violation: NDArray[np.float64] | None = None,
        margins: NDArray[np.float64] | None = None,
    ) -> None:
        """Append candidates.

        Args:
            codes: canonical codes, int64, shape (candidates, parameters).
            losses: objectives to be minimised, float64, shape (candidates, objectives). A row of NaN is a candidate
                that failed, or, if it violates a constraint, one that was not evaluated.
            violation: total violation of the constraints, shape (candidates,), 0 where they are fulfilled; None if
                there are no constraints.
            margins: per constraint that is only known after an evaluation, how far the candidate is from its bound, as
                a share of it, shape (candidates, constraints): negative where it is fulfilled with something to
                spare, NaN where it was not evaluated. None: there are none. The same number in every call.

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
            raise ValueError(f"candidate {codes[error.args[0]].tolist()} is in the history already") from None
        if self.forgets:
            return
        while stop > len(self._codes):
            self._codes = np.concatenate([self._codes, np.zeros_like(self._codes)])
            self._losses = np.concatenate([self._losses, np.zeros_like(self._losses)])
            self._violation = np.concatenate([self._violation, np.zeros_like(self._violation)])
            self._margins = np.concatenate([self._margins, np.zeros_like(self._margins)])
        if margins is not None:
            if self._margins.shape[1] != margins.shape[1]:
                self._margins = np.full((len(self._codes), margins.shape[1]), np.nan)
            self._margins[start:stop] = margins
        self._codes[start:stop], self._losses[start:stop] = codes, losses
        self.constrained |= violation is not None
        self._violation[start:stop] = 0.0 if violation is None else violation

    def __len__(self) -> int:
        return 0 if self._index is None else len(self._index)

    @property
    def codes(self) -> Codes:
        """All codes, int64, shape (candidates, parameters)."""
        assert not self.forgets, "a strategy with looks_back = False must not read this"
        return self._codes[: len(self)]

    @property
    def losses(self) -> NDArray[np.float64]:
        """Objectives, shape (candidates, objectives), smaller is better; NaN if a candidate failed or was not
        evaluated."""
        assert not self.forgets, "a strategy with looks_back = False must not read this"
        return self._losses[: len(self)]

    @property
    def violation(self) -> NDArray[np.float64]:
        """Total violation of the constraints, shape (candidates,); 0 where they are fulfilled."""
        assert not self.forgets, "a strategy with looks_back = False must not read this"
        return self._violation[: len(self)]

    @property
    def margins(self) -> NDArray[np.float64]:
        """Per constraint that is only known after an evaluation, the distance from its bound, shape (candidates,
        constraints): positive where it is violated; NaN if a candidate failed or was not evaluated."""
        assert not self.forgets, "a strategy with looks_back = False must not read this"
        return self._margins[: len(self)]

    def row(self, code: NDArray[np.int64]) -> int | None:
        """The row of a canonical code; None if it is not known."""
        row = int(self.rows(code[None])[0])
        return None if row < 0 else row

    def rows(self, codes: Codes) -> NDArray[np.int64]:
        """The rows of canonical codes, int64, shape (candidates,); −1 for codes that are not known."""
        if self._index is None:
            return np.full(len(codes), -1, dtype=np.int64)
        return self._index.find(self._keys(codes))

    def fresh(self, codes: Codes) -> Codes:
        """`codes` without known ones and without repeats, in their order."""
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

    A strategy with settings extends it with one field per key of ``[search.strategy.setup]``, each with a default and a
    description (``Field(0.5, gt=0, description="...")``). All trials of a run folder have the same settings. A field
    with ``exclude=True`` may change, because proposals do not depend on it, such as a limit. The keys that every search
    has (``config.StrategySetup``) cannot be settings of a strategy.
    """

    @property
    def instead(self) -> str | None:
        """The name of another strategy that these settings stand for; None for this strategy itself."""
        return None

    def remarks(
        self,
        objectives: Sequence[str],  # noqa: ARG002
        constrained: bool,  # noqa: ARG002
        leading: TaskMetric,  # noqa: ARG002
        *,
        trained: bool,  # noqa: ARG002
    ) -> Sequence[str]:
        """What a user should know about a search with these settings before it starts.

        Args:
            objectives: the metrics that are objectives; none if they are summed.
            constrained: whether there are constraints.
            leading: the metric of the task that leads.
            trained: whether candidates are trained.
        """
        return ()


class Strategy(ABC):
    """Decides which candidates to evaluate next.

    **When it is called.** A strategy object is created once per search, after everything was checked, and once per run
    of a comparison. A resumed search creates a new one. The loop (``engine.search.loop``) calls ``propose`` for up to
    `batch` candidates, evaluates the new ones, appends them to the history, and calls again, until the budget or the
    space is used up. The history also gets candidates that the strategy did not propose: the initial candidates, and
    neighbours of the front if a strategy proposes nothing new several times in a row. Some proposals may never get into
    the history, because time was up.

    **What it is given.** It sees codes of a space and losses, never a model, the name of a metric or data; and, as
    functions of codes, what is known of losses and constraints in closed form (``knowledge``). Its proposals depend on
    these and the arguments alone: the same settings, seed and calls give the same proposals. A search is
    resumed by repeating these calls with the results in the store. A strategy may keep a cache of the history, or the
    random state of a sampler that changes with every call, but no other state.

    **What it may not do.** It may not change the history or the space, draw from any generator except `rng` and one
    that it seeds with `seed`, read a clock, depend on the number of processes or on the machine, or print.

    ``bitfront.testing.check_strategy`` tests all of this.

    Class attributes:
        Settings: its keys of ``[search.strategy.setup]``; their values arrive as `settings`.
        variant: the setting whose value may follow a colon: with ``variant = "sampler"``, ``optuna:tpe`` is strategy
            ``optuna`` with ``sampler = "tpe"``. Empty for strategies without variants.
        variants: value of that setting → what it is, in one line.
        exhaustive: whether it evaluates the whole space in its order, each candidate once. Its budget is the whole
            space, unless another one is given.
        limit: for an exhaustive strategy, the setting with the largest size of a space. Larger spaces are refused
            before any work, unless a budget is given. Empty if there is no limit.
        batch: number of candidates to request at a time. It is a constant of the strategy or of its settings, and does
            not depend on the machine, so that the sequence of candidates is the same for any number of workers.
        usual_objectives: the objectives of a search that names none; none if it must name them.
        trains_bits: whether its candidates are networks on the course of a training with learned bits
            (``learned_bits.space``), in place of those of the file's space.
        uses_noise: whether it uses ``Knowledge.noise``, which takes a few forward and backward passes, and
            ``Knowledge.margins``, which take up to some twenty evaluations.
        looks_back: whether `propose` reads the codes and losses of the history. If not, it gets a history without them;
            ``history.rows`` and ``history.fresh`` still say which candidates are known.

    Args:
        space: the space of the codes.
        objectives: number of objectives, all to be minimised.
        seed: random seed, 0 or more.
        settings: an instance of `Settings`; None for the defaults.

    Attributes:
        knowledge: what is known before any evaluation; set before the first call, and empty where nothing is.
    """

    Settings: ClassVar[type[StrategySettings]] = StrategySettings
    settings: StrategySettings
    variant: ClassVar[str] = ""
    variants: ClassVar[Mapping[str, str]] = MappingProxyType({})
    exhaustive: ClassVar[bool] = False
    limit: ClassVar[str] = ""
    batch: int = 8
    looks_back: bool = True
    usual_objectives: ClassVar[tuple[str, ...]] = ()
    trains_bits: ClassVar[bool] = False
    uses_noise: ClassVar[bool] = False

    def __init__(self, space: Space, objectives: int, seed: int, settings: StrategySettings | None = None) -> None:
        self.space, self.objectives, self.seed = space, objectives, seed
        self.settings = self.Settings() if settings is None else settings
        self.knowledge = Knowledge()

    @abstractmethod
    def propose(self, history: History, n: int, rng: np.random.Generator) -> Codes:
        """Candidates to evaluate next.

        Args:
            history: all candidates with results so far, in order; failed ones have losses of NaN. Not to be changed.
            n: the largest number of candidates, 1 or more.
            rng: a new generator for every call, seeded with the search's seed and the number of the call.

        Returns:
            Up to `n` canonical codes of the space, int64, shape (candidates, parameters), the most promising first.
            They may contain known candidates and repeats; the loop drops them, and they cost nothing. An empty array
            means that there is nothing left to propose.

        An exception ends the search; evaluated candidates stay in the store.
        """

    def promising(self, codes: Codes) -> NDArray[np.bool_]:
        """Which of some uniform candidates, shape (candidates, parameters), are worth an evaluation before the strategy
        is asked; shape (candidates,). It depends on its argument and on ``knowledge`` alone."""
        return np.ones(len(codes), dtype=bool)

    def enough(self, history: History, initial: int) -> str:  # noqa: ARG002
        """Why no more candidates are worth their evaluation; empty: go on.

        It is asked before ``propose``, and depends on its arguments and on ``knowledge`` alone, as proposals do. A
        strategy that does not look back is not asked.

        Args:
            history: as in ``propose``.
            initial: number of candidates at its beginning that were there before the strategy was asked.
        """
        return ""


def latin_hypercube(space: Space, n: int, rng: np.random.Generator) -> Codes:
    """`n` candidates in which the options of every group occur equally often; codes of shape (n, parameters)."""
    options = np.empty((n, len(space.groups)), dtype=np.int64)
    for g, group in enumerate(space.groups):
        options[:, g] = (rng.permutation(n) + rng.random(n)) / n * group.size
    return space.codes(options)


def unseen_neighbours(
    space: Space, history: History, front: NDArray[np.int64], n: int, rng: np.random.Generator
) -> Codes:
    """Up to `n` unknown candidates: neighbours of the front, smallest changes first; if these are too few, others.

    Args:
        space: the space of the codes.
        history: the known candidates.
        front: rows of `history` whose neighbours are taken, int64, shape (members,).
        n: the largest number of candidates.
        rng: source of all random numbers.

    Returns:
        Canonical codes, int64, shape (candidates, parameters), each once.
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
    # Only few unknown candidates are left, and random sampling missed them. So go through the whole space.
    for start in range(0, space.size, SCANNED):
        if take(space.numbered(start, start + SCANNED)):
            break
    return chosen
