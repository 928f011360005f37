"""Classification: a sample is of one class. The only task with compiled scoring and training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, get_args

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from bitfront.data.targets import CLASSES, Targets
from bitfront.errors import ConfigError
from bitfront.kernels.losses import Outputs, of_samples, training_loss
from bitfront.tasks import TASKS
from bitfront.tasks.base import Answers, Task, TaskMetric, TaskSettings, mean


class ClassificationSettings(TaskSettings):
    """``[task_settings]`` of a classification. Both are of the training alone: `loss` is the plain cross entropy."""

    class_weights: list[Annotated[float, Field(ge=0)]] | None = Field(
        None, description="how much each class counts in the loss of the training; none: all the same"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="of the loss of the training: the share of a label that goes to all classes alike"
    )


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

    def wrong(self, outputs: Tensor, targets: Tensor) -> str:
        """Outputs are (samples, classes)."""
        classes = int(targets.max()) + 1
        if outputs.ndim == 2 and len(outputs) == len(targets) and outputs.shape[1] >= classes:
            return ""
        return f"logits of shape ({len(targets)}, {classes}) are needed"

    def results(self, outputs: Tensor, targets: Tensor, ends: Outputs) -> Mapping[str, Tensor]:
        """``loss``: cross entropy; ``right``: 1 where the largest output is the label's."""
        loss, right = of_samples(outputs.float().t().unsqueeze(0), targets, ends)
        return {"loss": loss[0].double(), "right": right[0].double()}

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
        return type(self) is Classification

    @property
    def plainly_trained(self) -> bool:
        """Whether training minimises the plain cross entropy, which alone is compiled."""
        return self.classifies and self.settings.class_weights is None and not self.settings.label_smoothing


#: The task of a search that names none.
CLASSIFICATION = Classification(ClassificationSettings())
