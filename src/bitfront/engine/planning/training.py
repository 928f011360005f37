"""How a search trains its candidates, if a runner is configured for that: settings, samples, halving."""

from __future__ import annotations

import numpy as np

from bitfront.config import CalibrationTable, Config
from bitfront.data.base import Dataset
from bitfront.engine.evaluation.halving import Halving
from bitfront.engine.evaluation.interface import CandidateTraining
from bitfront.engine.planning.runners import Runners, chosen_samples
from bitfront.errors import ConfigError
from bitfront.metrics.configured import ConfiguredRunner
from bitfront.metrics.training import BasicTrainSettings, HalvingSettings
from bitfront.objectives import Objectives
from bitfront.optimizer import SchedulerName
from bitfront.tasks.base import Task
from bitfront.training import TrainSettings

#: Fewer samples have no variance.
LEAST_SAMPLES = 2


def configured_training(runners: Runners) -> tuple[ConfiguredRunner, BasicTrainSettings] | None:
    """The runner that trains candidates, with its settings; None if none is configured."""
    for runner in runners:
        if isinstance(runner.settings, BasicTrainSettings):
            return runner, runner.settings
    return None


def candidate_training(
    config: Config, runners: Runners, dataset: Dataset, objectives: Objectives, task: Task
) -> CandidateTraining | None:
    """How candidates are trained; None if no runner is configured for that.

    Raises:
        ConfigError: the settings contradict each other, or other settings of the search; ``key`` names the setting.
    """
    assert config.search is not None
    training, calibration = configured_training(runners), config.search.calibration
    if calibration.integer_bias and (training is not None or config.search.finetune.trials):
        raise ConfigError(
            "integer_bias = true is for biases that no training changes afterwards; remove it, or remove basic_train "
            "and [search.finetune]",
            key=("search", "calibration", "integer_bias"),
        )
    if training is not None or config.search.finetune.trials:
        _check_samples(calibration)
    if training is None:
        return None
    runner, table = training
    if calibration.rounding == "adaptive":
        raise ConfigError(
            "rounding = 'adaptive' is not possible if candidates are trained: it learns to keep the outputs of the "
            "float weights, and training changes those weights and learns their rounding with them; remove it, or "
            "remove basic_train",
            key=("search", "calibration", "rounding"),
        )
    if calibration.equalisation and table.init == "fresh":
        raise ConfigError(
            "equalisation = true is for weights that a candidate starts from, and with init = 'fresh' they are drawn "
            "anew; remove one of them",
            key=("search", "calibration", "equalisation"),
        )
    if config.search.fold_batch_norm and table.init == "fresh":
        raise ConfigError(
            "fold_batch_norm = true puts the statistics of the trained model into weights that a candidate starts "
            "from, and with init = 'fresh' they are drawn anew; remove one of them",
            key=("search", "fold_batch_norm"),
        )
    for other in runners:
        samples = other.settings.samples
        if samples is not None and samples.split == "train":
            raise ConfigError(
                "candidates are trained on the training split, so they must be evaluated on another one: "
                "val_dataloader",
                key=(*other.where, "data_loader"),
            )
    x, y = chosen_samples(dataset, "train", table.num_samples, config.seed)
    settings = TrainSettings(
        max_epochs=table.max_epochs,
        batch_size=table.batch_size or config.batch_size,
        learning_rate=table.learning_rate or config.learning_rate,
        weight_decay=config.weight_decay if table.weight_decay is None else table.weight_decay,
        optimizer=table.optimizer or config.training_optimizer,
        seed=config.seed,
        scheduler=_scheduler(table, runner.where),
        warmup_steps=table.num_warmup_steps,
        accumulation=table.gradient_accumulation_steps,
    )
    halving = None
    if table.halving is not None:
        where = (*runner.where, "halving")
        halving = _halving(runners, table.halving, table.max_epochs, objectives, task.leading.name, where)
    classes, inputs = dataset.num_classes, dataset.inputs
    return CandidateTraining(x, y, classes, settings, table.init, table.float_epochs, halving, inputs=inputs)


def _scheduler(table: BasicTrainSettings, where: tuple[str, ...]) -> SchedulerName | None:
    """The scheduler of the learning rate. Raises ConfigError for a warm-up that nothing has."""
    if table.num_warmup_steps and table.lr_scheduler in (None, "constant"):
        raise ConfigError(
            f"{table.num_warmup_steps} steps of warm-up belong to a scheduler that has one; add lr_scheduler = "
            "'cosine', 'linear' or 'constant_with_warmup'",
            key=(*where, "num_warmup_steps"),
        )
    return table.lr_scheduler


def _check_samples(calibration: CalibrationTable) -> None:
    """Raises ConfigError where batch norms are to get new statistics from too few samples."""
    if calibration.batch_norm and calibration.num_samples < LEAST_SAMPLES:
        raise ConfigError(
            f"batch_norm = true needs {LEAST_SAMPLES} samples or more where candidates are trained: statistics are "
            "estimated anew after that, and one sample has no variance",
            key=("search", "calibration", "num_samples"),
        )


def _halving(
    runners: Runners,
    table: HalvingSettings,
    epochs: int,
    objectives: Objectives,
    leading: str,
    where: tuple[str, ...],
) -> Halving:
    """How candidates are compared while they are trained. Raises ConfigError."""
    produced = {metric.name: runner.kind for runner in runners for metric in runner.produces}
    if leading not in produced:
        raise ConfigError(f"candidates are compared by their {leading}; add sw_runner.basic_evaluation", key=where)
    rungs = table.rungs
    if rungs != sorted(set(rungs)) or not 0 < rungs[0] <= rungs[-1] < epochs:
        raise ConfigError(
            f"{rungs} is not possible; allowed: ascending whole numbers from 1 to {epochs - 1}, before max_epochs",
            key=(*where, "rungs"),
        )
    # A negative scale reverses a metric.
    costs = tuple(
        (p.metric, (1.0 if (objectives.summed or p.direction) == "minimize" else -1.0) * np.sign(p.scale))
        for p in objectives.parts
        if produced[p.metric].closed_form
    )
    return Halving(tuple(rungs), table.keep, table.cohort, costs)
