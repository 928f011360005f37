"""Anomaly detection: a model learns to give back normal samples, and what it gives back badly is an anomaly.

The error of the reconstruction is the score. Training sees normal samples only; the others say how well the two are
told apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from bitfront.data.targets import ANOMALIES, Targets
from bitfront.kernels.losses import Outputs
from bitfront.tasks import TASKS
from bitfront.tasks.base import Results, Task, TaskMetric, TaskSettings, ratio, total
from bitfront.tasks.multilabel import auc


class AnomalyDetectionSettings(TaskSettings):
    """``[task_settings]`` of an anomaly detection."""

    error: Literal["squared", "absolute"] = Field(
        "squared", description="of a reconstruction, the mean over its values: the score, and what training minimises"
    )


def reconstruction_loss(results: Results) -> float:
    """The mean error of normal samples."""
    return float(ratio(total(results, "error"), total(results, "normal")))


def average_precision(results: Results) -> float:
    """Σ over the scores, from the highest, of precision × what recall gains; equal scores count as one. NaN where no
    sample is an anomaly."""
    score, there = results["score"][:, 0], results["there"][:, 0]
    if np.isnan(score).any() or not there.any():
        return float("nan")
    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
    hits = np.cumsum(there[order])[last]
    return float((np.diff(hits, prepend=0.0) / there.sum() * hits / (last + 1)).sum())


@TASKS.register("anomaly_detection")
@dataclass(frozen=True)
class AnomalyDetection(Task):
    """Normal samples given back by an autoencoder: reconstruction error as the score, AUC, average precision."""

    settings: AnomalyDetectionSettings

    Settings = AnomalyDetectionSettings
    targets: ClassVar[Targets] = ANOMALIES
    loss: ClassVar[TaskMetric] = TaskMetric(
        "loss", "", "minimize", "mean error of the reconstruction of normal samples", reconstruction_loss
    )
    metrics: ClassVar[tuple[TaskMetric, ...]] = (
        TaskMetric(
            "auc",
            "",
            "maximize",
            "how often an anomaly has a higher error than a normal sample, 0 to 1",
            auc,
            share=True,
            additive=False,
        ),
        TaskMetric(
            "average_precision",
            "",
            "maximize",
            "mean precision over the anomalies, from the highest error down, 0 to 1",
            average_precision,
            share=True,
            additive=False,
        ),
    )

    def wrong(self, outputs: Tensor, targets: Tensor) -> str:
        """Outputs have as many values as the samples."""
        values = targets.shape[1] - 1
        if outputs.ndim > 1 and len(outputs) == len(targets) and outputs[:1].numel() == values:
            return ""
        return f"an autoencoder gives the {values} values of each sample back"

    def results(self, outputs: Tensor, targets: Tensor, ends: Outputs) -> Mapping[str, Tensor]:  # noqa: ARG002
        """The score of each sample, and what it is: ``score`` and ``there`` of shape (samples, 1)."""
        difference = outputs.double().flatten(1) - targets[:, 1:].double()
        errors = difference.abs() if self.settings.error == "absolute" else difference**2
        score, there = errors.mean(dim=1), targets[:, 0].double()
        return {"score": score[:, None], "there": there[:, None], "error": score * (1 - there), "normal": 1 - there}

    def training_loss(self, outputs: Tensor, targets: Tensor, ends: Outputs) -> Tensor:  # noqa: ARG002
        """The mean error; a training split has normal samples only."""
        given, wanted = outputs.flatten(1), targets[:, 1:]
        return (functional.l1_loss if self.settings.error == "absolute" else functional.mse_loss)(given, wanted)
