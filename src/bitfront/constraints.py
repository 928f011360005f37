"""Constraints in plain words: ``model_size <= 2 kB``, ``accuracy_drop <= 1 %``, ``latency p90 <= 2 ms``.

A statement names a metric, optionally a statistic of it, a comparison and a bound with a unit; it is turned into the
metric's own unit once, where it is read. ``accuracy_drop`` is no metric of its own: it is the float model's accuracy on
the same samples minus the candidate's, in points of a share (1 % is 0.01).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from bitfront.errors import ConfigError, nearest, one_of

Values = NDArray[np.float64]
Comparison = Literal["<=", "<", ">=", ">", "=="]
#: Ends the name of a quantity that is a metric's loss against the float model.
DROP = "_drop"
_STATEMENT = re.compile(
    r"\s*(?P<name>[A-Za-z_]\w*)\s*(?P<statistic>p\d+|per_sample|median)?\s*(?P<comparison><=|>=|==|<|>)\s*"
    r"(?P<bound>[-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(?P<unit>[A-Za-zµμ%_/ ]*?)\s*\Z"
)
_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
#: Per unit of a metric: how one is written, and how many of the metric's unit it is.
_UNITS: Mapping[str, Mapping[str, float]] = {
    "bytes": {
        **{f"{prefix}B": factor for prefix, factor in _DECIMAL.items()},
        **{f"{prefix}iB": 1024.0**power for power, prefix in enumerate("KMG", 1)},
        "kiB": 1024.0,
        "byte": 1.0,
        "bytes": 1.0,
    },
    "bits": {"bit": 1.0, "bits": 1.0},
    "ms": {"s": 1e3, "ms": 1.0, "us": 1e-3, "µs": 1e-3, "μs": 1e-3, "ns": 1e-6},
    "mJ": {"J": 1e3, "mJ": 1.0, "uJ": 1e-3, "µJ": 1e-3, "μJ": 1e-3, "nJ": 1e-6},
    "W": {"W": 1.0, "mW": 1e-3, "kW": 1e3},
    "nats": {"nats": 1.0, "nat": 1.0},
    "": {"%": 0.01},
}
#: What has no unit of its own, and counts something: "2 M", "2 MFLOPs", "300 kBOPs".
_COUNTED = ("operations", "bit operations")
_COUNT_WORDS = ("", "OPs", "FLOPs", "BOPs", "EBOPs", "BitOPs", "operations", "bit operations")


class Measure(Protocol):
    """A metric, as far as a constraint needs to know it."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def unit(self) -> str:
        """The unit of its values."""
        ...


@dataclass(frozen=True)
class Constraint:
    """One condition that a candidate must fulfil.

    Attributes:
        text: as the user wrote it.
        metric: whose values are compared.
        comparison: how.
        bound: with what, in the metric's unit.
        drop: the bound is on the float model's value minus the candidate's.
    """

    text: str
    metric: str
    comparison: Comparison
    bound: float
    drop: bool = False

    def resolved(self, reference: Mapping[str, float | None]) -> Constraint:
        """The same on the metric itself, given the float model's metrics.

        Raises:
            ConfigError: the float model has no such value.
        """
        if not self.drop:
            return self
        own = reference.get(self.metric)
        if own is None or np.isnan(own):
            raise ConfigError(f"{self.text!r} compares with the float model, whose {self.metric} is not known")
        turned: Mapping[str, Comparison] = {"<=": ">=", "<": ">", ">=": "<=", ">": "<", "==": "=="}
        return replace(self, comparison=turned[self.comparison], bound=own - self.bound, drop=False)

    def excess(self, values: Values) -> Values:
        """By how much values of the metric miss the bound, as a part of it; 0 where they do not. NaN stays NaN.

        Args:
            values: shape (candidates,), in the metric's unit.
        """
        assert not self.drop, "a drop must be resolved first"
        over = {
            "<=": values - self.bound,
            "<": values - self.bound,
            ">=": self.bound - values,
            ">": self.bound - values,
            "==": np.abs(values - self.bound),
        }[self.comparison]
        # A bound such as 0.77 - 0.01 is no exact number: what is equal but for rounding is equal.
        slack = 1e-9 * max(1.0, abs(self.bound))
        missed = over >= -slack if self.comparison in ("<", ">") else over > slack
        scale = abs(self.bound) if self.bound else 1.0
        with np.errstate(over="ignore"):  # of a bound such as 1e-308 anything is infinitely far
            result: Values = np.where(missed, np.maximum(over / scale, 1e-12), 0.0)
        return np.where(np.isnan(values), np.nan, result)


def total(constraints: Sequence[Constraint], values: Mapping[str, Values]) -> Values:
    """Sum of what the constraints are missed by; a value that is not known adds nothing."""
    excess = np.stack([c.excess(values[c.metric]) for c in constraints])
    summed: Values = np.nan_to_num(excess, nan=0.0).sum(axis=0)
    return summed


def fulfilled(constraints: Sequence[Constraint], values: Mapping[str, Values]) -> NDArray[np.bool_]:
    """Which candidates fulfil all constraints; one whose value is not known does not."""
    count = len(next(iter(values.values())))
    good = np.ones(count, dtype=bool)
    for own in constraints:
        good &= own.excess(values[own.metric]) == 0
    return good


def parse(text: str, metrics: Mapping[str, Measure]) -> Constraint:
    """The constraint that a statement such as ``latency p90 <= 2 ms`` means.

    Args:
        metrics: name → metric, of all that may be named.

    Raises:
        ConfigError: it cannot be read, names no metric, or its unit is not one of the metric.
    """
    match = _STATEMENT.match(text)
    if not match:
        raise ConfigError(f"cannot read the constraint {text!r}; write it like 'model_size <= 2 kB'")
    name, statistic, unit = match["name"], match["statistic"], match["unit"].strip()
    drop = name.endswith(DROP) and name not in metrics
    metric = name.removesuffix(DROP) if drop else name
    if drop and metric not in ("accuracy",):
        raise ConfigError(f"there is no {name!r}; only accuracy_drop is known")
    if statistic and statistic != "median":
        metric = f"{metric}_{statistic}"
    if metric not in metrics:
        known = [*metrics, *(f"{m}{DROP}" for m in metrics if m == "accuracy")]
        raise ConfigError(f"there is no metric {metric!r} here; {one_of(known)}.{nearest(name, known)}")
    factor = _factor(metrics[metric].unit, unit, text)
    bound = float(match["bound"].replace("_", "")) * factor
    return Constraint(" ".join(text.split()), metric, match["comparison"], bound, drop)  # type: ignore[arg-type]


def statement(name: str, condition: str) -> str:
    """``model_size = "<= 2 kB"`` and ``latency = "p90 <= 2 ms"``, as in the TOML, as one statement."""
    return f"{name} {condition}"


def _factor(own: str, written: str, text: str) -> float:
    """How many of a metric's unit one of the written unit is."""
    if not written:
        return 1.0
    if own in _COUNTED:
        for prefix, factor in _DECIMAL.items():
            for word in _COUNT_WORDS:
                if (prefix or word) and written.replace(" ", "").lower() == (prefix + word).replace(" ", "").lower():
                    return factor
        allowed: list[str] = ["k", "M", "G", "MFLOPs", "kBOPs"]
    else:
        units = _UNITS.get(own, {})
        if written in units:
            return units[written]
        allowed = list(units)
    hint = nearest(written, allowed)
    raise ConfigError(f"{text!r}: {written!r} is no unit of this metric; {one_of(allowed)}.{hint}")
