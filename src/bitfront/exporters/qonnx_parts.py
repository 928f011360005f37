"""The parts of a QONNX file: nodes, constants behind ``Quant`` nodes, bounds, and where channels lie."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitfront.errors import ExportError, require
from bitfront.exporters.fixed import Fixed, placed, step_of, types_of
from bitfront.exporters.program import FLOAT_DIGITS, Int, Offset, Program, Round, Step, Value, width

#: As the clean-up of qonnx calls them; hls4ml has no layer called "input".
INPUT, OUTPUT = "global_in", "global_out"
#: Of the operations of ONNX, and the version of the file.
OPSET, IR = 13, 8
#: Where Quant comes from, and convolutions whose channels are last.
QUANT_DOMAIN, LAST_DOMAIN = "qonnx.custom_op.general", "qonnx.custom_op.channels_last"
#: Steps that a layer has beside those that it is called after.
_SUFFIXES: Mapping[type[Step], str] = {Round: "_in", Offset: "_biased"}


class Parts:
    """The nodes so far. Rules add those of a step; ``write`` is theirs."""

    def __init__(self, program: Program, channels_last: bool, for_hls: bool) -> None:
        onnx: Any = require("onnx", "qonnx", "writing QONNX")
        self.helper, self.arrays, self.float = onnx.helper, onnx.numpy_helper, onnx.TensorProto.FLOAT
        self.program, self.last, self.for_hls = program, channels_last, for_hls
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.shapes: dict[str, tuple[int, ...]] = {INPUT: self._shape(program.input_shape)}
        #: The types of the program's values, and of the nodes.
        self.held = types_of(program)
        self.types: dict[str, Fixed] = {}
        self.numbers: dict[str, int] = {}
        #: Numbers of offsets that are the bias of a convolution.
        self.within: set[int] = set()
        #: The number, the name and the type of the current step.
        self.number, self.at, self.type = 0, "", Fixed(1, 0, False)

    def model(self, name: str) -> Any:
        """The whole model."""
        tensors: list[str] = []
        taken: dict[str, int] = {}
        for number, (step, value) in enumerate(zip(self.program.steps, self.program.values, strict=True)):
            if self.last and len(value.shape) > 3:
                raise ExportError(f"{value.name}: a sample with more than two dimensions beside the channels")
            word = (re.sub(r"\W", "_", value.name) or "value") + _SUFFIXES.get(type(step), "")
            # Names must differ in more than capitals for hls4ml.
            times = taken[word.lower()] = taken.get(word.lower(), 0) + 1
            self.number, self.at = number, word if times == 1 else f"{word}_{times}"
            self.type = self.held[number]
            tensors.append(self.write(step, [tensors[source] for source in step.sources]))
        result = tensors[self.program.output]
        for node in self.nodes:
            for names in (node.input, node.output):
                for i, tensor in enumerate(names):
                    names[i] = OUTPUT if tensor == result else tensor
        self.shapes[OUTPUT] = self.shapes.pop(result)
        ends = [self._info(INPUT, self._shape(self.program.input_shape)), self._info(OUTPUT, self.shapes[OUTPUT])]
        graph = self.helper.make_graph(
            self.nodes, name, ends[:1], ends[1:], self.constants,
            # hls4ml looks for the shapes of constants there, too.
            value_info=[
                *(self._info(t, s) for t, s in self.shapes.items() if t not in (INPUT, OUTPUT)),
                *(self.helper.make_tensor_value_info(c.name, c.data_type, c.dims) for c in self.constants),
            ],
        )  # fmt: skip
        domains = sorted({node.domain for node in self.nodes} - {""})
        opsets = [self.helper.make_opsetid("", OPSET), *(self.helper.make_opsetid(d, 1) for d in domains)]
        return self.helper.make_model(graph, producer_name="bitfront", opset_imports=opsets, ir_version=IR)

    def write(self, step: Step, given: Sequence[str]) -> str:
        """Add the nodes of a step; returns the tensor with its result."""
        raise NotImplementedError

    # --- parts --------------------------------------------------------------------------------------------------------

    def _info(self, tensor: str, shape: tuple[int, ...]) -> Any:
        return self.helper.make_tensor_value_info(tensor, self.float, shape)

    def _shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor with a batch of 1 samples of a shape."""
        return (1, *placed(np.empty(shape, np.bool_), self.last).shape)

    def _value(self) -> Value:
        return self.program.values[self.number]

    def source(self, step: Step) -> Value:
        """The value that a step takes."""
        return self.program.values[step.sources[0]]

    def refuse(self, why: str) -> ExportError:
        """The error that names the current step."""
        return ExportError(f"{self._value().name}: {why}")

    def constant(self, name: str, numbers: Any) -> str:
        """A tensor of constants, as it is."""
        self.constants.append(self.arrays.from_array(np.ascontiguousarray(numbers), name))
        return name

    def add(self, kind: str, sources: Sequence[str], part: str = "", domain: str = "", **attributes: Any) -> str:
        """A node that gives the value of the current step, or a tensor of its shape.

        Args:
            part: of the name, where a step needs several nodes.
        """
        return self._add(kind, sources, part, self._shape(self._value().shape), domain, **attributes)

    def _add(
        self, kind: str, sources: Sequence[str], part: str, shape: tuple[int, ...], domain: str = "", **attributes: Any
    ) -> str:
        name = f"{self.at}_{part}" if part else self.at
        tensor = f"{name}_out"
        self.nodes.append(self.helper.make_node(kind, [*sources], [tensor], name, domain=domain, **attributes))
        self.shapes[tensor] = shape
        self.types[name], self.numbers[name] = self.type, self.number
        return tensor

    def quant(
        self, x: str, part: str, scale: Any, bits: int, signed: bool, *, narrow: bool = False, mode: str = "ROUND",
        shape: tuple[int, ...],
    ) -> str:  # fmt: skip
        """A Quant node; the zero point is 0, because hls4ml ignores any other without a word."""
        name = f"{self.at}_{part}"
        numbers = {"scale": np.asarray(scale, np.float32), "zero": np.float32(0), "bits": np.float32(bits)}
        sources = [x, *(self.constant(f"{name}_{what}", np.asarray(n)) for what, n in numbers.items())]
        attributes = {"signed": int(signed), "narrow": int(narrow), "rounding_mode": mode}
        return self._add("Quant", sources, part, shape, QUANT_DOMAIN, **attributes)

    def quantized_constant(self, part: str, numbers: Int, point: int) -> str:
        """Constants n / 2^point behind a Quant node that changes none of them, in as few bits as hold them."""
        spare = int(np.bitwise_or.reduce(numbers.ravel())) if numbers.size else 0
        spare = (spare & -spare).bit_length() - 1 if spare else 0
        numbers, point = numbers >> spare, point - spare
        if int(np.abs(numbers).max(initial=0)) > 2**FLOAT_DIGITS:
            raise self.refuse(f"{part} has numbers of more than {FLOAT_DIGITS} bits; take formats of fewer bits")
        low, high = int(numbers.min(initial=0)), int(numbers.max(initial=0))
        # A signed Quant of one bit has the values −1 and 1.
        bits = max(width(low, high), 2 if low < 0 else 1)
        held = self.constant(f"{self.at}_{part}_values", np.ldexp(numbers.astype(np.float32), -point))
        result = self.quant(held, f"{part}_quant", step_of(point), bits, low < 0, shape=numbers.shape)
        del self.types[f"{self.at}_{part}_quant"]
        return result

    def bound(self, kind: str, x: str, part: str, ends: Int, points: Int | int, before: Fixed | None = None) -> str:
        """The larger (``Max``) or the smaller of values and constants n / 2^points.

        Args:
            before: the type of the values, where it is not that of the result.
        """
        point = int(np.max(points))
        codes = np.left_shift(ends, point - np.asarray(points, np.int64))
        if self.for_hls or (codes != codes.ravel()[0]).any():
            codes = placed(np.broadcast_to(codes, self._value().shape), self.last)
        else:
            codes = codes.ravel()[:1]
        constant = self.quantized_constant(part, codes, point)
        if not self.for_hls:
            return self.add(kind, [x, constant], part)
        # hls4ml has no maximum with a constant: max(x, c) = c + relu(x − c), min(x, c) = c − relu(c − x).
        held = self.type
        low, high = int(codes.min()), int(codes.max())
        both = (before or held).beside(held).beside(Fixed(max(width(low, high), 1), point, low < 0))
        self.type = Fixed(both.bits + 2, both.point, True)
        x = self.add("Sub", [x, constant] if kind == "Max" else [constant, x], f"{part}_over")
        x = self.add("Relu", [x], f"{part}_relu")
        self.type = held
        again = self.quantized_constant(f"{part}_again", codes, point)
        return self.add("Add", [x, again], part) if kind == "Max" else self.add("Sub", [again, x], part)

    def as_first(self, x: str, shape: tuple[int, ...], part: str) -> str:
        """A tensor with samples of a shape, with its channels first; a sequence stays an image."""
        if not self.last or len(shape) < 2:
            return x
        _, height, length, channels = self._shape(shape)
        return self._add("Transpose", [x], part, (1, channels, height, length), perm=[0, 3, 1, 2])

    def as_lies(self, x: str, part: str) -> str:
        """The opposite: a tensor with channels first as the value of the current step."""
        shape = self._value().shape
        if not self.last or len(shape) < 2:
            return x
        return self.add("Transpose", [x], part, perm=[0, 2, 3, 1])

    def shaped(self, x: str, shape: tuple[int, ...], part: str) -> str:
        """A tensor with channels first as samples of a shape, also channels first."""
        image = (shape[0], 1, shape[1]) if self.last and len(shape) == 2 else shape
        if self.shapes[x] == (1, *image):
            return x
        if len(image) == 1:
            return self._add("Flatten", [x], part, (1, *image), axis=1)
        # The first 0 stands for the samples.
        wanted = self.constant(f"{self.at}_{part}_shape", np.array([0, *image], np.int64))
        return self._add("Reshape", [x, wanted], part, (1, *image))
