"""Steps of Adam, AdamW and SGD with momentum, by the functions under ``torch.optim``: the same bits. And learning rates
that change with every step.

Making an object of ``torch.optim`` imports torch's compiler, which nothing here uses: two seconds of every command that
trains, and of every worker process. Its step also takes some 20 µs longer than the function: a tenth of a training step
of a small network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from bitfront.errors import EvaluationError

OptimizerName = Literal["adam", "adamw", "sgd"]
SchedulerName = Literal["linear", "cosine", "constant", "constant_with_warmup"]
#: Where torch has one kernel for a step of all parameters.
FUSED = ("cpu", "cuda")


@dataclass(frozen=True)
class Schedule:
    """A learning rate that changes with every step, as the schedulers of ``transformers`` with these names.

    Attributes:
        name: how it goes on after the warm-up: down to 0 on a line or a cosine, or constant.
        rate: the highest.
        warmup: so many steps it rises from 0 on a line.
        steps: of the whole training; at least 1.
    """

    name: SchedulerName
    rate: float
    warmup: int
    steps: int

    def rate_at(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        if step < self.warmup:
            return self.rate * step / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        if self.name == "linear":
            return self.rate * (1 - done)
        if self.name == "cosine":
            return self.rate * (1 + math.cos(math.pi * done)) / 2
        return self.rate


class Optimizer:
    """An optimizer of some parameters, with torch's defaults: betas 0.9 and 0.999, eps 1e-8; for sgd momentum 0.9,
    Nesterov's.

    Args:
        rate: the learning rate; may be changed between steps.
        weight_decay: as ``torch.optim`` defines it: decoupled for adamw, L2 for the others.
        fused: one kernel per step; it needs parameters on one of the devices `FUSED`.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        name: OptimizerName,
        rate: float,
        weight_decay: float,
        *,
        fused: bool = True,
    ) -> None:
        self.name, self.rate, self.weight_decay, self.fused = name, rate, weight_decay, fused
        self.parameters = tuple(parameters)
        # The same memory without autograd: cheaper than to switch autograd off in every step.
        self._values = [p.detach() for p in self.parameters]
        settings: dict[str, Any] = {"weight_decay": weight_decay, "maximize": False}
        settings["fused"] = True if fused else None  # None: as torch finds best
        # What is remembered, in the columns that torch's functions take, with an entry per parameter or with none.
        self._columns: list[list[Any]]
        self._function: Callable[..., None]
        if name == "sgd":
            self._function = partial(sgd, momentum=0.9, dampening=0.0, nesterov=True, **settings)
            self._columns = [[None] * len(self._values)]  # the momentum, None before a parameter's first step
        else:
            function = adam if name == "adam" else adamw
            self._function = partial(function, beta1=0.9, beta2=0.999, eps=1e-8, amsgrad=False, **settings)
            counts = [torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu") for p in self._values]
            first, second = ([torch.zeros_like(p) for p in self._values] for _ in range(2))
            self._columns = [first, second, [], counts]
        self._alike = True  # whether all parameters have taken a first step, or none has

    def step(self) -> None:
        """Change the parameters that have a gradient. Raises EvaluationError for a sparse one."""
        gradients = [p.grad for p in self.parameters]
        for gradient in gradients:
            if gradient is None or gradient.is_sparse or not self._alike:
                break
        else:
            self._function(self._values, gradients, *self._columns, lr=self.rate)
            return
        groups: dict[bool, list[int]] = {}
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                if gradient.is_sparse:
                    raise EvaluationError(f"{self.name} cannot be used with sparse gradients")
                groups.setdefault(self._columns[0][i] is None, []).append(i)
        for places in groups.values():
            columns = [[column[i] for i in places] if column else [] for column in self._columns]
            values = [self._values[i] for i in places]
            self._function(values, [gradients[i] for i in places], *columns, lr=self.rate)
            for i, momentum in zip(places, columns[0], strict=True):
                self._columns[0][i] = momentum  # sgd's may be new
        self._alike = len({entry is None for entry in self._columns[0]}) == 1

    def of_rows(self, parameters: Sequence[nn.Parameter], rows: Tensor) -> Optimizer:
        """The same optimizer, of parameters that keep only some rows of those before, in the same order.

        Args:
            parameters: ``old[rows]`` of each.
            rows: int64, shape (rows that stay,).
        """
        other = Optimizer(parameters, self.name, self.rate, self.weight_decay, fused=self.fused)
        # Counts of steps have no rows.
        other._columns = [[e if e is None or not e.dim() else e[rows] for e in column] for column in self._columns]
        other._alike = self._alike
        return other


@dataclass(frozen=True)
class Pace:
    """When the optimizer takes a step in an epoch, and at which rate.

    Attributes:
        accumulation: batches whose gradients are averaged for a step.
        schedule: the rate of each step; None where the rate of the epoch stays.
        before: steps in earlier epochs.
    """

    accumulation: int
    schedule: Schedule | None
    before: int

    def learn(self, loss: Tensor, optimizer: Optimizer, batch: int, batches: int) -> None:
        """Learn from the loss of a batch, counted from 0, of an epoch with so many batches."""
        done, place = divmod(batch, self.accumulation)
        if place == 0:
            for parameter in optimizer.parameters:  # the same as zero_grad(), but faster
                parameter.grad = None
        together = min(self.accumulation, batches - done * self.accumulation)  # fewer at the end of an epoch
        (loss if together == 1 else loss / together).backward()  # type: ignore[no-untyped-call]
        if place + 1 == together:
            if self.schedule is not None:
                optimizer.rate = self.schedule.rate_at(self.before + done)
            optimizer.step()
