"""Population training: many small networks trained together, in a fraction of the time of one after another.

``train_population`` gives the same result for each model as ``training.train``, up to float error: the same order of
samples, schedule, batch norms and optimizer. It reads each model as a list of steps (``programs``) and runs the steps
for all members with code for small networks: compiled on the CPU (``compiled``), batched products on a GPU
(``batched``). A model that is no such list is trained alone by ``training.epochs``; ``why_alone`` gives the reason.

The result of a member does not depend on the other members. On the CPU it has the same bits for any other members, any
order of the models and any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from bitfront.errors import ConfigError, EvaluationError
from bitfront.kernels import training as steps
from bitfront.kernels.losses import Outputs
from bitfront.operations.training import UnsupportedError
from bitfront.population.batched import GpuTrainer, structure
from bitfront.population.compiled import CpuTrainer, EpochOutcome
from bitfront.population.programs import Traced, TrainingProgram, program
from bitfront.tasks.base import Task
from bitfront.tasks.classification import CLASSIFICATION
from bitfront.training import (
    EpochRecord,
    StateDict,
    TrainSettings,
    batches_of,
    check_batch_norm,
    diverged,
    epochs,
    learning_rate,
    mean_loss,
    resident,
    snapshot,
    stopped_by,
)

if TYPE_CHECKING:
    from bitfront.data.base import Dataset

Ended = Literal["max_epochs", "max_steps", "patience", "dropped", "failed"]
#: (epoch, the record of each model, function from a model's place to its state dict) → whether each model goes on.
Keep = Callable[[int, Sequence[EpochRecord | None], Callable[[int], StateDict]], Sequence[bool]]


@dataclass(frozen=True)
class TrainedMember:
    """The result of one model.

    Attributes:
        state: state dict after the last epoch of the member, on the CPU; not usable if it failed.
        history: one record per completed epoch.
        stopped: why its training ended; "dropped" means by `keep`.
        alone: why it was trained alone; empty if it was trained with others.
        error: why it failed; empty if it did not.
    """

    state: StateDict
    history: tuple[EpochRecord, ...]
    stopped: Ended
    alone: str = ""
    error: str = ""


def why_alone(model: nn.Module, sample_shape: tuple[int, ...], device: torch.device | str = "cpu") -> str:
    """Why ``train_population`` trains `model` alone; empty if it trains it with others.

    Args:
        model: a float model or a quantized one.
        sample_shape: shape of a sample, without the batch dimension.
        device: where it would be trained.
    """
    result = _program(model, sample_shape, torch.device(device), {})
    return result if isinstance(result, str) else ""


def train_population(
    models: Sequence[nn.Module],
    dataset: Dataset,
    settings: TrainSettings,
    *,
    device: torch.device | str = "cpu",
    outputs: Outputs = "logits",
    task: Task = CLASSIFICATION,
    keep: Keep | None = None,
    parts: dict[str, float] | None = None,
    alone: str = "",
) -> tuple[TrainedMember, ...]:
    """Train a copy of each model on the train split, and evaluate it on the val split after each epoch.

    Args:
        models: float models and quantized ones (``transforms.quantize`` without `bake`), of any widths, formats and
            structures. They are not changed.
        dataset: with the splits ``train`` and ``val``. Every member is evaluated on the whole val split after each
            epoch, so a small one saves time.
        settings: for every member, `seed` included, so that all see the samples in the same order.
        device: ``cpu`` or a GPU.
        outputs: what the models' outputs are; those that do not end in logits are trained alone.
        task: what the samples are; only with the plain cross entropy models are trained together.
        keep: for successive halving. Called after each epoch as ``keep(epoch, records, state)``: `records` has the
            record of each model for this epoch, None for those that are not trained any more; ``state(place)`` gives
            the state dict of a model. It returns for each model whether it goes on; for models that are not trained
            any more the value is ignored.
        parts: the seconds that compiled steps spend on each of ``kernels.training.PARTS`` are added here.
        alone: a reason to train each model alone, whatever its structure; empty for none.

    Returns:
        One result per model, in the order of `models`. A model whose training diverges fails alone.

    Raises:
        DataError: the train or val split is empty.
        ConfigError: a model has no parameter to train, or a batch norm would get batches of one sample.
        ValueError: `keep` returns another number of values than there are models.
    """
    device = torch.device(device)
    samples, labels = resident(dataset, "train", device)
    resident(dataset, "val", device)
    _check_trainable(models, len(labels), settings)
    shape, classes, traced = tuple(samples.shape[1:]), dataset.num_classes, Traced()
    alone = alone or settings.why_plain or _not_compiled(task, outputs)
    members = [_Member(model, alone or _program(model, shape, device, traced, classes)) for model in models]
    groups: list[_Group | _Alone] = [
        _Group(together, _trainer(together, settings, device, parts), dataset, settings, device)
        for together in _grouped(members, device)
    ]
    groups += [_Alone(m, dataset, settings, device, outputs, task) for m in members if isinstance(m.program, str)]
    for epoch in range(1, settings.max_epochs + 1):
        going = [member for member in members if member.stopped is None]
        if not going:
            break
        for group in groups:
            group.epoch(epoch)
        for member in going:
            member.check_end(epoch, settings)
        if keep is not None:
            _apply_keep(keep, epoch, members, going)
    return tuple(member.result() for member in members)


def _not_compiled(task: Task, outputs: Outputs) -> str:
    """Why no compiled training has the loss of a task; empty if it has."""
    if not task.plainly_trained:
        return "what is compiled trains for the plain cross entropy only, and the task has another loss"
    if outputs != "logits":
        return f"its outputs are {outputs.replace('_', ' ')}, and what is compiled takes logits"
    return ""


def _check_trainable(models: Sequence[nn.Module], samples: int, settings: TrainSettings) -> None:
    """Raises ConfigError if a model has nothing to train, or if a batch norm would get batches of one sample."""
    for model in models:
        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError("the model has no parameter to train (none, or all with requires_grad=False)")
        check_batch_norm(model, samples, settings)


def _program(
    model: nn.Module, sample_shape: tuple[int, ...], device: torch.device, traced: Traced, classes: int | None = None
) -> TrainingProgram | str:
    """The steps of `model`, or why it is trained alone."""
    if device.type == "cpu" and not steps.available():
        return "there are no compiled training steps: no C++ compiler, or BITFRONT_NATIVE=0"
    try:
        steps_of_model = program(model, sample_shape, traced)
    except UnsupportedError as reason:
        return str(reason)
    if classes is not None and steps_of_model.shapes[steps_of_model.logits] != (classes,):
        return "its output has another number of classes than the data"
    return steps_of_model.beyond_populations or steps_of_model


def _grouped(members: Sequence[_Member], device: torch.device) -> list[list[_Member]]:
    """Members that can be trained together. On a GPU these have the same structure. On the CPU they can be any; only
    those with batch norms are apart, because their batches differ."""
    groups: dict[Hashable, list[_Member]] = {}
    for member in members:
        if isinstance(member.program, TrainingProgram):
            key = member.program.normed if device.type == "cpu" else structure(member.model, member.program)
            groups.setdefault(key, []).append(member)
    return list(groups.values())


def _trainer(
    members: Sequence[_Member], settings: TrainSettings, device: torch.device, parts: dict[str, float] | None
) -> Trainer:
    """The trainer of members that are trained together."""
    models, programs = [m.model for m in members], [cast(TrainingProgram, m.program) for m in members]
    if device.type == "cpu":
        return CpuTrainer(models, programs, settings, parts)
    return GpuTrainer(models, programs, settings, device)


class _Member:
    """A model in training: its program, or why it is trained alone, and its records so far."""

    def __init__(self, model: nn.Module, program: TrainingProgram | str) -> None:
        self.model = model
        self.program = program
        #: Gives the current state dict; set by the group.
        self.state: Callable[[], StateDict] = dict
        self.history: list[EpochRecord] = []
        self.steps = 0
        self.stopped: Ended | None = None
        self.error = ""

    def record(self, epoch: int, train: tuple[float, float], val: tuple[float, float], rate: float) -> None:
        best = val[0] < min((r.val_loss for r in self.history), default=math.inf)
        self.history.append(EpochRecord(epoch, *train, *val, rate, best))

    def fail(self, error: EvaluationError) -> None:
        self.stopped, self.error = "failed", str(error)

    def check_end(self, epoch: int, settings: TrainSettings) -> None:
        if self.stopped is None:
            best = max((r.epoch for r in self.history if r.best), default=0)
            self.stopped = cast("Ended | None", stopped_by(settings, self.steps, epoch, best))

    def result(self) -> TrainedMember:
        alone = self.program if isinstance(self.program, str) else ""
        return TrainedMember(self.state(), tuple(self.history), self.stopped or "max_epochs", alone, self.error)


class Trainer(Protocol):
    """Trains the members of a group, which are named by their number in it."""

    def epoch(
        self,
        going: Sequence[int],
        x: Tensor,
        y: Tensor,
        val: tuple[Tensor, Tensor],
        batches: Sequence[Tensor],
        rate: float,
    ) -> list[EpochOutcome]:
        """Train some members for one epoch.

        Args:
            going: their numbers, ascending. A member that is left out is not trained again.
            x, y: the train split on the device: samples, float32, and labels, int64.
            val: the val split on the device, as (x, y).
            batches: the samples of each batch, as indices into `x` and `y`.
            rate: the learning rate.

        Returns:
            The outcome of each member, in the order of `going`.
        """
        ...

    def state(self, member: int) -> StateDict:
        """The current state dict of a member, on the CPU."""
        ...


class _Group:
    """Members that are trained on the same batches, and their trainer."""

    def __init__(
        self,
        members: Sequence[_Member],
        trainer: Trainer,
        dataset: Dataset,
        settings: TrainSettings,
        device: torch.device,
    ) -> None:
        self.members = members
        self.trainer = trainer
        self.settings = settings
        self.device = device
        self.train, self.val = resident(dataset, "train", device), resident(dataset, "val", device)
        self.order = torch.Generator().manual_seed(settings.seed)
        for i, member in enumerate(members):
            member.state = partial(trainer.state, i)

    def epoch(self, number: int) -> None:
        numbers = [i for i, member in enumerate(self.members) if member.stopped is None]
        if not numbers:
            return
        going = [self.members[i] for i in numbers]
        rate = learning_rate(self.settings, number)
        order = torch.randperm(len(self.train[1]), generator=self.order).to(self.device)
        batches = batches_of(going[0].model, order, self.settings)
        if self.settings.max_steps > 0:
            batches = batches[: self.settings.max_steps - going[0].steps]
        samples = sum(len(batch) for batch in batches)
        outcomes = self.trainer.epoch(numbers, *self.train, self.val, batches, rate)
        for member, outcome in zip(going, outcomes, strict=True):
            member.steps += len(batches)
            try:
                loss = mean_loss(outcome.losses, batches, number, self.settings)
                if not math.isfinite(outcome.val_loss):
                    raise diverged(f"the validation loss is {outcome.val_loss} after epoch {number}", self.settings)
            except EvaluationError as error:
                member.fail(error)
            else:
                val = (outcome.val_loss, outcome.val_accuracy)
                member.record(number, (loss, outcome.correct / samples), val, rate)


class _Alone:
    """A member that ``training.epochs`` trains, one epoch at a time, in turn with the groups."""

    def __init__(
        self,
        member: _Member,
        dataset: Dataset,
        settings: TrainSettings,
        device: torch.device,
        outputs: Outputs,
        task: Task,
    ) -> None:
        self.member = member
        member.state = partial(snapshot, member.model)
        self.results = epochs(member.model, dataset, settings, device=device, outputs=outputs, task=task)

    def epoch(self, number: int) -> None:  # noqa: ARG002
        member = self.member
        if member.stopped is not None:
            return
        # On one thread, as the other members: the bits of float sums depend on the number of threads.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            result = next(self.results)
        except EvaluationError as error:
            member.fail(error)
        else:
            member.state, member.steps = partial(StateDict, result.last_state), result.steps
            member.history.append(result.history[-1])
        finally:
            torch.set_num_threads(threads)


def _apply_keep(keep: Keep, epoch: int, members: Sequence[_Member], going: Sequence[_Member]) -> None:
    """Stop the members that `keep` does not keep."""
    records = [m.history[-1] if m in going and not m.error else None for m in members]
    decisions = keep(epoch, records, lambda place: members[place].state())
    if len(decisions) != len(members):
        raise ValueError(
            f"keep must return a value for each of {len(members)} models, True if it goes on; it returned "
            f"{len(decisions)} values"
        )
    for member, goes_on in zip(members, decisions, strict=True):
        if member.stopped is None and not goes_on:
            member.stopped = "dropped"
