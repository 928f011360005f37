"""Floating-point formats: the conformance suite, ml_dtypes and PyTorch, and all codes enumerated as exact rationals."""

import bisect
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from bitfront.formats import FORMATS
from bitfront.formats.base import ACTIVATION, WEIGHT, Format, FormatError
from bitfront.formats.minifloat import Minifloat
from bitfront.kernels.scaled import binade
from bitfront.testing import check_format

HIDDEN = {"minifloat_ieee": 1, "minifloat_denorm": 0}
STANDARD = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
FAMILIES = pytest.mark.parametrize("family", HIDDEN)
DTYPES = pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.float64, 64)], ids=["32", "64"])


def minifloat(family, width, exponent_width, bias="NA") -> Minifloat:
    settings = {"width": width, "exponent_width": exponent_width, "exponent_bias": bias}
    return FORMATS.get(family).parse(settings, WEIGHT)


@st.composite
def settings(draw, family, widest=32, biases=(-126, 127)):
    exponent_width = draw(st.integers(1, 7))
    least = exponent_width + 2 - HIDDEN[family]
    width = draw(st.integers(least, min(widest, least + 23)))
    low, high = minifloat(family, width, exponent_width).biases
    bias = st.sampled_from(["NA", "auto"]) | st.integers(max(low, biases[0]), min(high, biases[1]))
    return {"width": width, "exponent_width": exponent_width, "exponent_bias": draw(bias)}


def decoded(family, width, exponent_width, bias) -> list[Fraction]:
    """The values of all codes, written out from docs/formats.md."""
    m = width - 1 - exponent_width
    values = set()
    for E in range(2**exponent_width):
        for M in range(2**m):
            if family == "minifloat_denorm":
                value = Fraction(2) ** (E - bias) * Fraction(M, 2**m)
            elif E == 0:
                value = Fraction(2) ** (1 - bias) * Fraction(M, 2**m)
            else:
                value = Fraction(2) ** (E - bias) * (1 + Fraction(M, 2**m))
            values |= {value, -value}
    return sorted(values)


def nearest(x: float, values: list[Fraction]) -> float:
    """The nearest value. Of two equally near ones, the one that is an even multiple of their distance."""
    if math.isinf(x):
        return float(values[0] if x < 0 else values[-1])
    place = bisect.bisect_left(values, Fraction(x))
    if place in (0, len(values)):
        return float(values[min(place, len(values) - 1)])
    below, above = values[place - 1], values[place]
    down, up = Fraction(x) - below, above - Fraction(x)
    if down != up:
        return float(below if down < up else above)
    return float(below if (below / (above - below)) % 2 == 0 else above)


# --- minifloats ------------------------------------------------------------------------------------------------------


@FAMILIES
def test_minifloats_conform(family):
    @given(settings(family), st.sampled_from([ACTIVATION, WEIGHT]), st.booleans(), st.sampled_from([0.01, 1.0, 30.0]))
    def check(chosen, kind, signed, spread):
        check_format(family, chosen, kind=kind, signed=signed, spread=spread)

    check()


@st.composite
def narrow_ones_and_values(draw, family, bits):
    exponent_width = draw(st.integers(1, 4))
    width = draw(st.integers(exponent_width + 2 - HIDDEN[family], 8))
    bias = draw(st.just(2 ** (exponent_width - 1) - 1) | st.integers(-20, 40))
    values = decoded(family, width, exponent_width, bias)
    place = draw(st.lists(st.integers(0, len(values) - 2), min_size=1, max_size=12))
    ties = [float((values[k] + values[k + 1]) / 2) for k in place]
    kind = np.float32 if bits == 32 else np.float64
    beside = [float(np.nextafter(kind(t), kind(way))) for t in ties for way in (-np.inf, np.inf)]
    anything = draw(st.lists(st.floats(allow_nan=False, width=bits), max_size=8))
    return (width, exponent_width, bias), values, [*ties, *beside, *map(float, values), *anything]


@FAMILIES
@DTYPES
def test_minifloats_take_the_nearest_of_all_their_codes(family, dtype, bits):
    @given(narrow_ones_and_values(family, bits))
    def check(case):
        chosen, values, x = case
        form = minifloat(family, *chosen)
        assert len(values) <= 2 ** chosen[0]
        assert form.bounds(torch.zeros(1)) == (float(values[0]), float(values[-1]))
        rounded = form.round(torch.tensor(x, dtype=dtype)).tolist()
        assert rounded == [nearest(v, values) for v in torch.tensor(x, dtype=dtype).tolist()]

    check()


@pytest.mark.parametrize(
    ("name", "width", "exponent_width", "bias", "whole_range"),
    [
        ("float8_e4m3fn", 8, 4, 7, False),  # its highest code is NaN
        ("float8_e4m3", 8, 4, 7, False),  # its highest exponent is for infinity and NaN
        ("float8_e5m2", 8, 5, 15, False),
        ("float8_e3m4", 8, 3, 3, False),
        ("float8_e4m3b11fnuz", 8, 4, 11, True),
        ("float8_e4m3fnuz", 8, 4, 8, True),
        ("float8_e5m2fnuz", 8, 5, 16, True),
        ("float6_e2m3fn", 6, 2, 1, True),
        ("float6_e3m2fn", 6, 3, 3, True),
        ("float4_e2m1fn", 4, 2, 1, True),
    ],
)
def test_minifloat_ieee_rounds_as_ml_dtypes(name, width, exponent_width, bias, whole_range):
    # From doubles ml_dtypes goes through 32 bits, and rounds twice. The test with exact rationals covers them.
    theirs, dtype = getattr(ml_dtypes, name), np.float32
    form = minifloat("minifloat_ieee", width, exponent_width, bias)
    codes = np.arange(2**width, dtype=np.uint8).view(theirs).astype(dtype)
    codes = np.unique(codes[np.isfinite(codes)])
    ties = (codes[1:] + codes[:-1]) / 2
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=5000) * np.exp2(rng.uniform(-30, 20, 5000))
    x = np.concatenate([codes, ties, np.nextafter(ties, -np.inf), np.nextafter(ties, np.inf), drawn]).astype(dtype)
    x = x[np.abs(x) <= codes.max()]
    np.testing.assert_array_equal(form.round(torch.from_numpy(x)).numpy(), x.astype(theirs).astype(dtype))
    assert len(x) > 2000
    largest = form.bounds(torch.zeros(1))[1]
    assert (largest == codes.max()) == whole_range
    assert largest >= codes.max()


@pytest.mark.parametrize("family", ["minifloat_ieee", "minifloat_denorm"])
@given(st.data())
def test_rounding_is_idempotent_monotone_and_symmetric(family, data):
    form = minifloat(family, *(data.draw(settings(family).filter(lambda s: s["exponent_bias"] != "auto")).values()))
    x = torch.tensor(data.draw(st.lists(st.floats(allow_nan=False, width=32), min_size=2, max_size=40))).sort().values
    y = form.round(x)
    assert torch.equal(form.round(y), y)
    assert torch.equal(form.round(-x), -y)
    assert bool((y[1:] >= y[:-1]).all())
    assert torch.equal(form.round(x.double()), y.double())


@FAMILIES
def test_nan_stays_and_zeros_keep_their_sign(family):
    out = minifloat(family, 6, 3).round(torch.tensor([math.nan, -0.0, -1e-30]))
    assert out[0].isnan()
    assert out[1:].tolist() == [0, 0]
    assert out[1:].signbit().all()


def test_a_power_of_two_is_a_value_of_a_plain_fraction_too():
    # ceil(log2(1)) is 0, and 2^0 · M / 2^m stays below 1: the exponent of the next binade holds it.
    form = minifloat("minifloat_denorm", 8, 4)
    powers = torch.exp2(torch.arange(-9.0, 8))
    assert torch.equal(form.round(powers), powers)


def test_tiny_values_are_not_moved():
    # log2(|x| + 1e-9) would be the logarithm of 1e-9.
    form = minifloat("minifloat_ieee", 16, 6, 50)
    x = torch.tensor([1.5 * 2.0**-40, -(2.0**-48)])
    assert torch.equal(form.round(x), x)


@pytest.mark.parametrize(
    ("family", "width", "exponent_width", "smallest", "largest"),
    [
        ("minifloat_ieee", 4, 2, 0.5, 6),
        ("minifloat_ieee", 4, 3, 0.25, 16),
        ("minifloat_ieee", 6, 2, 0.125, 7.5),
        ("minifloat_ieee", 6, 3, 0.0625, 28),
        ("minifloat_ieee", 8, 3, 2.0**-6, 31),
        ("minifloat_ieee", 8, 4, 2.0**-9, 480),
        ("minifloat_ieee", 8, 5, 2.0**-16, 114_688),
        ("minifloat_denorm", 4, 2, 0.25, 2),
        ("minifloat_denorm", 6, 3, 2.0**-5, 12),
        ("minifloat_denorm", 8, 4, 2.0**-10, 224),
    ],
)
def test_the_tables_of_the_documentation(family, width, exponent_width, smallest, largest):
    form = minifloat(family, width, exponent_width)
    assert form.bounds(torch.zeros(1)) == (-largest, largest)
    assert form.round(torch.tensor([0.51, 0.49, 1]) * torch.tensor([smallest, smallest, 2 * largest])).tolist() == [
        smallest,
        0,
        largest,
    ]


@FAMILIES
def test_a_grid_holds_a_narrow_minifloat_and_not_the_widest(family):
    grid = minifloat(family, 4, 2).grid
    assert not grid.complete
    assert grid.fixed_point is not None
    assert minifloat(family, 10, 7).grid is None


@pytest.mark.parametrize(
    ("chosen", "label"),
    [
        (("minifloat_ieee", 8, 4), "e4m3"),
        (("minifloat_ieee", 8, 4, 7), "e4m3"),
        (("minifloat_ieee", 8, 5, -3), "e5m2.b-3"),
        (("minifloat_ieee", 4, 3), "e3m0"),
        (("minifloat_ieee", 6, 2, "auto"), "e2m3.auto"),
        (("minifloat_denorm", 8, 4), "denorm-e4m3"),
        (("minifloat_denorm", 24, 5, -90), "denorm-e5m18.b-90"),
    ],
)
def test_labels(chosen, label):
    assert minifloat(*chosen).label == label


# --- the bias that is learned ----------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@FAMILIES
@given(st.integers(4, 8), st.integers(1, 4), st.sampled_from([1e-20, 1e-3, 1.0, 500.0, 1e12]), st.integers(0, 99))
@example(8, 4, 1.0, 0)
def test_an_automatic_bias_has_the_smallest_squared_error_of_all(family, width, exponent_width, spread, seed):
    exponent_width = min(exponent_width, width - 2)
    x = torch.tensor(np.random.default_rng(seed).standard_t(3, 300) * spread, dtype=torch.float32)
    form = minifloat(family, width, exponent_width, "auto").calibrated(x)

    def error(bias):
        rounded = minifloat(family, width, exponent_width, bias).round(x.double())
        return float(((rounded - x.double()) ** 2).sum())

    low, high = form.biases
    assert error(form.exponent_bias) == min(error(b) for b in range(max(low, -126), min(high, 127) + 1))


def test_of_biases_with_equal_errors_the_standard_one_is_taken_or_the_nearest_above():
    ones = torch.tensor([1.0, -1.0, 0.5])
    assert minifloat("minifloat_ieee", 8, 5, "auto").calibrated(ones).exponent_bias == 15
    assert minifloat("minifloat_ieee", 8, 5, "auto").calibrated(ones * 2.0**20).exponent_bias < 15


@FAMILIES
@pytest.mark.parametrize("sample", [[], [0.0], [math.nan, math.inf]])
def test_without_values_an_automatic_bias_is_the_standard_one(family, sample):
    assert minifloat(family, 8, 4, "auto").calibrated(torch.tensor(sample)).exponent_bias == 7


@FAMILIES
def test_values_that_are_not_finite_do_not_decide(family):
    x = torch.linspace(-3, 3, 101)
    odd = torch.cat([x, torch.tensor([math.inf, math.nan])])
    assert minifloat(family, 6, 3, "auto").calibrated(odd) == minifloat(family, 6, 3, "auto").calibrated(x)


@FAMILIES
def test_an_automatic_bias_must_be_calibrated(family):
    form = minifloat(family, 8, 4, "auto")
    for use in (form.round, form.quantize, form.bounds, lambda _: form.grid):
        with pytest.raises(FormatError, match="'auto' must be calibrated before it is used"):
            use(torch.ones(3))


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "chosen", "message", "parameter"),
    [
        ("minifloat_ieee", {"exponent_width": 4}, "needs 'width'", "width"),
        ("minifloat_ieee", {"width": 8}, "needs 'exponent_width'", "exponent_width"),
        ("minifloat_ieee", {"width": 16, "exponent_width": 8}, "allowed: a whole number from 1 to 7", "exponent_width"),
        ("minifloat_ieee", {"width": 4, "exponent_width": 4}, "leaves -1 bits of mantissa; possible: 0 to 23", None),
        ("minifloat_denorm", {"width": 5, "exponent_width": 4}, "leaves 0 bits of mantissa; possible: 1 to 24", None),
        ("minifloat_ieee", {"width": 32, "exponent_width": 4}, "leaves 27 bits of mantissa", None),
        (
            "minifloat_ieee",
            {"width": 8, "exponent_width": 4, "exponent_bias": -120},
            "exponent_bias = -120 has values that are no normal numbers of float32; the bias can be from -112 to 124",
            None,
        ),
        (
            "minifloat_ieee",
            {"width": 8, "exponent_width": 4, "exponent_bias": 200},
            "from -126 to 127",
            "exponent_bias",
        ),
        ("float16", {"width": 16}, "has no parameter 'width'", "width"),
    ],
)
def test_wrong_parameters_are_named(family, chosen, message, parameter):
    with pytest.raises(FormatError, match=message) as caught:
        FORMATS.get(family).parse(chosen, WEIGHT)
    assert caught.value.parameter == parameter


# --- formats that are dtypes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STANDARD)
@pytest.mark.parametrize("kind", [ACTIVATION, WEIGHT])
def test_standard_floats_conform(name, kind):
    check_format(name, {}, kind=kind)


@pytest.mark.parametrize("name", STANDARD)
@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
@example([65504.0, 65519.996, 65520.0, -65520.0, 3.4028235e38, 3.3961775e38, 6e-8, 3e-8, 1e-40, math.inf, math.nan])
def test_standard_floats_are_the_dtypes_of_torch(name, values):
    x = torch.tensor(values)
    ours, theirs = FORMATS.get(name)().round(x), x.to(STANDARD[name]).float()
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


@pytest.mark.parametrize(
    ("name", "digits", "smallest", "largest"), [("float16", 11, -24, 16), ("bfloat16", 8, -133, 128)]
)
@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=20), st.integers(1, 2**12), st.integers(-40, 10))
@example([65519.99999, 65520.0, 1 + 2**-11 + 2**-40, 3.3961775292304957e38, 1e-320], 1, 0)
def test_standard_floats_round_doubles_once(name, digits, smallest, largest, values, odd, scale):
    # A value just beside a tie: rounded to 32 bits first, it would become the tie.
    values = [*values, (odd + 0.5) * 2.0**scale * (1 + 2.0**-45)]

    def expected(v):
        if v == 0 or math.isinf(v):
            return v
        step = Fraction(2) ** max(math.frexp(v)[1] - digits, smallest)
        result = round(Fraction(v) / step) * step
        return math.copysign(math.inf, v) if abs(result) >= Fraction(2) ** largest else float(result)

    x = torch.tensor(values, dtype=torch.float64)
    assert FORMATS.get(name)().round(x).tolist() == [expected(v) for v in values]


@pytest.mark.parametrize(
    ("largest", "message"), [(65504.0, "a huge value does not become"), (1e3, "out of its bounds")]
)
def test_the_conformance_suite_notices_where_infinities_are_not_what_was_said(largest, message, monkeypatch):
    family = FORMATS.get("float16")
    if largest == 65504.0:  # it saturates, but its bounds are infinite
        before = family.round
        monkeypatch.setattr(family, "round", lambda self, x: before(self, x.clamp(-largest, largest)))
    else:
        monkeypatch.setattr(family, "bounds", lambda self, x: (-largest, largest))
        monkeypatch.setattr(family, "quantize", Format.quantize)
    with pytest.raises(AssertionError, match=message):
        check_format("float16", {})


def test_infinities_have_gradients():
    x = torch.tensor([1e6, -math.inf, 0.1], requires_grad=True)
    out = FORMATS.get("float16")().quantize(x)
    assert out[:2].tolist() == [math.inf, -math.inf]
    out[2].backward()
    assert x.grad.tolist() == [0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_binade_is_what_frexp_says(dtype):
    x = torch.randn(1000, dtype=dtype, generator=torch.Generator().manual_seed(0)) ** 9
    assert torch.equal(binade(x), torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 1))
