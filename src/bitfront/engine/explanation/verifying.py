"""Evaluates a candidate that was predicted, as the search would have evaluated it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from bitfront.engine.explanation.results import Answer
from bitfront.engine.rebuild import searched_plan
from bitfront.engine.search.checking import verified_plan
from bitfront.engine.storage.run import Run
from bitfront.events import Events


def verified(
    run: Run, answer: Answer, *, data: Any = None, model: nn.Module | None = None, events: Events | None
) -> Answer:
    """The answer with the metrics of its candidate. If it is a trial of the run, they are those of the trial.

    Nothing is stored: the trials of a run are those of its strategy.

    Args:
        run: the run.
        answer: what was predicted.
        data, model: the same objects that the search was given from Python, if it was.
        events: receives notes.

    Raises:
        RunError: the model or data has changed since the search.
    """
    if answer.value.trial is not None:
        return replace(answer, verified=run.trial(answer.value.trial).metrics)
    events = events or Events()
    plan = searched_plan(run, "the answer cannot be evaluated", data=data, model=model, events=events)
    plan, _ = verified_plan(plan, 0.0, events)
    results = plan.evaluator.evaluate(np.array([answer.code], dtype=np.int64))
    values = {name: float(column[0]) for name, column in results.values.items()}
    failed = results.errors[0]
    kept = {c.text: c for c in run.constraints}
    wanted = [kept.get(text) or run.constraint(text) for text in answer.budgets]
    broken = () if failed else tuple(c.text for c in wanted if c.excess(results.values[c.metric])[0] > 0)
    return replace(answer, verified=values, failed=failed, broken=broken)
