"""Fixed point that rounds half up or down, and wraps or saturates symmetrically: against whole numbers of NumPy."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitfront import kernels
from bitfront.engine.evaluation.range_loss import lost, remarks
from bitfront.formats.base import ACTIVATION, WEIGHT, FormatError
from bitfront.formats.grid import Grid
from bitfront.formats.integer import Integer
from bitfront.formats.spelling import as_json, from_json
from bitfront.kernels import plain
from bitfront.testing import check_format
from properties import max_examples

ROUNDINGS, OVERFLOWS = ["even", "half_up", "floor"], ["saturate", "wrap", "saturate_symmetric"]
MODES = list(itertools.product(ROUNDINGS, OVERFLOWS))
modes = pytest.mark.parametrize(("rounding", "overflow"), MODES, ids=str)
others = pytest.mark.parametrize(("rounding", "overflow"), MODES[1:], ids=str)


def parsed(kind=WEIGHT, negative=True, **settings):
    return Integer.parse(settings, kind, signed=negative)


def by_whole_numbers(m, q, width, frac, signed, rounding, overflow):
    """The codes of m · 2^-q, by int64 alone."""
    up, down = max(0, frac - q), max(0, q - frac)
    numbers, one = m.astype(np.int64) << up, np.int64(1) << down
    below, rest = np.floor_divide(numbers, one), np.mod(numbers, one)
    if rounding == "half_up":
        below = below + (2 * rest >= one)
    elif rounding == "even":
        below = below + ((2 * rest > one) | ((2 * rest == one) & (below % 2 == 1)))
    low, high = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if signed else (0, 2**width - 1)
    if overflow == "wrap":
        return np.mod(below - low, 2**width) + low
    return np.clip(below, -high if signed and overflow == "saturate_symmetric" else low, high)


@max_examples(60)
@given(
    st.sampled_from(MODES),
    st.integers(2, 22),
    st.integers(-8, 14),
    st.booleans(),
    st.integers(0, 12),
    st.integers(2, 24),
    st.integers(0, 2**31),
)
def test_codes_are_those_of_whole_numbers(mode, width, frac, signed, q, bits, seed):
    rounding, overflow = mode
    form = Integer(width, frac, signed, rounding=rounding, overflow=overflow)
    m = np.random.default_rng(seed).integers(-(2**bits), 2**bits + 1, 200)
    m[:9] = np.arange(-4, 5) << max(0, q - frac - 1)  # ties
    wanted = by_whole_numbers(m, q, width, frac, signed, rounding, overflow)
    x = torch.from_numpy(m.astype(np.float64)) * 2.0**-q
    for values in (x, x.float()):
        assert np.array_equal(form.grid.codes(values).long().numpy(), wanted)
        assert np.array_equal((form.round(values).double() * 2.0**frac).long().numpy(), wanted)
    row = form.grid.rounding_row()
    assert (row is None) == (overflow == "wrap")
    if row is not None:
        numbers, source = np.array([row], np.float32), x.float()[None]
        assert torch.equal(plain.rounded(source, numbers)[0], form.round(x.float()))
        if kernels.compiled():
            target, place = torch.empty_like(source), np.zeros(1, dtype=np.int64)
            kernels.round_blocks(source, target, place, place, (1, 200, 0), numbers)
            assert torch.equal(target[0], form.round(x.float()))


def test_what_floating_point_would_get_wrong():
    before_half = torch.tensor(0.5).nextafter(torch.tensor(0.0))
    x = torch.tensor([before_half, -before_half, -0.5, 0.5, -1e-30, 2.0**23 + 1, -1.5])
    assert Integer(30, 0, rounding="half_up").round(x).tolist() == [0, 0, 0, 1, 0, 2**23 + 1, -1]
    assert Integer(30, 0, rounding="floor").round(x).tolist() == [0, -1, -1, 0, -1, 2**23 + 1, -2]
    # Larger than a float32 can count in steps, and than a float64 can.
    far = torch.tensor([3e38, -3e38, torch.inf, -torch.inf, torch.nan])
    wrapped = Integer(8, 90, overflow="wrap").round(far) * 2.0**90
    assert wrapped[:4].tolist() == [0, 0, 127, -128]
    assert wrapped[4].isnan()


def test_grids_with_zero_points_and_steps_know_it_too():
    x = torch.tensor([[-0.3, 0.75, 2.0], [0.3, -0.75, 9.0]])
    grid = Grid(0.5, 0, 7, zero=3, rounds="floor", wraps=True)
    assert grid.codes(x).tolist() == [[2, 4, 7], [3, 1, 5]]
    steps = torch.tensor([[0.5], [0.25]], dtype=torch.float64)
    rows = Grid(steps, -4, 3, block=(1, 0), rounds="half_up", wraps=True)
    assert rows.codes(x).tolist() == [[-1, 2, -4], [1, -3, -4]]


@others
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_they_keep_the_contract(rounding, overflow, granularity):
    settings = {"width": 6, "frac_width": "auto", "granularity": granularity}
    settings |= {"rounding": rounding, "overflow": overflow}
    form = check_format("integer", settings, nearest=rounding != "floor" and overflow != "wrap", mirrored=False)
    assert from_json(as_json(form)) == form
    assert form.label.startswith("int6.")


def test_labels_and_defaults():
    assert parsed(width=8, frac_width=4).label == "int8.4"
    assert parsed(width=8, frac_width=4) == parsed(width=8, frac_width=4, rounding="even", overflow="saturate")
    labels = {parsed(width=8, frac_width=4, rounding=r, overflow=o).label for r, o in MODES}
    assert labels == {f"int8.4{s}" for s in ("", "-w", "-s", "-h", "-hw", "-hs", "-f", "-fw", "-fs")}
    assert parsed(width=8, frac_width="auto", granularity="channel", rounding="floor").label == "int8.auto-cf"
    # A file of a version without these fields.
    assert from_json({"format": "integer", "width": 8, "frac_width": 4, "signed": True}) == Integer(8, 4)


def test_what_means_the_same_is_one_format():
    unsigned = {"width": 8, "frac_width": 4, "signed": False}
    assert parsed(**unsigned, overflow="saturate_symmetric") == parsed(**unsigned)
    # A negative input of a ReLU may become 0, but not a large number.
    assert not parsed(ACTIVATION, negative=False, width=8, frac_width=4).signed
    assert parsed(ACTIVATION, negative=False, width=8, frac_width=4, overflow="wrap").signed
    with pytest.raises(FormatError, match="leave only the value 0 in 1 bit") as error:
        parsed(width=1, frac_width=0, overflow="saturate_symmetric")
    assert error.value.parameter is None
    with pytest.raises(FormatError, match="'even' or 'half_up' or 'floor'"):
        parsed(width=8, rounding="up")


@modes
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("rule", ["auto", "minmax", "percentile"])
def test_frac_widths_are_learned_for_how_it_rounds(rounding, overflow, signed, rule):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randint(-350, 350, (2500,), generator=generator) / 512
    sample[0], sample[1] = 7.9, -7.1
    sample = sample if signed else sample.abs()
    settings = {"width": 5, "frac_width": rule, "signed": signed, "rounding": rounding, "overflow": overflow}
    form = parsed(**settings).calibrated(sample)
    forms = {f: Integer(5, f, signed, rounding=rounding, overflow=overflow) for f in range(-4, 12)}
    # Codes in 24 bits say what is out of range.
    beyond = {
        f: bool((Integer(24, f, True, rounding=rounding).round(sample) != each.round(sample)).any())
        for f, each in forms.items()
    }
    covering = max(f for f, over in beyond.items() if not over)
    errors = {f: float(((each.round(sample) - sample).double() ** 2).sum()) for f, each in forms.items()}
    if rule == "minmax" or (rule == "percentile" and overflow == "wrap"):
        assert form.frac_width == covering
    elif rule == "auto":
        allowed = [f for f in errors if overflow != "wrap" or f <= covering]
        assert form.frac_width == min(allowed, key=lambda f: (errors[f], f))
        assert math.isclose(errors[form.frac_width], min(errors[f] for f in allowed))
    else:
        assert form.frac_width > covering
    if overflow == "wrap":
        assert not beyond[form.frac_width]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_gradients_pass_everywhere_where_it_wraps(rounding):
    x = torch.tensor([-9.3, -1.0, 0.3, 1.2, 40.0], requires_grad=True)
    Integer(4, 2, rounding=rounding, overflow="wrap").quantize(x).sum().backward()
    assert x.grad.tolist() == [1] * 5
    x.grad = None
    Integer(4, 2, rounding=rounding, overflow="saturate_symmetric").quantize(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    learned = Integer(4, 2, rounding=rounding, overflow="wrap").learned_range()
    y = x.detach().clone().requires_grad_()
    out = learned.quantize(y)
    assert torch.equal(out, Integer(4, 2, rounding=rounding, overflow="wrap").round(y))
    out.sum().backward()
    assert y.grad.tolist() == [1] * 5


def test_what_is_out_of_range_is_said():
    x = torch.tensor([0.1] * 996 + [1.875, 1.96, -2.2, 2.3])
    # 1.875 is half a step above the largest value, 1.75.
    assert lost(Integer(4, 2), x[-100:], True) == {"saturated": 0.03}
    assert lost(Integer(4, 2, rounding="floor"), x[-100:], True) == {"saturated": 0.02}
    assert lost(Integer(4, 2, overflow="wrap"), x, True) == {"wrapped": 0.004}
    assert lost(Integer(4, 2, rounding="floor", overflow="wrap"), x, True) == {"wrapped": 0.002}
    # Negative values of an unsigned format become large ones.
    assert lost(Integer(4, 2, False, overflow="wrap"), torch.tensor([-3.0, 1.0]), False) == {"wrapped": 0.5}
    known = {("fc", "data_in", "wrapped"): (0.004, "int4.2-w")}
    assert remarks(known) == [
        "calibration values are out of range and come back on the other side: data_in of fc as int4.2-w (0.004 of them)"
    ]
