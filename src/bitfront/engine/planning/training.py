"""How a search trains its candidates, where a runner asks for it: settings, samples, halving."""

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


def asked_training(runners: Runners) -> tuple[ConfiguredRunner, BasicTrainSettings] | None:
    """The runner that asks for candidates to be trained, with its settings; None where none does."""
    for runner in runners:
        if isinstance(runner.settings, BasicTrainSettings):
            return runner, runner.settings
    return None


def candidate_training(
    config: Config, runners: Runners, dataset: Dataset, objectives: Objectives
) -> CandidateTraining | None:
    """How candidates are trained; None where no runner asks for it."""
    assert config.search is not None
    found = asked_training(runners)
    if found is None:
        return None
    runner, own = found
    calibration = config.search.calibration
    for key in ("bias_correction", "batch_norm"):
        if getattr(calibration, key):
            raise ConfigError(
                f"{key} has no place where candidates are trained: what it corrects is learned in training; leave "
                "it out, or basic_train",
                key=("search", "calibration", key),
            )
    for other in runners:
        samples = other.settings.samples
        if samples is not None and samples.split == "train":
            raise ConfigError(
                "candidates are trained on the training split, so they must be evaluated on another: val_dataloader",
                key=(*other.where, "data_loader"),
            )
    x, y = chosen_samples(dataset, "train", own.num_samples, config.seed)
    settings = TrainSettings(
        max_epochs=own.max_epochs,
        batch_size=own.batch_size or config.batch_size,
        learning_rate=own.learning_rate or config.learning_rate,
        weight_decay=config.weight_decay if own.weight_decay is None else own.weight_decay,
        optimizer=own.optimizer or config.training_optimizer,
        seed=config.seed,
    )
    halving = None
    if own.halving is not None:
        halving = _halving(runners, own.halving, own.max_epochs, objectives, (*runner.where, "halving"))
    return CandidateTraining(x, y, dataset.num_classes, settings, own.init, own.float_epochs, halving)


def _halving(
    runners: Runners, own: HalvingSettings, epochs: int, objectives: Objectives, where: tuple[str, ...]
) -> Halving:
    """How candidates are compared while they are trained."""
    produced = {metric.name: runner.kind for runner in runners for metric in runner.produces}
    if "accuracy" not in produced:
        raise ConfigError("candidates are compared by their accuracy; add sw_runner.basic_evaluation", key=where)
    if own.rungs != sorted(set(own.rungs)) or not 0 < own.rungs[0] <= own.rungs[-1] < epochs:
        raise ConfigError(
            f"{own.rungs} is not possible; allowed: ascending whole numbers from 1 to {epochs - 1}, before max_epochs",
            key=(*where, "rungs"),
        )
    # A negative scale turns a metric round.
    costs = tuple(
        (p.metric, (1.0 if (objectives.summed or p.direction) == "minimize" else -1.0) * np.sign(p.scale))
        for p in objectives.parts
        if produced[p.metric].closed_form
    )
    return Halving(tuple(own.rungs), own.keep, own.cohort, costs)
