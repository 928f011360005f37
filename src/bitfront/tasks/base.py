"""What every task must say: its targets, results per sample, metrics, and the loss of a training.

A task is a frozen value: its class and its settings. Metrics are functions of results per sample, in float64, so one
function gives what is reported, what a deployed model is checked with, and intervals (``metrics/bootstrap.py``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from bitfront.config import Direction, Table
from bitfront.data.targets import Targets
from bitfront.errors import ConfigError
from bitfront.kernels.losses import Outputs
from bitfront.registry import import_object, one_line

#: What the outputs of a model say.
Answers = Literal["classes", "tokens", "labels", "numbers"]
#: Name → results, float64, shape (samples, ...). ``samples`` is there always: one per sample.
Results = Mapping[str, NDArray[np.float64]]


class TaskSettings(Table):
    """Settings of a task, the keys of ``[task_settings]``; these are those of every task. Unknown keys are errors."""

    #: Keys that earlier versions did not have.
    later: ClassVar[tuple[str, ...]] = ("num_outputs", "training_loss")

    output: str | int | None = Field(
        None, description="which output the task is about, if the model returns several: a key or a place"
    )
    num_outputs: int | None = Field(
        None,
        ge=1,
        description="how many outputs a factory makes the model with, where data without labels does not say it",
    )
    training_loss: str | None = Field(
        None,
        description="what training minimises in place of the loss of the task: `module:function` of (outputs, "
        "targets), such as `torch.nn.functional:mse_loss`",
    )


@dataclass(frozen=True)
class TaskMetric:
    """One number that says how good the answers of a model are.

    Attributes:
        name: of the metric; lower case, a key of the TOML.
        unit: empty for a share or a pure number.
        direction: which way is better.
        meaning: one line for the reference.
        value: results per sample → the number.
        share: whether it is a share, as an accuracy is: in a constraint such as ``f1_drop <= 1 %``, 1 % are then 0.01.
            Of other metrics 1 % is that part of the float model's value.
        additive: whether `value` is a function of the sums of the results over the samples. Its intervals are then
            quick, and it gets these sums as results of a single sample.
    """

    name: str
    unit: str
    direction: Direction
    meaning: str
    value: Callable[[Results], float]
    share: bool = False
    additive: bool = True

    def better(self, value: float, than: float) -> bool:
        """Whether a value of it is better than another; one that is not a number is not."""
        return value < than if self.direction == "minimize" else value > than


@dataclass(frozen=True)
class Task(ABC):
    """What a sample is. Picklable if its class can be imported.

    Class attributes:
        Settings: the keys of ``[task_settings]``; they arrive as `settings`.
        targets: what the targets of samples are.
        loss: the mean loss, as a metric; a runner produces it beside the others.
        metrics: the other metrics. The first one leads: it is on the axes of figures, is compared in pairs, and decides
            whether a fine-tuned candidate is kept.
        answers: what the outputs say: one of several classes along the axis 1, or along the last one ("tokens"); labels
            that are there or not; or numbers. Without labels, answers are compared with the float model's by that.
        endings: what outputs may be beside logits (``kernels.losses``): those that ``results`` and ``training_loss``
            tell apart. All other outputs are taken as they are.
    """

    settings: TaskSettings

    Settings: ClassVar[type[TaskSettings]] = TaskSettings
    targets: ClassVar[Targets]
    loss: ClassVar[TaskMetric]
    metrics: ClassVar[tuple[TaskMetric, ...]]
    answers: ClassVar[Answers] = "numbers"
    endings: ClassVar[tuple[Outputs, ...]] = ()

    @property
    def classifies(self) -> bool:
        """Whether it is the classification of Bitfront, which alone has compiled scoring; no task beside that is."""
        return False

    @property
    def plainly_trained(self) -> bool:
        """Whether training minimises what compiled training does: the plain cross entropy of a classification."""
        return False

    @property
    def measured(self) -> tuple[TaskMetric, ...]:
        """The metrics beside the loss, with these settings."""
        return self.metrics

    @property
    def leading(self) -> TaskMetric:
        """The metric that leads."""
        return self.measured[0]

    @property
    def all_metrics(self) -> tuple[TaskMetric, ...]:
        """The loss, then the other metrics: in the order of tables."""
        return (self.loss, *self.measured)

    def unfit(self, outputs: int) -> str:  # noqa: ARG002
        """What does not fit data of so many classes or outputs in these settings, in words; empty if all does."""
        return ""

    def minimised(self, outputs: Tensor, targets: Tensor, ends: Outputs) -> Tensor:
        """What a training minimises: the user's function, or ``training_loss``. Arguments as there.

        Raises:
            ConfigError: the function fails, or does not give one number.
        """
        name = self.settings.training_loss
        if name is None:
            return self.training_loss(outputs, targets, ends)
        key = ("task_settings", "training_loss")
        try:
            loss = loss_function(name)(outputs, targets)
        except ConfigError:
            raise
        except Exception as error:
            shapes = f"outputs {tuple(outputs.shape)} and targets {targets.dtype} {tuple(targets.shape)}"
            raise ConfigError(f"{name} failed with {shapes}: {one_line(error)}", key=key) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ConfigError(f"{name} returned {got}; needed is one number, a tensor with gradients", key=key)
        return loss.reshape(())

    @abstractmethod
    def wrong(self, outputs: Tensor, targets: Tensor) -> str:
        """What is wrong with the shape of a model's outputs for some samples, in words; empty if nothing is.

        Args:
            outputs: any shape.
            targets: of the same samples, as ``targets`` has them.
        """

    @abstractmethod
    def results(self, outputs: Tensor, targets: Tensor, ends: Outputs) -> Mapping[str, Tensor]:
        """Name → results per sample, float64, shape (samples, ...). Each depends on its sample alone.

        Args:
            outputs: of a model in evaluation mode, on the CPU; nothing is wrong with them.
            targets: of the same samples.
            ends: what the outputs are, if the model ends in a softmax, a sigmoid or their logarithm.
        """

    @abstractmethod
    def training_loss(self, outputs: Tensor, targets: Tensor, ends: Outputs) -> Tensor:
        """The loss of a batch, a scalar with gradients. Arguments as for ``results``, on any device."""


@lru_cache(maxsize=16)
def loss_function(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of the user that a training minimises. Raises ConfigError where it cannot be imported."""
    try:
        found: object = import_object(name, "training_loss")
    except ConfigError as error:
        error.key = ("task_settings", "training_loss")
        raise
    if isinstance(found, type) or not callable(found):
        what = "a class" if isinstance(found, type) else f"a {type(found).__name__}"
        raise ConfigError(
            f"training_loss {name!r} is {what}; needed is a function of (outputs, targets)",
            key=("task_settings", "training_loss"),
        )
    return found


def total(results: Results, name: str) -> NDArray[np.float64]:
    """The sum of a result over the samples: float64, shape (...)."""
    summed: NDArray[np.float64] = np.asarray(results[name].sum(axis=0), dtype=np.float64)
    return summed


def mean(results: Results, name: str) -> float:
    """The mean of a result over samples and everything else."""
    summed = total(results, name)
    return float(summed.sum() / (results["samples"].sum() * summed.size))


def ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """A quotient; NaN where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient: NDArray[np.float64] = np.where(denominator != 0, numerator / denominator, np.nan)
    return quotient


def as_results(parts: list[Mapping[str, Tensor]]) -> dict[str, NDArray[np.float64]]:
    """The results of several sets of samples, one after the other, as arrays; ``samples`` is added."""
    joined = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
    count = len(next(iter(joined.values())))
    return {**joined, "samples": np.ones(count)}
