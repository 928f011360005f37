"""The winners of a search, trained on as what they are: quantized, with ranges that are learned.

A search compares candidates with the float model's weights, which is quick and enough to tell them apart. Some of the
front are then trained with their formats in place (quantization-aware training) and judged on the search's own samples,
and once on the test split; of each the better one is kept, as trained or as found. What was learned lies in the run
folder's ``checkpoints``: float weights, and the formats as they became.
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

#: The share of the epochs in which powers of two are learned; after them grids stay where they are.
LEARNED = 0.3


def chosen(rows: Sequence[int], count: int) -> list[int]:
    """`count` of the front's rows, from end to end of it; all if there are no more."""
    if count >= len(rows):
        return list(rows)
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, count).round().astype(int)).tolist()]


def settings_of(own: FinetuneTable, batch_size: int, optimizer: str, weight_decay: float, seed: int) -> TrainSettings:
    """How to train, given the configuration's own settings for what ``[search.finetune]`` leaves open."""
    return TrainSettings(
        max_epochs=own.max_epochs,
        batch_size=own.batch_size or batch_size,
        learning_rate=own.learning_rate,
        weight_decay=weight_decay,
        optimizer=optimizer,  # type: ignore[arg-type]
        patience=own.patience,
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
) -> Finetuned:
    """Train one candidate on, and keep what comes of it in `folder`.

    Args:
        code: shape (parameters,).
        number: of the trial.
        before: its accuracy as found, on the samples of the search.
        dataset: trained on its train split; the best epoch is that of the lowest loss on its val split.
        folder: where the checkpoint goes.
    """
    graph, formats, corrections = evaluator.parts(code)
    model, rounds = learning_model(graph, formats, corrections)

    def after(record: EpochRecord) -> None:
        events.epoch(record)
        if record.epoch == math.ceil(settings.max_epochs * LEARNED):
            settle(rounds)

    small = sum(n.operations or 0 for n in graph.nodes) * settings.batch_size < SMALL_STEP
    try:
        with one_thread() if small else contextlib.nullcontext():
            result = run_training(model, dataset, settings, device=evaluator.device, on_epoch=after)
    except EvaluationError as error:
        return Finetuned(number, {}, {}, False, 0, str(error))
    if result.stopped == "interrupted":
        raise KeyboardInterrupt
    model.load_state_dict(result.best_state)
    learned = frozen(rounds)
    state = shadow(graph, result.best_state)
    trained = evaluator.trained(state, learned)
    values = {m: float(v[0]) for m, v in trained.evaluate(ONLY_CODE[None]).values.items()}
    test: dict[str, float] = {}
    if "test" in dataset.splits:
        scores = trained.with_splits({"test": dataset.split("test")}).scores(ONLY_CODE[None], "test", None)
        test = {"loss": float(scores.loss[0]), "accuracy": int(scores.correct[0]) / scores.samples}
    kept = values["accuracy"] > before
    checkpoints.save_checkpoint(state, finetuned_weights(folder, number), {"formats": spelled(learned), "kept": kept})
    metrics = {m: None if np.isnan(v) else v for m, v in values.items()}
    return Finetuned(number, metrics, test, kept, result.best_epoch)
