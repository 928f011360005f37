"""Evolution: the contract, no repeats, no state, selection against its definition, and that it finds more than chance."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bitfront.pareto import hypervolume
from bitfront.spaces.base import Branch, Choice, Group, Space
from bitfront.strategies.base import History
from bitfront.strategies.elimination import quick_solve_with_determinant, solve, solve_with_determinant
from bitfront.strategies.evolution import Evolution, crowding, select
from bitfront.testing.strategies import check_strategy, toy_losses, toy_space
from properties import max_examples


def test_evolution_conforms():
    check_strategy(Evolution, stateless=True)
    check_strategy(Evolution, calls=10, n=16, stateless=True)


# --- spaces and histories to ask about ---------------------------------------------------------------------------------


def mixed_space(rng):
    """Groups with one or several branches, ordered and unordered choices, single alternatives here and there."""
    groups = []
    for g in range(int(rng.integers(1, 5))):
        branches = [
            Branch(
                f"format{b}",
                tuple(
                    Choice(f"operand{c}", tuple(map(str, range(int(rng.integers(1, 5))))), steps=bool(rng.integers(2)))
                    for c in range(int(rng.integers(0, 3)))
                ),
            )
            for b in range(int(rng.integers(1, 4)))
        ]
        groups.append(Group(f"site{g}", tuple(branches)))
    return Space(groups)


def losses_of(space, codes, objectives, failing):
    """Smooth, with many equal values, and failures."""
    options = space.options(codes)
    losses = np.stack([((options - 2 * k) ** 2).sum(axis=1) // (k + 1) for k in range(objectives)], axis=1).astype(
        float
    )
    if failing:
        losses[options.sum(axis=1) % 3 == 1] = np.nan
    return losses


def history_of(space, codes, objectives, failing=False):
    history = History(len(space.parameters), objectives, space)
    codes = history.fresh(codes)
    history.tell(codes, losses_of(space, codes, objectives, failing))
    return history


cases = {
    "seed": st.integers(0, 2**32),
    "known": st.integers(0, 120),
    "n": st.integers(1, 140),
    "objectives": st.integers(1, 4),
    "failing": st.booleans(),
}


@given(**cases)
@max_examples(200)
def test_it_proposes_only_what_is_new_canonical_and_in_the_space_until_nothing_is_left(
    seed, known, n, objectives, failing
):
    rng = np.random.default_rng(seed)
    space = mixed_space(rng)
    history = history_of(space, space.sample(known, rng), objectives, failing)
    proposed = Evolution(space, objectives, 0).propose(history, n, np.random.default_rng(seed))
    space.check(proposed)
    assert proposed.dtype == np.int64
    assert np.array_equal(space.canonical(proposed), proposed)
    keys = {code.tobytes() for code in proposed}
    assert len(keys) == len(proposed) <= n
    assert (history.rows(proposed) < 0).all()
    left = space.size - len(history)
    assert len(proposed) >= min(n, left, 8)


@given(**cases)
def test_it_is_a_function_of_its_arguments(seed, known, n, objectives, failing):
    rng = np.random.default_rng(seed)
    space = mixed_space(rng)
    codes, others = space.sample(known, rng), space.sample(50, rng)
    fresh = Evolution(space, objectives, 0)
    used = Evolution(space, objectives, 0)
    used.propose(history_of(space, others, objectives), 9, np.random.default_rng(1))
    asked = [
        strategy.propose(history_of(space, codes, objectives, failing), n, np.random.default_rng(seed))
        for strategy in (fresh, used, used)
    ]
    assert np.array_equal(asked[0], asked[1])
    assert np.array_equal(asked[0], asked[2])


@pytest.mark.long
def test_a_search_that_is_interrupted_anywhere_goes_on_as_if_it_had_not_been():
    space = toy_space(4, 4)

    def go_on(history, step, until):
        strategy = Evolution(space, 2, 3)
        for i in range(step, until):
            codes = strategy.propose(history, 16, np.random.default_rng([3, i]))
            history.tell(codes, toy_losses(space, codes, 2, failing=5))
        return history

    whole = go_on(History(len(space.parameters), 2, space), 0, 12)
    for stop in range(12):
        part = go_on(History(len(space.parameters), 2, space), 0, stop)
        assert np.array_equal(go_on(part, stop, 12).codes, whole.codes)


@pytest.mark.sampled(2)
@pytest.mark.slow
@pytest.mark.parametrize("space", [toy_space(1, 2), toy_space(2, 4), toy_space(3, 4)], ids=["5", "289", "4913"])
def test_it_comes_to_the_end_of_a_space(space):
    """Every candidate once, and then nothing."""
    history, strategy, calls = History(len(space.parameters), 2, space), Evolution(space, 2, 0), 0
    while len(codes := strategy.propose(history, 128, np.random.default_rng(calls))):
        history.tell(codes, toy_losses(space, codes, 2))
        calls += 1
    everything = space.numbered(0, space.size)
    assert {c.tobytes() for c in history.codes} == {c.tobytes() for c in everything}


def test_a_space_of_one_parameter_and_one_of_none():
    one = Space([Group("site", (Branch("integer", (Choice("weight", tuple(map(str, range(40)))),)),))])
    history = history_of(one, one.numbered(0, 39), 2)
    assert Evolution(one, 2, 0).propose(history, 8, np.random.default_rng(0)).tolist() == [[39]]
    none = Space([])
    assert Evolution(none, 1, 0).propose(History(0, 1), 4, np.random.default_rng(0)).shape == (1, 0)


def test_a_space_beyond_64_bits():
    space = toy_space(40, 8)
    assert space.size > 2**64
    history = history_of(space, space.sample(60, np.random.default_rng(0)), 2)
    proposed = Evolution(space, 2, 0).propose(history, 8, np.random.default_rng(0))
    space.check(proposed)
    assert np.array_equal(space.canonical(proposed), proposed)
    assert np.array_equal(history.fresh(proposed), proposed)
    assert len(np.unique(proposed, axis=0)) == 8


# --- selection ---------------------------------------------------------------------------------------------------------


def dominates(a, b):
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def ranks_by_definition(losses):
    """Row → number of its front, by peeling (Deb et al. 2002), of those that did not fail."""
    left = {i for i, row in enumerate(losses) if not np.isnan(row).any()}
    ranks, number = {}, 0
    while left:
        front = {i for i in left if not any(dominates(losses[j], losses[i]) for j in left)}
        ranks |= dict.fromkeys(front, number)
        left, number = left - front, number + 1
    return ranks


def crowding_by_definition(losses):
    distance = [0.0] * len(losses)
    for k in range(losses.shape[1]):
        order = sorted(range(len(losses)), key=lambda i: losses[i, k])
        extent = losses[order[-1], k] - losses[order[0], k] or 1.0
        for place, i in enumerate(order):
            inside = 0 < place < len(order) - 1
            gap = (losses[order[place + 1], k] - losses[order[place - 1], k]) / extent if inside else np.inf
            distance[i] += gap
    return distance


@given(st.integers(1, 4), st.integers(0, 30), st.integers(1, 40), st.data())
def test_selection_is_by_fronts_and_then_by_crowding(objectives, count, n, data):
    values = st.one_of(st.integers(0, 6).map(float), st.just(float("nan")))
    losses = data.draw(arrays(np.float64, (count, objectives), elements=values))
    rows, ranks = select(losses, n)
    expected = ranks_by_definition(losses)
    assert len(set(rows.tolist())) == len(rows) == min(n, len(expected))
    assert ranks.tolist() == [expected[i] for i in rows.tolist()]
    # None of those left out is on an earlier front than one of those taken.
    assert sorted(expected.values())[: len(rows)] == sorted(ranks.tolist())
    everything, _ = select(losses, max(1, count))
    assert np.array_equal(everything[: len(rows)], rows)
    if objectives > 1:
        for number in set(ranks.tolist()):
            front = [i for i in sorted(expected) if expected[i] == number]
            front = sorted(front, key=lambda i: tuple(losses[i]))  # stable, as equal values share one gap
            distance = dict(zip(front, crowding_by_definition(losses[front]), strict=True))
            taken = [distance[i] for i in rows[ranks == number].tolist()]
            assert taken == sorted(taken, reverse=True)


@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(1, 4))
def test_crowding_is_the_sum_of_the_gaps_to_both_neighbours(seed, count, objectives):
    losses = np.random.default_rng(seed).integers(0, 10, (count, objectives)).astype(float)
    assert np.allclose(crowding(losses), crowding_by_definition(losses))


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 3))
def test_solve_solves(seed, size, columns):
    rng = np.random.default_rng(seed)
    root, right = rng.normal(size=(size, size)), rng.normal(size=(size, columns))
    matrix = root @ root.T + np.eye(size)
    before = matrix.copy(), right.copy()
    assert np.allclose(solve(matrix, right), np.linalg.solve(matrix, right))
    logarithm = np.log(np.linalg.eigvalsh(matrix)).sum()
    for solver in (solve_with_determinant, quick_solve_with_determinant):
        solution, determinant = solver(matrix, right)
        assert np.allclose(matrix @ solution, right)
        assert determinant == pytest.approx(logarithm, rel=1e-9, abs=1e-9)
        assert np.isnan(solver(-np.eye(1), np.eye(1))[1]), "not positive definite"
    assert np.array_equal(matrix, before[0])
    assert np.array_equal(right, before[1])


# --- what it is for ----------------------------------------------------------------------------------------------------


def rate_distortion(objectives):
    """Twelve widths of {2, 3, 4, 6, 8} bits; noise against cost, or their sum, or also the widest layer."""
    bits = np.array([2.0, 3.0, 4.0, 6.0, 8.0])
    choice = Choice("weight", ("2", "3", "4", "6", "8"))
    space = Space([Group(f"layer{i}", (Branch("integer", (choice,)),)) for i in range(12)])
    rng = np.random.default_rng(5)
    sensitivity, share = np.exp(rng.normal(0, 1, 12)), rng.dirichlet(np.ones(12))

    def losses(codes):
        chosen = bits[codes]
        noise, cost = 1 - np.exp(-(4.0**-chosen) @ sensitivity), chosen @ share / 8
        columns = {1: [noise + cost], 2: [noise, cost], 3: [noise, cost, chosen.max(axis=1) / 8]}[objectives]
        return np.stack(columns, axis=1)

    return space, losses


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_it_finds_more_than_chance(objectives):
    space, losses = rate_distortion(objectives)
    reference = np.full(objectives, 1.2)
    for seed in range(3):
        history, strategy = History(12, objectives, space), Evolution(space, objectives, seed)
        while len(history) < 120:
            codes = strategy.propose(history, 16, np.random.default_rng([seed, len(history)]))
            history.tell(codes, losses(codes))
        chance = losses(space.sample(480, np.random.default_rng(seed)))
        assert hypervolume(history.losses, reference) > hypervolume(chance, reference)


def test_it_keeps_away_from_what_fails():
    space, losses = rate_distortion(2)
    history, strategy = History(12, 2, space), Evolution(space, 2, 0)
    while len(history) < 160:
        codes = strategy.propose(history, 16, np.random.default_rng(len(history)))
        values = losses(codes)
        values[codes[:, 0] < 2] = np.nan
        history.tell(codes, values)
    failed = np.isnan(history.losses).any(axis=1)
    assert failed[-80:].mean() < 0.5 * failed[:16].mean()
