"""The verb: explains a run, from its stored trials alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitfront.constraints import Constraint
from bitfront.engine.explanation import layers
from bitfront.engine.explanation.budgets import Outlook, checked
from bitfront.engine.explanation.gap import FEWEST, gap_of
from bitfront.engine.explanation.model import Model, Trials, fitted_model
from bitfront.engine.explanation.option_costs import Cost, costs_of
from bitfront.engine.explanation.results import Answer, Explanation, PlaceAlternatives, Prices
from bitfront.engine.storage.run import Run
from bitfront.errors import ConfigError, RunError, one_of
from bitfront.events import Events
from bitfront.strategies.prediction import MEMBERS

if TYPE_CHECKING:
    from torch import nn


def explain(
    run: Run | str | Path,
    trial: int | None = None,
    *,
    budgets: Sequence[str] = (),
    metric: str | None = None,
    verify: bool = False,
    data: Any = None,
    model: nn.Module | None = None,
    events: Events | None = None,
) -> Explanation:
    """What the stored trials of a run tell: per layer what options cost and buy, which layers interact, why a trial has
    its options, what more of a budget buys, the best candidate for a budget, and what may be missing.

    Costs are exact. What is said of candidates that were not evaluated is predicted by the model of the strategy
    ``surrogate``, fitted to the trials. Nothing is evaluated, except with `verify`.

    Args:
        run: a run, or its folder.
        trial: the number of a trial whose options are explained.
        budgets: statements such as ``"model_size <= 2 kB"`` that one candidate shall fulfil, on costs in closed form
            and on the explained metric.
        metric: the measured metric that is explained; None: the first measured objective.
        verify: whether the answer for the budgets is evaluated, as the search would have done it.
        data, model: the same objects that the search was given from Python, if it was; for `verify`. Left out, they
            are those of the call that made `run`.
        events: receives notes.

    Raises:
        RunError: there is no such run or trial, its trials are too few or of a kind that cannot be explained, or no
            candidate keeps the budgets.
        ConfigError: a budget cannot be read, or is on a metric that cannot be predicted; or there is no such metric.
    """
    run = run if isinstance(run, Run) else Run.load(run)
    if verify and not budgets:
        raise ConfigError("verify evaluates the answer for budgets; give a budget too")
    _explainable(run)
    study = _study(run, metric, budgets)
    metric, trials, fitted, costs, outlook = study.metric, study.trials, study.fitted, study.costs, study.outlook

    def answering(texts: Sequence[str]) -> Answer:
        constraints = [run.constraint(text) for text in texts]
        checked(constraints, outlook)
        answer = outlook.answer((*study.kept, *constraints))
        lowest = answer.optimised in outlook.named or study.sign > 0
        return replace(answer, measured=_measured(run, texts, answer.optimised, lowest=lowest))

    answers = [answering(budgets)] if budgets else []
    if verify:
        from bitfront.engine.explanation.verifying import verified  # loads what evaluates

        answers = [verified(run, answer, data=data, model=model, events=events) for answer in answers]
    few = layers.evenly(study.around, layers.AROUND)
    return Explanation(
        run=str(run.folder),
        metric=metric,
        share=fitted.share,
        better="lower" if study.sign > 0 else "higher",
        unit=run.units.get(metric, ""),
        costs=tuple(cost.name for cost in costs),
        units={name: run.units.get(name, "") for name in outlook.named},
        around=tuple(trials.numbers[few].tolist()),
        effects=tuple(layers.effects(fitted, costs, trials.options[few])),
        interactions=tuple(layers.interactions(fitted, costs, trials.options[few])),
        trial=trial,
        trial_costs={} if trial is None else {cost.name: run.trial(trial).metrics[cost.name] for cost in costs},
        alternatives=_alternatives(run, trial, outlook),
        prices=_prices(outlook, study.kept),
        answers=tuple(answers),
        gap=gap_of(run, outlook, study.kept, study.of_trials),
        notes=study.notes,
        answering=answering,
    )


def _measured(run: Run, budgets: Sequence[str], optimised: str, *, lowest: bool) -> int | None:
    """The number of the best trial that keeps budgets, and the constraints of the search; None if none does."""
    chosen = {"minimize" if lowest else "maximize": optimised}
    try:
        return run.best(*budgets, **chosen).number
    except RunError:
        return None


@dataclass(frozen=True, eq=False)
class _Study:
    """A run with the model of its trials.

    Attributes:
        metric: the explained metric.
        sign: 1 if it is minimised, −1 if it is maximised.
        trials: those that it is fitted to.
        costs: those that prices and budgets are about.
        of_trials: the first cost of each trial; None where there is no cost.
        fitted: the model.
        around: rows of trials that layers are explained around.
        outlook: what the model says of other candidates.
        kept: the constraints of the search that can be predicted.
        notes: for the user.
    """

    metric: str
    sign: float
    trials: Trials
    costs: list[Cost]
    of_trials: NDArray[np.float64] | None
    fitted: Model
    around: NDArray[np.int64]
    outlook: Outlook
    kept: tuple[Constraint, ...]
    notes: tuple[str, ...]


def _study(run: Run, metric: str | None, budgets: Sequence[str]) -> _Study:
    """Fit the model. Raises RunError, ConfigError."""
    costs, notes = costs_of(run)
    metric, sign = _explained(run, {cost.name for cost in costs}, metric)
    trials = Trials.of(run, metric, sign)
    _enough(run, trials, metric)
    asked = [run.constraint(text) for text in budgets]
    possible, costs = costs, _ordered(run, costs, asked)
    of_trials = costs[0].of(trials.options) if costs else None
    fitted = fitted_model(run, metric, sign, trials, np.arange(len(trials.rows)), of_trials)
    around = _around(run, trials)
    outlook = Outlook(fitted, trials, costs, [c for c in possible if c not in costs], trials.options[around])
    kept = tuple(c for c in run.constraints if c.metric in {metric, *outlook.named})
    lost = [
        f"the constraint {c.text!r} of the search is on a metric that is not predicted here, so it is left out"
        for c in run.constraints
        if c not in kept
    ]
    return _Study(metric, sign, trials, costs, of_trials, fitted, around, outlook, kept, (*notes, *lost))


def _explainable(run: Run) -> None:
    """Refuse runs whose trials are no independent choices."""
    if run.space.learned:
        raise RunError(
            f"{run.folder}: its trials are networks on the course of one training with learned bits, not choices "
            "per layer, so there are no options to explain; 'bitfront report' shows what was learned"
        )
    if not run.space.parameters:
        raise RunError(f"{run.folder}: there was nothing to choose in this search, so there is nothing to explain")


def _explained(run: Run, costs: set[str], wanted: str | None) -> tuple[str, float]:
    """(The metric that is explained, 1 where smaller is better and −1 where larger is)."""
    directions = {p.metric: p.direction for p in run.objectives.parts}
    for constraint in run.constraints:
        larger = constraint.comparison in (">", ">=")
        directions.setdefault(constraint.metric, "maximize" if larger else "minimize")
    possible = {m: d for m, d in directions.items() if m in run.columns.metrics and m not in costs}
    if not possible:
        names = ", ".join(sorted(directions))
        raise RunError(
            f"{run.folder}: all objectives are known in closed form ({names}), so no measured metric is left to explain"
        )
    # Of several, one that comes from the samples.
    first = next((m for m in (run.leading, "accuracy", "loss") if m in possible), next(iter(possible)))
    name = wanted or first
    if name not in possible:
        raise ConfigError(
            f"{name!r} is no metric that can be explained here: it must be a measured objective or be in a constraint; "
            f"{one_of(list(possible))}"
        )
    return name, -1.0 if possible[name] == "maximize" else 1.0


def _enough(run: Run, trials: Trials, metric: str) -> None:
    """Refuse runs with too few trials."""
    if len(trials.rows) < FEWEST:
        failed = int((~run.columns.complete).sum())
        more = f" ({failed} failed)" if failed else ""
        raise RunError(
            f"{run.folder}: it has {len(trials.rows)} complete trials with {metric}{more}, and an explanation needs "
            f"{FEWEST}; search on with a larger n_trials"
        )
    if np.ptp(trials.losses) == 0:
        raise RunError(f"{run.folder}: {metric} is the same for all trials, so there is nothing to explain")


def _ordered(run: Run, costs: list[Cost], asked: Sequence[Constraint]) -> list[Cost]:
    """The costs that explanations are about: objectives first, then what constraints and budgets are on. If none is,
    the first one."""
    maximised = {p.metric for p in run.objectives.parts if p.direction == "maximize"}
    possible = {cost.name: cost for cost in costs if cost.name not in maximised}
    wanted = [*(p.metric for p in run.objectives.parts), *(c.metric for c in (*run.constraints, *asked))]
    names = list(dict.fromkeys(name for name in wanted if name in possible)) or list(possible)[:1]
    return [possible[name] for name in names]


def _around(run: Run, trials: Trials) -> NDArray[np.int64]:
    """Places among the trials of some of the front; where it is empty, of those with the least loss."""
    front = run.front_rows
    front = np.flatnonzero(np.isin(trials.rows, front))
    if not len(front):
        front = np.argsort(trials.losses, kind="stable")[: layers.AROUND]
    ranked = front[np.argsort(trials.losses[front], kind="stable")]
    return layers.evenly(ranked, MEMBERS)


def _alternatives(run: Run, trial: int | None, outlook: Outlook) -> tuple[PlaceAlternatives, ...]:
    if trial is None:
        return ()
    numbers = outlook.trials.numbers
    if run.trial(trial).state == "failed" or trial not in numbers:
        raise RunError(
            f"{run.folder}: trial {trial} failed, so there is no result to explain: {run.trial(trial).error}"
        )
    place = int(np.searchsorted(numbers, trial))
    return tuple(layers.alternatives(outlook.model, outlook.trials, outlook.costs, place))


def _prices(outlook: Outlook, constraints: Sequence[Constraint]) -> tuple[Prices, ...]:
    """Of each cost, under the constraints on everything else."""
    result = []
    for cost in outlook.costs:
        others = [c for c in constraints if c.metric not in (cost.name, outlook.model.metric)]
        allowed = outlook.allowed(others, outlook.pool, outlook.losses)
        if allowed.any():
            result.append(outlook.prices(cost, allowed))
    return tuple(result)
