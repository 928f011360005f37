"""Classification: a sample is of one class. The only task with compiled scoring and training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal, get_args

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from bitfront.data.targets import CLASSES, Targets
from bitfront.errors import ConfigError
from bitfront.kernels.losses import Outputs, of_samples, training_loss
from bitfront.tasks import TASKS
from bitfront.tasks.base import Answers, Results, Task, TaskMetric, TaskSettings, mean, ratio, total


class ClassificationSettings(TaskSettings):
    """``[task_settings]`` of a classification. Weights and smoothing are of the training alone: `loss` is the plain
    cross entropy."""

    later: ClassVar[tuple[str, ...]] = (*TaskSettings.later, "more_metrics")

    class_weights: list[Annotated[float, Field(ge=0)]] | None = Field(
        None, description="how much each class counts in the loss of the training; none: all the same"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="of the loss of the training: the share of a label that goes to all classes alike"
    )
    more_metrics: list[Literal["top5_accuracy", "macro_f1"]] = Field(
        [],
        description="measured beside accuracy: `top5_accuracy`, for six classes or more, and `macro_f1`, the mean of "
        "the F1 of each class. Candidates are then run and trained one by one",
    )


def macro_f1(results: Results) -> float:
    """The mean over classes of 2 tp / (2 tp + fp + fn); classes that are neither there nor given do not count."""
    hits, given, there = (total(results, name) for name in ("hit", "given", "there"))
    scores = ratio(2 * hits, given + there)
    known = scores[(given + there > 0) | np.isnan(given)]
    return float(known.mean())


#: The metrics that a file may ask for beside accuracy.
MORE = {
    "top5_accuracy": TaskMetric(
        "top5_accuracy",
        "",
        "maximize",
        "share of samples whose label is among the five largest outputs, 0 to 1",
        partial(mean, name="among"),
        share=True,
    ),
    "macro_f1": TaskMetric("macro_f1", "", "maximize", "mean of the F1 of each class, 0 to 1", macro_f1, share=True),
}
#: Among so many of the largest outputs the label must be.
TOP = 5


@TASKS.register("classification", "cls")
@dataclass(frozen=True)
class Classification(Task):
    """One class per sample: cross entropy, top-1 accuracy."""

    settings: ClassificationSettings

    Settings = ClassificationSettings
    targets: ClassVar[Targets] = CLASSES
    answers: ClassVar[Answers] = "classes"
    loss: ClassVar[TaskMetric] = TaskMetric(
        "loss", "nats", "minimize", "mean cross entropy over the evaluation samples", partial(mean, name="loss")
    )
    metrics: ClassVar[tuple[TaskMetric, ...]] = (
        TaskMetric(
            "accuracy",
            "",
            "maximize",
            "top-1 accuracy over the evaluation samples, 0 to 1",
            partial(mean, name="right"),
            share=True,
        ),
    )
    endings: ClassVar[tuple[Outputs, ...]] = get_args(Outputs)

    @property
    def measured(self) -> tuple[TaskMetric, ...]:
        """The accuracy, and what the settings ask for."""
        return (*self.metrics, *(MORE[name] for name in dict.fromkeys(self.settings.more_metrics)))

    def unfit(self, outputs: int) -> str:
        """Five of five classes have every label among them; class weights are one per class."""
        if "top5_accuracy" in self.settings.more_metrics and outputs <= TOP:
            return f"more_metrics: top5_accuracy is for six classes or more, and the data has {outputs}; remove it"
        given = self.settings.class_weights
        if given is not None and len(given) != outputs:
            return f"there are {len(given)} class weights and {outputs} classes; give one for each"
        return ""

    def wrong(self, outputs: Tensor, targets: Tensor) -> str:
        """Outputs are (samples, classes)."""
        classes = int(targets.max()) + 1
        if outputs.ndim == 2 and len(outputs) == len(targets) and outputs.shape[1] >= classes:
            return ""
        return f"logits of shape ({len(targets)}, {classes}) are needed"

    def results(self, outputs: Tensor, targets: Tensor, ends: Outputs) -> Mapping[str, Tensor]:
        """``loss``: cross entropy; ``right``: 1 where the largest output is the label's."""
        loss, right = of_samples(outputs.float().t().unsqueeze(0), targets, ends)
        found = {"loss": loss[0].double(), "right": right[0].double()}
        unknown = torch.where(outputs.isnan().any(dim=1), torch.nan, 0.0).double()
        if "top5_accuracy" in self.settings.more_metrics:
            # Of equal outputs the first is the larger one, as in the accuracy.
            label, places = outputs.gather(1, targets[:, None]), torch.arange(outputs.shape[1])
            before = (outputs > label) | ((outputs == label) & (places < targets[:, None]))
            found["among"] = (before.sum(dim=1) < TOP).double() + unknown
        if "macro_f1" in self.settings.more_metrics:
            there, given = (
                functional.one_hot(of, outputs.shape[1]).double() for of in (targets, outputs.argmax(dim=1))
            )
            given += unknown[:, None]
            found |= {"there": there, "given": given, "hit": there * given}
        return found

    def training_loss(self, outputs: Tensor, targets: Tensor, ends: Outputs) -> Tensor:
        """Mean cross entropy, weighted by class, with label smoothing."""
        if self.settings.class_weights is None and not self.settings.label_smoothing:
            return training_loss(outputs, targets, ends)
        given = self.settings.class_weights
        if given is not None and len(given) != outputs.shape[1]:
            raise ConfigError(
                f"there are {len(given)} class weights and {outputs.shape[1]} classes; give one for each",
                key=("task_settings", "class_weights"),
            )
        if ends not in ("logits", "probabilities", "log_probabilities"):
            raise ConfigError(
                "the model gives one probability per class: class_weights and label_smoothing are for logits and for "
                "probabilities that sum to 1; remove them, or the last sigmoid of the model",
                key=("task_settings",),
            )
        weight = None if given is None else torch.tensor(given, dtype=outputs.dtype, device=outputs.device)
        # Logarithms of probabilities are logits, too: their exponentials sum to 1.
        logits = outputs.clamp(min=2.0**-126).log() if ends == "probabilities" else outputs
        smoothing = self.settings.label_smoothing
        return functional.cross_entropy(logits, targets, weight, label_smoothing=smoothing)

    @property
    def classifies(self) -> bool:
        """Whether nothing is measured but this: a class that extends this one has more to say than what is compiled."""
        return type(self) is Classification and not self.settings.more_metrics

    @property
    def plainly_trained(self) -> bool:
        """Whether training minimises the plain cross entropy, which alone is compiled."""
        settings = self.settings
        plain = settings.class_weights is None and not settings.label_smoothing and settings.training_loss is None
        return self.classifies and plain


#: The task of a search that names none.
CLASSIFICATION = Classification(ClassificationSettings())
