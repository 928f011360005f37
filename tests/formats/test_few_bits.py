"""Binary, ternary and residual binary numbers and NormalFloat 4: the conformance suite, and references in NumPy."""

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from bitfront.formats import FORMATS
from bitfront.formats.base import ACTIVATION, BIAS, FACTOR, WEIGHT, FormatError
from bitfront.formats.nf4 import LEVELS
from bitfront.testing.formats import check_format

kinds = st.sampled_from([ACTIVATION, WEIGHT, BIAS])
granularities = st.sampled_from(["tensor", "channel", "NA"])
scaled = st.sampled_from([True, False, "NA"])
spreads = st.sampled_from([0.01, 1.0, 30.0])


def parse(name, kind=WEIGHT, **settings):
    return FORMATS.get(name).parse(settings, kind)


@given(scaled, st.sampled_from([True, False, "NA"]), granularities, kinds, st.booleans(), spreads)
def test_binary_conforms(scale, bipolar, granularity, kind, signed, spread):
    settings = {"width": 1, "scaling_factor": scale, "bipolar": bipolar, "granularity": granularity}
    form = FORMATS.get("binary").parse(settings, kind, signed=signed)
    check_format("binary", settings, kind=kind, signed=signed, spread=spread, nearest=form.bipolar, mirrored=False)


@given(scaled, granularities, kinds, st.booleans(), spreads)
def test_ternary_conforms(scale, granularity, kind, signed, spread):
    settings = {"width": 2, "scaling_factor": scale, "granularity": granularity}
    check_format("ternary", settings, kind=kind, signed=signed, spread=spread, nearest=False)


@given(st.integers(1, 4), granularities, kinds, st.booleans(), spreads)
def test_binary_residual_conforms(levels, granularity, kind, signed, spread):
    settings = {"levels": levels, "granularity": granularity}
    check_format("binary_residual", settings, kind=kind, signed=signed, spread=spread, mirrored=False)


@given(st.integers(1, 300), spreads)
def test_nf4_conforms(group_size, spread):
    check_format("nf4", {"width": 4, "group_size": group_size}, spread=spread, grouped=True)


# --- references ------------------------------------------------------------------------------------------------------

#: Weights of every rank: a bias, a matrix, filters of one, two and three dimensions.
SHAPES = [(7,), (5, 9), (4, 3, 5), (4, 3, 3, 3), (3, 2, 2, 3, 2)]
ranks = pytest.mark.parametrize("shape", SHAPES, ids=len)


def drawn(shape, seed, spread=1.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(0, spread, shape).astype(np.float32)
    return np.where(rng.random(shape) < 0.1, np.float32(0), x)


def per_channel(x, what):
    """`what` of the absolute values of each index of dimension 0, in a shape that broadcasts; as float32 holds it."""
    numbers = [np.float32(what(np.abs(row).astype(np.float64))) for row in x.reshape(len(x), -1)]
    return np.array(numbers, np.float32).reshape(-1, *[1] * (x.ndim - 1))


@ranks
@given(st.integers(0, 999), st.booleans(), st.booleans(), spreads)
def test_binary_is_a_sign_times_the_mean_absolute_value_at_every_rank(shape, seed, bipolar, scale, spread):
    x = drawn(shape, seed, spread)
    alpha = per_channel(x, np.mean) if scale else np.float32(1)
    alpha = np.maximum(alpha, np.float32(2.0**-100))
    expected = np.where(x >= 0, alpha, -alpha) if bipolar else np.where(x > 0, alpha, 0)
    form = parse("binary", bipolar=bipolar, scaling_factor=scale).calibrated(torch.from_numpy(x))
    np.testing.assert_array_equal(form.round(torch.from_numpy(x)).numpy(), expected.astype(np.float32))


@ranks
@given(st.integers(0, 999), st.booleans(), spreads)
def test_ternary_is_a_threshold_and_the_mean_above_it_at_every_rank(shape, seed, scale, spread):
    x = drawn(shape, seed, spread)
    delta = np.float32(0.75) * per_channel(x, np.mean)
    rows, limits = np.abs(x).reshape(len(x), -1), delta.reshape(-1, 1)
    above = [row[row > limit].astype(np.float64) for row, limit in zip(rows, limits, strict=True)]
    alpha = np.array([np.float32(a.mean()) if len(a) else 0 for a in above], np.float32).reshape(delta.shape)
    alpha = alpha if scale else np.ones_like(alpha)
    # Where the scale is 1, a value of 1 or more is never 0.
    expected = np.where((np.abs(x) > delta) | (np.abs(x) >= alpha), np.sign(x) * alpha, 0)
    form = parse("ternary", scaling_factor=scale).calibrated(torch.from_numpy(x))
    np.testing.assert_array_equal(form.round(torch.from_numpy(x)).numpy(), expected.astype(np.float32))


def test_the_example_of_the_documentation():
    w = torch.tensor([[0.1, -0.4, 0.9, -1.0]])  # the mean is 0.6, the threshold 0.45, the mean above it 0.95
    rounded = {
        "binary": parse("binary"),
        "binary scaled": parse("binary", scaling_factor=True),
        "binary 0 and 1": parse("binary", bipolar=False),
        "ternary": parse("ternary"),
        "ternary without scale": parse("ternary", scaling_factor=False),
        "residual": parse("binary_residual", levels=2),  # the residuals' sizes are 0.5, 0.2, 0.3, 0.4: 0.35 on average
        "nf4": parse("nf4"),
    }
    values = {name: form.calibrated(w).round(w)[0].tolist() for name, form in rounded.items()}
    expected = {
        "binary": [1, -1, 1, -1],
        "binary scaled": [0.6, -0.6, 0.6, -0.6],
        "binary 0 and 1": [0.6, 0, 0.6, 0],
        "ternary": [0, 0, 0.95, -0.95],
        "ternary without scale": [0, 0, 1, -1],
        "residual": [0.25, -0.25, 0.95, -0.95],
        "nf4": [0.0795803, -0.3949175, 1, -1],
    }
    assert values == {name: pytest.approx(row) for name, row in expected.items()}


def residual_scales(row, levels):
    residual, scales = row.astype(np.float64), []
    for _ in range(levels):
        scales.append(float(np.float32(np.abs(residual).mean())))
        residual = residual - scales[-1] * np.where(residual >= 0, 1, -1)
    return scales


@ranks
@given(st.integers(0, 999), st.integers(1, 4), spreads)
def test_residual_binary_is_the_nearest_sum_of_the_means_of_residuals(shape, seed, levels, spread):
    x = drawn(shape, seed, spread)
    form = parse("binary_residual", levels=levels).calibrated(torch.from_numpy(x))
    out = form.round(torch.from_numpy(x)).numpy()
    for row, values in zip(x.reshape(len(x), -1), out.reshape(len(x), -1), strict=True):
        scales = [max(a, 2.0**-100) for a in residual_scales(row, levels)]
        sums = np.sort([sum(s * a for s, a in zip(signs, scales, strict=True)) for signs in np.ndindex(*[2] * levels)
                        for signs in [[2 * i - 1 for i in signs]]])  # fmt: skip
        nearest = np.abs(row.astype(np.float64)[:, None] - sums).min(axis=1)
        error = np.abs(row.astype(np.float64) - values)
        np.testing.assert_allclose(error, nearest, atol=1e-6 * max(np.abs(sums).max(), 1e-30))


@given(st.integers(0, 999), st.integers(1, 3))
def test_residual_binary_is_greedy_where_scales_fall_fast(seed, levels):
    x = np.random.default_rng(seed).normal(0, 1, 400).astype(np.float32)
    form = parse("binary_residual", ACTIVATION, levels=levels, granularity="tensor").calibrated(torch.from_numpy(x))
    scales = [a for (a,) in form.scales]
    assume(all(a >= sum(scales[i + 1 :]) for i, a in enumerate(scales)))
    residual, total = x.astype(np.float64), np.zeros(len(x))
    for scale in scales:
        sign = np.where(residual >= 0, 1, -1)
        total, residual = total + sign * scale, residual - sign * scale
    np.testing.assert_array_equal(form.round(torch.from_numpy(x)).numpy(), total.astype(np.float32))


def test_residual_scales_that_grow_do_not_break_rounding():
    x = torch.zeros(1, 100)
    x[0, 3] = 10.0  # the mean is 0.1, and then the mean of what is left is larger
    form = parse("binary_residual", levels=2).calibrated(x)
    assert form.scales[1] > form.scales[0]
    assert torch.equal(form.round(form.round(x)), form.round(x))


def test_nf4_has_the_levels_of_the_normal_distribution():
    """As its authors compute them: quantiles, 8 of the upper half and 7 of the lower one, scaled to ±1, and 0."""
    at = NormalDist().inv_cdf
    outermost = 0.9677083  # the mean of 1 − 1/32 and 1 − 1/30, half a bin off the ends
    upper = [at(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
    lower = [-at(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    levels = np.sort([*upper, *lower, 0.0]) / max(upper)
    np.testing.assert_allclose(LEVELS, levels, atol=2e-7)


@ranks
@given(st.integers(0, 999), st.integers(1, 12), spreads)
def test_nf4_is_the_nearest_level_times_the_largest_value_of_the_group(shape, seed, size, spread):
    x = drawn(shape, seed, spread)
    form = parse("nf4", group_size=size).calibrated(torch.from_numpy(x))
    out = form.round(torch.from_numpy(x)).numpy()
    rows = x[None] if x.ndim == 1 else x
    results = out[None] if x.ndim == 1 else out
    levels, groups = np.array(LEVELS), 0
    for row, values in zip(rows, results, strict=True):
        for first in range(0, len(row), size):
            group, got = row[first : first + size].ravel(), values[first : first + size].ravel()
            scale, groups = max(np.abs(group).max(), 2.0**-100), groups + 1
            best = np.abs(group.astype(np.float64)[:, None] - levels * scale).min(axis=1)
            error = np.abs(group.astype(np.float64) - got)
            np.testing.assert_allclose(error, best, atol=1e-6 * scale)
            on_level = np.abs(got.astype(np.float64)[:, None] - levels * scale).min(axis=1)
            assert (on_level <= 1e-6 * scale).all()
    assert form.overhead_bits(shape) == 32 * groups


# --- facts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "label", "bits", "overhead"),
    [
        (parse("binary"), "binary", 1, 0),
        (parse("binary", scaling_factor=True), "binary-sc", 1, 32 * 6),
        (parse("binary", scaling_factor=True, granularity="tensor"), "binary-s", 1, 32),
        (parse("binary", bipolar=False), "binary01-sc", 1, 32 * 6),
        (parse("ternary"), "ternary-sc", 2, 32 * 6),
        (parse("ternary", granularity="tensor"), "ternary-s", 2, 32),
        (parse("ternary", scaling_factor=False), "ternary-c", 2, 0),
        (parse("ternary", ACTIVATION, scaling_factor=False), "ternary", 2, 0),
        (parse("binary_residual", levels=3), "residual3c", 3, 3 * 32 * 6),
        (parse("nf4"), "nf4-g64", 4, 32 * 6 * 2),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_bits_scales_and_labels(form, label, bits, overhead):
    assert (form.label, form.bits, form.overhead_bits((6, 100))) == (label, bits, overhead)


def test_the_input_of_a_relu_is_0_or_1():
    family = FORMATS.get("binary")
    assert family.parse({}, ACTIVATION, signed=True).bipolar
    assert not family.parse({}, ACTIVATION, signed=False).bipolar


def test_products_of_unscaled_signs_are_exact():
    """Without a scale the grid is fixed point, so sums of such weights are exact whatever their order."""
    for form in (parse("binary"), parse("ternary", scaling_factor=False)):
        grid = form.calibrated(torch.randn(3, 5)).grid
        assert (grid.fixed_point.step, grid.fixed_point.low, grid.fixed_point.high) == (1.0, -1, 1)
        assert grid.rounding is None  # thresholds are not half a step
    scaled_grid = parse("ternary").calibrated(torch.randn(3, 5)).grid
    assert (scaled_grid.axis, tuple(scaled_grid.step.shape)) == (0, (3,))


ALL = [
    parse("binary", scaling_factor=True),
    parse("ternary"),
    parse("ternary", scaling_factor=False),
    parse("binary_residual", levels=2),
    parse("nf4", group_size=4),
]


@pytest.mark.parametrize("form", ALL, ids=lambda f: f.label)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_finite_values_alone_decide_and_the_others_saturate(form, bad):
    alone = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))
    alone[:, 7] = 0
    both = alone.clone()
    both[:, 7] = bad
    # A mean is of the finite values alone; what stands in for them above must not count there.
    expected = form.calibrated(alone if form.label.startswith("nf4") else alone[:, :7])
    found = form.calibrated(both)
    assert found == expected
    low, high = (b.expand_as(both) for b in found.bounds(both))
    out = found.round(both)
    assert torch.equal(out[both == np.inf], high[both == np.inf])
    assert torch.equal(out[both == -np.inf], low[both == -np.inf])
    assert torch.equal(out.isnan(), both.isnan())


@pytest.mark.parametrize("form", ALL, ids=lambda f: f.label)
@pytest.mark.parametrize("value", [0.0, 0.75, -0.75, np.nan])
@pytest.mark.parametrize("shape", [(6, 7), (6, 1), (6, 0), (0, 6)])
def test_tensors_without_variety_are_fine(form, value, shape):
    x = torch.full(shape, value)
    found = form.calibrated(x)
    out = found.round(x)
    assert torch.equal(found.round(out), out) or np.isnan(value)
    if np.isfinite(value) and "ternary-c" not in form.label:
        assert torch.allclose(out, x, atol=1e-6)


def test_ternary_without_a_scale_holds_large_weights():
    w = torch.tensor([[3.0, -1.5, 0.5, -5.0]])  # the threshold is 1.875
    form = parse("ternary", scaling_factor=False).calibrated(w)
    assert form.round(w).tolist() == [[1, -1, 0, -1]]
    assert torch.equal(form.round(form.round(w)), form.round(w))


@given(st.integers(0, 99), st.sampled_from(["binary", "ternary", "binary_residual"]))
@example(0, "ternary")
def test_a_mean_takes_no_notice_of_ends(seed, name):
    """Where a tensor is too large to keep, the ends are known beside a random part: they are no part of a mean."""
    x = torch.from_numpy(drawn((50, 4), seed))
    settings = {"levels": 2} if name == "binary_residual" else {"scaling_factor": True}
    form = FORMATS.get(name).parse(settings, ACTIVATION)
    assert form.calibrated_on(x, torch.tensor([[-100.0], [100.0]]).expand(2, 4)) == form.calibrated(x)


@pytest.mark.parametrize("form", ALL, ids=lambda f: f.label)
def test_a_format_that_was_not_calibrated_says_so(form):
    for use in (form.round, form.quantize, form.bounds):
        with pytest.raises(FormatError, match="must be calibrated before it is used"):
            use(torch.ones(3, 4))


@pytest.mark.parametrize(
    ("name", "settings", "kind", "parameter", "message"),
    [
        (
            "binary",
            {"stochastic": True},
            WEIGHT,
            "stochastic",
            "stochastic = true is not possible: a candidate would",
        ),
        ("binary", {"width": 2}, WEIGHT, "width", "width = 2 is not possible; allowed: a whole number from 1 to 1"),
        ("ternary", {"width": 1}, WEIGHT, "width", "width = 1 is not possible; allowed: a whole number from 2 to 2"),
        ("binary_residual", {}, WEIGHT, "levels", "needs 'levels'"),
        ("binary_residual", {"levels": 5}, WEIGHT, "levels", "levels = 5 is not possible"),
        ("nf4", {}, ACTIVATION, "width", "groups are for weights that are parameters, not for an activation"),
        ("nf4", {}, FACTOR, "width", "not for a weight that depends on the samples"),
        ("nf4", {"group_size": 0}, WEIGHT, "group_size", "group_size = 0 is not possible"),
    ],
)
def test_wrong_parameters_are_named_with_what_is_allowed(name, settings, kind, parameter, message):
    with pytest.raises(FormatError, match=message) as caught:
        FORMATS.get(name).parse(settings, kind)
    assert caught.value.parameter == parameter


def test_a_threshold_is_no_part_of_what_a_scale_says():
    one = parse("ternary").calibrated(torch.randn(3, 20))
    other = replace(one, threshold=tuple(2 * t for t in one.threshold))
    x = torch.from_numpy(drawn((3, 20), 1))
    assert (other.round(x) == 0).sum() > (one.round(x) == 0).sum()
