"""A network in training by torch, for layers without compiled steps, and for other devices than CPUs.

The method is that of the compiled steps (``kernels/bits.h``), with the same roundings, gradients, cost and optimizer.
Layers whose bits are learned compute with rounded operands; everything else of the model is called as it is, and its
weights are trained beside. A member's state lies on the CPU and is what it is in compiled training, so that weights are
removed in the same way. An epoch takes it to the device and back.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from bitfront.errors import EvaluationError
from bitfront.interrupts import contained
from bitfront.kernels.losses import log_probabilities
from bitfront.learned_bits.program import Program
from bitfront.learned_bits.state import Cost, Member, Samples, Steps
from bitfront.learned_bits.torch_layer import RoundedLayer, uses_of_bias
from bitfront.learned_bits.torch_program import TorchLayer, TorchProgram
from bitfront.operations.base import Rounds
from bitfront.scoring import Tally, checked_logits, checked_outputs
from bitfront.transforms.quantize import rebuilt

#: Samples that go through the model at a time where nothing is learned.
CHUNK = 4096


@dataclass(eq=False)
class TorchMember(Member):
    """A network in training by torch.

    Attributes:
        loose: the parameters that are trained in float beside, one after another, float32.
        loose_moments: the optimizer's, each of the shape of `loose`.
        buffers: the buffers of the model, by name.
        seed: of what the model draws in training, such as dropout.
    """

    program: TorchProgram
    loose: Tensor = field(default_factory=lambda: torch.zeros(0))
    loose_moments: tuple[Tensor, Tensor] = field(default_factory=lambda: (torch.zeros(0), torch.zeros(0)))
    buffers: dict[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    _running: Running | None = field(default=None, init=False, repr=False)
    prepared: ClassVar[tuple[str, ...]] = ("_running",)

    @classmethod
    def _beside(cls, program: Program, model: nn.Module, seed: int) -> dict[str, Any]:
        assert isinstance(program, TorchProgram)
        parts = [model.get_parameter(name).detach().reshape(-1) for name in program.loose]
        loose = torch.cat([torch.zeros(0), *parts]).clone()
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        moments = (torch.zeros_like(loose), torch.zeros_like(loose))
        return {"loose": loose, "loose_moments": moments, "buffers": buffers, "seed": seed}

    def reshape(self) -> None:
        """Nothing: an epoch begins with the weights that are alive."""

    def copy(self) -> Self:
        """A member that is where this one is."""
        moments = (self.loose_moments[0].clone(), self.loose_moments[1].clone())
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        return replace(super().copy(), loose=self.loose.clone(), loose_moments=moments, buffers=buffers)

    def largest(self) -> float:
        """The largest magnitude among what is learned; NaN or infinite if a parameter is, also one in float."""
        return super().largest() if bool(self.loose.isfinite().all()) else math.nan

    def kept(self) -> dict[str, Tensor]:
        """Tensors that say where it is, beside `taken`."""
        loose = {"loose": self.loose, "loose.first": self.loose_moments[0], "loose.second": self.loose_moments[1]}
        return {**super().kept(), **loose, **{f"buffer.{name}": buffer for name, buffer in self.buffers.items()}}

    def at(self, tensors: Mapping[str, Tensor], taken: int) -> Self:
        """A member of the same network that is where these tensors say."""
        moments = (tensors["loose.first"].clone(), tensors["loose.second"].clone())
        buffers = {name: tensors[f"buffer.{name}"].clone() for name in self.buffers}
        return replace(
            super().at(tensors, taken), loose=tensors["loose"].clone(), loose_moments=moments, buffers=buffers
        )

    def floats(self) -> dict[str, Tensor]:
        """What is trained in float beside the layers whose bits are learned: names in the state dict → values."""
        model = self.program.graph.model
        values, start = {}, 0
        for parameter in map(model.get_parameter, self.program.loose):
            values[id(parameter)] = self.loose[start : start + parameter.numel()].view(parameter.shape).clone()
            start += parameter.numel()
        tied = model.named_parameters(remove_duplicate=False)
        floats = {name: values[id(parameter)] for name, parameter in tied if id(parameter) in values}
        stored = model.state_dict().keys()
        return floats | {name: buffer.clone() for name, buffer in self.buffers.items() if name in stored}

    def learn(self, samples: Samples, steps: Steps) -> float:
        """One step of Adam per batch, in the model's training mode."""
        running = self._opened()
        running.load(self)
        running.model.train()
        order = steps.order.long().to(self.program.device)
        alone = any(isinstance(module, _BatchNorm) for module in running.model.modules())
        total = torch.zeros((), device=self.program.device)
        with _drawing(self.program.device, self.seed * 1_000_003 + self.taken), torch.enable_grad():
            for k, rows in enumerate(torch.split(order, steps.batch)):
                if alone and len(rows) == 1:
                    break  # a batch norm needs two samples; the next order leaves out another one
                total += running.step(samples, rows, steps, k, self.taken + k + 1) * len(rows)
        self.taken += len(steps.rates)
        running.store(self)
        return float(total) / len(order)

    def measured(self, samples: Samples, cost: Cost) -> tuple[float, float]:
        """(what the bits cost, how many of the samples are classified correctly; in another task the metric that leads,
        negated where smaller is better)."""
        running, task = self._opened(), self.program.task
        running.load(self)
        running.model.eval()
        right, tally = 0, Tally(task, self.program.graph.outputs)
        with torch.no_grad():
            running.prepare()
            for x, y in zip(torch.split(samples.x, CHUNK), torch.split(samples.y, CHUNK), strict=True):
                if task.classifies:
                    right += int((running.outputs(x).argmax(1) == y).sum())
                else:
                    tally.add(running.outputs(x), y)
        if task.classifies:
            return self._cost(cost), float(right)
        value = tally.evaluation().values[task.leading.name]
        quality = value if task.leading.direction == "maximize" else -value
        return self._cost(cost), -math.inf if math.isnan(quality) else quality

    def _cost(self, cost: Cost) -> float:
        """What the bits cost, counted in whole numbers on the CPU."""
        total = 0.0
        for place, layer in enumerate(self.program.layers):
            learned = self.rounded(place)
            weight = torch.from_numpy(np.where(learned.weight == 0, 0, learned.weight_bits)).double()
            total += cost.stored * float(learned.weight_bits.sum(dtype=np.int64))
            if cost.pairs:
                data = torch.from_numpy(learned.data_bits).double()[None]
                total += cost.pairs * float(cast(TorchLayer, layer).applied(data, weight).sum())
            if learned.bias_bits is not None:
                total += cost.biases * uses_of_bias(layer, cost) * float(learned.bias_bits.sum(dtype=np.int64))
        return total

    def _opened(self) -> Running:
        if self._running is None:
            self._running = Running(self.program)
        return self._running


class Running:
    """The model of a member on its device, with learned roundings.

    Args:
        program: the network.

    Attributes:
        model: its twin.
    """

    def __init__(self, program: TorchProgram) -> None:
        self.program, self.device = program, torch.device(program.device)
        self.layers = [RoundedLayer(cast(TorchLayer, layer)) for layer in program.layers]
        rounds: dict[str, Mapping[str, Rounds]] = {r.layer.site.name: r.rounds for r in self.layers}
        rounds |= program.fixed
        self.model = rebuilt(program.graph, rounds, {}).to(self.device)
        for rounded in self.layers:
            rounded.module = self.model.get_submodule(rounded.layer.path)
        # What the rewritten graph of a model does not use is not in it.
        held = dict(self.model.named_parameters(remove_duplicate=False))
        shapes = [program.graph.model.get_parameter(name).shape for name in program.loose]
        self._loose = [(held.get(name), shape) for name, shape in zip(program.loose, shapes, strict=True)]
        self._buffers = dict(self.model.named_buffers())
        self.first_bits = self.bits_end = 0
        self.values = self.first = self.second = self.gradients = torch.zeros(0)

    def load(self, member: TorchMember) -> None:
        """Take over where a member is."""
        self.first_bits, self.bits_end = member.first_bits, len(member.values)
        joined = zip((member.values, *member.moments), (member.loose, *member.loose_moments), strict=True)
        self.values, self.first, self.second = (torch.cat(pair).to(self.device) for pair in joined)
        self.gradients = torch.zeros_like(self.values)
        for rounded, place, live in zip(self.layers, member.places, member.live, strict=True):
            slots = None if len(live) == rounded.layer.weights else torch.from_numpy(live).to(self.device)
            rounded.load(place, slots, self._leaf)
        start = self.bits_end
        for parameter, shape in self._loose:
            where = slice(start, start + shape.numel())
            start = where.stop
            if parameter is not None:
                parameter.data = self.values[where].view(shape)
                parameter.grad = self.gradients[where].view(shape)
        with torch.no_grad():
            for name, buffer in self._buffers.items():
                if name in member.buffers:
                    buffer.copy_(member.buffers[name])

    def _leaf(self, where: slice) -> Tensor:
        leaf = self.values[where].detach().requires_grad_()
        leaf.grad = self.gradients[where]
        return leaf

    def store(self, member: TorchMember) -> None:
        """Let a member be where this is."""
        sizes = [self.bits_end, len(self.values) - self.bits_end]
        tensors = (self.values, self.first, self.second)
        values, first, second = (torch.split(tensor.detach().cpu(), sizes) for tensor in tensors)
        member.values, member.loose = values[0].clone(), values[1].clone()
        member.moments = (first[0].clone(), second[0].clone())
        member.loose_moments = (first[1].clone(), second[1].clone())
        changed = {name: buffer.detach().cpu().clone() for name, buffer in self._buffers.items()}
        member.buffers = {name: changed.get(name, buffer) for name, buffer in member.buffers.items()}

    def prepare(self) -> None:
        """Round all weights for the coming calls of the model."""
        for rounded in self.layers:
            rounded.prepare()

    def outputs(self, x: Tensor) -> Tensor:
        """What the model gives, checked to be a row per sample."""
        with contained():
            given = self.model(x.to(self.device))
        if not self.program.task.classifies and isinstance(given, Tensor):
            return given
        classes = given.shape[-1] if isinstance(given, Tensor) and given.dim() else 0
        return checked_logits(given, len(x), classes, exact=True)

    def step(self, samples: Samples, rows: Tensor, steps: Steps, k: int, count: int) -> Tensor:
        """Take step `k` of an epoch, `count` of all. Returns the loss before it, without what bits cost."""
        self.gradients.zero_()
        self.prepare()
        values = self.outputs(samples.x[rows])
        if not values.requires_grad:
            raise EvaluationError(
                "the model cannot be trained: its outputs have no gradients in training mode. Its forward may run "
                "under torch.no_grad, or detach what it returns"
            )
        loss = _loss(values, samples, rows, self.program)
        pressed = float(steps.betas[k]) * torch.stack([r.cost(steps.cost) for r in self.layers]).sum()
        (loss + pressed).backward()  # type: ignore[no-untyped-call]
        self._update(float(steps.rates[k]), steps.bits_rate, count)
        return loss.detach()

    def _update(self, rate: float, bits_rate: float, count: int) -> None:
        """A step of Adam, as the compiled steps take it."""
        root = math.sqrt(1 - 0.999**count)
        g = self.gradients
        with torch.no_grad():
            self.first.add_(g - self.first, alpha=0.1)
            self.second.mul_(0.999).addcmul_(g, g, value=0.001)
            change = self.first / (self.second.sqrt() / root + 1e-8)
            size = min(rate / (1 - 0.9**count), torch.finfo(torch.float32).max)
            change[self.first_bits : self.bits_end].mul_(bits_rate)
            self.values.add_(change, alpha=-size)


def _loss(values: Tensor, samples: Samples, rows: Tensor, program: TorchProgram) -> Tensor:
    """The mean loss of a batch, with gradients."""
    outputs, task = program.graph.outputs, program.task
    if samples.targets is None:
        if task.classifies:
            return task.minimised(values, samples.y[rows].long(), outputs)
        return task.minimised(checked_outputs(task, values, samples.y[rows]), samples.y[rows], outputs)
    targets = samples.targets[rows]
    if outputs in ("class_probabilities", "class_log_probabilities"):
        p = values if outputs == "class_probabilities" else values.exp()
        return functional.binary_cross_entropy(p, targets)
    return -(targets * log_probabilities(values, outputs)).sum(1).mean()


@contextlib.contextmanager
def _drawing(device: str, seed: int) -> Iterator[None]:
    """Inside, torch draws from this seed; after it, its generators are as before."""
    gpus = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield
