"""A network in training, whoever trains it: its weights and bits one after another, and which weights are alive.

Weights that stay zero are removed, and everything that depends on them: neurons that nobody reads, and neurons without
inputs, whose constant goes into the biases behind them. How a step is computed is left to those that inherit: compiled
steps (``member``), or torch (``torch_member``).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfront.kernels import bits as compiled
from bitfront.kernels.whole import Rounding
from bitfront.kernels.whole import whole as to_whole
from bitfront.learned_bits.program import Indices, Layer, Program
from bitfront.learned_bits.widths import clipped, in_widths, supported, whole

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Cost:
    """What a bit costs: of a product of bits of input and weight, of a weight, of a bias."""

    pairs: float = 1.0
    stored: float = 0.0
    biases: float = 1.0

    @property
    def native(self) -> compiled.NativePressure:
        """As the compiled steps take it."""
        return compiled.NativePressure(self.pairs, self.stored, self.biases)


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples and their classes, or the targets of another task.

    Attributes:
        x: for compiled steps float32 of shape (samples, features), contiguous; otherwise as the model takes it.
        y: int32, shape (samples,); of another task than classification as the task has them.
        targets: probabilities in place of labels, float32, shape (samples, classes), contiguous; None for labels.
    """

    x: Tensor
    y: Tensor
    targets: Tensor | None = None

    @staticmethod
    def of(x: Tensor, y: Tensor) -> Samples:
        """From a split of a dataset, any shape, for compiled steps."""
        return Samples(x.flatten(1).float().cpu().contiguous(), y.int().cpu())


@dataclass(frozen=True, eq=False)
class Steps:
    """The optimizer steps of an epoch.

    Attributes:
        order: places of the samples, int32; a step has `batch` of them, the last one may have fewer.
        batch: samples per step.
        rates, betas: learning rate and pressure of each step, float64.
        bits_rate: how many times as fast bits learn.
        cost: what bits cost.
    """

    order: Tensor
    batch: int
    rates: NDArray[np.float64]
    betas: NDArray[np.float64]
    bits_rate: float
    cost: Cost


@dataclass(frozen=True)
class Places:
    """Where the parameters of a layer are among the member's values: slices of weights and biases, and of their
    fractional bits; of the fractional and integer bits of the input."""

    weight: slice
    bias: slice
    weight_bits: slice
    bias_bits: slice
    fractions: slice
    integers: slice


@dataclass(frozen=True, eq=False)
class LayerBits:
    """What was learned of a layer; everything as in the deployed network.

    Attributes:
        weight: float32, the shape of the weight; multiples of 2^-weight_fractions.
        weight_bits, weight_fractions: int8, the same shape: bits of the magnitude (0 for the value
            0, if weights do not share their bits) and binary point.
        bias, bias_bits, bias_fractions: likewise, shape (outputs,); None without a bias.
        data_bits, data_fractions: int8, the shape of a sample of the input; 0 bits where nobody reads the value.
        signed: whether the input has a sign.
        rounding: how values of the input become multiples of their steps.
    """

    weight: Floats
    weight_bits: NDArray[np.int8]
    weight_fractions: NDArray[np.int8]
    bias: Floats | None
    bias_bits: NDArray[np.int8] | None
    bias_fractions: NDArray[np.int8] | None
    data_bits: NDArray[np.int8]
    data_fractions: NDArray[np.int8]
    signed: bool
    rounding: Rounding


@dataclass(eq=False)
class Member(ABC):
    """A network in training.

    Attributes:
        program: the network.
        live: per layer, the places of its live weights in its weight, ascending, int64.
        zero: per layer and live weight, at the end of how many epochs in a row it was zero, int64.
        values: parameters, float32, on the CPU: weights and biases, then bits.
        moments: the optimizer's, each of the shape of `values`.
        taken: number of steps so far.
    """

    program: Program
    live: list[Indices]
    zero: list[Indices]
    values: Tensor
    moments: tuple[Tensor, Tensor]
    taken: int = 0
    places: list[Places] = field(init=False)

    def __post_init__(self) -> None:
        self.places = _places_of(self.program, self.live)
        self.reshape()

    #: What ``reshape`` makes.
    prepared: ClassVar[tuple[str, ...]] = ()

    def __getstate__(self) -> dict[str, Any]:
        # Another process has the program; what follows from it is made there (``bind``).
        return {name: value for name, value in vars(self).items() if name not in ("program", "places", *self.prepared)}

    def bind(self, program: Program) -> None:
        """Give a member that comes from another process its network."""
        self.program = program
        self.places = _places_of(program, self.live)
        self.reshape()

    # --- how it is trained --------------------------------------------------------------------------------------------

    @abstractmethod
    def reshape(self) -> None:
        """Prepare the steps anew; called when weights were removed."""

    @abstractmethod
    def learn(self, samples: Samples, steps: Steps) -> float:
        """Take some steps; call it for an epoch. Returns the mean of the losses before them, without what bits cost."""

    @abstractmethod
    def measured(self, samples: Samples, cost: Cost) -> tuple[float, float]:
        """(what the bits cost, how many of the samples are classified correctly; in another task the metric that leads,
        negated where smaller is better)."""

    def floats(self) -> dict[str, Tensor]:
        """What is trained in float beside the layers whose bits are learned: names in the state dict → values."""
        return {}

    @classmethod
    def of(cls, program: Program, model: nn.Module, largest: Sequence[Floats], bits: float, seed: int = 0) -> Self:
        """A member that starts from the weights of `model`.

        Args:
            seed: of what is drawn in its steps; compiled steps draw nothing.
            largest: per layer, the largest magnitude of each value of its input, of the shape of a sample.
            bits: fractional bits of everything at the start; of an input whose values would all be 0 by that, so many
                that the largest one has these bits.
        """
        live = [np.arange(layer.weights) for layer in program.layers]
        places = _places_of(program, live)
        values = np.full(places[-1].integers.stop, bits, dtype=np.float32)
        for layer, place, most in zip(program.layers, places, largest, strict=True):
            module = model.get_submodule(layer.path)
            values[place.weight] = module.get_parameter("weight").detach().numpy().reshape(-1)
            if layer.bias:
                values[place.bias] = module.get_parameter("bias").detach().numpy()
            groups, count = layer.input_groups
            top = np.zeros(count, dtype=np.float32)
            np.maximum.at(top, groups, most.reshape(-1))
            more = -math.ceil(math.log2(top.max())) if 0 < top.max() < 2.0**-bits else 0
            values[place.fractions] += more
            values[place.integers] = np.ceil(np.log2(np.maximum(top, 2.0 ** (-8 - more))))
        tensor = torch.from_numpy(values)
        zero = [np.zeros(len(slots), dtype=np.int64) for slots in live]
        moments = (torch.zeros_like(tensor), torch.zeros_like(tensor))
        return cls(program, live, zero, tensor, moments, **cls._beside(program, model, seed))

    @classmethod
    def _beside(cls, program: Program, model: nn.Module, seed: int) -> dict[str, Any]:  # noqa: ARG003
        """Further attributes of a member that starts from the weights of `model`."""
        return {}

    def copy(self) -> Self:
        """A member that is where this one is."""
        live, zero = [slots.copy() for slots in self.live], [counts.copy() for counts in self.zero]
        moments = (self.moments[0].clone(), self.moments[1].clone())
        return replace(self, live=live, zero=zero, values=self.values.clone(), moments=moments)

    def kept(self) -> dict[str, Tensor]:
        """Tensors that say where it is, beside `taken`."""
        tensors = {"values": self.values, "first": self.moments[0], "second": self.moments[1]}
        for i, (live, zero) in enumerate(zip(self.live, self.zero, strict=True)):
            tensors |= {f"live.{i}": torch.from_numpy(live), f"zero.{i}": torch.from_numpy(zero)}
        return tensors

    def at(self, tensors: Mapping[str, Tensor], taken: int) -> Self:
        """A member of the same network that is where these tensors, as ``kept`` gives them, say."""
        count = len(self.program.layers)
        live, zero = ([tensors[f"{name}.{i}"].numpy().copy() for i in range(count)] for name in ("live", "zero"))
        moments = (tensors["first"].clone(), tensors["second"].clone())
        return replace(self, live=live, zero=zero, values=tensors["values"].clone(), moments=moments, taken=taken)

    def largest(self) -> float:
        """The largest magnitude among the weights, biases and bits that are learned; NaN or infinite if a parameter is,
        also one in float."""
        return float(self.values.abs().max())

    @property
    def first_bits(self) -> int:
        """Parameters from here on are bits."""
        return int(self.places[0].weight_bits.start)

    @property
    def alive(self) -> int:
        """Number of live weights."""
        return sum(map(len, self.live))

    # --- what is learned ----------------------------------------------------------------------------------------------

    def rounded(self, layer: int) -> LayerBits:
        """What was learned of a layer so far."""
        spec, place, slots = self.program.layers[layer], self.places[layer], self.live[layer]
        values = self.values.numpy()
        groups, codes, of_groups, widths = self._codes(layer)
        fractions = of_groups[groups]
        weight, bits, points = np.zeros(spec.weights, dtype=np.float32), *np.zeros((2, spec.weights), dtype=np.int8)
        weight[slots] = np.ldexp(codes, -fractions)
        bits[slots], points[slots] = np.where(codes != 0, widths[groups], 0), fractions
        if spec.shared.weight != "element":
            # A zero among weights of one width is stored like the others.
            everywhere, _ = spec.weight_groups(np.arange(spec.weights))
            bits[:], points[:] = widths[everywhere], of_groups[everywhere]
        shape = spec.weight_shape
        read = spec.read(slots[codes != 0])
        of_rows = spec.input_groups[0]
        data_fractions, integers = whole(values[place.fractions])[of_rows], whole(values[place.integers])[of_rows]
        data_bits = np.clip(data_fractions + integers, 0, compiled.MOST_BITS)
        if spec.magnitudes["data_in"]:
            data_bits = supported(data_bits, spec.magnitudes["data_in"])
            data_fractions = clipped(data_bits - integers)
        bias = bias_bits = bias_points = None
        if spec.bias:
            learned = whole(values[place.bias_bits])
            bias_codes, bias_points, bias_bits = in_widths(values[place.bias], learned, None, spec.magnitudes["bias"])
            bias = np.ldexp(bias_codes, -bias_points).astype(np.float32)
        return LayerBits(
            weight.reshape(shape),
            bits.reshape(shape),
            points.reshape(shape),
            bias,
            None if bias_bits is None else bias_bits.astype(np.int8),
            None if bias_points is None else bias_points.astype(np.int8),
            np.where(read | (spec.shared.data_in != "element"), data_bits, 0).astype(np.int8).reshape(spec.source),
            data_fractions.astype(np.int8).reshape(spec.source),
            spec.signed,
            spec.shared.data_in_rounding,
        )

    def _codes(self, layer: int) -> tuple[Indices, NDArray[np.floating], Indices, Indices]:
        """(which bits each live weight has, its whole number; per group its fractional bits, its width)."""
        spec, place, slots = self.program.layers[layer], self.places[layer], self.live[layer]
        values = self.values.numpy()
        groups, _ = spec.weight_groups(slots)
        fractions = whole(values[place.weight_bits])
        codes, fractions, widths = in_widths(values[place.weight], fractions, groups, spec.magnitudes["weight"])
        some = np.zeros(len(widths), dtype=bool)
        some[groups[codes != 0]] = True
        # What is zero throughout leaves the network.
        return groups, codes, fractions, np.where(some, widths, 0)

    # --- removing weights ---------------------------------------------------------------------------------------------

    def prune(self, patience: int) -> bool:
        """Count the weights that are zero, and remove those that were zero for `patience` counts. Call it after each
        epoch. Returns whether any was removed."""
        removed = []
        for layer in range(len(self.live)):
            codes = self._codes(layer)[1]
            self.zero[layer] = np.where(codes == 0, self.zero[layer] + 1, 0)
            removed.append(self.zero[layer] >= patience)
        if not any(gone.any() for gone in removed):
            return False
        self._remove(removed)
        while self._fold():
            pass
        self.reshape()
        return True

    def _remove(self, removed: Sequence[NDArray[np.bool_]]) -> None:
        keep = np.ones(len(self.values), dtype=bool)
        for layer, gone in enumerate(removed):
            place = self.places[layer]
            keep[place.weight] &= ~gone
            if self.program.layers[layer].shared.weight == "element":
                keep[place.weight_bits] &= ~gone
            self.live[layer] = self.live[layer][~gone]
            self.zero[layer] = self.zero[layer][~gone]
        chosen = torch.from_numpy(np.flatnonzero(keep))
        self.values = self.values[chosen]
        self.moments = (self.moments[0][chosen], self.moments[1][chosen])
        self.places = _places_of(self.program, self.live)

    def _fold(self) -> bool:
        """Remove what became useless in one layer: neurons that nobody reads, and constants, which go into the biases
        of the layer that reads them. Returns whether something was removed."""
        removed = [np.zeros(len(slots), dtype=bool) for slots in self.live]
        for layer, spec in enumerate(self.program.layers):
            before = self.program.follows(layer)
            if before is None or spec.positions != (1, 1) or spec.groups > 1 or not spec.bias:
                continue
            previous = self.program.layers[before]
            fed = np.zeros(previous.target[0], dtype=bool)
            fed[self.live[before] // (previous.weights // previous.target[0])] = True
            inputs = self.live[layer] % spec.source[0]
            constant = ~fed[inputs]
            if constant.any():
                self._into_bias(before, layer, constant)
                removed[layer] |= constant
            read = np.zeros(previous.target[0], dtype=bool)
            read[inputs[~constant]] = True
            outputs = self.live[before] // (previous.weights // previous.target[0])
            removed[before] |= ~read[outputs]
            if previous.bias:
                self._forget(self.places[before].bias, ~read)
        if not any(gone.any() for gone in removed):
            return False
        self._remove(removed)
        return True

    def _into_bias(self, before: int, layer: int, constant: NDArray[np.bool_]) -> None:
        bits, source = self.rounded(layer), self.rounded(before)
        spec, values = self.program.layers[layer], self.values.numpy()
        inputs, outputs = self.live[layer] % spec.source[0], self.live[layer] // spec.source[0]
        given = source.bias if source.bias is not None else np.zeros(spec.source[0], dtype=np.float32)
        fractions = bits.data_fractions.astype(np.int64)
        most = np.ldexp(1.0, bits.data_bits.astype(np.int64)) - 1
        steps = to_whole(torch.from_numpy(np.ldexp(given, fractions)), spec.shared.data_in_rounding).numpy()
        codes = np.clip(steps, 0 if not spec.signed else -most, most)
        held = np.ldexp(codes, -fractions)
        weights = bits.weight.reshape(-1)[self.live[layer]]
        added = np.bincount(outputs[constant], (weights * held[inputs])[constant], minlength=spec.target[0])
        values[self.places[layer].bias] += added.astype(np.float32)

    def _forget(self, place: slice, which: NDArray[np.bool_]) -> None:
        for tensor in (self.values, *self.moments):
            tensor.numpy()[place][which] = 0


def _places_of(program: Program, live: Sequence[Indices]) -> list[Places]:
    """Weights and biases of all layers first, then bits."""
    start = 0

    def take(size: int) -> slice:
        nonlocal start
        start += size
        return slice(start - size, start)

    values = [(take(len(slots)), take(_biases(layer))) for layer, slots in zip(program.layers, live, strict=True)]
    bits = [
        (
            take(layer.weight_groups(slots)[1]),
            take(_biases(layer)),
            take(layer.input_groups[1]),
            take(layer.input_groups[1]),
        )
        for layer, slots in zip(program.layers, live, strict=True)
    ]
    return [Places(*value, *bit) for value, bit in zip(values, bits, strict=True)]


def _biases(layer: Layer) -> int:
    return layer.outputs if layer.bias else 0
