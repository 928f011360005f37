"""Loss and accuracy, or the metrics of another task, on fixed samples of a split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from bitfront.data.base import Split
from bitfront.metrics import RUNNERS
from bitfront.metrics.base import EvaluationContext, Metric, Runner, RunnerSettings, SampleChoice, Side, Values
from bitfront.spaces.base import Codes
from bitfront.tasks.base import Task, TaskMetric
from bitfront.tasks.classification import CLASSIFICATION


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


def _metric(metric: TaskMetric) -> Metric:
    return Metric(
        metric.name, metric.unit, metric.direction, "measured", metric.meaning, quality=True, share=metric.share
    )


@RUNNERS.register("basic_evaluation")
class BasicEvaluation(Runner):
    """Loss and accuracy, or the metrics of another task, on fixed samples; each candidate from a fresh state."""

    Settings = EvaluationSettings
    settings: EvaluationSettings
    side: ClassVar[Side] = "sw_runner"
    produces = tuple(map(_metric, CLASSIFICATION.all_metrics))

    @classmethod
    def of_task(cls, task: Task) -> tuple[Metric, ...]:
        """The loss and the metrics of the task."""
        return tuple(map(_metric, task.all_metrics))

    def measure(self, context: EvaluationContext, codes: Codes) -> Mapping[str, Values]:
        """The loss and the metrics of the task for each candidate; NaN where its evaluation failed."""
        samples = self.settings.samples
        assert not samples.auto, "the search replaces `auto` by a number before it begins"
        return context.scores(codes, samples.split, samples.number).of_task
