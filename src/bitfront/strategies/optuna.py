"""Optuna's samplers as a strategy.

The study is in memory and is a cache of the history. Before each proposal all new candidates of the history are added
to it, also those that the sampler did not propose (initial candidates, neighbours of the front). Choices are encoded as
ordered integers, and TPE is multivariate: both give fewer repeats and better fronts in such spaces.

Candidates are proposed in batches. Only the first of a batch is a trial of Optuna, because a trial's ``suggest`` copies
all values for every parameter; for the others the sampler is called directly. TPE needs trials, see
``_ask_with_lies``.

Optuna itself is imported where a strategy of it is made: every search reads the settings of all strategies.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from bitfront.errors import ConfigError, UnknownNameError, nearest, one_of
from bitfront.registry import canonical
from bitfront.spaces.base import Codes, Space
from bitfront.strategies import STRATEGIES
from bitfront.strategies.base import History, Strategy, StrategySettings
from bitfront.strategies.brute_force import BruteForce

if TYPE_CHECKING:
    import optuna

#: Number of candidates of a generation of NSGA-II and NSGA-III.
POPULATION = 24
#: Number of candidates per batch. For TPE it is as large as possible without a worse front.
BATCHES = {"tpe": 8, "random": 64, "nsgaii": POPULATION, "nsgaiii": POPULATION, "qmc": 64, "gp": 1}


@functools.cache
def _places() -> Callable[[int], optuna.distributions.IntDistribution]:
    """The distribution of the positions of a choice, 0 to a number − 1. It is immutable, so that deep copies of trials
    can share it."""
    from optuna.distributions import IntDistribution

    class Places(IntDistribution):
        def __init__(self, count: int) -> None:
            super().__init__(0, count - 1)

        def __deepcopy__(self, memo: dict[int, Any]) -> Places:
            return self

    return Places


def _samplers() -> Any:
    from optuna import samplers

    return samplers


SAMPLERS: Mapping[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: _samplers().TPESampler(multivariate=True, constant_liar=True, seed=seed),
    "random": lambda seed: _samplers().RandomSampler(seed=seed),
    "nsgaii": lambda seed: _samplers().NSGAIISampler(population_size=POPULATION, seed=seed),
    "nsgaiii": lambda seed: _samplers().NSGAIIISampler(population_size=POPULATION, seed=seed),
    "qmc": lambda seed: _samplers().QMCSampler(seed=seed, warn_independent_sampling=False),
    "gp": lambda seed: _samplers().GPSampler(seed=seed, n_startup_trials=5),
}
#: Sampler → what it is, in one line.
SAMPLER_MEANINGS: Mapping[str, str] = {
    "tpe": "Tree-structured Parzen estimator, multivariate: a model of good and bad candidates.",
    "random": "Uniform random choice: the yardstick.",
    "nsgaii": "NSGA-II: evolution by non-domination and crowding.",
    "nsgaiii": "NSGA-III: evolution towards reference directions, for many objectives.",
    "qmc": "Sobol sequence: spreads evenly; a good initial design.",
    "gp": "Gaussian process: best for few, expensive evaluations; seconds per proposal.",
}
#: The same with everything that may be named as a sampler, for ``bitfront list samplers``.
MEANINGS: Mapping[str, str] = {
    **SAMPLER_MEANINGS,
    "brute_force": "Every candidate, once (a strategy of Bitfront, not of Optuna).",
}


def sampler_name(name: str) -> str:
    """The registered spelling of a sampler's name; ``brute``, ``brute-force`` ... become ``brute_force``.

    Raises:
        UnknownNameError: there is no such sampler.
    """
    for official in SAMPLERS:
        if canonical(name) in (official, official + "sampler"):
            return official
    if name in STRATEGIES and STRATEGIES.get(name) is BruteForce:
        return "brute_force"
    raise UnknownNameError(f"there is no sampler {name!r}; {one_of(MEANINGS)}.{nearest(name, MEANINGS)}")


class OptunaSettings(StrategySettings):
    """The strategy's keys of ``[search.strategy.setup]``."""

    sampler: str = Field("tpe", description=f"which of Optuna's samplers: {', '.join(SAMPLERS)}")

    @field_validator("sampler")
    @classmethod
    def _official(cls, name: str) -> str:
        """The registered spelling."""
        try:
            return sampler_name(name)
        except ConfigError as error:
            error.key = ("sampler",)
            raise

    @property
    def instead(self) -> str | None:
        """``brute_force`` for that sampler: Optuna's takes 100 ms per proposal at 3,000 trials, and no batches."""
        return None if self.sampler in SAMPLERS else self.sampler


@STRATEGIES.register("optuna")
class OptunaStrategy(Strategy):
    """Optuna's samplers: tpe, random, nsgaii, nsgaiii, qmc, gp."""

    Settings = OptunaSettings
    settings: OptunaSettings
    variant = "sampler"
    variants = SAMPLER_MEANINGS

    def __init__(self, space: Space, objectives: int, seed: int, settings: OptunaSettings | None = None) -> None:
        import optuna

        super().__init__(space, objectives, seed, settings)
        self.sampler = self.settings.sampler
        # A Gaussian process is meant for expensive evaluations, so it gets each result before the next proposal.
        self.batch = BATCHES[self.sampler]
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._optuna_sampler = SAMPLERS[self.sampler](seed)
        self._study = optuna.create_study(directions=["minimize"] * objectives, sampler=self._optuna_sampler)
        self._distributions: dict[str, optuna.distributions.BaseDistribution] = {
            f"p{i}": _places()(int(c)) for i, c in enumerate(space.cardinalities)
        }
        # Proposals without results so far, with the sampler's attributes of each (NSGA-II: its generation).
        self._asked: list[tuple[NDArray[np.int64], dict[str, Any]]] = []
        self._seen = 0

    def propose(self, history: History, n: int, rng: np.random.Generator) -> Codes:  # noqa: ARG002
        """The sampler's proposals; known candidates may be among them."""
        import optuna

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._catch_up(history)
            return self._ask_with_lies(n) if self.sampler == "tpe" else self._ask(n)

    def _ask_with_lies(self, n: int) -> Codes:
        """A batch of trials that are asked for one by one. TPE counts open trials as bad, and so proposes others.

        A whole batch from one fit of its model is six times as fast, but gives a worse front: 0.87 of the hypervolume
        instead of 0.98, after 200 candidates of digits-mlp.
        """
        import optuna

        trials = [self._study.ask(self._distributions) for _ in range(n)]
        asked = np.array([list(trial.params.values()) for trial in trials], dtype=np.int64)
        codes = self.space.canonical(asked.reshape(n, len(self._distributions)))
        for trial in trials:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        self._asked += [(code, {}) for code in codes]
        return codes

    def _ask(self, n: int) -> Codes:
        """The same proposals as `n` calls of ``study.ask``. Only the first is such a call; then the sampler is called
        directly."""
        import optuna

        trial = self._study.ask()
        proposals = [trial.relative_params]
        # Results are added as new trials, so this one is closed; an open one would count as a trial without parameters.
        # Its attributes (NSGA-II: its generation) are valid for the whole batch, because no result comes in between.
        attributes = self._study.tell(trial, state=optuna.trial.TrialState.FAIL).system_attrs
        like = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING, system_attrs=attributes)
        sampler = self._optuna_sampler
        searched = sampler.infer_relative_search_space(self._study, like)
        proposals += [sampler.sample_relative(self._study, like, searched) for _ in range(n - 1)]
        codes = np.zeros((n, len(self.space.parameters)), dtype=np.int64)
        for row, values in zip(codes, proposals, strict=True):
            for i, (name, choices) in enumerate(self._distributions.items()):
                known = name in values
                row[i] = values[name] if known else sampler.sample_independent(self._study, like, name, choices)
        codes = self.space.canonical(codes)
        self._asked += [(code, attributes) for code in codes]
        return codes

    def _catch_up(self, history: History) -> None:
        """Add all new candidates of the history to the study."""
        codes = np.array([code for code, _ in self._asked], dtype=np.int64)
        rows = history.rows(codes.reshape(len(self._asked), len(self.space.parameters))).tolist()
        for row, (_, attributes) in zip(rows, self._asked, strict=True):
            if row >= 0:
                self._add(history, row, attributes)
        self._asked = [asked for row, asked in zip(rows, self._asked, strict=True) if row < 0]
        asked_for = set(rows)
        for row in range(self._seen, len(history)):
            if row not in asked_for:
                self._add(history, row, {})
        self._seen = len(history)

    def _add(self, history: History, row: int, attributes: dict[str, Any]) -> None:
        """Add a candidate to the study, unless it failed: samplers look at complete trials only."""
        import optuna

        losses, violation, constraints = history.losses[row], float(history.violation[row]), None
        if history.constrained:
            constraints = {"all": violation}
            if violation and np.isnan(losses).any():
                # It was not evaluated, so it counts as bad as the worst so far. Samplers compare such trials by their
                # violation alone.
                worst = np.nan_to_num(history.losses[:row], nan=-np.inf).max(axis=0, initial=-np.inf)
                losses = np.where(np.isfinite(worst), worst, 0.0)
        if np.isnan(losses).any():
            return
        values = dict(zip(self._distributions, history.codes[row].tolist(), strict=True))
        self._study.add_trial(
            optuna.trial.create_trial(
                params=values,
                distributions=self._distributions,
                values=losses.tolist(),
                system_attrs=dict(attributes),  # a copy: constraints are added to it
                constraints=constraints,
            )
        )
