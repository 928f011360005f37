"""The course of a training: cycles of rising pressure, the networks that each cycle gives, and where it can go on.

A cycle trains all members for some epochs. The learning rate follows a cosine down to 0, so the last epochs of a cycle
give settled networks. The pressure moves to that of the cycle in the first quarter, and then stays. Epochs get cheaper
as weights are removed, so later cycles have more of them. The state after a cycle is all that the next one needs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfront.errors import DataError, EvaluationError
from bitfront.kernels import bits as compiled
from bitfront.learned_bits.member import BitsMember
from bitfront.learned_bits.program import BitsProgram, Program
from bitfront.learned_bits.state import Cost, Floats, LayerBits, Member, Samples, Steps
from bitfront.learned_bits.steering import Hurry, Rise, Target
from bitfront.learned_bits.torch_member import TorchMember
from bitfront.pareto import non_dominated

#: The share of a cycle at its end whose networks may be kept.
SETTLED = 0.4
#: The share of a cycle in which the pressure moves.
MOVING = 0.25
#: An epoch without a live weight takes this share of the time of one with all of them: the loss, the roundings of the
#: input, the gathering of samples.
FLOOR = 0.2
#: Fractional bits of every value at the start.
START_BITS = 5.0
#: At the start the pressure on all bits is this share of a nat; at the end so many times as much. Bits that weights
#: share go later: only when all of these weights can do without.
FIRST_PRESSURE, RISE, SHARED_RISE = 0.02, 200.0, 2000.0


@dataclass(frozen=True)
class Schedule:
    """How weights and bits are trained.

    Attributes:
        cycles: number of cycles.
        epochs: epochs of a cycle while all weights are alive; later cycles have more, in about the same time.
        members: how many networks are trained beside each other, each from its own seed.
        networks: how many networks a cycle gives per member.
        batch_size: samples per step.
        learning_rate: at the start of each cycle.
        bits_rate: how many times as fast bits learn.
        patience: after how many epochs of being zero a weight is removed.
        first, last: the pressure of the first and of the last cycle, in nats per bit of the cost; None: from the cost
            at the start.
        seed: of the order of the samples.
    """

    cycles: int
    epochs: float
    members: int
    networks: int
    batch_size: int
    learning_rate: float
    bits_rate: float
    patience: int
    first: float | None
    last: float | None
    seed: int


@dataclass(frozen=True)
class Pace:
    """How far a cycle goes, where a clock says it.

    Attributes:
        epochs: of the cycle while all weights are alive.
        left: number of cycles that there is time for, this one among them: the last pressure is reached in so many.
    """

    epochs: float
    left: int


@dataclass(frozen=True, eq=False)
class Network:
    """A network that a cycle gave.

    Attributes:
        layers: path of a layer → what was learned of it.
        epoch: in which epoch of its cycle, from 1 on.
        pressure: the pressure that it was trained under.
        cost, right: what it costs, and how many of the val samples it classifies correctly, by its training; in another
            task the metric that leads, negated where smaller is better.
        floats: what is trained in float beside these layers: names in the state dict → values.
    """

    layers: Mapping[str, LayerBits]
    epoch: int
    pressure: float
    cost: float
    right: float
    floats: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Moment:
    """How far a training is, after an epoch of its first member.

    Attributes:
        cycle, cycles: the cycle, from 1 on, and how many there are.
        epoch, epochs: the epoch of the cycle, from 1 on, and how many it has.
        pressure: in nats per unit of the cost.
        quality, cost: of the network, on the samples that networks are chosen by; None before the cycle settles.
        metric: what the quality is: accuracy, or what leads in another task.
    """

    cycle: int
    cycles: int
    epoch: int
    epochs: int
    pressure: float
    quality: float | None = None
    cost: float | None = None
    metric: str = "accuracy"


@dataclass(eq=False)
class Position:
    """Where a member is after some cycles: everything that the next cycle needs."""

    member: Member
    order: torch.Generator
    cycle: int = 0
    pressure: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "order": self.order.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        order = torch.Generator()
        order.set_state(state["order"])
        vars(self).update({**state, "order": order})

    def copy(self) -> Position:
        """The same place; training one of the two does not change the other."""
        order = torch.Generator()
        order.set_state(self.order.get_state())
        return replace(self, member=self.member.copy(), order=order)


#: Trains the members of a cycle in place of this process.
Elsewhere = Callable[["Course", Moment, float, Callable[[Moment], None]], tuple[list[Position], list[list["Network"]]]]


@dataclass(eq=False)
class Course:
    """A training with learned bits.

    Attributes:
        program: the steps of the network.
        schedule: as given.
        cost: what bits cost.
        train, val: samples to learn from, and to choose networks by.
        positions: per member, where it is.
        starting_cost: what the bits cost before the first cycle.
        target: what the constraints of the search say.
        rise: how the pressure rises under a target.
        fulfils: whether a network fulfils the target's other constraints.
        hurry: how much further than planned the pressure rises.
        scale: how large a loss is: 1 of one in nats, otherwise that of a constant answer.
        elsewhere: trains the members of a cycle in place of this process: (the course, the start of the cycle, its
            epochs, what hears of them) → (where the members are then, per member the networks that it gives).
    """

    program: Program
    schedule: Schedule
    cost: Cost
    train: Samples
    val: Samples
    positions: list[Position]
    starting_cost: float
    target: Target = field(default_factory=Target)
    rise: Rise = field(default_factory=Rise)
    fulfils: Callable[[Network], bool] | None = None
    hurry: Hurry = field(default_factory=Hurry)
    scale: float = 1.0
    elsewhere: Elsewhere | None = None
    weights: int = field(init=False)

    def __post_init__(self) -> None:
        self.weights = sum(layer.weights for layer in self.program.layers)

    @staticmethod
    def begin(
        program: Program,
        models: Sequence[nn.Module],
        largest: Sequence[Floats],
        schedule: Schedule,
        cost: Cost,
        train: Samples,
        val: Samples,
    ) -> Course:
        """A course at its start.

        Args:
            models: a float model per member, all with the steps of `program`.
            largest: per layer, the largest magnitude of each value of its input.
        """
        kind: type[Member] = BitsMember if isinstance(program, BitsProgram) else TorchMember
        seeds = [schedule.seed + 1000 * place for place in range(len(models))]
        positions = [
            Position(
                kind.of(program, model, largest, START_BITS, seed),
                torch.Generator().manual_seed(seed),
            )
            for seed, model in zip(seeds, models, strict=True)
        ]
        starting_cost, _ = positions[0].member.measured(Samples(train.x[:1], train.y[:1]), cost)
        return Course(program, schedule, cost, train, val, positions, starting_cost)

    @property
    def steered(self) -> bool:
        """Whether constraints say how the pressure rises."""
        return bool(self.target) and not self.rise.free

    @property
    def range(self) -> tuple[float, float]:
        """The pressure of the first and of the last cycle, as planned."""
        schedule = self.schedule
        first = schedule.first if schedule.first is not None else FIRST_PRESSURE * self.scale / self.starting_cost
        shared = not self.steered and all(layer.shared.weight != "element" for layer in self.program.layers)
        return first, schedule.last if schedule.last is not None else (SHARED_RISE if shared else RISE) * first

    def cycle(
        self, number: int, threads: int, on_epoch: Callable[[Moment], None], pace: Pace | None = None
    ) -> list[list[Network]]:
        """Train every member for one cycle. Returns per member the networks that it gives, the cheapest first.

        Args:
            number: of the cycle, from 0 on; the positions must be at its start.
            threads: how many members are trained at a time.
            on_epoch: called after each epoch of the first member, in the thread that trains it.
            pace: how far it goes, in place of what the schedule says.
        """
        cycles = self.schedule.cycles if pace is None else number + pace.left
        pressure, length = self._pressure(number, cycles), self.schedule.epochs if pace is None else pace.epochs
        start = Moment(number + 1, cycles, 0, 0, pressure, metric=self.program.task.leading.name)
        steered = self.steered
        before = [position.copy() for position in self.positions] if steered else []
        if self.elsewhere is not None:
            self.positions, networks = self.elsewhere(self, start, length, on_epoch)
        else:
            with ThreadPoolExecutor(self.program.at_a_time(threads, len(self.positions))) as pool:
                jobs = [
                    pool.submit(self.train_member, position, start, length, on_epoch if place == 0 else silent)
                    for place, position in enumerate(self.positions)
                ]
                networks = [job.result() for job in jobs]
        if steered:
            self._steer(number, cycles, pressure, before, [network for each in networks for network in each])
        else:
            # Where the user says it ends, or where there is no time for what was planned, it does not end later.
            fixed = self.schedule.last is not None or cycles != self.schedule.cycles
            done = 0.0 if fixed else (number + 1) / cycles
            self.hurry = self.hurry.after(max(network.right for each in networks for network in each), done)
        return networks

    def _steer(
        self, number: int, cycles: int, pressure: float, before: Sequence[Position], networks: Sequence[Network]
    ) -> None:
        """Choose the next pressure after a cycle that gave some networks, and where the next cycle begins.

        Args:
            before: where the members were before the cycle.
        """
        others = [self.fulfils(network) for network in networks] if self.fulfils else ()
        counts = [(network.cost, network.right) for network in networks]
        if number == 0 and self.target.loose(counts, others):
            self.rise = Rise(free=True)
            return
        past, room = self.target.past(counts, others), self.target.room(counts)
        first, last = self.range
        usual = (last / first) ** (1 / max(1, cycles // 2 - 1))
        alive = [sum(p.member.alive for p in positions) for positions in (before, self.positions)]
        self.rise, back = self.rise.after(pressure, past, usual, self.target, alive[1] < alive[0] / 2, room)
        if back:
            # The samples come in another order, or the same networks would come out again.
            self.positions = [
                replace(position, cycle=number + 1, order=now.order)
                for position, now in zip(before, self.positions, strict=True)
            ]

    def seconds_per_epoch(self, threads: int = 1) -> float:
        """Seconds of one epoch of all members with all their weights, measured; the course does not change.

        Args:
            threads: how many members are trained at a time.
        """
        steps = np.full(math.ceil(len(self.train.y) / self.schedule.batch_size), 1e-9)

        def timed(position: Position) -> float:
            begin = time.perf_counter()
            self._epoch(position, steps, steps)
            trained = time.perf_counter()
            self._network(position.member, 1, 0.0)
            # Only the networks of settled epochs are looked at.
            return trained - begin + SETTLED * (time.perf_counter() - trained)

        rounds: list[float] = []
        threads = self.program.at_a_time(threads, len(self.positions))
        copies, begin = [position.copy() for position in self.positions], time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            while len(rounds) < 3 and (not rounds or time.perf_counter() - begin < 1):
                rounds.append(sum(pool.map(timed, copies)) / threads)
        # What happens once is in the first round.
        return float(np.mean(rounds[1:] or rounds))

    def beginning(self) -> Network:
        """The network of the first member as it is now."""
        return self._network(self.positions[0].member, 1, 0.0)

    def _pressure(self, number: int, cycles: int) -> float:
        if self.steered:
            return self.rise.next(self.range[0])
        before, (first, last) = self.positions[0].pressure, self.range
        planned = np.geomspace(first, last, self.schedule.cycles)
        earlier, more = (
            (last / first) ** (added / max(1, self.schedule.cycles - 1))
            for added in (self.hurry.before, self.hurry.steps)
        )
        if before is None or (cycles == self.schedule.cycles and math.isclose(before, planned[number - 1] * earlier)):
            return float(planned[number] * more)
        # There was not time for as many cycles as were planned, so the rest of the range is spread over fewer.
        return float(before * (last * more / before) ** (1 / (cycles - number)))

    def train_member(
        self, position: Position, start: Moment, length: float, on_epoch: Callable[[Moment], None]
    ) -> list[Network]:
        """Train one member for one cycle, which changes its position. Returns the networks that it gives, the cheapest
        first.

        Args:
            position: of the member, at the start of the cycle.
            start: the start of the cycle.
            length: epochs of a cycle of a member with all its weights.
            on_epoch: called after each epoch.
        """
        pressure = start.pressure
        assert position.cycle == start.cycle - 1
        schedule, member = self.schedule, position.member
        alive = member.alive / self.weights
        epochs = max(schedule.networks, round(length / (FLOOR + (1 - FLOOR) * alive)))
        steps = math.ceil(len(self.train.y) / schedule.batch_size)
        places = (np.arange(epochs * steps) + 0.5) / (epochs * steps)
        rates = schedule.learning_rate * (1 + np.cos(np.pi * places)) / 2
        before = position.pressure if position.pressure is not None else pressure
        betas = before * (pressure / before) ** np.minimum(1, places / MOVING)
        kept: list[Network] = []
        for epoch in range(epochs):
            part = slice(epoch * steps, (epoch + 1) * steps)
            self._epoch(position, np.ascontiguousarray(rates[part]), np.ascontiguousarray(betas[part]))
            if epoch >= epochs - max(schedule.networks, math.ceil(SETTLED * epochs)):
                kept.append(self._network(member, epoch + 1, float(betas[part][-1])))
            member.prune(schedule.patience)
            at = replace(start, epoch=epoch + 1, epochs=epochs, pressure=float(betas[part][-1]))
            on_epoch(replace(at, quality=self._quality(kept[-1].right), cost=kept[-1].cost) if kept else at)
        position.cycle, position.pressure = start.cycle, pressure
        return _chosen(kept, schedule.networks, self.target)

    def _quality(self, right: float) -> float:
        """The metric that leads, of a network that is right so far."""
        task = self.program.task
        if task.classifies:
            return right / len(self.val.y)
        return right if task.leading.direction == "maximize" else -right

    def _epoch(self, position: Position, rates: NDArray[np.float64], betas: NDArray[np.float64]) -> None:
        schedule, member, train = self.schedule, position.member, self.train
        order = torch.randperm(len(train.y), generator=position.order).int()
        loss = member.learn(train, Steps(order, schedule.batch_size, rates, betas, schedule.bits_rate, self.cost))
        largest = member.largest()
        if not (math.isfinite(loss) and largest < 2**compiled.MOST_BITS):
            raise EvaluationError(
                f"the training with learned bits diverged within {member.taken:,} steps (its loss is {loss:.4g}, its "
                f"largest parameter {largest:.4g}); use a smaller learning_rate than {schedule.learning_rate:g}, or "
                f"less pressure than {betas[-1]:.3g}"
            )

    def _network(self, member: Member, epoch: int, pressure: float) -> Network:
        cost, right = member.measured(self.val, self.cost)
        layers = {layer.path: member.rounded(i) for i, layer in enumerate(self.program.layers)}
        return Network(layers, epoch, pressure, cost, right, member.floats())


def silent(moment: Moment) -> None:
    """Says nothing about the epochs of a member."""


def _check_range(path: str, largest: float) -> None:
    most = 2.0**compiled.MOST_BITS
    if not (largest < most and (largest == 0 or largest * most > 1)):
        raise DataError(
            f"the largest value that {path!r} reads is {largest:.4g}, and values whose bits are learned lie between "
            f"2^-{compiled.MOST_BITS} and 2^{compiled.MOST_BITS}; scale the data, for example to a standard deviation "
            "of 1 per feature"
        )


def _chosen(kept: Sequence[Network], count: int, target: Target) -> list[Network]:
    """`count` networks, the cheapest first: the best within the target, those that no other dominates, evenly spread,
    then the latest others."""
    losses = np.array([[network.cost, -network.right] for network in kept])
    best = target.best([(network.cost, network.right) for network in kept])[:count]
    front = sorted(set(non_dominated(losses).tolist()) - set(best), key=lambda row: kept[row].cost)
    room = count - len(best)
    if len(front) > room:
        front = [front[i] for i in np.unique(np.linspace(0, len(front) - 1, room).round().astype(int))]
    front = [*best, *front]
    others = [row for row in reversed(range(len(kept))) if row not in front]
    rows = [*front, *others[: count - len(front)]]
    return [kept[row] for row in sorted(rows, key=lambda row: (kept[row].cost, row))]


def starting_ranges(
    model: nn.Module, program: Program, x: Tensor, run: Callable[[nn.Module, Tensor], object]
) -> list[Floats]:
    """Per layer, the largest magnitude of each value of its input on some samples, of the shape of a sample.

    Args:
        x: samples.
        run: calls the model with samples.

    Raises:
        DataError: values are too large or too small for the bits that are learned.
    """
    largest: dict[str, Floats] = {}

    def look(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            largest[path] = inputs[0].detach().abs().amax(0).float().numpy()

        return hook

    handles = [model.get_submodule(layer.path).register_forward_pre_hook(look(layer.path)) for layer in program.layers]
    try:
        with torch.no_grad():
            run(model, x)
    finally:
        for handle in handles:
            handle.remove()
    for path, most in largest.items():
        _check_range(path, float(most.max()))
    return [largest[layer.path] for layer in program.layers]
