"""The arithmetic of spaces, on random products of groups, branches and choices."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitfront.spaces.base import Branch, Choice, Group, Space
from bitfront.testing.spaces import check_space


@st.composite
def groups(draw):
    def choice(i):
        labels = tuple(f"v{j}" for j in range(draw(st.integers(1, 4))))
        return Choice(f"c{i}", labels, draw(st.booleans()))

    def branch(i):
        return Branch(f"b{i}", tuple(choice(j) for j in range(draw(st.integers(0, 2)))))

    def group(i):
        return Group(f"g{i}", tuple(branch(j) for j in range(draw(st.integers(1, 3)))))

    return [group(i) for i in range(draw(st.integers(0, 4)))]


def spelled_out(groups):
    """Every candidate as nested tuples, by the definition: one branch per group, one entry per choice of it."""
    per_group = [
        [
            (b, picks)
            for b, branch in enumerate(group.branches)
            for picks in itertools.product(*(range(len(c.labels)) for c in branch.choices))
        ]
        for group in groups
    ]
    return list(itertools.product(*per_group))


@given(groups())
def test_spaces_conform(groups):
    check_space(Space(groups))


@given(groups())
def test_size_order_and_codes_are_those_of_the_definition(groups):
    space, expected = Space(groups), spelled_out(groups)
    assert space.size == len(expected)
    codes = space.numbered(0, min(space.size, 500))
    for row, candidate in zip(space.options(codes), expected, strict=False):
        assert tuple(g.picks(int(o)) for g, o in zip(groups, row, strict=True)) == candidate
    # By brute force over all rows of values: as many distinct canonical codes as candidates.
    total = int(np.prod(space.cardinalities, dtype=np.int64))
    if total <= 3000:
        raw = np.array(list(itertools.product(*(range(c) for c in space.cardinalities))), dtype=np.int64)
        canonical = space.canonical(raw.reshape(total, len(space.parameters)))
        assert len({c.tobytes() for c in canonical}) == space.size


@given(groups(), st.integers(0, 2**32))
def test_neighbours_differ_in_one_parameter_and_small_steps_come_first(groups, seed):
    space = Space(groups)
    code = space.sample(1, np.random.default_rng(seed))[0]
    effective = [
        p.branch is None or space.groups[p.group].picks(int(space.options(code[None])[0, p.group]))[0] == p.branch
        for p in space.parameters
    ]
    near = space.neighbours(code)
    assert len(near) == sum(int(c) - 1 for c, e in zip(space.cardinalities, effective, strict=True) if e)
    sizes = []
    for row in near:
        # The parameter that differs; a change of branch also resets the parameters of the old branch.
        (column,) = [i for i, e in enumerate(effective) if e and row[i] != code[i] and not resets(space, i, row, code)]
        sizes.append(abs(int(row[column] - code[column])) if space.parameters[column].steps else 1)
    far = [s > 1 for s in sizes]
    assert far == sorted(far)


def resets(space, column, row, code):
    """Whether `column` changed only because the branch it belongs to is not taken any more."""
    branch, group = space.parameters[column].branch, space.parameters[column].group
    return branch is not None and space.groups[group].picks(int(space.options(row[None])[0, group]))[0] != branch


def test_sampling_gives_every_candidate_the_same_chance():
    # Drawing parameter by parameter would give the lone float branch half of all draws.
    widths = Branch("integer", (Choice("weight", tuple("abcdefg")),))
    space = Space([Group("fc", (widths, Branch("NA")))])
    drawn = space.options(space.sample(8000, np.random.default_rng(0)))[:, 0]
    assert np.abs(np.bincount(drawn, minlength=8) / 8000 - 1 / 8).max() < 0.02


def test_parameters_are_named_after_the_group_and_only_where_there_is_a_choice():
    one = Branch("integer", (Choice("data_in", ("4", "8")), Choice("weight", ("4",))))
    two = Branch("affine", (Choice("weight", ("2", "4", "8")),))
    space = Space([Group("fc1", (one,)), Group("fc2", (one, Branch("NA"))), Group("fc3", (one, two))])
    assert [p.name for p in space.parameters] == [
        "fc1/data_in",
        "fc2/name",
        "fc2/data_in",
        "fc3/name",
        "fc3/integer/data_in",
        "fc3/affine/weight",
    ]
    assert space.size == 2 * 3 * 5


def test_a_wrong_code_is_refused_with_the_parameter_named():
    space = Space([Group("fc", (Branch("integer", (Choice("weight", ("4", "8")),)),))])
    with pytest.raises(ValueError, match=r"code \[2\]: fc/weight must be from 0 to 1"):
        space.check(np.array([[2]]))
    with pytest.raises(ValueError, match=r"codes have shape \(1, 2\); this space needs \(n, 1\)"):
        space.check(np.array([[0, 0]]))


def test_a_space_without_choices_has_one_candidate_with_an_empty_code():
    space = Space([Group("fc", (Branch("NA"),))])
    check_space(space)
    assert space.size == 1
    assert space.numbered(0, 1).shape == (1, 0)
    assert space.neighbours(space.numbered(0, 1)[0]).shape == (0, 0)


def test_sizes_are_exact_beyond_64_bits():
    group = Branch("integer", (Choice("weight", tuple(map(str, range(10)))),))
    space = Space([Group(f"g{i}", (group,)) for i in range(30)])
    assert space.size == 10**30
    check_space(space)


@pytest.mark.parametrize("sizes", [(3, 4), (7, 2, 5), (1,), ()])
def test_keys_of_a_small_space_are_its_numbers(sizes):
    space = Space(
        [Group(f"g{i}", (Branch("b", (Choice("c", tuple(map(str, range(n)))),)),)) for i, n in enumerate(sizes)]
    )
    assert space.keys(space.numbered(0, space.size)).tolist() == [[n] for n in range(space.size)]


def test_numbers_beyond_64_bits_run_on_over_every_edge():
    labels = tuple(map(str, range(1000)))
    space = Space([Group(f"g{i}", (Branch("b", (Choice("c", labels),)),)) for i in range(15)])
    for edge in (10**18, 7 * 10**18, 10**36, 3 * 10**36 + 10**18, space.size - 5):
        codes = space.numbered(edge - 5, edge + 5)
        assert [int("".join(f"{c:03}" for c in row)) for row in codes.tolist()] == list(
            range(edge - 5, min(edge + 5, space.size))
        )
        assert len(np.unique(space.keys(codes), axis=0)) == len(codes)
