"""What is proven at the end of a search, what may be missing as far as the model tells, and how far to trust that."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitfront.constraints import Constraint, fulfilled
from bitfront.engine.explanation.budgets import Outlook
from bitfront.engine.explanation.model import Trials, fitted_model
from bitfront.engine.explanation.results import Estimate, Gap, Held
from bitfront.engine.storage.run import Run
from bitfront.strategies.surrogate import SCALED, SurrogateSettings

Floats = NDArray[np.float64]

#: Candidates whose intervals are looked at: those that are expected to be best.
LOOKED = 4096
#: The least number of trials that a model is fitted to, and that it must predict.
FEWEST, FEWEST_PREDICTED = 10, 5
#: Trials to which the scales of the model are fitted whose predictions are judged: half of the usual number, in less
#: than a quarter of the time.
FEW_SCALED = SCALED // 2
#: Share of the trials that are predicted, and how many at most.
SHARE, MOST = 1 / 3, 400


def gap_of(run: Run, outlook: Outlook, constraints: tuple[Constraint, ...], costs: Floats | None) -> Gap:
    """The gap at the end of a search.

    Args:
        run: the run.
        outlook: what is expected of its space.
        constraints: those of the search that can be told of a candidate that was not evaluated.
        costs: of the trials; None where there is none.
    """
    trials, model = outlook.trials, outlook.model
    good = np.ones(len(trials.rows), dtype=bool)
    if run.constraints:
        good = fulfilled(run.constraints, {m: v[trials.rows] for m, v in run.columns.metrics.items()})
    best = None
    if good.any():
        place = int(np.flatnonzero(good)[np.argmin(trials.losses[good])])
        value = model.sign * float(trials.losses[place])
        best = Estimate(value, value, value, int(trials.numbers[place]))
    allowed = outlook.allowed(constraints, outlook.pool, outlook.losses) & ~outlook.known
    focus = _focus(run, model.metric)
    if focus is not None:
        value = run.reference[model.metric]
        limit = focus / 100 * (1.0 if model.share else abs(value)) + model.sign * value
        # Where the search did not get there, everything counts.
        focus = focus if (trials.losses <= limit).any() else None
        allowed &= outlook.losses <= (np.inf if focus is None else limit)
    options, expected = outlook.pool[allowed], outlook.losses[allowed]
    zeros = np.zeros(len(options)), np.zeros(len(good))
    at, of_trials = (outlook.costs[0].of(options), costs) if costs is not None else zeros
    assert of_trials is not None
    verified = _verified(of_trials[good], trials.losses[good], at)
    inside = np.flatnonzero(np.isfinite(verified))
    inside = inside[np.argsort(-(verified - expected)[inside], kind="stable")]
    gained = possible = 0.0
    where = None
    if len(inside):
        gained = max(0.0, float((verified - expected)[inside[0]]))
        few = inside[:LOOKED]
        optimistic = verified[few] - model.ends(options[few], noise=False)[0]
        possible = max(gained, float(optimistic.max()))
        chosen = inside[0] if gained > 0 else few[int(np.argmax(optimistic))]
        where = outlook.described(options[chosen], model.metric) if possible > 0 else None
    return Gap(
        evaluated=int(run.columns.complete.sum()),
        failed=int((~run.columns.complete).sum()),
        candidates=model.space.size,
        proven=len(run) == model.space.size,
        best=best,
        expected=gained,
        possible=possible,
        at=where,
        looked_at=len(inside),
        focus=focus,
        held=held(run, trials, model.metric, model.sign, costs),
    )


def _focus(run: Run, metric: str) -> float | None:
    """How much worse than the float model the search is about, in points or, of what is no share, in per cent: as the
    surrogate, 10 if it is not said. None: everything counts."""
    assert run.config.search is not None
    if run.constraints or not run.reference.get(metric) or metric != run.leading:
        return None
    setup = run.config.search.strategy.setup.model_dump()
    width = setup.get("focus", SurrogateSettings().focus)
    return None if width is None or width >= 100 else float(width)


def _verified(costs: Floats, losses: Floats, at: Floats) -> Floats:
    """The least loss of trials that cost no more than `at`, of its shape; infinite where there is none."""
    order = np.argsort(costs, kind="stable")
    least = np.concatenate([[np.inf], np.minimum.accumulate(losses[order])])
    result: Floats = least[np.searchsorted(costs[order], at, side="right")]
    return result


def held(run: Run, trials: Trials, metric: str, sign: float, costs: Floats | None) -> Held | None:
    """How well trials are predicted from others: later ones from earlier ones, or, if all of a space were evaluated in
    its order, every third one from the rest. None where there are too few trials.

    Args:
        run: the run.
        trials: its trials.
        metric, sign: of the explained metric.
        costs: of the trials; None where there is none.
    """
    count = len(trials.rows)
    rows = np.arange(count)
    if len(run) == run.space.size:
        later, how = rows[1::3], "every third trial, from the others"
    else:
        start = max(FEWEST, count - int(count * SHARE))
        later, how = rows[start:], "the last third of the trials, from those before them"
    earlier = np.setdiff1d(rows, later)
    if len(earlier) < FEWEST or len(later) < FEWEST_PREDICTED or np.ptp(trials.losses[earlier]) == 0:
        return None
    later = later[np.unique(np.linspace(0, len(later) - 1, min(MOST, len(later))).astype(np.int64))]
    model = fitted_model(run, metric, sign, trials, earlier, costs, FEW_SCALED)
    options, results = trials.options[later], trials.losses[later]
    expected = model.losses(options)
    low, high = model.ends(options)
    correlation = float("nan")
    if np.ptp(expected) > 0 and np.ptp(results) > 0:
        correlation = rank_correlation(expected, results)
    inside = float(((results >= low) & (results <= high)).mean())
    return Held(len(earlier), len(later), correlation, inside, how)


def rank_correlation(one: Floats, other: Floats) -> float:
    """Spearman's rank correlation of two samples of equal length, −1 to 1; equal values have their mean rank.

    ``scipy.stats`` has it too, and loads for most of a second.
    """
    ranks = [_ranks(values) for values in (one, other)]
    return float(np.asarray(np.corrcoef(ranks))[0, 1])


def _ranks(values: Floats) -> Floats:
    """The rank of each value, from 1 on; equal ones have the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean = np.asarray(np.cumsum(counts) - (counts - 1) / 2, dtype=np.float64)
    ranks: Floats = mean[inverse]
    return ranks
