"""Settings for training each candidate before it is evaluated, and the number of epochs it was trained.

The engine trains (``bitfront.engine.evaluation.trained``), because training comes before all metrics. A configuration
switches it on by naming this runner.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from bitfront.metrics import RUNNERS
from bitfront.metrics.base import EvaluationContext, Metric, Runner, RunnerSettings, Side, Values
from bitfront.optimizer import SchedulerName
from bitfront.spaces.base import Codes


class HalvingSettings(RunnerSettings):
    """``halving`` of ``basic_train``."""

    rungs: list[int] = Field([1], min_length=1, description="epochs after which candidates are compared")
    keep: float = Field(0.5, gt=0, lt=1, description="the fraction of the candidates that is trained further, at least")
    cohort: int = Field(16, ge=2, description="how many candidates are compared with each other")


class BasicTrainSettings(RunnerSettings):
    """``[search.strategy.sw_runner.basic_train]``."""

    max_epochs: int = Field(1, ge=1, description="epochs that each candidate is trained")
    num_samples: int | None = Field(
        None, ge=1, description="how many samples of the training split, the same for all; default: all of them"
    )
    optimizer: Literal["adam", "adamw", "sgd"] | None = Field(None, description="default: `training_optimizer`")
    learning_rate: float | None = Field(None, gt=0, description="initial; default: that of the top")
    batch_size: int | None = Field(None, ge=1, description="samples per step; default: that of the top")
    weight_decay: float | None = Field(None, ge=0, description="default: that of the top")
    lr_scheduler: SchedulerName | None = Field(
        None,
        description="a learning rate that changes with every step, in place of the cosine over the epochs. With it, "
        "candidates are trained alone",
    )
    num_warmup_steps: int = Field(0, ge=0, description="of `lr_scheduler`: steps in which the rate rises from 0")
    gradient_accumulation_steps: int = Field(
        1,
        ge=1,
        description="batches whose gradients are averaged for a step. With more than 1, candidates are trained alone",
    )
    name: str | None = Field(None, description="accepted, without effect")
    init: Literal["inherit", "fresh"] = Field(
        "inherit", description="start from the float model's weights, widened or narrowed, or from `fresh` ones"
    )
    float_epochs: int = Field(
        0,
        ge=0,
        description="epochs of float training before the quantized training, for a network of other widths than the "
        "model's or with `fresh` weights; once for all candidates of these widths, whose formats are calibrated on it",
    )
    halving: HalvingSettings | None = Field(
        None,
        description="stop weak candidates early: `{rungs = [1], keep = 0.5, cohort = 16}`; default: train all",
    )


@RUNNERS.register("basic_train")
class BasicTrain(Runner):
    """Trains each candidate before it is evaluated, quantization-aware where it is quantized."""

    Settings = BasicTrainSettings
    settings: BasicTrainSettings
    side: ClassVar[Side] = "sw_runner"
    produces = (Metric("trained_epochs", "epochs", "maximize", "measured", "epochs that the candidate was trained"),)

    def measure(self, context: EvaluationContext, codes: Codes) -> Mapping[str, Values]:
        """The number of epochs, the same for all candidates of a batch."""
        return {"trained_epochs": np.full(len(codes), float(context.epochs))}
