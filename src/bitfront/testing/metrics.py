"""The conformance suite of metric runners: what every runner must do. The tests of each runner run it.

from bitfront.testing import check_runner
check_runner("average_bitwidth", {"compare_to": 32}, evaluator, codes)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast, get_args

import numpy as np
from pydantic import ValidationError

from bitfront.config import Direction
from bitfront.metrics import RUNNERS
from bitfront.metrics.base import EvaluationContext, Kind, Runner, Scores, Side, Values
from bitfront.spaces.base import Codes


def check_runner(
    name: str, settings: Mapping[str, Any], context: EvaluationContext, codes: Codes
) -> Mapping[str, Values]:
    """Assert that the runner `name` keeps the contract of :class:`bitfront.metrics.base.Runner`.

    For runners whose metrics depend on the candidate only: not for those that read a clock or a power meter.

    Args:
        name: the registered name of the runner.
        settings: as in its table in the TOML.
        context: e.g. a ``FixedEvaluator``.
        codes: three or more candidates of its space, int64, shape (candidates, parameters).

    Returns:
        Metric → values, float64, shape (candidates,), for further tests.

    Raises:
        AssertionError: the contract is broken; the message says how.
    """
    assert len(codes) >= 3, "three or more candidates are needed"
    kind = RUNNERS.get(name)
    _check_facts(kind, settings)
    before = codes.copy()
    state = {k: v.clone() for k, v in context.space.graph.model.state_dict().items()}
    metrics = _measured(kind, settings, context, codes)
    assert np.array_equal(codes, before), f"{name}: changes the codes"
    after = context.space.graph.model.state_dict()
    assert all(bool((after[k] == v).all()) for k, v in state.items()), f"{name}: changes the model"

    runner = kind(kind.Settings(**settings))
    for what, other in (
        ("measured by another runner", runner.measure(context, codes)),
        ("measured twice by one runner", runner.measure(context, codes)),
        ("in another order", {m: v[::-1] for m, v in _measured(kind, settings, context, codes[::-1]).items()}),
        ("one by one", _one_by_one(kind, settings, context, codes)),
    ):
        for metric, values in metrics.items():
            assert np.array_equal(values, other[metric], equal_nan=True), (
                f"{name}: {metric} of the same candidates differs {what}: {values} and {other[metric]}"
            )
    _check_failure(kind, settings, context, codes, metrics)
    return metrics


def _check_facts(kind: type[Runner], settings: Mapping[str, Any]) -> None:
    name = kind.__name__
    assert (kind.__doc__ or "").strip(), f"{name} needs a docstring: `bitfront list` shows its first line"
    assert kind.side in get_args(Side), f"{name}: side is {kind.side!r}; allowed: {get_args(Side)}"
    assert kind.produces, f"{name} produces no metric"
    assert len({m.name for m in kind.produces}) == len(kind.produces), f"{name} produces a metric twice"
    for metric in kind.produces:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name), f"{name}: {metric.name!r} is no name for a TOML key"
        assert metric.direction in get_args(Direction), f"{name}: {metric.name} needs a direction"
        assert metric.kind in get_args(Kind), f"{name}: {metric.name} needs a kind, one of {get_args(Kind)}"
        assert metric.meaning, f"{name}: {metric.name} needs a meaning"
    try:
        kind.Settings(**{**settings, "no_such_key": 1})
    except ValidationError:
        return
    raise AssertionError(f"{name}: an unknown key in its settings is no error")


def _measured(
    kind: type[Runner], settings: Mapping[str, Any], context: EvaluationContext, codes: Codes
) -> dict[str, Values]:
    metrics = kind(kind.Settings(**settings)).measure(context, codes)
    produced = {m.name for m in kind.produces}
    assert set(metrics) == produced, f"{kind.__name__} gives {sorted(metrics)} and declares {sorted(produced)}"
    for metric, values in metrics.items():
        assert values.dtype == np.float64, f"{metric} is {values.dtype}, not float64"
        assert values.shape == (len(codes),), f"{metric} has shape {values.shape} for {len(codes)} candidates"
    return {m: v.copy() for m, v in metrics.items()}


def _one_by_one(
    kind: type[Runner], settings: Mapping[str, Any], context: EvaluationContext, codes: Codes
) -> dict[str, Values]:
    parts = [_measured(kind, settings, context, codes[i : i + 1]) for i in range(len(codes))]
    return {m.name: np.concatenate([p[m.name] for p in parts]) for m in kind.produces}


class _OneFails:
    """An evaluation context in which the forward passes of one candidate fail.

    Attributes:
        used: whether the runner has asked for scores.
    """

    def __init__(self, context: EvaluationContext, failing: Codes) -> None:
        self._context, self._failing = context, failing
        self.used = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def scores(self, codes: Codes, split: str, num_samples: int | None) -> Scores:
        self.used = True
        scores = self._context.scores(codes, split, num_samples)
        failed = (codes == self._failing).all(axis=1)
        return replace(
            scores,
            loss=np.where(failed, np.nan, scores.loss),
            correct=np.where(failed, 0, scores.correct),
            errors=tuple("RuntimeError: no" if f else e for f, e in zip(failed, scores.errors, strict=True)),
        )


def _check_failure(
    kind: type[Runner],
    settings: Mapping[str, Any],
    context: EvaluationContext,
    codes: Codes,
    metrics: Mapping[str, Values],
) -> None:
    failing = codes[1]
    one_fails = _OneFails(context, failing)
    with_failure = _measured(kind, settings, cast(EvaluationContext, one_fails), codes)
    failed = (codes == failing).all(axis=1) & one_fails.used
    for metric, values in with_failure.items():
        assert bool(np.isnan(values[failed]).all()), f"{metric} of a failed candidate is {values[failed]}, not NaN"
        assert np.array_equal(values[~failed], metrics[metric][~failed], equal_nan=True), (
            f"{metric} of a candidate changes if another one fails"
        )
