"""Constraints as text: ``model_size <= 2 kB``, ``accuracy_drop <= 1 %``, ``latency p90 <= 2 ms``.

A statement names a metric, optionally a statistic of it, a comparison and a bound with a unit. The bound is converted
to the metric's unit once, where the statement is parsed. ``accuracy_drop`` is not a metric: it is the float model's
accuracy on the same samples minus the candidate's, as a fraction (1 % is 0.01). So it is of every metric that says how
good the answers are: one that is better where it is larger has a drop, one that is better where it is smaller has an
increase (``mse_increase <= 2 %``). Of a metric that is no share, such as ``mse``, per cent are of the float model's
value.
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
ComparisonOperator = Literal["<=", "<", ">=", ">", "=="]
#: Suffix of a metric's name, for the float model's value minus the candidate's; and for the opposite.
DROP, INCREASE = "_drop", "_increase"
_STATEMENT = re.compile(
    r"\s*(?P<name>[A-Za-z_]\w*)\s*(?P<statistic>p\d+|per_sample|median)?\s*(?P<comparison><=|>=|==|<|>)\s*"
    r"(?P<bound>[-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(?P<unit>[A-Za-zµμ%_/ ]*?)\s*\Z"
)
_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
#: For each unit of a metric: the units a bound may have, and how many of the metric's unit one of them is.
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
#: Units that count something, whose bounds may be "2 M", "2 MFLOPs" or "300 kBOPs".
_COUNTED = ("operations", "bit operations")
_COUNT_WORDS = ("", "OPs", "FLOPs", "BOPs", "EBOPs", "BitOPs", "operations", "bit operations")


class Measure(Protocol):
    """The part of a metric that a constraint needs."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def unit(self) -> str:
        """The unit of its values."""
        ...

    @property
    def direction(self) -> str:
        """Which way is better, ``minimize`` or ``maximize``."""
        ...

    @property
    def quality(self) -> bool:
        """Whether it says how good the answers are."""
        ...

    @property
    def share(self) -> bool:
        """Whether per cent of it are hundredths, and not parts of the float model's value."""
        ...


@dataclass(frozen=True)
class Constraint:
    """One condition that a candidate must fulfil.

    Attributes:
        text: the statement as the user wrote it.
        metric: the name of the metric whose values are compared.
        comparison: how a value is compared with the bound.
        bound: in the metric's unit.
        drop: whether the bound is on the float model's value minus the candidate's.
        increase: whether it is on the candidate's value minus the float model's.
        relative: whether such a bound is a part of the float model's value.
    """

    text: str
    metric: str
    comparison: ComparisonOperator
    bound: float
    drop: bool = False
    increase: bool = False
    relative: bool = False

    def resolved(self, reference: Mapping[str, float | None]) -> Constraint:
        """The same condition with a bound on the metric's value, given the float model's metrics.

        Args:
            reference: metric → the float model's value, None or NaN where it is not known.

        Raises:
            ConfigError: the float model's value is needed and not known, or the bound is a part of 0.
        """
        if not (self.drop or self.increase):
            return self
        float_value = reference.get(self.metric)
        if float_value is None or np.isnan(float_value):
            raise ConfigError(
                f"{self.text!r} compares with the float model, whose {self.metric} is not known; give a bound on "
                f"{self.metric} instead"
            )
        if self.relative and float_value == 0:
            raise ConfigError(
                f"{self.text!r}: the float model's {self.metric} is 0, and so is every part of it; give a bound on "
                f"{self.metric} instead, such as '{self.metric} <= 0.05'"
            )
        margin = abs(float_value) * self.bound if self.relative else self.bound
        if self.increase:
            return replace(self, bound=float_value + margin, increase=False, relative=False)
        opposite: Mapping[str, ComparisonOperator] = {"<=": ">=", "<": ">", ">=": "<=", ">": "<", "==": "=="}
        bound = float_value - margin
        return replace(self, comparison=opposite[self.comparison], bound=bound, drop=False, relative=False)

    def excess(self, values: Values) -> Values:
        """By how much values of the metric exceed the bound, relative to it; 0 where they fulfil the constraint.

        Args:
            values: shape (candidates,), in the metric's unit; NaN where unknown, which stays NaN.
        """
        assert not self.drop, "a drop must be resolved first"
        assert not self.increase, "an increase must be resolved first"
        over = {
            "<=": values - self.bound,
            "<": values - self.bound,
            ">=": self.bound - values,
            ">": self.bound - values,
            "==": np.abs(values - self.bound),
        }[self.comparison]
        # A bound such as 0.77 - 0.01 is not exact, so values that differ only by rounding count as equal.
        slack = 1e-9 * max(1.0, abs(self.bound))
        missed = over >= -slack if self.comparison in ("<", ">") else over > slack
        scale = abs(self.bound) if self.bound else 1.0
        with np.errstate(over="ignore"):  # relative to a bound such as 1e-308 the excess is infinite
            result: Values = np.where(missed, np.maximum(over / scale, 1e-12), 0.0)
        return np.where(np.isnan(values), np.nan, result)


def total(constraints: Sequence[Constraint], values: Mapping[str, Values]) -> Values:
    """The sum of the excesses over all constraints, shape (candidates,); an unknown value adds nothing.

    Args:
        values: metric → its values, shape (candidates,), in the metric's unit.
    """
    excess = np.stack([c.excess(values[c.metric]) for c in constraints])
    summed: Values = np.nan_to_num(excess, nan=0.0).sum(axis=0)
    return summed


def fulfilled(constraints: Sequence[Constraint], values: Mapping[str, Values]) -> NDArray[np.bool_]:
    """Which candidates fulfil all constraints, shape (candidates,); one with an unknown value does not.

    Args:
        values: metric → its values, shape (candidates,), in the metric's unit; at least one metric.
    """
    count = len(next(iter(values.values())))
    good = np.ones(count, dtype=bool)
    for constraint in constraints:
        good &= constraint.excess(values[constraint.metric]) == 0
    return good


def parse_constraint(text: str, metrics: Mapping[str, Measure]) -> Constraint:
    """The constraint in a statement such as ``latency p90 <= 2 ms``.

    Args:
        metrics: name → metric, for all metrics that a statement may name.

    Raises:
        ConfigError: the statement cannot be parsed, names an unknown metric, its unit is not one of the metric's, or it
            bounds a share by more than all.
    """
    match = _STATEMENT.match(text)
    if not match:
        commas = ", and numbers without commas" if "," in text else ""
        raise ConfigError(
            f"cannot read the constraint {text!r}; write it like 'model_size <= 2 kB', in a file model_size = '<= 2 kB'"
            f"{commas}"
        )
    name, statistic, unit = match["name"], match["statistic"], match["unit"].strip()
    changes = {_change(m): m.name for m in metrics.values() if m.quality}
    metric = name if name in metrics else changes.get(name, name)
    drop, increase = (metric != name and name.endswith(suffix) for suffix in (DROP, INCREASE))
    if metric == name and name not in metrics and name.endswith((DROP, INCREASE)):
        raise ConfigError(f"there is no {name!r} here; {one_of(changes)}.{nearest(name, list(changes))}")
    if statistic and statistic != "median":
        metric = f"{metric}_{statistic}"
    if metric not in metrics:
        known = [*metrics, *changes]
        raise ConfigError(f"there is no metric {metric!r} here; {one_of(known)}.{nearest(name, known)}")
    relative = (drop or increase) and unit == "%" and not metrics[metric].share
    factor = 0.01 if relative else _factor(metrics[metric].unit, unit, text)
    bound = float(match["bound"].replace("_", "")) * factor
    statement = " ".join(text.split())
    comparison: ComparisonOperator = match["comparison"]  # type: ignore[assignment]
    if metrics[metric].share and (bound >= 1 if drop or increase else bound > 1):
        advice = "" if unit else f"; per cent are written like '{name} {comparison} {match['bound']} %'"
        raise ConfigError(f"{text!r}: {metric} is a share, of which 1 is all{advice}")
    return Constraint(statement, metric, comparison, bound, drop, increase, relative)


def _change(metric: Measure) -> str:
    """What a change of a metric for the worse is called."""
    return metric.name + (INCREASE if metric.direction == "minimize" else DROP)


def compared_metric(name: str) -> str:
    """The metric that the key of a constraint names, without what says that it is compared with the float model."""
    return name.removesuffix(DROP).removesuffix(INCREASE)


def statement(name: str, condition: str) -> str:
    """One statement from a key and value of the TOML, such as ``latency = "p90 <= 2 ms"``."""
    return f"{name} {condition}"


def _factor(metric_unit: str, bound_unit: str, text: str) -> float:
    """How many of the metric's unit one of the bound's unit is."""
    if not bound_unit:
        return 1.0
    if metric_unit in _COUNTED:
        plain = bound_unit.replace(" ", "").lower()
        for prefix, factor in _DECIMAL.items():
            for word in _COUNT_WORDS:
                if (prefix or word) and plain == (prefix + word).replace(" ", "").lower():
                    return factor
        allowed: list[str] = ["k", "M", "G", "MFLOPs", "kBOPs"]
    else:
        units = _UNITS.get(metric_unit) or {
            prefix + word: factor
            for prefix, factor in _DECIMAL.items()
            for word in ("", metric_unit, f"{metric_unit}s")
            if prefix or word
        }
        if bound_unit in units:
            return units[bound_unit]
        allowed = list(units) if metric_unit in _UNITS else ["k", "M", "G", metric_unit]
    hint = nearest(bound_unit, allowed)
    raise ConfigError(f"{text!r}: {bound_unit!r} is not a unit of this metric; {one_of(allowed)}.{hint}")
