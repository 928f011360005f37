"""Number formats: the conformance suite on random settings, and references that share no code with them."""

from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from bitfront.formats import FORMATS
from bitfront.formats.affine import Affine
from bitfront.formats.base import (
    ACTIVATION,
    BIAS,
    CALIBRATION_VALUES,
    WEIGHT,
    FormatError,
    finite,
    percentile_range,
    thinned,
)
from bitfront.formats.grid import Grid
from bitfront.formats.integer import HIGHEST_FRAC_WIDTH, LOWEST_FRAC_WIDTH, Integer, LearnedInteger
from bitfront.testing.formats import check_format

kinds = st.sampled_from([ACTIVATION, WEIGHT])


@st.composite
def integer_settings(draw, widest=24):
    width = draw(st.integers(1, widest))
    frac = draw(st.one_of(st.sampled_from(["NA", "auto", "minmax", "percentile", width]), st.integers(-20, 40)))
    return {"width": width, "frac_width": frac, "signed": draw(st.sampled_from([True, False, "NA"]))}


affine_settings = st.fixed_dictionaries(
    {"width": st.integers(2, 16)},
    optional={
        "symmetric": st.sampled_from([True, False, "NA"]),
        "granularity": st.sampled_from(["tensor", "channel", "NA"]),
        "range": st.sampled_from(["minmax", "percentile", "mse", "auto", "NA"]),
    },
)


@given(integer_settings(), kinds, st.booleans(), st.sampled_from([0.01, 1.0, 30.0]))
def test_integer_conforms(settings, kind, signed, spread):
    check_format("integer", settings, kind=kind, signed=signed, spread=spread)


@given(affine_settings, kinds, st.booleans(), st.sampled_from([0.01, 1.0, 30.0]))
def test_affine_conforms(settings, kind, signed, spread):
    check_format("affine", settings, kind=kind, signed=signed, spread=spread)


def test_every_registered_format_is_checked_here():
    floats = {"minifloat_ieee", "minifloat_denorm", "float16", "bfloat16", "float32"}  # test_floats.py
    few_bits = {"binary", "binary_residual", "nf4", "ternary"}  # test_few_bits.py
    blocks = {"block_fp", "block_log", "block_minifloat", "log", "mx"}  # test_blocks.py
    learned = {"fixed_map"}  # test_fixed_map.py
    assert set(FORMATS.names()) == {"integer", "affine"} | learned | floats | few_bits | blocks
    assert FORMATS.get("fixed") is FORMATS.get("Int") is Integer


class Faulty(Integer):
    """Breaks one promise at a time, to see the suite notice."""

    fault = ""

    def round(self, x):
        out = super().round(x)
        if self.fault == "idempotent":
            return out / 2
        if self.fault == "purity":
            x.zero_()
        if self.fault == "monotone":
            return -out
        if self.fault == "nearest":
            return super().round(x - 0.3 * 2.0 ** -self._frac())
        return out

    @property
    def grid(self):
        step, (low, high) = 2.0 ** -self._frac(), self.codes
        return {
            "coarse grid": Grid(2 * step, low, high, complete=False),
            "narrow grid": Grid(step, low, high - 1, complete=False),
            "fine grid": Grid(step / 2, 2 * low, 2 * high),
        }.get(self.fault, super().grid)

    def learned_range(self):
        if self.fault == "other range":
            return LearnedInteger(replace(self, frac_width=self.frac_width + 1))
        learned = super().learned_range()
        if self.fault == "other kind":
            learned.frozen = lambda: Integer(self.width, self.frac_width)
        return learned


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("idempotent", "rounding a second time"),
        ("purity", "changes its input"),
        ("monotone", "rounding a second time|monotone|gradient"),
        ("nearest", "nearest|rounding a second time|symmetr|huge"),
        ("coarse grid", "a value is not on its grid"),
        ("narrow grid", "a value is not on its grid"),
        ("fine grid", "rounds differently from its grid"),
        ("other range", "its learned range rounds differently before training"),
        ("other kind", "its learned range becomes Integer"),
    ],
)
def test_the_conformance_suite_notices(fault, message, monkeypatch):
    FORMATS.names()
    monkeypatch.setitem(FORMATS._members, "integer", ("integer", Faulty))
    monkeypatch.setattr(Faulty, "fault", fault)
    with pytest.raises(AssertionError, match=message):
        check_format("integer", {"width": 6, "frac_width": 3})


@dataclass(frozen=True)
class Forgetful(Integer):
    """What it learned is lost, or cannot be written."""

    table: object = None
    learned: float = field(default=0.0, init=False)

    @classmethod
    def _build(cls, values, kind, signed):
        parsed = cls(values["width"], values["frac_width"])
        if values["width"] == 5:
            object.__setattr__(parsed, "learned", 0.5)
        return replace(parsed, table=frozenset([1])) if values["width"] == 6 else parsed


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (4, None),
        (5, r"read from a run folder it is Forgetful\(.*learned=0.0\)"),
        (6, "has a field that JSON cannot hold: Object of type frozenset"),
    ],
)
def test_what_a_run_folder_would_lose_is_noticed(width, message, formats):
    formats.register("forgetful")(Forgetful)
    if message is None:
        check_format("forgetful", {"width": width, "frac_width": 2})
        return
    with pytest.raises(AssertionError, match=message):
        check_format("forgetful", {"width": width, "frac_width": 2})


# --- integer ---------------------------------------------------------------------------------------------------------


def fixed_point(x: float, width: int, frac: int, signed: bool) -> float:
    """The definition in docs/formats.md, in whole numbers: round() of a Fraction is exact, and half to even."""
    low, high = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if signed else (0, 2**width - 1)
    code = min(max(round(Fraction(x) * Fraction(2) ** frac), low), high)
    return float(Fraction(code) / Fraction(2) ** frac)


@st.composite
def widths_and_values(draw, widest, bits):
    width = draw(st.integers(1, widest))
    frac = draw(st.integers(LOWEST_FRAC_WIDTH, HIGHEST_FRAC_WIDTH))
    tie = st.integers(-(2**14), 2**14).map(lambda k: (k + 0.5) * 2.0**-frac)
    value = st.one_of(tie, st.floats(-300, 300, width=bits), st.floats(allow_nan=False, width=bits))
    return width, frac, draw(st.booleans()), draw(st.lists(value, min_size=1, max_size=20))


@pytest.mark.parametrize(("dtype", "widest", "bits"), [(torch.float32, 24, 32), (torch.float64, 32, 64)])
def test_integer_is_exactly_fixed_point_arithmetic(dtype, widest, bits):
    @given(widths_and_values(widest, bits))
    @example((8, 4, True, [0.03125, 0.09375, -0.03125, -0.09375, 7.96875, -8.03125]))
    def check(case):
        width, frac, signed, values = case
        x = torch.tensor(values, dtype=dtype)
        finite = [v if np.isfinite(v) else np.copysign(1e300, v) for v in x.tolist()]
        expected = [fixed_point(v, width, frac, signed) for v in finite]
        assert Integer(width, frac, signed).round(x).tolist() == expected

    check()


@pytest.mark.parametrize("width", range(1, 33))
def test_frac_width_na_is_half_the_width(width):
    na, given_ = (Integer.parse({"width": width, **f}, WEIGHT) for f in ({"frac_width": "NA"}, {}))
    assert na == given_ == Integer(width, width // 2, True)


@pytest.mark.parametrize(
    ("signed", "setting", "expected"), [(True, "NA", True), (False, "NA", False), (False, True, True)]
)
def test_signed_na_follows_the_tensor(signed, setting, expected):
    settings = {"width": 8, "signed": setting}
    assert Integer.parse(settings, ACTIVATION, signed=signed).signed is expected


@given(st.integers(2, 12), st.booleans(), st.sampled_from([1e-20, 1e-6, 0.02, 1.0, 500.0, 1e12]), st.integers(0, 99))
def test_frac_width_auto_has_the_smallest_squared_error_of_all(width, signed, spread, seed):
    x = np.random.default_rng(seed).normal(0, spread, 300).astype(np.float32).astype(np.float64)
    low, high = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if signed else (0, 2**width - 1)
    fracs = range(LOWEST_FRAC_WIDTH, HIGHEST_FRAC_WIDTH + 1)
    errors = [((np.clip(np.rint(x * 2.0**f), low, high) / 2.0**f - x) ** 2).sum() for f in fracs]
    frac_width = Integer(width, "auto", signed).calibrated(torch.tensor(x, dtype=torch.float32)).frac_width
    assert frac_width == fracs[int(np.argmin(errors))]


def squared_error(form, x):
    return float(((form.round(x.double()) - x.double()) ** 2).sum())


@given(st.integers(2, 12), st.booleans(), st.sampled_from([1e-20, 1e-6, 0.02, 1.0, 500.0, 1e12]), st.integers(0, 99))
def test_frac_widths_by_rule_are_what_the_rule_says(width, signed, spread, seed):
    x = torch.tensor(np.random.default_rng(seed).standard_t(2, 5000) * spread, dtype=torch.float32)
    auto, minmax, percentile = (Integer(width, r, signed).calibrated(x) for r in ("auto", "minmax", "percentile"))
    low, high = minmax.codes
    # An unsigned format is there for what is not negative.
    seen = (x if signed else x.relu()).double()

    def saturating(frac):
        codes = torch.round(seen * 2.0**frac)
        return float(((codes < low) | (codes > high)).double().mean())

    assert saturating(minmax.frac_width) == 0
    assert saturating(minmax.frac_width + 1) > 0
    assert saturating(percentile.frac_width) <= 0.001
    assert percentile.frac_width >= minmax.frac_width
    # To both sides alike: where the next frac width saturates no more than one in a thousand, one end alone is full.
    reach = seen.abs().kthvalue(4995).values
    ends = torch.stack([seen.min().clamp(min=-reach), seen.max().clamp(max=reach)])
    ends = torch.round(ends * 2.0 ** (percentile.frac_width + 1))
    assert ends[0] < low or ends[1] > high
    assert squared_error(auto, x) <= min(squared_error(minmax, x), squared_error(percentile, x))


def test_an_outlier_takes_bits_from_minmax_and_not_from_percentile():
    x = torch.cat([torch.linspace(-0.9, 0.9, 5000), torch.tensor([100.0])])
    fracs = {rule: Integer(8, rule).calibrated(x).frac_width for rule in ("minmax", "percentile")}
    assert fracs == {"minmax": 0, "percentile": 7}


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1001, 2000])
def test_a_percentile_cuts_one_in_a_thousand_and_nothing_off_fewer(count):
    if not count:
        assert Integer(8, "percentile").calibrated(torch.zeros(0)).frac_width == 4
        return
    x = -torch.arange(1.0, count + 1)
    assert percentile_range(x, x) == (-float(count - count // 1000), -1.0)


RULES = [
    *(
        Integer(8, rule, signed, granularity, axis)
        for rule in ("auto", "minmax", "percentile")
        for signed in (True, False)
        for granularity, axis in (("tensor", 0), ("channel", 0), ("channel", 1))
    ),
    *(
        Affine.parse({"width": 8, "range": rule, "granularity": granularity}, kind)
        for rule in ("mse", "minmax", "percentile")
        for granularity in ("tensor", "channel")
        for kind in (WEIGHT, ACTIVATION)
    ),
]
rules = pytest.mark.parametrize("form", RULES, ids=lambda form: form.label)


@rules
@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf, np.nan]])
def test_finite_values_alone_decide_and_the_others_saturate(form, bad):
    alone = torch.randn(6, 50, generator=torch.Generator().manual_seed(3))
    both = torch.cat([alone, torch.tensor(bad).repeat(6, 100)], 1)
    if getattr(form, "axis", 0) == 1:
        alone, both = alone.T.contiguous(), both.T.contiguous()
    found = form.calibrated(both)
    assert found == form.calibrated(alone)
    low, high = (torch.as_tensor(b).expand_as(both) for b in found.bounds(both))
    out = found.round(both)
    assert torch.equal(out[both == np.inf], high[both == np.inf])
    assert torch.equal(out[both == -np.inf], low[both == -np.inf])
    assert torch.equal(out.isnan(), both.isnan())


@rules
@pytest.mark.parametrize("value", [0.0, 0.75, -0.75, np.nan, np.inf])
@pytest.mark.parametrize("shape", [(6, 7), (6, 1), (6, 0), (0, 6)])
def test_tensors_without_variety_are_fine(form, value, shape):
    x = torch.full(shape, value)
    found = form.calibrated(x)
    assert torch.equal(found.round(torch.zeros(shape)), torch.zeros(shape))
    if np.isfinite(value):
        expected = x.relu() if getattr(found, "signed", True) is False else x
        assert torch.allclose(found.round(x), expected, atol=0.01 * abs(value))


def test_finite_values_keep_their_order_and_nothing_else_does():
    x = torch.tensor([[1.0, np.inf, 3.0], [np.nan, -np.inf, -2.0]])
    assert finite(x).tolist() == [1.0, 3.0, -2.0]
    assert finite(x[:0]).tolist() == []


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**-12, 2.0**-6, 1.0, 2.0**10, 2.0**60])
@pytest.mark.parametrize("rule", ["auto", "minmax", "percentile"])
@pytest.mark.parametrize("width", [2, 4, 8, 16])
def test_what_a_frac_width_becomes_follows_the_size_of_a_tensor(width, rule, scale):
    x = torch.randn(3000, generator=torch.Generator().manual_seed(width))
    one, scaled = Integer(width, rule).calibrated(x), Integer(width, rule).calibrated(x * scale)
    assert scaled.frac_width == one.frac_width - int(np.log2(scale))
    assert torch.equal(scaled.round(x * scale), one.round(x) * scale)


def test_a_tensor_of_zeros_with_few_outliers_keeps_them_under_a_percentile():
    x = torch.zeros(5000)
    x[17] = 3.0
    for form in (Integer(8, "percentile"), Affine.parse({"width": 8, "range": "percentile"}, ACTIVATION)):
        assert form.calibrated(x).round(x)[17] == pytest.approx(3.0, rel=0.01)
    many = torch.zeros(50 * CALIBRATION_VALUES)
    many[17] = 3.0  # not among those that are drawn
    assert Integer(8, "auto").calibrated(many).round(many)[17] == 3.0


def test_rules_have_different_names_in_tables():
    labels = [Integer(8, rule).label for rule in (4, "auto", "minmax", "percentile")]
    labels += [Affine.parse({"width": 8, "range": r}, WEIGHT).label for r in ("minmax", "percentile", "mse")]
    assert labels == [
        *("int8.4", "int8.auto", "int8.minmax", "int8.percentile"),
        *("affine8sc", "affine8sc-p99.9", "affine8sc-mse"),
    ]


# --- affine ----------------------------------------------------------------------------------------------------------


@st.composite
def affine_cases(draw):
    width = draw(st.integers(2, 16))
    form = Affine.parse(
        {
            "width": width,
            "symmetric": draw(st.booleans()),
            "granularity": draw(st.sampled_from(["tensor", "channel"])),
            "range": draw(st.sampled_from(["minmax", "percentile", "mse"])),
        },
        draw(kinds),
    )
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    shift, scale = draw(st.sampled_from([0.0, 2.0, -30.0])), draw(st.sampled_from([1e-3, 1.0, 1e3]))
    sample = torch.tensor(rng.normal(shift, scale, (5, 4, 6)), dtype=torch.float32)
    x = torch.tensor(rng.normal(shift, 2 * scale, (5, 4, 6)), dtype=torch.float32)
    return form.calibrated(sample), sample, x


@given(affine_cases())
def test_affine_is_onnx_quantize_linear_and_dequantize_linear(case):
    form, _, x = case
    axis = 1 if form.axis == 1 else 0
    shape = [-1 if d == axis else 1 for d in range(3)] if form.granularity == "channel" else [1]
    scale = np.array(form.scale, dtype=np.float32).reshape(shape)
    zero = np.array(form.zero_point, dtype=np.float32).reshape(shape)
    low, high = (-(2 ** (form.width - 1)), 2 ** (form.width - 1) - 1) if form.symmetric else (0, 2**form.width - 1)
    stored = np.clip(np.rint(x.numpy() / scale) + zero, low, high)
    np.testing.assert_array_equal(form.round(x).numpy(), (stored - zero) * scale)


@given(affine_cases())
def test_affine_agrees_with_torch_fake_quantize(case):
    form, _, x = case
    low, high = form.codes
    if form.granularity == "tensor":
        theirs = torch.fake_quantize_per_tensor_affine(x, form.scale[0], form.zero_point[0], low, high)
        scale = torch.tensor(form.scale[0])
    else:
        zero = torch.tensor(form.zero_point, dtype=torch.int32)
        theirs = torch.fake_quantize_per_channel_affine(x, torch.tensor(form.scale), zero, form.axis, low, high)
        scale = torch.tensor(form.scale).reshape([-1 if d == form.axis else 1 for d in range(3)])
    ours = form.round(x)
    # torch multiplies by 1/scale and rounds after adding the zero point: values at a tie may go the other way.
    code = (x / scale).double()
    to_tie = ((code - code.floor()) - 0.5).abs()
    at_tie = to_tie <= 2.0**-20 * (code.abs() + max(map(abs, form.zero_point)) + 1)
    steps = ((ours - theirs) / scale).abs()
    assert steps[~at_tie].max() < 1e-2
    assert steps.max() < 1.01


@given(affine_cases())
def test_affine_represents_zero_and_minmax_reaches_the_whole_sample(case):
    form, sample, _ = case
    assert torch.equal(form.round(torch.zeros(5, 4, 6)), torch.zeros(5, 4, 6))
    if form.range == "minmax":
        low, high = form.bounds(sample)
        step = torch.tensor(form.scale).max()
        slack = step * (0.5 + 1e-3)
        assert bool(((sample >= low - slack) & (sample <= high + slack)).all())


def test_affine_mse_is_never_worse_than_minmax_and_better_with_an_outlier():
    x = torch.cat([torch.linspace(-1, 1, 1001), torch.tensor([20.0])])
    errors = {}
    for rule in ("minmax", "mse"):
        form = Affine.parse({"width": 4, "range": rule}, ACTIVATION).calibrated(x)
        errors[rule] = float(((form.round(x) - x) ** 2).sum())
    assert errors["mse"] < errors["minmax"]


@given(affine_cases(), st.integers(0, 99))
def test_affine_percentile_covers_less_than_minmax_and_all_but_one_in_a_thousand(case, seed):
    form, *_ = case
    x = torch.tensor(np.random.default_rng(seed).standard_t(2, (3000, 3)) + 0.5, dtype=torch.float32)
    x = x if form.axis == 1 else x.T
    empty = replace(form, scale=None, zero_point=None)
    whole, part = (replace(empty, range=r).calibrated(x) for r in ("minmax", "percentile"))
    assert all(b <= a for a, b in zip(whole.scale, part.scale, strict=True))
    assert max(part.scale) < max(whole.scale)
    low, high = part.bounds(x)
    slack = torch.tensor(part.scale).max() * 0.51
    cut = ((x < low - slack) | (x > high + slack)).double().mean()
    assert cut <= 0.001


@pytest.mark.parametrize("place", [0, 1, 2, 3, 70_001])
def test_minmax_sees_every_value_of_a_large_tensor(place):
    x = torch.zeros(3 * CALIBRATION_VALUES + 5)
    x[place] = 5.0
    form = Affine.parse({"width": 8, "symmetric": False}, ACTIVATION).calibrated(x)
    assert form.bounds(x)[1] == pytest.approx(5.0)
    assert Integer(8, "minmax").calibrated(x).frac_width == 4


@pytest.mark.parametrize("features", [2, 7, 16])
def test_large_samples_are_thinned_without_favouring_a_feature(features):
    # An even stride would see all of a feature, or nothing of it.
    rows = 4 * CALIBRATION_VALUES // features
    x = torch.arange(features, dtype=torch.float32).repeat(rows)
    part = thinned(x)
    assert len(part) == CALIBRATION_VALUES
    shares = torch.bincount(part.long(), minlength=features) / len(part)
    assert (shares * features - 1).abs().max() < 0.1
    assert torch.equal(part, thinned(x))
    assert torch.equal(thinned(x[:1000]), x[:1000].double())


@pytest.mark.parametrize(
    ("kind", "symmetric", "granularity", "overhead"),
    [(WEIGHT, True, "channel", 7 * 32), (ACTIVATION, False, "tensor", 32 + 8), (BIAS, True, "tensor", 32)],
)
def test_affine_na_depends_on_the_operand(kind, symmetric, granularity, overhead):
    form = Affine.parse({"width": 8, "symmetric": "NA", "granularity": "NA", "range": "NA"}, kind)
    assert (form.symmetric, form.granularity, form.range) == (symmetric, granularity, "minmax")
    assert form.overhead_bits((7, 5)) == overhead


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "parameter", "message"),
    [
        ("integer", {}, "width", r"needs 'width' \(bits of a value, sign included\); allowed: a whole number from 1 to 32"),
        ("integer", {"width": 0}, "width", r"width = 0 is not possible; allowed: a whole number from 1 to 32"),
        ("integer", {"width": 33}, "width", r"width = 33 is not possible"),
        ("integer", {"width": 8.0}, "width", r"width = 8.0 is not possible"),
        ("integer", {"width": True}, "width", r"width = True is not possible"),
        ("integer", {"width": "NA"}, "width", r"width = None is not possible"),
        ("integer", {"width": 4, "frac_width": 97}, "frac_width", r"frac_width = 97 is not possible; allowed: a whole number from -96 to 96"),
        ("integer", {"width": 4, "frac_width": "half"}, "frac_width", r"frac_width = 'half' .* or 'NA' or 'auto'"),
        ("integer", {"width": 4, "fracwidth": 2}, "fracwidth", r"no parameter 'fracwidth'; allowed: width, frac_width, signed, granularity, rounding, overflow\. Did you mean 'frac_width'\?"),
        ("integer", {"width": 4, "signed": 1}, "signed", r"signed = 1 is not possible; allowed: true or false or 'NA'"),
        ("affine", {"width": 1}, "width", r"width = 1 is not possible; allowed: a whole number from 2 to 16"),
        ("affine", {"width": 8, "granularity": "row"}, "granularity", r"allowed: 'NA' or 'tensor' or 'channel' or 'group'"),
        ("affine", {"width": 8, "range": "max"}, "range", r"range = 'max' is not possible"),
    ],
)  # fmt: skip
def test_wrong_parameters_are_named_with_what_is_allowed(name, settings, parameter, message):
    with pytest.raises(FormatError, match=message) as caught:
        FORMATS.get(name).parse(settings, WEIGHT)
    assert caught.value.parameter == parameter


@pytest.mark.parametrize("form", [Integer(8, "minmax"), Affine.parse({"width": 8}, WEIGHT)], ids=["integer", "affine"])
def test_a_format_that_was_not_calibrated_says_so(form):
    for use in (form.round, form.quantize, form.bounds):
        with pytest.raises(FormatError, match="must be calibrated before it is used"):
            use(torch.ones(3))
