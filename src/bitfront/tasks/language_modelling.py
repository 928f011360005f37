"""Language modelling: at each place of a sequence of tokens, which token comes next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from bitfront.data.targets import NO_LABEL, TOKENS, Targets
from bitfront.kernels.losses import Outputs
from bitfront.tasks import TASKS
from bitfront.tasks.base import Answers, Results, Task, TaskMetric, TaskSettings, ratio, total


class LanguageModellingSettings(TaskSettings):
    """``[task_settings]`` of a language model."""

    later: ClassVar[tuple[str, ...]] = (*TaskSettings.later, "ignore_index")

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="of the loss of the training: the share of a token that goes to all tokens alike"
    )
    ignore_index: int | None = Field(
        None, ge=0, description="a token that is not asked for anywhere, such as the padding, beside places with -100"
    )


def loss_per_token(results: Results) -> float:
    """The mean over tokens that are asked for."""
    return float(ratio(total(results, "loss"), total(results, "tokens")))


def perplexity(results: Results) -> float:
    """e to the power of the mean loss of a token."""
    with np.errstate(over="ignore"):
        return float(np.exp(loss_per_token(results)))


def token_accuracy(results: Results) -> float:
    """Right tokens / tokens that are asked for."""
    return float(ratio(total(results, "right"), total(results, "tokens")))


@TASKS.register("language_modelling")
@dataclass(frozen=True)
class LanguageModelling(Task):
    """The next token at each place: cross entropy, perplexity, share of right tokens."""

    settings: LanguageModellingSettings

    Settings = LanguageModellingSettings
    targets: ClassVar[Targets] = TOKENS
    answers: ClassVar[Answers] = "tokens"
    loss: ClassVar[TaskMetric] = TaskMetric(
        "loss", "nats", "minimize", "mean cross entropy of a token that is asked for", loss_per_token
    )
    metrics: ClassVar[tuple[TaskMetric, ...]] = (
        TaskMetric("perplexity", "", "minimize", "e to the power of the loss; 1 or more", perplexity),
        TaskMetric(
            "token_accuracy", "", "maximize", "share of tokens that are right, 0 to 1", token_accuracy, share=True
        ),
    )

    def wrong(self, outputs: Tensor, targets: Tensor) -> str:
        """Outputs are (samples, tokens, vocabulary)."""
        least = int(targets.max()) + 1
        if outputs.ndim == 3 and outputs.shape[:2] == targets.shape and outputs.shape[2] >= least:
            return ""
        return f"logits of shape {(*targets.shape, least)}, or of a larger vocabulary, are needed"

    def _asked(self, targets: Tensor) -> Tensor:
        """The targets, with ``NO_LABEL`` wherever no token is asked for."""
        ignored = self.settings.ignore_index
        return targets if ignored is None else torch.where(targets == ignored, NO_LABEL, targets)

    def results(self, outputs: Tensor, targets: Tensor, ends: Outputs) -> Mapping[str, Tensor]:  # noqa: ARG002
        """Sums over the tokens of a sample, each of shape (samples,)."""
        targets = self._asked(targets)
        asked = targets != NO_LABEL
        log_probabilities = outputs.double().log_softmax(dim=2).transpose(1, 2)
        losses = functional.nll_loss(log_probabilities, targets, ignore_index=NO_LABEL, reduction="none")
        right = (outputs.argmax(dim=2) == targets) & asked
        return {"loss": losses.sum(dim=1), "right": right.sum(dim=1).double(), "tokens": asked.sum(dim=1).double()}

    def training_loss(self, outputs: Tensor, targets: Tensor, ends: Outputs) -> Tensor:  # noqa: ARG002
        """Mean cross entropy over the tokens that are asked for."""
        smoothing = self.settings.label_smoothing
        logits = outputs.flatten(0, 1)
        wanted = self._asked(targets).flatten()
        return functional.cross_entropy(logits, wanted, ignore_index=NO_LABEL, label_smoothing=smoothing)
