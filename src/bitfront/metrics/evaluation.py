"""Loss and accuracy on fixed samples of a split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from bitfront.data.base import Split
from bitfront.metrics import RUNNERS
from bitfront.metrics.base import EvaluationContext, Metric, Runner, RunnerSettings, SampleChoice, Side, Values
from bitfront.spaces.base import Codes


class EvaluationSettings(RunnerSettings):
    """``[search.strategy.sw_runner.basic_evaluation]``."""

    # Without the test split: only the front is measured on it, once, at the end.
    data_loader: Literal["val_dataloader", "train_dataloader", "val", "train"] = Field(
        "val_dataloader", description="the split to evaluate on"
    )
    num_samples: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="how many samples of the split, the same for all candidates; `auto`: as many as are needed to rank "
        "typical candidates; default: all of them",
    )

    @property
    def samples(self) -> SampleChoice:
        """The samples of the validation or the training split."""
        number = None if self.num_samples == "auto" else self.num_samples
        split: Split = "train" if self.data_loader.startswith("train") else "val"
        return SampleChoice(split, number, auto=self.num_samples == "auto")

    def with_samples(self, number: int) -> EvaluationSettings:
        """These settings with `number` in place of ``auto``."""
        return self.model_copy(update={"num_samples": number})


@RUNNERS.register("basic_evaluation")
class BasicEvaluation(Runner):
    """Mean cross entropy and top-1 accuracy on fixed samples, each candidate from a fresh state."""

    Settings = EvaluationSettings
    settings: EvaluationSettings
    side: ClassVar[Side] = "sw_runner"
    produces = (
        Metric("loss", "nats", "minimize", "measured", "mean cross entropy over the evaluation samples"),
        Metric("accuracy", "", "maximize", "measured", "top-1 accuracy over the evaluation samples, 0 to 1"),
    )

    def measure(self, context: EvaluationContext, codes: Codes) -> Mapping[str, Values]:
        """Loss and accuracy of each candidate; NaN where its evaluation failed."""
        samples = self.settings.samples
        assert not samples.auto, "the search replaces `auto` by a number before it begins"
        scores = context.scores(codes, samples.split, samples.number)
        failed = np.array([bool(e) for e in scores.errors], dtype=bool)
        accuracy = np.where(failed, np.nan, scores.correct / scores.samples)
        return {"loss": np.where(failed, np.nan, scores.loss), "accuracy": accuracy}
