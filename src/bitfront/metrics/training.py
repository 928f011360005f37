"""Training each candidate before it is evaluated: the settings, and how long it was trained.

The engine trains (``bitfront.engine.evaluation.trained``), because training must happen before any metric is measured.
A file asks for it by naming this runner.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from bitfront.metrics import RUNNERS
from bitfront.metrics.base import EvaluationContext, Metric, Runner, RunnerSettings, Side, Values
from bitfront.spaces.base import Codes


class HalvingSettings(RunnerSettings):
    """``halving`` of ``basic_train``."""

    rungs: list[int] = Field([1], min_length=1, description="epochs after which candidates are compared")
    keep: float = Field(0.5, gt=0, lt=1, description="the share that goes on at each of them, at least")
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
    init: Literal["inherit", "fresh"] = Field(
        "inherit", description="begin with the float model's weights, widened or cut, or with `fresh` ones"
    )
    float_epochs: int = Field(
        0,
        ge=0,
        description="epochs in which a network of other widths than the model's, or with `fresh` weights, is trained "
        "in float first, once for all candidates of these widths; their formats are learned from what that gives",
    )
    halving: HalvingSettings | None = Field(
        None,
        description="stop hopeless candidates early: `{rungs = [1], keep = 0.5, cohort = 16}`; default: train all",
    )


@RUNNERS.register("basic_train")
class BasicTrain(Runner):
    """Trains each candidate before it is evaluated, quantization-aware where it is quantized."""

    Settings = BasicTrainSettings
    settings: BasicTrainSettings
    side: ClassVar[Side] = "sw_runner"
    produces = (Metric("trained_epochs", "epochs", "maximize", "measured", "epochs that the candidate was trained"),)

    def measure(self, subject: EvaluationContext, codes: Codes) -> Mapping[str, Values]:
        """The same for all of a batch."""
        return {"trained_epochs": np.full(len(codes), float(subject.epochs))}
