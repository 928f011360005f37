"""Multilabel classification: a sample has any number of labels, none included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from bitfront.data.targets import LABELS, Targets
from bitfront.kernels.losses import Outputs
from bitfront.tasks import TASKS
from bitfront.tasks.base import Answers, Results, Task, TaskMetric, TaskSettings, mean, ratio, total
from bitfront.tasks.probabilities import of_labels


class MultilabelSettings(TaskSettings):
    """``[task_settings]`` of a multilabel classification."""

    threshold: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="a label is given where its probability is above this"
    )
    positive_weight: Annotated[float, Field(gt=0)] = Field(
        1.0, description="how much a label that is there counts in the loss of the training, against one that is not"
    )


def micro_f1(results: Results) -> float:
    """2 tp / (2 tp + fp + fn), over all samples and labels together."""
    hits, given, there = (total(results, name).sum() for name in ("hit", "given", "there"))
    return float(ratio(2 * hits, given + there))


def auc(results: Results) -> float:
    """How often a sample with a label has a higher score than one without it, ties as halves; the mean over the labels
    that some samples have and some have not. NaN where there is none."""
    areas = [_auc(score, there > 0) for score, there in zip(results["score"].T, results["there"].T, strict=True)]
    known = [area for area in areas if area is not None]
    return float(np.mean(known)) if known else float("nan")


def _auc(score: NDArray[np.float64], there: NDArray[np.bool_]) -> float | None:
    """The area under the ROC curve of one label: the statistic of Mann and Whitney, as a share."""
    with_label, without = score[there], np.sort(score[~there])
    if not len(with_label) or not len(without):
        return None
    if np.isnan(score).any():
        return float("nan")
    below, at_most = (np.searchsorted(without, with_label, side) for side in ("left", "right"))
    return float((below.sum() + at_most.sum()) / (2 * len(with_label) * len(without)))


def macro_f1(results: Results) -> float:
    """The same per label, and the mean over labels; a label that is neither there nor given counts 0."""
    hits, given, there = (total(results, name) for name in ("hit", "given", "there"))
    scores = ratio(2 * hits, given + there)
    scores[given + there == 0] = 0.0
    return float(scores.mean())


@TASKS.register("multilabel")
@dataclass(frozen=True)
class Multilabel(Task):
    """Any number of labels per sample: binary cross entropy, F1 (micro and macro), exact matches, AUC."""

    settings: MultilabelSettings

    Settings = MultilabelSettings
    targets: ClassVar[Targets] = LABELS
    answers: ClassVar[Answers] = "labels"
    endings: ClassVar[tuple[Outputs, ...]] = ("class_probabilities", "class_log_probabilities")
    loss: ClassVar[TaskMetric] = TaskMetric(
        "loss", "nats", "minimize", "mean binary cross entropy over samples and labels", partial(mean, name="loss")
    )
    metrics: ClassVar[tuple[TaskMetric, ...]] = (
        TaskMetric("micro_f1", "", "maximize", "F1 over all samples and labels together, 0 to 1", micro_f1, share=True),
        TaskMetric("macro_f1", "", "maximize", "mean of the F1 of each label, 0 to 1", macro_f1, share=True),
        TaskMetric(
            "exact_match",
            "",
            "maximize",
            "share of samples whose labels are all right, 0 to 1",
            partial(mean, name="exact"),
            share=True,
        ),
        TaskMetric(
            "auc",
            "",
            "maximize",
            "area under the ROC curve, mean over labels, 0 to 1; needs samples with and without a label",
            auc,
            share=True,
            additive=False,
        ),
    )

    def wrong(self, outputs: Tensor, targets: Tensor) -> str:
        """Outputs have the shape of the targets: (samples, labels)."""
        return "" if outputs.shape == targets.shape else f"one number per label is needed: {tuple(targets.shape)}"

    def results(self, outputs: Tensor, targets: Tensor, ends: Outputs) -> Mapping[str, Tensor]:
        """Losses and counts, each of shape (samples, labels); ``exact``: (samples,)."""
        positive, negative = of_labels(outputs.double(), ends)
        there = targets.double()
        unknown = outputs.isnan()
        given = (positive.exp() > self.settings.threshold).double()
        nan = torch.full_like(there, torch.nan)
        return {
            "loss": -torch.where(there > 0, positive, negative),
            "hit": torch.where(unknown, nan, given * there),
            "given": torch.where(unknown, nan, given),
            "there": there,
            "score": outputs.double(),
            "exact": torch.where(unknown.any(dim=1), torch.nan, (given == there).all(dim=1).double()),
        }

    def training_loss(self, outputs: Tensor, targets: Tensor, ends: Outputs) -> Tensor:
        """Mean binary cross entropy over samples and labels."""
        weight = self.settings.positive_weight
        if ends not in ("class_probabilities", "class_log_probabilities"):
            return functional.binary_cross_entropy_with_logits(
                outputs, targets, pos_weight=torch.tensor(weight, device=outputs.device)
            )
        probabilities = outputs if ends == "class_probabilities" else outputs.exp()
        return functional.binary_cross_entropy(probabilities, targets, torch.where(targets > 0, weight, 1.0))
