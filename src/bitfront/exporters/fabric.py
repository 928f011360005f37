"""Fixed-point arithmetic as the logic of an FPGA, by the package alkaid (extra ``fpga``; Sun et al., LGPL-3).

Products with constants become shifts and adders that share what they have in common (distributed arithmetic), so no
multiplier is used. A signal is one of alkaid's variables: it knows the smallest and largest value it can have, and its
step. This file is the only one that calls alkaid. Everything that it builds is checked by whoever exports it.

Two things of alkaid 0.8.2 are not used, as each gives wrong values for some ranges. Its rounding half to even
(``RND_CONV``) takes the wrong bits where a sum has a coarser step than its terms. And ``trace(optimize=True)`` runs the
pass ``canonicalize_msb_wraps``, which forgets a shift. The other passes run here, and give networks of the same cost.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront.errors import ExportError, require
from bitfront.kernels.whole import Rounding

EXTRA, TOOL = "fpga", "alkaid"
#: Signals, an object array of alkaid's variables.
Signals = NDArray[Any]
Floats = NDArray[np.float64]
#: alkaid holds a kernel as float32 and an added constant as an int32.
LARGEST_WEIGHT, LARGEST_CONSTANT = 2**24, 2**31 - 1
#: Carries are counted per bit, as alkaid does by default; no limit on a path.
HARDWARE = (1, 1, -1)
#: The full search costs half as much again in time, for 1.5 % fewer look-up tables.
SOLVER = {"search_all_decompose_dc": False}


@dataclass(frozen=True)
class LogicCost:
    """What logic costs, as alkaid estimates it.

    Attributes:
        luts: 6-input look-up tables.
        levels: delay of the longest path; an adder of a few bits is about 1.1, a multiplexer 0.5.
    """

    luts: float
    levels: float


def check_installed(purpose: str) -> None:
    """Raises MissingExtraError if alkaid is not installed; `purpose` begins the message."""
    require(f"{TOOL}.trace", EXTRA, purpose)


def version() -> str:
    """The tool and its version, e.g. ``alkaid 0.8.2``."""
    return f"{TOOL} {importlib.metadata.version(TOOL)}"


@functools.cache
def _part(name: str) -> Any:
    """A module of alkaid."""
    return require(f"{TOOL}.{name}", EXTRA, "logic of an FPGA")


def inputs(low: Floats, high: Floats, step: Floats) -> Signals:
    """New signals that are multiples of a step (a power of two) between two values, all arrays of one shape.

    A signal whose two values are equal is a constant.
    """
    kind, found = _part("trace").FVariable, np.empty(low.size, dtype=object)
    rows = zip(low.ravel().tolist(), high.ravel().tolist(), step.ravel().tolist(), strict=True)
    for i, (least, most, grain) in enumerate(rows):
        found[i] = kind(least, most, grain, latency=0.0, hwconf=HARDWARE)
    return found.reshape(low.shape)


def intervals(signals: Signals) -> tuple[Floats, Floats, Floats]:
    """(smallest value, largest value, step) of signals, arrays of their shape."""
    values = np.array([(s.low, s.high, s.step) for s in signals.ravel()], dtype=np.float64).reshape(-1, 3)
    low, high, step = (column.reshape(signals.shape) for column in values.T)
    return low, high, step


def constant(value: float) -> Any:
    """A signal that is always the same."""
    trace = _part("trace")
    return trace.FVariable.from_const(float(value), trace.HWConfig(*HARDWARE))


def product(signals: Signals, weight: Floats, bias: Floats | None = None) -> Signals:
    """The sums Σ signal · weight + bias, exact.

    Args:
        signals: shape (inputs,).
        weight: shape (inputs, outputs), multiples of powers of two.
        bias: shape (outputs,); None: none.

    Raises:
        ExportError: a weight or bias has too many bits for alkaid.
    """
    if not np.array_equal(weight.astype(np.float32), weight):
        raise ExportError(f"a weight has more than {LARGEST_WEIGHT.bit_length() - 1} bits, the most that {TOOL} takes")
    still = np.array([s.low == s.high for s in signals])
    added = np.zeros(weight.shape[1]) if bias is None else bias.astype(np.float64)
    # A constant input is a part of the bias; alkaid fails where all of them are constants.
    added = added + np.array([s.low if c else 0.0 for s, c in zip(signals, still, strict=True)]) @ weight
    moving = ~still
    sums = np.full(weight.shape[1], 0.0, dtype=object)
    columns = np.flatnonzero((weight[moving] != 0).any(axis=0))
    if len(columns):
        moving_array = _part("trace").FVArray(signals[moving], dict(SOLVER), hwconf=HARDWARE)
        sums[columns] = np.asarray(moving_array @ np.ascontiguousarray(weight[moving][:, columns]))
    found = np.empty(len(sums), dtype=object)
    for i, (total, more) in enumerate(zip(sums, added.tolist(), strict=True)):
        found[i] = constant(float(total) + more) if isinstance(total, float) else plus(total, more)
    return found


def plus(signal: Any, more: float) -> Any:
    """A signal and a number."""
    if signal.low == signal.high:
        return constant(signal.low + more)
    if more and abs(more) / min(signal.step, _grain(more)) > LARGEST_CONSTANT:
        raise ExportError(f"a bias of {more:g} beside a step of {signal.step:g} has too many bits for {TOOL}")
    return signal + more


def _grain(value: float) -> float:
    """The largest power of two that a number other than 0 is a multiple of."""
    numerator, denominator = abs(value).as_integer_ratio()
    return (numerator & -numerator) / denominator


def rectified(signal: Any) -> Any:
    """The larger one of a signal and 0."""
    return signal.relu() if signal.low < signal.high else constant(max(0.0, signal.low))


def largest(signals: Sequence[Any]) -> Any:
    """The largest of some signals, by a tree of comparisons."""
    waiting = list(signals)
    while len(waiting) > 1:
        pairs = [waiting[i : i + 2] for i in range(0, len(waiting), 2)]
        waiting = [pair[0] if len(pair) == 1 else _larger(*pair) for pair in pairs]
    return waiting[0]


def _larger(one: Any, other: Any) -> Any:
    # alkaid reads the highest bit of the difference as its sign, also where a difference is never negative.
    apart = one - other
    return one if apart.low >= 0 else other if apart.high <= 0 else one.max_of(other)


def sum_of(signals: Sequence[Any]) -> Any:
    """The sum of some signals, by a tree of adders; 0 of none."""
    waiting = list(signals)
    while len(waiting) > 1:
        pairs = [waiting[i : i + 2] for i in range(0, len(waiting), 2)]
        waiting = [pair[0] if len(pair) == 1 else pair[0] + pair[1] for pair in pairs]
    return waiting[0] if waiting else constant(0.0)


def limited(signal: Any, low: float | None, high: float | None) -> Any:
    """A signal cut off at two ends; None: there is no end."""
    if signal.low == signal.high:
        least, most = -math.inf if low is None else low, math.inf if high is None else high
        return constant(min(max(signal.low, least), most))
    cut = signal if low is None else signal.max_of(float(low))
    return cut if high is None or cut.low == cut.high else cut.min_of(float(high))


def wrapped(signal: Any, bits: int, signed: bool) -> Any:
    """The last bits of a whole number, in two's complement if `signed`."""
    low = -(2 ** (bits - 1)) if signed else 0
    if signal.low == signal.high:
        return constant(low + (signal.low - low) % 2**bits)
    return signal.quantize(int(signed), bits - int(signed), 0)


def rounded(signal: Any, low: float, high: float, step: float, rounding: Rounding = "even") -> Any:
    """A signal rounded to multiples of `step`, a power of two, and saturated at `low` and `high`."""
    return constant(low) if low == high else limited(on_grid(signal, step, rounding), low, high)


def on_grid(signal: Any, step: float, rounding: Rounding = "even") -> Any:
    """A signal rounded to multiples of `step`, a power of two: half to even, half up, or down."""
    if signal.low == signal.high:
        code = signal.low / step
        whole = round(code) if rounding == "even" else math.floor(code + 0.5 * (rounding == "half_up"))
        return constant(whole * step)
    if signal.step >= step:
        return signal
    fraction = -round(math.log2(step))
    if rounding == "floor":
        return _cut(signal, fraction)
    raised = plus(signal, step / 2)
    if rounding == "half_up":
        return _cut(raised, fraction)
    # At a tie, nothing is left of the raised signal below the step, and its last bit becomes 0.
    above = _cut(raised, fraction - 1)
    finest = int(raised.kif[2])
    if finest <= fraction:
        return above
    last = raised.quantize(0, 1 - fraction, fraction)
    below = raised.quantize(0, -fraction, finest)
    return ((below.unary_bit_op("any") * step) & last) + above


def _cut(signal: Any, fraction: int) -> Any:
    """A signal without the bits behind so many behind the binary point."""
    sign, whole, _ = (int(number) for number in signal.kif)
    return signal.quantize(sign, max(whole, 1 - fraction), fraction)


def traced(sources: Signals, results: Signals) -> Any:
    """The logic that computes `results` from `sources`, alkaid's ``CombLogic``; its inputs and outputs are in the order
    of the arrays, and every input is one, used or not."""
    passes, constants, order = (_part(f"trace.{name}") for name in ("passes", "passes.canon", "passes.order"))
    logic = _part("trace").trace(list(sources.ravel()), list(results.ravel()), optimize=False)
    logic = constants.canonicalize_outputs(constants.const_propagation(logic))
    for simplified in (passes.common_subexpr_elimin, passes.null_quant_elimin):
        logic = passes.dead_code_elimin(logic, keep_dead_inputs=True)
        logic = simplified(logic)
    logic = passes.dead_code_elimin(logic, keep_dead_inputs=True)
    logic = order.canonical_sort(passes.add_surrogate(logic))
    return order.topo_bandwidth_sort(logic)


def cost_of(logic: Any) -> LogicCost:
    """What logic costs as it is written: alkaid's Verilog adds three numbers at a time where it can."""
    passes = _part("trace.passes")
    written = passes.add_surrogate(passes.dead_code_elimin(passes.fuse_ternary_adders(logic)), _skip_op8_cost=True)
    return LogicCost(float(written.cost), float(written.latency[1]) if written.shape[1] else 0.0)
