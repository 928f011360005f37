"""Which choice mattered: against variances computed by hand, and what it says where it can say nothing."""

import numpy as np
import pytest

from bitfront.report.importance import active, importance
from bitfront.spaces.base import Branch, Choice, Group, Space
from synthetic_runs import full_grid


def product(*counts):
    return Space(
        [Group(f"g{i}", (Branch("f", (Choice("w", tuple(map(str, range(n)))),)),)) for i, n in enumerate(counts)]
    )


def grid(space):
    return space.numbered(0, space.size)


def by_hand(codes, values, column):
    """Sobol's first-order index on a full grid: variance of the conditional means over the variance."""
    means = np.array([values[codes[:, column] == v].mean() for v in np.unique(codes[:, column])])
    return means.var() / values.var()


def test_on_a_full_grid_the_shares_are_the_variances_of_the_options_means():
    space = product(2, 3, 4)
    codes = grid(space)
    values = np.random.default_rng(0).normal(size=len(codes)) + codes[:, 1] * 3 + codes[:, 0] * codes[:, 2]
    result = importance(space, "accuracy", codes, values)
    assert result.missing == ""
    for influence in result.parameters:
        column = [p.name for p in space.parameters].index(influence.parameter)
        assert influence.share == pytest.approx(by_hand(codes, values, column))
        for i, effect in enumerate(influence.effects):
            rows = codes[:, column] == i
            assert effect.mean == pytest.approx(values[rows].mean())
            assert effect.effect == pytest.approx(values[rows].mean() - values.mean())
            assert effect.trials == rows.sum()
    assert result.rest == pytest.approx(1 - sum(i.share for i in result.parameters))
    assert [i.share for i in result.parameters] == sorted((i.share for i in result.parameters), reverse=True)


def test_parameters_that_are_chosen_together_are_distinguished():
    """A sampler that likes (1, 1) and (0, 0): only the first does anything, though the second's means differ."""
    space = product(2, 2)
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2, 400)
    second = np.where(rng.random(400) < 0.9, first, 1 - first)
    codes = np.stack([first, second], axis=1)
    result = importance(space, "m", codes, first * 1.0)
    assert by_hand(codes, first * 1.0, 1) > 0.5
    assert [(i.parameter, round(i.share, 6)) for i in result.parameters] == [("g0/w", 1.0), ("g1/w", 0.0)]


def test_a_parameter_without_effect_elsewhere_counts_where_its_branch_is_taken():
    space = Space([Group("fc", (Branch("NA"), Branch("integer", (Choice("weight", ("2", "4", "8")),))))])
    codes = np.repeat(space.numbered(0, space.size), 5, axis=0)
    width = np.where(codes[:, 0] == 1, codes[:, 1], np.nan)
    values = np.where(np.isnan(width), 10.0, 0.6 + 0.1 * np.nan_to_num(width))
    result = {i.parameter: i for i in importance(space, "m", codes, values).parameters}
    assert active(space, 1, codes).sum() == 15
    assert [e.trials for e in result["fc/weight"].effects] == [5, 5, 5]
    assert [e.trials for e in result["fc/name"].effects] == [5, 15]
    assert [round(e.effect, 9) for e in result["fc/weight"].effects] == [-0.1, 0.0, 0.1]
    # Three of four candidates are integer; within them the width's variance is 0.02/3.
    between, within = 0.75 * 0.25 * (10 - 0.7) ** 2, 0.75 * 0.02 / 3
    assert result["fc/weight"].share == pytest.approx(within / (within + between))
    assert result["fc/name"].share == pytest.approx(between / (within + between))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([0.5, np.nan, np.inf, np.nan, np.nan, np.nan], "3 effects need 6 trials with accuracy, and there are 1"),
        ([0.5] * 12, "accuracy is the same for all trials"),
    ],
)
def test_where_nothing_can_be_said_it_says_why(values, why):
    space = product(2, 3)
    codes = np.resize(grid(space), (len(values), 2))
    result = importance(space, "accuracy", codes, np.array(values))
    assert (result.parameters, result.missing) == ((), why)


def test_an_option_that_no_trial_took_has_no_effect_and_does_not_change_those_of_others():
    """Of the second parameter's options, constraints leave two; of the third's, one."""
    space, smaller = product(2, 3, 2), product(2, 2)
    codes = grid(space)
    codes = codes[(codes[:, 1] < 2) & (codes[:, 2] == 1)].repeat(3, axis=0)
    values = codes[:, 0] * 2.0 + codes[:, 1]
    result = {i.parameter: i for i in importance(space, "m", codes, values).parameters}
    expected = {i.parameter: i for i in importance(smaller, "m", codes[:, :2], values).parameters}
    for name, influence in expected.items():
        assert result[name].share == pytest.approx(influence.share)
        assert [e.mean for e in result[name].effects] == pytest.approx([e.mean for e in influence.effects])
    assert [(e.trials, e.mean) for e in result["g2/w"].effects] == [(12, pytest.approx(1.5))]
    assert result["g2/w"].share == pytest.approx(0)


def test_a_branch_that_no_trial_took_leaves_its_part_of_the_space_to_the_others():
    widths = (Choice("weight", ("2", "4")),)
    space = Space([Group("fc", (Branch("NA"), Branch("integer", widths), Branch("affine", widths)))])
    smaller = Space([Group("fc", (Branch("NA"), Branch("integer", widths)))])
    codes = smaller.numbered(0, smaller.size).repeat(5, axis=0)
    values = np.where(codes[:, 0] == 1, 0.5 + codes[:, 1], 2.0)
    longer = np.hstack([codes, np.zeros((len(codes), 1), dtype=np.int64)])
    found = sorted(i.share for i in importance(space, "m", longer, values).parameters)
    expected = sorted(i.share for i in importance(smaller, "m", codes, values).parameters)
    assert len(expected) == 2
    assert found == pytest.approx(expected)


def test_nothing_to_choose():
    assert (
        importance(product(1), "m", np.zeros((3, 0), dtype=np.int64), np.ones(3)).missing
        == "there was nothing to choose"
    )


def test_many_trials_take_one_block_after_the_other():
    space = product(3, 3)
    codes = space.sample(40_000, np.random.default_rng(0))
    result = importance(space, "m", codes, codes[:, 0] * 2.0 + codes[:, 1])
    assert [(i.parameter, round(i.share, 9)) for i in result.parameters] == [("g0/w", 0.8), ("g1/w", 0.2)]


def test_the_grid_used_elsewhere_is_whole():
    assert full_grid().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
