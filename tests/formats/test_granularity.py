"""Fixed point with a binary point per channel or element: against exact fractions."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitfront.formats import FORMATS
from bitfront.formats.base import ACTIVATION, BIAS, FACTOR, WEIGHT, FormatError, OperandKind
from bitfront.formats.integer import Integer
from bitfront.testing import check_format

RULES = ["auto", "minmax", "percentile"]
rules = pytest.mark.parametrize("rule", RULES)


def fixed(kind=WEIGHT, signed=True, **settings):
    return FORMATS.get("fixed").parse(settings, kind, signed=signed)


def dyadic(*shape, seed=0, bits=12):
    """Whole multiples of 2^-9, so that sums of their squared errors are exact in float64; rows of other sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-(2**bits), 2**bits, shape, generator=generator) / 2.0**9
    sizes = 2.0 ** torch.randint(-6, 7, (shape[0], *[1] * (len(shape) - 1)), generator=generator)
    return x * sizes


def by_fractions(x, width, frac, signed=True):
    """The value of one number, without floating point."""
    if not width:
        return Fraction(0)
    low, high = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if signed else (0, 2**width - 1)
    code = round(Fraction(x) * Fraction(2) ** frac)  # Python rounds fractions half to even
    return Fraction(min(max(code, low), high)) / Fraction(2) ** frac


def exactly(values):
    return [Fraction(v) for v in values.flatten().tolist()]


# --- the contract ----------------------------------------------------------------------------------------------------


@rules
@pytest.mark.parametrize("kind", [WEIGHT, ACTIVATION, FACTOR], ids=["weight", "activation", "factor"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("width", [1, 4, 8, 24])
def test_a_binary_point_per_channel_conforms(rule, kind, signed, width):
    settings = {"width": width, "frac_width": rule, "granularity": "channel", "signed": signed}
    form = check_format("integer", settings, kind=kind, signed=signed)
    assert len(form.frac_width) == 3
    assert len(set(form.frac_width)) > 1


@rules
@pytest.mark.parametrize("kind", [WEIGHT, BIAS], ids=["weight", "bias"])
@pytest.mark.parametrize("signed", [True, False])
def test_a_binary_point_per_element_conforms(rule, kind, signed):
    settings = {"width": 5, "frac_width": rule, "granularity": "element", "signed": signed}
    form = check_format("integer", settings, kind=kind, signed=signed, grouped=True)
    assert form.shape == (3, 257)


# --- the rules -------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@rules
@given(st.integers(1, 10), st.booleans(), st.integers(0, 999))
def test_each_channel_gets_the_frac_width_that_it_gets_as_a_tensor(rule, width, signed, seed):
    x = dyadic(5, 40, seed=seed)
    x[1] = 0.0
    x[2, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    form = Integer(width, rule, signed, "channel").calibrated(x)
    assert form.frac_width == tuple(Integer(width, rule, signed).calibrated(row).frac_width for row in x)
    turned = Integer(width, rule, signed, "channel", axis=1).calibrated(x.T.contiguous())
    assert turned.frac_width == form.frac_width
    assert torch.equal(turned.round(x.T).T.nan_to_num(), form.round(x).nan_to_num())


@given(st.integers(1, 8), st.booleans(), st.integers(0, 999))
def test_each_channel_has_the_smallest_squared_error_of_all(width, signed, seed):
    x = dyadic(3, 12, seed=seed)
    found = Integer(width, "auto", signed, "channel").calibrated(x).frac_width
    for row, frac in zip(x, found, strict=True):
        values = exactly(row)
        errors = {f: sum((by_fractions(v, width, f, signed) - v) ** 2 for v in values) for f in range(-24, 25)}
        least = min(errors.values())
        if any(v > 0 or (signed and v) for v in values):
            assert errors[frac] == least
            # Of equals the smallest one; below -24 a grid that holds nothing but zero would do as well.
            assert frac == min(f for f, error in errors.items() if error == least) or frac < -24


@given(st.integers(2, 8), st.integers(0, 999))
def test_an_element_has_the_point_that_suits_it_alone(width, seed):
    x = dyadic(4, 6, seed=seed)
    form = Integer(width, "auto", granularity="element").calibrated(x)
    for value, frac in zip(x.flatten(), form.frac_width, strict=True):
        assert frac == Integer(width, "auto").calibrated(value[None]).frac_width
    # width - 1 bits of each value are kept, whatever its size.
    assert bool(((form.round(x) - x).abs() <= x.abs() * 2.0 ** (1 - width) + 1e-9).all())


def test_an_input_has_a_point_per_feature():
    x = torch.randn(200, 3, 4, 4) * torch.tensor([1.0, 16.0, 1 / 64]).reshape(1, 3, 1, 1)
    form = fixed(ACTIVATION, width=6, frac_width="minmax", granularity="channel").calibrated(x)
    assert form.shape == (1, 3)
    first, second, third = form.frac_width
    assert second < first < third
    for channel, frac in enumerate(form.frac_width):
        assert torch.equal(form.round(x)[:, channel], Integer(6, frac).round(x[:, channel]))
    # Values without a second dimension have no channels.
    flat = fixed(ACTIVATION, width=6, frac_width="auto", granularity="channel").calibrated(torch.randn(50))
    assert isinstance(flat.frac_width, int)
    assert flat.round(torch.randn(9)).shape == (9,)


def test_the_ends_alone_say_what_is_covered_of_a_large_input():
    sample = torch.tensor([[0.5, 2.0], [0.25, -1.0]])
    ends = torch.tensor([[-8.0, -1.0], [3.0, 100.0]])
    form = Integer(8, "minmax", granularity="channel", axis=1)
    assert form.calibrated_on(sample, ends).frac_width == (4, 0)
    assert form.calibrated(torch.cat([sample, ends])).frac_width == (4, 0)


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_that_mean_the_same_are_one_format():
    one = fixed(width=8, frac_width=4)
    for granularity in ("NA", "tensor", "channel", "element"):
        assert fixed(width=8, frac_width=4, granularity=granularity) == one
        assert fixed(width=8, granularity=granularity) == fixed(width=8)
    assert fixed(width=8, frac_width="auto", granularity="NA") == Integer(8, "auto")
    without = OperandKind("weight", samples=False, channel_axis=None)
    assert fixed(without, width=8, frac_width="auto", granularity="channel") == Integer(8, "auto")
    each = [fixed(width=8, frac_width="auto", granularity=g) for g in ("tensor", "channel", "element")]
    assert len(set(each)) == 3
    assert [f.label for f in each] == ["int8.auto", "int8.auto-c", "int8.auto-e"]


@pytest.mark.parametrize("kind", [ACTIVATION, FACTOR], ids=["activation", "factor"])
def test_what_depends_on_the_samples_has_no_point_per_element(kind):
    with pytest.raises(
        FormatError, match="'element' is for weights and biases that are parameters, not for a"
    ) as error:
        fixed(kind, width=8, frac_width="auto", granularity="element")
    assert error.value.parameter == "granularity"
    assert "take 'channel' there" in str(error.value)


def test_labels_fit_a_table():
    x = torch.tensor([[2.0**90], [2.0**-90]])
    assert fixed(width=32, frac_width="auto", granularity="channel").calibrated(x).label == "int32.-90..90-c"
    assert fixed(width=4, frac_width="minmax", granularity="channel").calibrated(torch.ones(3, 2)).label == "int4.2-c"


def test_several_points_take_a_byte_each():
    """As the scales of MX and block formats take theirs."""
    for shape in ((5, 4, 3, 3), (7, 2), (9,)):
        sizes = {g: fixed(width=4, frac_width="auto", granularity=g) for g in ("tensor", "channel", "element")}
        bits = {g: form.overhead_bits(shape) for g, form in sizes.items()}
        assert bits == {"tensor": 0, "channel": 8 * shape[0], "element": 8 * math.prod(shape)}


def test_equal_points_are_one_step():
    form = fixed(width=6, frac_width="minmax", granularity="channel").calibrated(torch.ones(4, 3))
    assert form.grid.uniform
    assert form.grid.rounding is not None
    assert torch.equal(
        form.round(torch.linspace(-3, 3, 12).reshape(4, 3)),
        Integer(6, 4).round(torch.linspace(-3, 3, 12)).reshape(4, 3),
    )
    assert form.overhead_bits((4, 3)) == 32


# --- learned ranges --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        Integer(4, "minmax", granularity="channel").calibrated(dyadic(3, 8)),
        Integer(4, "minmax", granularity="element").calibrated(dyadic(3, 8)),
    ],
    ids=["channel", "element"],
)
def test_each_point_is_learned_alone(form):
    learned, x = form.learned_range(), dyadic(3, 8)
    assert learned.exponent.shape == form.shape
    assert torch.equal(learned.quantize(x), form.round(x))
    assert learned.frozen() == form
    with torch.no_grad():
        learned.exponent[0] -= 1.0
    moved = learned.frozen()
    count = len(form.frac_width) // 3
    assert moved.frac_width == (*(f + 1 for f in form.frac_width[:count]), *form.frac_width[count:])
    assert replace(moved, frac_width=form.frac_width) == form
    learned.settle()
    assert torch.equal(learned.quantize(x), moved.round(x))
