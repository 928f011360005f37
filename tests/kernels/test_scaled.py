"""Rounding in blocks: the compiled kernel against torch to the last bit, whatever the values, the shape and the strides;
and against whole numbers of Python."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitfront import kernels
from bitfront.kernels import native, scaled
from bitfront.kernels.scaled import ScaledRounding, Unit
from properties import max_examples

compiled_only = pytest.mark.skipif(not kernels.compiled(), reason="no C++ compiler here")
EXTREMES = [
    torch.nan,
    -torch.nan,
    torch.inf,
    -torch.inf,
    0.0,
    -0.0,
    1e-45,
    -1e-45,
    2.0**-126,
    -3e-39,
    torch.finfo(torch.float32).max,
    -3e38,
]


@st.composite
def roundings(draw):
    """Any rounding that a format can ask for: its powers of two are normal numbers of float32."""
    way = draw(st.sampled_from(scaled.WAYS))
    unit = None
    if draw(st.booleans()):
        low = draw(st.integers(-126, 100))
        high = draw(st.integers(low, 127))
        unit = Unit(2.0 ** draw(st.integers(-20, 20)), 2.0**low, 2.0**high, draw(st.booleans()))
    if way == "multiples":
        return ScaledRounding(way, 2.0 ** draw(st.integers(-6, 0)), 1.0, float(draw(st.integers(1, 127))), 0, unit)
    lowest = draw(st.integers(-126, 10))
    highest = draw(st.integers(lowest, min(lowest + 40, 12)))
    mantissa = draw(st.integers(0, 10)) if way == "floats" else 0
    end = 2.0**highest * (2 - 2.0**-mantissa) if way == "floats" else 2.0**highest
    return ScaledRounding(way, 2.0**lowest, 2.0**highest, end, mantissa, unit)


@st.composite
def tensors(draw):
    """(tensor, blocks): up to five dimensions, some of one value or none, any order in memory, gaps and overlaps."""
    shape = draw(st.lists(st.integers(0, 3) | st.integers(4, 40), max_size=5).filter(lambda s: math.prod(s) <= 30_000))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator) * 10.0 ** draw(st.sampled_from([-40, -37, -3, 0, 2, 30, 37]))
    if draw(st.booleans()) and x.numel():
        x = x * 2.0 ** torch.randint(-20, 20, shape, generator=generator)
        x = torch.where(
            torch.rand(shape, generator=generator) < 0.2, x.sign() * 1.5 * 2.0 ** draw(st.integers(-9, 9)), x
        )
    for value in draw(st.lists(st.sampled_from(EXTREMES), max_size=4)) if x.numel() else ():
        x.view(-1)[int(torch.randint(x.numel(), (1,), generator=generator))] = value
    order = draw(st.permutations(range(len(shape))))
    stored = draw(st.sampled_from(["dense", "gaps", "expanded"]))
    x = x.permute(order).contiguous().permute([order.index(d) for d in range(len(shape))])
    if stored == "gaps" and shape:
        x = torch.cat([x, x], -1)[..., ::2]
    elif stored == "expanded":
        x = x.expand(2, *x.shape)
    return x, tuple(draw(st.sampled_from([scaled.WHOLE, 1, 2, 3, 16, 50])) for _ in x.shape)


def same(a, b):
    """Whether two tensors have the same bits, the sign of a zero included; of NaN any bits."""
    numbers = ~a.isnan()
    bits = [t.contiguous().view(torch.int32)[numbers] for t in (a, b)]
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(*bits)


@compiled_only
@max_examples(400)
@given(tensors(), roundings())
def test_the_kernel_gives_the_bits_of_torch(given_tensor, how):
    x, block = given_tensor
    before = x.clone()
    wanted = scaled.rounded(x, block, how)
    result = kernels.round_scaled(x, block, how)
    assert same(result, wanted)
    assert not x.numel() or result.stride() == torch.empty_like(x).stride()
    assert same(x, before)


@compiled_only
@given(tensors(), roundings())
def test_the_order_in_memory_makes_no_difference(given_tensor, how):
    x, block = given_tensor
    assert same(kernels.round_scaled(x, block, how), kernels.round_scaled(x.contiguous(), block, how))


@compiled_only
@max_examples(50)
@given(st.integers(1, 9), st.integers(400, 1200), roundings(), st.integers(0, 2**31))
def test_long_rows_of_columns_are_cut_without_a_trace(rows, columns, how, seed):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    for block in ((4, 1), (scaled.WHOLE, 1), (2, 700)):
        assert same(kernels.round_scaled(x, block, how), scaled.rounded(x, block, how))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40), st.integers(2, 8))
def test_multiples_are_the_nearest_ones(values, width):
    """Against fractions, with the unit that the largest value asks for."""
    x = torch.tensor(values)
    how = ScaledRounding(
        "multiples", 1.0, 1.0, 2.0 ** (width - 1) - 1, unit=Unit(2.0 ** (2 - width), 2.0**-126, 2.0**100)
    )
    largest = float(x.abs().max())
    exponent = math.frexp(largest)[1] - 1 if largest >= 2.0**-126 else -126
    step = Fraction(2) ** min(max(exponent + 2 - width, -126), 100)
    most = 2 ** (width - 1) - 1
    wanted = [float(min(max(round(Fraction(v) / step), -most), most) * step) for v in x.tolist()]
    assert kernels.round_scaled(x, (scaled.WHOLE,), how).tolist() == wanted


@compiled_only
def test_compiled_rounding_is_for_plain_floats_alone(monkeypatch):
    """Whoever follows the operations, or has other values, gets torch."""
    how = ScaledRounding("powers", 2.0**-6, 1.0, 1.0)
    calls = []
    kernel = native.library().bitfront_round_scaled
    monkeypatch.setattr(native.library(), "bitfront_round_scaled", lambda *a: calls.append(kernel(*a)))
    plain = torch.randn(7, 5)
    learned = torch.nn.Parameter(plain.clone())
    for x in (plain.double(), learned, torch.randn(4, 2, dtype=torch.cfloat).conj().imag):
        assert torch.equal(kernels.round_scaled(x, (1, 1), how), scaled.rounded(x, (1, 1), how))
    assert not calls

    class Rounds(torch.nn.Module):
        def forward(self, x):
            return kernels.round_scaled(x, (1, 1), how)

    exported = torch.export.export(Rounds(), (plain,)).module()
    assert torch.equal(exported(-2 * plain), scaled.rounded(-2 * plain, (1, 1), how))
    assert not calls
    with torch.no_grad():
        assert torch.equal(kernels.round_scaled(learned, (1, 1), how), kernels.round_scaled(plain, (1, 1), how))
    assert len(calls) == 2
    mapped = torch.func.vmap(lambda x: kernels.round_scaled(x, (1,), how))(plain)
    assert torch.equal(mapped, kernels.round_scaled(plain, (1, 1), how))
