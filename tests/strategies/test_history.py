"""What a strategy knows: with numbers for keys, with whole codes for keys, and with nothing but keys."""

import numpy as np
import pytest

from bitfront.spaces.base import Branch, Choice, Group, Space
from bitfront.strategies.base import History, unseen_neighbours
from bitfront.testing.strategies import toy_space

SMALL = toy_space(2, 3)
# More than 2⁶² candidates: several words per key.
LARGE = toy_space(30, 4)


def histories(space):
    width = len(space.parameters)
    return [History(width, 2), History(width, 2, space), History(width, 2, space, forgets=True)]


@pytest.mark.parametrize("space", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("kind", range(3))
def test_candidates_have_the_rows_they_were_added_at(space, kind):
    history, rng = histories(space)[kind], np.random.default_rng(0)
    codes = history.fresh(np.concatenate([space.sample(40, rng), space.numbered(5, 90)]))
    rng.shuffle(codes)
    known = codes[: len(codes) // 2]
    losses = rng.random((len(known), 2))
    for part, part_losses in zip(np.array_split(known, 3), np.array_split(losses, 3), strict=True):
        history.tell(part, part_losses)
    assert len(history) == len(known)
    assert history.rows(codes).tolist() == [*range(len(known)), *[-1] * (len(codes) - len(known))]
    assert (history.row(codes[1]), history.row(codes[-1])) == (1, None)
    assert np.array_equal(history.fresh(np.concatenate([codes, codes])), codes[len(known) :])
    if kind < 2:
        assert np.array_equal(history.codes, known)
        assert np.array_equal(history.losses, losses)


@pytest.mark.parametrize("kind", range(3))
def test_a_candidate_is_added_once(kind):
    history = histories(SMALL)[kind]
    history.tell(SMALL.numbered(3, 6), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="is in the history already"):
        history.tell(SMALL.numbered(5, 8), np.zeros((3, 2)))


def test_the_only_candidate_of_a_space_is_known_once_added():
    space = Space([Group("site", (Branch("b", (Choice("c", ("8",)),)),))])
    for history in histories(space):
        only = space.numbered(0, 1)
        assert np.array_equal(history.fresh(np.concatenate([only, only])), only)
        history.tell(only, np.zeros((1, 2)))
        assert history.row(only[0]) == 0
        assert len(history.fresh(only)) == 0


def test_the_last_unknown_candidates_are_neighbours_without_a_front():
    history, rng = histories(SMALL)[2], np.random.default_rng(0)
    everything = SMALL.numbered(0, SMALL.size)
    left = np.isin(np.arange(SMALL.size), [13, 57, 99])
    history.tell(everything[~left], np.zeros((97, 2)))
    neighbours = unseen_neighbours(SMALL, history, np.zeros(0, dtype=np.int64), 5, rng)
    assert sorted(neighbours.tolist()) == sorted(everything[left].tolist())
    two = unseen_neighbours(SMALL, history, np.zeros(0, dtype=np.int64), 2, rng)
    assert len(np.unique(two, axis=0)) == 2
    assert {tuple(c) for c in two} < {tuple(c) for c in everything[left]}
