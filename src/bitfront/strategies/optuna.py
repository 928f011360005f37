"""Optuna's samplers behind ``propose``, driven by ask and tell.

The study lives in memory and is a cache of the history: before asking, every trial asked for earlier is told what the
history says of it, and candidates that came from elsewhere (seeds, neighbours of the front) are added. Choices are
encoded as ordered integers and TPE is multivariate: both repeat less and find more in such spaces.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray

from bitfront.errors import UnknownNameError, nearest, one_of
from bitfront.registry import canonical
from bitfront.spaces.base import Codes, Space
from bitfront.strategies import STRATEGIES
from bitfront.strategies.base import History, Strategy
from bitfront.strategies.brute_force import BruteForce

SAMPLERS: Mapping[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(multivariate=True, constant_liar=True, seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "nsgaii": lambda seed: optuna.samplers.NSGAIISampler(population_size=24, seed=seed),
    "nsgaiii": lambda seed: optuna.samplers.NSGAIIISampler(population_size=24, seed=seed),
    "qmc": lambda seed: optuna.samplers.QMCSampler(seed=seed, warn_independent_sampling=False),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed, n_startup_trials=5),
}
#: One line about each, for ``bitfront list samplers``.
MEANINGS: Mapping[str, str] = {
    "tpe": "Tree-structured Parzen estimator, multivariate: a model of good and bad candidates.",
    "random": "Uniform random choice: the yardstick.",
    "nsgaii": "NSGA-II: evolution by non-domination and crowding.",
    "nsgaiii": "NSGA-III: evolution towards reference directions, for many objectives.",
    "qmc": "Sobol sequence: spreads evenly; a good initial design.",
    "gp": "Gaussian process: best for few, expensive evaluations; seconds per proposal.",
    "brute_force": "Every candidate, once (Bitfront's own, not Optuna's).",
}


def sampler_name(name: str) -> str:
    """The official spelling of a sampler's name; ``brute``, ``brute-force`` ... are ``brute_force``.

    Raises:
        UnknownNameError: there is no such sampler.
    """
    for official in SAMPLERS:
        if canonical(name) in (official, official + "sampler"):
            return official
    if name in STRATEGIES and STRATEGIES.get(name) is BruteForce:
        return "brute_force"
    raise UnknownNameError(f"there is no sampler {name!r}; {one_of(MEANINGS)}.{nearest(name, MEANINGS)}")


@STRATEGIES.register("optuna")
class OptunaStrategy(Strategy):
    """Optuna's samplers: tpe, random, nsgaii, nsgaiii, qmc, gp."""

    def __init__(self, space: Space, objectives: int, seed: int, sampler: str = "tpe") -> None:
        super().__init__(space, objectives, seed)
        self.sampler = sampler_name(sampler)
        # A Gaussian process is for evaluations that are dearer than asking: each answer is worth waiting for.
        self.batch = 1 if self.sampler == "gp" else self.batch
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            own = SAMPLERS[self.sampler](seed)
        self._study = optuna.create_study(directions=["minimize"] * objectives, sampler=own)
        self._distributions: dict[str, optuna.distributions.BaseDistribution] = {
            f"p{i}": optuna.distributions.IntDistribution(0, int(c) - 1) for i, c in enumerate(space.cardinalities)
        }
        self._asked: dict[int, NDArray[np.int64]] = {}
        self._told: set[bytes] = set()
        self._seen = 0

    def propose(self, history: History, pending: Codes, n: int, rng: np.random.Generator) -> Codes:  # noqa: ARG002
        """What the sampler asks for; it is free to ask for what is known."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._catch_up(history)
            rows = [self._ask() for _ in range(n)]
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(self.space.parameters))

    def _ask(self) -> NDArray[np.int64]:
        trial = self._study.ask(self._distributions)
        asked = np.array([trial.params[name] for name in self._distributions], dtype=np.int64)
        code: NDArray[np.int64] = self.space.canonical(asked.reshape(1, -1))[0]
        self._asked[trial.number] = code
        return code

    def _catch_up(self, history: History) -> None:
        for number, code in list(self._asked.items()):
            row = history.row(code)
            if row is not None:
                losses = history.losses[row]
                if np.isnan(losses).any():
                    self._study.tell(number, state=optuna.trial.TrialState.FAIL)
                else:
                    self._study.tell(number, losses.tolist())
                self._told.add(code.tobytes())
                del self._asked[number]
        for row in range(self._seen, len(history)):
            code = history.codes[row]
            if code.tobytes() not in self._told and not np.isnan(history.losses[row]).any():
                self._study.add_trial(self._trial(code, history.losses[row]))
        self._seen = len(history)

    def _trial(self, code: NDArray[np.int64], losses: NDArray[np.float64]) -> optuna.trial.FrozenTrial:
        values: dict[str, Any] = {name: int(v) for name, v in zip(self._distributions, code, strict=True)}
        return optuna.trial.create_trial(params=values, distributions=self._distributions, values=losses.tolist())
