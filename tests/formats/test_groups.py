"""Affine formats with a scale per group of a weight: the conformance suite, and a reference in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitfront.formats.affine import Affine
from bitfront.formats.base import ACTIVATION, BIAS, FACTOR, WEIGHT, FormatError
from bitfront.formats.ranges import SHRINKS
from bitfront.testing.formats import check_format

SHAPES = [(7,), (5, 9), (4, 3, 5), (4, 3, 3, 3), (3, 2, 2, 3, 2)]
rules = st.sampled_from(["minmax", "percentile", "mse"])
widths, sizes = st.sampled_from([2, 4, 8]), st.integers(1, 12)


@given(widths, st.integers(1, 300), st.booleans(), rules, st.sampled_from([0.01, 1.0, 30.0]))
def test_groups_conform(width, size, symmetric, rule, spread):
    settings = {"width": width, "group_size": size, "symmetric": symmetric, "range": rule}
    check_format("affine", settings, spread=spread, grouped=True)


def groups_in(x, size):
    """The groups of a weight one by one, as indices of its values."""
    index = np.arange(x.size).reshape(x.shape)
    rows = index[None] if x.ndim == 1 else index
    return [row[first : first + size].ravel() for row in rows for first in range(0, len(row), size)]


def alone(values, width, symmetric, rule):
    """A group as a tensor for itself, by the format with one scale."""
    form = Affine.parse({"width": width, "symmetric": symmetric, "range": rule, "granularity": "tensor"}, WEIGHT)
    return form.calibrated(torch.from_numpy(values))


@pytest.mark.parametrize("shape", SHAPES, ids=len)
@given(widths, sizes, st.booleans(), rules, st.integers(0, 999), st.sampled_from([0.0, 3.0]))
def test_a_group_is_a_tensor_of_its_own(shape, width, size, symmetric, rule, seed, shift):
    x = np.random.default_rng(seed).normal(shift, 1, shape).astype(np.float32)
    form = Affine.parse({"width": width, "group_size": size, "symmetric": symmetric, "range": rule}, WEIGHT)
    form = form.calibrated(torch.from_numpy(x))
    out = form.round(torch.from_numpy(x)).numpy().ravel()
    places = groups_in(x, size)
    assert len(form.scale) == len(places)
    for place, scale, zero in zip(places, form.scale, form.zero_point, strict=True):
        part = alone(x.ravel()[place], width, symmetric, rule)
        if rule != "mse":  # errors of equal size are summed in another order there
            assert (part.scale, part.zero_point) == ((scale,), (zero,))
        low, high = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if symmetric else (0, 2**width - 1)
        step = np.float32(scale)
        codes = np.clip(np.rint(x.ravel()[place] / step) + np.float32(zero), low, high)
        np.testing.assert_array_equal(out[place], (codes - np.float32(zero)) * step)


@given(widths, st.booleans(), st.integers(0, 999))
def test_mse_has_the_smallest_squared_error_of_all_parts_of_the_range(width, symmetric, seed):
    x = np.random.default_rng(seed).standard_t(3, (3, 20)).astype(np.float32)
    settings = {"width": width, "group_size": 8, "symmetric": symmetric}
    mse = Affine.parse({**settings, "range": "mse"}, WEIGHT).calibrated(torch.from_numpy(x))
    out = mse.round(torch.from_numpy(x).double()).numpy().ravel()
    first, last = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if symmetric else (0, 2**width - 1)
    for place in groups_in(x, 8):
        group = x.ravel()[place].astype(np.float64)
        low, high, errors = min(0, group.min()), max(0, group.max()), []
        for part in SHRINKS:
            reach = max(-low, high) / last if symmetric else (high - low) / (last - first)
            scale = np.float64(np.float32(reach * part))
            zero = 0 if symmetric else np.clip(np.rint(first - low * part / scale), first, last)
            values = (np.clip(np.rint(group / scale) + zero, first, last) - zero) * scale
            errors.append(((values - group) ** 2).sum())
        assert ((out[place] - group) ** 2).sum() == pytest.approx(min(errors))


def test_a_percentile_cuts_one_in_a_thousand_of_a_group_and_nothing_off_fewer():
    many, few = torch.arange(1.0, 3001).reshape(1, 1, 3000), torch.arange(1.0, 1000).reshape(1, 1, 999)
    form = Affine.parse({"width": 8, "group_size": 1, "range": "percentile"}, WEIGHT)
    assert form.calibrated(many).scale == pytest.approx((2997 / 127,))
    assert form.calibrated(few).scale == pytest.approx((999 / 127,))


@given(widths, st.booleans(), rules, st.integers(0, 99))
def test_a_group_as_long_as_a_row_is_a_channel(width, symmetric, rule, seed):
    x = torch.from_numpy(np.random.default_rng(seed).normal(0, 1, (4, 30)).astype(np.float32))
    settings = {"width": width, "symmetric": symmetric, "range": rule}
    by_group = Affine.parse({**settings, "group_size": 30}, WEIGHT).calibrated(x)
    by_channel = Affine.parse({**settings, "granularity": "channel"}, WEIGHT).calibrated(x)
    assert torch.allclose(by_group.round(x), by_channel.round(x), atol=1e-6 if rule != "mse" else 0.2)
    if rule != "mse":
        assert by_group.scale == by_channel.scale


def test_only_finite_values_of_a_group_decide():
    x = torch.tensor([[1.0, -2.0, np.nan, np.inf, 3.0]])
    form = Affine.parse({"width": 8, "group_size": 4}, WEIGHT).calibrated(x)
    assert form.scale == pytest.approx((2 / 127, 3 / 127))
    assert form.round(x)[0, 3] == pytest.approx(2.0)
    assert form.round(x).isnan().tolist() == [[False, False, True, False, False]]


def test_group_size_is_the_granularity_and_counts_its_scales():
    form = Affine.parse({"width": 4, "group_size": 32}, WEIGHT)
    assert form == Affine.parse({"width": 4, "group_size": 32, "granularity": "group"}, WEIGHT)
    assert (form.label, form.granularity) == ("affine4sg32", "group")
    # 100 inputs are three groups of 32 and one of 4.
    assert form.overhead_bits((6, 100)) == 6 * 4 * 32
    assert Affine.parse({"width": 4, "group_size": 32, "symmetric": False}, WEIGHT).overhead_bits((6, 100)) == (
        6 * 4 * (32 + 4)
    )


@pytest.mark.parametrize(
    ("settings", "kind", "parameter", "message"),
    [
        (
            {"group_size": 8},
            ACTIVATION,
            "group_size",
            "groups are for weights that are parameters, not for an activation",
        ),
        ({"group_size": 8}, BIAS, "group_size", "not for a bias"),
        ({"granularity": "group"}, FACTOR, "granularity", "not for a weight that depends on the samples"),
        ({"granularity": "group"}, WEIGHT, None, "granularity = 'group' does not go with group_size = 'NA'"),
        ({"granularity": "channel", "group_size": 8}, WEIGHT, None, "granularity = 'channel' does not go with"),
        ({"group_size": 0}, WEIGHT, "group_size", "allowed: a whole number from 1 to 4096 or 'NA'"),
    ],
)
def test_what_has_no_groups_is_named(settings, kind, parameter, message):
    with pytest.raises(FormatError, match=message) as caught:
        Affine.parse({"width": 4, **settings}, kind)
    assert caught.value.parameter == parameter
