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
from bitfront.engine.evaluation.trained import TrainedEvaluator
from bitfront.engine.planning.feasibility import Feasibility, check
from bitfront.engine.planning.plan import Plan, weights_fingerprint
from bitfront.engine.search import loop
from bitfront.engine.search.finetuning import chosen, finetune, settings_of
from bitfront.engine.search.paired import compare, enough_samples
from bitfront.engine.search.weights import trained_model
from bitfront.engine.storage import store as stores
from bitfront.engine.storage.run import STORE, Run, write_results
from bitfront.engine.storage.store import Store
from bitfront.errors import EvaluationError, RunError
from bitfront.events import Events
from bitfront.spaces.base import Codes

#: The weights that a search's trials are made of, in its run folder.
WEIGHTS = Path("checkpoints") / "searched.pt"
#: Of a front with very many members, so many are measured on the test split.
TESTED = 100
#: So many uniform-precision candidates at most are tried before the strategy is asked.
UNIFORM = 64


def run_search(layout: Plan, restart: bool, events: Events) -> Run:
    """Do what `layout` lays out, or go on with it, in its run folder.

    Args:
        restart: throw away the trials of an earlier search there.

    Raises:
        RunError: the folder belongs to another configuration, or to a search that is running.
        EvaluationError: nothing could be evaluated, or trials could not be written.
    """
    for note in layout.notes:
        events.note(note)
    folder = layout.config.run_folder
    try:
        with stores.locked(folder):
            return _search(layout, folder, restart, events)
    except OSError as error:
        raise RunError(f"{error.filename or folder}: {error.strerror or error}") from None
    except sqlite3.Error as error:
        raise EvaluationError(
            f"{folder / STORE}: {error}. Make room or fix the permissions, then give the same command again: it goes "
            "on where it was"
        ) from None


def _search(layout: Plan, folder: Path, restart: bool, events: Events) -> Run:
    path = folder / STORE
    if path.exists() and not restart:
        # Before training: a mismatch found after it would have cost the training, and the checkpoint.
        stores.check_identity(path, layout.identity(None), ignore=["weights"])
    if not layout.brings_weights:
        model = trained_model(layout.config, layout.model, layout.dataset, events).model
        layout = layout.trained(model)
    if restart:
        # Now that nothing can be wrong any more: what is thrown away here was hours of somebody's search.
        made = [*folder.glob(f"{STORE}-*"), *(folder / "checkpoints").glob("trial-*.pt")]
        made += (folder / "tensorboard").glob("events.out.tfevents.*")
        for old in [path, *made, folder / "best.json", folder / "log.json"]:
            old.unlink(missing_ok=True)
    weights = weights_fingerprint(layout.model)
    space = layout.space
    with layout.config.locating():
        starts = check(layout.evaluator, layout.constraints, trained=True)
    store = Store.open(path, layout.evaluator.metrics, len(space.parameters), layout.identity(weights), space.keys)
    try:
        # Trials are rebuilt from these, wherever the weights came from and whatever becomes of that file.
        checkpoints.save(layout.model.state_dict(), folder / WEIGHTS, {"weights": weights})
        (folder / "config.toml").write_text(tomlfile.dumps(_absolute(layout.config)), encoding="utf-8")
        layout = with_samples(layout, store, events)
        _describe(layout, store)
        resumed = len(store)
        events.planned(layout, layout.seconds_per_candidate() if resumed < layout.n_trials else 0.0)
        if resumed:
            events.note(f"{resumed:,} trials are there from before")
        summary = store.meta("summary")
        limits = bounds(layout, summary["reference"])
        # Readers of the run folder want them too.
        store.set_meta("summary", {**summary, "constraints": [vars(c) for c in limits.constraints]})
        reason = _evaluate(layout, store, limits, starts, events)
        store.set_meta("stopped", reason)
        if reason != "interrupted":
            events.finishing()
            _keep_front(layout, folder)
            _test_front(layout, store, folder)
            _compare_front(layout, store, folder)
            _finetune(layout, store, folder, events)
        run = replace(Run.load(folder), notes=layout.notes)
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


def with_samples(layout: Plan, store: Store, events: Events) -> Plan:
    """With as many samples as settle the order of candidates, where that is what was asked for; found out once."""
    split = layout.auto_split
    if split is None:
        return layout
    found = store.meta("num_samples")
    if found is None:
        found, candidates = enough_samples(layout.evaluator, split, layout.config.seed)
        store.set_meta("num_samples", found)
        there = len(layout.evaluator.samples(split, None)[1])
        events.note(
            f"num_samples = 'auto': {found:,} of {there:,} samples"
            + (" (all there are)" if found == there else f" settle the order of {candidates} candidates")
        )
    return layout.sampled(found)


def _describe(layout: Plan, store: Store) -> None:
    """Everything a reader of the run folder needs beside the trials."""
    evaluator = layout.evaluator
    samples, runner = None, evaluator.runner_of("accuracy")
    if runner is not None:
        settings: Any = runner.settings
        samples = len(evaluator.samples(settings.split, settings.num_samples)[1])
    store.set_meta("space", list(layout.space.description))
    store.set_meta("stopped", "")
    store.set_meta(
        "summary",
        {
            "objectives": layout.objectives.described(),
            "summed": layout.objectives.summed,
            "sides": dict(layout.sides),
            "units": {m.name: m.unit for runner in evaluator.runners for m in runner.produces},
            "kinds": evaluator.kinds(),
            "samples": samples,
            "reference": float_metrics(layout),
            "sites": len(layout.space.graph.sites),
            "size": str(layout.space.size),
        },
    )


def float_metrics(layout: Plan) -> dict[str, float | None]:
    """Metric → value of the float model; None where it has none."""
    found = layout.evaluator.of_float().measure(np.zeros((1, 0), dtype=np.int64))
    return {m: None if np.isnan(v[0]) else float(v[0]) for m, v in found.values.items()}


def bounds(layout: Plan, reference: Mapping[str, float | None]) -> Feasibility:
    """The constraints, those against the float model with its numbers in them."""
    with layout.config.locating():
        return Feasibility(layout.evaluator, tuple(c.resolved(reference) for c in layout.constraints))


def first_candidates(layout: Plan, starts: Codes) -> Codes:
    """What is tried before the strategy is asked: where constraints point to, and uniform-precision candidates."""
    seeds = np.concatenate([starts, layout.space.uniform()[:UNIFORM]])
    return seeds[:0] if layout.exhaustive else seeds  # all of them come anyway, in the space's own order


def _evaluate(layout: Plan, store: Store, bounds: Feasibility, starts: Codes, events: Events) -> loop.StopReason:
    setup = layout.settings.strategy.setup
    with Dispatcher(layout.evaluator, setup.n_jobs) as dispatcher:
        reason = loop.run(
            space=layout.space,
            strategy=layout.make_strategy(),
            seeds=first_candidates(layout, starts),
            objectives=layout.objectives,
            store=store,
            dispatcher=dispatcher,
            limits=loop.Limits(layout.n_trials, setup.timeout),
            seed=layout.config.seed,
            on_progress=lambda progress: events.progress(progress, layout),
            bounds=bounds,
        )
        for remark in dispatcher.remarks:
            events.note(remark)
        return reason


def _keep_front(layout: Plan, folder: Path) -> None:
    """The trained weights of the front, where each candidate has its own; those kept before are not trained again."""
    if not isinstance(layout.evaluator, TrainedEvaluator) or layout.evaluator.job.training is None:
        return
    run = Run.load(folder)
    for row in run.front_rows[:TESTED]:
        code, epochs = run.columns.codes([row])[0], int(run.columns.metrics["trained_epochs"][row])
        place = kept_state(folder, int(run.columns.number[row]))
        layout.evaluator.recall(code, epochs, place)
        layout.evaluator.keep(code, place)


def kept_state(folder: Path, number: int) -> Path:
    """Where the trained weights of a trial are, if it was on the front at the end of a search."""
    return folder / "checkpoints" / f"trial-{number}.pt"


def _test_front(layout: Plan, store: Store, folder: Path) -> None:
    """The front, and the float model, on the test split: each once, however often the search is resumed."""
    if "test" not in layout.dataset.splits or "accuracy" not in layout.evaluator.metrics:
        return
    evaluator = layout.evaluator.with_splits({"test": layout.dataset.split("test")})
    if store.meta("reference_test") is None:
        scores = evaluator.of_float().scores(np.zeros((1, 0), dtype=np.int64), "test", None)
        store.set_meta(
            "reference_test",
            {"loss": float(scores.loss[0]), "accuracy": int(scores.correct[0]) / scores.samples},
        )
    run = Run.load(folder)
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


def _compare_front(layout: Plan, store: Store, folder: Path) -> None:
    """The front's members with each other, on the samples of the search."""
    runner = layout.evaluator.runner_of("accuracy")
    run = Run.load(folder)
    rows = run.front_rows[:TESTED]
    if runner is None or len(rows) < 2:
        store.set_meta("compared", [])
        return
    settings: Any = runner.settings
    answers = layout.evaluator.answers(run.columns.codes(rows), settings.split, 0, settings.num_samples)
    store.set_meta("compared", [vars(c) for c in compare(run.columns.number[rows].tolist(), answers)])


def _finetune(layout: Plan, store: Store, folder: Path, events: Events) -> None:
    """Some of the front trained on; what was done earlier with the same settings is not done again."""
    own, config = layout.settings.finetune, layout.config
    if not own.trials:
        return
    settings = settings_of(own, config.batch_size, config.training_optimizer, config.weight_decay, config.seed)
    kept = store.meta("finetuned") or {}
    done = kept.get("trials", []) if kept.get("settings") == vars(settings) else []
    run = Run.load(folder)
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
        events.training(settings, len(layout.dataset.split("train")[1]))
        evaluator, code = layout.evaluator.alone(run.columns.codes([row])[0])
        found = finetune(evaluator, code, number, before, layout.dataset, settings, folder, events)
        done.append(vars(found))
        store.set_meta("finetuned", {"settings": vars(settings), "trials": done})
