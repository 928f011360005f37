"""An integer program as a graph of QONNX: float32 tensors that ``Quant`` nodes round, for qonnx, FINN and hls4ml.

Every tensor holds the values that the whole numbers of the program stand for. They are exact, because a float32 holds
all whole numbers of 24 bits, and a program cuts its sums to these. What would not be exact is refused by name.

Values with channels lie as in torch (``channels_first``) or with the channels behind (``channels_last``), where a
sequence is an image of height 1. What readers of channels_last files cannot take (a gather, a mean, a sum of three) is
written in operations that they have; ``targets/hls4ml.py`` builds on that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatchmethod
from typing import Any

import numpy as np

from bitfront.exporters.building import largest
from bitfront.exporters.fixed import Fixed, as_image, as_one, ends_of, input_type, offset_of, placed, step_of, ungrouped
from bitfront.exporters.program import (
    FLOAT_DIGITS,
    Add,
    Cut,
    Int,
    Join,
    Leak,
    Limit,
    Move,
    Offset,
    Pool,
    Product,
    Program,
    Round,
    Step,
    Value,
    Window,
    width,
)
from bitfront.exporters.qonnx_parts import INPUT, LAST_DOMAIN, Parts

#: The most ones and zeros that a move is written with.
MOST_SELECTED = 2**18
#: The rounding of a program → that of a Quant node. Half up is written as a sum and a rounding down.
_ROUNDING = {"even": "ROUND", "half_up": "FLOOR", "floor": "FLOOR"}


@dataclass(frozen=True)
class Written:
    """A program as QONNX.

    Attributes:
        model: the ``onnx.ModelProto``, with the shape of every tensor for a batch of 1.
        types: name of a node that computes values → what type holds all of them.
        numbers: likewise, the number of the program's value that it computes the whole or a part of.
    """

    model: Any
    types: Mapping[str, Fixed]
    numbers: Mapping[str, int]


def qonnx_model(program: Program, name: str, channels_last: bool = False, for_hls: bool = False) -> Written:
    """A program without floats as a QONNX model.

    Args:
        program: the program.
        name: of the graph: a word of letters, digits and ``_``.
        channels_last: whether channels are the last dimension, also of the input and the output.
        for_hls: whether moves and groups of channels are written as products with ones and zeros, for readers that know
            neither.

    Raises:
        MissingExtraError: onnx is not installed.
        ExportError: a step has no such form.
    """
    writer = _Writer(program, channels_last, for_hls)
    return Written(writer.model(name), writer.types, writer.numbers)


class _Writer(Parts):
    """The rules: each adds the nodes of a step, and returns the name of the tensor with the result."""

    @singledispatchmethod
    def write(self, step: Step, given: Sequence[str]) -> str:  # noqa: ARG002
        """Add the nodes of a step; returns the tensor with its result."""
        raise self.refuse(f"{type(step).__name__} has no form as QONNX")

    @write.register
    def _(self, step: Round, given: Sequence[str]) -> str:
        if step.overflow != "saturate":
            raise self.refuse("it wraps around, and Quant nodes saturate; search formats that saturate")
        x, result = given[0] if given else INPUT, self.type
        # The nodes before the Quant node.
        self.type = self.held[step.sources[0]] if given else input_type(self.program)[0]
        if step.places is not None:
            x = self.gathered(x, self.program.input_shape, step.places)
        if step.rounding == "half_up":
            x = self._half_added(step, x)
        held, bound = ends_of(step), False
        if held is None:
            low, high = int(step.low.min(initial=0)), int(step.high.max(initial=0))
            held, bound = (max(width(low, high), 2 if low < 0 else 1), low < 0, False), True
        rule = self._rounded_then_bound if self.for_hls else self._bound_then_rounded
        return rule(step, x, held, bound, result)

    def _quant(self, step: Round, x: str, scale: Any, held: tuple[int, bool, bool]) -> str:
        """A Quant node of (bits, signed, narrow)."""
        bits, signed, narrow = held
        mode, shape = _ROUNDING[step.rounding], self._shape(self._value().shape)
        return self.quant(x, "quant", scale, bits, signed, narrow=narrow, mode=mode, shape=shape)

    def _bound_then_rounded(self, step: Round, x: str, held: tuple[int, bool, bool], bound: bool, result: Fixed) -> str:
        """A rounding; where `bound`, to grids whose ends no Quant node has, or one for each value."""
        if bound and held[1]:
            x = self.bound("Max", x, "low", step.low, step.points)
        if bound:
            x = self.bound("Min", x, "high", step.high, step.points)
        self.type = result
        scale = as_one(np.ldexp(np.float32(1), -step.points))
        return self._quant(step, x, scale if scale.ndim == 0 else placed(scale, self.last), held)

    def _rounded_then_bound(self, step: Round, x: str, held: tuple[int, bool, bool], bound: bool, result: Fixed) -> str:
        """The same for hls4ml, where a Quant node has one step, and bounds are sums."""
        points = step.points
        if (points == points.ravel()[0]).all():
            self.type = result
            x = self._quant(step, x, step_of(result.point), held)
            return self._kept(self._within(step, x, points)) if bound else x
        before = max(self.type.point - int(points.min()), 0)
        self.type = Fixed(max(self.type.whole + int(points.max()), 1) + before, before, self.type.signed)
        x = self._times(x, "scaled", points)
        self.type = Fixed(held[0], 0, held[1])
        x = self._quant(step, x, np.float32(1), held)
        x = self._within(step, x, np.int64(0)) if bound else x
        self.type = result
        return self._kept(self._times(x, "back", -points))

    def _kept(self, x: str) -> str:
        """Values behind a Quant node that changes none: hls4ml moves a sum or product with a constant behind the next
        layer, which is wrong where its constants are no scalars."""
        kind, shape = self.type, self._shape(self._value().shape)
        bits = max(kind.bits, 2 if kind.signed else 1)
        return self.quant(x, "kept", step_of(kind.point), bits, kind.signed, shape=shape)

    def _within(self, step: Round, x: str, points: Any) -> str:
        """Values n / 2^points within the ends of a rounding."""
        if self.type.signed:
            x = self.bound("Max", x, "low", step.low, points)
        return self.bound("Min", x, "high", step.high, points)

    def _times(self, x: str, part: str, powers: Int) -> str:
        """Values times 2^powers, a power for each."""
        finest = max(int(-powers.min()), 0)
        factors = placed(np.left_shift(np.int64(1), powers + finest), self.last)
        return self.add("Mul", [x, self.quantized_constant(f"{part}_factor", factors, finest)], part)

    def _half_added(self, step: Round, x: str) -> str:
        """Half a step added, where float32 holds the sum."""
        if self.for_hls:
            raise self.refuse(
                "it rounds half up, and hls4ml gives the half that is added no type; search formats that round "
                "half to even or down"
            )
        points = step.points + 1
        source = self.source(step) if step.sources else None
        finest = 0 if source is None else int(np.maximum(points - source.point, 0).max())
        if source is None or source.divisor != 1 or (largest(source) << finest) + 1 > 2**FLOAT_DIGITS:
            raise self.refuse("it rounds half up what a float32 cannot hold; search formats that round half to even")
        half = placed(np.ldexp(np.float32(1), -points), self.last)
        return self.add("Add", [x, self.constant(f"{self.at}_half_step", half)], "half")

    @write.register
    def _(self, step: Product, given: Sequence[str]) -> str:
        source = self.source(step)
        sums = np.abs(step.weight).reshape(len(step.weight), -1).sum(axis=1)
        most = int(sums.max(initial=0)) * largest(source)
        if most > 2**FLOAT_DIGITS:
            self._check_partial(source)
        if step.window is not None:
            given = [*given, *self._bias_within()]
            return self._convolution(given, step.weight, step.weight_point, step.window, step.groups)
        x, shape = given[0], self._value().shape
        weight = self.quantized_constant("weight", step.weight.T, step.weight_point)
        if len(shape) == 1 or not self.last:
            return self.add("MatMul", [x, weight])
        x = self.shaped(self.as_first(x, source.shape, "first"), source.shape, "vectors")
        first = (1, *((shape[0], 1, shape[1]) if len(shape) == 2 else shape))
        return self.as_lies(self._add("MatMul", [x, weight], "", first), "last")

    def _bias_within(self) -> list[str]:
        """The bias of the current convolution as an input of it, which hls4ml needs: the constant of its offset."""
        number = offset_of(self.program, self.number) if self.for_hls else None
        if number is None:
            return []
        step, value = self.program.steps[number], self.program.values[number]
        assert isinstance(step, Offset)
        self.within.add(number)
        self.type = self.held[number]
        return [
            self.quantized_constant(
                "bias", np.broadcast_to(step.constant, (len(value.low), *step.constant.shape[1:])).ravel(), value.point
            )
        ]

    def _check_partial(self, source: Value) -> None:
        """Raises ExportError where a sum of products, or of a part of them, may be no float32. Where every value may be
        0, a sum of a part is within the range of the whole sum."""
        within = bool((source.low <= 0).all() and (source.high >= 0).all())
        if not within or largest(self._value()) > 2**FLOAT_DIGITS:
            raise self.refuse(
                f"its sums of products have more than {FLOAT_DIGITS} bits, and in float32 these depend on their order; "
                "take formats of fewer bits"
            )

    def _convolution(
        self, given: Sequence[str], weight: Int, point: int, window: Window, groups: int, part: str = ""
    ) -> str:
        """A convolution; of one dimension over an image of height 1 where channels are last."""
        dims = len(window.kernel)
        attributes: dict[str, Any] = {
            "kernel_shape": [*window.kernel], "strides": [*window.stride], "dilations": [*window.dilation],
            "pads": [*window.before, *window.after], "group": groups,
        }  # fmt: skip
        # hls4ml has groups of one channel with one output.
        if self.for_hls and groups > 1 and weight.shape[:2] != (groups, 1):
            weight, attributes["group"] = ungrouped(weight, groups), 1
        held = weight
        if self.last:
            held = weight[:, :, None] if dims == 1 else weight
            held = np.moveaxis(held, 1, -1)
            attributes = as_image(attributes) if dims == 1 else attributes
        named = self.quantized_constant(f"{part}weight", held, point)
        return self.add("Conv", [given[0], named, *given[1:]], part, LAST_DOMAIN if self.last else "", **attributes)

    @write.register
    def _(self, step: Offset, given: Sequence[str]) -> str:
        if self.number in self.within:
            return given[0]
        value = self._value()
        constant = step.constant.reshape((1,) * (len(value.shape) - step.constant.ndim) + step.constant.shape)
        bias = self.quantized_constant("bias", placed(constant, self.last), value.point)
        x = self.add("Add", [*given, bias])
        users = [user for user in self.program.steps if self.number in user.sources]
        # hls4ml chooses the type of a linear layer's sums with their bias, which may be too narrow for a rounding.
        keep = self.type != Fixed.of(value) or any(isinstance(user, Add | Product) for user in users)
        return self._kept(x) if self.for_hls and keep else x

    @write.register
    def _(self, step: Cut, given: Sequence[str]) -> str:  # noqa: ARG002
        # One operation on float32 numbers cuts by itself; a sum of products has been checked.
        return given[0]

    @write.register
    def _(self, step: Limit, given: Sequence[str]) -> str:
        value, x = self._value(), given[0]
        before = self.type.beside(self.held[step.sources[0]])
        between = self.type if step.low is None or step.high is None else before
        for kind, end in (("Max", step.low), ("Min", step.high)):
            self.type = between if kind == "Max" else self.held[self.number]
            if end == 0 and kind == "Max":
                x = self.add("Relu", [x], "relu")
            elif end is not None:
                codes = np.array([int(end) // value.divisor])
                x = self.bound(kind, x, kind.lower(), codes, value.point, before)
        return x

    @write.register
    def _(self, step: Leak, given: Sequence[str]) -> str:
        return self.add("LeakyRelu", given, alpha=float(np.ldexp(step.slope, -step.shift)))

    @write.register
    def _(self, step: Add, given: Sequence[str]) -> str:
        if len(given) > 2 and largest(self._value()) * len(given) > 2**FLOAT_DIGITS:
            raise self.refuse(f"a sum of {len(given)} values with more than {FLOAT_DIGITS} bits")
        order = sorted(range(len(given)), key=lambda i: -step.signs[i])
        if step.signs[order[0]] < 0:
            raise self.refuse("a sum in which every value is subtracted")
        x = given[order[0]]
        for i, k in enumerate(order[1:]):
            last = i == len(order) - 2
            x = self.add("Add" if step.signs[k] > 0 else "Sub", [x, given[k]], "" if last else f"part{i}")
        return x

    @write.register
    def _(self, step: Join, given: Sequence[str]) -> str:
        value = self._value()
        axis = 1 + step.dim
        if self.last and len(value.shape) > 1:
            axis = (3, 2)[step.dim] if len(value.shape) == 2 else (3, 1, 2)[step.dim]
        x, shape = given[0], self._shape(self.program.values[step.sources[0]].shape)
        for i, other in enumerate(given[1:]):
            joined = list(shape)
            joined[axis] += self._shape(self.program.values[step.sources[i + 1]].shape)[axis]
            shape = tuple(joined)
            x = self._add("Concat", [x, other], "" if i == len(given) - 2 else f"part{i}", shape, axis=axis)
        return x

    @write.register
    def _(self, step: Pool, given: Sequence[str]) -> str:
        window, value = step.window, self._value()
        dims, channels = len(window.kernel), value.shape[0]
        attributes: dict[str, Any] = {
            "kernel_shape": [*window.kernel], "strides": [*window.stride], "pads": [*window.before, *window.after]
        }  # fmt: skip
        if step.kind == "largest":
            # A pool with channels last is one of the first version, without dilations.
            if set(window.dilation) != {1}:
                attributes["dilations"] = [*window.dilation]
            attributes = as_image(attributes) if self.last and dims == 1 else attributes
            if not self.last or "dilations" not in attributes:
                return self.add("MaxPool", given, "", LAST_DOMAIN if self.last else "", **attributes)
            image = (1, channels, *self._shape(value.shape)[1:-1])
            first = self.as_first(given[0], self.source(step).shape, "first")
            return self.as_lies(self._add("MaxPool", [first], "", image, **attributes), "last")
        if not self.last and set(window.dilation) == {1}:
            return self.add("AveragePool", given, count_include_pad=1, **attributes)
        # A sum of products with 1, and the whole factors of two by their binary point.
        ones = np.ones((channels, 1, *window.kernel), np.int64)
        halvings = value.point - self.source(step).point
        sums = self._convolution(given, ones, halvings, window, channels, "sum_")
        if value.divisor == 1:
            return sums
        return self.add("Div", [sums, self.constant(f"{self.at}_count", np.array([value.divisor], np.float32))])

    @write.register
    def _(self, step: Move, given: Sequence[str]) -> str:
        source = self.source(step)
        # The first of several numbers also stay in their order.
        if step.reshapes and step.places.size == np.prod(source.shape):
            x = self.as_first(given[0], source.shape, "first")
            return self.as_lies(self.shaped(x, self._value().shape, "shaped"), "last")
        return self.gathered(given[0], source.shape, step.places)

    def gathered(self, x: str, shape: tuple[int, ...], places: Int) -> str:
        """Values at other places: of a tensor with samples of a shape, those at `places`; 0 where a place is −1."""
        flat = self.shaped(self.as_first(x, shape, "from_last"), (int(np.prod(shape)),), "flat")
        size = self.shapes[flat][1]
        if self.for_hls:
            if size * places.size > MOST_SELECTED:
                raise self.refuse(f"it moves {size:,} values to {places.size:,} places, which hls4ml has no layer for")
            chosen = self.quantized_constant("weight", (np.arange(size)[:, None] == places.ravel()).astype(np.int64), 0)
            moved = self._add("MatMul", [flat, chosen], "selected", (1, places.size))
            return self.as_lies(self.shaped(moved, self._value().shape, "shaped"), "to_last")
        if (places < 0).any():
            pads = self.constant(f"{self.at}_pads", np.array([0, 0, 0, 1], np.int64))
            flat = self._add("Pad", [flat, pads], "padded", (1, size + 1))
        chosen = self.constant(f"{self.at}_places", np.where(places < 0, size, places).ravel())
        moved = self._add("Gather", [flat, chosen], "gathered", (1, places.size), axis=1)
        return self.as_lies(self.shaped(moved, self._value().shape, "shaped"), "to_last")
