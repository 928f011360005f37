"""The steps of a network whose bits are learned: products over live weights, and a rounding in front of each of them.

The steps come from ``population.programs``, which reads a float model; its batch norms are folded before
(``transforms.fold``). In front of every linear layer and convolution there is a rounding of its input. A ReLU that only
this layer reads becomes part of the rounding.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfront.errors import ConfigError, nearest, one_of
from bitfront.graph import Graph
from bitfront.kernels.whole import Rounding
from bitfront.learned_bits.widths import magnitudes
from bitfront.operations.training import Shape, SlidingWindow, UnsupportedError
from bitfront.population.programs import TrainingProgram, TrainingStep
from bitfront.population.programs import program as training_program
from bitfront.registry import canonical
from bitfront.strategies.learned_bits import Granularity
from bitfront.tasks.base import Task
from bitfront.tasks.classification import CLASSIFICATION
from bitfront.transforms.fold import Folded, folded

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Granularities:
    """Which values of a layer share their bits, and which widths they may have.

    Attributes:
        weight: element, output channel or layer. Each value of a bias has bits of its own.
        data_in: element, channel or layer.
        weight_width, data_in_width, bias_width: the supported widths, with the sign where there is one, ascending;
            empty: any. 0: the values may be removed. Whole channels always may.
        rule: the key of the file that says it.
        data_in_rounding: how values of the input become multiples of their steps.
    """

    weight: Granularity = "element"
    data_in: Granularity = "element"
    weight_width: tuple[int, ...] = ()
    data_in_width: tuple[int, ...] = ()
    bias_width: tuple[int, ...] = ()
    rule: str = "default"
    data_in_rounding: Rounding = field(default="even", repr=False)  # fingerprints of earlier versions do not have it


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer or convolution with its rounding.

    Attributes:
        path: path of the module.
        weight_shape: shape of its weight: outputs, inputs per group, and the kernel.
        source, target: shape of a sample of its input and of its output.
        groups: number of groups of a convolution.
        bias: whether it has one.
        places: int64, shape (n, 3): (weight of the kernel, position of the output, position of the input), of every
            product of two channels.
        signed: whether its input may be negative.
        shared: which values share their bits.
        input_axis, output_axis: the dimension of a sample of the input (and of the output) that holds the channels, and
            that of the weight that holds the output channels.
    """

    path: str
    weight_shape: Shape
    source: Shape
    target: Shape
    groups: int
    bias: bool
    places: Indices
    signed: bool
    shared: Granularities
    input_axis: int
    output_axis: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.weight_shape)

    @property
    def outputs(self) -> int:
        """Number of output channels: of values of a bias."""
        return self.target[self.input_axis]

    @property
    def sharing(self) -> int:
        """How many weights share bits."""
        return self.weights // self.weight_groups(np.arange(self.weights))[1]

    @functools.cached_property
    def magnitudes(self) -> dict[str, int]:
        """Operand → the supported widths without signs, as the training takes them (``widths.magnitudes``)."""
        shared = self.shared
        return {
            "weight": magnitudes(shared.weight_width, True, shared.weight == "channel"),
            "data_in": magnitudes(shared.data_in_width, self.signed, shared.data_in == "channel"),
            "bias": magnitudes(shared.bias_width, True, False),
        }

    @property
    def positions(self) -> tuple[int, int]:
        """(positions of a channel of the input, of the output)."""
        return math.prod(self.source[1:]), math.prod(self.target[1:])

    def weight_groups(self, slots: Indices) -> tuple[Indices, int]:
        """(which bits each of some weights has, number of bits that are learned)."""
        if self.shared.weight == "element":
            return np.arange(len(slots)), len(slots)
        if self.shared.weight == "channel":
            return np.unravel_index(slots, self.weight_shape)[self.output_axis], self.weight_shape[self.output_axis]
        return np.zeros(len(slots), dtype=np.int64), 1

    @functools.cached_property
    def input_groups(self) -> tuple[Indices, int]:
        """(which bits each value of the input has, number of bits that are learned)."""
        rows = np.arange(math.prod(self.source))
        if self.shared.data_in == "element":
            return rows, len(rows)
        if self.shared.data_in == "channel":
            return np.unravel_index(rows, self.source)[self.input_axis], self.source[self.input_axis]
        return np.zeros_like(rows), 1

    def products(self, slots: Indices) -> tuple[Indices, Indices, Indices]:
        """Every product of some weights: (row of the output, place in `slots`, row of the input), each int64."""
        of_kernel, (positions_in, positions_out) = math.prod(self.weight_shape[2:]), self.positions
        outputs, inputs = self.weight_shape[0], self.weight_shape[1]
        out, rest = np.divmod(slots, inputs * of_kernel)
        channel, kernel = np.divmod(rest, of_kernel)
        channel = channel + out // (outputs // self.groups) * inputs
        order = np.argsort(self.places[:, 0], kind="stable")
        places = self.places[order]
        counts = np.bincount(places[:, 0], minlength=of_kernel)
        starts = np.concatenate([[0], np.cumsum(counts)])[:-1]
        each = counts[kernel]
        slot = np.repeat(np.arange(len(slots)), each)
        within = np.arange(len(slot)) - np.repeat(np.cumsum(each) - each, each)
        place = places[np.repeat(starts[kernel], each) + within]
        return out[slot] * positions_out + place[:, 1], slot, channel[slot] * positions_in + place[:, 2]

    def read(self, slots: Indices) -> NDArray[np.bool_]:
        """Which values of the input some weights read, bool, shape (values of a sample,)."""
        read = np.zeros(math.prod(self.source), dtype=bool)
        read[self.products(slots)[2]] = True
        return read


class Program(ABC):
    """A network whose bits are learned, whoever trains it.

    Attributes:
        layers: those whose bits are learned, in the order of their calls.
        notes: what of the user's model is otherwise here, in words.
        trainer: who trains it, and why, in words.
        float_macs: multiply-accumulates of what stays in float.
        task: what the samples are.
    """

    task: Task = CLASSIFICATION
    layers: tuple[Layer, ...]
    notes: tuple[str, ...]
    float_macs: int = 0

    @property
    @abstractmethod
    def trainer(self) -> str:
        """Who trains it, and why, in words."""

    @abstractmethod
    def at_a_time(self, threads: int, members: int) -> int:
        """How many members are trained at a time by so many threads, 1 or more."""

    @abstractmethod
    def follows(self, layer: int) -> int | None:
        """The layer whose output, after at most a ReLU, is the whole input of `layer`; None if there is none."""


@dataclass(frozen=True, eq=False)
class Round:
    """A rounding with learned bits of the input of a layer; with `rectify`, after a ReLU."""

    layer: int
    input: int
    output: int
    rectify: bool


@dataclass(frozen=True, eq=False)
class Product:
    """The product of a layer, of the value that its rounding gives."""

    layer: int
    input: int
    output: int


@dataclass(frozen=True, eq=False)
class BitsProgram(Program):
    """A network whose bits are learned by compiled steps.

    Attributes:
        layers: its linear layers and convolutions, in the order of their calls.
        steps: what is computed, in order. Values are numbered; 0 is the input.
        shapes: value → shape of a sample.
        logits: the value with the logits.
        notes: what of the user's model is otherwise here, in words.
    """

    layers: tuple[Layer, ...]
    steps: tuple[Round | Product | TrainingStep, ...]
    shapes: dict[int, Shape]
    logits: int
    notes: tuple[str, ...] = ()

    @property
    def trainer(self) -> str:
        """Who trains it, in words."""
        return "compiled steps"

    def at_a_time(self, threads: int, members: int) -> int:
        """How many members are trained at a time by so many threads: each on a core."""
        return max(1, min(threads, members))

    def follows(self, layer: int) -> int | None:
        """The layer whose output, after at most a ReLU, is the whole input of `layer`; None if there is none."""
        rounding = next(s for s in self.steps if isinstance(s, Round) and s.layer == layer)
        readers = [s for s in self.steps if rounding.input in inputs_of(s)]
        producer = next((s for s in self.steps if s.output == rounding.input), None)
        return producer.layer if isinstance(producer, Product) and len(readers) == 1 else None


def inputs_of(step: Round | Product | TrainingStep) -> tuple[int, ...]:
    """The values that a step reads."""
    return step.inputs if isinstance(step, TrainingStep) else (step.input,)


def bits_program(model: nn.Module, program: TrainingProgram, shared: dict[str, Granularities]) -> BitsProgram:
    """The steps of `model` with learned bits.

    Args:
        model: a float model without batch norms.
        program: its steps.
        shared: path of a layer → which of its values share their bits.
    """
    readers: dict[int, list[TrainingStep]] = {}
    for step in program.steps:
        for value in step.inputs:
            readers.setdefault(value, []).append(step)
    layers: list[Layer] = []
    steps: list[Round | Product | TrainingStep] = []
    shapes = dict(enumerate(program.shapes))
    positive: set[int] = set()
    fused = {
        step.output: step.inputs[0]
        for step in program.steps
        if step.kind == "activate"
        and step.rectify
        and [s.kind for s in readers.get(step.output, [])] in (["linear"], ["conv"])
    }
    for step in program.steps:
        if step.output in fused:
            continue
        if step.kind not in ("linear", "conv"):
            steps.append(step)
            kept = step.kind in ("flatten", "largest", "mean", "add", "concatenate") and set(step.inputs) <= positive
            bent = step.bend is not None and step.bend.positive
            if kept or bent or (step.kind == "activate" and step.rectify):
                positive.add(step.output)
            continue
        source, rounded = step.inputs[0], len(shapes)
        rectify = source in fused or source in positive
        layers.append(_layer(model, program, step, not rectify, shared[step.path]))
        shapes[rounded] = program.shapes[source]
        steps.append(Round(len(layers) - 1, fused.get(source, source), rounded, rectify))
        steps.append(Product(len(layers) - 1, rounded, step.output))
    return BitsProgram(tuple(layers), tuple(steps), shapes, program.logits)


def _without_ending(program: TrainingProgram) -> TrainingProgram:
    """The program up to its logits; a softmax behind them changes nothing in the loss."""
    ending = next((step for step in program.steps if step.kind == "softmax"), None)
    if ending is None:
        return program
    if ending.output != program.logits or ending is not program.steps[-1]:
        raise UnsupportedError(f"{ending.path or 'a function'} is a softmax that is not the end of the model")
    return replace(program, steps=program.steps[:-1], logits=ending.inputs[0])


def _layer(
    model: nn.Module, program: TrainingProgram, step: TrainingStep, signed: bool, shared: Granularities
) -> Layer:
    module = model.get_submodule(step.path)
    source, target = program.shapes[step.inputs[0]], program.shapes[step.output]
    shape = tuple(module.get_parameter("weight").shape)
    places = np.zeros((1, 3), dtype=np.int64) if step.window is None else _places(source[1:], target[1:], step.window)
    return Layer(step.path, shape, source, target, step.groups, module.bias is not None, places, signed, shared, 0, 0)


@functools.lru_cache(maxsize=64)
def _places(source: Shape, target: Shape, window: SlidingWindow) -> Indices:
    """(weight of the kernel, position of the output, position of the input) of every product of a sliding window."""
    grid = np.meshgrid(*map(np.arange, (*target, *window.kernel)), indexing="ij")
    places, offsets = np.split(np.stack([axis.reshape(-1) for axis in grid]), 2)
    stride, step, padding = (np.array(sizes)[:, None] for sizes in (window.stride, window.steps, window.padding))
    at = places * stride + offsets * step - padding
    inside = ((at >= 0) & (at < np.array(source)[:, None])).all(0)
    rows = ((offsets, window.kernel), (places, target), (at, source))
    triples = [np.ravel_multi_index(tuple(row[:, inside]), sizes) for row, sizes in rows]
    return np.stack(triples, axis=1).astype(np.int64)


def with_learned_bits(
    graph: Graph,
    shape: Shape,
    default: Granularities,
    named: Mapping[str, Granularities],
    sample: Tensor | None = None,
) -> tuple[Graph, BitsProgram]:
    """(the graph with its batch norms folded, its steps with learned bits).

    Args:
        graph: a captured model.
        shape: of a sample.
        default, named: which values share their bits: of all layers, and of those that differ. A key is the name of a
            layer (its path, or its name in the graph), or a type of layers; names go before types.
        sample: two samples, as the model takes them; None: random numbers will do.

    Raises:
        UnsupportedError: the model is no such list of steps; the message gives the reason.
        ConfigError: `named` names no layer.
    """
    without_norms = folded(graph, sample)
    graph = without_norms.graph
    program = _without_ending(training_program(graph.model, shape, {}))
    norms = [step.path for step in program.steps if step.kind == "norm"]
    if norms:
        raise UnsupportedError(f"{', '.join(norms)}: a batch norm that follows no layer into which it could be folded")
    paths = [step.path for step in program.steps if step.kind in ("linear", "conv")]
    if not paths:
        raise UnsupportedError("it has no layer whose bits could be learned")
    bits = bits_program(graph.model, program, of_layers(graph, paths, default, named))
    return graph, replace(bits, notes=folding_notes(without_norms))


def of_layers(
    graph: Graph, paths: Sequence[str], default: Granularities, named: Mapping[str, Granularities]
) -> dict[str, Granularities]:
    """Path of a layer → which of its values share bits. Raises ConfigError for a key that means no layer."""
    sites = {site.path: site for site in graph.sites if site.path in paths}
    names = {name: path for path, site in sites.items() for name in (site.name, path)}
    types: dict[str, list[str]] = {}
    for path, site in sites.items():
        for kind in {canonical(site.op), canonical(site.type)}:
            types.setdefault(kind, []).append(path)
    shared = dict.fromkeys(paths, default)
    for key, granularities in sorted(named.items(), key=lambda entry: entry[0] in names):
        meant = [names[key]] if key in names else types.get(canonical(key), [])
        if not meant:
            kinds = sorted({site.op for site in sites.values()})
            raise ConfigError(
                f"the model has no layer {key!r} whose bits are learned; {one_of(paths)}, or the types "
                f"{', '.join(kinds)}.{nearest(key, [*paths, *kinds])}",
                key=("search", "strategy", "setup", "layers", key),
            )
        shared |= dict.fromkeys(meant, granularities)
    return shared


def folding_notes(changed: Folded) -> tuple[str, ...]:
    """What was folded into layers, and what drops nothing, in words."""
    notes = []
    if changed.into:
        pairs = ", ".join(f"{norm} into {layer}" for norm, layer in changed.into.items())
        notes.append(
            f"batch norms are folded into the layers before them, whose bits are learned: {pairs}. The float model "
            "that is reported beside is yours, with its batch norms; the folded one is the same up to float error"
        )
    if changed.dropouts:
        notes.append(f"nothing is dropped while bits are learned: {', '.join(changed.dropouts)}")
    return tuple(notes)
