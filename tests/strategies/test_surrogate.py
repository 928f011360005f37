"""The surrogate: conformance, the model against dense formulas, exact fronts against enumeration."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from operator import le

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from bitfront.pareto import hypervolume, non_dominated
from bitfront.spaces.base import Branch, Choice, Group, Space
from bitfront.spaces.margins import Margins
from bitfront.strategies import anova
from bitfront.strategies.anova import Columns, Effects, Scales, fitted
from bitfront.strategies.base import History, Knowledge, Resolution
from bitfront.strategies.gains import distances, gains, reference
from bitfront.strategies.separable import front, minimum
from bitfront.strategies.surrogate import Surrogate, SurrogateSettings
from bitfront.strategies.trends import known_trends
from bitfront.testing.strategies import check_strategy, toy_space


def chain(groups: int, options: int) -> Space:
    """Groups with one ordered choice each."""
    labels = tuple(map(str, range(options)))
    return Space([Group(f"g{i}", (Branch("x", (Choice("w", labels),)),)) for i in range(groups)])


def test_conformance() -> None:
    check_strategy(Surrogate, stateless=True)


# -- the model


def dense_kernel(space: Space, scales: Scales, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The kernel by its definition, product by product."""
    kernel = np.full((len(x), len(y)), anova.CONSTANT)
    parameters = space.parameters
    choosing = {p.group: i for i, p in enumerate(parameters) if p.branch is None and len(parameters) > 1}
    for a, b in itertools.product(range(len(x)), range(len(y))):
        z = []
        for i, p in enumerate(parameters):
            taken = [
                p.branch is None or p.group not in choosing or row[choosing[p.group]] == p.branch
                for row in (x[a], y[b])
            ]
            if all(taken):
                if p.steps:
                    distance = abs(int(x[a][i]) - int(y[b][i])) / (len(p.labels) - 1)
                else:
                    distance = float(x[a][i] != y[b][i])
            else:
                distance = float(any(taken))
            z.append(scales.columns[i] * np.exp(-distance / anova.LENGTH))
        kernel[a, b] += sum(z) + scales.interaction * sum(p * q for p, q in itertools.combinations(z, 2))
    return kernel


@pytest.mark.parametrize("space", [chain(4, 3), toy_space(2, 3)], ids=["plain", "branches"])
def test_predictions_are_those_of_the_dense_formula(space: Space) -> None:
    rng = np.random.default_rng(0)
    codes = np.unique(space.sample(12, rng), axis=0)
    results = rng.standard_normal(len(codes))
    scales = Scales(rng.random(len(space.parameters)) + 0.1, 0.7, 0.05, np.zeros(0), 0.0)
    effects = Effects(space, Columns(space), scales, codes, results)
    asked = space.sample(9, rng)
    known = dense_kernel(space, scales, codes, codes) + scales.noise * np.eye(len(codes))
    cross = dense_kernel(space, scales, asked, codes)
    target = (results - results.mean()) / results.std()
    expected = results.mean() + results.std() * cross @ np.linalg.solve(known, target)
    assert_allclose(effects.mean(space.options(asked)), expected, rtol=1e-9)
    prior = np.diag(dense_kernel(space, scales, asked, asked))
    variance = prior - np.einsum("ij,ji->i", cross, np.linalg.solve(known, cross.T))
    assert_allclose(effects.deviation(space.options(asked)), results.std() * np.sqrt(variance), rtol=1e-6)


@pytest.mark.parametrize("known", ["nothing", "noise", "margins"])
def test_changes_are_the_predictions_of_changed_candidates(known: str) -> None:
    space, rng = toy_space(3, 3), np.random.default_rng(1)
    codes = np.unique(space.sample(20, rng), axis=0)
    noise = None if known == "nothing" else [rng.random(g.size) for g in space.groups]
    margins = None
    if known == "margins":
        added = [rng.standard_normal((g.size, 2, 30)).astype(np.float32) for g in space.groups]
        margins = Margins(np.full((2, 30), -1, np.float32), tuple(added), np.full(30, 1 / 30, np.float32))
    trends = known_trends(noise, margins)
    scales = Scales(rng.random(len(space.parameters)) + 0.1, 0.7, 0.05, np.full(len(trends), 0.9), 0.0)
    effects = Effects(space, Columns(space), scales, codes, rng.standard_normal(len(codes)), trends)
    options = space.options(space.sample(5, rng))
    changes = effects.changes(options)
    for g, group in enumerate(space.groups):
        for option in range(group.size):
            changed = options.copy()
            changed[:, g] = option
            # The function of a trend is tabulated, and interpolated here.
            assert_allclose(changes[g][:, option], effects.mean(changed), atol=1e-4 if trends else 1e-9)


def test_the_gradient_of_the_fit_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    space, rng = chain(4, 4), np.random.default_rng(0)
    codes = np.unique(space.sample(15, rng), axis=0)
    results, places = rng.standard_normal(len(codes)), [rng.random(len(codes)) for _ in range(2)]
    checked = []

    def check(function, start, **_):  # type: ignore[no-untyped-def]
        point = start + 0.3 * rng.standard_normal(len(start))
        _, gradient = function(point)
        for i in range(len(point)):
            step = np.zeros(len(point))
            step[i] = 1e-5
            slope = (function(point + step)[0] - function(point - step)[0]) / 2e-5
            assert_allclose(gradient[i], slope, rtol=1e-5, atol=1e-6)
            checked.append(i)
        return type("Found", (), {"x": point, "fun": 0.0})

    monkeypatch.setattr("scipy.optimize.minimize", check)
    fitted(Columns(space), codes, results, places)
    assert len(checked) == 4 + 2 + 2


def test_the_model_learns_effects_and_an_interaction() -> None:
    space, rng = chain(6, 4), np.random.default_rng(0)
    weights = rng.random((6, 4)) * np.array([3.0, 0.1, 1.0, 0.1, 2.0, 0.1])[:, None]

    def truth(codes: np.ndarray) -> np.ndarray:
        return weights[np.arange(6), codes].sum(axis=1) + 0.5 * codes[:, 0] * codes[:, 2]

    codes = np.unique(space.sample(90, rng), axis=0)
    others = space.sample(200, rng)
    scales = fitted(Columns(space), codes, truth(codes))
    effects = Effects(space, Columns(space), scales, codes, truth(codes))
    left = truth(others) - effects.mean(space.options(others))
    assert np.std(left) < 0.1 * np.std(truth(others))
    assert scales.columns[[1, 3, 5]].max() < scales.columns[[0, 2, 4]].min()


# -- exact fronts


@settings(max_examples=60)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 10**6), st.booleans())
def test_exact_fronts_against_enumeration(sizes: list[int], seed: int, whole: bool) -> None:
    rng = np.random.default_rng(seed)
    draw = (lambda n: rng.integers(0, 6, n).astype(float)) if whole else rng.random
    values, costs = [draw(n) for n in sizes], [draw(n) for n in sizes]
    every = np.array(list(itertools.product(*map(range, sizes))))
    total = [sum(table[every[:, g]] for g, table in enumerate(tables)) for tables in (costs, values)]
    expected = np.stack(total, axis=1)
    expected = np.unique(expected[non_dominated(expected)].round(9), axis=0)
    solved = front(values, costs)
    assert solved.exact
    assert_allclose(np.stack([solved.costs, solved.values], axis=1), expected, atol=1e-8)
    recomputed = sum(values[g][solved.options[:, g]] for g in range(len(sizes)))
    assert_allclose(recomputed, solved.values)
    for bound in (float(np.median(total[0])), float(total[0].min())):
        found = minimum(values, [(costs, bound + 1e-9)])
        assert found is not None
        best = total[1][total[0] <= bound + 1e-9].min()
        assert_allclose(sum(values[g][o] for g, o in enumerate(found)), best, atol=1e-7)
    assert minimum(values, [(costs, float(total[0].min()) - 1.0)]) is None


def test_sixty_layers_are_solved_as_by_integer_programming() -> None:
    rng = np.random.default_rng(0)
    values = [np.sort(rng.random(5))[::-1].copy() for _ in range(60)]
    costs = [np.array([2.0, 3.0, 4.0, 6.0, 8.0]) * rng.integers(1, 40) for _ in range(60)]
    solved = front(values, costs, most=10**6)
    assert solved.exact
    for place in (len(solved.costs) // 4, len(solved.costs) // 2):
        found = minimum(values, [(costs, float(solved.costs[place]))])
        assert found is not None
        assert_allclose(sum(values[g][o] for g, o in enumerate(found)), solved.values[place], rtol=1e-6)
    thinned = front(values, costs, most=128)
    assert not thinned.exact
    assert len(thinned.values) <= 128
    assert (np.diff(thinned.costs) > 0).all()


# -- gains


@settings(max_examples=60)
@given(st.integers(1, 3), st.integers(0, 10**6))
def test_gains_are_differences_of_hypervolumes(objectives: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    losses, candidates = rng.random((8, objectives)), rng.random((12, objectives)) * 1.2
    known = losses[non_dominated(losses)]
    point = reference(known)
    before = hypervolume(known, point)
    for candidate, gained in zip(candidates, gains(known, point, candidates), strict=True):
        assert_allclose(hypervolume(np.vstack([known, candidate]), point) - before, gained, atol=1e-12)
    behind = distances(known, candidates)
    extent = np.ptp(known, axis=0)
    moved = candidates - (behind[:, None] + 1e-9) * np.where(extent > 0, extent, 1.0)
    assert np.isfinite(behind).all()
    assert (distances(known, moved) <= 0).all()


# -- searches


def search(space: Space, losses, knowledge: Knowledge, evaluations: int, violation=None, seed=0):  # type: ignore[no-untyped-def]
    """The history of a search with batches of the strategy."""
    history, strategy = History(len(space.parameters), 2, space), Surrogate(space, 2, seed)
    strategy.knowledge = knowledge
    step = 0
    while len(history) < evaluations:
        codes = strategy.propose(history, 8, np.random.default_rng([0, step]))
        history.tell(codes, losses(codes), None if violation is None else violation(codes))
        step += 1
    return history


def wide_losses(codes: np.ndarray) -> np.ndarray:
    """Error and cost of 24 groups with 5 options: too many to enumerate."""
    noise = np.array([0.3, 0.08, 0.02, 0.005, 0.001])
    weight = 1.0 + np.arange(24) % 5
    error = (noise[codes] * weight).sum(axis=1)
    return np.stack([1.0 - np.exp(-error), codes.sum(axis=1).astype(float)], axis=1)


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(2, 5), st.integers(1, 2), st.integers(0, 10**6))
def test_candidates_are_promising_if_no_other_one_beats_them(groups: int, size: int, costs: int, seed: int) -> None:
    rng, space = np.random.default_rng(seed), chain(groups, size)
    tables = [[rng.integers(0, 4, size).astype(float) for _ in range(groups)] for _ in range(1 + costs)]

    def total(table: list[np.ndarray], codes: np.ndarray) -> np.ndarray:
        return sum(of_group[space.options(codes)[:, g]] for g, of_group in enumerate(table))

    strategy, codes = Surrogate(space, 1 + costs, 0), space.sample(20, rng)
    assert strategy.promising(codes).all()
    strategy.knowledge = Knowledge({1 + i: partial(total, table) for i, table in enumerate(tables[1:])})
    assert strategy.promising(codes).all()
    strategy.knowledge = replace(strategy.knowledge, noise=tables[0])
    points = np.stack([total(table, codes) for table in tables], axis=1).tolist()
    beaten = [any(all(map(le, o, p)) and o != p for o in points) for p in points]
    kept = strategy.promising(codes)
    assert not kept[beaten].any()
    # Of equal ones one is enough.
    assert {tuple(p) for p, k in zip(points, kept, strict=True) if k} == {
        tuple(p) for p, b in zip(points, beaten, strict=True) if not b
    }


def test_seeds_differ_where_nothing_is_drawn() -> None:
    space = chain(24, 5)
    noise = [np.array([0.3, 0.08, 0.02, 0.005, 0.001]) * (1.0 + g % 5) for g in range(24)]
    known = Knowledge(costs={1: lambda codes: codes.sum(axis=1).astype(float)}, noise=noise)
    runs = [search(space, wide_losses, known, 48, seed=seed).codes for seed in (0, 0, 1, 2)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert len({run.tobytes() for run in runs}) == 3


@pytest.mark.long
def test_a_large_space_is_solved_in_few_evaluations() -> None:
    space = chain(24, 5)
    noise = [np.array([0.3, 0.08, 0.02, 0.005, 0.001]) * (1.0 + g % 5) for g in range(24)]
    exact = front([n.copy() for n in noise], [np.arange(5.0)] * 24)
    truth = np.stack([1.0 - np.exp(-exact.values), exact.costs], axis=1)
    point = reference(truth)
    known = Knowledge(costs={1: lambda codes: codes.sum(axis=1).astype(float)})
    blind = search(space, wide_losses, known, 120)
    informed = search(space, wide_losses, Knowledge(costs=known.costs, noise=noise), 60)
    assert hypervolume(informed.losses, point) > 0.95 * hypervolume(truth, point)
    assert hypervolume(blind.losses, point) > 0.75 * hypervolume(truth, point)


def test_candidates_that_violate_a_known_constraint_are_not_proposed() -> None:
    space = chain(24, 5)

    def violation(codes: np.ndarray) -> np.ndarray:
        return np.maximum(0.0, codes.sum(axis=1) / 60.0 - 1.0)

    known = Knowledge(costs={1: lambda codes: codes.sum(axis=1).astype(float)}, violation=violation)
    history = search(space, wide_losses, known, 64, violation)
    assert not (history.violation[24:] > 0).any()


def test_evaluations_are_not_spent_on_what_is_better_than_sufficient() -> None:
    space = chain(24, 5)
    known = Knowledge(costs={1: lambda codes: codes.sum(axis=1).astype(float)})
    limit = Knowledge(costs=known.costs, sufficient=np.array([0.4, -np.inf]))
    free, bounded = search(space, wide_losses, known, 96), search(space, wide_losses, limit, 96)
    # Far better than sufficient, after the candidates before there is a model.
    spent = [int((history.losses[24:, 0] < 0.3).sum()) for history in (free, bounded)]
    assert spent[1] < spent[0] / 3
    # The cheapest sufficient candidate is no dearer.
    cheapest = [history.losses[history.losses[:, 0] <= 0.4, 1].min() for history in (free, bounded)]
    assert cheapest[1] <= cheapest[0]


# -- the end of a search


def few_losses(codes: np.ndarray) -> np.ndarray:
    """Error and cost of five groups with four options, 1,024 candidates, with an interaction of two groups."""
    error = (np.array([0.2, 0.05, 0.01, 0.0])[codes] * (1.0 + np.arange(5))).sum(axis=1)
    error += 0.05 * ((codes[:, 0] == 0) & (codes[:, 4] < 2))
    return np.stack([error, codes.sum(axis=1).astype(float)], axis=1)


def ended(resolution: float, most: int, **settings: object) -> tuple[History, str, list[np.ndarray]]:
    """(the history of a search that asks its strategy whether it is enough, the answer, what was measured)"""
    space, measured = chain(5, 4), list[np.ndarray]()

    def resolved(codes: np.ndarray) -> Resolution:
        measured.append(codes)
        return Resolution(np.array([resolution, 0.0]), f"{resolution} of error")

    known = Knowledge(costs={1: lambda codes: codes.sum(axis=1).astype(float)}, resolution=resolved)
    history, why, step = History(5, 2, space), "", 0
    while len(history) < most and not why:
        strategy = Surrogate(space, 2, 0, SurrogateSettings(**settings))  # a new one: it keeps nothing
        strategy.knowledge = known
        codes = history.fresh(strategy.propose(history, 8, np.random.default_rng([0, step])))
        history.tell(codes, few_losses(codes))
        why, step = strategy.enough(history, 8), step + 1
    return history, why, measured


def test_a_search_ends_where_nothing_is_left_that_the_samples_tell_apart() -> None:
    history, why, measured = ended(0.05, 300, stop_early=True)
    assert "a chance of 10 % to beat the front by 0.05 of error" in why
    assert 16 + 16 <= len(history) < 150
    # It is true: no candidate is better by more than that at no more cost.
    truth = few_losses(chain(5, 4).numbered(0, 1024))
    for error, cost in truth:
        assert history.losses[history.losses[:, 1] <= cost][:, 0].min() <= error + 0.05
    # The resolution is measured on the front, at few lengths of the history.
    assert len({codes.tobytes() for codes in measured}) <= 4
    front = {code.tobytes() for code in history.codes[non_dominated(history.losses)]}
    assert len(front & {code.tobytes() for code in measured[-1]}) > len(measured[-1]) / 2


def test_what_the_samples_tell_apart_decides_when_a_search_ends() -> None:
    coarse, fine = ended(0.05, 300, stop_early=True)[0], ended(0.002, 300, stop_early=True)[0]
    assert len(coarse) < len(fine)
    np.testing.assert_array_equal(coarse.codes, fine.codes[: len(coarse)])
    without, why, measured = ended(0.05, len(coarse) + 8)
    assert (why, measured) == ("", [])
    np.testing.assert_array_equal(without.codes[: len(coarse)], coarse.codes)


@pytest.mark.parametrize("noise", [None, [np.array([0.3, 0.08, 0.02, 0.005, 0.001])] * 24])
@pytest.mark.parametrize("without", ["an option", "the first options", "all"])
def test_candidates_whose_cost_has_no_value_are_not_proposed(without: str, noise: list[np.ndarray] | None) -> None:
    """Such as the size of a program that cannot be written: they would fail."""
    space = chain(24, 5)

    def cost(codes: np.ndarray) -> np.ndarray:
        missing = {
            "an option": codes[:, 3] == 2,
            "the first options": (codes == 0).all(axis=1),
            "all": codes[:, 0] >= 0,
        }
        return np.where(missing[without], np.nan, codes.sum(axis=1))

    def losses(codes: np.ndarray) -> np.ndarray:
        both = wide_losses(codes)
        return np.where(np.isnan(cost(codes))[:, None], np.nan, np.stack([both[:, 0], cost(codes)], axis=1))

    history = search(space, losses, Knowledge(costs={1: cost}, noise=noise), 64)
    failed = np.isnan(history.losses).any(axis=1)
    assert len(history) >= 64
    assert failed.all() if without == "all" else not failed[24:].any()


@given(st.integers(2, 5), st.integers(2, 4), st.integers(0, 10**6))
def test_the_exact_front_leaves_out_options_without_a_cost(groups: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values, costs = (list(rng.integers(0, 9, (groups, size)).astype(float)) for _ in range(2))
    for of_group in costs:
        of_group[rng.random(size) < 0.3] = np.nan
    every = np.array(list(itertools.product(range(size), repeat=groups)))
    sums = np.stack([sum(t[every[:, g]] for g, t in enumerate(table)) for table in (costs, values)], axis=1)
    best = {tuple(row) for row in sums[non_dominated(sums)].tolist()}
    found = front(values, costs)
    assert set(zip(found.costs.tolist(), found.values.tolist(), strict=True)) == best
