"""Formats with shared exponents and scales, and logarithmic ones: the conformance suite, and references in exact
rationals and of ml_dtypes that share no code with them."""

import itertools
import math
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitfront.formats import FORMATS
from bitfront.formats.base import ACTIVATION, BIAS, WEIGHT, FormatError
from bitfront.formats.blocks import block_of, number_of_blocks
from bitfront.formats.grid import WHOLE, common_grid
from bitfront.formats.mx import ELEMENTS
from bitfront.kernels.scaled import binade, largest, spread
from bitfront.testing.formats import check_format

kinds = st.sampled_from([ACTIVATION, WEIGHT, BIAS])
sizes = st.lists(st.integers(1, 40), min_size=1, max_size=3)
spreads = st.sampled_from([1e-3, 1.0, 30.0])
WIDTHS = {e.name: {"width": w, "exponent_width": x} for (w, x), e in ELEMENTS.items()}


def floats(lowest=-60, highest=60):
    """Numbers of float32 with magnitudes that float32 has no trouble with, ties and powers of two among them."""
    mantissas = st.one_of(st.integers(0, 64), st.integers(0, 2**24 - 1))
    return st.builds(
        lambda m, e, s: float(s * m * Fraction(2) ** (e - m.bit_length())),
        mantissas,
        st.integers(lowest, highest),
        st.sampled_from([1, -1]),
    )


def rows(min_size=1, max_size=40):
    return st.lists(floats(), min_size=min_size, max_size=max_size)


def parsed(name, kind=WEIGHT, **settings):
    return FORMATS.get(name).parse(settings, kind)


def floor_log2(x: Fraction) -> int:
    """By comparison alone."""
    k = x.numerator.bit_length() - x.denominator.bit_length()
    while Fraction(2) ** k > x:
        k -= 1
    while Fraction(2) ** (k + 1) <= x:
        k += 1
    return k


def clamp(x, low, high):
    return min(max(x, low), high)


def assert_rounds(form, values, reference):
    """That `form` rounds the values of one block as `reference(values)`, in both precisions."""
    exact = [Fraction(v) for v in values]
    expected = [float(r) for r in reference(exact)]
    for dtype in (torch.float32, torch.float64):
        assert form.round(torch.tensor(values, dtype=dtype)).tolist() == expected


# --- conformance -----------------------------------------------------------------------------------------------------


@given(st.integers(2, 24), st.integers(1, 8), sizes, kinds, spreads)
def test_block_fp_conforms(width, exponent_width, size, kind, spread):
    settings = {"width": width, "exponent_width": exponent_width, "exponent_bias": "NA", "block_size": size}
    check_format("block_fp", settings, kind=kind, spread=spread, elementwise=False)


@given(st.integers(3, 16), st.integers(1, 7), st.integers(1, 8), sizes, kinds)
def test_block_minifloat_conforms(width, exponent_width, bias_width, size, kind):
    exponent_width = min(exponent_width, width - 2)
    settings = {"width": width, "exponent_width": exponent_width, "exponent_bias_width": bias_width, "block_size": size}
    check_format("block_minifloat", settings, kind=kind, elementwise=False)


@given(st.sampled_from(list(WIDTHS)), st.sampled_from([-2, -1, 1, "NA"]), kinds)
def test_mx_conforms(element, axis, kind):
    check_format("mx", {**WIDTHS[element], "axis": axis}, kind=kind, elementwise=False, positional=axis != "NA")


@given(st.integers(2, 8), st.one_of(st.just("NA"), st.integers(-2, 60)), kinds, spreads)
def test_log_conforms(width, bias, kind, spread):
    bias = bias if width < 8 or bias == "NA" else 60
    check_format("log", {"width": width, "exponent_bias": bias}, kind=kind, spread=spread, nearest=False)


@given(st.integers(2, 8), st.integers(1, 8), sizes, kinds)
def test_block_log_conforms(width, bias_width, size, kind):
    settings = {"width": width, "exponent_bias_width": bias_width, "block_size": size}
    check_format("block_log", settings, kind=kind, elementwise=False)


# --- values ----------------------------------------------------------------------------------------------------------


@given(rows(), st.integers(2, 16), st.integers(1, 8), st.integers(-20, 140))
def test_block_fp_is_its_definition_in_rationals(values, width, exponent_width, bias):
    try:
        form = parsed("block_fp", width=width, exponent_width=exponent_width, exponent_bias=bias, block_size=[64])
    except FormatError as error:
        assert "float32" in str(error)
        return

    def reference(block):
        top = max(map(abs, block))
        low, high = -bias, 2**exponent_width - 1 - bias
        shared = clamp(floor_log2(top) + 1, low, high) if top else low
        step = Fraction(2) ** max(shared - width + 1, -126)
        most = 2 ** (width - 1) - 1
        return [clamp(round(x / step), -most, most) * step for x in block]

    assert_rounds(form, values, reference)


def nearest_float(x: Fraction, lowest: int, highest: int, mantissa: int, end: Fraction) -> Fraction:
    exponent = clamp(floor_log2(abs(x)), lowest, highest) if x else lowest
    step = Fraction(2) ** max(exponent - mantissa, -126)
    return clamp(round(x / step) * step, -end, end)


@given(rows(), st.integers(3, 12), st.integers(1, 7), st.integers(1, 8))
def test_block_minifloat_is_its_definition_in_rationals(values, width, exponent_width, bias_width):
    exponent_width = min(exponent_width, width - 2)
    settings = {"width": width, "exponent_width": exponent_width, "exponent_bias_width": bias_width}
    form, m = parsed("block_minifloat", **settings, block_size=[64]), width - 1 - exponent_width

    def reference(block):
        top, most = max(map(abs, block)), 2**exponent_width - 1
        largest_bias = min(2**bias_width - 1, most + 126 - m)
        bias = clamp(most - floor_log2(top), 0, largest_bias) if top else largest_bias
        end = Fraction(2) ** (most - bias) * (2 - Fraction(1, 2**m))
        return [nearest_float(x, 1 - bias, most - bias, m, end) for x in block]

    assert_rounds(form, values, reference)


def log_value(x: Fraction, low: int, high: int) -> Fraction:
    """sign · 2^round(log2 |x|), by comparing squares: |x| > √2 · 2^k where x² > 2 · 4^k."""
    if not x:
        return x
    k = floor_log2(abs(x))
    k += x * x > 2 * Fraction(4) ** k
    return Fraction(0) if k < low else Fraction(math.copysign(1, x)) * Fraction(2) ** min(k, high)


@given(rows(max_size=8), st.integers(2, 7), st.integers(-30, 60))
def test_log_is_its_definition_in_rationals(values, width, bias):
    form = parsed("log", width=width, exponent_bias=bias)
    assert_rounds(form, values, lambda xs: [log_value(x, 1 - bias, 2 ** (width - 1) - 1 - bias) for x in xs])


@given(rows(), st.integers(2, 8), st.integers(1, 8))
def test_block_log_is_its_definition_in_rationals(values, width, bias_width):
    form = parsed("block_log", width=width, exponent_bias_width=bias_width, block_size=[64])

    def reference(block):
        top, most = max(map(abs, block)), 2 ** (width - 1) - 1
        largest_bias = min(2**bias_width - 1, 127)
        ceiling = -floor_log2(1 / top) if top else -1000
        bias = clamp(most - ceiling, 0, largest_bias)
        return [log_value(x, 1 - bias, most - bias) for x in block]

    assert_rounds(form, values, reference)


@pytest.mark.parametrize("root", [math.sqrt(2), math.nextafter(math.sqrt(2), 0)])
def test_exponents_are_rounded_at_the_root_of_two(root):
    expected = 4.0 if Fraction(root) ** 2 > 2 else 2.0
    assert parsed("log", width=5).round(torch.tensor(2 * root, dtype=torch.float64)) == expected


ML = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}


@pytest.mark.parametrize("element", ML)
def test_the_table_of_elements_is_that_of_ml_dtypes(element):
    facts, entry = ml_dtypes.finfo(ML[element]), ELEMENTS[tuple(WIDTHS[element].values())]
    assert (entry.largest, entry.mantissa, entry.emin) == (float(facts.max), facts.nmant, facts.minexp)
    assert entry.emax == floor_log2(Fraction(float(facts.max)))


@given(rows(max_size=32), st.sampled_from(list(ML)))
def test_mx_elements_are_those_of_ml_dtypes(values, element):
    top = max(abs(v) for v in values)
    entry = ELEMENTS[tuple(WIDTHS[element].values())]
    scale = 2.0 ** clamp(math.frexp(top)[1] - 1 - entry.emax if top else -126, -126, 127)
    stored = np.clip(np.array(values) / scale, -entry.largest, entry.largest).astype(ML[element])
    expected = (stored.astype(np.float64) * scale).tolist()
    form = parsed("mx", **WIDTHS[element])
    for dtype in (torch.float32, torch.float64):
        out = form.round(torch.tensor(values, dtype=dtype)).tolist()
        near = [abs(e) >= 2.0**-126 for e in expected]  # float32's subnormal numbers are not used
        assert [o for o, n in zip(out, near, strict=True) if n] == [e for e, n in zip(expected, near, strict=True) if n]


@given(rows(max_size=32))
def test_mxint8_is_its_definition_in_rationals(values):
    def reference(block):
        top = max(map(abs, block))
        scale = Fraction(2) ** max(floor_log2(top), -120) if top else Fraction(2) ** -120
        return [Fraction(clamp(round(x / scale * 64), -127, 127), 64) * scale for x in block]

    assert_rounds(parsed("mx", width=8, exponent_width=0), values, reference)


def test_every_code_of_an_element_is_a_value():
    for element, dtype in ML.items():
        bits = WIDTHS[element]["width"]
        codes = np.arange(2**bits, dtype=np.uint8).view(dtype).astype(np.float64)
        finite = torch.from_numpy(codes[np.isfinite(codes)])
        # In a block whose largest value is the element's largest one, the scale is 1.
        parts = [finite[i : i + 31].tolist() for i in range(0, len(finite), 31)]
        blocks = [[*part, float(finite.max())] for part in parts]
        for block in blocks:
            assert parsed("mx", **WIDTHS[element]).round(torch.tensor(block)).tolist() == block


def test_zero_is_held_by_every_one():
    for name, settings in SETTINGS.items():
        form = parsed(name, **settings)
        assert form.round(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]
        assert form.round(torch.zeros(3)).tolist() == [0.0] * 3


def test_what_is_no_number_does_not_spread():
    for name, settings in SETTINGS.items():
        out = parsed(name, **settings).round(torch.tensor([math.nan, 1.0, -0.5]))
        assert out.isnan().tolist() == [True, False, False]
        assert out[1:].tolist() == [1.0, -0.5]
        infinite = parsed(name, **settings).round(torch.tensor([math.inf, -math.inf]))
        assert infinite.isfinite().all()
        assert infinite[0] == -infinite[1] == infinite.max()


# --- blocks ----------------------------------------------------------------------------------------------------------

SETTINGS = {
    "block_fp": {"width": 8, "exponent_width": 8, "block_size": [1, 16]},
    "block_minifloat": {"width": 8, "exponent_width": 4, "exponent_bias_width": 8, "block_size": [1, 16]},
    "mx": {"width": 8},
    "log": {"width": 6},
    "block_log": {"width": 6, "exponent_bias_width": 8, "block_size": [1, 16]},
}


@pytest.mark.parametrize(
    ("shape", "size", "samples", "block"),
    [
        ((64, 48), (1, 16), False, (1, 16)),
        ((64, 48), (16,), False, (WHOLE, 16)),
        ((64, 48), (16,), True, (1, 16)),
        ((64, 48), (8, 64), True, (1, WHOLE)),
        ((64, 48), (2, 1, 64), False, (1, WHOLE)),
        ((48,), (1, 16), False, (16,)),
        ((48,), (1, 16), True, (1,)),
        ((5, 8, 3, 3), (4, 3, 3), False, (WHOLE, 4, WHOLE, WHOLE)),
        ((5, 8, 3, 3), (4, 3, 3), True, (1, 4, WHOLE, WHOLE)),
        ((), (16,), True, ()),
    ],
)
def test_the_block_is_aligned_with_the_last_dimension(shape, size, samples, block):
    assert block_of(shape, size, samples) == block


@given(st.lists(st.integers(0, 7), max_size=4), sizes, st.booleans(), st.randoms(use_true_random=False))
def test_the_largest_value_of_each_block_is_found_and_spread(shape, size, samples, random):
    block = block_of(shape, size, samples)
    x = torch.tensor([random.uniform(-9, 9) for _ in range(math.prod(shape))], dtype=torch.float64).reshape(shape)
    expected = torch.zeros(shape, dtype=torch.float64)
    inside = [n if s == WHOLE else s for n, s in zip(shape, block, strict=True)]
    blocks = set()
    for place in itertools.product(*map(range, shape)):
        corner = [i // s * s for i, s in zip(place, inside, strict=True)]
        blocks.add(tuple(corner))
        part = x[tuple(slice(c, c + s) for c, s in zip(corner, inside, strict=True))]
        expected[place] = part.abs().max()
    assert torch.equal(spread(largest(x, block), shape, block).expand(shape), expected)
    assert not x.numel() or number_of_blocks(shape, block) == len(blocks)


@given(floats(-126, 127))
def test_the_binade_is_that_of_frexp(x):
    for dtype in (torch.float32, torch.float64):
        value = torch.tensor(x, dtype=dtype)
        exact = 0.0 if x == 0 else math.ldexp(1.0, math.frexp(x)[1] - 1)
        assert binade(value).item() == (exact if exact >= 2.0**-126 or dtype == torch.float64 else 0.0)


@pytest.mark.parametrize("shape", [(64, 48), (3, 70), (10,), (8, 40, 3, 3)])
def test_a_block_of_mx_lies_along_the_sums(shape):
    x = torch.zeros(shape)
    x[(0,) * len(shape)] = 2.0**30  # makes the small values of its block vanish
    for dim in range(len(shape)):
        x[(0,) * dim + (1,) + (0,) * (len(shape) - dim - 1)] = 1.0
    out = parsed("mx", width=4).round(x)
    axis = 1 if len(shape) == 4 else len(shape) - 1
    kept = [float(out[(0,) * dim + (1,) + (0,) * (len(shape) - dim - 1)]) for dim in range(len(shape))]
    assert kept == [0.0 if dim == axis else 1.0 for dim in range(len(shape))]


@pytest.mark.parametrize(
    ("name", "kind", "shape", "bits"),
    [
        ("mx", WEIGHT, (64, 64), 64 * 2 * 8),
        ("mx", WEIGHT, (64, 65), 64 * 3 * 8),
        ("mx", WEIGHT, (5, 40, 3, 3), 5 * 2 * 9 * 8),
        ("mx", BIAS, (40,), 2 * 8),
        ("block_fp", WEIGHT, (64, 64), 64 * 4 * 8),
        ("block_fp", ACTIVATION, (64, 17), 64 * 2 * 8),
        ("block_minifloat", BIAS, (17,), 2 * 8),
        ("block_log", WEIGHT, (3, 5), 3 * 8),
        ("log", WEIGHT, (64, 64), 0),
    ],
)
def test_shared_exponents_are_counted(name, kind, shape, bits):
    assert parsed(name, kind, **SETTINGS[name]).overhead_bits(shape) == bits


@given(rows())
def test_the_common_grid_is_the_coarsest(values):
    x = torch.tensor(values)
    grid = common_grid(x)
    if grid is None:
        return
    codes = [Fraction(v) / Fraction(grid.step) for v in values]
    assert all(c.denominator == 1 for c in codes)
    assert max(map(abs, codes)) == grid.high == -grid.low
    assert not any(codes) or any(c.numerator % 2 for c in codes)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("block_fp", {"width": 8, "exponent_width": 8}, "needs 'block_size'"),
        ("block_fp", {**SETTINGS["block_fp"], "block_size": 16}, "allowed: a list of whole numbers from 1 to 65536"),
        ("block_fp", {**SETTINGS["block_fp"], "block_size": []}, "a list of whole numbers"),
        ("block_fp", {**SETTINGS["block_fp"], "block_size": [0]}, "a list of whole numbers"),
        ("block_fp", {**SETTINGS["block_fp"], "block_size": [True]}, "a list of whole numbers"),
        ("block_fp", {**SETTINGS["block_fp"], "width": [8]}, "allowed: a whole number from 2 to 24"),
        ("block_fp", {**SETTINGS["block_fp"], "exponent_width": 1, "exponent_bias": 255}, "no exponent that float32"),
        ("block_minifloat", {**SETTINGS["block_minifloat"], "exponent_width": 7}, "leaves no mantissa"),
        ("mx", {"width": 5}, "MX has no element of 5 bits; it has e4m3"),
        ("mx", {"width": 8, "exponent_width": 2}, "no element of 8 bits with exponent_width = 2"),
        ("log", {"width": 8, "exponent_bias": -60}, "float32 has -126 to 127"),
    ],
)
def test_what_is_not_possible_is_said(name, settings, message):
    with pytest.raises(FormatError, match=message):
        parsed(name, **settings)


def test_an_axis_of_samples_is_refused():
    assert parsed("mx", width=8, axis=0).label == "mx-e4m3.0"
    with pytest.raises(FormatError, match="axis = 0 is not possible: it is the samples"):
        parsed("mx", ACTIVATION, width=8, axis=0)


def test_labels_are_short_and_differ():
    assert parsed("block_fp", **SETTINGS["block_fp"]).label == "bfp8e8-1x16"
    assert parsed("block_fp", **{**SETTINGS["block_fp"], "exponent_bias": 100}).label == "bfp8e8b100-1x16"
    assert parsed("block_fp", **{**SETTINGS["block_fp"], "block_size": [64, 64, 64, 64]}).label == "bfp8e8-64x64x64x64"
    assert (
        parsed("block_fp", **{**SETTINGS["block_fp"], "block_size": [6400, 640, 64, 64]}).label == "bfp8e8-16777216000"
    )
    assert parsed("block_minifloat", **SETTINGS["block_minifloat"]).label == "bm-e4m3b8-1x16"
    assert parsed("log", width=5, exponent_bias=3).label == "log5b3"
    assert parsed("log", width=5).label == "log5"


def test_the_table_of_the_documents_is_true():
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    table = page.split("### What they do to six values")[1].split("|\n\n")[0].strip().splitlines()[2:]
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    numbers = [[float(c.replace("−", "-")) for c in row[1:]] for row in (header, *lines)]
    given = torch.tensor(numbers[0])
    known = {"e4m3": 4, "int8": 0, "e2m3": 2, "e2m1": 2}
    for (title, *_), expected in zip(lines, numbers[1:], strict=True):
        name, bits, *element = title.split(", ")
        settings = {**SETTINGS[name.strip("`")], "width": int(bits.split()[0])}
        if element:
            settings["exponent_width"] = known[element[-1]]
        assert parsed(name.strip("`"), **settings).round(given).tolist() == expected
    assert len(lines) == 8
