"""What a candidate costs as the logic of an FPGA, step by step.

Each step is laid out as logic of its own: a layer with the values of its input as independent signals, a rounding, a
ReLU, a pooling, a sum of two branches. The cost of a network is the sum over its steps. A step depends on a few formats
only, so for most candidates all costs are looked up.

The model's input comes in the format of the first site that rounds it, at no cost. A layer takes every value that its
input format has, also where the values before it cannot reach all of them; so its cost depends on its formats alone.
Only the sign is looked at: nothing is negative behind a ReLU.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfront.errors import EvaluationError, ExportError
from bitfront.exporters import fabric
from bitfront.exporters.fabric import LogicCost
from bitfront.formats.base import Format, Operand
from bitfront.graph import Site
from bitfront.kernels.whole import Rounding
from bitfront.metrics.base import EvaluationContext
from bitfront.metrics.logic_steps import Step, steps_of
from bitfront.operations.base import DATA_OUT, Shape
from bitfront.spaces.model_space import FormatSpace

Floats = NDArray[np.float64]
FREE = LogicCost(0.0, 0.0)
#: So many results are kept at most; then all are forgotten.
LARGEST_MEMORY = 300_000


@dataclass(frozen=True, eq=False)
class Values:
    """What the values of a tensor can be, per sample: multiples of a step between two bounds.

    Attributes:
        low, high, step: float64, of the shape of the tensor without samples; a step is a power of two.
    """

    low: Floats
    high: Floats
    step: Floats

    @cached_property
    def key(self) -> bytes:
        """Equal for equal values."""
        return _digest(self.low, self.high, self.step)

    @property
    def rows(self) -> Floats:
        """Shape (values, 3)."""
        return np.stack([self.low.ravel(), self.high.ravel(), self.step.ravel()], axis=1)

    def at(self, index: NDArray[np.int64]) -> Values:
        """The values at some places of the flattened tensor, of the shape of `index`."""
        low, high, step = (array.ravel()[index] for array in (self.low, self.high, self.step))
        return Values(low, high, step)

    @classmethod
    def of_rows(cls, rows: Floats, shape: Shape) -> Values:
        """The opposite of ``rows``, for a tensor of that shape."""
        low, high, step = (np.ascontiguousarray(column).reshape(shape) for column in rows.T)
        return cls(low, high, step)


class LogicCosts:
    """Costs of single steps, by what they consist of. Each is worked out once."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def _remembered(self, key: Any, work: Callable[[], Any]) -> Any:
        if key not in self._known:
            if len(self._known) >= LARGEST_MEMORY:
                self._known.clear()
            self._known[key] = work()
        return self._known[key]

    def rounded(self, values: Values, to: Values, rounding: Rounding, wraps: bool) -> tuple[Values, LogicCost]:
        """Values rounded to others of the same shape, and what it costs.

        Args:
            rounding: how.
            wraps: whether values out of range come back on the other side; otherwise they saturate.
        """
        rows = np.concatenate([values.rows, to.rows], axis=1)
        way = functools.partial(_wrap_one if wraps else _round_one, rounding=rounding)
        return self._one_by_one(f"rounds {rounding} {wraps}", rows, values.low.shape, way)

    def rectified(self, values: Values) -> tuple[Values, LogicCost]:
        """Values behind a ReLU."""
        return self._one_by_one("rectifies", values.rows, values.low.shape, _rectify_one)

    def pooled(self, values: Values, step: Step) -> tuple[Values, LogicCost]:
        """The largest value, or the mean, of each window; a window at the edge may have fewer for the largest."""
        rows = np.concatenate([values.rows, np.full((1, 3), np.nan)])[step.index]
        one = _pool_one if step.kind == "pools" else _mean_one
        return self._one_by_one(step.kind, rows.reshape(len(rows), -1), step.shape, one)

    def added(self, terms: Sequence[Values], step: Step) -> tuple[Values, LogicCost]:
        """The sums of values at the same place of two branches, each with the step's sign."""
        rows = np.concatenate([values.rows for values in terms], axis=1)
        one = functools.partial(_add_one, signs=step.signs)
        return self._one_by_one(f"adds {step.signs}", rows, step.shape, one)

    def _one_by_one(
        self, kind: str, rows: Floats, shape: Shape, lay_out: Callable[[Floats], tuple[Any, Any]]
    ) -> tuple[Values, LogicCost]:
        """Logic that is there once per row, the row saying what goes in."""
        distinct, place, counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
        parts = [
            self._remembered((kind, row.tobytes()), functools.partial(_laid_out, lay_out, row)) for row in distinct
        ]
        results = np.concatenate([np.zeros((0, 3)), *(result for result, _ in parts)])[place.reshape(-1)]
        luts = sum(int(count) * cost.luts for count, (_, cost) in zip(counts, parts, strict=True))
        levels = max((cost.levels for _, cost in parts), default=0.0)
        return Values.of_rows(results, shape), LogicCost(luts, levels)

    def summed(self, values: Values, step: Step, weight: Floats, bias: Floats | None) -> tuple[Values, LogicCost]:
        """The sums of a layer.

        Args:
            weight: shape (outputs, ...), as the layer has it.
            bias: shape (outputs,).
        """
        parameters = _digest(weight, *([] if bias is None else [bias]))
        key = ("sums", _digest(step.index), values.key, parameters)
        found: tuple[Values, LogicCost] = self._remembered(key, lambda: _sums(values, step, weight, bias))
        return found


def _sums(values: Values, step: Step, weight: Floats, bias: Floats | None) -> tuple[Values, LogicCost]:
    groups, places, terms = step.index.shape
    rows = np.concatenate([values.rows, [[0.0, 0.0, 1.0]]])  # the last one is the padding
    outputs = len(weight) // groups
    results, luts, levels = np.zeros((groups, places, outputs, 3)), 0.0, 0.0
    for g in range(groups):
        matrix = weight.reshape(groups, outputs, terms)[g].T
        offset = None if bias is None else bias.reshape(groups, outputs)[g]
        windows = rows[step.index[g]].reshape(places, -1)
        distinct, place, counts = np.unique(windows, axis=0, return_inverse=True, return_counts=True)
        for number, (row, count) in enumerate(zip(distinct, counts.tolist(), strict=True)):
            signals = fabric.inputs(*row.reshape(terms, 3).T)
            result, cost = _part(signals, fabric.product(signals, matrix, offset))
            results[g, place.reshape(-1) == number] = result
            luts, levels = luts + count * cost.luts, max(levels, cost.levels)
    # (groups, places, outputs) → places first, or channels first
    order = (1, 0, 2, 3) if step.channels_last else (0, 2, 1, 3)
    return Values.of_rows(results.transpose(order).reshape(-1, 3), step.shape), LogicCost(luts, levels)


def _part(sources: Any, results: Any) -> tuple[Floats, LogicCost]:
    """(what the results can be, as rows; what the logic costs)."""
    cost = fabric.cost_of(fabric.traced(sources, results))
    return np.stack(fabric.intervals(results), axis=-1).reshape(-1, 3), cost


def _laid_out(lay_out: Callable[[Floats], tuple[Any, Any]], row: Floats) -> tuple[Floats, LogicCost]:
    return _part(*lay_out(row))


def _round_one(row: Floats, rounding: Rounding) -> tuple[Any, Any]:
    signal = fabric.inputs(*row[:3].reshape(3, 1))
    low, high, step = row[3:].tolist()
    return signal, _objects([fabric.rounded(signal[0], low, high, step, rounding)])


def _wrap_one(row: Floats, rounding: Rounding) -> tuple[Any, Any]:
    signal = fabric.inputs(*row[:3].reshape(3, 1))
    low, high, step = row[3:].tolist()
    code = fabric.on_grid(signal[0] * (1 / step), 1.0, rounding)
    bits = round(math.log2((high - low) / step + 1))
    return signal, _objects([fabric.wrapped(code, bits, low < 0) * step])


def _rectify_one(row: Floats) -> tuple[Any, Any]:
    signal = fabric.inputs(*row.reshape(3, 1))
    return signal, _objects([fabric.rectified(signal[0])])


def _pool_one(row: Floats) -> tuple[Any, Any]:
    rows = row.reshape(-1, 3)
    signals = fabric.inputs(*rows[~np.isnan(rows[:, 0])].T)
    return signals, _objects([fabric.largest(list(signals))])


def _mean_one(row: Floats) -> tuple[Any, Any]:
    signals = fabric.inputs(*row.reshape(-1, 3).T)
    return signals, _objects([fabric.sum_of(list(signals)) * (1 / len(signals))])


def _add_one(row: Floats, signs: Sequence[int]) -> tuple[Any, Any]:
    signals = fabric.inputs(*row.reshape(-1, 3).T)
    return signals, _objects([fabric.sum_of([s * float(sign) for s, sign in zip(signals, signs, strict=True)])])


def _objects(values: Sequence[Any]) -> NDArray[Any]:
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found


def _digest(*arrays: NDArray[Any]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return digest.digest()


@dataclass(frozen=True, eq=False)
class Kept:
    """A figure that keeps the rounded values of parameters, and says under which number."""

    arrays: list[Floats]

    def __call__(self, _site: Site, _form: Format | None, values: Tensor) -> float:
        """The number of what is kept."""
        self.arrays.append(values.detach().cpu().double().numpy())
        return float(len(self.arrays) - 1)


class Walk:
    """The costs of the candidates of one space with one set of weights.

    Args:
        space: nothing of it is kept but its steps.
        costs: of single steps, of this space and others.
    """

    def __init__(self, space: FormatSpace, costs: LogicCosts) -> None:
        self._steps, self._costs = steps_of(space), costs
        self._kept = Kept([])
        #: Numbers of values by their key, and the values of each number; 0: the model's input, not rounded yet.
        self._numbers: dict[bytes, int] = {b"": 0}
        self._values: list[Values | None] = [None]
        #: (step, option of its site, numbers of its sources) → (number of its result, cost).
        self._results: dict[tuple[int, ...], tuple[int, LogicCost]] = {}

    def cost(self, context: EvaluationContext, code: NDArray[np.int64], options: Sequence[int]) -> LogicCost:
        """What a candidate costs.

        Args:
            context: what evaluates it; asked only for what is not known yet.
            code: of the candidate.
            options: of the candidate, at each site.

        Raises:
            EvaluationError: its numbers have too many bits for the tool.
        """
        formats: list[Mapping[str, Mapping[Operand, Format]]] = []
        luts, numbers, levels = 0.0, list[int](), list[float]()
        for s, step in enumerate(self._steps):
            option = -1 if step.group is None else options[step.group]
            key = (s, option, *(numbers[source] for source in step.sources))
            if key not in self._results:
                formats = formats or [context.formats(code)]
                self._results[key] = self._laid_out(context, step, option, key[2:], formats[0])
            number, cost = self._results[key]
            numbers.append(number)
            luts += cost.luts
            levels.append(cost.levels + max((levels[source] for source in step.sources), default=0.0))
        return LogicCost(luts, levels[-1])

    def _laid_out(
        self,
        context: EvaluationContext,
        step: Step,
        option: int,
        sources: Sequence[int],
        formats: Mapping[str, Mapping[Operand, Format]],
    ) -> tuple[int, LogicCost]:
        of_site: Mapping[Operand, Format] = {} if step.group is None else formats.get(step.name, {})
        if step.kind == "enters":
            return 0, FREE
        try:
            given, parts = list[Values | None](), list[LogicCost]()
            for number, source, operand in zip(sources, step.sources, step.operands, strict=True):
                form, shape = of_site.get(operand), self._steps[source].shape
                rounded, cost = self._rounded(self._values[number], form, shape, step.kind == "sums")
                given.append(rounded)
                parts.append(cost)
            values, cost = self._computed(context, step, option, given)
            values, last = self._rounded(values, of_site.get(DATA_OUT), step.shape)
        except ExportError as error:
            raise EvaluationError(f"{step.name}: {error}") from None
        number = 0 if values is None else self._numbers.setdefault(values.key, len(self._values))
        if number == len(self._values):
            self._values.append(values)
        levels = max(part.levels for part in parts) + cost.levels + last.levels
        return number, LogicCost(sum(part.luts for part in (*parts, cost, last)), levels)

    def _rounded(
        self, values: Values | None, form: Format | None, shape: Shape, every: bool = False
    ) -> tuple[Values | None, LogicCost]:
        """Values rounded to a format; every value that the format has, or those that are possible."""
        if form is None:
            return values, FREE
        to = values_of(form, shape)
        if values is None:
            return to, FREE
        assert form.grid is not None
        possible, cost = self._costs.rounded(values, to, form.grid.rounds, form.grid.wraps)
        return _every_value(to, possible) if every else possible, cost

    def _computed(
        self, context: EvaluationContext, step: Step, option: int, given: Sequence[Values | None]
    ) -> tuple[Values | None, LogicCost]:
        """What the logic of a step itself gives."""
        values = given[0]
        if step.kind == "moves":
            return None if values is None else values.at(step.index), FREE
        if step.kind == "rectifies":
            return (None, FREE) if values is None else self._costs.rectified(values)
        fixed = [term for term in given if term is not None]
        if values is None or len(fixed) < len(given):
            raise ExportError("its input has no format")
        if step.kind == "adds":
            return self._costs.added(fixed, step)
        if step.kind in ("pools", "means"):
            return self._costs.pooled(values, step)
        assert step.group is not None
        weight, bias = (self._parameter(context, step.group, operand, option) for operand in ("weight", "bias"))
        assert weight is not None
        return self._costs.summed(values, step, weight, bias)

    def _parameter(self, context: EvaluationContext, group: int, operand: Operand, option: int) -> Floats | None:
        if context.space.sites[group].parameter(operand) is None:
            return None
        return self._kept.arrays[int(context.of_parameter(group, operand, self._kept)[option])]


def _every_value(to: Values, possible: Values) -> Values:
    """What a layer takes: every value of a format, but none below 0 behind a ReLU, and constants as they are."""
    low = np.where(possible.low >= 0, np.maximum(to.low, 0.0), to.low)
    still = possible.low == possible.high
    return Values(np.where(still, possible.low, low), np.where(still, possible.high, to.high), to.step)


def values_of(form: Format, shape: Shape) -> Values:
    """The values of a calibrated format, for an operand that has samples and this shape without them."""
    grid = form.grid
    assert grid is not None
    like = torch.zeros((1, *shape), dtype=torch.float64)
    step, low, high = (
        grid.along(entry, like).expand(like.shape)[0].numpy() for entry in (grid.step, grid.low, grid.high)
    )
    return Values(low * step, high * step, step)
