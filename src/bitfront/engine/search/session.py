"""A whole search in its run folder: lock, identity, weights, loop, the front on the test split, results."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bitfront import checkpoints, tomlfile
from bitfront.config import Config
from bitfront.engine.evaluation.dispatch import Dispatcher
from bitfront.engine.planning.feasibility import Feasibility, check
from bitfront.engine.planning.inputs import weights_fingerprint
from bitfront.engine.planning.plan import Plan
from bitfront.engine.planning.probe import seconds_per_candidate
from bitfront.engine.search import loop
from bitfront.engine.search.checking import check_front, verified_plan
from bitfront.engine.search.finetuning import chosen, finetune, settings_of
from bitfront.engine.search.paired import compare, enough_samples
from bitfront.engine.search.weights import trained_model
from bitfront.engine.storage import store as stores
from bitfront.engine.storage.folder import STORE, WEIGHTS, trial_weights
from bitfront.engine.storage.run import Run, write_results
from bitfront.engine.storage.store import Store
from bitfront.errors import EvaluationError, RunError
from bitfront.events import Events
from bitfront.spaces.base import Codes

#: Of a front with very many members, so many are measured on the test split.
TESTED = 100
#: So many uniform-precision candidates at most are tried before the strategy is asked.
UNIFORM = 64


def run_search(plan: Plan, restart: bool, events: Events) -> Run:
    """Do what `plan` lays out, or go on with it, in its run folder.

    Args:
        restart: throw away the trials of an earlier search there.

    Raises:
        RunError: the folder belongs to another configuration, or to a search that is running.
        EvaluationError: nothing could be evaluated, or trials could not be written.
    """
    for note in plan.notes:
        events.note(note)
    folder = plan.config.run_folder
    try:
        with stores.locked(folder):
            return _search(plan, folder, restart, events)
    except OSError as error:
        raise RunError(f"{error.filename or folder}: {error.strerror or error}") from None
    except sqlite3.Error as error:
        raise EvaluationError(
            f"{folder / STORE}: {error}. Make room or fix the permissions, then give the same command again: it goes "
            "on where it was"
        ) from None


def _search(plan: Plan, folder: Path, restart: bool, events: Events) -> Run:
    path = folder / STORE
    if path.exists() and not restart:
        # Before training: a mismatch found after it would have cost the training, and the checkpoint.
        stores.check_identity(path, plan.identity(None), ignore=["weights"])
    if not plan.brings_weights:
        model = trained_model(plan.config, plan.model, plan.dataset, events).model
        plan = plan.trained(model)
    if restart:
        # Now that nothing can be wrong any more: what is thrown away here was hours of somebody's search.
        made = [*folder.glob(f"{STORE}-*"), *(folder / "checkpoints").glob("trial-*.pt")]
        made += (folder / "tensorboard").glob("events.out.tfevents.*")
        for old in [path, *made, folder / "best.json", folder / "log.json"]:
            old.unlink(missing_ok=True)
    weights = weights_fingerprint(plan.model)
    space = plan.space
    with plan.config.locating():
        starts = check(plan.evaluator, plan.constraints, trained=True)
    store = Store.open(path, plan.evaluator.metrics, len(space.parameters), plan.identity(weights), space.keys)
    try:
        # Trials are rebuilt from these, wherever the weights came from and whatever becomes of that file.
        checkpoints.save_checkpoint(plan.model.state_dict(), folder / WEIGHTS, {"weights": weights})
        (folder / "config.toml").write_text(tomlfile.dumps(_absolute(plan.config)), encoding="utf-8")
        plan = with_samples(plan, store, events)
        _describe(plan, store)
        resumed = len(store)
        each = seconds_per_candidate(plan) if resumed < plan.n_trials else 0.0
        events.planned(plan, each)
        if resumed < plan.n_trials:
            plan = verified_plan(plan, each * (plan.n_trials - resumed), events)
        if resumed:
            events.note(f"{resumed:,} trials are there from before")
        summary = store.meta("summary")
        limits = bounds(plan, summary["reference"])
        # Readers of the run folder want them too.
        store.set_meta("summary", {**summary, "constraints": [vars(c) for c in limits.constraints]})
        reason = _evaluate(plan, store, limits, starts, events)
        store.set_meta("stopped", reason)
        if reason != "interrupted":
            events.finishing()
            run = Run.load(folder)
            _keep_front(plan, run)
            check_front(plan, run, run.front_rows[:TESTED].tolist())
            _test_front(plan, store, run)
            _compare_front(plan, store, run)
            _finetune(plan, store, run, events)
        run = replace(Run.load(folder), notes=plan.notes)
        write_results(run)
        if len(run) and not run.columns.complete.any():
            raise EvaluationError(f"all {len(run)} candidates failed; the first with: {run.columns.first_error}")
        return run
    finally:
        store.close()


def _absolute(config: Config) -> dict[str, Any]:
    """The configuration as it took effect; its files are found from any working directory."""
    values = config.effective()
    for key in ("dataset_path", "load_name"):
        if key in values:
            values[key] = str(Path(values[key]).expanduser().resolve())
    return values


def with_samples(plan: Plan, store: Store, events: Events) -> Plan:
    """With as many samples as settle the order of candidates, where that is what was asked for; found out once."""
    split = plan.auto_split
    if split is None:
        return plan
    found = store.meta("num_samples")
    if found is None:
        found, candidates = enough_samples(plan.evaluator, split, plan.config.seed)
        store.set_meta("num_samples", found)
        there = len(plan.evaluator.samples(split, None)[1])
        events.note(
            f"num_samples = 'auto': {found:,} of {there:,} samples"
            + (" (all there are)" if found == there else f" settle the order of {candidates} candidates")
        )
    return plan.sampled(found)


def _describe(plan: Plan, store: Store) -> None:
    """Everything a reader of the run folder needs beside the trials."""
    evaluator = plan.evaluator
    samples = evaluator.accuracy_samples
    number = None if samples is None else len(evaluator.samples(samples.split, samples.number)[1])
    store.set_meta("space", list(plan.space.description))
    store.set_meta("stopped", "")
    store.set_meta(
        "summary",
        {
            "objectives": plan.objectives.described(),
            "summed": plan.objectives.summed,
            "sides": dict(plan.sides),
            "units": {m.name: m.unit for runner in evaluator.runners for m in runner.produces},
            "kinds": evaluator.kinds(),
            "samples": number,
            "reference": float_metrics(plan),
            "sites": len(plan.space.graph.sites),
            "size": str(plan.space.size),
        },
    )


def float_metrics(plan: Plan) -> dict[str, float | None]:
    """Metric → value of the float model; None where it has none."""
    found = plan.evaluator.float_evaluator().evaluate(np.zeros((1, 0), dtype=np.int64))
    return {m: None if np.isnan(v[0]) else float(v[0]) for m, v in found.values.items()}


def bounds(plan: Plan, reference: Mapping[str, float | None]) -> Feasibility:
    """The constraints, those against the float model with its numbers in them."""
    with plan.config.locating():
        return Feasibility(plan.evaluator, tuple(c.resolved(reference) for c in plan.constraints))


def first_candidates(plan: Plan, starts: Codes) -> Codes:
    """What is tried before the strategy is asked: where constraints point to, and uniform-precision candidates."""
    initial = np.concatenate([starts, plan.space.uniform()[:UNIFORM]])
    return initial[:0] if plan.exhaustive else initial  # all of them come anyway, in the space's own order


def _evaluate(plan: Plan, store: Store, bounds: Feasibility, starts: Codes, events: Events) -> loop.StopReason:
    setup = plan.settings.strategy.setup
    with Dispatcher(plan.evaluator, setup.n_jobs) as dispatcher:
        reason = loop.run(
            space=plan.space,
            strategy=plan.make_strategy(),
            initial=first_candidates(plan, starts),
            objectives=plan.objectives,
            store=store,
            evaluator=dispatcher,
            limits=loop.Limits(plan.n_trials, setup.timeout),
            seed=plan.config.seed,
            on_progress=lambda progress: events.progress(progress, plan),
            feasibility=bounds,
        )
        for remark in dispatcher.remarks:
            events.note(remark)
        return reason


def _keep_front(plan: Plan, run: Run) -> None:
    """The trained weights of the front, where each candidate has its own; those kept before are not trained again."""
    for row in run.front_rows[:TESTED].tolist():
        code = run.columns.codes([row])[0]
        place = trial_weights(run.folder, int(run.columns.number[row]))
        plan.evaluator.recall(code, {m: float(v[row]) for m, v in run.columns.metrics.items()}, place)
        plan.evaluator.keep(code, place)


def _test_front(plan: Plan, store: Store, run: Run) -> None:
    """The front, and the float model, on the test split: each once, however often the search is resumed."""
    if "test" not in plan.dataset.splits or "accuracy" not in plan.evaluator.metrics:
        return
    evaluator = plan.evaluator.with_splits({"test": plan.dataset.split("test")})
    if store.meta("reference_test") is None:
        scores = evaluator.float_evaluator().scores(np.zeros((1, 0), dtype=np.int64), "test", None)
        store.set_meta(
            "reference_test",
            {"loss": float(scores.loss[0]), "accuracy": int(scores.correct[0]) / scores.samples},
        )
    known = store.test_results()
    rows = [r for r in run.front_rows[:TESTED] if int(run.columns.number[r]) not in known]
    if rows:
        scores = evaluator.scores(run.columns.codes(rows), "test", None)
        store.add_test_results(
            {
                int(run.columns.number[r]): {"loss": float(loss), "accuracy": int(correct) / scores.samples}
                for r, loss, correct in zip(rows, scores.loss, scores.correct, strict=True)
            }
        )


def _compare_front(plan: Plan, store: Store, run: Run) -> None:
    """The front's members with each other, on the samples of the search."""
    samples, rows = plan.evaluator.accuracy_samples, run.front_rows[:TESTED]
    if samples is None or len(rows) < 2:
        store.set_meta("compared", [])
        return
    answers = plan.evaluator.answers(run.columns.codes(rows), samples.split, 0, samples.number)
    store.set_meta("compared", [vars(c) for c in compare(run.columns.number[rows].tolist(), answers)])


def _finetune(plan: Plan, store: Store, run: Run, events: Events) -> None:
    """Some of the front trained on; what was done earlier with the same settings is not done again."""
    own, config = plan.settings.finetune, plan.config
    if not own.trials:
        return
    settings = settings_of(own, config.batch_size, config.training_optimizer, config.weight_decay, config.seed)
    kept = store.meta("finetuned") or {}
    done = kept.get("trials", []) if kept.get("settings") == vars(settings) else []
    if len(run.objectives.directions) == 1:
        rows = run.ranked_rows[: own.trials].tolist()
    else:
        order = sorted(run.front_rows.tolist(), key=lambda row: -run.columns.metrics["accuracy"][row])
        rows = chosen(order, own.trials)
    for row in rows:
        number = int(run.columns.number[row])
        if any(entry["number"] == number for entry in done):
            continue
        before = float(run.columns.metrics["accuracy"][row])
        events.note(f"training trial {number} on")
        events.training(settings, len(plan.dataset.split("train")[1]))
        evaluator, code = plan.evaluator.alone(run.columns.codes([row])[0])
        found = finetune(evaluator, code, number, before, plan.dataset, settings, run.folder, events)
        done.append(vars(found))
        store.set_meta("finetuned", {"settings": vars(settings), "trials": done})
