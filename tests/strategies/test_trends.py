"""Places on trends against plain loops, and what a change of one option does to them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from bitfront.spaces.margins import Margins
from bitfront.strategies import trends
from bitfront.strategies.trends import MarginTrend, NoiseTrend, Trend, known_trends, length_of, prior, similarities
from properties import max_examples

SIZES = (3, 1, 4)


def margins_of(seed: int, classes: int = 3, samples: int = 40) -> Margins:
    """Margins of some samples, few of them wrong, each standing for another share."""
    rng = np.random.default_rng(seed)
    base = (rng.standard_normal((classes, samples)) - 1.5).astype(np.float32)
    effects = tuple(rng.standard_normal((size, classes, samples)).astype(np.float32) for size in SIZES)
    weights = rng.random(samples).astype(np.float32)
    return Margins(base, effects, weights / weights.sum())


def some_options(seed: int, number: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(size, size=number) for size in SIZES], axis=1)


def wrong_by_hand(margins: Margins, options: np.ndarray) -> float:
    """The share of wrong samples of one candidate, sample by sample."""
    wrong = 0.0
    for sample in range(margins.base.shape[1]):
        added = margins.base[:, sample].astype(np.float64)
        for g, option in enumerate(options):
            added = added + margins.effects[g][option, :, sample]
        if added.max() > 0:
            wrong += float(margins.weights[sample])
    return wrong


@given(st.integers(0, 1000))
@max_examples(20)
def test_a_place_grows_with_the_share_of_wrong_samples(seed: int) -> None:
    margins, options = margins_of(seed), some_options(seed, 12)
    shares = np.array([wrong_by_hand(margins, row) for row in options])
    places = MarginTrend(margins).places(options)
    order = np.argsort(shares)
    assert (np.diff(places[order]) >= -1e-9).all()
    # The inverse of what a place is.
    least = float(margins.weights[(margins.base.max(axis=0) > 0)].sum())
    back = least + trends.RESOLVED * np.sinh(places * np.arcsinh((1 - least) / trends.RESOLVED))
    fine = places > trends.LOWEST
    assert_allclose(back[fine], shares[fine], atol=1e-6)


@pytest.mark.parametrize("kind", ["noise", "margins"])
@given(seed=st.integers(0, 1000))
@max_examples(20)
def test_changes_have_the_places_of_changed_candidates(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    trend: Trend = MarginTrend(margins_of(seed))
    if kind == "noise":
        trend = NoiseTrend([rng.random(size) for size in SIZES])
    # More than one block, and asked twice.
    options = some_options(seed, trends.BLOCK + 3)
    for _ in range(2):
        for g, changed in enumerate(trend.changed(options)):
            assert changed.shape == (len(options), SIZES[g])
            for option in range(SIZES[g]):
                others = options.copy()
                others[:, g] = option
                assert_allclose(changed[:, option], trend.places(others), atol=1e-5)


def test_places_do_not_depend_on_what_was_asked_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trends, "KEPT", 5)
    used, options = MarginTrend(margins_of(1)), some_options(1, 20)
    for start in (0, 7, 3, 12):
        part = options[start : start + 8]
        assert_array_equal(used.places(part), MarginTrend(margins_of(1)).places(part))
        used.changed(part)


def test_a_float_model_that_is_always_wrong_has_places_too() -> None:
    known = margins_of(4, samples=32)
    # Shares that add up to 1 exactly.
    wrong = Margins(np.ones_like(known.base), known.effects, np.full(32, 1 / 32, np.float32))
    places = MarginTrend(wrong).places(some_options(4, 30))
    assert np.isfinite(places).all()
    assert places.min() < places.max() <= 1e-6


def test_seeds_have_lengths_near_the_usual_one() -> None:
    assert length_of(0) == trends.LENGTH
    lengths = np.log([length_of(seed) / trends.LENGTH for seed in range(10)]) / np.log(trends.VARIED)
    # None is twice there, and none is far from where ten evenly spread ones would be.
    assert_allclose(np.sort(lengths), np.linspace(-0.9, 0.9, 10), atol=0.13)
    assert np.diff(np.sort(lengths)).min() > 0.05
    assert abs(np.log(length_of(2**63 - 1) / trends.LENGTH)) <= np.log(trends.VARIED)


@pytest.mark.parametrize("seed", [0, 3])
def test_the_kernel_is_one(seed: int) -> None:
    places = np.linspace(trends.LOWEST, trends.HIGHEST, 30)
    kernel = similarities(places, places, length_of(seed))
    assert_allclose(kernel, kernel.T)
    assert_allclose(np.diag(kernel), prior(places))
    assert np.linalg.eigvalsh(kernel).min() > -1e-9


def test_margins_come_back_from_json() -> None:
    margins = margins_of(3)
    back = Margins.from_json(json.loads(json.dumps(margins.as_json())))
    assert back is not None
    assert_array_equal(back.base, margins.base)
    assert_array_equal(back.weights, margins.weights)
    for one, other in zip(back.effects, margins.effects, strict=True):
        assert_array_equal(one, other)
    assert Margins.from_json(None) is None
    assert Margins.from_json({"failed": "the model returns a tuple"}) is None


def test_what_is_known_decides_on_the_trends() -> None:
    assert known_trends(None, None) == []
    noise = [np.ones(2)]
    assert [type(t) for t in known_trends(noise, None)] == [NoiseTrend]
    assert [type(t) for t in known_trends(noise, margins_of(0))] == [NoiseTrend, MarginTrend]
