"""The index of known candidates, against a dictionary."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitfront.spaces.index import SHORTEST_RANGE, Index

#: Parts: each is a range of consecutive keys, or the same keys shuffled.
parts = st.lists(st.tuples(st.integers(-50, 600), st.integers(0, 3 * SHORTEST_RANGE), st.booleans()), max_size=8)


@given(parts, st.integers(1, 3), st.randoms(use_true_random=False))
def test_keys_are_in_the_rows_of_their_order(drawn, width, random):
    index, rows = Index(width), {}
    for start, length, shuffled in drawn:
        numbers = [n for n in range(start, start + length) if n not in rows]
        if shuffled:
            random.shuffle(numbers)
        keys = np.array([[n % 3 if width > 1 else n] * (width - 1) + [n] for n in numbers], dtype=np.int64)
        index.add(keys.reshape(-1, width))
        rows |= {n: len(rows) + i for i, n in enumerate(numbers)}
    wanted = list(range(-60, 1000))
    keys = np.array([[n % 3] * (width - 1) + [n] for n in wanted], dtype=np.int64)
    assert index.find(keys).tolist() == [rows.get(n, -1) for n in wanted]
    assert len(index) == len(rows)


@pytest.mark.parametrize("numbers", [[5, 5], [1, 2, 3, 1], [*range(70), 3], [100]])
def test_a_key_is_added_once(numbers):
    index = Index(1)
    index.add(np.arange(100, 300)[:, None])
    with pytest.raises(ValueError):
        index.add(np.array(numbers)[:, None])


def test_consecutive_numbers_take_no_memory_and_others_little():
    index = Index(1)
    for start in range(0, 100_000, 10_000):
        index.add(np.arange(start, start + 10_000)[:, None])
    assert index.nbytes < 10_000
    index.add(np.random.default_rng(0).permutation(100_000)[:, None] * 1_000_003 + 200_000)
    assert index.nbytes < 100 * 100_000
