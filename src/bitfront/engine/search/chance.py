"""Whether a training with learned bits came to anything: its best network beside the most frequent class."""

from __future__ import annotations

import numpy as np

from bitfront.engine.planning.plan import Plan
from bitfront.engine.storage.run import Run


def at_chance(plan: Plan, run: Run) -> str:
    """A note if no network of a training with learned bits is better than the most frequent class; empty otherwise.

    Args:
        plan: the plan of the search.
        run: the finished run.
    """
    learning, samples = plan.evaluator.job.learning, plan.evaluator.accuracy_samples
    accuracies = run.columns.metrics.get("accuracy")
    if learning is None or samples is None or accuracies is None or np.isnan(accuracies).all():
        return ""
    labels = plan.evaluator.samples(samples.split, samples.number)[1]
    frequent, best = int(labels.bincount().max()) / len(labels), float(np.nanmax(accuracies))
    if best > frequent:
        return ""
    start, schedule = run.reference.get("accuracy"), learning.schedule
    better = start is not None and start > frequent
    before = f"The float model has {start:.4g}, so the training diverged" if better else "The training did not learn"
    first = "" if schedule.first is None else f" than {schedule.first:g}"
    return (
        f"no network of this training is better than always the most frequent class: the best has accuracy {best:.4g} "
        f"on {len(labels):,} samples, that class {frequent:.4g}. {before}: give a smaller learning_rate than "
        f"{schedule.learning_rate:g}, a smaller first_pressure{first}, or more epochs (search.strategy.setup)"
    )
