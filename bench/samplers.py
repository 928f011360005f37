"""What asking costs, and how good the fronts are: every strategy, on spaces whose front is known.

1. CPU ms per proposal, telling included, over a whole search in a space of 12 or 60 parameters.
2. Optuna's samplers as Bitfront asks them, in batches, against Optuna's ask and tell, one by one: time of the whole
   search, and the front.
3. Fronts in three spaces of jsc and digits models, every candidate of which is evaluated beforehand.

Fronts are compared by hypervolume at equal numbers of distinct candidates, the same seeds for all, as a part of what
the exact front dominates. Reference point: the worst of the exact front in each objective, and a tenth of its extent
more.
Times are of this process's CPU: machines are shared, and nothing here waits.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import common
import numpy as np
import optuna
from numpy.typing import NDArray

from bitfront.data.base import DataRequest
from bitfront.data.loading import load_dataset
from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.metrics.configured import configured_runner
from bitfront.models.base import build_model
from bitfront.pareto import hypervolume, non_dominated
from bitfront.spaces.base import Branch, Choice, Codes, Group, Space
from bitfront.strategies.base import History, Strategy, unseen_neighbours
from bitfront.strategies.brute_force import BruteForce
from bitfront.strategies.evolution import Evolution
from bitfront.strategies.optuna import POPULATION, OptunaSettings, OptunaStrategy

Losses = NDArray[np.float64]
Make = Callable[[Space, int, int], Strategy]

BUDGETS = (100, 200, 400)
SEEDS = 5
ASKED: dict[str, Make] = {
    "brute_force": BruteForce,
    "evolution": Evolution,
    **{
        f"optuna {s}": partial(OptunaStrategy, settings=OptunaSettings(sampler=s))
        for s in ("tpe", "random", "nsgaii", "nsgaiii", "qmc")
    },
}
COMPARED = ("evolution", "optuna nsgaii", "optuna tpe")


@dataclass(frozen=True)
class Problem:
    """A space with its losses, and what its exact front dominates."""

    name: str
    space: Space
    losses: Callable[[Codes], Losses]
    uniform: Codes
    reference: NDArray[np.float64]
    exact: float


class OneByOne(Strategy):
    """Optuna as its documentation has it: ask for one, tell it, ask for the next."""

    batch = 1

    def __init__(self, space: Space, objectives: int, seed: int, sampler: str) -> None:
        super().__init__(space, objectives, seed)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        samplers = {
            "tpe": lambda: optuna.samplers.TPESampler(multivariate=True, seed=seed),
            "nsgaii": lambda: optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._study = optuna.create_study(directions=["minimize"] * objectives, sampler=samplers[sampler]())
        self._choices = {
            f"p{i}": optuna.distributions.IntDistribution(0, int(c) - 1) for i, c in enumerate(space.cardinalities)
        }
        self._open: tuple[int, NDArray[np.int64]] | None = None
        self._seen = 0

    def propose(self, history: History, n: int, rng: np.random.Generator) -> Codes:  # noqa: ARG002
        asked = -1
        if self._open is not None:
            number, code = self._open
            asked = history.row(code)
            self._study.tell(number, history.losses[asked].tolist())
        for row in range(self._seen, len(history)):
            if row != asked:
                values = dict(zip(self._choices, history.codes[row].tolist(), strict=True))
                self._study.add_trial(
                    optuna.trial.create_trial(
                        params=values, distributions=self._choices, values=history.losses[row].tolist()
                    )
                )
        self._seen = len(history)
        trial = self._study.ask(self._choices)
        code = self.space.canonical(np.array([list(trial.params.values())]))
        self._open = trial.number, code[0]
        return code


class SingleEvolution(Evolution):
    """Evolution that is asked for one at a time."""

    batch = 1


def search(
    problem: Problem, strategy: Strategy, budget: int, seed: int, *, seeded: bool = True
) -> tuple[Losses, float, int]:
    """(losses in order, CPU seconds of asking and telling, proposals) of a search, as the engine's loop runs it."""
    space = problem.space
    history = History(len(space.parameters), strategy.objectives, space)
    if seeded:
        history.tell(problem.uniform, problem.losses(problem.uniform))
    seconds, asked, step, stalled = 0.0, 0, 0, 0
    while len(history) < min(budget, space.size):
        rng = np.random.default_rng([seed, 1, step])
        step += 1
        begin = time.process_time()
        proposed = strategy.propose(history, strategy.batch, rng)
        seconds += time.process_time() - begin
        asked += len(proposed)
        fresh = history.fresh(proposed)
        stalled = 0 if len(fresh) else stalled + max(1, len(proposed))
        if stalled >= 3:
            fresh, stalled = unseen_neighbours(space, history, non_dominated(history.losses), 8, rng), 0
        fresh = fresh[: budget - len(history)]
        losses = problem.losses(fresh)
        begin = time.process_time()
        history.tell(fresh, losses)
        seconds += time.process_time() - begin
    return history.losses, seconds, asked


def hypervolume_share(problem: Problem, losses: Losses, budget: int) -> float:
    """Hypervolume of the first `budget` candidates, as a part of the exact one."""
    return hypervolume(losses[:budget], problem.reference) / problem.exact


# -- problems


def synthetic(layers: int, seed: int = 0) -> Problem:
    """Rate and distortion: `layers` × (input, weight) bits of {2, 3, 4, 6, 8}; noise adds up and saturates."""
    bits = np.array([2, 3, 4, 6, 8])
    labels = tuple(map(str, bits))
    branch = Branch("integer", (Choice("data_in", labels), Choice("weight", labels)))
    space = Space([Group(f"layer{i}", (branch,)) for i in range(layers)])
    rng = np.random.default_rng([seed, layers])
    of_input, of_weight = np.exp(rng.normal(0, 1.2, (2, layers)))
    share = np.exp(rng.normal(0, 1, layers))
    share /= share.sum()

    def losses(codes: Codes) -> Losses:
        chosen = bits[codes].astype(np.float64)
        inputs, weights = chosen[:, 0::2], chosen[:, 1::2]
        noise = of_input * 4.0**-inputs + of_weight * 4.0**-weights
        neighbours = np.sqrt(noise[:, 1:] * noise[:, :-1]).sum(axis=1)
        error = 1 - np.exp(-24 / layers * (noise.sum(axis=1) + neighbours))
        return np.stack([error, (share * inputs * weights).sum(axis=1) / 64], axis=1)

    uniform = np.array([[i, w] * layers for i in range(5) for w in range(5)], dtype=np.int64)
    return Problem(f"synthetic {2 * layers}", space, losses, uniform, np.ones(2), 1.0)


def bench_space(name: str, quick: bool) -> Problem:
    """A model, trained now, with every candidate of its space evaluated."""
    jets = name.startswith("jsc")
    data = common.jets()[0] if jets else load_dataset("digits", DataRequest())
    model = common.trained(build_model(name, data.sample_shape, data.num_classes, 0), data, steps=40 if quick else 400)
    x, y = data.split("val")
    weights, inputs = ([2, 8], [4, 8]) if quick else SPACES[name]
    both = {"name": "integer", "weight_frac_width": "auto", "data_in_frac_width": "auto"}
    both |= {"weight_width": weights, "data_in_width": inputs}
    only = {"name": "integer", "data_in_width": inputs, "data_in_frac_width": "auto"}
    seed: dict[str, dict[str, object]] = {
        "linear": both,
        "conv2d": both,
        **({} if jets or "cnn" in name else {"relu": only}),
    }
    runners = (configured_runner("basic_evaluation"), configured_runner("basic_computation"))
    calibration = data.split("train")[0][:512]
    evaluator = FixedEvaluator(
        common.make_job(model, x[:1024], y[:1024], seed, calibration=calibration, runners=runners)
    )
    space = evaluator.space
    parts = []
    for start in range(0, space.size, 1024):
        values = evaluator.evaluate(space.numbered(start, start + 1024)).values
        parts.append(np.stack([-values["accuracy"], values["total_bitops"]], axis=1))
    every = np.concatenate(parts)
    sizes = [g.size for g in space.groups]
    strides = np.array([int(np.prod(sizes[g + 1 :])) for g in range(len(sizes))], dtype=np.int64)
    front = every[non_dominated(every)]
    reference = front.max(axis=0) + 0.1 * np.ptp(front, axis=0)
    exact = hypervolume(front, reference)
    return Problem(
        f"{name}, {space.size:,}",
        space,
        lambda codes: every[space.options(codes) @ strides],
        space.uniform(),
        reference,
        exact,
    )


#: Model → weight and input bits.
SPACES: dict[str, tuple[list[int], list[int]]] = {
    "jsc-toy": ([2, 3, 4, 6, 8], [3, 4, 6, 8]),
    "digits-mlp": ([2, 3, 4, 5, 6, 8], [2, 3, 4, 6, 8]),
    "jsc-mlp": ([2, 3, 4, 6, 8], [4, 8]),
}


# -- the three parts


def cost(problem: Problem, make: Make, trials: int, seed: int = 0) -> tuple[float, float]:
    """(ms per proposal, ms per trial) of a whole search."""
    _, seconds, asked = search(problem, make(problem.space, 2, seed), trials, seed)
    return 1e3 * seconds / asked, 1e3 * seconds / trials


def cost_at(problem: Problem, trials: int, calls: int = 10) -> float:
    """ms per proposal of evolution with that many trials in the history."""
    history = History(len(problem.space.parameters), 2, problem.space)
    codes = history.fresh(problem.space.sample(trials, np.random.default_rng(0)))
    history.tell(codes, problem.losses(codes))
    strategy, proposed = Evolution(problem.space, 2, 0), 0
    begin = time.process_time()
    for i in range(calls):
        proposed += len(strategy.propose(history, strategy.batch, np.random.default_rng(i)))
    return 1e3 * (time.process_time() - begin) / proposed


def row(part: str, problem: str, strategy: str, measure: str, *values: float) -> dict[str, object]:
    """A line of the table: the median of `values`, and how far they spread."""
    low, high = (min(values), max(values)) if len(values) > 1 else (None, None)
    return {
        "part": part,
        "space": problem,
        "strategy": strategy,
        "measure": measure,
        "median": statistics.median(values),
        "least": low,
        "most": high,
    }


def asking(quick: bool) -> Iterator[tuple[dict[str, object], tuple[str, float] | None]]:
    """Rows, and entries of the summary, about what asking costs."""
    for layers in (6, 30):
        problem = synthetic(layers)
        for name, make in ASKED.items():
            trials = 30 if quick else 1000
            if name == "optuna tpe" and layers == 30:
                trials = min(trials, 300)  # it grows with the trials, and all of it takes a minute
            each, _ = cost(problem, make, trials)
            key = f"{name.removeprefix('optuna ')}_{2 * layers}_ms"
            yield row("asking", f"{problem.name}, {trials} trials", name, "ms per proposal", each), (key, each)
    each, _ = cost(synthetic(6), partial(OptunaStrategy, settings=OptunaSettings(sampler="gp")), 28)
    yield row("asking", "synthetic 12, 28 trials", "optuna gp", "ms per proposal", each), ("gp_12_ms", each)
    problem, trials = synthetic(15), 300 if quick else 3000
    each = cost_at(problem, trials)
    yield (
        row("asking", f"{problem.name}, at {trials} trials", "evolution", "ms per proposal", each),
        (
            f"evolution_30_at_{trials}_ms",
            each,
        ),
    )


def batches(quick: bool) -> Iterator[tuple[dict[str, object], tuple[str, float] | None]]:
    """Rows about batches against one by one."""
    problem = synthetic(6)
    trials, seeds = (30, 2) if quick else (400, 3)
    for sampler in ("tpe", "nsgaii", "evolution"):
        pairs = []
        for seed in range(seeds):
            evolves = sampler == "evolution"
            single = SingleEvolution(problem.space, 2, seed) if evolves else OneByOne(problem.space, 2, seed, sampler)
            make = Evolution if evolves else partial(OptunaStrategy, settings=OptunaSettings(sampler=sampler))
            several = make(problem.space, 2, seed)
            one = search(problem, single, trials, seed)
            many = search(problem, several, trials, seed)
            shares = [hypervolume_share(problem, losses, trials) for losses in (one[0], many[0])]
            pairs.append((one[1], many[1], *shares))
        for name, i in (("one by one", 0), ("in batches", 1)):
            yield row("batches", problem.name, f"{sampler} {name}", f"s for {trials}", *(p[i] for p in pairs)), None
            yield row("batches", problem.name, f"{sampler} {name}", "hypervolume", *(p[2 + i] for p in pairs)), None
        ratios, gains = [p[0] / p[1] for p in pairs], [p[3] - p[2] for p in pairs]
        yield (
            row("batches", problem.name, f"{sampler} in batches", "times as fast", *ratios),
            (f"{sampler}_batch_speedup", statistics.median(ratios)),
        )
        yield (
            row("batches", problem.name, f"{sampler} in batches", "hypervolume gained", *gains),
            (f"{sampler}_batch_gain", statistics.median(gains)),
        )


def fronts(quick: bool) -> Iterator[tuple[dict[str, object], tuple[str, float] | None]]:
    """Rows about the fronts."""
    for name in SPACES:
        problem = bench_space(name, quick)
        for seeded in (True, False):
            # Without the uniform ones, as far as TPE's time allows.
            budgets = (10, 20) if quick else BUDGETS if seeded else BUDGETS[:2]
            start = "uniform first" if seeded else "from nothing"
            medians: dict[str, list[float]] = {}
            for strategy in COMPARED:
                runs = [
                    search(problem, ASKED[strategy](problem.space, 2, s), budgets[-1], s, seeded=seeded)[0]
                    for s in range(1 if quick else SEEDS)
                ]
                medians[strategy] = []
                for budget in budgets:
                    values = [hypervolume_share(problem, losses, budget) for losses in runs]
                    medians[strategy].append(statistics.median(values))
                    measure = f"hypervolume at {budget}, {start}"
                    yield row("fronts", problem.name, strategy, measure, *values), None
            others = [max(m) for m in zip(*(medians[s] for s in COMPARED[1:]), strict=True)]
            for budget, ours, other in zip(budgets, medians["evolution"], others, strict=True):
                key = f"{name}_{budget}_{'uniform' if seeded else 'bare'}_gain"
                yield (
                    row("fronts", problem.name, "evolution", f"gain on the better at {budget}, {start}", ours - other),
                    (key, ours - other),
                )


def main() -> None:
    options = common.parser(__doc__ or "").parse_args()
    rows: list[dict[str, object]] = []
    summary: dict[str, float] = {}
    for part in (asking, batches, fronts):
        for line, entry in part(options.quick):
            rows.append(line)
            if entry is not None:
                summary[entry[0]] = entry[1]
    common.report("samplers", rows, summary, options.json, data=common.jets()[1])


if __name__ == "__main__":
    main()
