"""The front and its hypervolume against references by definition."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bitfront import pareto as fronts
from bitfront.engine.planning.objectives import choose
from bitfront.errors import ConfigError
from bitfront.metrics.base import Metric
from bitfront.objectives import Objective, Objectives
from bitfront.pareto import Front, hypervolume, non_dominated, non_dominated_sorted

# Few values, so that ties and equal rows are common.
value = st.sampled_from([0.0, 1.0, 2.0, 3.0, 0.5, -1.0, np.nan, np.inf])
losses = st.integers(1, 4).flatmap(
    lambda m: arrays(np.float64, st.tuples(st.integers(0, 14), st.just(m)), elements=value)
)


def beats(a, b):
    return all(a <= b) and any(a < b)


@given(losses)
@example(np.zeros((0, 2)))
@example(np.array([[1.0, 1.0], [1.0, 1.0], [np.nan, 0.0]]))
def test_non_dominated_rows_are_those_nobody_beats(table):
    whole = [i for i, row in enumerate(table) if not np.isnan(row).any()]
    expected = [i for i in whole if not any(beats(table[j], table[i]) for j in whole)]
    front = non_dominated(table)
    assert sorted(front) == expected
    # Sorted by the objectives, equal rows by their place.
    keys = [(*table[i], i) for i in front]
    assert keys == sorted(keys)


@given(losses)
@example(np.array([[0.0, np.inf], [0.0, np.inf], [1.0, np.inf]]))
def test_of_sorted_rows_the_same_survive(table):
    whole = table[~np.isnan(table).any(axis=1)]
    ordered = whole[np.lexsort(whole.T[::-1])]
    keep = non_dominated_sorted(ordered)
    assert keep.dtype == bool
    assert np.flatnonzero(keep).tolist() == [
        i for i, row in enumerate(ordered) if not any(beats(other, row) for other in ordered)
    ]


@given(losses, st.randoms(use_true_random=False))
def test_the_front_does_not_depend_on_the_order_of_its_rows(table, random):
    order = list(range(len(table)))
    random.shuffle(order)
    assert sorted(map(tuple, table[non_dominated(table)])) == sorted(
        map(tuple, table[order][non_dominated(table[order])])
    )


@given(losses, st.lists(st.integers(0, 14), max_size=4))
@example(np.array([[0.0, np.inf], [1.0, np.inf]]), [1])
def test_a_front_kept_as_it_comes_is_the_front_of_everything(table, cuts):
    front = Front(table.shape[1])
    for part in np.split(table, sorted(min(c, len(table)) for c in cuts)):
        front.add(part)
    whole = non_dominated(table)
    assert front.rows.tolist() == whole.tolist()
    np.testing.assert_array_equal(front.losses, table[whole])


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_the_front_of_many_is_that_of_any_part_of_them(objectives, monkeypatch):
    table = np.random.default_rng(0).integers(0, 40, (5000, objectives)).astype(float)
    whole = non_dominated(table)
    monkeypatch.setattr(fronts, "BLOCK", 64)
    assert non_dominated(table).tolist() == whole.tolist()


points = st.integers(1, 3).flatmap(
    lambda m: st.tuples(
        arrays(
            np.float64,
            st.tuples(st.integers(0, 6), st.just(m)),
            elements=st.sampled_from([0.0, 1.0, 1.5, 2.0, 4.0, 5.0, np.nan]),
        ),
        arrays(np.float64, st.just(m), elements=st.sampled_from([2.0, 4.0, 6.0])),
    )
)


@given(points)
@example((np.array([[1.0, 2.0], [2.0, 1.0]]), np.array([3.0, 3.0])))
def test_hypervolume_is_the_union_of_boxes(case):
    table, reference = case
    # Inclusion and exclusion over the boxes from each row to the reference: exact for such numbers.
    boxes = [row for row in table if not np.isnan(row).any() and (row < reference).all()]
    expected = 0.0
    for size in range(1, len(boxes) + 1):
        for subset in itertools.combinations(boxes, size):
            expected += (-1) ** (size + 1) * np.prod(reference - np.max(subset, axis=0))
    assert hypervolume(table, reference) == pytest.approx(expected, abs=1e-9)


# --- objectives ------------------------------------------------------------------------------------------------------

ACCURACY = Metric("accuracy", "", "maximize", "measured", "top-1")
SIZE = Metric("model_size", "bytes", "minimize", "modelled", "bytes")
VALUES = {"accuracy": np.array([0.5, np.nan, 0.75]), "model_size": np.array([10.0, 20.0, 40.0]), "other": np.zeros(3)}


def test_objectives_are_scaled_sorted_by_name_and_turned_towards_smaller():
    chosen = choose({"model_size": (2.0, None), "accuracy": (4.0, None)}, [SIZE, ACCURACY], None)
    assert chosen.names == ("accuracy", "model_size")
    assert chosen.directions == ("maximize", "minimize")
    np.testing.assert_array_equal(chosen.values(VALUES), [[2, 20], [np.nan, 40], [3, 80]])
    np.testing.assert_array_equal(chosen.losses(VALUES), [[-2, 20], [np.nan, 40], [-3, 80]])
    assert chosen.described() == [
        {"metric": "accuracy", "scale": 4.0, "direction": "maximize"},
        {"metric": "model_size", "scale": 2.0, "direction": "minimize"},
    ]


def test_the_direction_asked_for_wins_over_that_of_the_metric():
    assert choose({"accuracy": (1.0, "minimize")}, [ACCURACY], None).directions == ("minimize",)


@pytest.mark.parametrize(("summed", "sign"), [("maximize", -1), ("minimize", 1)])
def test_a_sum_of_scaled_metrics_is_one_objective(summed, sign):
    chosen = choose({"model_size": (-0.01, None), "accuracy": (1.0, None)}, [SIZE, ACCURACY], summed)
    assert chosen.directions == (summed,)
    np.testing.assert_allclose(chosen.losses(VALUES), sign * np.array([[0.4], [np.nan], [0.35]]))


def test_an_objective_nobody_measures_is_named():
    with pytest.raises(
        ConfigError,
        match=r"no configured runner produces this metric; allowed: accuracy, model_size. Did you mean 'accuracy'",
    ) as caught:
        choose({"acuracy": (1.0, None)}, [ACCURACY, SIZE], None)
    assert caught.value.key == ("search", "strategy", "metrics", "acuracy")
    with pytest.raises(ConfigError, match="no metric is an objective; name at least one of accuracy, model_size"):
        choose({}, [ACCURACY, SIZE], None)


def test_objectives_of_equal_parts_are_equal():
    part = Objective("accuracy", 1.0, "maximize")
    assert Objectives((part,)) == choose({"accuracy": (1.0, None)}, [ACCURACY], None)
