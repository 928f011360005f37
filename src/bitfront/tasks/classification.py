"""Classification: a sample is of one class. The only task with compiled scoring and training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, get_args

from torch import Tensor

from bitfront.data.targets import CLASSES, Targets
from bitfront.kernels.losses import Outputs, of_samples, training_loss
from bitfront.tasks import TASKS
from bitfront.tasks.base import Task, TaskMetric, TaskSettings, mean


@TASKS.register("classification", "cls")
@dataclass(frozen=True)
class Classification(Task):
    """One class per sample: cross entropy, top-1 accuracy."""

    targets: ClassVar[Targets] = CLASSES
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
    classifies: ClassVar[bool] = True
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
        """Mean cross entropy."""
        return training_loss(outputs, targets, ends)


#: The task of a search that names none.
CLASSIFICATION = Classification(TaskSettings())
