"""Several strategies on one space: the same budget, the same random seeds, every candidate evaluated once for all.

Each run is the loop of a search, as it would have gone alone: the same random seed gives the same trials in one order.
What is evaluated goes into one store, ``compare/cache.sqlite`` in the run folder, of which all runs are answered, and a
comparison that is given again, after whatever stopped it, too. Only the strategies' own time is spent again.

Brute force goes through the whole space, whatever the budget, and before all others: then it is known what there is to
be found, and a candidate costs everybody what it costs in brute force's large blocks.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bitfront.config import Config
from bitfront.constraints import fulfilled
from bitfront.engine.comparison.cached import CachedEvaluator, InMemoryTrials, TimedStrategy
from bitfront.engine.comparison.results import EXHAUSTIVE, Comparison, StrategyRun, add_curves
from bitfront.engine.evaluation.dispatch import Dispatcher
from bitfront.engine.planning.feasibility import Feasibility, check
from bitfront.engine.planning.inputs import weights_fingerprint
from bitfront.engine.planning.plan import Plan
from bitfront.engine.planning.probe import seconds_per_candidate
from bitfront.engine.search import loop
from bitfront.engine.search.checking import verified_plan
from bitfront.engine.search.session import bounds, first_candidates, float_metrics, with_samples
from bitfront.engine.search.weights import trained_model
from bitfront.engine.storage import store as stores
from bitfront.engine.storage.store import Store
from bitfront.errors import ConfigError, EvaluationError, RunError
from bitfront.events import Events
from bitfront.spaces.base import Codes
from bitfront.strategies.configured import SETUP, configured_strategy, variant_settings

#: Below the run folder.
FOLDER, CACHE = "compare", "cache.sqlite"
DEFAULT = ("evolution", "optuna:tpe", "optuna:nsgaii", "optuna:random")
BUDGET = 400
#: Brute force comes along by itself where going through the whole space takes no longer, in seconds.
FINISHES = 120.0
#: What a search is known by, and results are not.
OF_THE_SEARCH = ("objectives", "summed", "constraints", "strategy", "sampler")


def prepared(config: Config) -> Config:
    """The configuration of a comparison: the timeout and the fine-tuning of the search in it have no say.

    Raises:
        ConfigError: candidates are compared while they are trained, so that their results depend on the strategy.
    """
    if config.search is None:
        return config  # the plan says what is missing
    own = config.search.strategy
    for name, table in own.sw_runner.items():
        if table.get("halving") is not None:
            raise ConfigError(
                "with halving a candidate's result depends on who is trained beside it, so strategies cannot share "
                "results; leave it out",
                key=("search", "strategy", "sw_runner", name, "halving"),
            )
    setup = own.setup.model_copy(update={"timeout": None, "n_trials": own.setup.n_trials or BUDGET})
    strategy = own.model_copy(update={"setup": setup})
    finetune = config.search.finetune.model_copy(update={"trials": 0})
    return config.model_copy(
        update={"search": config.search.model_copy(update={"strategy": strategy, "finetune": finetune})}
    )


def competitors(plan: Plan, names: Sequence[str]) -> tuple[Plan, ...]:
    """`plan` once per strategy, ``"evolution"`` or ``"optuna:tpe"``; brute force first, with the whole space to do.

    Raises:
        ConfigError: there is no such strategy or sampler, one is named twice, or brute force would not finish.
    """
    found: list[Plan] = []
    for text in names:
        try:
            strategy = configured_strategy(text, _setup(plan))
        except ConfigError as error:
            if error.key[: len(SETUP)] != SETUP or error.key[-1] in variant_settings():
                error.key = ("strategies", text)
                raise
            with plan.config.locating():
                raise
        if strategy.title in (other.strategy.title for other in found):
            raise ConfigError(f"{strategy.title} is named twice", key=("strategies", text))
        own = replace(plan, strategy=strategy)
        if strategy.kind.exhaustive:
            own = replace(own, n_trials=plan.space.size)
            if strategy.largest is not None and plan.space.size > strategy.largest:
                raise ConfigError(
                    f"the space has {plan.space.size:,} candidates, and {strategy.words}, which goes through all of "
                    f"them, stops at {strategy.kind.limit} = {strategy.largest:,}; leave it out, or set "
                    f"{strategy.kind.limit} yourself",
                    key=("strategies", text),
                )
        found.append(own)
    return tuple(sorted(found, key=lambda p: not p.strategy.kind.exhaustive))


def _setup(plan: Plan) -> dict[str, Any]:
    """The settings of strategies in the file: they are for all that are compared. Which variant of a strategy is meant,
    its name says."""
    given = plan.settings.strategy.setup.of_strategy
    return {key: value for key, value in given.items() if key not in variant_settings()}


def run_comparison(plan: Plan, names: Sequence[str] | None, repeats: int, restart: bool, events: Events) -> Comparison:
    """Compare strategies, or go on with it, in ``compare`` of the run folder.

    Args:
        plan: of a configuration that is ``prepared``.
        names: the strategies; None: ``DEFAULT``, and brute force where it takes no more than two minutes.
        repeats: how many runs of each: with the random seed of the configuration, and those after it.
        restart: throw away what an earlier comparison there has evaluated.

    Raises:
        ConfigError: a strategy is not possible, before any work.
        RunError: the folder belongs to another configuration, or to a search or comparison that is running.
        EvaluationError: nothing could be evaluated, nothing fulfils the constraints, or results cannot be written.
        KeyboardInterrupt: what was evaluated until then is kept.
    """
    if repeats < 1:
        raise ConfigError(f"{repeats} is not possible; allowed: 1 or more", key=("seeds",))
    competitors(plan, names or DEFAULT)  # mistakes come before any work
    for note in plan.notes:
        events.note(note)
    folder = plan.config.run_folder
    try:
        with stores.locked(folder):
            return _compare(plan, names, repeats, restart, events)
    except OSError as error:
        raise RunError(f"{error.filename or folder}: {error.strerror or error}") from None
    except sqlite3.Error as error:
        raise EvaluationError(
            f"{folder / FOLDER / CACHE}: {error}. Make room or fix the permissions, then give the same command again"
        ) from None


def _compare(plan: Plan, names: Sequence[str] | None, repeats: int, restart: bool, events: Events) -> Comparison:
    folder = plan.config.run_folder / FOLDER
    path = folder / CACHE
    if path.exists() and not restart:
        stores.check_identity(path, _identity(plan, None), ignore=["weights"])
    if not plan.brings_weights:
        plan = plan.trained(trained_model(plan.config, plan.model, plan.dataset, events, folder).model)
    if restart:
        for old in (path, *folder.glob(f"{CACHE}-*")):
            old.unlink(missing_ok=True)
    space, evaluator = plan.space, plan.evaluator
    with plan.config.locating():
        starts = check(evaluator, plan.constraints, trained=True)
    identity = _identity(plan, weights_fingerprint(plan.model))
    store = Store.open(path, evaluator.metrics, len(space.parameters), identity, space.keys)
    try:
        plan = verified_plan(with_samples(plan, store, events), 0.0, events)
        limits = bounds(plan, float_metrics(plan))
        own = competitors(plan, _default(plan, store, events) if names is None else names)
        with Dispatcher(plan.evaluator, plan.settings.strategy.setup.n_jobs) as dispatcher:
            shared = CachedEvaluator(dispatcher, store, space.keys)
            known = len(shared)
            _announce(own, repeats, known, events)
            runs = _runs(own, repeats, starts, limits, shared, events)
            remarks = tuple(dispatcher.remarks)
    finally:
        store.close()
    if not any(np.isfinite(run.losses).all(axis=1).any() for run in runs):
        raise EvaluationError("nothing that was evaluated is complete and fulfils the constraints")
    for remark in remarks:
        events.note(remark)
    with_curves, front, reference, hypervolume = add_curves(runs, plan.objectives)
    return Comparison(
        folder=folder,
        strategies=tuple(p.strategy.title for p in own),
        seeds=_random_seeds(plan, repeats),
        budget=min(plan.n_trials, space.size),
        size=space.size,
        objectives=plan.objectives,
        constraints=tuple(c.text for c in plan.constraints),
        truth=any(run.stopped == "space exhausted" for run in runs),
        front=front,
        reference=reference,
        hypervolume=hypervolume,
        runs=with_curves,
        evaluated=shared.evaluated,
        known=known,
        notes=(*plan.notes, *remarks),
    )


def _identity(plan: Plan, weights: str | None) -> dict[str, Any]:
    """What results depend on: those of any strategy, for any objectives."""
    own = {k: v for k, v in plan.identity(weights).items() if k not in OF_THE_SEARCH}
    return {**own, "metrics": list(plan.evaluator.metrics)}


def _random_seeds(plan: Plan, repeats: int) -> tuple[int, ...]:
    return tuple(range(plan.config.seed, plan.config.seed + repeats))


def _default(plan: Plan, store: Store, events: Events) -> tuple[str, ...]:
    """The strategies that are compared unless others are named; decided once, as it depends on the clock."""
    size, largest = plan.space.size, configured_strategy(EXHAUSTIVE, _setup(plan)).largest
    seconds = store.meta("brute_force_seconds")
    if seconds is None and (largest is None or size <= largest):
        (exhaustive,) = competitors(plan, [EXHAUSTIVE])
        seconds = size * seconds_per_candidate(exhaustive)
        store.set_meta("brute_force_seconds", seconds)
    if seconds is not None and seconds <= FINISHES:
        return (EXHAUSTIVE, *DEFAULT)
    would = f"would need some {seconds:,.0f} s" if seconds is not None else f"stops at max_size = {largest:,}"
    events.note(
        f"brute force is not among them: for {size:,} candidates it {would}; name it among the strategies to have it"
    )
    return DEFAULT


def _announce(own: Sequence[Plan], repeats: int, known: int, events: Events) -> None:
    plan = own[-1]
    size, budget = plan.space.size, min(plan.n_trials, plan.space.size)
    events.note(f"space: {size:,} distinct candidates, {len(plan.space.parameters)} parameters")
    names = ", ".join(p.strategy.title for p in own)
    events.note(
        f"compared: {names}; {repeats} {'seed' if repeats == 1 else 'seeds'}, {budget:,} distinct evaluations each"
        + (f", brute force all {size:,}" if own[0].strategy.kind.exhaustive else "")
    )
    each = 1000 * seconds_per_candidate(own[0])  # also what happens once happens now, and not to the first candidate
    events.note(f"cost: {each:.2g} ms per candidate (measured), which is paid once, and the strategies' own time")
    if known:
        events.note(f"{known:,} candidates are known from before")


def _runs(
    own: Sequence[Plan], repeats: int, starts: Codes, limits: Feasibility, shared: CachedEvaluator, events: Events
) -> list[StrategyRun]:
    """Every run, strategy by strategy."""
    found: list[StrategyRun] = []
    for competitor in own:
        several = (None,) if competitor.strategy.kind.exhaustive else _random_seeds(competitor, repeats)
        for seed in several:
            which = f"seed {seed}" if seed is not None else "the whole space"
            events.running(f"{competitor.strategy.title}, {which}")
            found.append(
                _run(competitor, competitor.config.seed if seed is None else seed, starts, limits, shared, events)
            )
        runs = found[-len(several) :]
        events.ran(competitor.strategy.title, len(runs), sum(map(len, runs)), sum(c.asked for c in runs))
    return found


def _run(
    own: Plan, seed: int, starts: Codes, limits: Feasibility, shared: CachedEvaluator, events: Events
) -> StrategyRun:
    """One run: the loop of a search, on what all runs share."""
    told = InMemoryTrials(own.evaluator.metrics)
    strategy = TimedStrategy(lambda: own.make_strategy(seed), told.__len__)
    stopped = loop.run(
        space=own.space,
        strategy=strategy,
        initial=first_candidates(own, starts),
        objectives=own.objectives,
        store=told,
        evaluator=shared,
        limits=loop.Limits(own.n_trials),
        seed=seed,
        on_progress=lambda progress: events.progress(progress, own),
        feasibility=limits,
    )
    if stopped == "interrupted":
        raise KeyboardInterrupt
    codes, values, complete, seconds = told.columns(len(own.space.parameters))
    losses = own.objectives.losses(values)
    counts = complete & np.isfinite(losses).all(axis=1)
    if limits:
        counts &= fulfilled(limits.constraints, values)
    losses[~counts] = np.nan
    return StrategyRun(
        strategy=own.strategy.title,
        seed=seed,
        codes=codes,
        losses=losses,
        asking=strategy.asked(len(codes)),
        evaluating=seconds,
        asked=strategy.seconds,
        proposals=strategy.proposals,
        repeats=strategy.repeats,
        failed=int((~complete).sum()),
        stopped=stopped,
        volume=np.zeros(0),
        best=np.zeros(0),
    )
