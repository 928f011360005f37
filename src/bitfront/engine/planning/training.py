"""How a search trains its candidates, if a runner is configured for that: settings, samples, halving."""

from __future__ import annotations

import numpy as np

from bitfront.config import Config
from bitfront.data.base import Dataset
from bitfront.engine.evaluation.halving import Halving
from bitfront.engine.evaluation.interface import CandidateTraining
from bitfront.engine.planning.runners import Runners, chosen_samples
from bitfront.errors import ConfigError
from bitfront.metrics.configured import ConfiguredRunner
from bitfront.metrics.training import BasicTrainSettings, HalvingSettings
from bitfront.objectives import Objectives
from bitfront.training import TrainSettings


def configured_training(runners: Runners) -> tuple[ConfiguredRunner, BasicTrainSettings] | None:
    """The runner that trains candidates, with its settings; None if none is configured."""
    for runner in runners:
        if isinstance(runner.settings, BasicTrainSettings):
            return runner, runner.settings
    return None


def candidate_training(
    config: Config, runners: Runners, dataset: Dataset, objectives: Objectives
) -> CandidateTraining | None:
    """How candidates are trained; None if no runner is configured for that.

    Raises:
        ConfigError: the settings contradict each other, or other settings of the search; ``key`` names the setting.
    """
    assert config.search is not None
    training = configured_training(runners)
    if training is None:
        return None
    runner, table = training
    calibration = config.search.calibration
    done = {
        "bias_correction": calibration.bias_correction,
        "batch_norm": calibration.batch_norm,
        "rounding": calibration.rounding == "adaptive",
    }
    for key in done:
        if done[key]:
            what = "rounding = 'adaptive'" if key == "rounding" else key
            raise ConfigError(
                f"{what} is not possible if candidates are trained, because training learns what it corrects; remove "
                "it, or remove basic_train",
                key=("search", "calibration", key),
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
    )
    halving = None
    if table.halving is not None:
        halving = _halving(runners, table.halving, table.max_epochs, objectives, (*runner.where, "halving"))
    return CandidateTraining(x, y, dataset.num_classes, settings, table.init, table.float_epochs, halving)


def _halving(
    runners: Runners, table: HalvingSettings, epochs: int, objectives: Objectives, where: tuple[str, ...]
) -> Halving:
    """How candidates are compared while they are trained. Raises ConfigError."""
    produced = {metric.name: runner.kind for runner in runners for metric in runner.produces}
    if "accuracy" not in produced:
        raise ConfigError("candidates are compared by their accuracy; add sw_runner.basic_evaluation", key=where)
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
