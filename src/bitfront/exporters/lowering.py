"""From a captured model and a format per operand to a program of integer operations (``program.py``).

What a product takes must be whole numbers times a scale. Where the scales are powers of two, everything stays in whole
numbers; elsewhere, and where a bias is in float, the sum becomes a float32 number until the next format. What has no
such form is refused by name. The range of each value is computed while the program is made, from the ends of the grids
and the weights, so it holds for every input.

The record of an operation has the rule (``operations/integers.py``); this file has the reader that the rule uses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, fx

from bitfront.exporters.building import MOST, Builder, largest, pruned
from bitfront.exporters.oracle import apply, products
from bitfront.exporters.packing import otherwise
from bitfront.exporters.program import (
    FLOAT_DIGITS,
    Add,
    Floats,
    Int,
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
    Value,
    Window,
)
from bitfront.exporters.walking import SiteFormats, Walker
from bitfront.formats.base import Format
from bitfront.formats.grid import Grid, common_grid
from bitfront.graph import Graph
from bitfront.operations.base import DATA_OUT
from bitfront.operations.integers import Geometry, Numbers
from bitfront.transforms.arithmetic import whole

#: What a format must be, for the end of a message.
_WHOLE = "give it a format of whole numbers with one scale, or one per output channel of a weight: integer, affine"


def lowered(graph: Graph, formats: Mapping[str, SiteFormats], full_ranges: bool = False) -> Program:
    """The program of a candidate.

    Args:
        graph: the captured model, with its weights; on the CPU.
        formats: site name → formats by operand, calibrated.
        full_ranges: whether what is rounded is taken to be any number of its format, although the layers before it may
            not reach all of them. Ranges then depend on the formats near them alone; sums may get a bit more.

    Raises:
        ExportError: a node or a format has no form in whole numbers; the message names it and says what to do.
    """
    reader = reader_of(graph, formats, full_ranges)
    reader.walk()
    return reader.program()


def reader_of(graph: Graph, formats: Mapping[str, SiteFormats], full_ranges: bool = False) -> _Reader:
    """What ``lowered`` reads with; for whoever reads node by node."""
    return _Reader(graph, formats, full_ranges)


@dataclass(frozen=True, eq=False)
class _Floats:
    """A part of the float input of the network: which of its values come where."""

    places: Int


class _Reader(Walker):
    """Runs the graph and adds the steps of each node: an ``operations.integers.IntegerReader``."""

    def __init__(self, graph: Graph, formats: Mapping[str, SiteFormats], full_ranges: bool) -> None:
        super().__init__(graph, formats, "computed in whole numbers", "has no form in whole numbers")
        self.build, self.full_ranges = Builder(), full_ranges
        self.numbers: dict[fx.Node, Numbers | _Floats] = {}

    def program(self) -> Program:
        """The finished program; without the steps that its output does not need."""
        node = next(n for n in self.numbers if n.op == "output")
        output = self.numbers[node]
        assert isinstance(output, int)
        return pruned(self.captured.sample_shape, self.build.steps, self.build.values, output)

    def visit(self, n: fx.Node, value: Any) -> None:
        self.build.node = n.name
        if n.op == "placeholder":
            size = math.prod(self.captured.sample_shape)
            self.numbers[n] = _Floats(np.arange(size).reshape(self.captured.sample_shape))
        elif n.op == "output":
            self._finish(n)
        elif n.op != "get_attr" and any(source in self.numbers for source in n.all_input_nodes) and _tensors(value):
            self.numbers[n] = self._read(n)

    def _finish(self, n: fx.Node) -> None:
        sources = n.all_input_nodes
        number = self.numbers.get(sources[0]) if len(sources) == 1 else None
        if not isinstance(number, int):
            raise self.refuse(n, "the network must give one tensor that it computes of its input in whole numbers")
        self.numbers[n] = number

    def _read(self, n: fx.Node) -> Numbers | _Floats:
        operation = self.operation(n)
        if operation is None or operation.integers is None:
            raise self.without_rule(n)
        numbers = operation.integers(self, n)
        if (rounding := self.format_of(n, DATA_OUT)) is not None:
            if not isinstance(numbers, int):
                raise self.refuse(n, f"{DATA_OUT} of what gives several tensors")
            numbers = self._rounded(n, DATA_OUT, numbers, rounding)
        self.check_all_written(n)
        return numbers

    # --- values -------------------------------------------------------------------------------------------------------

    def value(self, n: fx.Node, position: int = 0, name: str = "input") -> int:
        return self.build.plain(self._in_format(n, self.argument(n, position, name), position))

    def values(self, n: fx.Node, position: int, name: str) -> list[int]:
        return [self.build.plain(self._in_format(n, given, position)) for given in self.argument(n, position, name)]

    def _in_format(self, n: fx.Node, given: Any, position: int) -> int:
        number = self.numbers.get(given) if isinstance(given, fx.Node) else None
        operand = self.operand_at(n, position) or "input"
        if number is None or isinstance(number, tuple):
            raise self.refuse(n, f"its {operand} is no value that is computed of the network's input")
        rounding = self.format_of(n, operand)
        if rounding is not None:
            return self._rounded(n, operand, number, rounding)
        if isinstance(number, _Floats):
            raise self.refuse(n, f"its {operand} stays in float; {_WHOLE}")
        return number

    def _rounded(self, n: fx.Node, operand: str, number: int | _Floats, rounding: Format) -> int:
        """A value in a format."""
        shape = number.places.shape if isinstance(number, _Floats) else self.build.values[number].shape
        grid = rounding.grid
        if grid is None or not grid.complete:
            raise self.refuse(n, f"{operand} is {rounding.label}; {_WHOLE}")
        places = None
        if isinstance(number, _Floats) and not _in_order(number.places, self.captured.sample_shape):
            places = number.places
        fixed = isinstance(number, _Floats) or not (
            self.build.values[number].floats or self.build.values[number].scale is not None
        )
        if grid.zero is not None or not fixed or not _powers(torch.as_tensor(grid.step, dtype=torch.float64)):
            if not grid.usual:
                what = "takes a float32" if not fixed else "has a scale that is no power of two"
                raise self.refuse(
                    n, f"{otherwise(rounding, operand)}. It {what}, which nothing here rounds in that way"
                )
            return self._quantized(number, grid, places)
        like = torch.empty(1, *shape, dtype=torch.float64)
        step, low, high = (
            grid.along(entry, like).expand(1, *shape)[0].numpy() for entry in (grid.step, grid.low, grid.high)
        )
        low, high = low.astype(np.int64), high.astype(np.int64)
        points = 1 - np.frexp(step)[1].astype(np.int64)
        used = (low != 0) | (high != 0)
        point = int(points[used].max()) if used.any() else 0
        points = np.where(used, points, point)
        made = Round((), points, low, high, grid.rounds, "wrap" if grid.wraps else "saturate", point, places)
        if not isinstance(number, _Floats):
            source, made = self.build.values[number], replace(made, sources=(number,))
            # Numbers that are on the grid already, as behind a rounding to the same format, stay as they are.
            on_grid = source.divisor == 1 and source.point == point and (points == point).all()
            if on_grid and (low <= source.low).all() and (source.high <= high).all():
                return number
            self._check_mean(n, source, points)
            self.build.check_size(source, int(np.maximum(points - source.point, 0).max(initial=0)))
            # What wraps does not grow with its source.
            if not (self.full_ranges or grid.wraps):
                return self.build.emit(made, point)
        up = np.maximum(point - points, 0)
        return self.build.add(made, Value("", shape, np.left_shift(low, up), np.left_shift(high, up), point))

    def _quantized(self, number: int | _Floats, grid: Grid, places: Int | None) -> int:
        """A value on a grid whose steps are no powers of two, or that is float32."""
        shape = number.places.shape if isinstance(number, _Floats) else self.build.values[number].shape
        like = torch.empty(1, *shape)
        step, zero, low, high = (
            grid.along(entry, like)[0].numpy() if isinstance(entry, Tensor) else np.float32(entry)
            for entry in (grid.step, 0 if grid.zero is None else grid.zero, grid.low, grid.high)
        )
        first, least, most = (np.asarray(entry).astype(np.int64) for entry in (zero, low, high))
        made = Quantize((), np.asarray(step, np.float32), first, least, most, places)
        if not isinstance(number, _Floats):
            made = replace(made, sources=(self.build.in_floats(number),))
        if not made.sources or self.full_ranges:
            low, high = (np.broadcast_to(end - made.zero, shape) for end in (made.low, made.high))
        else:
            source = self.build.values[made.sources[0]]
            low, high = (apply(made, [end[None]], [source])[0] for end in (source.low, source.high))
        if _powers(torch.from_numpy(made.step).double()) and made.step.size == 1:
            return self.build.add(made, Value("", shape, low, high, 1 - int(np.frexp(made.step.ravel()[0])[1])))
        return self.build.add(made, Value("", shape, low, high, scale=made.step))

    def _check_mean(self, n: fx.Node, source: Value, points: Int) -> None:
        """Raises ExportError where the quotient of a mean, a float32, may lie on the other side of a half than the
        mean: if twice the numerator may have more digits than a float32."""
        if source.divisor > 1:
            shift = max(0, int((points - source.point).max(initial=0)))
            if largest(source) << (1 + shift) > 2**FLOAT_DIGITS:
                raise self.refuse(
                    n, f"it rounds the mean of {source.divisor} values whose sum has more than {FLOAT_DIGITS - 1} bits"
                )

    # --- steps --------------------------------------------------------------------------------------------------------

    def product(self, n: fx.Node, spatial: bool = False) -> int:
        number = self._in_format(n, self.argument(n, 0, "input"), 0)
        x = self.build.values[number]
        if x.divisor != 1 or x.floats:
            raise self.refuse(n, f"its data_in stays in float; {_WHOLE}")
        if x.scale is not None and x.scale.size > 1:
            raise self.refuse(n, "its data_in has a scale per channel, so that its sums are no whole numbers")
        weight, weight_point, scale = self._whole_weight(n)
        step = Product((number,), weight, weight_point, self._window(n, weight) if spatial else None)
        if spatial:
            step = replace(step, groups=int(self.setting(n, 6, "groups", 1)))
        size = np.abs(weight).reshape(len(weight), -1).sum(axis=1).max(initial=0)
        if int(size) * largest(x) >= 2**MOST:
            raise self.refuse(n, f"its sums need more than {MOST} bits; take formats of fewer bits")
        up, down = (replace(step, weight=part) for part in (np.maximum(weight, 0), np.minimum(weight, 0)))
        exact: type[Any] = np.float64 if int(size) * largest(x) < 2**53 else np.int64
        low = (products(up, x.low[None], exact) + products(down, x.high[None], exact))[0]
        high = (products(up, x.high[None], exact) + products(down, x.low[None], exact))[0]
        number = self.build.add(step, Value("", low.shape, low, high, x.point + weight_point))
        bias, rounding = self.held_bias(n), self.format_of(n, "bias")
        if bias is not None and rounding is not None:
            bias = rounding.quantize(bias)
        held = None if bias is None else _dyadic(bias)
        if x.scale is not None or scale is not None or (bias is not None and (rounding is None or held is None)):
            along = (-1, *[1] * (low.ndim - 1)) if spatial else (-1,)
            steps = np.float32(1) if x.scale is None else x.scale.ravel()[0]
            factor = np.ldexp(
                steps * (np.float32(1) if scale is None else scale.reshape(along)), -x.point - weight_point
            )
            added = None if bias is None else bias.float().numpy().reshape(along)
            return self.build.emit_floats(Scale((number,), np.asarray(factor, np.float32), added))
        number = self.build.cut(number)
        if held is None or not held[0].any():
            return number
        constant, bias_point = held
        sums = self.build.values[number]
        point = max(sums.point, bias_point)
        constant = np.left_shift(constant, point - bias_point)
        self.build.check_size(sums, point - sums.point + 1)
        if spatial:
            constant = constant.reshape(-1, *[1] * (len(sums.shape) - 1))
        return self.build.cut(self.build.emit(Offset((number,), constant, point - sums.point), point))

    def _whole_weight(self, n: fx.Node) -> tuple[Int, int, Floats | None]:
        """(the weight as whole numbers, their bits behind the binary point, their scales per output channel where these
        are no powers of two)."""
        rounding = self.format_of(n, "weight")
        if rounding is None:
            raise self.refuse(n, f"its weight stays in float; {_WHOLE}")
        rounded = rounding.quantize(self.weight(n))
        known = whole(rounding.grid_of(rounded), 0)
        if known is not None and known.coded:
            scale = known.scale(rounded).numpy().reshape(-1)
            return known.numbers(rounded).numpy().astype(np.int64), 0, scale
        held = None if known is None else _dyadic(rounded)
        if held is None:
            raise self.refuse(n, f"weight is {rounding.label}; {_WHOLE}")
        return *held, None

    def _window(self, n: fx.Node, weight: Int) -> Window:
        """How the kernel of a convolution slides."""
        dims = weight.ndim - 2
        mode = self.setting(n, 7, "padding_mode", "zeros")
        if mode != "zeros":
            raise self.refuse(n, f"padding_mode {mode!r}; only zeros are whole numbers that need no look at the input")
        stride, dilation = (_many(self.setting(n, p, name, 1), dims) for p, name in ((3, "stride"), (5, "dilation")))
        kernel, padding = weight.shape[2:], self.setting(n, 4, "padding", 0)
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            before, after = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
        else:
            before = after = _many(0 if padding == "valid" else padding, dims)
        return Window(kernel, stride, before, after, dilation)

    def limited(self, n: fx.Node, low: float | None, high: float | None) -> int:
        number = self.value(n)
        x = self.build.values[number]
        if x.floats:
            return self.build.emit_floats(Limit((number,), low, high))
        ends = [None if end is None else float(np.float32(end)) for end in (low, high)]
        shift = 0
        while any(e is not None and not math.ldexp(e * x.divisor, x.point + shift).is_integer() for e in ends):
            shift += 1
        self.build.check_size(x, shift)
        least, most = (None if e is None else int(math.ldexp(e * x.divisor, x.point + shift)) for e in ends)
        return self.build.emit(Limit((number,), least, most, shift), x.point + shift, x.divisor)

    def leaked(self, n: fx.Node, slope: float) -> int:
        number = self.value(n)
        x = self.build.values[number]
        if x.floats and slope >= 0:
            return self.build.emit_floats(Leak((number,), float(np.float32(slope)), 0))
        if x.divisor != 1 or slope < 0:
            raise self.refuse(n, "a mean without a format, or a negative slope")
        shift, exact = 0, float(np.float32(slope))
        while not math.ldexp(exact, shift).is_integer():
            shift += 1
        self.build.check_size(x, max(shift, int(math.ldexp(exact, shift)).bit_length()))
        return self.build.cut(self.build.emit(Leak((number,), int(math.ldexp(exact, shift)), shift), x.point + shift))

    def added(self, sources: Sequence[int], signs: Sequence[int]) -> int:
        sources, point, shifts = self.build.aligned(sources)
        given, step = [self.build.values[number] for number in sources], Add(tuple(sources), shifts, tuple(signs))
        ends = (
            apply(
                step, [(x.low if (s > 0) == lower else x.high)[None] for x, s in zip(given, signs, strict=True)], given
            )
            for lower in (True, False)
        )
        low, high = (end[0] for end in ends)
        floats = given[0].floats
        number = self.build.add(step, Value("", low.shape, low, high, point, floats=floats))
        return number if floats else self.build.cut(number)

    def joined(self, sources: Sequence[int], dim: int) -> int:
        sources, point, shifts = self.build.aligned(sources)
        first = self.build.values[sources[0]]
        step = Join(tuple(sources), shifts, (dim % (1 + len(first.shape))) - 1)
        return self.build.emit_floats(step) if first.floats else self.build.emit(step, point)

    def pooled(self, n: fx.Node, kind: Literal["largest", "mean"], geometry: Geometry) -> int:
        number = self.value(n)
        x = self.build.values[number]
        kernel, stride, padding, dilation = geometry
        sizes = x.shape[-len(kernel) :]
        if len(x.shape) != len(kernel) + 1:
            raise self.refuse(n, f"pools {len(kernel)} dimensions of a sample of shape {x.shape}")
        spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
        # With ceil_mode windows may end behind the padding.
        wanted = tuple(self.out.shape[2:]) or (1,) * len(kernel)
        ends = [(w - 1) * s + span for w, s, span in zip(wanted, stride, spans, strict=True)]
        after = tuple(max(p, e - size - p) for p, e, size in zip(padding, ends, sizes, strict=True))
        window = Window(kernel, stride, padding, after, dilation)
        if math.prod((*kernel, *stride)) == 1 and not any((*padding, *after)):
            return number  # of one value each, such as a mean over what has one position
        if kind == "largest":
            return self.build.alike(Pool((number,), "largest", window), x)
        if x.floats:
            raise self.refuse(
                n,
                "a mean of float32 numbers depends on the order of its sum; take integer formats, whose sums are exact",
            )
        if after != padding:
            raise self.refuse(n, "ceil_mode, with means over windows of several sizes")
        count = math.prod(kernel)
        if x.divisor != 1 or largest(x) * count > 2**FLOAT_DIGITS:
            raise self.refuse(n, f"the sum of {count} values has more than the {FLOAT_DIGITS} bits of a float32")
        halvings = (count & -count).bit_length() - 1
        pool = Pool((number,), "sum", window)
        return self.build.emit(pool, x.point + halvings, count >> halvings)

    def reshaped(self, number: int, shape: tuple[int, ...]) -> int:
        x = self.build.values[number]
        if x.shape == shape:
            return number
        return self.build.alike(Move((number,), np.arange(math.prod(shape)).reshape(shape)), x)

    def moved(self, n: fx.Node) -> Numbers:
        given = n.all_input_nodes[0]
        numbers = self.numbers.get(given)
        if isinstance(numbers, tuple):
            return numbers[int(self.argument(n, 1, ""))]
        if numbers is None:
            raise self.refuse(n, "it takes no value that is computed of the network's input")
        if isinstance(numbers, int) or self.format_of(n, self.operand_at(n, 0)) is not None:
            numbers = self.value(n)
        shape = self.build.values[numbers].shape if isinstance(numbers, int) else numbers.places.shape
        places, several = self.places(n, shape)
        made = tuple(self._at(n, numbers, part) for part in places)
        return made if several else made[0]  # type: ignore[return-value]

    def _at(self, n: fx.Node, number: int | _Floats, places: Int) -> int | _Floats:
        if isinstance(number, int):
            x = self.build.values[number]
            return number if _in_order(places, x.shape) else self.build.alike(Move((number,), places), x)
        if (places < 0).any():
            raise self.refuse(n, "it pads the float input of the network; pad it behind the first format")
        return _Floats(number.places.ravel()[places])


def _tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, (tuple, list)) and bool(value) and all(isinstance(part, Tensor) for part in value)
    )


def _powers(steps: Tensor) -> bool:
    return bool((torch.frexp(steps).mantissa == 0.5).all())


def _in_order(places: Int, shape: tuple[int, ...]) -> bool:
    return places.shape == shape and bool((places.ravel() == np.arange(places.size)).all())


def _dyadic(tensor: Tensor) -> tuple[Int, int] | None:
    """(values as whole numbers of at most 24 bits, their bits behind the binary point); None if they are no such."""
    grid = common_grid(tensor.detach())
    if grid is None or max(-cast(int, grid.low), cast(int, grid.high)) > 2**FLOAT_DIGITS:
        return None
    point = 1 - math.frexp(cast(float, grid.step))[1]
    return np.rint(np.ldexp(tensor.detach().double().numpy(), point)).astype(np.int64), point


def _many(value: Any, dims: int) -> tuple[int, ...]:
    return (int(value),) * dims if isinstance(value, int) else tuple(int(v) for v in value)
