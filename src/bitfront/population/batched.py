"""Population training on a GPU: members with the same structure form a stack, and each layer is one batched product.

Activations of vectors have shape (members, samples, features), those of images (samples, members · channels, height,
width). So convolutions are grouped convolutions, and PyTorch's batch norm and pooling can be used. Members with another
structure or other widths are in another stack; bit-widths are tensors with one entry per member. Members do not
influence each other. But a library may choose another algorithm for another number of members, so results on a GPU are
equal within float error, not to the last bit.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfront import kernels
from bitfront.formats.grid import FixedPoint
from bitfront.kernels.whole import whole_by_row
from bitfront.population.compiled import EpochOutcome
from bitfront.population.programs import TrainingProgram, TrainingStep
from bitfront.training import StateDict, TrainSettings, optimizer_of, snapshot

#: Number of samples that are evaluated at a time.
VAL_BATCH = 8192
#: scale, low, high and step of each member's grid, shape (4, members), with the way of rounding (5, members); None: no
#: rounding.
Grids = Tensor | None


def structure(model: nn.Module, program: TrainingProgram) -> Hashable:
    """Equal for models that can be in one stack. It covers everything but the weights and the numbers of the grids."""
    steps = []
    for step in program.steps:
        norm = model.get_submodule(step.path) if step.kind == "norm" else None
        owned = [name for name, p in _owned(model, step) if p is not None]
        settings = (norm.momentum, norm.eps) if norm is not None else ()
        steps.append(
            (replace(step, first=None, second=None), step.first is None, step.second is None, *owned, settings)
        )
    return tuple(steps), program.shapes


class GpuTrainer:
    """Trains models with the same structure, on one device."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        programs: Sequence[TrainingProgram],
        settings: TrainSettings,
        device: torch.device,
    ) -> None:
        self.models = list(models)
        self.program = programs[0]
        self.settings = settings
        self.device = device
        self.members = list(range(len(models)))
        self.states: list[StateDict] = [{} for _ in models]
        self.values: dict[tuple[str, str], nn.Parameter] = {}
        self.buffers: dict[tuple[str, str], Tensor] = {}
        self.taken = 0
        for step in self.program.steps:
            modules = [model.get_submodule(step.path) for model in models] if step.path else []
            for name, parameter in _owned(models[0], step):
                if parameter is not None:
                    stacked = torch.stack([getattr(m, name).detach() for m in modules])
                    self.values[step.path, name] = nn.Parameter(stacked.to(device))
            for name in ("running_mean", "running_var") if step.kind == "norm" else ():
                self.buffers[step.path, name] = torch.stack([m.get_buffer(name) for m in modules]).to(device)
        self.grids = [
            (_stacked([s.first for s in steps], device), _stacked([s.second for s in steps], device))
            for steps in zip(*(p.steps for p in programs), strict=True)
        ]
        self.optimizer = optimizer_of(list(self.values.values()), settings, device)

    def epoch(
        self,
        going: Sequence[int],
        x: Tensor,
        y: Tensor,
        val: tuple[Tensor, Tensor],
        batches: Sequence[Tensor],
        rate: float,
    ) -> list[EpochOutcome]:
        """Train the members `going` for one epoch; see ``Trainer.epoch``. The training of the others ends for good."""
        if list(going) != self.members:
            self._let_go(going)
        self.optimizer.rate = rate
        losses, correct = [], torch.zeros(len(going), dtype=torch.int64, device=self.device)
        for batch in batches:
            target = y.index_select(0, batch)
            logits = self._logits(x.index_select(0, batch), train=True)
            each = F.cross_entropy(logits.flatten(0, 1), target.repeat(len(going)), reduction="none")
            loss = each.view(len(going), -1).mean(dim=1)
            for parameter in self.values.values():
                parameter.grad = None
            # The gradient of the sum is, for each member's weights, the gradient of the mean loss of this member.
            loss.sum().backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            losses.append(loss.detach())
            correct += (logits.detach().argmax(2) == target).sum(dim=1)
        self.taken += len(batches)
        return self._outcomes(torch.stack(losses, dim=1).double().cpu(), correct.tolist(), val)

    def state(self, member: int) -> StateDict:
        """The state dict of a model on the CPU: the current one, or the last one if its training has ended."""
        if member not in self.members:
            return self.states[member]
        index = self.members.index(member)
        state = snapshot(self.models[member])
        tensors = {**self.values, **self.buffers}
        for (path, name), stacked in tensors.items():
            state[f"{path}.{name}" if path else name] = stacked[index].detach().cpu().clone()
        for path in dict.fromkeys(step.path for step in self.program.steps if step.kind == "norm"):
            calls = sum(step.path == path for step in self.program.steps)
            state[f"{path}.num_batches_tracked" if path else "num_batches_tracked"] += calls * self.taken
        return state

    def _let_go(self, going: Sequence[int]) -> None:
        for member in self.members:
            if member not in going:
                self.states[member] = self.state(member)
        kept = torch.tensor([self.members.index(i) for i in going], device=self.device)
        self.values = {key: nn.Parameter(p.detach()[kept]) for key, p in self.values.items()}
        self.buffers = {key: b[kept] for key, b in self.buffers.items()}
        self.grids = [(None if a is None else a[:, kept], None if b is None else b[:, kept]) for a, b in self.grids]
        self.optimizer = self.optimizer.of_rows(list(self.values.values()), kept)
        self.members = list(going)

    @torch.no_grad()
    def _outcomes(self, losses: Tensor, correct: Sequence[int], val: tuple[Tensor, Tensor]) -> list[EpochOutcome]:
        loss = torch.zeros(len(losses), dtype=torch.float64, device=self.device)
        right = torch.zeros(len(losses), dtype=torch.int64, device=self.device)
        for x, y in zip(torch.split(val[0], VAL_BATCH), torch.split(val[1], VAL_BATCH), strict=True):
            part, hits = kernels.score(self._logits(x, train=False).transpose(1, 2), y.int())
            loss += part
            right += hits
        n = len(val[1])
        scores = zip(losses, correct, (loss / n).tolist(), (right / n).tolist(), strict=True)
        return [EpochOutcome(*score) for score in scores]

    def _logits(self, x: Tensor, *, train: bool) -> Tensor:
        """Logits of all members on the same samples, shape (members, samples, classes)."""
        count = len(self.members)
        shared = x.expand(count, *x.shape) if x.dim() == 2 else x.repeat(1, count, 1, 1)
        values: dict[int, Tensor] = {0: shared}
        for step, grids in zip(self.program.steps, self.grids, strict=True):
            values[step.output] = self._step(step, [values[i] for i in step.inputs], grids, train)
        return values[self.program.logits]

    def _step(self, step: TrainingStep, given: Sequence[Tensor], grids: tuple[Grids, Grids], train: bool) -> Tensor:
        x, count = given[0], len(self.members)
        if step.kind == "linear":
            weight, bias = self._weights(step, grids)
            product = torch.bmm(x, weight.transpose(1, 2))
            return product if bias is None else product + bias.unsqueeze(1)
        if step.kind == "conv":
            assert step.window is not None
            weight, bias = self._weights(step, grids)
            flat = None if bias is None else bias.flatten()
            return F.conv2d(x, weight.flatten(0, 1), flat, step.window.stride, step.window.padding, groups=count)
        if step.kind == "norm":
            return self._norm(step, x, train)
        if step.kind == "activate":
            first, second = (None if g is None else _along(g, x) for g in grids)
            result: Tensor = _Activate.apply(x, first, step.rectify, second)  # type: ignore[no-untyped-call]
            return result
        if step.kind == "add":
            return given[0] + given[1]
        if step.kind == "flatten":
            return x.reshape(len(x), count, -1).transpose(0, 1)
        assert step.window is not None
        if step.kind == "mean":
            return F.avg_pool2d(x, step.window.kernel, step.window.stride)
        return F.max_pool2d(x, step.window.kernel, step.window.stride, step.window.padding)

    def _weights(self, step: TrainingStep, grids: tuple[Grids, Grids]) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.values[step.path, "weight"], self.values.get((step.path, "bias"))
        return _rounded(weight, grids[0]), None if bias is None else _rounded(bias, grids[1])

    def _norm(self, step: TrainingStep, x: Tensor, train: bool) -> Tensor:
        norm = self.models[0].get_submodule(step.path)
        mean, variance = (self.buffers[step.path, name] for name in ("running_mean", "running_var"))
        weight, bias = (self.values.get((step.path, name)) for name in ("weight", "bias"))
        merged = x.transpose(0, 1).flatten(1) if x.dim() == 3 else x
        out = F.batch_norm(
            merged,
            mean.view(-1),
            variance.view(-1),
            None if weight is None else weight.flatten(),
            None if bias is None else bias.flatten(),
            train,
            float(norm.momentum),  # type: ignore[arg-type]
            float(norm.eps),  # type: ignore[arg-type]
        )
        return out.view(len(out), len(x), -1).transpose(0, 1) if x.dim() == 3 else out


class _Activate(torch.autograd.Function):
    """Rounding, ReLU and rounding again. Gradients pass unchanged where a value was inside the ranges."""

    @staticmethod
    def forward(ctx, x, first, rectify, second):  # type: ignore[no-untyped-def]
        passes = None
        for kind, grid in (("round", first), ("relu", None), ("round", second)):
            if kind == "relu":
                if not rectify:
                    continue
                x = F.relu(x)
                inside = x > 0
            elif grid is None:
                continue
            else:
                _, low, high, step = grid[:4]
                inside = (x >= low * step) & (x <= high * step)
                x = _on_grid(x, grid)
            passes = inside if passes is None else passes & inside
        ctx.save_for_backward(passes)
        return x

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        (passes,) = ctx.saved_tensors
        return torch.where(passes, gradient, 0.0), None, None, None


def _rounded(values: Tensor, grids: Grids) -> Tensor:
    """Weights or biases, rounded to their grids; gradients as in ``transforms.quantize.through``."""
    if grids is None:
        return values
    rounded = _on_grid(values.detach(), grids.view(len(grids), -1, *[1] * (values.dim() - 1)))
    return rounded - (values.detach() - values)


def _on_grid(values: Tensor, grids: Tensor) -> Tensor:
    scale, low, high, step, *way = grids
    steps = values * scale
    result: Tensor = torch.clamp(whole_by_row(steps, way[0]) if way else torch.round(steps), low, high) * step
    return result


def _along(grids: Tensor, x: Tensor) -> Tensor:
    """One entry per member, expanded to the values of x or broadcastable to them."""
    if x.dim() == 3:
        return grids.view(len(grids), -1, 1, 1)
    channels = x.shape[1] // grids.shape[1]
    return grids.repeat_interleave(channels, dim=1).view(len(grids), 1, -1, 1, 1)


def _stacked(grids: Sequence[FixedPoint | None], device: torch.device) -> Grids:
    """Scale, low, high and step of each member; the way of rounding too, unless all round half to even."""
    if grids[0] is None:
        return None
    rows = [g.row for g in grids if g is not None]
    rows = rows if any(row[-1] for row in rows) else [row[:-1] for row in rows]  # type: ignore[misc]
    return torch.tensor(rows, dtype=torch.float32, device=device).t().contiguous()


def _owned(model: nn.Module, step: TrainingStep) -> list[tuple[str, Tensor | None]]:
    if not step.path:
        return []
    module = model.get_submodule(step.path)
    return [(name, getattr(module, name)) for name in ("weight", "bias")]
