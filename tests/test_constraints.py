"""Constraints in plain words: what they mean, and what is refused."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bitfront as bf
from bitfront.constraints import Constraint, fulfilled, parse_constraint, total
from bitfront.errors import ConfigError


@dataclass(frozen=True)
class Known:
    name: str
    unit: str
    direction: str = "minimize"
    quality: bool = False
    share: bool = False


METRICS = {
    name: Known(name, unit, "maximize", quality=True, share=True) if name == "accuracy" else Known(name, unit)
    for name, unit in {
        "accuracy": "",
        "model_size": "bytes",
        "average_bitwidth": "bits",
        "latency": "ms",
        "latency_p90": "ms",
        "latency_per_sample": "ms",
        "energy": "mJ",
        "total_flops": "operations",
        "bops": "bit operations",
        "lut": "LUT",
    }.items()
}


@pytest.mark.parametrize(
    ("text", "metric", "comparison", "bound", "drop"),
    [
        ("model_size <= 2 kB", "model_size", "<=", 2000, False),
        ("model_size<=2KiB", "model_size", "<=", 2048, False),
        ("model_size < 1.5 MB", "model_size", "<", 1.5e6, False),
        ("model_size <= 700", "model_size", "<=", 700, False),
        ("accuracy_drop <= 1 %", "accuracy", "<=", 0.01, True),
        ("accuracy_drop <= 0.01", "accuracy", "<=", 0.01, True),
        ("accuracy >= 75%", "accuracy", ">=", 0.75, False),
        ("latency p90 <= 2 ms", "latency_p90", "<=", 2, False),
        ("latency <= 300 us", "latency", "<=", 0.3, False),
        ("latency per_sample <= 0.1 s", "latency_per_sample", "<=", 100, False),
        ("latency median <= 5", "latency", "<=", 5, False),
        ("energy <= 3 J", "energy", "<=", 3000, False),
        ("average_bitwidth <= 4 bits", "average_bitwidth", "<=", 4, False),
        ("total_flops <= 2 MFLOPs", "total_flops", "<=", 2e6, False),
        ("total_flops <= 2M", "total_flops", "<=", 2e6, False),
        ("bops <= 300 kBOPs", "bops", "<=", 3e5, False),
        ("bops <= 1_000", "bops", "<=", 1000, False),
        ("lut <= 5k", "lut", "<=", 5000, False),
        ("lut <= 5 kLUTs", "lut", "<=", 5000, False),
        ("lut <= 5000 LUT", "lut", "<=", 5000, False),
        ("accuracy >= 1", "accuracy", ">=", 1, False),
        ("accuracy_drop < 0.99", "accuracy", "<", 0.99, True),
    ],
)
def test_what_a_statement_means(text, metric, comparison, bound, drop):
    constraint = parse_constraint(text, METRICS)
    assert (constraint.metric, constraint.comparison, constraint.drop) == (metric, comparison, drop)
    assert constraint.bound == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_size", "cannot read the constraint 'model_size'; write it like"),
        ("model_size <= two kB", "cannot read"),
        ("modelsize <= 2 kB", "there is no metric 'modelsize' here; .*Did you mean 'model_size'"),
        ("model_size <= 2 kg", "'kg' is not a unit of this metric; allowed: B, kB"),
        ("latency <= 2 kB", "'kB' is not a unit of this metric; allowed: s, ms"),
        ("latency p95 <= 2 ms", "there is no metric 'latency_p95'"),
        ("loss_drop <= 1 %", "there is no 'loss_drop' here; allowed: accuracy_drop"),
        ("model_size_increase <= 1 %", "there is no 'model_size_increase' here; allowed: accuracy_drop"),
        ("total_flops <= 2 ms", "'ms' is not a unit"),
        ("lut <= 5 kB", "'kB' is not a unit of this metric; allowed: k, M, G, LUT"),
        ("lut <= 5,000", "cannot read the constraint 'lut <= 5,000'; .* without commas"),
        ("accuracy_drop <= 1", "accuracy is a share, of which 1 is all; .* 'accuracy_drop <= 1 %'"),
        ("accuracy >= 75", "accuracy is a share, of which 1 is all; .* 'accuracy >= 75 %'"),
        ("accuracy >= 101 %", "accuracy is a share, of which 1 is all$"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_constraint(text, METRICS)


def test_a_drop_is_in_points_of_the_float_models_accuracy():
    constraint = parse_constraint("accuracy_drop <= 1 %", METRICS).resolved({"accuracy": 0.77})
    assert (constraint.comparison, constraint.bound) == (">=", pytest.approx(0.76))
    # 0.77 - 0.76 is 0.010000000000000009 in floating point; one percent worse is allowed all the same.
    assert constraint.excess(np.array([0.76, 0.7599, np.nan])).tolist()[0] == 0
    assert constraint.excess(np.array([0.7599]))[0] > 0
    assert np.isnan(constraint.excess(np.array([np.nan]))[0])
    with pytest.raises(ConfigError, match="not known"):
        parse_constraint("accuracy_drop <= 1 %", METRICS).resolved({})


@given(
    st.sampled_from(["<=", "<", ">=", ">", "=="]),
    st.floats(-1e6, 1e6),
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20),
)
def test_excess_is_zero_exactly_where_the_comparison_holds(comparison, bound, values):
    constraint = Constraint("x", "x", comparison, bound)
    array = np.array(values)
    clear = np.abs(array - bound) > 1e-6 * max(1.0, abs(bound))
    holds = {
        "<=": array <= bound,
        "<": array < bound,
        ">=": array >= bound,
        ">": array > bound,
        "==": array == bound,
    }[comparison]
    assert ((constraint.excess(array) == 0) == holds)[clear].all()
    # Elsewhere it is the distance from the bound, as a part of it.
    with np.errstate(over="ignore"):  # of a bound such as 5e-324 anything is infinitely far
        far = np.abs(array - bound) / (abs(bound) or 1.0)
    assert constraint.excess(array)[clear & ~holds] == pytest.approx(far[clear & ~holds], rel=1e-9, abs=1e-12)
    # Equal counts as equal for <=, >= and ==, and not for the strict ones.
    assert (constraint.excess(np.array([bound]))[0] == 0) == (comparison in ("<=", ">=", "=="))


def test_a_candidate_must_fulfil_all_of_them_and_an_unknown_value_fulfils_none():
    both = [Constraint("a", "a", "<=", 1.0), Constraint("b", "b", ">=", 2.0)]
    values = {"a": np.array([0.5, 0.5, 2.0, np.nan]), "b": np.array([3.0, 1.0, 1.0, 3.0])}
    assert fulfilled(both, values).tolist() == [True, False, False, False]
    assert total(both, values).tolist() == [0.0, 0.5, 1.5, 0.0]


QUALITIES = {
    "mse": Known("mse", "", "minimize", quality=True),
    "r2": Known("r2", "", "maximize", quality=True, share=True),
    "psnr": Known("psnr", "dB", "maximize", quality=True),
}


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        # Of a metric that is no share, per cent are of the float model's value; without per cent they are its unit.
        ("mse_increase <= 2 %", 0.0509, 0.0511),
        ("mse_increase <= 0.01", 0.0599, 0.0601),
        ("mse_increase < 0", 0.0499, 0.05),
        ("r2_drop <= 2 %", 0.8801, 0.8799),
        ("psnr_drop <= 10 %", 27.01, 26.99),
        ("psnr_drop <= 1", 29.01, 28.99),
    ],
)
def test_every_quality_may_be_compared_with_the_float_model(text, good, bad):
    reference = {"mse": 0.05, "r2": 0.9, "psnr": 30.0}
    constraint = parse_constraint(text, QUALITIES).resolved(reference)
    assert (constraint.drop, constraint.increase, constraint.relative) == (False, False, False)
    assert (constraint.excess(np.array([good, bad])) == 0).tolist() == [True, False]


@pytest.mark.parametrize("text", ["mse_drop <= 2 %", "r2_increase <= 2 %"])
def test_a_change_for_the_better_is_no_constraint(text):
    with pytest.raises(ConfigError, match="allowed: mse_increase, r2_drop, psnr_drop"):
        parse_constraint(text, QUALITIES)


def test_a_search_reads_them_before_its_data(tmp_path):
    """Reading data may take minutes."""
    path = tmp_path / "search.toml"
    path.write_text(
        """
        model = "digits-mlp"
        dataset = "npz"
        dataset_path = "missing.npz"
        [search.search_space.seed.linear.config]
        name = ["integer"]
        [search.strategy]
        name = "brute_force"
        [search.strategy.sw_runner.basic_evaluation]
        [search.strategy.metrics]
        accuracy.direction = "maximize"
        [search.constraints]
        acuracy_drop = "<= 1 %"
        """
    )
    with pytest.raises(ConfigError, match="Did you mean 'accuracy_drop'") as caught:
        bf.search(path)
    assert caught.value.key == ("search", "constraints", "acuracy_drop")
