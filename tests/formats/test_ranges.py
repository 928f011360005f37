"""Rules that choose the range of an affine format, against plain loops that compute every option."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitfront.formats.affine import Affine
from bitfront.formats.base import ACTIVATION, WEIGHT
from bitfront.formats.ranges import SHRINKS, least_error


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
