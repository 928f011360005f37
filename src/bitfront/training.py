"""The training loop of one network.

The data is on the device as whole tensors, and a batch is an index into them: for small models a ``DataLoader`` takes
more time than the arithmetic. Only data that is mapped from files stays where it is, and each batch is read and moved.
For the same reason nothing is read back from the device within an epoch. The model passed in is never changed: a copy
is trained, and the results are state dicts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bitfront.errors import ConfigError, DataError, EvaluationError, nearest, one_of
from bitfront.graph.baking import private_copy
from bitfront.interrupts import contained
from bitfront.kernels.losses import Outputs
from bitfront.optimizer import FUSED, Optimizer, OptimizerName, Pace, Schedule, SchedulerName
from bitfront.randomness import Stream
from bitfront.scoring import CHUNK, Evaluation, checked_logits, checked_outputs, measure
from bitfront.tasks.base import Task
from bitfront.tasks.classification import CLASSIFICATION

if TYPE_CHECKING:
    from bitfront.data.base import Dataset, Split

Stopped = Literal["max_epochs", "max_steps", "patience", "interrupted"]
StateDict = dict[str, Tensor]
OnStep = Callable[[int, Callable[[], float]], None]
OnEpoch = Callable[["EpochRecord"], None]

FINAL_LEARNING_RATE = 1e-6
"""The last learning rate of the cosine schedule."""


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        max_epochs: passes over the train split, if nothing else stops the training before. The learning rate follows
            a cosine over these epochs, from `learning_rate` to 1e-6.
        max_steps: optimizer steps at most; -1 for no limit.
        batch_size: samples per step.
        weight_decay: as the optimizer defines it (decoupled for adamw, L2 for the others).
        optimizer: sgd has momentum 0.9, Nesterov's.
        patience: stop after this many epochs in a row without a lower validation loss; None for never.
        seed: random seed for the order of the samples and for dropout.
        scheduler: a learning rate that changes with every step, in place of the cosine over the epochs; None: none.
        warmup_steps: of the scheduler: so many steps the rate rises from 0; without a scheduler it must be 0.
        accumulation: batches whose gradients are averaged for one step of the optimizer.
        log_every_n_steps: how often `on_step` is called.

    Raises:
        ConfigError: a value is out of its range; the error's key is the attribute.
    """

    max_epochs: int = 20
    max_steps: int = -1
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    optimizer: OptimizerName = "adam"
    patience: int | None = None
    seed: int = 0
    log_every_n_steps: int = 50
    scheduler: SchedulerName | None = None
    warmup_steps: int = 0
    accumulation: int = 1

    def __post_init__(self) -> None:
        at_least_one = {
            "max_epochs": self.max_epochs,
            "batch_size": self.batch_size,
            "log_every_n_steps": self.log_every_n_steps,
            "accumulation": self.accumulation,
        }
        for key, value in at_least_one.items():
            _check(value >= 1, key, value, "1 or more")
        _check(
            self.max_steps == -1 or self.max_steps >= 1,
            "max_steps",
            self.max_steps,
            "1 or more, or -1 for no limit",
        )
        _check(
            self.patience is None or self.patience >= 1,
            "patience",
            self.patience,
            "1 or more epochs, or nothing for no early stopping",
        )
        _check(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "a positive number")
        _check(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "0 or more")
        names = get_args(OptimizerName)
        if self.optimizer not in names:
            raise ConfigError(
                f"there is no optimizer called {self.optimizer!r}; {one_of(names)}.{nearest(self.optimizer, names)}",
                key=("optimizer",),
            )

    @property
    def why_plain(self) -> str:
        """Why ``training.epochs`` alone can train so; empty if populations can too."""
        if self.scheduler is not None:
            return f"the learning rate changes with every step (lr_scheduler = {self.scheduler!r})"
        return f"each step is of {self.accumulation} batches" if self.accumulation > 1 else ""

    def schedule(self, batches: int) -> Schedule | None:
        """The learning rate of each step, if it changes with every step, for epochs of so many batches."""
        if self.scheduler is None:
            return None
        steps = self.max_epochs * -(-batches // self.accumulation)
        steps = min(steps, self.max_steps) if self.max_steps > 0 else steps
        return Schedule(self.scheduler, self.learning_rate, self.warmup_steps, steps)


@dataclass(frozen=True)
class EpochRecord:
    """One finished epoch, counted from 1.

    Attributes:
        train_loss: mean loss over the epoch's batches, each taken before its step.
        train_accuracy: likewise, top-1, 0 to 1; NaN where the task is no classification.
        val_loss: mean loss on the val split after the epoch, in eval mode.
        val_accuracy: likewise; NaN where the task is no classification.
        learning_rate: the one used during the epoch; with a scheduler, the last one.
        best: whether this epoch has the lowest val_loss so far.
        metrics: the metrics of another task than classification, on the val split after the epoch.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    learning_rate: float
    best: bool
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def described(self) -> dict[str, object]:
        """What is stored and printed of it: without accuracies where there are none."""
        found = dict(vars(self))
        if not self.metrics:
            del found["metrics"]
            return found
        return {name: value for name, value in found.items() if not name.endswith("_accuracy")}

    @property
    def leading(self) -> tuple[str, float]:
        """(name, value) of the metric that leads, on the validation split."""
        return next(iter(self.metrics.items()), ("accuracy", self.val_accuracy))


@dataclass(frozen=True)
class TrainResult:
    """The result of a training.

    Attributes:
        best_state: state dict of the epoch with the lowest validation loss, on the CPU.
        last_state: state dict after the last finished epoch, on the CPU; `best_state` itself if that was the best.
        best_epoch: counted from 1; 0 if training was interrupted in the first epoch: both states are then the weights
            that it started from.
        history: one record per finished epoch.
        steps: optimizer steps in finished epochs.
        stopped: why it ended.
    """

    best_state: StateDict
    last_state: StateDict
    best_epoch: int
    history: tuple[EpochRecord, ...]
    steps: int
    stopped: Stopped


def train(
    model: nn.Module,
    dataset: Dataset,
    settings: TrainSettings,
    *,
    device: torch.device | str = "cpu",
    outputs: Outputs = "logits",
    task: Task = CLASSIFICATION,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
) -> TrainResult:
    """Train a copy of `model` on the train split, and evaluate it on the val split after each epoch.

    The same model, data, settings and device give the same weights, bit for bit on the CPU (with the same
    number of threads). PyTorch's global random state is neither read nor changed.

    Args:
        model: outputs of shape (samples, num_classes) from x of shape (samples, *sample_shape). Not changed.
        outputs: what they are (``graph.outputs`` of the captured model); the loss follows from it.
        task: what the samples are, and with it the loss.
        on_step: called as ``on_step(step, loss)`` every `settings.log_every_n_steps` steps (counted from 1);
            ``loss()`` is that step's loss, and waits for the device only when called.
        on_epoch: called after each epoch with its record.

    Returns:
        The result, also after a KeyboardInterrupt (``stopped="interrupted"``).

    Raises:
        DataError: the train or val split is empty.
        ConfigError: the model has nothing to train, or its BatchNorm would get batches of one sample.
        EvaluationError: the loss became infinite or NaN, or the model's output has the wrong shape.
    """
    device = torch.device(device)
    start = snapshot(model)
    result = TrainResult(start, start, best_epoch=0, history=(), steps=0, stopped="max_epochs")
    try:
        # A single assignment: after an interrupt, `result` is that of this epoch or of the one before.
        for result in epochs(model, dataset, settings, device=device, outputs=outputs, task=task, on_step=on_step):
            if on_epoch is not None:
                on_epoch(result.history[-1])
    except KeyboardInterrupt:
        return replace(result, stopped="interrupted")
    return result


def epochs(
    model: nn.Module,
    dataset: Dataset,
    settings: TrainSettings,
    *,
    device: torch.device,
    outputs: Outputs = "logits",
    task: Task = CLASSIFICATION,
    on_step: OnStep | None = None,
) -> Generator[TrainResult]:
    """Like ``train``, epoch by epoch: gives the result so far after each epoch.

    Several of these generators may take turns: each keeps the state of its random numbers. Arguments and errors as for
    ``train``.
    """
    x, y = resident(dataset, "train", device, stream=True)
    x_val, y_val = resident(dataset, "val", device, stream=True)
    trained = private_copy(model).to(device)
    optimizer = optimizer_of([p for p in trained.parameters() if p.requires_grad], settings, device)
    check_batch_norm(trained, len(y), settings)
    order = torch.Generator().manual_seed(settings.seed)
    start = snapshot(trained)
    # Outputs of other tasks (pixels, tokens) are large; those of a classification are never too many.
    chunk = CHUNK if task.classifies else settings.batch_size
    result = TrainResult(start, start, best_epoch=0, history=(), steps=0, stopped="max_epochs")
    best_loss = math.inf
    random = Stream(device, settings.seed)
    for epoch in range(1, settings.max_epochs + 1):
        optimizer.rate = learning_rate(settings, epoch)
        batches = batches_of(trained, torch.randperm(len(y), generator=order).to(device), settings)
        schedule = settings.schedule(len(batches))
        if settings.max_steps > 0:
            batches = batches[: (settings.max_steps - result.steps) * settings.accumulation]
        pace = Pace(settings.accumulation, schedule, result.steps)
        report = on_step and _every(settings.log_every_n_steps, result.steps, on_step)
        with random.drawn():
            goal = _Goal(task, outputs, dataset.num_classes)
            losses, accuracy = _epoch(trained, optimizer, x, y, batches, goal, pace, report)
            loss = mean_loss(losses, batches, epoch, settings)
            val = measure(task, trained, x_val, y_val, batch_size=chunk, outputs=outputs)
        if not math.isfinite(val.loss):
            raise diverged(f"the validation loss is {val.loss} after epoch {epoch}", settings)
        better, rate = val.loss < best_loss, optimizer.rate
        best_loss = min(val.loss, best_loss)
        if isinstance(val, Evaluation):
            record = EpochRecord(epoch, loss, accuracy, val.loss, val.accuracy, rate, better)
        else:
            record = EpochRecord(epoch, loss, math.nan, val.loss, math.nan, rate, better, val.metrics)
        state = snapshot(trained)
        result = replace(
            result,
            best_state=state if better else result.best_state,
            last_state=state,
            best_epoch=epoch if better else result.best_epoch,
            history=(*result.history, record),
            steps=result.steps + -(-len(batches) // settings.accumulation),
        )
        stopped = stopped_by(settings, result.steps, epoch, result.best_epoch)
        result = replace(result, stopped=stopped or "max_epochs")
        yield result
        if stopped is not None:
            return


def stopped_by(settings: TrainSettings, steps: int, epoch: int, best_epoch: int) -> Stopped | None:
    """Why a training ends after `epoch`; None if only `max_epochs` can end it."""
    if 0 < settings.max_steps <= steps:
        return "max_steps"
    if settings.patience is not None and epoch - best_epoch >= settings.patience:
        return "patience"
    return None


@dataclass(frozen=True)
class _Goal:
    """What is trained for: a task, and what is known of the model's outputs."""

    task: Task
    outputs: Outputs
    num_classes: int

    def checked(self, given: object, target: Tensor) -> Tensor:
        """The output of the model for some samples. Raises EvaluationError where it does not fit their targets."""
        if self.task.classifies:
            return checked_logits(given, len(target), self.num_classes, exact=True)
        return checked_outputs(self.task, given, target)


def _epoch(
    model: nn.Module,
    optimizer: Optimizer,
    x: Tensor,
    y: Tensor,
    batches: Sequence[Tensor],
    goal: _Goal,
    pace: Pace,
    report: Callable[[int, Tensor], None] | None,
) -> tuple[Tensor, float]:
    """One pass over `batches`, indices into x and y: each batch's mean loss, and the accuracy of all (NaN where there
    is none)."""
    model.train()
    losses: list[Tensor] = []
    predicted: list[Tensor] = []
    targets, sizes = y.index_select(0, torch.cat(list(batches))), [len(batch) for batch in batches]
    for step, (batch, target) in enumerate(zip(batches, torch.split(targets, sizes), strict=True)):
        with contained():
            answers = model(x.index_select(0, batch.to(x.device)).to(batch.device))
        given = goal.checked(answers, target)
        loss = goal.task.minimised(given, target, goal.outputs)
        if not loss.requires_grad:
            raise ConfigError(
                "the model cannot be trained: its outputs have no gradients in training mode. Its forward may run "
                "under torch.no_grad, or detach what it returns"
            )
        pace.learn(loss, optimizer, step, len(batches))
        losses.append(loss.detach())
        if goal.task.classifies:
            predicted.append(given.argmax(1))
        if report is not None:
            report(step, losses[-1])
    if not predicted:
        return torch.stack(losses), math.nan
    correct = torch.cat(predicted) == targets
    return torch.stack(losses), int(correct.sum()) / len(correct)


def _every(period: int, steps_before: int, on_step: OnStep) -> Callable[[int, Tensor], None]:
    """A function that reports every `period`-th step. `steps_before` steps were done before this epoch."""

    def report(step_of_epoch: int, loss: Tensor) -> None:
        step = steps_before + step_of_epoch + 1
        if step % period == 0:
            on_step(step, partial(float, loss))

    return report


def mean_loss(losses: Tensor, batches: Sequence[Tensor], epoch: int, settings: TrainSettings) -> float:
    """The mean over an epoch's samples of its batches' mean losses. Raises EvaluationError if one is not finite."""
    per_batch = losses.cpu().double()
    bad = (~per_batch.isfinite()).nonzero()
    if len(bad):
        first = int(bad[0])
        raise diverged(
            f"the training loss became {float(per_batch[first])} in epoch {epoch}, at step {first + 1} of "
            f"{len(batches)}",
            settings,
        )
    sizes = torch.tensor([len(batch) for batch in batches], dtype=torch.float64)
    return float((per_batch * sizes).sum() / sizes.sum())


def diverged(what: str, settings: TrainSettings) -> EvaluationError:
    """The error for a training that diverged, with advice."""
    return EvaluationError(
        f"training diverged: {what}. Try a lower learning rate than {settings.learning_rate:g}, for example "
        f"{settings.learning_rate / 10:g}; if that does not help, look for NaN or very large values in the "
        "data."
    )


def resident(dataset: Dataset, split: Split, device: torch.device, *, stream: bool = False) -> tuple[Tensor, Tensor]:
    """(x, y) of a whole split, on the device; with `stream`, x that is mapped from files stays there, and who needs a
    batch moves it. Raises DataError where the split is empty."""
    x, y = dataset.split(split)
    if len(y) == 0:
        raise DataError(f"the {split} split of dataset {dataset.name!r} is empty, and training needs it")
    return x if stream and dataset.mapped else x.to(device), y.to(device)


def optimizer_of(parameters: Sequence[nn.Parameter], settings: TrainSettings, device: torch.device) -> Optimizer:
    """The optimizer of these settings. Raises ConfigError where there is nothing to train."""
    if not parameters:
        raise ConfigError("the model has no parameter to train (none, or all with requires_grad=False)")
    rate, decay = settings.learning_rate, settings.weight_decay
    return Optimizer(parameters, settings.optimizer, rate, decay, fused=device.type in FUSED)


def learning_rate(settings: TrainSettings, epoch: int) -> float:
    """The learning rate during `epoch`, counted from 1: a cosine over all epochs."""
    floor = min(FINAL_LEARNING_RATE, settings.learning_rate)
    done = (epoch - 1) / settings.max_epochs
    return floor + (settings.learning_rate - floor) * (1 + math.cos(math.pi * done)) / 2


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def check_batch_norm(model: nn.Module, samples: int, settings: TrainSettings) -> None:
    """Raises ConfigError if batch norms would get batches of one sample."""
    if min(samples, settings.batch_size) < 2 and _has_batch_norm(model):
        raise ConfigError(
            f"batch_size = {settings.batch_size} on {samples} samples makes batches of one sample, over "
            "which the model's BatchNorm has no variance; use 2 or more",
            key=("batch_size",),
        )


def batches_of(model: nn.Module, order: Tensor, settings: TrainSettings) -> Sequence[Tensor]:
    """An epoch's batches, of samples in this order."""
    batches = torch.split(order, settings.batch_size)
    # A last batch of one sample is left out in this epoch only: the next order leaves out another sample.
    if len(batches[-1]) == 1 and _has_batch_norm(model):
        return batches[:-1]
    return batches


def snapshot(model: nn.Module) -> StateDict:
    """A copy of the state dict, on the CPU."""
    return {key: value.detach().to("cpu", copy=True) for key, value in model.state_dict().items()}


def _check(valid: bool, key: str, value: object, allowed: str) -> None:
    if not valid:
        raise ConfigError(f"{key} = {value!r} is not possible; allowed: {allowed}", key=(key,))
