"""Strategies: the conformance suite, and what each is good for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitfront.errors import UnknownNameError
from bitfront.strategies import STRATEGIES
from bitfront.strategies.base import History, Strategy, unseen_neighbours
from bitfront.strategies.brute_force import BruteForce
from bitfront.strategies.learned_bits import LearnedBits
from bitfront.strategies.optuna import MEANINGS, SAMPLERS, OptunaSettings, OptunaStrategy, sampler_name
from bitfront.testing.strategies import check_strategy, toy_losses, toy_space


def optuna_with(sampler):
    return lambda space, objectives, seed: OptunaStrategy(space, objectives, seed, OptunaSettings(sampler=sampler))


@pytest.mark.sampled(2)
@pytest.mark.slow
@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "gp"])
def test_optunas_samplers_conform(sampler):
    # Twelve calls of four: TPE starts to model after ten trials, NSGA-II after a generation of 24.
    check_strategy(optuna_with(sampler), calls=12)


@pytest.mark.long
@pytest.mark.slow
def test_gp_conforms():
    check_strategy(optuna_with("gp"), calls=2, n=1)


def test_brute_force_conforms():
    check_strategy(BruteForce, seeded=False, stateless=True)


def test_learned_bits_conforms():
    check_strategy(LearnedBits, seeded=False, stateless=True)


def test_every_registered_strategy_is_checked_here():
    # evolution and surrogate: in files of their own
    assert set(STRATEGIES.names()) == {"brute_force", "evolution", "learned_bits", "optuna", "surrogate"}
    assert set(MEANINGS) == {*SAMPLERS, "brute_force"}


class Global(Strategy):
    """Draws from NumPy's global generator."""

    def propose(self, history, n, rng):
        return self.space.canonical(np.random.randint(0, 2, (n, len(self.space.parameters))))


class Careless(Strategy):
    """Proposes codes that are not canonical."""

    def propose(self, history, n, rng):
        return rng.integers(0, self.space.cardinalities, (n, len(self.space.parameters)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Global, "NumPy's global generator"),
        (Careless, "not canonical"),
        (BruteForce, "another seed gives the same proposals"),
    ],
)
def test_the_conformance_suite_notices(make, message):
    with pytest.raises(AssertionError, match=message):
        check_strategy(make)


def test_the_conformance_suite_notices_state_where_none_is_allowed():
    check_strategy(optuna_with("random"), calls=3)
    with pytest.raises(AssertionError, match="a new strategy, given the same history, proposes other candidates"):
        check_strategy(optuna_with("random"), calls=3, stateless=True)


# --- brute force -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(1, 200), st.integers(0, 40))
def test_brute_force_proposes_every_candidate_once_whatever_comes_from_elsewhere(seed, n, foreign):
    space, rng = toy_space(2, 3), np.random.default_rng(seed)
    history, strategy, proposals = History(len(space.parameters), 1), BruteForce(space, 1, 0), []

    def tell(codes):
        new = np.array(list({c.tobytes(): c for c in codes if history.row(c) is None}.values()))
        if len(new):
            history.tell(new, toy_losses(space, new, 1))

    while True:
        if foreign:
            tell(space.sample(int(rng.integers(0, foreign + 1)), rng))
        proposed = strategy.propose(history, n, rng)
        assert all(history.row(c) is None for c in proposed)
        proposals += [c.tobytes() for c in proposed]
        if not len(proposed):
            break
        # A part of a batch may be left untold, as when time is up.
        tell(proposed[: int(rng.integers(1, len(proposed) + 1))])
    assert {c.tobytes() for c in history.codes} == {c.tobytes() for c in space.numbered(0, space.size)}


def test_brute_force_goes_through_the_space_in_its_order_and_leaves_out_what_is_known():
    space = toy_space()
    history = History(len(space.parameters), 1)
    everything = space.numbered(0, space.size)
    history.tell(everything[2:5], toy_losses(space, everything[2:5], 1))
    proposed = BruteForce(space, 1, 0).propose(history, 10, np.random.default_rng(0))
    assert np.array_equal(proposed, everything[[0, 1, 5, 6, 7, 8, 9, 10, 11, 12]])


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("official", "spellings"),
    [
        ("brute_force", ["brute", "brute-force", "bruteforce", "brute_force", "BruteForce", "BRUTE FORCE"]),
        ("tpe", ["TPE", "tpe", "TPESampler", "tpe_sampler"]),
        ("nsgaii", ["nsga-ii", "NSGAII", "nsga_ii", "NSGAIISampler"]),
        ("nsgaiii", ["nsga-iii", "NSGA_III"]),
        ("random", ["Random", "RandomSampler"]),
        ("qmc", ["QMC"]),
        ("gp", ["GP"]),
    ],
)
def test_names_of_samplers_are_forgiving(official, spellings):
    assert {sampler_name(s) for s in [official, *spellings]} == {official}


def test_an_unknown_sampler_is_answered_with_the_nearest_and_all():
    with pytest.raises(
        UnknownNameError, match=r"no sampler 'nsgai'; allowed: tpe, .*brute_force\. Did you mean 'nsgaii'"
    ):
        OptunaSettings(sampler="nsgai")
    # The strategy that wraps the samplers is none of them.
    with pytest.raises(UnknownNameError, match="no sampler 'optuna'"):
        sampler_name("optuna")


# --- what they are for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["tpe", "nsgaii"])
def test_results_guide_what_is_proposed(sampler):
    """Where there is one best corner, later proposals are nearer to it than a random draw is."""
    space, history = toy_space(4, 6), History(12, 1)
    strategy = OptunaStrategy(space, 1, 0, OptunaSettings(sampler=sampler))
    rng, means = np.random.default_rng(0), []
    while len(history) < 100:
        codes = strategy.propose(history, 8, rng)
        codes = np.array(list({c.tobytes(): c for c in codes if history.row(c) is None}.values()))
        if len(codes):
            losses = space.options(codes).sum(axis=1, keepdims=True).astype(float)
            history.tell(codes, losses)
            means.append(losses.mean())
    chance = space.options(space.sample(2000, rng)).sum(axis=1).mean()
    assert np.mean(means[-5:]) < 0.85 * chance


# --- history and neighbours ------------------------------------------------------------------------------------------


def test_a_history_grows_keeps_its_order_and_refuses_repeats():
    space = toy_space()
    history = History(len(space.parameters), 2)
    codes = space.numbered(0, 300)
    for start in range(0, 300, 37):
        block = codes[start : start + 37]
        history.tell(block, toy_losses(space, block, 2, failing=3))
    assert len(history) == 300
    assert np.array_equal(history.codes, codes)
    assert np.array_equal(history.losses, toy_losses(space, codes, 2, failing=3), equal_nan=True)
    assert [history.row(c) for c in codes] == list(range(300))
    assert history.row(space.numbered(300, 301)[0]) is None
    with pytest.raises(ValueError, match="is in the history already"):
        history.tell(codes[:1], np.zeros((1, 2)))


@pytest.mark.parametrize("known", [0, 5, 50, 620, 624])
def test_unseen_neighbours_are_unknown_and_distinct_as_long_as_any_are_left(known):
    space, rng = toy_space(2, 5), np.random.default_rng(1)  # 26 · 26 candidates
    everything = rng.permutation(space.numbered(0, space.size))
    history = History(len(space.parameters), 1)
    if known:
        history.tell(everything[:known], toy_losses(space, everything[:known], 1))
    front = np.array([0], dtype=np.int64)[: len(history)]
    neighbours = unseen_neighbours(space, history, front, 8, rng)
    assert len(neighbours) == min(8, space.size - known)
    assert len({c.tobytes() for c in neighbours}) == len(neighbours)
    assert all(history.row(c) is None for c in neighbours)
    if 0 < known < 100:
        options = space.options(neighbours)
        assert ((options != space.options(everything[:1])).sum(axis=1) == 1).all()


def test_unseen_neighbours_of_an_exhausted_space_are_none():
    for space in (toy_space(1, 2), toy_space(0)):
        history = History(len(space.parameters), 1)
        history.tell(space.numbered(0, space.size), toy_losses(space, space.numbered(0, space.size), 1))
        front = np.array([0], dtype=np.int64)
        assert unseen_neighbours(space, history, front, 4, np.random.default_rng(0)).shape == (0, len(space.parameters))
