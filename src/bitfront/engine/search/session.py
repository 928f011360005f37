"""Runs a whole search in its run folder: lock, identity, weights, loop, the front on the test split, results."""

from __future__ import annotations

import contextlib
import hashlib
import math
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bitfront import checkpoints, tomlfile
from bitfront.config import Config
from bitfront.data.loading import is_path
from bitfront.engine.evaluation.dispatch import Dispatcher
from bitfront.engine.evaluation.memory import Memory
from bitfront.engine.evaluation.range_loss import remarks
from bitfront.engine.planning.coverage import in_float
from bitfront.engine.planning.feasibility import Feasibility, check
from bitfront.engine.planning.inputs import weights_fingerprint
from bitfront.engine.planning.learning import target_of
from bitfront.engine.planning.pacing import described, measured_schedule, pacemaker
from bitfront.engine.planning.plan import Plan
from bitfront.engine.planning.probe import Timing, expected_seconds, timing
from bitfront.engine.search import front, loop
from bitfront.engine.search.chance import at_chance
from bitfront.engine.search.checking import check_front, verified_plan, verify_workers
from bitfront.engine.search.finetuning import chosen, finetune, settings_of
from bitfront.engine.search.knowledge import keep_option_costs, knowledge, noise_and_margins
from bitfront.engine.search.paired import enough_samples
from bitfront.engine.search.weights import source_of_weights, trained_model
from bitfront.engine.storage import learned
from bitfront.engine.storage import store as stores
from bitfront.engine.storage.folder import SHARED, STORE, TRACKING, WEIGHTS
from bitfront.engine.storage.inflight import InFlight, key_of
from bitfront.engine.storage.results import write_results
from bitfront.engine.storage.run import Run
from bitfront.engine.storage.store import Store
from bitfront.errors import EvaluationError, RunError
from bitfront.events import Events
from bitfront.files import shown, sweep, write_text
from bitfront.learned_bits.course import Pace
from bitfront.spaces.base import Codes
from bitfront.strategies.base import Strategy
from bitfront.tasks.base import Task

#: Measurements before a search are said if they take longer than about so much.
SAID_SECONDS = 10.0
#: The largest number of uniform candidates that are evaluated before the strategy is asked.
UNIFORM = 64


def run_search(plan: Plan, restart: bool, events: Events) -> Run:
    """Run the search of `plan` in its run folder, or resume it.

    Args:
        plan: the plan of the search.
        restart: delete the trials of an earlier search in that folder.
        events: receives notes and the progress.

    Raises:
        RunError: the folder belongs to another configuration, or to a search that is running.
        EvaluationError: every candidate failed, or trials could not be written.
    """
    for note in plan.notes:
        events.note(note)
    folder = plan.config.run_folder
    try:
        with stores.locked(folder):
            sweep(folder)
            return _search(plan, folder, restart, events)
    except OSError as error:
        raise RunError(f"{shown(Path(error.filename or folder))}: {error.strerror or error}") from None
    except sqlite3.Error as error:
        raise EvaluationError(
            f"{shown(folder / STORE)}: {error}. Free disk space or fix the permissions, then give the same command "
            "again; the search continues from there"
        ) from None


def _search(plan: Plan, folder: Path, restart: bool, events: Events) -> Run:
    path = folder / STORE
    if path.exists() and not restart:
        # This is checked before training, because a mismatch afterwards would waste the training.
        stores.check_identity(path, plan.identity(None), ignore=["weights"])
    source: Mapping[str, Any] = {}
    if not plan.brings_weights:
        known = plan.space.graph.outputs
        source = source_of_weights(plan.config, plan.model, plan.dataset, known)
        model = trained_model(plan.config, plan.model, plan.dataset, events, outputs=known).model
        plan = plan.trained(model)
    if restart:
        # This comes after all checks, because it may delete hours of somebody's search.
        outputs = [*folder.glob(f"{STORE}-*"), *(folder / "checkpoints").glob("trial-*.pt")]
        outputs += (folder / "checkpoints").glob("cycle-*")
        outputs += (folder / "tensorboard").glob("events.out.tfevents.*")
        outputs += learned.files(folder)
        for file in [path, *outputs, folder / TRACKING, folder / "best.json", folder / "log.json"]:
            file.unlink(missing_ok=True)
    weights = weights_fingerprint(plan.model)
    space = plan.space
    with plan.config.locating():
        starts = check(plan.evaluator, plan.constraints, trained=True)
    store = Store.open(path, plan.evaluator.metrics, len(space.parameters), plan.identity(weights), space.keys)
    try:
        # Trials are rebuilt from this copy, whatever happens to the checkpoint that the weights came from.
        checkpoints.save_checkpoint(plan.model.state_dict(), folder / WEIGHTS, {"weights": weights, **source})
        text = tomlfile.dumps(_absolute(plan.config))
        write_text(folder / "config.toml", text)
        store.set_meta("config", hashlib.sha256(text.encode()).hexdigest())
        job = plan.evaluator.job
        plan.evaluator.keep_in(folder)
        memory = job.memory or Memory()
        for note in memory.keep(folder, space.graph, job.calibration):
            events.note(note)
        with open_dispatcher(plan, store, events) as dispatcher:
            plan, reason, lost = _searched(plan, store, dispatcher, starts, events)
        if reason != "interrupted":
            events.finishing()
            run = Run.load(folder)
            if chance := at_chance(plan, run):
                events.note(chance)
                lost.append(chance)
            front.keep_weights(plan, run)
            check_front(plan, run, front.rows_of(run).tolist())
            front.measure_on_test(plan, store, run)
            front.compare_with_samples(plan, store, run)
            front.share_in_float(plan, store, run)
            _finetune(plan, store, run, events)
        memory.write()
        if memory.trouble:
            events.note(memory.trouble)
        run = replace(Run.load(folder), notes=(*plan.notes, *lost), folder=shown(folder))
        write_results(folder, run)
        if len(run) and not run.columns.complete.any():
            raise EvaluationError(f"all {len(run)} candidates failed; the first with: {run.columns.first_error}")
        return run
    finally:
        store.close()


@contextlib.contextmanager
def open_dispatcher(plan: Plan, store: Store, events: Events) -> Iterator[Dispatcher]:
    """A dispatcher for a search whose trials are in `store`; what was in flight when it was last killed is tried out
    in a process of its own first."""
    setup = plan.settings.strategy.setup
    # The networks of a training with learned bits come out of one process; its members share the cores.
    learns = plan.evaluator.job.learning is not None
    in_flight = InFlight() if learns else InFlight(store.path, [len(p.labels) for p in plan.space.parameters])
    if in_flight.suspects:
        in_flight.forget(set(map(key_of, store.trials().code)) & in_flight.suspects.keys())
    dispatcher = Dispatcher(
        plan.evaluator,
        plan.workers,
        setup.candidate_timeout,
        in_flight,
        launcher=plan.launcher,
        folder=plan.config.run_folder / SHARED,
        heard=events.workers,
    )
    with dispatcher:
        count = len(in_flight.suspects)
        if count:
            events.note(
                f"{count:,} {'candidate was' if count == 1 else 'candidates were'} being evaluated when a process "
                "ended; now they are evaluated in another process"
            )
            dispatcher.try_suspects()
        yield dispatcher


def _searched(
    plan: Plan, store: Store, dispatcher: Dispatcher, starts: Codes, events: Events
) -> tuple[Plan, loop.Ended, list[str]]:
    """(the plan as it was carried out, why the search stopped, notes on ranges that the plan could not have yet)."""
    began = time.perf_counter()
    plan = with_samples(plan, store, events, dispatcher)
    plan = with_length(plan, store, plan.config.run_folder, events, dispatcher)
    _describe(plan, store)
    resumed = len(store)
    learns = plan.evaluator.job.learning is not None
    summary = store.meta("summary")
    limits, known = bounds(plan, summary["reference"]), Timing(0.0)
    if resumed < plan.n_trials and not learns:
        known = timing(plan, dispatcher.safe, lambda codes: limits.before(codes) == 0)
    dispatcher.expect(known.each)
    events.planned(plan, known.mean(plan.n_trials))
    if resumed < plan.n_trials and not learns:
        left = plan.n_trials - resumed
        plan, checked = verified_plan(plan, known.mean(plan.n_trials) * left, events, dispatcher.safe)
        dispatcher.use(plan.evaluator)
        verify_workers(dispatcher, events)
        if plan.strategy.kind.uses_noise:

            def begins(evaluations: float) -> None:
                if (seconds := evaluations * known.each) > SAID_SECONDS:
                    events.note(
                        f"about {seconds:.0f} s go into measuring every option alone, before the first candidate; that "
                        "saves evaluations"
                    )

            # The search uses them; here their time is not taken for that of candidates.
            noise_and_margins(plan.evaluator, store, replays=resumed > 0, begins=begins)
        events.expected(expected_seconds(plan, known, left, checked))
    if resumed:
        events.note(f"{resumed:,} trials are known from earlier sessions")
    plan = plan.constrained(limits.constraints)
    dispatcher.use(plan.evaluator)
    limits = replace(limits, evaluator=plan.evaluator)
    # The constraints with resolved bounds are stored for readers of the run folder.
    store.set_meta("summary", {**summary, "constraints": [vars(c) for c in limits.constraints]})
    if plan.evaluator.job.learning is not None:
        plan.evaluator.job.learning.course.on_epoch = events.learning
        plan.evaluator.job.learning.course.elsewhere = dispatcher.elsewhere()
        plan.evaluator.steer(target_of(plan.evaluator, limits.constraints))
        keep_pace(plan, store, began)
    reason, lost = _evaluate(plan, store, limits, starts, dispatcher, events)
    store.set_meta("stopped", reason)
    return plan, reason, lost


def _absolute(config: Config) -> dict[str, Any]:
    """The configuration with all values that took effect, and with absolute paths."""
    values = config.effective()
    for key in ("dataset_path", "load_name"):
        if key in values:
            values[key] = str(config.path(values[key]).resolve())
    if is_path(config.dataset):
        values["dataset"] = str(config.path(config.dataset).resolve())
    for key in ("model", "dataset"):
        library, _, place = values[key].partition(":")
        if library == "hf" and place.startswith((".", "~")):
            values[key] = f"hf:{config.path(place).resolve()}"
    return values


def with_samples(plan: Plan, store: Store, events: Events, dispatcher: Dispatcher) -> Plan:
    """The plan with a number in place of ``num_samples = "auto"``. It is determined once, and then read from the store.

    Args:
        plan: a plan with a trained model.
        store: the store of the search.
        events: receives a note.
        dispatcher: of the search; it goes on with the plan's evaluator.
    """
    split = plan.auto_split
    if split is None:
        return plan
    number = store.meta("num_samples")
    if number is None:
        number, candidates = enough_samples(plan.evaluator, split, plan.config.seed, dispatcher.safe)
        store.set_meta("num_samples", number)
        available = len(plan.evaluator.samples(split, None)[1])
        events.note(
            f"num_samples = 'auto': {number:,} of {available:,} samples"
            + (" (all there are)" if number == available else f" are enough to order {candidates} candidates")
        )
    plan = plan.sampled(number)
    dispatcher.use(plan.evaluator)
    return plan


def with_length(plan: Plan, store: Store, folder: Path, events: Events, dispatcher: Dispatcher) -> Plan:
    """The plan with the length of its training with learned bits, where the file does not say it. It is determined
    once, by the timeout, and then read from the store: what comes from a clock is another number in every session.

    Args:
        plan: a plan with a trained model.
        store: the store of the search.
        folder: where the cycles are kept.
        events: receives a note.
        dispatcher: of the search; it goes on with the plan's evaluator.
    """
    learning, timeout = plan.evaluator.job.learning, plan.settings.strategy.setup.timeout
    if learning is None or not plan.chooses_length:
        return plan
    length = store.meta("length")
    if length is None:
        schedule = learning.schedule
        if timeout is not None:
            schedule, epoch = measured_schedule(plan, timeout)
            events.note(described(schedule, timeout, epoch))
        length = {"cycles": schedule.cycles, "epochs": schedule.epochs}
        store.set_meta("length", length)
    plan = plan.paced(**length)
    plan.evaluator.keep_in(folder)
    dispatcher.use(plan.evaluator)
    return plan


def keep_pace(plan: Plan, store: Store, began: float) -> None:
    """Have the cycles of a training with learned bits end in time, where the timeout says how long they are.

    Args:
        plan: from ``with_length``.
        store: the store of the search; it keeps how long each cycle is.
        began: when this session began, by ``time.perf_counter``.
    """
    learning, timeout = plan.evaluator.job.learning, plan.settings.strategy.setup.timeout
    known = {int(number): Pace(**entry) for number, entry in (store.meta("paces") or {}).items()}
    if learning is None or not plan.chooses_length or (timeout is None and not known):
        return

    def keep(paces: Mapping[int, Pace]) -> None:
        store.set_meta("paces", {str(number): vars(entry) for number, entry in paces.items()})

    end = math.inf if timeout is None else began + timeout
    learning.course.pace = pacemaker(learning.schedule, end, known, keep)


def _describe(plan: Plan, store: Store) -> None:
    """Store everything that a reader of the run folder needs beside the trials."""
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
            **({} if evaluator.job.task.classifies else {"task": _task_described(evaluator.job.task)}),
            "reference": float_metrics(plan),
            "sites": len(plan.space.graph.sites),
            "size": str(plan.space.size),
            "in_float": vars(in_float(plan.space)),
        },
    )


def _task_described(task: Task) -> dict[str, Any]:
    """What a reader of the run folder needs of another task than classification."""
    qualities = [{"name": m.name, "direction": m.direction, "share": m.share} for m in task.all_metrics]
    return {"leading": task.leading.name, "qualities": qualities}


def float_metrics(plan: Plan) -> dict[str, float | None]:
    """Metric → value of the float model; None if it cannot be measured."""
    metrics = plan.evaluator.float_evaluator().evaluate(np.zeros((1, 0), dtype=np.int64))
    return {m: None if np.isnan(v[0]) else float(v[0]) for m, v in metrics.values.items()}


def bounds(plan: Plan, reference: Mapping[str, float | None]) -> Feasibility:
    """The constraints of a plan, with bounds relative to the float model resolved.

    Args:
        plan: the plan.
        reference: metric → value of the float model.

    Raises:
        ConfigError: a bound refers to a metric that the float model does not have.
    """
    with plan.config.locating():
        return Feasibility(plan.evaluator, tuple(c.resolved(reference) for c in plan.constraints))


def first_candidates(plan: Plan, starts: Codes, strategy: Strategy, store: Store | None = None) -> Codes:
    """The candidates that are evaluated before the strategy is asked, int64, shape (candidates, parameters).

    Args:
        plan: the plan.
        starts: candidates that fulfil the constraints best; uniform ones come after them.
        strategy: knows which of these are promising.
        store: of the trials, if they are stored. A version that evaluated all uniform candidates may have begun it, and
            is followed: the proposals of a strategy depend on what it was given first.
    """
    uniform = plan.space.uniform()
    if plan.exhaustive:
        return uniform[:0]  # it evaluates all, in the space's order
    if store is not None and store.meta("uniform") is None:
        store.set_meta("uniform", "all" if len(store) else "promising")
    if store is None or store.meta("uniform") == "promising":
        uniform = uniform[strategy.promising(uniform)]
    return np.concatenate([starts, uniform[:UNIFORM]])


def _evaluate(
    plan: Plan, store: Store, bounds: Feasibility, starts: Codes, dispatcher: Dispatcher, events: Events
) -> tuple[loop.Ended, list[str]]:
    """Why the loop stopped, and notes on ranges that the plan could not have yet."""
    if not plan.strategy.kind.trains_bits:
        keep_option_costs(plan.evaluator, store)
    reference, noise = store.meta("summary")["reference"], plan.strategy.kind.uses_noise
    strategy = plan.make_strategy(knowledge(plan, bounds, reference, store, noise=noise, replays=len(store) > 0))
    reason = loop.run(
        space=plan.space,
        strategy=strategy,
        initial=first_candidates(plan, starts, strategy, store),
        objectives=plan.objectives,
        store=store,
        evaluator=dispatcher,
        limits=loop.Limits(plan.n_trials, plan.settings.strategy.setup.timeout),
        seed=plan.config.seed,
        on_progress=lambda progress: events.progress(progress, plan),
        feasibility=bounds,
    )
    known = {note.partition(":")[0] for note in plan.notes}
    lost = [line for line in remarks(dispatcher.losses) if line.partition(":")[0] not in known]
    for remark in [*dispatcher.remarks, *lost]:
        events.note(remark)
    return reason, lost


def _finetune(plan: Plan, store: Store, run: Run, events: Events) -> None:
    """Fine-tune some trials of the front. Trials that were fine-tuned before with the same settings are skipped."""
    table, config = plan.settings.finetune, plan.config
    if not table.trials:
        return
    settings = settings_of(table, config.batch_size, config.training_optimizer, config.weight_decay, config.seed)
    stored = store.meta("finetuned") or {}
    done = stored.get("trials", []) if stored.get("settings") == vars(settings) else []
    leading = plan.evaluator.job.task.leading
    if len(run.objectives.directions) == 1:
        rows = run.ranked_rows[: table.trials].tolist()
    else:
        values = run.columns.metrics[leading.name]
        sign = 1 if leading.direction == "minimize" else -1
        order = sorted(run.front_rows.tolist(), key=lambda row: sign * values[row])
        rows = chosen(order, table.trials)
    for row in rows:
        number = int(run.columns.number[row])
        if any(entry["number"] == number for entry in done):
            continue
        before = float(run.columns.metrics[leading.name][row])
        events.note(f"fine-tuning trial {number}")
        events.training(settings, len(plan.dataset.split("train")[1]))
        evaluator, code = plan.evaluator.alone(run.columns.codes([row])[0])
        finetuned = finetune(
            evaluator,
            code,
            number,
            before,
            plan.dataset,
            settings,
            run.folder,
            events,
            plan.evaluator.job.corrections.batch_norm,
        )
        done.append(vars(finetuned))
        store.set_meta("finetuned", {"settings": vars(settings), "trials": done})
