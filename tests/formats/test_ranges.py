"""Rules that choose the range of an affine format, against plain loops that compute every option."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitfront.formats.affine import Affine
from bitfront.formats.base import ACTIVATION, BIAS, WEIGHT, FormatError
from bitfront.formats.ranges import BINS, SHRINKS, entropy_reach, least_error


def best_of_all(x, width, symmetric):
    """(scale, zero point) of the part of the range with the smallest squared error, the largest among equals."""
    first, last = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if symmetric else (0, 2**width - 1)
    x = x.astype(np.float64)
    low, high, options = min(0.0, x.min(initial=0.0)), max(0.0, x.max(initial=0.0)), []
    for part in SHRINKS:
        reach = max(-low, high) / last if symmetric else (high - low) / (last - first)
        scale = np.float64(np.float32(max(reach * part, 2.0**-100)))
        zero = 0 if symmetric else int(np.clip(np.rint(first - low * part / scale), first, last))
        values = (np.clip(np.rint(x / scale) + zero, first, last) - zero) * scale
        options.append((((values - x) ** 2).sum(), scale, zero))
    return min(options, key=lambda option: option[0])[1:]


@given(
    st.integers(2, 12),
    st.booleans(),
    st.sampled_from([1.0, 3.0, 30.0]),
    st.floats(-2, 2),
    st.integers(0, 9999),
)
def test_mse_per_channel_is_the_best_of_all_57_parts(width, symmetric, tails, shift, seed):
    rng = np.random.default_rng(seed)
    x = (rng.standard_t(tails, (5, 7, 6)) + shift).astype(np.float32)
    x[3] = 0
    form = Affine.parse(
        {"width": width, "symmetric": symmetric, "granularity": "channel", "range": "mse"}, WEIGHT
    ).calibrated(torch.from_numpy(x))
    for row, scale, zero in zip(x, form.scale, form.zero_point, strict=True):
        assert (scale, zero) == best_of_all(row.ravel(), width, symmetric)


@pytest.mark.parametrize("width", [2, 4, 8])
def test_mse_of_many_values_is_the_best_of_all_57_parts(width):
    x = np.random.default_rng(width).laplace(0, 1, 60_000).astype(np.float32)
    form = Affine.parse({"width": width, "symmetric": True, "range": "mse"}, ACTIVATION).calibrated(torch.from_numpy(x))
    assert (form.scale[0], form.zero_point[0]) == best_of_all(x, width, True)


def test_values_that_are_not_finite_do_not_decide_a_channel():
    x = np.random.default_rng(0).normal(0, 1, (3, 40)).astype(np.float32)
    x[1, :5], x[2] = [np.nan, np.inf, -np.inf, np.nan, np.inf], np.nan
    form = Affine.parse({"width": 4, "range": "mse"}, WEIGHT).calibrated(torch.from_numpy(x))
    wanted = [best_of_all(row[np.isfinite(row)], 4, True) for row in x]
    assert list(zip(form.scale, form.zero_point, strict=True)) == wanted


def test_a_row_does_not_depend_on_the_other_rows():
    values = torch.from_numpy(np.random.default_rng(0).standard_t(2, (300, 50)))
    parts = torch.tensor(SHRINKS, dtype=torch.float64)
    scales = values.abs().amax(dim=1, keepdim=True) / 7 * parts
    zeros = torch.zeros_like(scales).long()
    together = least_error(values, scales, zeros, (-8, 7))
    alone = [least_error(values[i : i + 1], scales[i : i + 1], zeros[i : i + 1], (-8, 7)) for i in range(300)]
    assert torch.equal(together, torch.cat(alone))
    assert len(together.unique()) > 5


# --- entropy ---------------------------------------------------------------------------------------------------------


def divergences(x, levels):
    """Number of bins → the Kullback-Leibler divergence, computed as Migacz 2017 writes it down, bin by bin."""
    x = np.unique(np.abs(x.astype(np.float64)))
    x = x[x > 0]
    counts = np.histogram(x, BINS, (0.0, x.max()))[0].astype(np.float64)
    result = {}
    for i in range(levels, BINS + 1):
        p = counts[:i].copy()
        p[-1] += counts[i:].sum()
        q, inside = np.zeros(i), counts[:i].copy()
        if inside[-1] == 0 and p[-1] > 0:
            inside[-1] = 1
        for level in range(levels):
            part = slice(level * i // levels, (level + 1) * i // levels)
            filled = inside[part] > 0
            if filled.any():
                q[part][filled] = inside[part].sum() / filled.sum()
        p, q = p / p.sum(), q / q.sum()
        result[i] = np.inf if (q[p > 0] == 0).any() else (p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum()
    return result


@pytest.mark.sampled(2)
@pytest.mark.parametrize("levels", [8, 128])
@pytest.mark.parametrize("draw", ["laplace", "normal", "standard_t"])
def test_entropy_has_the_smallest_divergence_of_all_cuts(levels, draw):
    rng = np.random.default_rng(1)
    x = (rng.standard_t(3, 20_000) if draw == "standard_t" else getattr(rng, draw)(0, 1, 20_000)).astype(np.float32)
    largest = float(np.abs(x).max())
    known = divergences(x, levels)
    chosen = round(entropy_reach(torch.from_numpy(x), largest, levels) / largest * BINS - 0.5)
    assert known[chosen] == pytest.approx(min(known.values()), rel=1e-9)
    assert chosen < BINS  # tails are cut off


def test_entropy_is_not_led_by_a_value_that_many_samples_share():
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).relu()
    shared = torch.cat([x, torch.full((20_000,), 0.3)])
    largest = float(x.max())
    assert entropy_reach(shared, largest, 256) == pytest.approx(entropy_reach(x, largest, 256), rel=0.01)
    assert entropy_reach(shared, largest, 256) > 0.6 * largest  # 0.3 is 0.07 of it


def test_entropy_cuts_an_outlier_off_and_counts_every_code_behind_a_relu():
    x = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0)).relu()
    x[0, 0] = 50.0
    form = Affine.parse({"width": 8, "range": "entropy"}, ACTIVATION).calibrated(x)
    assert 2 < form.scale[0] * 255 < 10
    assert form.zero_point == (0,)
    assert form.scale[0] * 255 == pytest.approx(entropy_reach(x, 50.0, 256), rel=1e-6)
    assert form.label == "affine8-kl"


@pytest.mark.parametrize("x", [torch.zeros(10, 2), torch.tensor([[1.0], [2.0]]), torch.tensor([[np.nan], [3.0]])])
def test_entropy_of_few_values_covers_them(x):
    form = Affine.parse({"width": 8, "range": "entropy"}, ACTIVATION).calibrated(x)
    plain = Affine.parse({"width": 8}, ACTIVATION).calibrated(x)
    assert form.scale == pytest.approx(plain.scale)
    wide = Affine.parse({"width": 14, "range": "entropy"}, ACTIVATION).calibrated(x)
    assert wide.scale == Affine.parse({"width": 14}, ACTIVATION).calibrated(x).scale


@pytest.mark.parametrize(("operand", "more"), [(WEIGHT, {}), (BIAS, {}), (ACTIVATION, {"granularity": "channel"})])
def test_entropy_is_for_inputs_with_one_scale(operand, more):
    with pytest.raises(FormatError, match="inputs with one scale"):
        Affine.parse({"width": 8, "range": "entropy", **more}, operand)
