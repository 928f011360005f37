"""What a search does not do for tasks other than classification: refused before any work, in plain words."""

from __future__ import annotations

from bitfront.config import Config
from bitfront.engine.planning.runners import Runners
from bitfront.engine.planning.training import configured_training
from bitfront.errors import ConfigError
from bitfront.strategies.configured import ConfiguredStrategy
from bitfront.tasks.base import Task


def refuse_unsupported(task: Task, config: Config, strategy: ConfiguredStrategy, runners: Runners) -> None:
    """Raises ConfigError where a search needs what only a classification has; ``key`` names the setting."""
    if strategy.kind.trains_bits and task.classifies and not task.plainly_trained:
        raise ConfigError(
            f"the strategy {strategy.words} trains for the plain cross entropy, without class_weights and "
            "label_smoothing; remove them, or use another strategy",
            key=("task_settings",),
        )
    if task.classifies:
        return
    only = f"is for classification only, and task = {config.task!r}"
    if strategy.kind.trains_bits:
        raise ConfigError(
            f"the strategy {strategy.words} {only}; use another one, such as optuna or evolution, with or without "
            "sw_runner.basic_train",
            key=("search", "strategy", "name"),
        )
    for runner in runners:
        samples = runner.settings.samples
        if samples is not None and samples.auto:
            raise ConfigError(
                f"num_samples = 'auto' {only}; give a number, or leave it out to use all samples of the split",
                key=(*runner.where, "num_samples"),
            )
    training = configured_training(runners)
    if training is not None and training[1].halving is not None:
        raise ConfigError(
            f"halving {only}; remove it, and every candidate is trained to the end", key=(*training[0].where, "halving")
        )
