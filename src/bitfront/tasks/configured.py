"""The task that a configuration names, with its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitfront.config import Config, settings_of
from bitfront.errors import ConfigError
from bitfront.registry import import_object, one_line
from bitfront.tasks import TASKS
from bitfront.tasks.base import Task, loss_function
from bitfront.tasks.distillation import without_labels


def task_of(config: Config) -> Task:
    """The task of a configuration; what takes its place if there are no labels. Raises ConfigError."""
    with config.locating():
        task = named_task(config.task, config.task_settings)
        return task if config.labels else without_labels(task)


def named_task(name: str, given: Mapping[str, Any] | None = None) -> Task:
    """The task called `name`, with the keys of ``[task_settings]``.

    Args:
        name: a registered name, or ``package.module:name`` of a class that extends ``Task``, of an instance of one, or
            of a function that returns one.
        given: key → value; None: the defaults.

    Raises:
        ConfigError: there is no such task, it is none, or a key is wrong; ``key`` is its path.
    """
    try:
        found: object = import_object(name, "task") if ":" in name else TASKS.get(name)
    except ConfigError as error:
        error.key = error.key or ("task",)
        raise
    if isinstance(found, type) and issubclass(found, Task):
        task = found(settings_of(found.Settings, given or {}, ("task_settings",)))
        if task.settings.training_loss is not None:
            loss_function(task.settings.training_loss)  # now, to see whether it is there
        return task
    if callable(found):
        found = _called(found, name)
    if not isinstance(found, Task):
        raise ConfigError(
            f"task {name!r} is a {type(found).__name__}; needed is a class that extends bitfront.tasks.base.Task, or a "
            "function that returns an instance of one",
            key=("task",),
        )
    if given:
        raise ConfigError(f"the task {name!r} comes with its settings; remove [task_settings]", key=("task_settings",))
    return found


def described(config: Config) -> dict[str, Any]:
    """The task of a configuration and its settings as JSON, for what depends on them; empty for a classification that
    is trained plainly, of which there is nothing to say, because it was the only task."""
    task = task_of(config)
    if task.plainly_trained:
        return {}
    # A search without the settings that came later goes on as it was.
    usual = {key: type(task.settings).model_fields[key].get_default() for key in task.settings.later}
    settings = {k: v for k, v in task.settings.model_dump().items() if k not in usual or v != usual[k]}
    labels = {} if config.labels else {"labels": False}
    return {"task": {"name": config.task, "settings": settings, **labels}}


def _called(factory: Any, name: str) -> object:
    try:
        return factory()
    except Exception as error:
        raise ConfigError(f"the factory {name} of the task failed: {one_line(error)}", key=("task",)) from error
