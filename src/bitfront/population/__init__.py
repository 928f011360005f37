"""Many candidates trained together, at a fraction of what training each alone takes.

``train_population`` gives every model what ``training.train`` would, to within float error: the same order of samples,
schedule, batch norms and optimizer. It reads each model as a list of steps (``programs``) and carries these out for all
members with code made for small networks: compiled on the CPU (``compiled``), batched products on a GPU (``batched``).
A model that is no such list is trained by ``training.epochs``, beside the others; ``why_alone`` says why.

A member's result never depends on the other members: on the CPU it is the same to the last bit whoever they are, in
whatever order they are given, and on however many threads.
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
from bitfront.population.batched import GpuTrainer, structure
from bitfront.population.compiled import CpuTrainer, EpochOutcome
from bitfront.population.programs import Traced, TrainingProgram, UnsupportedError, program
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
#: (epoch, what each model did in it, state dict of a model) → which of them go on.
Keep = Callable[[int, Sequence[EpochRecord | None], Callable[[int], StateDict]], Sequence[bool]]


@dataclass(frozen=True)
class TrainedMember:
    """What became of one model.

    Attributes:
        state: state dict after the member's last epoch, on the CPU; of no use where it failed.
        history: one record per finished epoch.
        stopped: what ended its training; "dropped" by `keep`.
        alone: why it was trained by itself; "" where it was trained with the others.
        error: why it failed; "" where it did not.
    """

    state: StateDict
    history: tuple[EpochRecord, ...]
    stopped: Ended
    alone: str = ""
    error: str = ""


def why_alone(model: nn.Module, sample_shape: tuple[int, ...], device: torch.device | str = "cpu") -> str:
    """Why ``train_population`` trains `model` by itself, in words; "" where it does not have to."""
    found = _program(model, sample_shape, torch.device(device), {})
    return found if isinstance(found, str) else ""


def train_population(
    models: Sequence[nn.Module],
    dataset: Dataset,
    settings: TrainSettings,
    *,
    device: torch.device | str = "cpu",
    keep: Keep | None = None,
    parts: dict[str, float] | None = None,
) -> tuple[TrainedMember, ...]:
    """Train a copy of each model on the train split, and judge each epoch on the val split.

    Args:
        models: each as for ``training.train``: float models and quantized ones (``transforms.quantize`` without
            `bake`), of any widths, formats and structures. Not changed.
        dataset: its val split is scored after each epoch by every member; give a small one where that matters.
        settings: of every member alone; `seed` too, so that all see the same order of samples.
        keep: for successive halving. Called as ``keep(epoch, records, state)`` after each epoch with the record that
            each model has of it, None for those that are no longer trained, and a function that gives the state dict
            of one by its place; says for each whether it goes on. What it says of the others is not looked at.
        parts: the seconds that compiled steps spend on each of ``kernels.training.PARTS`` are added here.

    Returns:
        In the order of `models`.

    Raises:
        DataError: the train or val split is empty.
        ConfigError: a model has nothing to train, or batch norms would see batches of one sample.
        ValueError: `keep` says something of another number of models.
    """
    device = torch.device(device)
    samples, labels = resident(dataset, "train", device)
    resident(dataset, "val", device)
    for model in models:
        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError("the model has no parameter to train (none, or all with requires_grad=False)")
        check_batch_norm(model, len(labels), settings)
    shape, classes = tuple(samples.shape[1:]), dataset.num_classes
    traced: Traced = {}
    members = [_Member(model, _program(model, shape, device, traced, classes)) for model in models]
    companies: list[_Together | _Alone] = []
    for alike in _companies(members, device):
        programs = [cast(TrainingProgram, m.program) for m in alike]
        trainer: Trainer
        if device.type == "cpu":
            trainer = CpuTrainer([m.model for m in alike], programs, settings, parts)
        else:
            trainer = GpuTrainer([m.model for m in alike], programs, settings, device)
        companies.append(_Together(alike, trainer, dataset, settings, device))
    companies += [_Alone(m, dataset, settings, device) for m in members if isinstance(m.program, str)]
    for epoch in range(1, settings.max_epochs + 1):
        going = [member for member in members if member.stopped is None]
        if not going:
            break
        for company in companies:
            company.epoch(epoch)
        for member in going:
            member.judge(epoch, settings)
        if keep is not None:
            _ask(keep, epoch, members, going)
    return tuple(member.result() for member in members)


def _program(
    model: nn.Module, sample_shape: tuple[int, ...], device: torch.device, traced: Traced, classes: int | None = None
) -> TrainingProgram | str:
    """The steps of `model`, or why it is trained alone."""
    if device.type == "cpu" and not steps.available():
        return "there are no compiled training steps: no C++ compiler, or BITFRONT_NATIVE=0"
    try:
        found = program(model, sample_shape, traced)
    except UnsupportedError as reason:
        return str(reason)
    if classes is not None and found.shapes[found.logits] != (classes,):
        return "its output has another number of classes than the data"
    return found


def _companies(members: Sequence[_Member], device: torch.device) -> list[list[_Member]]:
    """Members that can be trained together. On the CPU all can, but batch norms change which samples make a batch."""
    found: dict[Hashable, list[_Member]] = {}
    for member in members:
        if isinstance(member.program, TrainingProgram):
            key = member.program.normed if device.type == "cpu" else structure(member.model, member.program)
            found.setdefault(key, []).append(member)
    return list(found.values())


class _Member:
    """A model on its way: its program, or why it is trained alone, and what its epochs have brought."""

    def __init__(self, model: nn.Module, program: TrainingProgram | str) -> None:
        self.model = model
        self.program = program
        #: The state dict as it is now; set by the company.
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

    def judge(self, epoch: int, settings: TrainSettings) -> None:
        if self.stopped is None:
            best = max((r.epoch for r in self.history if r.best), default=0)
            self.stopped = cast("Ended | None", stopped_by(settings, self.steps, epoch, best))

    def result(self) -> TrainedMember:
        alone = self.program if isinstance(self.program, str) else ""
        return TrainedMember(self.state(), tuple(self.history), self.stopped or "max_epochs", alone, self.error)


class Trainer(Protocol):
    """What trains the members of a company, by their numbers in it."""

    def epoch(
        self,
        going: Sequence[int],
        x: Tensor,
        y: Tensor,
        val: tuple[Tensor, Tensor],
        batches: Sequence[Tensor],
        rate: float,
    ) -> list[EpochOutcome]:
        """One pass of the members `going`; the others have been let go for good."""
        ...

    def state(self, member: int) -> StateDict:
        """A member's state dict, on the CPU."""
        ...


class _Together:
    """Members that learn from the same batches, and what trains them."""

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
        for member, own in zip(going, self.trainer.epoch(numbers, *self.train, self.val, batches, rate), strict=True):
            member.steps += len(batches)
            try:
                loss = mean_loss(own.losses, batches, number, self.settings)
                if not math.isfinite(own.val_loss):
                    raise diverged(f"the validation loss is {own.val_loss} after epoch {number}", self.settings)
            except EvaluationError as error:
                member.fail(error)
            else:
                member.record(number, (loss, own.correct / samples), (own.val_loss, own.val_accuracy), rate)


class _Alone:
    """A member that the ordinary loop trains, taking turns with the others."""

    def __init__(self, member: _Member, dataset: Dataset, settings: TrainSettings, device: torch.device) -> None:
        self.member = member
        member.state = partial(snapshot, member.model)
        self.results = epochs(member.model, dataset, settings, device=device)

    def epoch(self, number: int) -> None:  # noqa: ARG002
        member = self.member
        if member.stopped is not None:
            return
        # On one thread, as the others: sums of floats depend on how many share them.
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


def _ask(keep: Keep, epoch: int, members: Sequence[_Member], going: Sequence[_Member]) -> None:
    """Stops those that `keep` lets go."""
    records = [m.history[-1] if m in going and not m.error else None for m in members]
    answers = keep(epoch, records, lambda place: members[place].state())
    if len(answers) != len(members):
        raise ValueError(f"keep must say of each of {len(members)} models whether it goes on; it said {len(answers)}")
    for member, goes_on in zip(members, answers, strict=True):
        if member.stopped is None and not goes_on:
            member.stopped = "dropped"
