"""Population training on the CPU: the compiled steps train each member on one thread, with its data in the cache.

Members share the batches, which are gathered once for all of them with the samples side by side, and nothing else. So
the weights of a member do not depend on the other members, and members may differ in widths, formats and structure. A
thread that has finished a member takes the next one.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfront import kernels
from bitfront.kernels import training as steps
from bitfront.population.compiled_program import CompiledProgram, compile_program, rounded_up
from bitfront.population.programs import TrainingProgram
from bitfront.training import StateDict, TrainSettings, snapshot

#: Batches are gathered in pieces of at most so many bytes.
GATHERED_BYTES = 16 << 20
#: Bytes of activations and gradients of a tile of samples: they should fit into the cache of one core.
TILE_BYTES = 1 << 19
#: Smallest number of samples in a tile.
SMALLEST_TILE = 64


@dataclass(frozen=True)
class EpochOutcome:
    """The result of an epoch of one member.

    Attributes:
        losses: mean loss of each batch before its step, shape (batches,).
        correct: number of samples in the batches that were classified correctly, before the steps.
        val_loss, val_accuracy: mean loss and share of correct answers on the val split.
    """

    losses: Tensor
    correct: int
    val_loss: float
    val_accuracy: float


@dataclass
class CompiledMember:
    """A network in training.

    Attributes:
        model: the model before training; not changed.
        native: the structure that the compiled steps take; it points into the tensors below.
        compiled: the operations of the model.
        values: its parameters, one after another, float32.
        buffers: the running statistics of its batch norms, one after another, float32.
        moments: first and second moment of the optimizer, each of the shape of `values`.
        norms: per batch norm: module path, place in `buffers`, channels, calls per step.
        taken: number of optimizer steps so far.
    """

    model: nn.Module
    native: steps.NativeMember
    compiled: CompiledProgram
    values: Tensor
    buffers: Tensor
    moments: tuple[Tensor, Tensor]
    norms: tuple[tuple[str, int, int, int], ...]
    taken: int = 0

    @staticmethod
    def of(model: nn.Module, program: TrainingProgram) -> CompiledMember:
        """A member that starts from the weights of `model`, which is not changed."""
        places: dict[int, int] = {}
        place = 0
        for parameter in model.parameters():
            places[id(parameter)] = place
            place += parameter.numel()
        values = torch.cat([p.detach().reshape(-1).cpu() for p in model.parameters()])
        norms: list[tuple[str, int, int, int]] = []
        statistics: list[Tensor] = []
        calls = [step.path for step in program.steps if step.kind == "norm"]
        for path in dict.fromkeys(calls):
            norm = model.get_submodule(path)
            mean, variance = norm.get_buffer("running_mean").cpu(), norm.get_buffer("running_var").cpu()
            norms.append((path, sum(s.numel() for s in statistics), len(mean), calls.count(path)))
            statistics += [mean, variance]
        buffers = torch.cat(statistics).clone() if statistics else torch.zeros(1)
        compiled = compile_program(model, program, places, {path: place for path, place, _, _ in norms})
        moments = (torch.zeros_like(values), torch.zeros_like(values))
        native = steps.NativeMember(
            ctypes.addressof(compiled.operations),
            len(compiled.operations),
            len(values),
            compiled.logits,
            program.shapes[program.logits][0],
            values.data_ptr(),
            buffers.data_ptr(),
            moments[0].data_ptr(),
            moments[1].data_ptr(),
        )
        return CompiledMember(model, native, compiled, values, buffers, moments, tuple(norms))

    def state(self) -> StateDict:
        """The current state dict, on the CPU."""
        state = snapshot(self.model)
        named = dict(self.model.named_parameters(remove_duplicate=False))
        for key, parameter in named.items():
            if key in state:
                place = self.compiled.parameters[id(parameter)]
                state[key] = self.values[place : place + parameter.numel()].reshape(parameter.shape).clone()
        for path, place, channels, calls in self.norms:
            prefix = f"{path}." if path else ""
            state[f"{prefix}running_mean"] = self.buffers[place : place + channels].clone()
            state[f"{prefix}running_var"] = self.buffers[place + channels : place + 2 * channels].clone()
            state[f"{prefix}num_batches_tracked"] += calls * self.taken
        return state

    def tile(self, batch: int) -> int:
        """Number of samples of a batch that go through the network together; with batch norms the whole batch."""
        whole = rounded_up(batch, steps.LANES)
        if self.norms:
            return whole
        fitting = TILE_BYTES // (8 * self.compiled.rows) // steps.LANES * steps.LANES
        return min(whole, max(SMALLEST_TILE, fitting))


class CpuTrainer:
    """Trains models on the CPU, which are named by their number.

    Args:
        models: not changed.
        programs: the steps of each model.
        settings: for every model.
        parts: as in ``train_population``.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        programs: Sequence[TrainingProgram],
        settings: TrainSettings,
        parts: dict[str, float] | None,
    ) -> None:
        self.members = [CompiledMember.of(m, p) for m, p in zip(models, programs, strict=True)]
        self.settings = settings
        self.parts = parts

    def epoch(
        self,
        going: Sequence[int],
        x: Tensor,
        y: Tensor,
        val: tuple[Tensor, Tensor],
        batches: Sequence[Tensor],
        rate: float,
    ) -> list[EpochOutcome]:
        """Train some members for one epoch; see ``Trainer.epoch``."""
        members = [self.members[i] for i in going]
        return train_epoch(members, x, y, val, batches, self.settings, rate, self.parts)

    def state(self, member: int) -> StateDict:
        """The current state dict of a model, on the CPU."""
        return self.members[member].state()


def train_epoch(
    members: Sequence[CompiledMember],
    x: Tensor,
    y: Tensor,
    val: tuple[Tensor, Tensor],
    batches: Sequence[Tensor],
    settings: TrainSettings,
    rate: float,
    parts: dict[str, float] | None = None,
) -> list[EpochOutcome]:
    """Train every member for one epoch and evaluate it on the val split.

    The members are shared among as many threads as torch may use. One thread at a time works on a member, and its
    instructions do not depend on the other members.

    Args:
        members: their parameters, statistics and moments are changed.
        x, y: the train split: samples, float32, and labels, int64.
        val: the val split, as (x, y).
        batches: the samples of each batch, as indices into `x` and `y`.
        settings: for every member.
        rate: the learning rate.
        parts: as in ``train_population``.

    Returns:
        The outcome of each member, in the order of `members`.
    """
    labels, val_labels = y.int(), val[1].int()
    losses: list[list[Tensor]] = [[] for _ in members]
    correct = [0] * len(members)
    val_x = _side_by_side(val[0].flatten(1).numpy()[None])
    workspaces = [_Workspace(members, max(len(b) for b in batches)) for _ in range(_threads(len(members)))]
    scores = [(0.0, 0.0)] * len(members)

    def learn(i: int, workspace: _Workspace, part: tuple[Tensor, Tensor, int]) -> None:
        member = members[i]
        kind = steps.OPTIMIZERS.index(settings.optimizer)
        optimizer = steps.NativeOptimizer(kind, member.taken, rate, settings.weight_decay)
        seconds = workspace.seconds if parts is not None else None
        scratch = workspace.scratch(member.tile(part[2]))
        batch_losses, right = steps.train_batches(member.native, scratch, optimizer, *part, seconds)
        member.taken += len(batch_losses)
        losses[i].append(batch_losses)
        correct[i] += right

    def evaluate(i: int, workspace: _Workspace) -> None:
        logits = steps.logits(members[i].native, workspace.scratch(workspace.tile), val_x[0], len(val_labels))
        loss, right = kernels.score(logits.unsqueeze(0), val_labels)
        scores[i] = float(loss) / len(val_labels), int(right) / len(val_labels)

    with ThreadPoolExecutor(len(workspaces)) as pool:
        for part in _gathered(x, labels, batches):
            _share_out(functools.partial(learn, part=part), len(members), workspaces, pool)
        _share_out(evaluate, len(members), workspaces, pool)
    if parts is not None:
        _add_seconds(parts, workspaces)
    return [
        EpochOutcome(torch.cat(of_batches), right, *score)
        for of_batches, right, score in zip(losses, correct, scores, strict=True)
    ]


def _add_seconds(parts: dict[str, float], workspaces: Sequence[_Workspace]) -> None:
    for workspace in workspaces:
        for name, seconds in zip(steps.PARTS, workspace.seconds.tolist(), strict=True):
            parts[name] = parts.get(name, 0.0) + seconds


def _threads(members: int) -> int:
    return max(1, min(torch.get_num_threads(), members))


def _share_out(
    work: Callable[[int, _Workspace], None], count: int, workspaces: Sequence[_Workspace], pool: ThreadPoolExecutor
) -> None:
    """Call ``work(i, workspace)`` for every i below `count`, on a thread per workspace, each taking the next i."""
    turns = iter(range(count))

    def run(workspace: _Workspace) -> None:
        for i in turns:
            work(i, workspace)

    others = [pool.submit(run, workspace) for workspace in workspaces[1:]]
    run(workspaces[0])
    for other in others:
        other.result()


class _Workspace:
    """The memory of one thread for intermediate values, large enough for every member."""

    def __init__(self, members: Sequence[CompiledMember], batch: int) -> None:
        self.tile = max(member.tile(batch) for member in members)
        rows = max(member.compiled.rows for member in members)
        stride = _stride(self.tile)
        self._rows = torch.zeros(rows, stride)
        self._gradients = torch.zeros(rows + 1, stride)
        self._packed = torch.zeros(max(member.compiled.packed for member in members))
        self._learned = torch.zeros(max(len(member.values) for member in members))
        self.seconds = torch.zeros(len(steps.PARTS), dtype=torch.float64)

    def scratch(self, tile: int) -> steps.NativeScratch:
        stride = _stride(tile)
        return steps.NativeScratch(
            self._rows.data_ptr(),
            self._gradients.data_ptr() + 4 * stride,
            self._packed.data_ptr(),
            self._learned.data_ptr(),
            stride,
            tile,
        )


def _stride(samples: int) -> int:
    """Number of floats from row to row: an odd number of cache lines, so that columns use all cache sets."""
    return (rounded_up(samples, steps.LANES) // steps.LANES | 1) * steps.LANES


def _gathered(x: Tensor, labels: Tensor, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Pieces of consecutive batches of one size: (samples side by side, labels, batch size)."""
    # NumPy, because torch would use several threads for this, and on a busy machine wait for them.
    samples, classes = x.flatten(1).numpy(), labels.numpy()
    begin = 0
    while begin < len(batches):
        size = len(batches[begin])
        most = max(1, GATHERED_BYTES // (4 * samples.shape[1] * size))
        end = begin
        while end < len(batches) and end - begin < most and len(batches[end]) == size:
            end += 1
        wanted = np.concatenate([batch.numpy() for batch in batches[begin:end]])
        piece = samples[wanted].reshape(end - begin, size, -1)
        yield _side_by_side(piece), torch.from_numpy(classes[wanted]).view(end - begin, size), size
        begin = end


def _side_by_side(x: NDArray[np.float32]) -> Tensor:
    """From shape (steps, samples, features) to (steps, features, stride), with zeros after the samples."""
    count, samples, features = x.shape
    out = np.zeros((count, features, _stride(samples)), dtype=np.float32)
    out[:, :, :samples] = x.transpose(0, 2, 1)
    return torch.from_numpy(out)
