"""Distillation: what a sample is where the data has no labels. The float model's outputs take their place.

``labels = false`` makes one of these of a task, by what the outputs of its models say: one of several classes, labels
that are there or not, or numbers. Answers are compared with those of the float model, and training minimises the
Kullback-Leibler divergence from its outputs, or the squared difference where they are numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, get_args

import torch
from torch import Tensor
from torch.nn import functional

from bitfront.data.targets import OUTPUTS, TOKEN_OUTPUTS, Targets
from bitfront.errors import ConfigError
from bitfront.kernels.losses import Outputs
from bitfront.tasks.base import Results, Task, TaskMetric, mean, ratio, total
from bitfront.tasks.probabilities import of_classes, of_labels
from bitfront.tasks.regression import r2


def per_place(results: Results, name: str) -> float:
    """The mean of a result over pixels or tokens."""
    return float(ratio(total(results, name), total(results, "places")))


#: Settings of tasks that are not about labels.
EFFECTIVE = ("output", "num_outputs", "training_loss", "threshold")
DIVERGENCE = "mean Kullback-Leibler divergence of the answers from the float model's"


@dataclass(frozen=True)
class Distillation(Task):
    """A task without labels.

    Attributes:
        of: the task with labels.
    """

    of: Task

    targets: ClassVar[Targets] = OUTPUTS
    endings: ClassVar[tuple[Outputs, ...]] = get_args(Outputs)

    def wrong(self, outputs: Tensor, targets: Tensor) -> str:
        """Outputs have the shape of the float model's."""
        return "" if outputs.shape == targets.shape else f"the float model's have the shape {tuple(targets.shape)}"


@dataclass(frozen=True)
class DistilledClasses(Distillation):
    """One class per sample, pixel or token: divergence, share of answers that are the float model's."""

    #: The axis of the classes.
    axis: ClassVar[int] = 1
    loss: ClassVar[TaskMetric] = TaskMetric("loss", "nats", "minimize", DIVERGENCE, partial(per_place, name="loss"))
    metrics: ClassVar[tuple[TaskMetric, ...]] = (
        TaskMetric(
            "agreement",
            "",
            "maximize",
            "share of answers that are the float model's, 0 to 1",
            partial(per_place, name="same"),
            share=True,
        ),
    )

    def results(self, outputs: Tensor, targets: Tensor, ends: Outputs) -> Mapping[str, Tensor]:
        """Sums over the pixels or tokens of a sample, each of shape (samples,)."""
        given, wanted = outputs.double(), targets.double()
        lost = _divergence(given, wanted, self._ends(ends), self.axis)
        same = (outputs.argmax(dim=self.axis) == targets.argmax(dim=self.axis)).double()
        unknown, places = torch.zeros_like(same), torch.ones_like(same)
        unknown[given.isnan().any(dim=self.axis)] = torch.nan
        return {
            name: of.reshape(len(outputs), -1).sum(dim=1)
            for name, of in (("loss", lost + unknown), ("same", same + unknown), ("places", places))
        }

    def training_loss(self, outputs: Tensor, targets: Tensor, ends: Outputs) -> Tensor:
        """The mean divergence over samples, pixels or tokens."""
        return _divergence(outputs, targets, self._ends(ends), self.axis).mean()

    def _ends(self, ends: Outputs) -> Outputs:
        return ends if ends in self.endings else "logits"


@dataclass(frozen=True)
class DistilledTokens(DistilledClasses):
    """One token at each place: divergence, share of answers that are the float model's."""

    axis: ClassVar[int] = 2
    targets: ClassVar[Targets] = TOKEN_OUTPUTS
    endings: ClassVar[tuple[Outputs, ...]] = ()


@dataclass(frozen=True)
class DistilledLabels(Distillation):
    """Labels that are there or not: divergence, share of labels that are the float model's."""

    endings: ClassVar[tuple[Outputs, ...]] = ("class_probabilities", "class_log_probabilities")
    loss: ClassVar[TaskMetric] = TaskMetric("loss", "nats", "minimize", DIVERGENCE, partial(mean, name="loss"))
    metrics: ClassVar[tuple[TaskMetric, ...]] = (
        TaskMetric(
            "agreement",
            "",
            "maximize",
            "share of labels that are given as by the float model, 0 to 1",
            partial(mean, name="same"),
            share=True,
        ),
    )

    def results(self, outputs: Tensor, targets: Tensor, ends: Outputs) -> Mapping[str, Tensor]:
        """Per label: shape (samples, labels)."""
        given, wanted = outputs.double(), targets.double()
        threshold = getattr(self.settings, "threshold", 0.5)
        there = [of_labels(of, ends)[0].exp() > threshold for of in (given, wanted)]
        same = (there[0] == there[1]).double()
        same[given.isnan()] = torch.nan
        return {"loss": _of_each(given, wanted, ends), "same": same}

    def training_loss(self, outputs: Tensor, targets: Tensor, ends: Outputs) -> Tensor:
        """The mean divergence over samples and labels."""
        return _of_each(outputs, targets, ends).mean()


@dataclass(frozen=True)
class DistilledNumbers(Distillation):
    """Numbers: mean squared difference from the float model's, share of their variance that is kept."""

    endings: ClassVar[tuple[Outputs, ...]] = ()
    loss: ClassVar[TaskMetric] = TaskMetric(
        "loss", "", "minimize", "mean squared difference from the float model's outputs", partial(mean, name="squared")
    )
    metrics: ClassVar[tuple[TaskMetric, ...]] = (
        TaskMetric(
            "agreement",
            "",
            "maximize",
            "share of the variance of the float model's outputs that is kept (R² against them), mean over outputs; at "
            "most 1",
            r2,
            share=True,
        ),
    )

    def results(self, outputs: Tensor, targets: Tensor, ends: Outputs) -> Mapping[str, Tensor]:  # noqa: ARG002
        """Differences and the float model's outputs, each of shape (samples, outputs)."""
        wanted = targets.double().flatten(1)
        squared = (outputs.double().flatten(1) - wanted) ** 2
        return {"squared": squared, "target": wanted, "target_squared": wanted**2}

    def training_loss(self, outputs: Tensor, targets: Tensor, ends: Outputs) -> Tensor:  # noqa: ARG002
        """The mean squared difference."""
        return functional.mse_loss(outputs, targets)


def without_labels(task: Task) -> Task:
    """The task that takes its place where there are no labels; itself if it needs none.

    Raises:
        ConfigError: a setting is about labels.
    """
    if isinstance(task, Distillation):
        return task
    for key, field in type(task.settings).model_fields.items():
        unset = field.is_required() or getattr(task.settings, key) == field.get_default(call_default_factory=True)
        if key not in EFFECTIVE and not unset:
            raise ConfigError(
                f"{key} is about labels, and labels = false; remove one of them", key=("task_settings", key)
            )
    kinds: Mapping[str, type[Distillation]] = {
        "classes": DistilledClasses,
        "tokens": DistilledTokens,
        "labels": DistilledLabels,
        "numbers": DistilledNumbers,
    }
    return kinds[task.answers](task.settings, task)


def _divergence(outputs: Tensor, targets: Tensor, ends: Outputs, axis: int) -> Tensor:
    """Σ p (log p − log q) over the classes: q of the outputs, p of the targets; the axis of the classes is gone."""
    if ends in ("class_probabilities", "class_log_probabilities"):
        return _of_each(outputs, targets, ends).mean(dim=axis)
    wanted, given = (of_classes(of, ends, axis) for of in (targets, outputs))
    return (wanted.exp() * (wanted - given)).sum(dim=axis).clamp(min=0.0)


def _of_each(outputs: Tensor, targets: Tensor, ends: Outputs) -> Tensor:
    """The divergence of each label by itself, of the shape of the outputs."""
    (yes, no), (wanted, otherwise) = (of_labels(of, ends) for of in (outputs, targets))
    return (wanted.exp() * (wanted - yes) + otherwise.exp() * (otherwise - no)).clamp(min=0.0)
