"""Loss and accuracy on fixed samples of a split."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, cast

import numpy as np
from pydantic import Field

from bitfront.metrics import RUNNERS
from bitfront.metrics.base import Metric, Runner, RunnerSettings, Side, Subject, Values
from bitfront.spaces.base import Codes

#: Two-sided 95 % quantile of the normal distribution.
Z95 = 1.959963984540054


class EvaluationSettings(RunnerSettings):
    """``[search.strategy.sw_runner.basic_evaluation]``."""

    # The test split is missing on purpose: it is touched once, at the end, by the front alone.
    data_loader: Literal["val_dataloader", "train_dataloader", "val", "train"] = Field(
        "val_dataloader", description="the split to evaluate on"
    )
    num_samples: int | None = Field(
        None, ge=1, description="how many samples of it, the same for all; default: all of them"
    )

    @property
    def split(self) -> str:
        """The split's name: ``val`` or ``train``."""
        return self.data_loader.removesuffix("_dataloader")


@RUNNERS.register("basic_evaluation")
class BasicEvaluation(Runner):
    """Mean cross entropy and top-1 accuracy on fixed samples, each candidate from a fresh state."""

    Settings = EvaluationSettings
    side: ClassVar[Side] = "sw_runner"
    produces = (
        Metric("loss", "nats", "minimize", "measured", "mean cross entropy over the evaluation samples"),
        Metric("accuracy", "", "maximize", "measured", "top-1 accuracy over the evaluation samples, 0 to 1"),
    )

    def measure(self, subject: Subject, codes: Codes) -> Mapping[str, Values]:
        """Loss and accuracy of each candidate; NaN where its evaluation failed."""
        settings = cast(EvaluationSettings, self.settings)
        scores = subject.scores(codes, settings.split, settings.num_samples)
        failed = np.array([bool(e) for e in scores.errors], dtype=bool)
        accuracy = np.where(failed, np.nan, scores.correct / scores.samples)
        return {"loss": np.where(failed, np.nan, scores.loss), "accuracy": accuracy}


def wilson(accuracy: float, samples: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share observed on `samples` samples (Wilson 1927).

    Returns:
        (low, high), both within 0 to 1.
    """
    z2 = Z95**2
    centre = (accuracy + z2 / (2 * samples)) / (1 + z2 / samples)
    half = Z95 / (1 + z2 / samples) * math.sqrt(accuracy * (1 - accuracy) / samples + z2 / (4 * samples**2))
    return max(0.0, centre - half), min(1.0, centre + half)
