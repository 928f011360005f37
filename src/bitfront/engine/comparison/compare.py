"""Compares several strategies on one space, with the same budget and the same random seeds.

Each run is the loop of a search and gives the same trials, in the same order, as that search alone. Every candidate is
evaluated once for all runs and stored in ``compare/cache.sqlite`` in the run folder. A comparison that is started again
is answered from there; only the time spent in the strategies is spent again.

Brute force evaluates the whole space, whatever the budget, and runs first. So the true front is known, and the
recorded time of each candidate is that in brute force's large blocks, the same for all strategies. Results of earlier
sessions count for the front that all are measured against, so that strategies that are added later have the same one.

A strategy that trains its networks has candidates of another kind, and shares none (``learning.py``). Its front is on
the same picture, by the same metrics on the same samples, and its time counts the training.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront.config import Config
from bitfront.constraints import fulfilled
from bitfront.engine.comparison import learning
from bitfront.engine.comparison.cached import CachedEvaluator, InMemoryTrials, TimedStrategy
from bitfront.engine.comparison.results import EXHAUSTIVE, Comparison, StrategyRun, add_curves
from bitfront.engine.evaluation.dispatch import Dispatcher
from bitfront.engine.planning.feasibility import Feasibility, check
from bitfront.engine.planning.inputs import weights_fingerprint
from bitfront.engine.planning.plan import Plan
from bitfront.engine.planning.probe import seconds_per_candidate
from bitfront.engine.search import loop
from bitfront.engine.search.checking import check_scores, verified_plan, verify_workers
from bitfront.engine.search.front import TESTED
from bitfront.engine.search.knowledge import knowledge
from bitfront.engine.search.session import bounds, first_candidates, float_metrics, open_dispatcher, with_samples
from bitfront.engine.search.weights import trained_model
from bitfront.engine.storage import store as stores
from bitfront.engine.storage.store import Store
from bitfront.errors import ConfigError, EvaluationError, RunError
from bitfront.events import Events
from bitfront.files import shown, sweep
from bitfront.pareto import non_dominated
from bitfront.spaces.base import Codes, counted
from bitfront.strategies.base import Knowledge
from bitfront.strategies.configured import SETUP, configured_strategy, variant_settings

#: Folder in the run folder, and the file in it with all evaluated candidates.
FOLDER, CACHE = "compare", "cache.sqlite"
DEFAULT = ("surrogate", "evolution", "optuna:tpe", "optuna:nsgaii", "optuna:random")
BUDGET = 400
#: Brute force is one of the default strategies if the whole space takes at most this many seconds.
EXHAUSTIVE_SECONDS = 120.0
#: Keys of a search's identity that the metrics of its candidates do not depend on.
OF_THE_SEARCH = ("objectives", "summed", "constraints", "strategy", "sampler")


def prepared(config: Config) -> Config:
    """The configuration of a comparison: that of a search, without fine-tuning.

    Raises:
        ConfigError: halving is configured, so that a candidate's results depend on the strategy.
    """
    if config.search is None:
        return config  # the builder of the plan says what is missing
    searched = config.search.strategy
    for name, table in searched.sw_runner.items():
        if table.get("halving") is not None:
            raise ConfigError(
                "with halving a candidate's result depends on the candidates that are trained with it, so strategies "
                "cannot share results; remove it",
                key=("search", "strategy", "sw_runner", name, "halving"),
            )
    finetune = config.search.finetune.model_copy(update={"trials": 0})
    return config.model_copy(update={"search": config.search.model_copy(update={"finetune": finetune})})


def competitors(plan: Plan, names: Sequence[str]) -> tuple[Plan, ...]:
    """`plan` once per strategy. Brute force comes first, with the whole space as its budget.

    Args:
        plan: the plan of the comparison.
        names: strategies, such as ``"evolution"`` or ``"optuna:tpe"``.

    Raises:
        ConfigError: there is no such strategy or sampler, one is named twice, the space is too large for brute force,
            or the model cannot be trained as a strategy does it.
    """
    plans: list[Plan] = []
    for text in names:
        try:
            strategy = configured_strategy(text, _setup(plan))
        except ConfigError as error:
            if error.key[: len(SETUP)] != SETUP or error.key[-1] in variant_settings():
                error.key = ("strategies", text)
                raise
            with plan.config.locating():
                raise
        if strategy.title in (other.strategy.title for other in plans):
            raise ConfigError(f"{strategy.title} is named twice", key=("strategies", text))
        if strategy.kind.trains_bits:
            plans.append(learning.learning_plan(plan, strategy))
            continue
        competitor = replace(plan, strategy=strategy)
        if strategy.kind.exhaustive:
            competitor = replace(competitor, n_trials=plan.space.size)
            if strategy.largest is not None and plan.space.size > strategy.largest:
                raise ConfigError(
                    f"the space has {counted(plan.space.size)} candidates, and {strategy.words}, which evaluates all "
                    f"of them, stops at {strategy.kind.limit} = {strategy.largest:,}; remove it, or set "
                    f"{strategy.kind.limit}",
                    key=("strategies", text),
                )
        plans.append(competitor)
    return tuple(sorted(plans, key=lambda p: not _whole(p)))


def _whole(plan: Plan) -> bool:
    """Whether a competitor evaluates the whole space of the comparison."""
    return plan.strategy.kind.exhaustive and not plan.strategy.kind.trains_bits


def _setup(plan: Plan) -> dict[str, Any]:
    """The settings of strategies in the file, for all strategies that are compared. The setting that chooses a variant
    is left out, because the name of a strategy gives its variant."""
    given = plan.settings.strategy.setup.of_strategy
    return {key: value for key, value in given.items() if key not in variant_settings()}


def run_comparison(plan: Plan, names: Sequence[str] | None, repeats: int, restart: bool, events: Events) -> Comparison:
    """Compare strategies, or continue a comparison, in the folder ``compare`` of the run folder.

    Args:
        plan: the plan of a configuration from ``prepared``.
        names: the strategies; None for ``DEFAULT``, with brute force if it takes at most ``EXHAUSTIVE_SECONDS``.
        repeats: number of runs of each strategy, 1 or more. Their random seeds are consecutive; the first is the
            configuration's.
        restart: delete the results of an earlier comparison in that folder.
        events: receives notes and the progress.

    Raises:
        ConfigError: a strategy or the number of repeats is not possible; nothing was evaluated.
        RunError: the folder belongs to another configuration, or to a search or comparison that is running.
        EvaluationError: every candidate failed, none fulfils the constraints, or results cannot be written.
        KeyboardInterrupt: the comparison was interrupted; evaluated candidates are stored.
    """
    if repeats < 1:
        raise ConfigError(f"{repeats} is not possible; allowed: 1 or more", key=("seeds",))
    plan = replace(plan, n_trials=plan.settings.strategy.setup.n_trials or BUDGET)
    competitors(plan, names or DEFAULT)  # raises an error for mistakes, before any work
    for note in plan.notes:
        events.note(note)
    folder = plan.config.run_folder
    try:
        with stores.locked(folder):
            sweep(folder)
            return _compare(plan, names, repeats, restart, events)
    except OSError as error:
        raise RunError(f"{shown(Path(error.filename or folder))}: {error.strerror or error}") from None
    except sqlite3.Error as error:
        raise EvaluationError(
            f"{shown(folder / FOLDER / CACHE)}: {error}. Free disk space or fix the permissions, then give the same "
            "command again"
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
        learning.forget(folder)
    space, evaluator = plan.space, plan.evaluator
    with plan.config.locating():
        starts = check(evaluator, plan.constraints, trained=True)
    identity = _identity(plan, weights_fingerprint(plan.model))
    store = Store.open(path, evaluator.metrics, len(space.parameters), identity, space.keys)
    try:
        with open_dispatcher(plan, store, events) as dispatcher:
            plan, _ = verified_plan(with_samples(plan, store, events, dispatcher), 0.0, events, dispatcher.safe)
            dispatcher.use(plan.evaluator)
            verify_workers(dispatcher, events)
            of_float = float_metrics(plan)
            limits = bounds(plan, of_float)
            plans = competitors(plan, _default(plan, store, dispatcher, events) if names is None else names)
            noise = any(competitor.strategy.kind.uses_noise for competitor in plans)
            # Hypervolumes count the whole front, so a strategy looks everywhere, unless the file says where.
            looks = "focus" in plan.settings.strategy.setup.of_strategy
            known_before = knowledge(plan, limits, of_float if looks else {}, store, noise=noise, replays=False)
            cached = CachedEvaluator(dispatcher, store, space.keys)
            known = len(cached)
            _announce(plans, repeats, known, dispatcher, events)
            try:
                runs, trained = _runs(plans, repeats, starts, limits, known_before, cached, events)
            except KeyboardInterrupt:
                events.note(f"{len(cached):,} evaluated candidates are stored; the same command goes on with them")
                raise
            remarks = tuple(dispatcher.remarks)
            of_space = [r for r in runs if r.strategy not in trained]
            _check_front(plan, of_space, cached)
            stored = _losses(plan, limits, *cached.results())
            complete = _whole_space_known(plan, of_space, store, len(cached))
    finally:
        store.close()
    if not any(np.isfinite(run.losses).all(axis=1).any() for run in runs):
        raise EvaluationError("no evaluated candidate is complete and fulfils the constraints")
    for remark in remarks:
        events.note(remark)
    quality = plan.evaluator.job.task.leading.name
    with_curves, front, reference, hypervolume = add_curves(runs, plan.objectives, quality, stored)
    return Comparison(
        folder=shown(folder),
        strategies=tuple(p.strategy.title for p in plans),
        seeds=_random_seeds(plan, repeats),
        budget=min(plan.n_trials, space.size),
        size=space.size,
        objectives=plan.objectives,
        constraints=tuple(c.text for c in plan.constraints),
        # Networks with learned bits are in no space, and may be better than all that is.
        truth=not trained and complete,
        front=front,
        reference=reference,
        hypervolume=hypervolume,
        runs=with_curves,
        evaluated=cached.evaluated + sum(now for now, _ in trained.values()),
        known=known + sum(before for _, before in trained.values()),
        notes=(*plan.notes, *remarks),
        quality=quality,
    )


def _whole_space_known(plan: Plan, runs: Sequence[StrategyRun], store: Store, known: int) -> bool:
    """Whether every candidate that can fulfil the constraints has been evaluated, now or in an earlier session.

    Args:
        runs: those of candidates of the space.
    """
    key = f"whole space under {sorted(c.text for c in plan.constraints)}"
    if known == plan.space.size or store.meta(key):
        return True
    exhausted = any(run.stopped == "space exhausted" for run in runs)
    if exhausted:
        store.set_meta(key, True)
    return exhausted


def _check_front(plan: Plan, runs: Sequence[StrategyRun], cached: CachedEvaluator) -> None:
    """Evaluate the front of all runs again as deployed models. Raises EvaluationError if a number differs."""
    if plan.evaluator.job.training is not None:
        return  # a comparison keeps no weights: each network would have to be trained again
    if not runs:
        return
    rows = non_dominated(np.concatenate([run.losses for run in runs]))
    codes = np.unique(np.concatenate([run.codes for run in runs])[rows], axis=0)[:TESTED]
    for block, metrics in cached.blocks(codes):
        check_scores(plan, [f"candidate {code.tolist()}" for code in block], block, metrics.values)


def _identity(plan: Plan, weights: str | None) -> dict[str, Any]:
    """Everything that the metrics of candidates depend on. They are the same for any strategy and any objectives."""
    identity = {k: v for k, v in plan.identity(weights).items() if k not in OF_THE_SEARCH}
    return {**identity, "metrics": list(plan.evaluator.metrics)}


def _random_seeds(plan: Plan, repeats: int) -> tuple[int, ...]:
    return tuple(range(plan.config.seed, plan.config.seed + repeats))


def _default(plan: Plan, store: Store, dispatcher: Dispatcher, events: Events) -> tuple[str, ...]:
    """The default strategies. Whether brute force is one depends on the clock, so that is decided once and stored."""
    size, largest = plan.space.size, configured_strategy(EXHAUSTIVE, _setup(plan)).largest
    seconds = store.meta("brute_force_seconds")
    if seconds is None and (largest is None or size <= largest):
        (exhaustive,) = competitors(plan, [EXHAUSTIVE])
        seconds = size * seconds_per_candidate(exhaustive, dispatcher.safe)
        store.set_meta("brute_force_seconds", seconds)
    if seconds is not None and seconds <= EXHAUSTIVE_SECONDS:
        return (EXHAUSTIVE, *DEFAULT)
    would = f"would need some {seconds:,.0f} s" if seconds is not None else f"stops at max_size = {largest:,}"
    events.note(
        f"brute force is not compared: for {counted(size)} candidates it {would}; name it among the strategies to "
        "compare it"
    )
    return DEFAULT


def _announce(plans: Sequence[Plan], repeats: int, known: int, dispatcher: Dispatcher, events: Events) -> None:
    searching = [p for p in plans if not p.strategy.kind.trains_bits]
    names, seeds = ", ".join(p.strategy.title for p in plans), f"{repeats} {'seed' if repeats == 1 else 'seeds'}"
    before = searching[0].notes if searching else ()
    for plan in (p for p in plans if p not in searching):
        events.note(f"{plan.strategy.title}: up to {plan.n_trials:,} networks of one training per seed")
        for note in (n for n in plan.notes if n not in before):
            events.note(f"{plan.strategy.title}: {note}")
    if not searching:
        events.note(f"compared: {names}; {seeds}")
        return
    plan = searching[-1]
    size, budget = plan.space.size, min(plan.n_trials, plan.space.size)
    events.note(f"space: {counted(size)} distinct candidates, {len(plan.space.parameters)} parameters")
    asked = plan.settings.strategy.setup.n_trials or 0
    if asked > size:
        events.note(f"n_trials = {asked:,} is more than the space has: each run evaluates all of it")
    events.note(
        f"compared: {names}; {seeds}, {budget:,} distinct evaluations each"
        + (f", brute force all {counted(size)}" if _whole(plans[0]) else "")
    )
    # Measured now, so that the first candidate's time does not include what happens once, such as calibration.
    each = 1000 * seconds_per_candidate(searching[0], dispatcher.safe)
    events.note(f"cost: {each:.2g} ms per candidate (measured), spent once, plus the time in the strategies")
    if known:
        events.note(f"{known:,} candidates are known from earlier sessions")


def _runs(
    plans: Sequence[Plan],
    repeats: int,
    starts: Codes,
    limits: Feasibility,
    known: Knowledge,
    cached: CachedEvaluator,
    events: Events,
) -> tuple[list[StrategyRun], dict[str, tuple[int, int]]]:
    """(all runs, strategy by strategy; strategy that trains its networks → number of networks measured now, and known
    from earlier sessions)."""
    finished: list[StrategyRun] = []
    trained: dict[str, tuple[int, int]] = {}
    for competitor in plans:
        several = (None,) if _whole(competitor) else _random_seeds(competitor, repeats)
        for number in several:
            which = f"seed {number}" if number is not None else "the whole space"
            title, seed = competitor.strategy.title, competitor.config.seed if number is None else number
            events.running(f"{title}, {which}")
            if not competitor.strategy.kind.trains_bits:
                finished.append(_run(competitor, seed, starts, limits, known, cached, events))
                continue
            with learning.opened(competitor, seed, competitor.config.run_folder / FOLDER, events) as opened:
                now, before = trained.get(title, (0, 0))
                before += len(opened.cached)
                begin = opened.plan.space.uniform()
                shared = (opened.limits, Knowledge(), opened.cached, events)
                finished.append(_run(opened.plan, seed, begin, *shared, spent=opened.spent))
                _check_front(opened.plan, finished[-1:], opened.cached)
                trained[title] = (now + opened.cached.evaluated, before)
        runs = finished[-len(several) :]
        events.ran(competitor.strategy.title, len(runs), sum(map(len, runs)), sum(c.asked for c in runs))
    return finished, trained


def _run(
    plan: Plan,
    seed: int,
    starts: Codes,
    limits: Feasibility,
    known: Knowledge,
    cached: CachedEvaluator,
    events: Events,
    spent: float = 0.0,
) -> StrategyRun:
    """One run: the loop of a search, with the evaluator that all runs share. `spent` are seconds that it has taken
    already; they count as time of its first candidate."""
    timeout = plan.settings.strategy.setup.timeout
    trials = InMemoryTrials(plan.evaluator.metrics)
    # Each run would have measured that, too.
    before = known.seconds if plan.strategy.kind.uses_noise else 0.0
    strategy = TimedStrategy(lambda: plan.make_strategy(known, seed), trials.__len__)
    stopped = loop.run(
        space=plan.space,
        strategy=strategy,
        initial=first_candidates(plan, starts, strategy),
        objectives=plan.objectives,
        store=trials,
        evaluator=cached,
        limits=loop.Limits(
            plan.n_trials,
            # Brute force shows the truth, whatever it takes.
            None if _whole(plan) or timeout is None else timeout - spent - before,
            # A candidate that another run has paid for costs the same again.
            lambda: strategy.seconds + trials.seconds,
        ),
        seed=seed,
        on_progress=lambda progress: events.progress(progress, plan),
        feasibility=limits,
    )
    if stopped == "interrupted":
        raise KeyboardInterrupt
    codes, values, complete, seconds = trials.columns(len(plan.space.parameters))
    seconds[:1] += spent
    return StrategyRun(
        strategy=plan.strategy.title,
        seed=seed,
        codes=codes,
        losses=_losses(plan, limits, values, complete),
        asking=before + strategy.asked(len(codes)),
        evaluating=seconds,
        asked=before + strategy.seconds,
        proposals=strategy.proposals,
        repeats=strategy.repeats,
        failed=int((~complete).sum()),
        stopped=stopped,
        volume=np.zeros(0),
        best=np.zeros(0),
    )


def _losses(
    plan: Plan, limits: Feasibility, values: Mapping[str, NDArray[np.float64]], complete: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """The losses of candidates, shape (candidates, objectives); NaN for those that do not count."""
    losses = plan.objectives.losses(values)
    counts = complete & np.isfinite(losses).all(axis=1)
    if limits:
        counts &= fulfilled(limits.constraints, values)
    losses[~counts] = np.nan
    return losses
