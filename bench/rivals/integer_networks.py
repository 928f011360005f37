"""Networks of integers, whoever trained them: read from a file, evaluated in NumPy's int64, and counted by Bitfront.

A rival's script writes its front to one ``.npz``. ``record`` is JSON: ``rival``, ``packages``, ``seed``, ``epochs``,
``wall_s``, ``cpu_s``, ``rounding`` and ``overflow`` of the inputs of layers, and a list ``networks`` that says of each
network its ``epoch``, its ``beta`` and the EBOPs that the rival logs. The other arrays have a first dimension of
networks; i is the number of a layer, which is linear, with a ReLU between two:

weight_i, bias_i                    codes, (outputs, inputs) and (outputs,); a value is code · 2^-point
weight_widths_i, bias_widths_i      bits of the quantizer of each value, without the sign
weight_points_i, bias_points_i      bits behind the binary point, may be negative
input_widths_i, input_points_i      the same for each input of the layer, (inputs,)
input_signed_i                      whether it has a sign; an input of width 0 is 0 all the same
outputs                             what the rival computes for the first rows of val

Costs are those of the metric ``ebops`` on the model of such a network, by any of its conventions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.engine.evaluation.interface import ONLY_CODE, EvaluationJob
from bitfront.formats.base import Format, Operand
from bitfront.formats.fixed_map import FixedMap
from bitfront.graph import capture
from bitfront.metrics import RUNNERS
from bitfront.metrics.effective_bits import BitCount
from bitfront.spaces.quantize import QuantizationSpace

Whole = NDArray[np.int64]
Floats = NDArray[np.float64]
#: Sums below this are exact in float64, and so is what is added to round them.
EXACT = 2**50
ROUNDINGS = ("half up", "half to even")
OVERFLOWS = ("wrap", "saturate")


@dataclass(frozen=True, eq=False)
class Parameter:
    """A weight or a bias.

    Attributes:
        codes: int64; a value is code · 2^-point.
        widths: bits of the quantizer of each value without the sign, of the same shape.
        points: bits behind the binary point, of the same shape.
    """

    codes: Whole
    widths: Whole
    points: Whole

    @property
    def values(self) -> Floats:
        """The numbers themselves."""
        return np.ldexp(self.codes.astype(np.float64), -self.points)

    @property
    def lengths(self) -> Whole:
        """Bits of the magnitude of each code; 0 of 0. (frexp is exact here.)"""
        return np.frexp(np.abs(self.codes).astype(np.float64))[1].astype(np.int64) * (self.codes != 0)


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer and the bits of its inputs, as the file has them."""

    weight: Parameter
    bias: Parameter
    input_widths: Whole
    input_points: Whole
    input_signed: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Network:
    """A network of linear layers with ReLUs between them.

    Attributes:
        layers: from input to output.
        rounding: of the inputs of layers: ``half up`` or ``half to even``.
        overflow: what becomes of inputs beyond their width: ``wrap``, or ``saturate``, alike at both ends.
        about: what its file says of it.
        outputs: what the one who trained it computes for the first rows of val; None if that is not known.
    """

    layers: tuple[Layer, ...]
    rounding: str
    overflow: str
    about: Mapping[str, Any]
    outputs: Floats | None = None


def read(file: Path) -> tuple[dict[str, Any], list[Network]]:
    """(the record of a file, its networks).

    Raises:
        ValueError: an array is missing or of a wrong shape, or a code needs more bits than its width.
    """
    with np.load(file) as arrays:
        given = {name: arrays[name] for name in arrays.files}
    if "record" not in given:
        raise ValueError(f"{file} has no record; it has {', '.join(given) or 'nothing'}")
    record = json.loads(str(given.pop("record")))
    for key, allowed in (("rounding", ROUNDINGS), ("overflow", OVERFLOWS)):
        if record.get(key) not in allowed:
            raise ValueError(f"{file}: {key} is {record.get(key)!r}; allowed: {', '.join(allowed)}")
    depth = sum(name.startswith("weight_widths_") for name in given)
    networks = []
    for n, about in enumerate(record["networks"]):
        try:
            layers = tuple(_layer(given, n, i) for i in range(depth))
        except (KeyError, IndexError) as error:
            raise ValueError(f"{file}: network {n} is not complete: {error}") from error
        except ValueError as error:
            raise ValueError(f"{file}: network {n}: {error}") from error
        outputs = given["outputs"][n] if "outputs" in given else None
        networks.append(Network(layers, record["rounding"], record["overflow"], about, outputs))
    return record, networks


def _layer(given: Mapping[str, NDArray[Any]], n: int, i: int) -> Layer:
    def parameter(name: str) -> Parameter:
        parts = [given[f"{name}{part}_{i}"][n] for part in ("", "_widths", "_points")]
        if len({part.shape for part in parts}) > 1:
            raise ValueError(f"codes, widths and points of {name}_{i} have shapes {[p.shape for p in parts]}")
        whole = Parameter(*(part.astype(np.int64) for part in parts))
        if (whole.lengths > whole.widths).any():
            raise ValueError(f"a code of {name}_{i} needs more bits than its width")
        return whole

    weight, bias = parameter("weight"), parameter("bias")
    inputs = [given[f"input_{part}_{i}"][n] for part in ("widths", "points", "signed")]
    wanted = {"bias": weight.codes.shape[:1], "input": weight.codes.shape[1:]}
    if bias.codes.shape != wanted["bias"] or any(part.shape != wanted["input"] for part in inputs):
        raise ValueError(f"bias_{i} or the inputs of layer {i} do not fit its weight of shape {weight.codes.shape}")
    return Layer(weight, bias, inputs[0].astype(np.int64), inputs[1].astype(np.int64), inputs[2].astype(bool))


# -- in whole numbers


def outputs(network: Network, x: NDArray[np.float32]) -> Floats:
    """What the network computes, exactly: every sum is one of int64.

    Args:
        x: (rows, inputs).

    Returns:
        (rows, outputs).
    """
    values: Floats = x.astype(np.float64)
    for i, layer in enumerate(network.layers):
        if i:
            values = np.maximum(values, 0)
        codes = rounded(values, layer, network.rounding, network.overflow)
        alive = layer.input_widths > 0
        # One binary point for all inputs, one for all weights, and one for the sum.
        point_x = int(layer.input_points[alive].max(initial=0))
        whole_x = _shifted(codes, np.where(alive, point_x - layer.input_points, 0))
        whole_w, point_w = _at_one_point(layer.weight)
        bias, point_b = _at_one_point(layer.bias)
        point = max(point_x + point_w, point_b)
        total = (whole_x @ whole_w.T) * 2 ** (point - point_x - point_w) + bias * 2 ** (point - point_b)
        if np.abs(total).max(initial=0) >= EXACT:
            raise ValueError(f"a sum of layer {i} has more than {EXACT.bit_length() - 1} bits")
        values = np.ldexp(total.astype(np.float64), -point)
    return values


def rounded(values: Floats, layer: Layer, rounding: str, overflow: str) -> Whole:
    """Codes of the inputs of a layer, (rows, inputs)."""
    scaled = np.ldexp(values, layer.input_points)
    codes = (np.floor(scaled + 0.5) if rounding == "half up" else np.rint(scaled)).astype(np.int64)
    high = 2**layer.input_widths
    if overflow == "saturate":
        codes = np.clip(codes, np.where(layer.input_signed, 1 - high, 0), high - 1)
    else:
        low = np.where(layer.input_signed, high, 0)
        codes = (codes + low) % (high + low) - low
    return np.where(layer.input_widths > 0, codes, 0)


def _at_one_point(parameter: Parameter) -> tuple[Whole, int]:
    """Codes with one binary point for all, and that point."""
    used = parameter.codes != 0
    point = int(parameter.points[used].max(initial=0))
    return _shifted(parameter.codes, np.where(used, point - parameter.points, 0)), point


def _shifted(codes: Whole, bits: Whole) -> Whole:
    return codes << bits


def accuracy(network: Network, x: NDArray[np.float32], y: Whole) -> float:
    """Share of the rows whose largest output is that of their class; of equal ones, the first counts."""
    return float((outputs(network, x).argmax(axis=1) == y).mean())


# -- what it costs


def ebops(network: Network, count: BitCount, *, trimmed: bool = True) -> float:
    """EBOPs, by Bitfront's metric on the model of the network.

    Args:
        network: may come from anywhere.
        count: the convention.
        trimmed: whether a weight or bias has the bits that its code needs, as Bitfront's own networks have; otherwise
            those of its quantizer, if it is not 0.
    """
    model = nn.Sequential(*(nn.Linear(*reversed(layer.weight.codes.shape)) for layer in network.layers)).eval()
    state, formats = {}, {}
    for i, layer in enumerate(network.layers):
        forms: dict[Operand, Format] = {"data_in": _form_of_inputs(layer, count)}
        for name, parameter in (("weight", layer.weight), ("bias", layer.bias)):
            state[f"{i}.{name}"] = torch.from_numpy(parameter.values)
            forms[name] = _form(parameter, trimmed)
        formats[str(i)] = forms
    # In float64 every value of a file is exact.
    model.double().load_state_dict(state)
    sample = torch.zeros(2, network.layers[0].weight.codes.shape[1], dtype=torch.float64)
    graph = capture(model, sample)
    job = EvaluationJob(
        model=model,
        sample=sample,
        space="graph/quantize/mixed_precision_ptq",
        by="name",
        choices={},
        runners=(),
        splits={"val": (sample, torch.zeros(2, dtype=torch.long))},
        calibration=sample,
    )
    names = {site.path: site.name for site in graph.sites}
    space = QuantizationSpace.of_formats(graph, {names[path]: of for path, of in formats.items()})
    kind = RUNNERS.get("ebops")
    settings = kind.Settings(sign_bits=count.sign_bits, count=count.count, biases=count.biases)
    return float(kind(settings).measure(FixedEvaluator(job, space), ONLY_CODE[None])["ebops"][0])


def _form(parameter: Parameter, trimmed: bool) -> FixedMap:
    bits = parameter.lengths if trimmed else np.where(parameter.codes != 0, parameter.widths, 0)
    widths = np.where(bits > 0, bits + 1, 0).astype(np.int8)
    return FixedMap.of(widths, parameter.points.astype(np.int8), signed=True, samples=False)


def _form_of_inputs(layer: Layer, count: BitCount) -> FixedMap:
    """Inputs of a layer may have signs or not, one by one, and a format has one answer for all: here the sign, where it
    counts, is one more bit of an unsigned format. Only the count reads it."""
    widths = layer.input_widths + (count.sign_bits & layer.input_signed & (layer.input_widths > 0))
    return FixedMap.of(widths.astype(np.int8), layer.input_points.astype(np.int8), signed=False, samples=True)


def ebops_of_quantizers(network: Network, signs: bool) -> float:
    """The bits of all quantizers, also of those whose weight is 0, as rivals log it: a check that a file is read right.

    Args:
        network: may come from anywhere.
        signs: whether a sign is a bit, as in PQuantML: of each weight and bias, and of inputs that have one, whatever
            their width.
    """
    total = 0.0
    for layer in network.layers:
        bits_x = layer.input_widths + (signs & layer.input_signed)
        bits_w, bits_b = (p.widths + signs for p in (layer.weight, layer.bias))
        total += float((bits_w @ bits_x).sum()) + float(bits_b.sum())
    return total


def non_dominated(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of some (cost, accuracy) no other one dominates, from the cheapest on; of equal ones the first."""
    kept: list[int] = []
    for n in sorted(range(len(points)), key=lambda n: (points[n][0], -points[n][1], n)):
        if not kept or points[n][1] > points[kept[-1]][1]:
            kept.append(n)
    return kept
