"""The weights of a model: trained now, trained by an earlier command with the same settings, or from a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bitfront import checkpoints
from bitfront.config import Config
from bitfront.data.base import Dataset
from bitfront.engine.evaluation.fixed import one_thread
from bitfront.engine.planning.inputs import (
    brings_weights,
    choose_device,
    forward_fingerprint,
    load_weights,
    open_data,
    open_model,
    refuse_without_labels,
    training_settings,
    weights_fingerprint,
)
from bitfront.engine.planning.notes import ending_note
from bitfront.engine.storage.folder import WEIGHTS
from bitfront.engine.storage.store import same_outputs
from bitfront.errors import CheckpointError, RunError
from bitfront.events import Events
from bitfront.files import shown
from bitfront.graph import Graph, capture
from bitfront.graph.baking import private_copy
from bitfront.kernels.losses import Outputs
from bitfront.scoring import CHUNK, Evaluation, TaskEvaluation, measure
from bitfront.tasks.base import Task
from bitfront.tasks.configured import described, task_of
from bitfront.training import TrainResult, TrainSettings
from bitfront.training import train as run_training

#: Operations per training step; below this a second thread costs more time than it saves.
SMALL_STEP = 10**8


@dataclass(frozen=True, eq=False)
class Trained:
    """A model with trained weights.

    Attributes:
        model: in evaluation mode.
        checkpoint: the file that the weights are stored in.
        result: of the training; None if the weights were read from a checkpoint.
    """

    model: nn.Module
    checkpoint: Path
    result: TrainResult | None


def open_inputs(config: Config, events: Events) -> tuple[Dataset, nn.Module]:
    """Open the dataset and build the initialised model of `config`; their warnings become notes of `events`.

    Raises:
        ConfigError: the configuration names no such dataset or model, or the model does not fit the data.
        DataError: the data cannot be read or downloaded.
    """
    dataset = open_data(config, events.note, events.downloading)
    _, warning = choose_device(config.accelerator)
    for note in (*config.notes, *([warning] if warning else []), *dataset.notes):
        events.note(note)
    return dataset, open_model(config, dataset)


def train(config: Config, *, events: Events | None = None) -> Trained:
    """Train the model of `config` and store its best and last weights in ``checkpoints`` in the run folder.

    Training starts from the checkpoint ``load_name``, if there is one.

    Raises:
        UserError: the configuration, the data or the checkpoint cannot be used; the message says why.
        EvaluationError: training diverged.
        KeyboardInterrupt: training was interrupted before its first epoch ended.
    """
    events = events or Events()
    with config.locating():
        refuse_without_labels(config, "the training of a float model needs them; remove it")
    dataset, model = open_inputs(config, events)
    if config.load_name is not None:
        model.load_state_dict(_loaded(config, model, events))
    _note_outputs(capture(model, dataset.split("train")[0][:2]), task_of(config), events)
    return _train(config, model, dataset, events)


def _train(config: Config, model: nn.Module, dataset: Dataset, events: Events, below: Path | None = None) -> Trained:
    device, _ = choose_device(config.accelerator)  # its warning was a note of `open_inputs`
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
        accumulation=config.accumulate_grad_batches,
    )
    graph = capture(model, dataset.split("train")[0][:2])
    fingerprint = _training_fingerprint(config, model, dataset, graph.outputs)
    folder = (below or config.run_folder) / "checkpoints"
    try:
        folder.mkdir(parents=True, exist_ok=True)  # before training, so that a failure loses no work
    except OSError as error:
        raise RunError(
            f"{shown(folder)}: the folder cannot be created: {error.strerror}; choose another project_dir"
        ) from None
    events.training(settings, len(dataset.split("train")[1]))
    small = sum(n.operations or 0 for n in graph.nodes) * settings.batch_size < SMALL_STEP
    with config.locating(), one_thread() if small else contextlib.nullcontext():
        result = run_training(
            model,
            dataset,
            settings,
            device=device,
            outputs=graph.outputs,
            task=task_of(config),
            on_step=events.step,
            on_epoch=events.epoch,
        )
    if result.stopped == "interrupted":
        # The weights so far are stored, but a later search must not take them for the result of the whole training.
        fingerprint = {"interrupted": True}
        if result.best_epoch == 0:
            raise KeyboardInterrupt
    history = [record.described for record in result.history]
    meta = {"training": fingerprint, "history": history}
    checkpoints.save_checkpoint(result.last_state, folder / "last.pt", meta)
    checkpoints.save_checkpoint(result.best_state, folder / "best.pt", meta)
    trained = private_copy(model)
    trained.load_state_dict(result.best_state)
    return Trained(trained.eval(), shown(folder / "best.pt"), result)


def _training_fingerprint(config: Config, model: nn.Module, dataset: Dataset, outputs: Outputs) -> dict[str, Any]:
    """What the trained weights depend on."""
    return {
        "model": config.model,
        "layers": str(model),
        "initial_weights": weights_fingerprint(model),
        "data": dataset.fingerprint,
        "seed": config.seed,
        "forward": forward_fingerprint(model, dataset.split("train")[0]),
        **training_settings(config),
        **({} if outputs == "logits" else {"outputs": outputs}),
        **described(config),
    }


def _same_training(before: Any, now: Mapping[str, Any]) -> bool:
    """Whether training with the fingerprint `before` gave the same weights as training with `now` would."""
    if not isinstance(before, dict) or "forward" not in before:
        return False  # trained by a version whose fingerprint did not contain the code of the model
    rest = [{k: v for k, v in of.items() if k != "forward"} for of in (before, now)]
    return rest[0] == rest[1] and same_outputs(before["forward"], now["forward"])


def _loaded(config: Config, model: nn.Module, events: Events) -> checkpoints.StateDict:
    """The weights of ``load_name``; what was chosen or converted in reading them becomes notes."""
    found = load_weights(config, model)
    for note in (f"weights from {config.load_name}", *found.notes):
        events.note(note)
    return found.state


def source_of_weights(config: Config, model: nn.Module, dataset: Dataset, outputs: Outputs) -> dict[str, Any]:
    """What a search says of the weights that it keeps, so that a later one recognises them.

    Args:
        model: the initialised model, before training.
        outputs: what it gives.
    """
    if config.load_name is not None:
        return {"load_name": str(config.path(config.load_name))}
    if brings_weights(config, dataset):
        return {"library": config.model}
    return {"training": _training_fingerprint(config, model, dataset, outputs)}


def trained_model(
    config: Config,
    model: nn.Module,
    dataset: Dataset,
    events: Events,
    below: Path | None = None,
    outputs: Outputs | None = None,
) -> Trained:
    """A copy of `model` with trained weights: from the checkpoint ``load_name``; the weights of its library, where it
    came with them and they fit the outputs; from the run folder, if its weights
    were trained with the same model, data and settings; otherwise trained now.

    Args:
        model: the initialised model of `config`; not changed.
        dataset: the dataset of `config`.
        events: receives notes and the progress of the training.
        below: a folder that new weights are stored below, in place of the run folder, whose weights then stay as
            they are.
        outputs: what the model gives; None if it was not captured yet.

    Raises:
        CheckpointError: ``load_name`` cannot be read, or does not fit the model.
        RunError: the folder for the weights cannot be created.
        EvaluationError: training diverged.
        KeyboardInterrupt: training was interrupted.
    """
    if config.load_name is not None:
        loaded = private_copy(model)
        loaded.load_state_dict(_loaded(config, model, events))
        return Trained(loaded.eval(), config.path(config.load_name), None)
    if brings_weights(config, dataset):
        events.note(f"weights of {config.model}, from its library")
        return Trained(private_copy(model).eval(), config.run_folder / WEIGHTS, None)
    outputs = outputs or capture(model, dataset.split("train")[0][:2]).outputs
    fingerprint = _training_fingerprint(config, model, dataset, outputs)
    folders = [config.run_folder] + ([below] if below else [])
    # A search keeps the weights that its trials are made of, so that it can go on where the others are gone.
    for path in (*(folder / "checkpoints" / "best.pt" for folder in folders), config.run_folder / WEIGHTS):
        if not path.exists():
            continue
        try:
            if _same_training(checkpoints.read_meta(path).get("training"), fingerprint):
                loaded = private_copy(model)
                loaded.load_state_dict(checkpoints.load_checkpoint(path, model))
                events.note(f"weights from {shown(path)}, trained earlier with these settings")
                return Trained(loaded.eval(), path, None)
        except CheckpointError as error:
            events.note(f"training again: {error}")
    trained = _train(config, model, dataset, events, below)
    if trained.result is not None and trained.result.stopped == "interrupted":
        events.note("interrupted while training; the next search trains from the start")
        raise KeyboardInterrupt
    return trained


def test(config: Config, *, split: str = "test", events: Events | None = None) -> Evaluation | TaskEvaluation:
    """Loss and accuracy, or the metrics of another task, of the trained model of `config` on a split of its dataset.

    The weights are those of the checkpoint ``load_name``, or else ``checkpoints/best.pt`` in the run folder, or else
    those of the model's library, with ``weights = true``.

    Args:
        config: the configuration.
        split: ``train``, ``val`` or ``test``.
        events: receives notes.

    Raises:
        CheckpointError: there is no checkpoint, or it does not fit the model.
        UserError: the configuration or the data cannot be used; the message says why.
    """
    events = events or Events()
    with config.locating():
        refuse_without_labels(config, "a float model agrees with itself; remove it to test with labels")
    dataset, model = open_inputs(config, events)
    path = config.run_folder / "checkpoints" / "best.pt"
    brought = config.load_name is None and brings_weights(config, dataset) and not path.exists()
    if config.load_name is None and not brought and not path.exists():
        raise CheckpointError(
            f"there is no trained model in {shown(path.parent)}; train it first (bitfront train), or name one with "
            "load_name=...",
            arguments=["load_name=..."],
        )
    if config.load_name is not None:
        model.load_state_dict(_loaded(config, model, events))
    elif brought:
        events.note(f"weights of {config.model}, from its library")
    else:
        model.load_state_dict(checkpoints.load_checkpoint(path, model))
        events.note(f"weights from {shown(path)}")
    device, _ = choose_device(config.accelerator)
    x, y = dataset.split(split)  # type: ignore[arg-type]
    graph = capture(model, x[:2])
    _note_outputs(graph, task_of(config), events)
    task = task_of(config)
    chunk = CHUNK if task.classifies else config.batch_size
    return measure(task, model.to(device), x, y, batch_size=chunk, outputs=graph.outputs)


def _note_outputs(graph: Graph, task: Task, events: Events) -> None:
    if note := ending_note(graph, task):
        events.note(note)
