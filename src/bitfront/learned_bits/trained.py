"""The networks that a course gave so far, in memory and in the run folder, so that it can go on after any end.

``checkpoints/cycle-N.pt`` is written once, when cycle N is complete: its networks, and where every member is after it.
A search that was killed begins again behind the last complete cycle, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfront import checkpoints
from bitfront.checkpoints.cycles import cycle_file
from bitfront.errors import CheckpointError
from bitfront.learned_bits.course import Course, Elsewhere, Moment, Network, Pace, Position, silent
from bitfront.learned_bits.program import Program
from bitfront.learned_bits.state import LayerBits
from bitfront.learned_bits.steering import Hurry, Rise, Target

#: The arrays of a ``LayerBits``, in order.
ARRAYS = (
    "weight",
    "weight_bits",
    "weight_fractions",
    "bias",
    "bias_bits",
    "bias_fractions",
    "data_bits",
    "data_fractions",
)
#: Before the names of what is trained in float.
FLOAT = "float."


@dataclass(eq=False)
class TrainedCourse:
    """What a course gave so far.

    Attributes:
        folder: the run folder; None as long as nothing is kept there.
        source: what the training depends on, as a fingerprint; it goes on only behind a cycle with the same one.
        origin: the same without who trains and on what device. The networks of a file with the same one are read: they
            are what they are, whoever trained them.
        threads: how many members are trained at a time.
        on_epoch: called after each epoch of the first member, in the thread that trains it.
        pace: number of a cycle that begins → how far it goes; None: as the schedule says.
        target: what the constraints of the search say.
        fulfils: whether a network fulfils the target's other constraints.
        elsewhere: trains the members of a cycle in place of this process; None: this process does.
        networks: cycle → per member its networks, the cheapest first.
        course: the training, where it is now; None before it begins.
    """

    folder: Path | None = None
    source: str = ""
    origin: str = ""
    threads: int = 1
    on_epoch: Callable[[Moment], None] = silent
    pace: Callable[[int], Pace] | None = None
    target: Target = field(default_factory=Target)
    fulfils: Callable[[Network], bool] | None = None
    elsewhere: Elsewhere | None = None
    networks: dict[int, list[list[Network]]] = field(default_factory=dict)
    course: Course | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Another process begins with nothing.
        nothing = dict.fromkeys(("course", "fulfils", "pace", "elsewhere"))
        return {**vars(self), **nothing, "networks": {}, "on_epoch": silent}

    def network(self, cycle: int, member: int, place: int, program: Program, begin: Callable[[], Course]) -> Network:
        """A network of the course. What is not known is read from the run folder, or trained.

        Args:
            program: the steps of the network.
            begin: gives the course at its start; called only if something must be trained.

        Raises:
            CheckpointError: a file in the run folder is damaged, or belongs to another training, or to another trainer
                and the training would go on behind it.
        """
        if cycle not in self.networks:
            if self._known(cycle):
                self.networks[cycle] = _networks(*self._read(cycle), program)
            else:
                self._train(cycle, begin)
        return self.networks[cycle][member][place]

    def _train(self, cycle: int, begin: Callable[[], Course]) -> None:
        """Train up to a cycle, from the last one before it that is complete."""
        if self.course is None or self.course.positions[0].cycle > cycle:
            self.course = begin()
        course = self.course
        course.target, course.fulfils, course.elsewhere = self.target, self.fulfils, self.elsewhere
        done = next((c for c in range(cycle - 1, course.positions[0].cycle - 1, -1) if self._known(c)), None)
        if done is not None:
            tensors, meta = self._read(done, to_go_on=True)
            course.positions = [_position(tensors, f"{m}", e, course) for m, e in enumerate(meta["positions"])]
            course.rise = Rise(**meta["rise"])
            course.hurry = Hurry(**meta["hurry"])
        for number in range(course.positions[0].cycle, cycle + 1):
            pace = None if self.pace is None else self.pace(number)
            self.networks[number] = course.cycle(number, self.threads, self.on_epoch, pace)
            if self.folder is not None and not self._known(number):
                of = {"cycle": number, "source": self.source, "origin": self.origin}
                _write(cycle_file(self.folder, number), of, self.networks[number], course)

    def _known(self, cycle: int) -> bool:
        return self.folder is not None and checkpoints.has_meta(cycle_file(self.folder, cycle))

    def _read(self, cycle: int, *, to_go_on: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, facts) of a complete cycle.

        Args:
            to_go_on: whether a training goes on behind it; otherwise its networks are wanted.

        Raises:
            CheckpointError: it is damaged, or of another training or cycle; or others have trained it, `to_go_on`.
        """
        assert self.folder is not None
        path = cycle_file(self.folder, cycle)
        tensors, meta = checkpoints.read_tensors(path), checkpoints.read_meta(path)
        known = meta.get("source") == self.source or ("origin" in meta and meta["origin"] == self.origin)
        if not known or meta.get("cycle") != cycle:
            raise CheckpointError(
                f"{path} belongs to another training, or to another cycle of this one; give --restart to train again"
            )
        if to_go_on and meta["source"] != self.source:
            raise CheckpointError(
                f"{path} was trained on another device, or with compiled steps where there are none now or the other "
                "way round, so the training cannot go on behind it; go on where it was begun, or give --restart to "
                "train again"
            )
        return tensors, meta


def _networks(tensors: Mapping[str, Tensor], meta: Mapping[str, Any], program: Program) -> list[list[Network]]:
    return [
        [
            Network(_layers(tensors, f"{m}.{n}", program), **entry, floats=_below(tensors, f"{m}.{n}.{FLOAT}"))
            for n, entry in enumerate(of_member)
        ]
        for m, of_member in enumerate(meta["networks"])
    ]


def _write(path: Path, of: Mapping[str, Any], networks: list[list[Network]], course: Course) -> None:
    """Write a cycle.

    Args:
        of: which cycle of which training it is.
    """
    tensors: dict[str, Tensor] = {}
    for m, of_member in enumerate(networks):
        for n, network in enumerate(of_member):
            for i, layer in enumerate(course.program.layers):
                for name in ARRAYS:
                    array = getattr(network.layers[layer.path], name)
                    if array is not None:
                        tensors[f"{m}.{n}.{i}.{name}"] = torch.from_numpy(array)
            tensors |= {f"{m}.{n}.{FLOAT}{name}": tensor for name, tensor in network.floats.items()}
    for m, position in enumerate(course.positions):
        tensors |= {f"{m}.{name}": tensor for name, tensor in position.member.kept().items()}
        tensors[f"{m}.order"] = position.order.get_state()
    meta = {
        "layers": [layer.path for layer in course.program.layers],
        **of,
        "networks": [
            [{name: getattr(n, name) for name in ("epoch", "pressure", "cost", "right")} for n in of_member]
            for of_member in networks
        ],
        "rise": vars(course.rise),
        "hurry": vars(course.hurry),
        "positions": [{"taken": p.member.taken, "cycle": p.cycle, "pressure": p.pressure} for p in course.positions],
    }
    checkpoints.save_checkpoint(tensors, path, meta)


def _layers(tensors: Mapping[str, Tensor], prefix: str, program: Program) -> dict[str, LayerBits]:
    layers = {}
    for i, layer in enumerate(program.layers):
        arrays = {name: tensors[key].numpy() if (key := f"{prefix}.{i}.{name}") in tensors else None for name in ARRAYS}
        facts = {"signed": layer.signed, "rounding": layer.shared.data_in_rounding}
        layers[layer.path] = LayerBits(**arrays, **facts)  # type: ignore[arg-type]
    return layers


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _position(tensors: Mapping[str, Tensor], m: str, entry: Mapping[str, Any], course: Course) -> Position:
    member = course.positions[int(m)].member.at(_below(tensors, f"{m}."), entry["taken"])
    order = torch.Generator()
    order.set_state(tensors[f"{m}.order"])
    return Position(member, order, entry["cycle"], entry["pressure"])
