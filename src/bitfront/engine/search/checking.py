"""The checks of a search: its evaluator before the first candidate, and its front after the last one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bitfront.engine.evaluation.dispatch import Dispatcher
from bitfront.engine.evaluation.verification import Score, Verification, deployed_score, same, spread, verify
from bitfront.engine.planning.plan import Plan
from bitfront.engine.storage.run import Run
from bitfront.errors import EvaluationError
from bitfront.events import Events
from bitfront.spaces.base import Codes

#: Candidates that are evaluated in a worker and in this process.
CHECKED_IN_WORKERS = 4


def verified_plan(
    plan: Plan, expected_seconds: float, events: Events, safe: Callable[[Codes], NDArray[np.bool_]] | None = None
) -> tuple[Plan, Verification]:
    """(the plan without the fast paths that give other numbers than the deployed model, the check that says so); notes
    say which these are.

    Args:
        plan: the plan with the weights of the search.
        expected_seconds: expected time of the whole search.
        events: receives the notes.
        safe: which of some candidates may be evaluated in this process; None: all.

    Raises:
        EvaluationError: the captured model does not compute what the user's model computes.
    """
    verification = verify(plan.evaluator, plan.model, expected_seconds, safe)
    if verification.passed and not verification.notes:
        return plan, verification
    for note in verification.notes:
        events.note(note)
    return plan.verified(verification), verification


def verify_workers(dispatcher: Dispatcher, events: Events) -> None:
    """Compare worker processes with this process on a few candidates; where they differ, a note says so.

    Raises:
        EvaluationError: they differ, and only workers can keep the time limit of a candidate.
    """
    if not dispatcher.isolated:
        return
    codes = np.array(list(itertools.islice(spread(dispatcher.evaluator.space), CHECKED_IN_WORKERS)), dtype=np.int64)
    note = dispatcher.verify_workers(codes[dispatcher.safe(codes)])
    if note:
        events.note(note)


def check_front(plan: Plan, run: Run, rows: Sequence[int]) -> None:
    """Evaluate trials of the front again, each alone as the model that would be deployed.

    Args:
        plan: the plan of the search.
        run: the finished run.
        rows: rows of the trials in ``run.columns``.

    Raises:
        EvaluationError: a metric of the task differs from that of the deployed model; the message names the trial.
    """
    metrics = {name: column[list(rows)] for name, column in run.columns.metrics.items()}
    names = [f"trial {int(run.columns.number[row])}" for row in rows]
    check_scores(plan, names, run.columns.codes(rows), metrics)


def check_scores(plan: Plan, names: Sequence[str], codes: Codes, metrics: Mapping[str, NDArray[np.float64]]) -> None:
    """Compare measured losses and accuracies, or the metrics of another task, with those of the deployed models.

    Args:
        plan: the plan of the search.
        names: what the candidates are called in a message.
        codes: their codes, int64, shape (candidates, parameters).
        metrics: metric → measured values, shape (candidates,). What leads must be one; the others of the task may be.

    Raises:
        EvaluationError: they differ; the message names the first such candidate.
    """
    samples = plan.evaluator.accuracy_samples
    if samples is None:
        return
    for row, (name, code) in enumerate(zip(names, codes, strict=True)):
        deployed = deployed_score(plan.evaluator, code, samples.split, samples.number)
        # A search may measure accuracy alone.
        measured = {m: float(metrics[m][row]) if m in metrics else value for m, value in deployed.items()}
        if not same(measured, deployed):
            raise EvaluationError(
                f"{name}: the search measured {_words(measured)}, and the deployed model has {_words(deployed)}. If "
                "the number comes from another machine or another version of torch, start the search again; otherwise "
                "this is an error of Bitfront: please report it with the model"
            )


def _words(score: Score) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in score.items())
