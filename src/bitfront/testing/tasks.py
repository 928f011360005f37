"""The conformance suite of tasks: what every task must do. The tests of each task run it.

from bitfront.testing import check_task
check_task("regression", {}, outputs, targets)
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from bitfront.config import Direction
from bitfront.kernels.losses import Outputs
from bitfront.metrics.bootstrap import draws, interval
from bitfront.tasks.base import Results, Task, as_results
from bitfront.tasks.configured import named_task


def check_task(
    name: str | Task,
    settings: Mapping[str, Any],
    outputs: Tensor,
    targets: Tensor,
    ends: Outputs = "logits",
) -> Mapping[str, float]:
    """Assert that a task keeps the contract of :class:`bitfront.tasks.base.Task`.

    Args:
        name: the registered name of the task, ``package.module:name``, or the task itself.
        settings: as in ``[task_settings]``.
        outputs: plausible outputs of a model, float32, for eight samples or more.
        targets: of the same samples, as the task has them in a dataset.
        ends: what the outputs are.

    Returns:
        Metric → value, the loss among them, for further tests.

    Raises:
        AssertionError: the contract is broken; the message says how.
    """
    assert len(targets) >= 8, "eight or more samples are needed"
    task = name if isinstance(name, Task) else named_task(name, settings)
    title = type(task).__name__
    _check_facts(task, title)
    assert targets.dtype == task.targets.dtype, f"{title}: targets are {targets.dtype}, not {task.targets.dtype}"
    assert pickle.loads(pickle.dumps(task)) == task, f"{title}: pickling changes it"  # noqa: S301 (these are our bytes)
    assert not task.wrong(outputs, targets), f"{title}: {task.wrong(outputs, targets)}"
    shapes = {"one output per sample": outputs[:, :1], "no samples": outputs[:0]}
    for what, other in shapes.items():
        assert task.wrong(other, targets), f"{title}: outputs with {what} are accepted"
    results = _checked_results(task, title, outputs, targets, ends)
    values = {metric.name: metric.value(results) for metric in task.all_metrics}
    _check_metrics(task, title, results, values)
    _check_loss(task, title, outputs, targets, ends)
    return values


def _check_facts(task: Task, title: str) -> None:
    assert (type(task).__doc__ or "").strip(), f"{title} needs a docstring: `bitfront list tasks` shows its first line"
    assert task.measured, f"{title} has no metric beside its loss"
    names = [metric.name for metric in task.all_metrics]
    assert task.loss.name == "loss", f"{title}: the loss is called {task.loss.name!r}, not 'loss'"
    assert task.loss.direction == "minimize", f"{title}: a larger loss must not be better"
    assert len(set(names)) == len(names), f"{title} has a metric twice: {names}"
    for metric in task.all_metrics:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name), f"{title}: {metric.name!r} is no name for a TOML key"
        assert not metric.name.endswith(("_drop", "_increase")), f"{title}: {metric.name} looks like a constraint"
        assert metric.direction in get_args(Direction), f"{title}: {metric.name} needs a direction"
        assert metric.meaning, f"{title}: {metric.name} needs a meaning"
    try:
        task.Settings.model_validate({**task.settings.model_dump(), "no_such_key": 1})
    except ValidationError:
        return
    raise AssertionError(f"{title}: an unknown key in its settings is no error")


def _checked_results(task: Task, title: str, outputs: Tensor, targets: Tensor, ends: Outputs) -> Results:
    before = outputs.clone(), targets.clone()
    found = task.results(outputs, targets, ends)
    assert torch.equal(outputs, before[0]), f"{title}: results changes the outputs"
    assert torch.equal(targets, before[1]), f"{title}: results changes the targets"
    count = len(targets)
    for name, values in found.items():
        assert values.dtype == torch.float64, f"{title}: the result {name} is {values.dtype}, not float64"
        assert len(values) == count, f"{title}: the result {name} has {len(values)} rows for {count} samples"
    assert "samples" not in found, f"{title}: the result 'samples' is added to every task's results"
    whole = as_results([found])
    chunks = zip(torch.split(outputs, 3), torch.split(targets, 3), strict=True)
    parts = as_results([task.results(o, t, ends) for o, t in chunks])
    for name, array in whole.items():
        assert np.array_equal(array, parts[name], equal_nan=True), f"{title}: {name} of a sample depends on its batch"
    return whole


def _check_metrics(task: Task, title: str, results: Results, values: Mapping[str, float]) -> None:
    totals = {name: array.sum(axis=0, keepdims=True) for name, array in results.items()}
    twice = {name: np.concatenate([array, array]) for name, array in results.items()}
    for metric in task.all_metrics:
        value = values[metric.name]
        assert isinstance(value, float), f"{title}: {metric.name} is a {type(value).__name__}, not a float"
        assert np.isfinite(value), f"{title}: {metric.name} is {value}"
        again = metric.value(twice)
        assert np.isclose(again, value), f"{title}: {metric.name} changes if every sample is there twice: {again}"
        if metric.share:
            assert value <= 1.0, f"{title}: {metric.name} is a share, and its value is {value}"
        if metric.additive:
            summed = metric.value(totals)
            assert np.isclose(summed, value), f"{title}: {metric.name} is not additive: {summed} of sums, {value} else"
        ends = interval(draws(metric, results))
        assert ends is not None, f"{title}: {metric.name} has no interval"
        assert ends[0] <= ends[1], f"{title}: the interval of {metric.name} is {ends}"


def _check_loss(task: Task, title: str, outputs: Tensor, targets: Tensor, ends: Outputs) -> None:
    given = outputs.clone().requires_grad_()
    loss = task.training_loss(given, targets, ends)
    assert loss.ndim == 0, f"{title}: the training loss has the shape {tuple(loss.shape)}; it must be one number"
    (gradient,) = torch.autograd.grad(loss, given)
    assert bool(gradient.isfinite().all()), f"{title}: the training loss has gradients that are not finite"
    assert bool(gradient.any()), f"{title}: the training loss does not depend on the outputs"
    # A small step against the gradient makes the loss smaller.
    scale = 1e-3 / float(gradient.abs().max())
    after = task.training_loss(outputs - scale * gradient, targets, ends)
    assert float(after) < float(loss.detach()), f"{title}: a step against its gradient does not lower the training loss"
