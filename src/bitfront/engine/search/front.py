"""What is measured of the front when a search has ended: on the test split, in pairs, and what it leaves in float."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront.engine.evaluation.interface import ONLY_CODE
from bitfront.engine.planning.coverage import float_shares
from bitfront.engine.planning.plan import Plan
from bitfront.engine.search.optimism import optimism, spread_of_answers, spread_of_results
from bitfront.engine.search.paired import compare, compare_results, intervals
from bitfront.engine.storage.folder import trial_weights
from bitfront.engine.storage.run import Run
from bitfront.engine.storage.store import Store

#: The largest number of trials of the front that are looked at.
TESTED = 100


def rows_of(run: Run) -> NDArray[np.int64]:
    """The rows of the first trials of the front, shape (trials,)."""
    return run.front_rows[:TESTED]


def keep_weights(plan: Plan, run: Run) -> None:
    """Store the weights of the front, if candidates are trained. Weights in a file are not trained again."""
    for row in rows_of(run).tolist():
        code = run.columns.codes([row])[0]
        path = trial_weights(run.folder, int(run.columns.number[row]))
        plan.evaluator.recall(code, {m: float(v[row]) for m, v in run.columns.metrics.items()}, path)
        plan.evaluator.keep(code, path)


def measure_on_test(plan: Plan, store: Store, run: Run) -> None:
    """Measure the front and the float model on the test split, each once, however often the search is resumed."""
    if "test" not in plan.dataset.splits or plan.evaluator.job.task.leading.name not in plan.evaluator.metrics:
        return
    evaluator = plan.evaluator.with_splits({"test": plan.dataset.split("test")})
    if store.meta("reference_test") is None:
        scores = evaluator.float_evaluator().scores(np.zeros((1, 0), dtype=np.int64), "test", None)
        store.set_meta("reference_test", {name: float(found[0]) for name, found in scores.of_task.items()})
    known = store.test_results()
    rows = [r for r in rows_of(run) if int(run.columns.number[r]) not in known]
    if rows:
        measured = evaluator.scores(run.columns.codes(rows), "test", None).of_task
        store.add_test_results(
            {
                int(run.columns.number[row]): {name: float(found[i]) for name, found in measured.items()}
                for i, row in enumerate(rows)
            }
        )


def compare_with_samples(plan: Plan, store: Store, run: Run) -> None:
    """Compare the trials of the front with each other, on the samples of the search, and with themselves on the test
    split."""
    samples, rows = plan.evaluator.accuracy_samples, rows_of(run)
    task, numbers = plan.evaluator.job.task, run.columns.number[rows].tolist()
    compared: list[dict[str, Any]] = []
    spread = None
    if samples is not None and not task.classifies:
        found = plan.evaluator.results(run.columns.codes(rows), samples.split, samples.number)
        known = [(number, results) for number, results in zip(numbers, found, strict=True) if results is not None]
        compared = [vars(c) for c in compare_results(task, known)]
        (reference,) = plan.evaluator.float_evaluator().results(ONLY_CODE[None], samples.split, samples.number)
        named = [(str(number), results) for number, results in known]
        named += [] if reference is None else [("float", reference)]
        store.set_meta("intervals", {name: intervals(task, results) for name, results in named})
        if known and reference is not None:
            spread = spread_of_results(task.leading, reference, [results for _, results in known])
    elif samples is not None and len(rows):
        answers = plan.evaluator.answers(run.columns.codes(rows), samples.split, 0, samples.number)
        compared = [vars(c) for c in compare(numbers, answers)] if len(rows) > 1 else []
        (of_float,) = plan.evaluator.float_evaluator().answers(ONLY_CODE[None], samples.split, 0, samples.number)
        spread = spread_of_answers(of_float, answers)
    store.set_meta("compared", compared)
    _keep_optimism(plan, store, run, spread)


def _keep_optimism(plan: Plan, store: Store, run: Run, spread: float | None) -> None:
    """Store by how much the front looks better on the samples of the search than on the test split."""
    samples, leading = plan.evaluator.accuracy_samples, plan.evaluator.job.task.leading
    on_test, here = store.meta("reference_test"), run.reference.get(leading.name)
    found = None
    if on_test and samples is not None and samples.split != "test" and spread is not None and here is not None:
        column, rows = run.columns.metrics[leading.name], rows_of(run)
        found = optimism(
            leading,
            (here, on_test[leading.name]),
            {int(run.columns.number[row]): float(column[row]) for row in rows},
            {number: values[leading.name] for number, values in store.test_results().items()},
            spread,
            (run.samples or 1, len(plan.dataset.split("test")[1])),
        )
    store.set_meta("optimism", None if found is None else vars(found))


def share_in_float(plan: Plan, store: Store, run: Run) -> None:
    """Store what the trials of the front leave in float."""
    rows = rows_of(run)
    found = float_shares(plan.evaluator, run.columns.codes(rows)).tolist() if len(rows) else []
    store.set_meta("float_shares", dict(zip(run.columns.number[rows].tolist(), found, strict=True)))
