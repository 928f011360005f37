"""How many cycles the loops of a C source take on a Cortex-M4: counts of what they do, each with a cost.

The costs are instructions, fitted to what QEMU counts of sources that gcc compiled with ``-Os``
(``bench/cortex_m.py`` shows how well). A cycle count is `CYCLES_PER_INSTRUCTION` times that: on a Cortex-M4 most
instructions take one cycle, a load two, and a branch that is taken two to four. Flash that makes the processor wait is
not in it.
"""

from __future__ import annotations

import math
from collections import Counter

from bitfront.exporters.c99.loops import pairs, plane, unpacked_rows
from bitfront.exporters.c99.numbers import wide_type
from bitfront.exporters.c99.stages import Stage
from bitfront.exporters.c99.tables import Tables
from bitfront.exporters.program import Add, Cut, Join, Pool, Product, Program, Round, Step, Value

#: In the loop ``load, load, multiply-add, add, compare, branch``: about nine cycles for six instructions.
CYCLES_PER_INSTRUCTION = 1.5

#: What a loop does → instructions. They are a fit: what mostly comes together, as windows and their padding do, shares
#: its cost.
INSTRUCTIONS = {
    "product": 5.8,
    "tap": 12.9,
    "point": 4.3,
    "unpacked": 7.8,
    "listed product": 9.4,
    "listed tap": 27.1,
    "listed point": 14.7,
    "wide product": 4.0,
    "line": 1.4,
    "plane": 1.2,
    "skipped": 47.2,
    "pooled": 9.7,
    "term": 13.3,
    "number": 20.3,
    "move": 4.0,
    "offset": 1.4,
    "limit": 1.5,
    "leak": 4.0,
    "round": 1.2,
    "mean round": 10.5,
    "cut": 25.7,
    "input round": 23.3,
    "input quantize": 35.1,
    "float scale": 12.3,
    "float limit": 3.9,
    "float leak": 6.0,
    "float move": 4.0,
    "float quantize": 18.9,
}
for _each_step in ("move", "offset", "limit", "leak", "round", "mean round"):
    INSTRUCTIONS[f"wide {_each_step}"] = 2 * INSTRUCTIONS[_each_step]


def cycles(program: Program, stage: Stage) -> float:
    """Cycles of a loop, for one sample."""
    return CYCLES_PER_INSTRUCTION * sum(INSTRUCTIONS[what] * n for what, n in counts(program, stage).items())


def counts(program: Program, stage: Stage) -> Counter[str]:
    """What a loop does, and how often, for one sample."""
    first, made = program.steps[stage.steps[0]], program.values[stage.result]
    sources = [program.values[number] for number in first.sources]
    numbers, done = math.prod(made.shape), Counter[str]()
    if isinstance(first, Product):
        done += _products(first, sources[0], program.values[stage.steps[0]])
    elif isinstance(first, Pool):
        lines, taps, skipped = _taps(first, sources[0], program.values[stage.steps[0]])
        done += Counter({"pooled": taps, "line": lines, "skipped": skipped})
    elif isinstance(first, Add | Join):
        done["term"] = sum(math.prod(x.shape) for x in sources)
    done["number"] += numbers
    rest = stage.steps if not first.sources or not isinstance(first, Product | Pool | Add | Join) else stage.steps[1:]
    for k in rest:
        step = program.steps[k]
        if isinstance(step, Add):
            done["term"] += (len(step.sources) - 1) * numbers
            continue
        source = program.values[step.sources[0]] if step.sources else None
        done[_each(step, source, program.values[k])] += numbers
    return done


def _each(step: Step, source: Value | None, result: Value) -> str:
    """What a step does with a number."""
    name = type(step).__name__.lower()
    if source is None:
        return f"input {name}"
    if result.floats or source.floats:
        return f"float {name}"
    extra = int((step.points - source.point).max(initial=0)) if isinstance(step, Round) else getattr(step, "shift", 0)
    wide = wide_type(source, result, max(0, extra) + (source.divisor > 1)) == "int64_t"
    mean = isinstance(step, Round) and source.divisor > 1
    # A cut is in 64 bits in any case.
    return f"{'wide ' if wide and not isinstance(step, Cut) else ''}{'mean ' if mean else ''}{name}"


def _products(first: Product, x: Value, sums: Value) -> Counter[str]:
    held = Tables().add_weight("w", first.weight)
    wide, done = sums.bits > 32, Counter[str]()
    places = math.prod(sums.shape) // len(first.weight)
    if first.window is None:
        taps = first.weight.size * places
        kind = "product"
    else:
        lines, taps, skipped = _taps(first, x, sums)
        inner = first.weight.shape[1]
        lines, taps, skipped = lines * inner, taps * inner, skipped * inner
        kind = "point" if math.prod(first.window.kernel) == 1 else "tap"
        if held.table is not None:
            done += Counter({"line": lines, "skipped": skipped, "plane": inner * math.prod(sums.shape)})
    if held.table is not None:
        done[kind] += taps
        if held.bits < 8:
            once = first.window is not None and unpacked_rows(held.bits, places)
            done["unpacked"] += first.weight.size if once else taps
        if wide:
            done["wide product"] += taps
    if held.starts is not None:
        entries = held.entries * places
        done[f"listed {kind}"] += entries
        if held.value_bits < 8:
            done["unpacked"] += entries
        if wide:
            done["wide product"] += entries
    return done


def _taps(first: Product | Pool, x: Value, result: Value) -> tuple[int, int, int]:
    """(loops over a line of a window, taps in them, padding among them), for one channel in and all channels out."""
    assert first.window is not None
    window = first.window
    (channels, *sizes), (_, *limits) = plane(result.shape), plane(x.shape)
    inside, all_of = [], pairs(window.kernel, 1)
    for axis in (0, 1):
        stride, before = pairs(window.stride, 1)[axis], pairs(window.before, 0)[axis]
        dilation = pairs(window.dilation, 1)[axis]
        at = [y * stride + k * dilation - before for y in range(sizes[axis]) for k in range(all_of[axis])]
        inside.append(sum(0 <= place < limits[axis] for place in at))
    lines = channels * inside[0] * sizes[1]
    taps = channels * inside[0] * inside[1]
    return lines, taps, lines * all_of[1] - taps
