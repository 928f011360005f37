"""Regression: a sample has one number or several, and a model gives as many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from bitfront.data.targets import NUMBERS, Targets
from bitfront.kernels.losses import Outputs
from bitfront.tasks import TASKS
from bitfront.tasks.base import Results, Task, TaskMetric, TaskSettings, mean, ratio, total


class RegressionSettings(TaskSettings):
    """``[task_settings]`` of a regression."""

    loss: Literal["mse", "mae", "huber"] = Field(
        "mse", description="what training minimises, and the metric `loss`: squared, absolute or Huber error (delta 1)"
    )


def r2(results: Results) -> float:
    """1 − Σ (y − ŷ)² / Σ (y − mean)², the mean over outputs; an output that is constant has none.

    Targets are float32, so their squares are exact in float64.
    """
    squared, targets = total(results, "squared"), total(results, "target")
    spread = total(results, "target_squared") - targets**2 / results["samples"].sum()
    shares = 1.0 - ratio(squared, np.maximum(spread, 0.0))
    known = shares[np.isfinite(shares)]
    return float(known.mean()) if len(known) else float("nan")


@TASKS.register("regression")
@dataclass(frozen=True)
class Regression(Task):
    """Numbers per sample: mean squared error, mean absolute error, R²."""

    settings: RegressionSettings

    Settings = RegressionSettings
    targets: ClassVar[Targets] = NUMBERS
    loss: ClassVar[TaskMetric] = TaskMetric(
        "loss", "", "minimize", "mean of what training minimises, over samples and outputs", partial(mean, name="loss")
    )
    metrics: ClassVar[tuple[TaskMetric, ...]] = (
        TaskMetric("mse", "", "minimize", "mean squared error over samples and outputs", partial(mean, name="squared")),
        TaskMetric(
            "mae", "", "minimize", "mean absolute error over samples and outputs", partial(mean, name="absolute")
        ),
        TaskMetric(
            "r2",
            "",
            "maximize",
            "share of the targets' variance that is explained (R²), mean over outputs; at most 1",
            r2,
            share=True,
        ),
    )

    def wrong(self, outputs: Tensor, targets: Tensor) -> str:
        """Outputs have the shape of the targets: (samples, outputs)."""
        return "" if outputs.shape == targets.shape else f"one number per target is needed: {tuple(targets.shape)}"

    def results(self, outputs: Tensor, targets: Tensor, ends: Outputs) -> Mapping[str, Tensor]:  # noqa: ARG002
        """Errors and targets, each of shape (samples, outputs)."""
        wanted = targets.double()
        error = outputs.double() - wanted
        squared, absolute = error**2, error.abs()
        huber = functional.huber_loss(outputs.double(), wanted, reduction="none")
        losses = {"mse": squared, "mae": absolute, "huber": huber}
        return {
            "loss": losses[self.settings.loss],
            "squared": squared,
            "absolute": absolute,
            "target": wanted,
            "target_squared": wanted**2,
        }

    def training_loss(self, outputs: Tensor, targets: Tensor, ends: Outputs) -> Tensor:  # noqa: ARG002
        """The mean over samples and outputs."""
        if self.settings.loss == "mae":
            return functional.l1_loss(outputs, targets)
        if self.settings.loss == "huber":
            return functional.huber_loss(outputs, targets)
        return functional.mse_loss(outputs, targets)
