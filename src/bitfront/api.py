"""The verbs: train, test, plan, search, transform, init. The command line calls these and prints; so do users.

Whatever a verb has to say while it works goes to an ``Events`` object; the default says nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bitfront import checkpoints
from bitfront import config as configuration
from bitfront import tomlfile
from bitfront.config import Config
from bitfront.data.arrays import from_arrays, from_splits
from bitfront.data.base import Dataset
from bitfront.engine import loop
from bitfront.engine import store as stores
from bitfront.engine.evaluator import Evaluator, Workbench, one_thread
from bitfront.engine.plan import (
    CALIBRATION_SAMPLES,
    Plan,
    _chosen,
    choose_device,
    make_plan,
    open_data,
    open_model,
    training_settings,
    weights_fingerprint,
)
from bitfront.engine.run import STORE, Run, Trial, write_json, write_results
from bitfront.engine.store import Store
from bitfront.errors import CheckpointError, ConfigError, RunError
from bitfront.formats.base import Format, Operand
from bitfront.graph import Graph, capture
from bitfront.spaces.quantize import single
from bitfront.training import EpochRecord, Evaluation, TrainResult, TrainSettings, evaluate
from bitfront.training import train as run_training
from bitfront.transforms import calibrate, quantize

#: Of a front with very many members, so many are measured on the test split.
TESTED = 100


class Events:
    """What a verb tells while it works. Override what you want to hear."""

    def note(self, text: str) -> None:
        """One line that is worth reading."""

    def downloading(self, done: int, total: int | None) -> None:
        """Bytes of a download."""

    def training(self, settings: TrainSettings, samples: int) -> None:
        """Training begins."""

    def step(self, step: int, loss: Callable[[], float]) -> None:
        """A training step; asking for the loss waits for the device."""

    def epoch(self, record: EpochRecord) -> None:
        """A finished epoch of training."""

    def planned(self, plan: Plan, seconds: float) -> None:
        """The search is about to begin; `seconds` is what a candidate costs, measured."""

    def progress(self, progress: loop.Progress, plan: Plan) -> None:
        """A block of candidates is done."""

    def finishing(self) -> None:
        """Everything is evaluated; the front goes through the test split and results are written."""


# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model, where it is, and how it got there (None where a checkpoint was reused)."""

    model: nn.Module
    checkpoint: Path
    result: TrainResult | None


def train(config: Config, *, events: Events | None = None) -> Trained:
    """Train the model of `config`, and keep its best and last weights in the run folder's ``checkpoints``.

    Raises:
        UserError: what is wrong with the configuration, the data or the checkpoint to start from.
        EvaluationError: training diverged.
    """
    events = events or Events()
    dataset = open_data(config, events.note, events.downloading)
    for note in (*config.notes, *dataset.notes):
        events.note(note)
    model = open_model(config, dataset)
    if config.load_name is not None:
        model.load_state_dict(_load(config, model))
    return _train(config, model, dataset, events)


def _train(config: Config, model: nn.Module, dataset: Dataset, events: Events) -> Trained:
    device, warning = choose_device(config.accelerator)
    if warning:
        events.note(warning)
    settings = TrainSettings(
        max_epochs=config.max_epochs,
        max_steps=config.max_steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        optimizer=config.training_optimizer,
        patience=config.patience,
        seed=config.seed,
        log_every_n_steps=config.log_every_n_steps,
    )
    fingerprint = _training_fingerprint(config, model, dataset)
    events.training(settings, len(dataset.split("train")[1]))
    with config.locating():
        result = run_training(model, dataset, settings, device=device, on_step=events.step, on_epoch=events.epoch)
    folder = config.run_folder / "checkpoints"
    if result.stopped == "interrupted":
        # What an interrupt left is worth keeping, but no later search may take it for the whole training.
        fingerprint = {"interrupted": True}
        if result.best_epoch == 0:
            raise KeyboardInterrupt
    history = [vars(record) for record in result.history]
    meta = {"training": fingerprint, "history": history}
    checkpoints.save(result.last_state, folder / "last.pt", meta)
    checkpoints.save(result.best_state, folder / "best.pt", meta)
    trained = copy.deepcopy(model)
    trained.load_state_dict(result.best_state)
    return Trained(trained.eval(), folder / "best.pt", result)


def _training_fingerprint(config: Config, model: nn.Module, dataset: Dataset) -> dict[str, Any]:
    """What the trained weights depend on."""
    return {
        "model": config.model,
        "layers": str(model),
        "initial_weights": weights_fingerprint(model),
        "data": dataset.fingerprint,
        "seed": config.seed,
        **training_settings(config),
    }


def _load(config: Config, model: nn.Module) -> dict[str, torch.Tensor]:
    assert config.load_name is not None
    return checkpoints.load(Path(config.load_name).expanduser(), model, config.load_type)


def trained_model(config: Config, model: nn.Module, dataset: Dataset, events: Events) -> Trained:
    """`model` with its weights: from ``load_name``, from an earlier training that nothing has changed since, or trained
    now.

    Raises:
        CheckpointError: ``load_name`` cannot be read or does not fit.
        KeyboardInterrupt: training was interrupted.
    """
    if config.load_name is not None:
        own = copy.deepcopy(model)
        own.load_state_dict(_load(config, model))
        events.note(f"weights from {config.load_name}")
        return Trained(own.eval(), Path(config.load_name), None)
    path = config.run_folder / "checkpoints" / "best.pt"
    if path.exists():
        try:
            kept = checkpoints.read_meta(path).get("training")
            if kept == _training_fingerprint(config, model, dataset):
                own = copy.deepcopy(model)
                own.load_state_dict(checkpoints.load(path, model))
                events.note(f"weights from {path}, trained earlier with these settings")
                return Trained(own.eval(), path, None)
        except CheckpointError as error:
            events.note(f"training again: {error}")
    trained = _train(config, model, dataset, events)
    if trained.result is not None and trained.result.stopped == "interrupted":
        raise KeyboardInterrupt
    return trained


def test(config: Config, *, split: str = "test", events: Events | None = None) -> Evaluation:
    """Loss and accuracy of the trained model of `config` on a split.

    The weights are those of ``load_name``, or the run folder's best.

    Raises:
        CheckpointError: there is no checkpoint, or it does not fit.
    """
    events = events or Events()
    dataset = open_data(config, events.note, events.downloading)
    for note in (*config.notes, *dataset.notes):
        events.note(note)
    model = open_model(config, dataset)
    path = config.run_folder / "checkpoints" / "best.pt"
    if config.load_name is None and not path.exists():
        raise CheckpointError(
            f"there is no trained model in {path.parent}; train one first (bitfront train), or name one with --load-name"
        )
    model.load_state_dict(_load(config, model) if config.load_name else checkpoints.load(path, model))
    events.note(f"weights from {config.load_name or path}")
    device, warning = choose_device(config.accelerator)
    if warning:
        events.note(warning)
    x, y = dataset.split(split)  # type: ignore[arg-type]
    return evaluate(model.to(device), x, y)


# --- searching -------------------------------------------------------------------------------------------------------


def plan(config: Config, *, events: Events | None = None) -> Plan:
    """Check a search and lay it out, without doing it. Raises UserError."""
    events = events or Events()
    return make_plan(config, report=events.note, progress=events.downloading)


def search(
    source: str | Path | Config | None = None,
    *,
    model: nn.Module | str | None = None,
    data: Any = None,
    space: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    strategy: str | Mapping[str, Any] | None = None,
    restart: bool = False,
    events: Events | None = None,
    **overrides: Any,
) -> Run:
    """Search for the front of a model, and give the run.

    Either from a file, ``search("file.toml")``, or from Python::

        search(model=net, data=(x, y), space={"linear": {"name": "integer", "weight_width": [2, 4, 8], ...}},
               metrics={"accuracy": "maximize", "average_bitwidth": "minimize"}, strategy="brute_force")

    Args:
        source: a TOML file, or a loaded configuration.
        model: a trained nn.Module, which is used as it is and not changed; or a name.
        data: (x, y), which is split; ``{"train": (x, y), "val": ..., "test": ...}``; a Dataset; or a name.
        space: ``{"by": "type" | "name" | "regex_name", key: {parameter: choices}}``; ``by`` is ``type`` if left out.
        metrics: metric → direction, or ``{"scale": 1.0, "direction": ...}``; their runners are found.
        strategy: ``"brute_force"``, ``"optuna"``, ``"optuna:nsgaii"``, or a table as in the TOML.
        restart: throw away the trials of an earlier search in this run folder.
        overrides: any key of the configuration, e.g. ``seed=1``, ``project="mine"``, ``n_trials=50``.

    Raises:
        UserError: what was asked cannot be done; nothing has been evaluated.
        EvaluationError: nothing could be evaluated, or trials could not be written.
    """
    events = events or Events()
    config = _configured(source, model, data, space, metrics, strategy, overrides)
    own_model = model if isinstance(model, nn.Module) else None
    own_data = _dataset(data, config.seed)
    layout = make_plan(
        config, model=own_model, dataset=own_data, report=events.note, progress=events.downloading
    )
    for note in layout.notes:
        events.note(note)
    folder = config.run_folder
    try:
        with stores.locked(folder):
            return _search(layout, folder, restart, events)
    except OSError as error:
        raise RunError(f"{error.filename or folder}: {error.strerror or error}") from None


def _search(layout: Plan, folder: Path, restart: bool, events: Events) -> Run:
    path = folder / STORE
    if restart:
        for old in [path, *folder.glob(f"{STORE}-*"), folder / "best.json", folder / "log.json"]:
            old.unlink(missing_ok=True)
    if path.exists():
        # Before training: a mismatch found after it would have cost the training, and the checkpoint.
        stores.check_identity(path, layout.identity(None), ignore=["weights"])
    if not layout.brings_weights:
        model = trained_model(layout.config, layout.model, layout.dataset, events).model
        layout = layout.trained(model)
    bench = layout.bench
    identity = layout.identity(weights_fingerprint(layout.model))
    store = Store.open(path, bench.metrics, len(layout.space.parameters), identity)
    try:
        (folder / "config.toml").write_text(tomlfile.dumps(layout.config.effective()), encoding="utf-8")
        _describe(layout, store)
        resumed = len(store)
        events.planned(layout, layout.seconds_per_candidate() if resumed < layout.n_trials else 0.0)
        if resumed:
            events.note(f"{resumed} trials are there from before")
        reason = _evaluate(layout, store, events)
        store.set_meta("stopped", reason)
        if reason != "interrupted":
            events.finishing()
            _test_front(layout, store, folder)
        run = replace(Run.load(folder), notes=layout.notes)
        write_results(run)
        return run
    finally:
        store.close()


def _describe(layout: Plan, store: Store) -> None:
    """Everything a reader of the run folder needs beside the trials."""
    bench = layout.bench
    empty = np.zeros((1, 0), dtype=np.int64)
    reference = bench.of_float().measure(empty)
    accuracy = [s for s in bench.runners if "accuracy" in (m.name for m in s.produces)]
    samples = None
    if accuracy:
        settings: Any = accuracy[0].settings
        samples = bench.samples(settings.split, settings.num_samples)
    store.set_meta("space", list(layout.space.description))
    store.set_meta("stopped", "")
    store.set_meta(
        "summary",
        {
            "objectives": layout.objectives.described(),
            "summed": layout.objectives.summed,
            "sides": dict(layout.sides),
            "samples": samples,
            "reference": {m: None if np.isnan(v[0]) else float(v[0]) for m, v in reference.values.items()},
            "sites": len(layout.space.sites),
            "size": str(layout.space.size),
        },
    )


def _evaluate(layout: Plan, store: Store, events: Events) -> loop.StopReason:
    setup = layout.settings.strategy.setup
    seeds = layout.space.uniform()[: max(1, layout.n_trials // 2)]
    if layout.exhaustive:
        seeds = seeds[:0]  # all of them come anyway, in the space's own order
    with Evaluator(layout.bench, setup.n_jobs) as evaluator:
        return loop.run(
            space=layout.space,
            strategy=layout.make_strategy(),
            seeds=seeds,
            objectives=layout.objectives,
            store=store,
            evaluator=evaluator,
            limits=loop.Limits(layout.n_trials, setup.timeout),
            seed=layout.config.seed,
            on_progress=lambda progress: events.progress(progress, layout),
        )


def _test_front(layout: Plan, store: Store, folder: Path) -> None:
    """The front, and the float model, on the test split: each once, however often the search is resumed."""
    if "test" not in layout.dataset.splits or "accuracy" not in layout.bench.metrics:
        return
    job = replace(layout.bench.job, splits={"test": layout.dataset.split("test")})
    bench = Workbench(job, layout.space)
    if store.meta("reference_test") is None:
        scores = bench.of_float().scores(np.zeros((1, 0), dtype=np.int64), "test", None)
        store.set_meta("reference_test", {"loss": float(scores.loss[0]), "accuracy": int(scores.correct[0]) / scores.samples})
    run = Run.load(folder)
    known = store.test_results()
    rows = [r for r in run.front_rows[:TESTED] if int(run.columns.number[r]) not in known]
    if rows:
        scores = bench.scores(run.columns.code[rows], "test", None)
        store.add_test_results(
            {
                int(run.columns.number[r]): {"loss": float(loss), "accuracy": int(correct) / scores.samples}
                for r, loss, correct in zip(rows, scores.loss, scores.correct, strict=True)
            }
        )


def _configured(
    source: str | Path | Config | None,
    model: nn.Module | str | None,
    data: Any,
    space: Mapping[str, Any] | None,
    metrics: Mapping[str, Any] | None,
    strategy: str | Mapping[str, Any] | None,
    overrides: Mapping[str, Any],
) -> Config:
    if isinstance(source, Config):
        values = source.effective()
        name = source._document.name
    elif source is not None:
        document = tomlfile.read(Path(source))
        values, name = dict(document.values), document.name
    else:
        values, name = {}, "search(...)"
    if isinstance(source, Config) and not (model or data or space or metrics or strategy or overrides):
        return source
    lines = document.lines if source is not None and not isinstance(source, Config) else {}
    flat: dict[str, Any] = {}
    for key, value in overrides.items():
        flat[_SHORT.get(key, key)] = value
    if isinstance(model, str):
        flat["model"] = model
    elif model is not None:
        values = {**values, "model": type(model).__name__}
    if isinstance(data, str):
        flat["dataset"] = data
    elif data is not None:
        values = {**values, "dataset": data.name if isinstance(data, Dataset) else "arrays"}
    table = _search_table(space, metrics, strategy)
    if table:
        values = _merged(values, {"search": table})
    return configuration.from_document(tomlfile.Document(name, values, lines), flat)


_SHORT = {k: f"search.strategy.setup.{k}" for k in ("n_jobs", "n_trials", "timeout", "sampler", "max_size")}


def _search_table(
    space: Mapping[str, Any] | None, metrics: Mapping[str, Any] | None, strategy: str | Mapping[str, Any] | None
) -> dict[str, Any]:
    from bitfront.metrics import RUNNERS

    table: dict[str, Any] = {}
    if space is not None:
        seed = {k: v if "config" in v else {"config": dict(v)} for k, v in space.items() if k != "by"}
        table["search_space"] = {"setup": {"by": space.get("by", "type")}, "seed": seed}
    own: dict[str, Any] = {}
    if isinstance(strategy, str):
        name, _, sampler = strategy.partition(":")
        own = {"name": name, **({"setup": {"sampler": sampler}} if sampler else {})}
    elif strategy is not None:
        own = dict(strategy)
    if metrics is not None:
        own["metrics"] = {k: {"direction": v} if isinstance(v, str) else dict(v) for k, v in metrics.items()}
        for name in RUNNERS.names():
            runner = RUNNERS.get(name)
            if any(m.name in metrics for m in runner.produces):
                own.setdefault(runner.side, {}).setdefault(name, {})
    if own:
        table["strategy"] = own
    if table:
        table.setdefault("search_space", {})
        table.setdefault("strategy", {})
    return table


def _merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _dataset(data: Any, seed: int) -> Dataset | None:
    if data is None or isinstance(data, (str, Dataset)):
        return data if isinstance(data, Dataset) else None
    if isinstance(data, Mapping):
        return from_splits(data, seed=seed)
    if isinstance(data, Sequence) and len(data) == 2:
        return from_arrays(data[0], data[1], seed=seed)
    raise ConfigError(
        f"data is a {type(data).__name__}; allowed: (x, y), a dict of splits ('train', 'val', 'test'), a Dataset, a name"
    )


# --- transforming ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Transformed:
    """A quantized model.

    Attributes:
        model: in evaluation mode, with the quantized weights in its parameters.
        formats: site → operand → format, calibrated.
        graph: the float model it was made from.
        trial: the trial it rebuilds; None where it came from ``[passes.quantize]``.
        folder: where it was saved.
        evaluation: on the trial's own evaluation samples, if asked for.
    """

    model: nn.Module
    formats: Mapping[str, Mapping[Operand, Format]]
    graph: Graph
    config: Mapping[str, Any]
    folder: Path
    trial: Trial | None = None
    evaluation: Evaluation | None = None


def transform_trial(
    folder: str | Path, number: int, *, check: bool = False, data: Any = None, model: nn.Module | None = None,
    events: Events | None = None,
) -> Transformed:
    """Rebuild the model of a trial from what the run folder says of it, and save it below the folder.

    Args:
        check: evaluate it again, on the samples of the search.
        data, model: where the search was given objects from Python, the same ones.

    Raises:
        RunError: there is no such run or trial, or its model or data is not what it was.
    """
    events = events or Events()
    run = Run.load(folder)
    trial = run.trial(number)
    config = run.config.model_copy(update={"project": Path(folder).name, "project_dir": str(Path(folder).parent)})
    layout = make_plan(
        config, model=model, dataset=_dataset(data, config.seed), report=events.note, progress=events.downloading
    )
    if model is None:
        layout = layout.trained(trained_model(config, layout.model, layout.dataset, events).model)
    store = stores.read(Path(folder) / STORE)
    try:
        kept = store.meta("identity")
    finally:
        store.close()
    now = layout.identity(weights_fingerprint(layout.model))
    for key, what in (("weights", "the trained weights"), ("data", "the data")):
        if kept[key] != now[key]:
            raise RunError(f"{folder}: {what} changed since the search; trial {number} cannot be rebuilt from them")
    space = single(layout.space.graph, trial.config)
    bench = Workbench(layout.bench.job, space)
    code = np.zeros(0, dtype=np.int64)
    formats = bench.formats(code)
    rebuilt = bench.model(code, bake=True)
    evaluation = None
    if check:
        runner = next((r for r in layout.bench.runners if "accuracy" in (m.name for m in r.produces)), None)
        if runner is None:
            raise RunError(f"{folder}: this search measured no accuracy, so there is nothing to check")
        settings: Any = runner.settings
        x, y = bench._samples(settings.split, settings.num_samples)
        with one_thread():
            evaluation = evaluate(rebuilt, x, y)
    saved = Path(folder) / "transformed" / f"trial-{number}"
    result = Transformed(rebuilt, formats, space.graph, trial.config, saved, trial, evaluation)
    _save(result)
    return result


def transform_config(config: Config, *, check: bool = False, events: Events | None = None) -> Transformed:
    """Apply ``[passes.quantize]`` to the trained model of `config`, and save the result in the run folder.

    Args:
        check: evaluate it on the validation split.
    """
    events = events or Events()
    passes = configuration.quantize_pass(config)
    dataset = open_data(config, events.note, events.downloading)
    for note in (*config.notes, *dataset.notes):
        events.note(note)
    model = open_model(config, dataset)
    sample = dataset.split("train")[0][:2]
    with config.locating():
        single(capture(model, sample), passes, ("passes", "quantize"))
        trained = trained_model(config, model, dataset, events).model
        graph = capture(trained, sample)
        space = single(graph, passes, ("passes", "quantize"))
    for key in space.unused:
        events.note(f"{key!r} of [passes.quantize] names nothing here (by = {passes.get('by', 'name')!r}), and is not used")
    wanted = space.formats(np.zeros(len(space.groups), dtype=np.int64))
    formats = calibrate(graph, wanted, _chosen(dataset, "train", CALIBRATION_SAMPLES, config.seed)[0])
    rebuilt = quantize(graph, formats, bake=True)
    evaluation = evaluate(rebuilt, *dataset.split("val")) if check else None
    saved = config.run_folder / "transformed" / "quantize"
    result = Transformed(rebuilt, formats, graph, passes, saved, None, evaluation)
    _save(result)
    return result


def _save(result: Transformed) -> None:
    """The state dict, and beside it what each site computes in."""
    formats = {
        site: {operand: {"format": type(f).__name__.lower(), **_plain(f)} for operand, f in own.items()}
        for site, own in result.formats.items()
    }
    checkpoints.save(result.model.state_dict(), result.folder / "model.pt")
    write_json(result.folder / "quantization.json", {"config": dict(result.config), "formats": formats})


def _plain(value: Format) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(value).items()}
