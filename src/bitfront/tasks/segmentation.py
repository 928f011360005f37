"""Semantic segmentation: every pixel of a sample is of one class, or has no label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from bitfront.data.targets import MASKS, NO_LABEL, Targets
from bitfront.kernels.losses import Outputs
from bitfront.tasks import TASKS
from bitfront.tasks.base import Answers, Results, Task, TaskMetric, TaskSettings, ratio, total
from bitfront.tasks.probabilities import of_classes


class SegmentationSettings(TaskSettings):
    """``[task_settings]`` of a segmentation."""

    ignore_index: int | None = Field(
        None, description="a class that counts neither in the metrics nor in the loss, beside pixels without a label"
    )
    class_weights: list[Annotated[float, Field(ge=0)]] | None = Field(
        None, description="how much each class counts in the loss of the training; none: all the same"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="of the loss of the training: the share of a label that goes to all classes alike"
    )


def miou(results: Results) -> float:
    """Mean over classes of hits / (given + there − hits); classes that are neither given nor there do not count."""
    hits, given, there = (total(results, name) for name in ("hit", "given", "there"))
    shares = ratio(hits, given + there - hits)
    known = shares[~np.isnan(shares) | np.isnan(hits)]
    return float(known.mean()) if len(known) else float("nan")


def pixel_accuracy(results: Results) -> float:
    """Hits / pixels with a label."""
    return float(ratio(total(results, "hit").sum(), total(results, "there").sum()))


def loss_per_pixel(results: Results) -> float:
    """The mean over pixels with a label."""
    return float(ratio(total(results, "loss"), total(results, "there").sum()))


@TASKS.register("segmentation")
@dataclass(frozen=True)
class Segmentation(Task):
    """One class per pixel: cross entropy, mean intersection over union, share of right pixels."""

    settings: SegmentationSettings

    Settings = SegmentationSettings
    targets: ClassVar[Targets] = MASKS
    answers: ClassVar[Answers] = "classes"
    endings: ClassVar[tuple[Outputs, ...]] = ("probabilities", "log_probabilities")
    loss: ClassVar[TaskMetric] = TaskMetric(
        "loss", "nats", "minimize", "mean cross entropy over pixels with a label", loss_per_pixel
    )
    metrics: ClassVar[tuple[TaskMetric, ...]] = (
        TaskMetric("miou", "", "maximize", "mean intersection over union of the classes, 0 to 1", miou, share=True),
        TaskMetric(
            "pixel_accuracy",
            "",
            "maximize",
            "share of pixels with a label that are right, 0 to 1",
            pixel_accuracy,
            share=True,
        ),
    )

    def unfit(self, outputs: int) -> str:
        """Class weights are one per class."""
        given = self.settings.class_weights
        fits = given is None or len(given) == outputs
        return "" if fits else f"there are {len(given or ())} class weights and {outputs} classes; give one for each"

    def wrong(self, outputs: Tensor, targets: Tensor) -> str:
        """Outputs are (samples, classes, height, width), with the height and width of the targets."""
        classes = max(2, int(targets.max()) + 1)
        weights = self.settings.class_weights
        if outputs.ndim != 4 or outputs.shape[1] < classes or (len(outputs), *outputs.shape[2:]) != targets.shape:
            samples, *size = targets.shape
            return f"logits of shape {(samples, classes, *size)} are needed"
        if weights is not None and len(weights) != outputs.shape[1]:
            return f"task_settings.class_weights has {len(weights)} numbers, and one per class is needed"
        return ""

    def _wanted(self, targets: Tensor) -> Tensor:
        """The targets, with ``NO_LABEL`` wherever a pixel does not count."""
        ignored = self.settings.ignore_index
        return targets if ignored is None else torch.where(targets == ignored, NO_LABEL, targets)

    def results(self, outputs: Tensor, targets: Tensor, ends: Outputs) -> Mapping[str, Tensor]:
        """``loss``: the sum over the pixels of a sample; counts of pixels per class: (samples, classes)."""
        wanted, classes = self._wanted(targets), outputs.shape[1]
        counts = (wanted != NO_LABEL).double()
        losses = functional.nll_loss(
            of_classes(outputs.double(), ends), wanted, ignore_index=NO_LABEL, reduction="none"
        )
        # A pixel of which one output is not a number is not known.
        unknown = torch.where((outputs.isnan().any(dim=1) & (counts > 0)).flatten(1).any(dim=1), torch.nan, 0.0)
        answers = outputs.max(dim=1).indices  # the same as argmax, and many times as fast along this axis
        there, given, hit = (
            torch.stack([((of == c) * counts).flatten(1).sum(dim=1) for c in range(classes)], dim=1)
            for of in (wanted, answers, torch.where(answers == wanted, answers, NO_LABEL))
        )
        lost = losses.flatten(1).sum(dim=1) + unknown
        return {"loss": lost, "hit": hit + unknown[:, None], "given": given + unknown[:, None], "there": there}

    def training_loss(self, outputs: Tensor, targets: Tensor, ends: Outputs) -> Tensor:
        """Cross entropy, the mean over pixels with a label, weighted by class; with label smoothing."""
        given = self.settings.class_weights
        weight = None if given is None else torch.tensor(given, dtype=outputs.dtype, device=outputs.device)
        # The cross entropy of log-probabilities is that of the logits: their exponentials sum to 1.
        logits = outputs if ends not in self.endings else of_classes(outputs, ends)
        smoothing = self.settings.label_smoothing
        wanted = self._wanted(targets)
        return functional.cross_entropy(logits, wanted, weight, ignore_index=NO_LABEL, label_smoothing=smoothing)
