"""What a search knows of its candidates before any is evaluated, as a strategy sees it: functions of codes."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.engine.evaluation.interface import Evaluator
from bitfront.engine.evaluation.margins import evaluations, margins
from bitfront.engine.evaluation.sensitivity import sensitivities
from bitfront.engine.planning.feasibility import Feasibility
from bitfront.engine.planning.plan import Plan
from bitfront.engine.search.paired import resolution
from bitfront.engine.storage.folder import trial_weights
from bitfront.engine.storage.store import Store
from bitfront.errors import UserError, described
from bitfront.objectives import Objectives
from bitfront.spaces.base import Codes
from bitfront.spaces.margins import Margins
from bitfront.strategies.base import Knowledge, Resolution
from bitfront.tasks.base import TaskMetric

Values = NDArray[np.float64]
#: Random candidates for which sums over the sites are compared with the metric.
COMPARED = 64
#: Where a store has what measuring took.
SECONDS = "seconds_of_options"
#: Options of all groups together, at most, whose costs are kept in a run folder.
MOST_OPTIONS = 20_000


def knowledge(
    plan: Plan,
    limits: Feasibility,
    reference: Mapping[str, float | None],
    store: Store,
    *,
    noise: bool,
    replays: bool,
) -> Knowledge:
    """What is known of the candidates of a plan.

    Args:
        plan: the plan, with trained weights.
        limits: its constraints.
        reference: metric → value of the float model.
        store: of the trials. It keeps estimates that depend on the order of sums, so that a search that is resumed has
            the same.
        noise: whether a strategy uses the noise of options, and what they do to margins.
        replays: whether trials of earlier sessions are proposed again.
    """
    evaluator, objectives = plan.evaluator, plan.objectives
    names = frozenset() if objectives.summed else _cheap(evaluator)
    costs = {o: _cost(evaluator, objectives, o) for o, p in enumerate(objectives.parts) if p.metric in names}
    closed = any(c.metric in _cheap(evaluator) for c in limits.constraints)
    of_options, of_samples = noise_and_margins(evaluator, store, replays=replays) if noise else (None, None)
    return Knowledge(
        costs=costs,
        violation=limits.before if closed else None,
        float_losses=None if objectives.summed else _losses(objectives, reference),
        points=None if objectives.summed else _points(objectives, evaluator.job.task.leading, reference),
        sufficient=None if objectives.summed else _sufficient(plan, reference),
        noise=of_options,
        margins=of_samples,
        resolution=None if evaluator.accuracy_samples is None else partial(_resolution, plan, store),
        seconds=(store.meta(SECONDS) or 0.0) if noise else 0.0,
    )


def noise_and_margins(
    evaluator: Evaluator, store: Store, *, replays: bool, begins: Callable[[float], None] = lambda _: None
) -> tuple[list[Values] | None, Margins | None]:
    """(per group the noise of each option, what options do to margins); None where the space is not of formats alone,
    where torch cannot differentiate the model, and where there are no margins.

    They are measured once, and kept in the store.

    Args:
        evaluator, store: as of the plan, and as for ``knowledge``.
        replays: whether trials of earlier sessions are proposed again. Those of an earlier version were proposed
            without margins.
        begins: called before margins are measured, with about how many evaluations of a candidate that takes.
    """
    if not isinstance(evaluator, FixedEvaluator):
        return None, None
    begin, kept, found = time.perf_counter(), store.meta("noise"), store.meta("margins")
    if kept is None:
        try:
            kept = [values.tolist() for values in sensitivities(evaluator)]
        except RuntimeError as error:
            kept = {"failed": str(error)}
        store.set_meta("noise", kept)
    if isinstance(kept, dict):
        return None, None
    noise = [np.array(values) for values in kept]
    if found is None:
        if not replays:
            begins(evaluations(evaluator, noise))
        found = {"none": "of an earlier version"} if replays else _measured_margins(evaluator, noise)
        store.set_meta("margins", found)
        store.set_meta(SECONDS, time.perf_counter() - begin)
    return noise, Margins.from_json(found)


def _measured_margins(evaluator: FixedEvaluator, noise: Sequence[Values]) -> dict[str, Any]:
    """The margins as JSON."""
    try:
        measured = margins(evaluator, noise)
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:
        # A search goes on without them: what fails here may fail in a candidate too, which says so.
        return {"failed": described(error)}
    if measured is None:
        return {"none": "not of this space"}
    return measured.as_json()


def keep_option_costs(evaluator: Evaluator, store: Store) -> None:
    """Store what each option costs, for the metrics in closed form that are sums over the sites.

    Under ``option_costs``: metric → ``{"first": the metric of the first option everywhere, "options": per group what
    each of its options adds to that}``. A metric that is no such sum is left out,
    and nothing is stored where the groups have more than ``MOST_OPTIONS`` options together.
    """
    space, names = evaluator.space, _cheap(evaluator)
    few = sum(group.size for group in space.groups) <= MOST_OPTIONS
    if not few or not names or store.meta("option_costs") is not None:
        return
    first = np.zeros((1, len(space.groups)), dtype=np.int64)
    rows = np.repeat(first, sum(group.size for group in space.groups), axis=0)
    ends = np.cumsum([0, *(group.size for group in space.groups)]).tolist()
    for g, group in enumerate(space.groups):
        rows[ends[g] : ends[g + 1], g] = np.arange(group.size)
    others = space.options(space.sample(COMPARED, np.random.default_rng(0)))
    values = evaluator.closed_form_values(space.codes(np.concatenate([first, rows, others])), names)
    kept = {}
    for name, column in values.items():
        added = [column[1 + a : 1 + b] - column[0] for a, b in itertools.pairwise(ends)]
        sums = column[0] + np.sum([added[g][others[:, g]] for g in range(len(added))], axis=0)
        if np.allclose(sums, column[1 + len(rows) :], rtol=1e-9, atol=1e-12):
            kept[name] = {"first": float(column[0]), "options": [a.tolist() for a in added]}
    store.set_meta("option_costs", kept)


def _cheap(evaluator: Evaluator) -> frozenset[str]:
    """The metrics in closed form that take no more than looking up tables: not where each candidate has widths, for
    whose costs its model would be built."""
    return frozenset() if evaluator.space.changes_widths else frozenset(evaluator.closed_form)


def _cost(evaluator: Evaluator, objectives: Objectives, objective: int) -> Callable[[Codes], Values]:
    """The losses of one objective, from canonical codes of shape (candidates, parameters)."""
    part = objectives.parts[objective]
    sign = -1.0 if part.direction == "maximize" else 1.0

    def losses(codes: Codes) -> Values:
        values: Values = sign * part.scale * evaluator.closed_form_values(codes, {part.metric})[part.metric]
        return values

    return losses


def _losses(objectives: Objectives, reference: Mapping[str, float | None]) -> Values:
    """The losses of the float model, shape (objectives,); NaN where it has none."""
    values = [reference.get(p.metric) for p in objectives.parts]
    signs = [-p.scale if p.direction == "maximize" else p.scale for p in objectives.parts]
    return np.array([np.nan if v is None else s * v for s, v in zip(signs, values, strict=True)])


def _points(objectives: Objectives, leading: TaskMetric, reference: Mapping[str, float | None]) -> Values:
    """By how much each loss changes if the metric that leads gets worse by a percentage point, or by a hundredth of the
    float model's value where it is no share; shape (objectives,), NaN for other metrics."""
    value = reference.get(leading.name)
    each = 0.01 if leading.share else np.nan if not value else 0.01 * abs(value)
    return np.array([each * p.scale if p.metric == leading.name else np.nan for p in objectives.parts])


def _sufficient(plan: Plan, reference: Mapping[str, float | None]) -> Values | None:
    """The loss of the float model for the metric that leads, and −infinity for the others; shape (objectives,).

    Candidates that are not trained are better than the float model mostly by chance of the samples. None where
    candidates are trained, where nothing else is an objective, and where the float model has no such loss.
    """
    leading, parts = plan.evaluator.job.task.leading.name, plan.objectives.parts
    if not isinstance(plan.evaluator, FixedEvaluator) or len(parts) < 2:
        return None
    losses = _losses(plan.objectives, reference)
    of_leading = np.array([part.metric == leading for part in parts]) & np.isfinite(losses)
    return np.where(of_leading, losses, -np.inf) if of_leading.any() else None


def _resolution(plan: Plan, store: Store, codes: Codes) -> Resolution:
    """The resolution of the samples near some candidates. It is stored, so that it is measured once, and only trained
    candidates whose weights are not at hand are trained again for it."""
    evaluator, objectives = plan.evaluator, plan.objectives
    kept, key = store.meta("resolution") or {}, hashlib.sha256(codes.tobytes()).hexdigest()
    if key not in kept:
        if evaluator.job.training is not None:
            _recall(plan, store, codes)
        names = {metric.name for metric in evaluator.job.task.all_metrics}
        kept[key] = resolution(evaluator, codes, [p.metric for p in objectives.parts if p.metric in names])
        store.set_meta("resolution", kept)
    steps = kept[key]
    losses = [abs(p.scale) * steps.get(p.metric, 0.0) for p in objectives.parts]
    samples = evaluator.accuracy_samples
    assert samples is not None, "there is a resolution where there are samples"
    number = len(evaluator.samples(samples.split, samples.number)[1])
    shares = {metric.name for metric in evaluator.job.task.all_metrics if metric.share}
    named = [f"{100 * v:.2g} points of {m}" if m in shares else f"{v:.2g} of {m}" for m, v in steps.items()]
    return Resolution(
        np.array([sum(losses)] if objectives.summed else losses),
        f"{' and '.join(named)}, which is what {number:,} samples tell apart (paired)" if named else "anything",
    )


def _recall(plan: Plan, store: Store, codes: Codes) -> None:
    """Give the evaluator what the store has of trained candidates: with halving, their numbers of epochs."""
    trials = store.trials()
    for code in codes:
        for row in np.flatnonzero((trials.code == code).all(axis=1))[-1:]:
            path = trial_weights(plan.config.run_folder, int(trials.number[row]))
            plan.evaluator.recall(code, {m: float(v[row]) for m, v in trials.metrics.items()}, path)
