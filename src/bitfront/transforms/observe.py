"""What the float model feeds into operands of its sites: what formats and corrections learn from.

All calibration samples are looked at, whatever the size of one. Of tensors that are too large to keep, values are drawn
at random over samples and positions, and each channel's ends are those of all of its finite values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitfront.errors import CaptureError
from bitfront.formats.base import CALIBRATION_VALUES, Format, Operand
from bitfront.graph import Graph
from bitfront.graph.capture import check_weights, parameter
from bitfront.operations.base import Rounds
from bitfront.transforms.quantize import SiteFormats, rebuilt

#: An operand of no more values is kept whole; of a larger one about so many are drawn.
KEPT_VALUES = CALIBRATION_VALUES * 4
#: Of each channel at least so many are drawn, and of whole samples so many.
LEAST_VALUES, LEAST_SAMPLES = 1024, 16
#: With so many samples the model is run first, to see which dimensions grow with them. One may be squeezed away.
FEW = 2
#: Samples whose largest activation takes more are looked at in pieces.
SAMPLES_BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class Observed:
    """What was seen at an operand.

    Attributes:
        values: what a format learns from, first dimension samples (or draws), second one channels; flat where samples
            lie along another dimension than the first.
        ends: where `values` are a part, the smallest and the largest finite value of each channel, among all of them:
            shape (2 or more, channels, 1, ...); None where `values` are all.
        samples: whole samples, one tensor per call, where they were asked for; of large ones some, drawn at random.
    """

    values: Tensor
    ends: Tensor | None = None
    samples: tuple[Tensor, ...] = ()

    def calibrated(self, form: Format) -> Format:
        """`form` with what it learns from this; itself where it learns nothing."""
        if not form.calibrates:
            return form
        return form.calibrated(self.values) if self.ends is None else form.calibrated_on(self.values, self.ends)


class _OperandObserver:
    """Stands in for a format, remembers what flows by, changes nothing.

    Args:
        flows: the operand has samples along its first dimension; otherwise it is the same for all samples.
        samples: keep whole samples too.
    """

    def __init__(self, flows: bool, samples: bool) -> None:
        self.flows, self.keeps_samples = flows, samples
        self.values: list[Tensor] = []
        self.ends: list[Tensor | None] = []
        self.samples: list[Tensor] = []
        #: Shapes of the calls with a few samples; while `measures`, nothing but them is remembered.
        self.shapes: list[tuple[int, ...]] = []
        self.measures = False
        #: In how many pieces the samples come by, and which of them it is.
        self.pieces, self.piece = 1, 0
        self.sizes: list[tuple[int, ...]] = []

    def quantize(self, x: Tensor) -> Tensor:
        if self.measures:
            self.shapes.append(tuple(x.shape))
            return x
        flowing = x.detach() if x.dim() else x.detach().reshape(1)
        self.sizes.append(tuple(x.shape))
        if not self.flows and self.piece:
            return x  # it was seen with the first samples
        values, ends = _drawn(flowing, self.pieces) if self.flows else (flowing.clone(), None)
        self.values.append(values)
        self.ends.append(ends)
        if self.keeps_samples:
            self.samples.append(_some(flowing, self.pieces))
        return x

    def observed(self) -> Observed:
        known = [v if e is None else e for v, e in zip(self.values, self.ends, strict=True)]
        values, ends = _joined(self.values), _joined(known) if any(e is not None for e in self.ends) else None
        if self._samples_elsewhere():
            values, ends = values.flatten(), None if ends is None else ends.flatten()
        return Observed(values, ends, tuple(self._joined_samples()))

    def _joined_samples(self) -> list[Tensor]:
        """The samples of each call, of all pieces together."""
        calls, rest = divmod(len(self.samples), self.pieces)
        if self.pieces == 1 or rest:
            return self.samples
        return [torch.cat(self.samples[call::calls]) for call in range(calls)]

    def _samples_elsewhere(self) -> bool:
        """Whether samples lie along another dimension than the first one, as behind ``x.transpose(0, 1)``. Then the
        second one may hold them, and no channels: a scale for each would be one per sample."""
        pairs = zip(self.shapes, self.sizes, strict=False)
        return any(few[:1] == all_[:1] and few != all_ for few, all_ in pairs)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _some(x: Tensor, pieces: int = 1) -> Tensor:
    """Samples of `x`, one of so many pieces: all, or as many as fit, drawn at random."""
    number = -(-max(LEAST_SAMPLES, KEPT_VALUES // max(1, x[:1].numel())) // pieces)
    if number >= len(x):
        return x.clone()
    return x[torch.randperm(len(x), generator=_generator())[:number].sort().values.to(x.device)]


def _drawn(x: Tensor, pieces: int = 1) -> tuple[Tensor, Tensor | None]:
    """All values of `x`, one of so many pieces, or some and the ends of each channel. Flattened samples would lose the
    channels that a format per channel needs, so all channels of a position are drawn together."""
    if x.dim() < 2:
        values, ends = _drawn(x.reshape(-1, 1), pieces) if x.numel() * pieces > KEPT_VALUES else (x.clone(), None)
        return values.reshape(-1), None if ends is None else ends.reshape(-1)
    channels = x.shape[1]
    positions = x.numel() // max(1, channels)
    number = -(-max(LEAST_VALUES, KEPT_VALUES // max(1, channels)) // pieces)
    if x.numel() * pieces <= KEPT_VALUES or number >= positions:
        return x.clone(), None
    last = x.movedim(1, -1)
    places = torch.randint(positions, (number,), generator=_generator())
    drawn = last[tuple(i.to(x.device) for i in torch.unravel_index(places, last.shape[:-1]))]
    shape = (-1, channels, *[1] * (x.dim() - 2))
    return drawn.reshape(shape), _ends(x).reshape(shape)


def _ends(x: Tensor) -> Tensor:
    """The smallest and the largest finite value of each channel, shape (2, channels); infinite where there is none."""
    rest = [d for d in range(x.dim()) if d != 1]
    lows, highs = [], []
    for part in torch.split(x, max(1, KEPT_VALUES // x[0].numel())):
        known = part.isfinite()
        lows.append(part.where(known, torch.inf).amin(rest))
        highs.append(part.where(known, -torch.inf).amax(rest))
    return torch.stack([torch.stack(lows).amin(0), torch.stack(highs).amax(0)])


def _joined(seen: Sequence[Tensor]) -> Tensor:
    """What several calls of a module bring, as one sample; flat where they have other channels, or are numbers."""
    seen = [s.reshape(1) if s.dim() == 0 else s for s in seen]
    if len({s.shape[1:] for s in seen}) == 1:
        return torch.cat(list(seen))
    if all(s.dim() > 1 for s in seen) and len({s.shape[1] for s in seen}) == 1:
        return torch.cat([s.movedim(1, -1).reshape(-1, s.shape[1]) for s in seen])
    return torch.cat([s.flatten() for s in seen])


def piece_length(graph: Graph, samples: int) -> int:
    """How many of so many samples are looked at together: all, unless an activation would take too much memory."""
    largest = 4 * max((int(np.prod(n.output)) for n in graph.nodes), default=0)
    return samples if samples * largest <= SAMPLES_BYTES else max(1, SAMPLES_BYTES // largest)


def observe(
    graph: Graph, wanted: Iterable[tuple[str, Operand]], x: Tensor, samples: bool = False
) -> dict[tuple[str, Operand], Observed]:
    """What the float model feeds into operands of its sites.

    Args:
        graph: the captured model.
        wanted: (site name, operand) pairs.
        x: input samples, shape (samples, *features).
        samples: keep whole samples of each input too.

    Returns:
        What was seen, by pair; for a parameter, the parameter itself.
    """
    wanted = list(wanted)
    result: dict[tuple[str, Operand], Observed] = {}
    observers: dict[str, dict[Operand, _OperandObserver]] = {}
    for name, operand in wanted:
        site = graph.site(name)
        held = site.parameter(operand)
        if held is not None:
            result[name, operand] = Observed(parameter(graph.model, held[0]))
        else:
            keep = samples and operand == "data_in"
            observers.setdefault(name, {})[operand] = _OperandObserver(site.flows(operand), keep)
    if observers:
        rounds: dict[str, Mapping[Operand, Rounds]] = {**observers}
        model = rebuilt(graph, rounds, {}, bake=False)
        seeing = [observer for by_operand in observers.values() for observer in by_operand.values()]
        with torch.no_grad():
            if len(x) > FEW:
                for observer in seeing:
                    observer.measures = True
                model(x[:FEW].clone())
                for observer in seeing:
                    observer.measures = False
            pieces = torch.split(x, piece_length(graph, len(x)))
            for number, piece in enumerate(pieces):
                for observer in seeing:
                    observer.pieces, observer.piece = len(pieces), number
                model(piece.clone())  # a model may change its input
        for name, by_operand in observers.items():
            if not all(seen.values for seen in by_operand.values()):
                raise CaptureError(
                    f"{graph.site(name).title} is not called for the {len(x)} calibration samples, so nothing is known "
                    "of its inputs: which layers the model's forward calls depends on the data. Give its formats fixed "
                    "parameters (frac_width = 4), or leave it out of the search space"
                )
            result |= {(name, operand): seen.observed() for operand, seen in by_operand.items()}
    return result


def calibrate(graph: Graph, formats: Mapping[str, SiteFormats], x: Tensor) -> dict[str, dict[Operand, Format]]:
    """`formats` with everything learned that calibrates: weights from themselves, inputs from what `x` makes of them.

    Inputs are observed in the float model, so that the result for a site does not depend on the other sites' formats.

    Raises:
        CaptureError: a parameter holds NaN; names it.
    """
    check_weights(graph.model)
    formats = {name: graph.site(name).for_operands(chosen) for name, chosen in formats.items()}
    wanted = [(n, o) for n, by_operand in formats.items() for o, f in by_operand.items() if f.calibrates]
    seen = observe(graph, wanted, x) if wanted else {}
    return {
        name: {o: seen[name, o].calibrated(f) if f.calibrates else f for o, f in by_operand.items()}
        for name, by_operand in formats.items()
    }
