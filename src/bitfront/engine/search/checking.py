"""The checks of a search: its evaluator before the first candidate, and its front after the last one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from bitfront.engine.evaluation.verification import Score, deployed_score, same, verify
from bitfront.engine.planning.plan import Plan
from bitfront.engine.storage.run import Run
from bitfront.errors import EvaluationError
from bitfront.events import Events
from bitfront.spaces.base import Codes


def verified_plan(
    plan: Plan, expected_seconds: float, events: Events, safe: Callable[[Codes], NDArray[np.bool_]] | None = None
) -> Plan:
    """The plan without the fast paths that give other numbers than the deployed model; notes say which these are.

    Args:
        plan: the plan with the weights of the search.
        expected_seconds: expected time of the whole search.
        events: receives the notes.
        safe: which of some candidates may be evaluated in this process; None: all.

    Raises:
        EvaluationError: the captured model does not compute what the user's model computes.
    """
    verification = verify(plan.evaluator, plan.model, expected_seconds, safe)
    if verification.passed:
        return plan
    for note in verification.notes:
        events.note(note)
    return plan.verified(verification)


def check_front(plan: Plan, run: Run, rows: Sequence[int]) -> None:
    """Evaluate trials of the front again, each alone as the model that would be deployed.

    Args:
        plan: the plan of the search.
        run: the finished run.
        rows: rows of the trials in ``run.columns``.

    Raises:
        EvaluationError: the accuracy or loss of a trial differs from its deployed model's; the message names the trial.
    """
    samples, columns = plan.evaluator.accuracy_samples, run.columns
    if samples is None:
        return
    for row, code in zip(rows, columns.codes(rows), strict=True):
        deployed = deployed_score(plan.evaluator, code, samples.split, samples.number)
        # A search may measure accuracy alone.
        loss = float(columns.metrics["loss"][row]) if "loss" in columns.metrics else deployed[0]
        measured = loss, float(columns.metrics["accuracy"][row])
        if not same(measured, deployed):
            raise EvaluationError(
                f"trial {int(columns.number[row])}: the search measured {_words(measured)}, and the deployed model has "
                f"{_words(deployed)}. If the trial comes from another machine or another version of torch, start the "
                "search again; otherwise this is an error of Bitfront: please report it with the model"
            )


def _words(score: Score) -> str:
    return f"loss {score[0]:.6g}, accuracy {score[1]:.6g}"
