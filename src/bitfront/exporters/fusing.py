"""What lets a runtime fuse a graph of QuantizeLinear and DequantizeLinear: small rewrites that change no value.

A runtime computes a convolution in integers where its input, its weight, its bias and its output are quantized, with
nothing but a ReLU in between. So a bound above which everything rounds to the largest code is left out, values that are
never negative are unsigned, and no Identity stands at the end.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront.exporters.packing import Packing

#: Operators whose results are some of the values of their first input, or all of them.
SELECTING = frozenset("Flatten Reshape Transpose Squeeze Unsqueeze MaxPool Identity".split())


def sources(nodes: Sequence[Any], name: str) -> Iterator[tuple[str, Any]]:
    """(tensor, the node that computes it, or None) of a tensor and of those that it is selected from, last one first.

    Args:
        nodes: of the ONNX graph, in order.
        name: of the tensor.
    """
    computed = {output: node for node in nodes for output in node.output}
    while True:
        node = computed.get(name)
        yield name, node
        if node is None or node.op_type not in SELECTING:
            return
        name = node.input[0]


def bounds(nodes: Sequence[Any], constants: Mapping[str, NDArray[Any]], name: str) -> tuple[float, float]:
    """(smallest, largest possible value) of a tensor that comes from a ReLU or a Clip, and was at most selected from
    since; infinite where nothing is known."""
    *_, (_, node) = sources(nodes, name)
    if node is not None and node.op_type == "Relu":
        return 0.0, math.inf
    if node is None or node.op_type != "Clip" or any(constants.get(bound) is None for bound in node.input[1:]):
        return -math.inf, math.inf
    low, high = (float(constants[bound]) for bound in node.input[1:])
    return low, high


def bounded(held: Packing, low: float, high: float) -> Packing:
    """A form whose byte 0 is the value 0, for values from `low`, 0 or more, to `high`: unsigned, with their codes."""
    assert low >= 0
    assert held.symmetric
    last = held.high
    if math.isfinite(high) and held.axis is None:
        last = min(last, int(np.rint(np.float32(high) / held.scale)))
    return replace(held, low=0, high=last, signed=False)


def without_upper_bounds(
    nodes: Sequence[Any], constants: Mapping[str, NDArray[Any]], quantized: Mapping[str, Packing]
) -> int:
    """Make a Relu of each Clip from 0 to a number that rounds to the largest code of everything that reads it.

    Args:
        nodes: of the ONNX graph; changed in place.
        constants: the values of its initializers, by name.
        quantized: output of a QuantizeLinear → the form that its values take.

    Returns:
        how many.
    """
    changed = 0
    for clip in nodes:
        if clip.op_type != "Clip" or any(bound not in constants for bound in clip.input[1:]):
            continue
        low, high = (constants[clip.input[i]] for i in (1, 2))
        readers = [node for node in nodes if clip.output[0] in node.input]
        if low.dtype != np.float32 or float(low) != 0 or not readers:
            continue
        if all(r.op_type == "QuantizeLinear" and _saturates(quantized[r.output[0]], high) for r in readers):
            clip.op_type = "Relu"
            del clip.input[1:]
            changed += 1
    return changed


def _saturates(held: Packing, bound: NDArray[Any]) -> bool:
    """Whether `bound`, and so everything above it, rounds to the largest code."""
    codes = np.rint(bound.astype(np.float32) / held.scale) + held.zero
    return bool((codes >= held.high).all())


def named_at_the_end(nodes: Sequence[Any], last: str, output: str) -> bool:
    """Give the last tensor of a graph the name of the output, in place; False where no node computes it."""
    computing = [node for node in nodes if last in node.output]
    if not computing:
        return False
    for node in nodes:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == last:
                    names[i] = output
    return True


def nibbles(values: NDArray[Any]) -> bytes:
    """Whole numbers of 4 bits, two per byte, the first one in the lower half, as ONNX stores INT4 and UINT4."""
    flat = (values.reshape(-1).astype(np.int16) & 15).astype(np.uint8)
    padded = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
    return bytes((padded[0::2] | (padded[1::2] << 4)).tobytes())


def initializers(
    onnx: Any, constants: Mapping[str, NDArray[Any]], used: Collection[str], four_bits: Collection[str]
) -> list[Any]:
    """The constants of a graph that something reads, as ONNX stores them; some of them in 4 bits."""
    stored = []
    for name, value in constants.items():
        if name in used and name in four_bits:
            kind = onnx.TensorProto.INT4 if value.dtype == np.int8 else onnx.TensorProto.UINT4
            stored.append(onnx.helper.make_tensor(name, kind, value.shape, nibbles(value), raw=True))
        elif name in used:
            stored.append(onnx.numpy_helper.from_array(value, name))
    return stored
