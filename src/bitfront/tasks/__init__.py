"""Tasks: what a sample is, how good an answer is, and what is trained on. One file per task.

A task says which targets its samples have, how the outputs of a model become a loss and results per sample, which
metrics follow from them, and what the training minimises. Everything else asks the task, and knows of no classes.

To add one, write a file here with a class that extends ``Task`` (``tasks/base.py`` says what it must do), and decorate
it with ``@TASKS.register("name")``; ``bitfront list tasks`` shows the first line of its docstring. Run
``bitfront.testing.check_task`` on it in ``tests/tasks``. Nothing else changes. Third parties register through the
entry-point group ``bitfront.tasks``, or name theirs in a file: ``task = "package.module:MyTask"``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitfront.registry import Registry

if TYPE_CHECKING:
    from bitfront.tasks.base import Task

TASKS: Registry[type[Task]] = Registry("task", "bitfront.tasks")
