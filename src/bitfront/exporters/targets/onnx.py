"""ONNX that ONNX Runtime computes as searched, in its default session."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bitfront.errors import ExportError, parsing, require
from bitfront.exporters.onnx import INPUT, IR_VERSION, OPSET, OUTPUT, Form, onnx_model
from bitfront.exporters.program import (
    FLOAT_DIGITS,
    Add,
    Cut,
    Floats,
    Join,
    Leak,
    Limit,
    Move,
    Offset,
    Pool,
    Product,
    Program,
    Quantize,
    Round,
    Scale,
    Step,
    Value,
    Window,
    width,
)
from bitfront.exporters.sessions import session_options
from bitfront.exporters.targets import TARGETS
from bitfront.exporters.targets.base import Candidate, Target

#: Samples that are computed at a time.
_CHUNK = 256
#: The most parts that a weight is cut into, so that the sums of each are exact in float32.
_PARTS = 4


@TARGETS.register("onnx")
class Onnx(Target):
    """ONNX, opset 21, that ONNX Runtime computes as searched in its default session; float layers too."""

    judge = "ONNX Runtime, with its default optimizations and with none"
    whole = False
    #: Of the file, where it is not written from the integer program.
    form: ClassVar[Form] = "integer"

    def check(self, candidate: Candidate) -> None:
        """Raises MissingExtraError where onnx or onnxruntime is missing."""
        del candidate
        require("onnx", "onnx", "writing ONNX")
        require("onnxruntime", "onnx", "reading an ONNX file back")

    def exact(self, candidate: Candidate) -> bool:
        """Whether it has an integer program: float layers are summed in another order."""
        return candidate.has_program

    def write(self, candidate: Candidate, folder: Path) -> None:
        """NAME.onnx."""
        if self.exact(candidate):
            model = _Writer(candidate.program).model()
        else:
            try:
                model = onnx_model(candidate.graph, candidate.formats, self.form)
            except ExportError as error:
                why = f"it has no form in whole numbers ({candidate.obstacle}), and none in floats ({error})"
                raise ExportError(why) from None
        (folder / f"{candidate.name}.onnx").write_bytes(model.SerializeToString())

    def computed(self, candidate: Candidate, folder: Path, x: Floats) -> NDArray[Any]:
        """What ONNX Runtime computes; with and without optimizations it must be the same."""
        runtime: Any = require("onnxruntime", "onnx", "reading an ONNX file back")
        levels = runtime.GraphOptimizationLevel
        first = self._run(candidate, folder, x, levels.ORT_ENABLE_ALL)
        if not self.exact(candidate):
            return first
        if not np.array_equal(first, self._run(candidate, folder, x, levels.ORT_DISABLE_ALL)):
            raise ExportError("ONNX Runtime's optimizations change the numbers; please report this")
        return first

    def _run(self, candidate: Candidate, folder: Path, x: Floats, level: Any) -> NDArray[Any]:
        runtime: Any = require("onnxruntime", "onnx", "reading an ONNX file back")
        with parsing(ExportError, "ONNX Runtime does not run the model", "please report this"):
            options = session_options(runtime, self.form)
            options.graph_optimization_level = level
            path = str(folder / f"{candidate.name}.onnx")
            session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            parts = (session.run(None, {INPUT: x[at : at + _CHUNK]})[0] for at in range(0, len(x), _CHUNK))
            return np.concatenate(list(parts))

    def usage(self, candidate: Candidate) -> str:
        """How to run it."""
        how = (
            "Tensors hold whole numbers as floats, and no sum is longer than a float32 holds, so no optimization of a "
        )
        how += "runtime changes a number."
        if not self.exact(candidate):
            how = "Some layers are in float: their sums depend on the order in which a runtime takes them."
        elif candidate.program.floats:
            how = (
                "Sums are whole numbers; between a sum and the next rounding, numbers are float32, one operation each."
            )
        return f"""
```python
import onnxruntime

session = onnxruntime.InferenceSession("{candidate.name}.onnx", providers=["CPUExecutionProvider"])
outputs = session.run(None, {{"{INPUT}": x}})[0]     # x: float32, any batch
```

Opset {OPSET}, input `{INPUT}`, output `{OUTPUT}`, float32 as in the searched network. {how}
"""


class _Writer:
    """An ONNX model of a program. A tensor holds whole numbers as float32, or as float64 where a sum has more than 24
    bits; floats are floats."""

    def __init__(self, program: Program) -> None:
        self.onnx: Any = require("onnx", "onnx", "writing ONNX")
        self.program = program
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.named: set[str] = set()
        #: The tensors that are float64.
        self.doubles: set[str] = set()
        self.tensors: list[str] = []
        for number, (step, value) in enumerate(zip(program.steps, program.values, strict=True)):
            self.prefix = f"{value.name}.{number}"
            given = [self.tensors[source] for source in step.sources]
            self.tensors.append(_WRITERS[type(step)](self, step, given, value))

    def model(self) -> Any:
        """The model, checked."""
        h, kinds, value = self.onnx.helper, self.onnx.TensorProto, self.program.result
        self.prefix = "result"
        last = self._as(self.tensors[self.program.output], "FLOAT")
        factor = np.ldexp(np.float32(1), -value.point) if value.scale is None else value.scale
        if value.divisor != 1:
            last = self.add("Div", [last, self.constant("divisor", np.float32(value.divisor))])
        self.nodes.append(
            h.make_node(
                "Mul", [last, self.constant("scale", np.float32(1) if value.floats else factor)], [OUTPUT], OUTPUT
            )
        )
        graph = h.make_graph(
            self.nodes,
            "bitfront",
            [h.make_tensor_value_info(INPUT, kinds.FLOAT, ["batch", *self.program.input_shape])],
            [h.make_tensor_value_info(OUTPUT, kinds.FLOAT, ["batch", *value.shape])],
            self.constants,
        )
        imports = [h.make_opsetid("", OPSET)]
        model = h.make_model(graph, producer_name="bitfront", opset_imports=imports, ir_version=IR_VERSION)
        self.onnx.checker.check_model(model)
        return model

    def add(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """A node with one output. Returns its name."""
        name = self._free(f"{self.prefix}.{op.lower()}")
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def _free(self, name: str) -> str:
        while name in self.named:
            name += "_"
        self.named.add(name)
        return name

    def constant(self, what: str, values: Any, tensor: str = "") -> str:
        """A constant of the dtype of its values. `tensor`: what it is used with; float64 if that is."""
        name, array = self._free(f"{self.prefix}.{what}"), np.asarray(values)
        if tensor in self.doubles and array.dtype == np.float32:
            array = array.astype(np.float64)
        self.constants.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
        return name

    def spread(self, what: str, values: Any, tensor: str = "") -> str:
        """A constant for each value of a sample; along dimensions where all are equal it is held once."""
        array = np.asarray(values)
        for axis in range(array.ndim):
            first = array.take([0], axis=axis)
            array = first if array.shape[axis] and (array == first).all() else array
        return self.constant(what, array, tensor)

    def _as(self, tensor: str, kind: str) -> str:
        """A tensor as FLOAT or DOUBLE."""
        if (tensor in self.doubles) == (kind == "DOUBLE"):
            return tensor
        cast = self.add("Cast", [tensor], to=getattr(self.onnx.TensorProto, kind))
        if kind == "DOUBLE":
            self.doubles.add(cast)
        return cast

    def wide(self, tensor: str) -> str:
        """A tensor as float64."""
        return self._as(tensor, "DOUBLE")

    def calculated(self, op: str, tensor: str, *others: str, **attributes: Any) -> str:
        """A node whose result has the type of its first input."""
        name = self.add(op, [tensor, *others], **attributes)
        if tensor in self.doubles:
            self.doubles.add(name)
        return name

    def times(self, tensor: str, what: str, factor: Any) -> str:
        """A tensor times a power of two."""
        factor = np.asarray(factor, np.float32)
        return tensor if (factor == 1).all() else self.calculated("Mul", tensor, self.spread(what, factor, tensor))

    def held(self, what: str, whole: NDArray[Any]) -> str:
        """A weight: stored in 4, 8, 16 or 32 bits, and read as float32."""
        bits = width(min(int(whole.min(initial=0)), -1), int(whole.max(initial=0)))
        kinds, name = self.onnx.TensorProto, self._free(f"{self.prefix}.{what}")
        if bits <= 4:
            self.constants.append(self.onnx.helper.make_tensor(name, kinds.INT4, whole.shape, whole.ravel().tolist()))
        else:
            stored = whole.astype(next(f"int{b}" for b in (8, 16, 32) if bits <= b))
            self.constants.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(stored), name))
        return self.add("Cast", [name], to=kinds.FLOAT)

    def fits(self, *values: Value, room: int = 0) -> bool:
        """Whether float32 holds all numbers of some values, shifted left by `room` bits."""
        return all(value.floats or value.bits + room <= FLOAT_DIGITS for value in values)


def _round(w: _Writer, step: Round, given: list[str], value: Value) -> str:
    if given:
        source = w.program.values[step.sources[0]]
        shift = step.points - source.point
        room = max(0, int(shift.max(initial=0))) + 1
        x = given[0] if w.fits(source, room=room) and w.fits(value) else w.wide(given[0])
        x = w.times(x, "shift", np.ldexp(1.0, shift.astype(np.int32)))
        if source.divisor != 1:
            x = w.calculated("Div", x, w.constant("divisor", np.float32(source.divisor), x))
    else:
        x = _entering(w, step)
        x = w.times(x, "factor", np.ldexp(1.0, step.points.astype(np.int32)))
        x = w.wide(x) if step.rounding == "half_up" else x
    if step.rounding == "half_up":
        x = w.calculated("Add", x, w.constant("half", np.float32(0.5), x))
    x = w.calculated("Round" if step.rounding == "even" else "Floor", x)
    if step.overflow == "wrap":
        # What is left of the number when whole turns are taken away.
        low, count = (np.asarray(e, np.float32) for e in (step.low, step.high - step.low + 1))
        moved = w.calculated("Sub", x, w.spread("low", low, x))
        turns = w.calculated("Floor", w.calculated("Div", moved, w.spread("count", count, x)))
        x = w.calculated("Sub", x, w.calculated("Mul", turns, w.spread("turn", count, x)))
    else:
        x = w.calculated("Max", x, w.spread("low", step.low.astype(np.float32), x))
        x = w.calculated("Min", x, w.spread("high", step.high.astype(np.float32), x))
    x = w.times(x, "align", np.ldexp(1.0, np.maximum(step.point - step.points, 0).astype(np.int32)))
    return w._as(x, "FLOAT") if w.fits(value) else x


def _entering(w: _Writer, step: Round | Quantize) -> str:
    """The input of the network, as a rounding takes it."""
    if step.places is None:
        return INPUT
    flat = w.add("Flatten", [INPUT], axis=1)
    return w.add("Gather", [flat, w.constant("places", step.places)], axis=1)


def _quantize(w: _Writer, step: Quantize, given: list[str], _: Value) -> str:
    x = w._as(given[0], "FLOAT") if given else _entering(w, step)
    x = w.add("Round", [w.add("Div", [x, w.spread("step", step.step)])])
    zero = w.spread("zero", step.zero.astype(np.float32)) if step.zero.any() else ""
    x = w.add("Add", [x, zero]) if zero else x
    x = w.add("Max", [x, w.spread("low", step.low.astype(np.float32))])
    x = w.add("Min", [x, w.spread("high", step.high.astype(np.float32))])
    return w.add("Sub", [x, zero]) if zero else x


def _scale(w: _Writer, step: Scale, given: list[str], _: Value) -> str:
    x = w._as(given[0], "FLOAT")
    if step.divisor != 1:
        x = w.add("Div", [x, w.constant("divisor", np.float32(step.divisor))])
    # Keeps runtimes from multiplying the weights of the sum with the scale.
    x = w.add("Floor", [x]) if step.divisor == 1 else x
    x = w.add("Mul", [x, w.constant("scale", step.scale)])
    return x if step.bias is None else w.add("Add", [x, w.constant("bias", step.bias)])


def _digits(step: Product, source: Value) -> list[NDArray[np.int64]]:
    """The weight as a sum of parts whose sums float32 holds exactly.

    Raises:
        ExportError: it takes too many.
    """
    largest = max(-int(source.low.min(initial=0)), int(source.high.max(initial=0)))

    def longest(part: NDArray[np.int64]) -> int:
        return int(np.abs(part).reshape(len(part), -1).sum(axis=1).max(initial=0)) * largest

    bits = int(np.abs(step.weight).max(initial=0)).bit_length()
    for count in range(1, _PARTS + 1):
        size = -(-bits // count)
        parts, rest = [], step.weight
        for k in range(count - 1, 0, -1):
            parts.append((rest >> (size * k)) << (size * k))
            rest = rest - parts[-1]
        parts.append(rest)
        # A part is a multiple of a power of two, and so are its sums.
        units = [size * k for k in range(count - 1, -1, -1)]
        if all(longest(part) >> unit <= 2**FLOAT_DIGITS for part, unit in zip(parts, units, strict=True)):
            return parts
    raise ExportError(f"{source.name}: sums of too many bits for float32; take formats of fewer bits")


def _product(w: _Writer, step: Product, given: list[str], _: Value) -> str:
    source = w.program.values[step.sources[0]]
    x = w._as(given[0], "FLOAT")
    parts = [_sums(w, step, x, part) for part in _digits(step, source)]
    if len(parts) == 1:
        return parts[0]
    total = w.wide(parts[0])
    for part in parts[1:]:
        total = w.calculated("Add", total, w.wide(part))
    return total


def _sums(w: _Writer, step: Product, x: str, weight: NDArray[np.int64]) -> str:
    if step.window is None:
        return w.add("MatMul", [x, w.held("weight", np.ascontiguousarray(weight.T))])
    window = step.window
    return w.add("Conv", [x, w.held("weight", weight)], group=step.groups, dilations=window.dilation, **_slid(window))


def _slid(window: Window) -> dict[str, Any]:
    return {"kernel_shape": window.kernel, "strides": window.stride, "pads": [*window.before, *window.after]}


def _pool(w: _Writer, step: Pool, given: list[str], value: Value) -> str:
    x = w._as(given[0], "FLOAT")
    if step.kind == "largest":
        return w.add("MaxPool", [x], dilations=step.window.dilation, **_slid(step.window))
    weight = np.ones((value.shape[0], 1, *step.window.kernel), np.int64)
    return w.add("Conv", [x, w.held("ones", weight)], group=value.shape[0], **_slid(step.window))


def _offset(w: _Writer, step: Offset, given: list[str], value: Value) -> str:
    x = given[0] if w.fits(value) else w.wide(given[0])
    x = w.times(x, "shift", 2.0**step.shift)
    constant = step.constant.astype(np.float64 if x in w.doubles else np.float32)
    return w.calculated("Add", x, w.constant("bias", constant))


def _cut(w: _Writer, _: Cut, given: list[str], __: Value) -> str:
    return w._as(w.wide(given[0]), "FLOAT")


def _limit(w: _Writer, step: Limit, given: list[str], value: Value) -> str:
    x = w.times(given[0] if w.fits(value) or not step.shift else w.wide(given[0]), "shift", 2.0**step.shift)
    if step.low == 0 and step.high is None:
        return w.calculated("Relu", x)
    x = x if step.low is None else w.calculated("Max", x, w.constant("low", np.float32(step.low), x))
    return x if step.high is None else w.calculated("Min", x, w.constant("high", np.float32(step.high), x))


def _leak(w: _Writer, step: Leak, given: list[str], value: Value) -> str:
    x = given[0] if w.fits(value) else w.wide(given[0])
    negative = w.calculated("Min", x, w.constant("zero", np.float32(0), x))
    positive = w.calculated("Max", x, w.constant("nought", np.float32(0), x))
    leaked = w.calculated("Mul", negative, w.constant("slope", np.float32(step.slope), x))
    return w.calculated("Add", w.times(positive, "shift", 2.0**step.shift), leaked)


def _add(w: _Writer, step: Add, given: list[str], value: Value) -> str:
    tensors = given if w.fits(value) else [w.wide(tensor) for tensor in given]
    first, *others = (
        w.times(t, "shift", s * 2.0**by) for t, by, s in zip(tensors, step.shifts, step.signs, strict=True)
    )
    for other in others:
        first = w.calculated("Add", first, other)
    return first


def _join(w: _Writer, step: Join, given: list[str], value: Value) -> str:
    tensors = [w._as(t, "FLOAT") for t in given] if w.fits(value) else [w.wide(t) for t in given]
    shifted = [w.times(t, "shift", 2.0**by) for t, by in zip(tensors, step.shifts, strict=True)]
    return w.calculated("Concat", *shifted, axis=step.dim + 1)


def _move(w: _Writer, step: Move, given: list[str], value: Value) -> str:
    size, shape = math.prod(w.program.values[step.sources[0]].shape), w.constant("shape", np.array([-1, *value.shape]))
    if step.reshapes and step.places.size == size:
        return w.calculated("Reshape", given[0], shape)
    flat = w.calculated("Flatten", given[0], axis=1)
    if (step.places < 0).any():
        pads = w.constant("pads", np.array([0, 0, 0, 1]))
        flat = w.calculated("Pad", flat, pads)
    places = np.where(step.places < 0, size, step.places).ravel()
    taken = w.calculated("Gather", flat, w.constant("places", places), axis=1)
    return w.calculated("Reshape", taken, shape)


_WRITERS: dict[type[Step], Callable[[_Writer, Any, list[str], Value], str]] = {
    Round: _round,
    Quantize: _quantize,
    Scale: _scale,
    Product: _product,
    Offset: _offset,
    Cut: _cut,
    Limit: _limit,
    Leak: _leak,
    Add: _add,
    Join: _join,
    Pool: _pool,
    Move: _move,
}
