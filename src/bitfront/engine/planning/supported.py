"""What a search does not do for tasks other than classification: refused before any work, in plain words."""

from __future__ import annotations

from bitfront.config import Config
from bitfront.errors import ConfigError
from bitfront.strategies.configured import ConfiguredStrategy
from bitfront.tasks.base import Task
from bitfront.tasks.classification import Classification


def refuse_unsupported(task: Task, config: Config, strategy: ConfiguredStrategy) -> None:
    """Raises ConfigError where a search needs what only a classification has; ``key`` names the setting."""
    if strategy.kind.trains_bits and isinstance(task, Classification) and not task.plainly_trained:
        raise ConfigError(
            f"the strategy {strategy.words} trains for the plain cross entropy, without class_weights, "
            "label_smoothing, training_loss and more_metrics; remove them, or use another strategy",
            key=("task_settings",),
        )
    if strategy.kind.trains_bits and not task.classifies:
        raise ConfigError(
            f"the strategy {strategy.words} is for classification only, and task = {config.task!r}; use another one, "
            "such as surrogate or evolution, with or without sw_runner.basic_train",
            key=("search", "strategy", "name"),
        )
