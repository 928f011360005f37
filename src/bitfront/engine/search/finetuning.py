"""Fine-tuning: some trials of the front are trained further with their formats in place and with learned ranges.

A search compares candidates with the float model's weights, which is fast and enough to order them. Some trials of the
front are then trained with their formats (quantization-aware training), and evaluated on the samples of the search and
once on the test split. A trial keeps the trained weights if they are more accurate. Float weights and trained formats
are stored in ``checkpoints`` in the run folder.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bitfront import checkpoints
from bitfront.config import FinetuneTable
from bitfront.data.base import Dataset
from bitfront.engine.evaluation.after_training import with_new_statistics
from bitfront.engine.evaluation.fixed import one_thread
from bitfront.engine.evaluation.interface import ONLY_CODE, ModelEvaluator
from bitfront.engine.search.weights import SMALL_STEP
from bitfront.engine.storage.folder import finetuned_weights
from bitfront.engine.storage.records import Finetuned
from bitfront.errors import EvaluationError
from bitfront.events import Events
from bitfront.formats.spelling import spelled
from bitfront.spaces.base import Codes
from bitfront.training import EpochRecord, TrainSettings
from bitfront.training import train as run_training
from bitfront.transforms.learned import frozen, learning_model, settle, shadow

#: The share of the epochs in which steps that are powers of two are learned; after that they are fixed.
LEARNED = 0.3


def chosen(rows: Sequence[int], count: int) -> list[int]:
    """`count` of the front's rows, evenly spread over the front with both ends; all if there are no more."""
    if count >= len(rows):
        return list(rows)
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, count).round().astype(int)).tolist()]


def settings_of(table: FinetuneTable, batch_size: int, optimizer: str, weight_decay: float, seed: int) -> TrainSettings:
    """The settings of the training.

    Args:
        table: the table ``[search.finetune]``.
        batch_size: used if the table has none.
        optimizer, weight_decay, seed: those of the configuration.
    """
    return TrainSettings(
        max_epochs=table.max_epochs,
        batch_size=table.batch_size or batch_size,
        learning_rate=table.learning_rate,
        weight_decay=weight_decay,
        optimizer=optimizer,  # type: ignore[arg-type]
        patience=table.patience,
        seed=seed,
    )


def finetune(
    evaluator: ModelEvaluator,
    code: Codes,
    number: int,
    before: float,
    dataset: Dataset,
    settings: TrainSettings,
    folder: Path,
    events: Events,
    reestimates: bool = False,
) -> Finetuned:
    """Fine-tune one candidate, and store its weights and formats in `folder`.

    Args:
        evaluator: an evaluator whose model has the weights of the candidate.
        code: its code there, int64, shape (parameters,).
        number: the number of the trial.
        before: its accuracy, or what leads in another task, before fine-tuning, on the samples of the search.
        dataset: it is trained on the train split; the best epoch has the lowest loss on the val split.
        settings: the settings of the training.
        folder: the run folder.
        events: receives the progress.
        reestimates: estimate the statistics of batch norms anew, with the trained weights and formats.

    Raises:
        KeyboardInterrupt: training was interrupted.
    """
    graph, formats, corrections = evaluator.parts(code)
    model, rounds = learning_model(graph, formats, corrections)

    def after(record: EpochRecord) -> None:
        events.epoch(record)
        if record.epoch == math.ceil(settings.max_epochs * LEARNED):
            settle(rounds)

    small = sum(n.operations or 0 for n in graph.nodes) * settings.batch_size < SMALL_STEP
    task, outputs = evaluator.job.task, graph.outputs
    try:
        with one_thread() if small else contextlib.nullcontext():
            result = run_training(
                model, dataset, settings, device=evaluator.device, outputs=outputs, task=task, on_epoch=after
            )
    except EvaluationError as error:
        return Finetuned(number, {}, {}, False, 0, str(error))
    if result.stopped == "interrupted":
        raise KeyboardInterrupt
    model.load_state_dict(result.best_state)
    learned, state = frozen(rounds), shadow(graph, result.best_state)
    if reestimates:
        state = with_new_statistics(evaluator, state, learned, settings.batch_size)
    trained = evaluator.trained(state, learned)
    values = {m: float(v[0]) for m, v in trained.evaluate(ONLY_CODE[None]).values.items()}
    test: dict[str, float] = {}
    if "test" in dataset.splits:
        scores = trained.with_splits({"test": dataset.split("test")}).scores(ONLY_CODE[None], "test", None)
        test = {name: float(found[0]) for name, found in scores.of_task.items()}
    kept = task.leading.better(values[task.leading.name], than=before)
    checkpoints.save_checkpoint(state, finetuned_weights(folder, number), {"formats": spelled(learned), "kept": kept})
    metrics = {m: None if np.isnan(v) else v for m, v in values.items()}
    return Finetuned(number, metrics, test, kept, result.best_epoch)
