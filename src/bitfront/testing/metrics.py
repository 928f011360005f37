"""What every metric runner must do. Run by the tests of each runner, also of a stranger's.

from bitfront.testing import check_runner
check_runner("average_bitwidth", {"compare_to": 32}, evaluator, codes)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast, get_args

import numpy as np
from pydantic import ValidationError

from bitfront.config import Direction
from bitfront.metrics import RUNNERS
from bitfront.metrics.base import EvaluationContext, Kind, Runner, Scores, Side, Values
from bitfront.spaces.base import Codes


def check_runner(
    name: str, settings: Mapping[str, Any], subject: EvaluationContext, codes: Codes
) -> Mapping[str, Values]:
    """Assert that the runner called `name` keeps the contract of :class:`bitfront.metrics.base.Runner`.

    For runners whose numbers are a function of the candidate: all but those that read a clock or a power meter.

    Args:
        settings: as under its table in the TOML.
        subject: e.g. a ``FixedEvaluator``.
        codes: three or more candidates of the subject's space.

    Returns:
        What it measured, for tests of its own.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    assert len(codes) >= 3, "three or more candidates are needed"
    kind = RUNNERS.get(name)
    _check_facts(kind, settings)
    before = codes.copy()
    state = {k: v.clone() for k, v in subject.space.graph.model.state_dict().items()}
    found = _measured(kind, settings, subject, codes)
    assert np.array_equal(codes, before), f"{name}: changes the codes it was given"
    after = subject.space.graph.model.state_dict()
    assert all(bool((after[k] == v).all()) for k, v in state.items()), f"{name}: changes the model"

    runner = kind(kind.Settings(**settings))
    for what, other in (
        ("measured again", runner.measure(subject, codes)),
        ("measured a second time by one runner", runner.measure(subject, codes)),
        ("in another order", {m: v[::-1] for m, v in _measured(kind, settings, subject, codes[::-1]).items()}),
        ("one by one", _one_by_one(kind, settings, subject, codes)),
    ):
        for metric, values in found.items():
            assert np.array_equal(values, other[metric], equal_nan=True), (
                f"{name}: {metric} of the same candidates is another {what}: {values} and {other[metric]}"
            )
    _check_failure(kind, settings, subject, codes, found)
    return found


def _check_facts(kind: type[Runner], settings: Mapping[str, Any]) -> None:
    called = kind.__name__
    assert (kind.__doc__ or "").strip(), f"{called} needs a docstring: its first line is what is listed"
    assert kind.side in get_args(Side), f"{called}: side is {kind.side!r}"
    assert kind.produces, f"{called} produces no metric"
    assert len({m.name for m in kind.produces}) == len(kind.produces), f"{called} names a metric twice"
    for metric in kind.produces:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name), f"{called}: {metric.name!r} is no name for a TOML key"
        assert metric.direction in get_args(Direction), f"{called}: {metric.name} must say which way is better"
        assert metric.kind in get_args(Kind), f"{called}: {metric.name} must say how it comes about"
        assert metric.meaning, f"{called}: {metric.name} needs a meaning"
    try:
        kind.Settings(**{**settings, "no_such_key": 1})
    except ValidationError:
        return
    raise AssertionError(f"{called}: an unknown key in its settings is not an error")


def _measured(
    kind: type[Runner], settings: Mapping[str, Any], subject: EvaluationContext, codes: Codes
) -> dict[str, Values]:
    found = kind(kind.Settings(**settings)).measure(subject, codes)
    produced = {m.name for m in kind.produces}
    assert set(found) == produced, f"{kind.__name__} measured {sorted(found)}, and says it produces {sorted(produced)}"
    for metric, values in found.items():
        assert values.dtype == np.float64, f"{metric} is {values.dtype}, not float64"
        assert values.shape == (len(codes),), f"{metric} has shape {values.shape} for {len(codes)} candidates"
    return {m: v.copy() for m, v in found.items()}


def _one_by_one(
    kind: type[Runner], settings: Mapping[str, Any], subject: EvaluationContext, codes: Codes
) -> dict[str, Values]:
    parts = [_measured(kind, settings, subject, codes[i : i + 1]) for i in range(len(codes))]
    return {m.name: np.concatenate([p[m.name] for p in parts]) for m in kind.produces}


class _OneFails:
    """A subject on which the forward passes of one candidate fail."""

    def __init__(self, subject: EvaluationContext, failing: Codes) -> None:
        self._subject, self._failing = subject, failing
        self.asked = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subject, name)

    def scores(self, codes: Codes, split: str, num_samples: int | None) -> Scores:
        self.asked = True
        own = self._subject.scores(codes, split, num_samples)
        failed = (codes == self._failing).all(axis=1)
        return Scores(
            loss=np.where(failed, np.nan, own.loss),
            correct=np.where(failed, 0, own.correct),
            samples=own.samples,
            errors=tuple("RuntimeError: no" if f else e for f, e in zip(failed, own.errors, strict=True)),
        )


def _check_failure(
    kind: type[Runner],
    settings: Mapping[str, Any],
    subject: EvaluationContext,
    codes: Codes,
    found: Mapping[str, Values],
) -> None:
    failing = codes[1]
    wounded = _OneFails(subject, failing)
    measured = _measured(kind, settings, cast(EvaluationContext, wounded), codes)
    hit = (codes == failing).all(axis=1) & wounded.asked
    for metric, values in measured.items():
        assert bool(np.isnan(values[hit]).all()), f"{metric} of a failed candidate is {values[hit]}, not NaN"
        assert np.array_equal(values[~hit], found[metric][~hit], equal_nan=True), (
            f"{metric} of a candidate changes when another one fails"
        )
