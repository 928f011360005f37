"""What a metric runner gives, checked before anybody believes it: a runner may come from anywhere.

Each metric that the runner declares must have one number per candidate, and there must be no others.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bitfront.errors import EvaluationError
from bitfront.interrupts import contained
from bitfront.metrics.base import EvaluationContext, Runner, Values
from bitfront.spaces.base import Codes

#: Kinds of NumPy types that are numbers: bool, int, unsigned, float.
NUMBERS = "biuf"
#: Candidates whose metrics are kept, about.
KEPT = 2**18


def measured(runner: Runner, context: EvaluationContext, codes: Codes) -> dict[str, Values]:
    """The metrics of `codes` by a runner: metric → float64 of shape (candidates,), which the caller may change.

    Raises:
        EvaluationError: the runner gives something else; the message names the metric.
        CodeExitError: it called ``sys.exit`` or something like it.
    """
    with contained():
        given = runner.measure(context, codes)
        return _checked(runner, given, len(codes))


def measured_once(
    runner: Runner, context: EvaluationContext, codes: Codes, kept: dict[bytes, tuple[float, ...]]
) -> dict[str, Values]:
    """The same, where each candidate is measured once. Proposals of a strategy ask for the costs of thousands of
    candidates, most of which the proposal before has asked for.

    Args:
        runner: in closed form, so that the values of a candidate never change.
        context: always the same one.
        kept: code → its metrics, in the order of ``produces``; all is forgotten when there are ``KEPT``.
    """
    keys = [code.tobytes() for code in np.ascontiguousarray(codes)]
    if len(kept) > KEPT:
        kept.clear()
    unknown = {key: row for row, key in enumerate(keys) if key not in kept}
    if unknown:
        values = measured(runner, context, codes[list(unknown.values())])
        columns = [values[metric.name].tolist() for metric in runner.produces]
        kept.update(zip(unknown, zip(*columns, strict=True), strict=True))
    table = np.array([kept[key] for key in keys], dtype=np.float64).reshape(len(keys), len(runner.produces))
    return {metric.name: table[:, i].copy() for i, metric in enumerate(runner.produces)}


def _checked(runner: Runner, given: object, count: int) -> dict[str, Values]:
    who, declared = type(runner).__name__, [metric.name for metric in runner.produces]
    if not isinstance(given, Mapping):
        raise EvaluationError(
            f"the runner {who} of {', '.join(declared)} returned a {type(given).__name__}; needed: metric → values"
        )
    unknown = [name for name in given if name not in declared]
    if unknown:
        raise EvaluationError(
            f"the runner {who} returned the metric {unknown[0]!r}, which is not one that it declares in `produces`: "
            + ", ".join(declared)
        )
    missing = [name for name in declared if name not in given]
    if missing:
        raise EvaluationError(f"the runner {who} did not return the metric {missing[0]}, which it declares")
    return {name: _numbers(who, name, given[name], count) for name in declared}


def _numbers(who: str, name: str, value: object, count: int) -> Values:
    try:
        array = np.asarray(value)
    except Exception as error:  # a list of lists of different lengths, a tensor that needs a gradient
        raise EvaluationError(
            f"the metric {name} of the runner {who} is a {type(value).__name__} that is no array: {error}"
        ) from None
    if array.dtype.kind not in NUMBERS or array.shape != (count,):
        raise EvaluationError(
            f"the metric {name} of the runner {who} is a {type(value).__name__} of type {array.dtype} and shape "
            f"{array.shape}; needed: numbers of shape ({count},), one per candidate"
        )
    return np.array(array, dtype=np.float64)
