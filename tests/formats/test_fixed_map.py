"""Fixed point with bits of its own per value, against exact rationals."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitfront.formats import FORMATS
from bitfront.formats.base import WEIGHT, FormatError
from bitfront.formats.fixed_map import FixedMap
from bitfront.formats.spelling import as_json, from_json


def exact(x: float, width: int, point: int, signed: bool) -> Fraction:
    magnitude = max(width - 1, 0) if signed else width
    most = 2**magnitude - 1
    code = round(Fraction(x) * Fraction(2) ** point)  # Python rounds halves to even
    return Fraction(min(max(code, -most if signed else 0), most)) / Fraction(2) ** point


VALUES = st.tuples(st.floats(-100, 100, width=32), st.integers(0, 12), st.integers(-6, 12))


@given(st.lists(VALUES, min_size=1, max_size=12), st.booleans(), st.booleans())
def test_every_value_has_its_bits(values, signed, samples):
    x, widths, points = (np.array(column) for column in zip(*values, strict=True))
    form = FixedMap.of(widths.astype(np.int8), points.astype(np.int8), signed=signed, samples=samples)
    given_x = torch.tensor(x, dtype=torch.float32)
    rounded = form.round(given_x[None] if samples else given_x).reshape(-1)
    for value, width, point, result in zip(given_x.tolist(), widths.tolist(), points.tolist(), rounded, strict=True):
        assert Fraction(float(result)) == exact(value, width, point, signed)
    assert torch.equal(form.round(form.round(given_x[None] if samples else given_x)).reshape(-1), rounded)
    assert form.bits == pytest.approx(widths.mean())
    assert from_json(as_json(form)) == form


def test_gradients_pass_inside_the_range_only():
    form = FixedMap.of(
        np.array([3, 3, 0], dtype=np.int8), np.array([0, 0, 0], dtype=np.int8), signed=True, samples=False
    )
    x = torch.tensor([2.0, 5.0, 1.0], requires_grad=True)
    form.quantize(x).sum().backward()
    assert x.grad.tolist() == [1, 0, 0]


def test_it_says_what_it_cannot_round():
    form = FixedMap.of(np.ones((2, 3), dtype=np.int8), np.zeros((2, 3), dtype=np.int8), signed=True, samples=False)
    with pytest.raises(FormatError, match=r"shape \(2, 3\), not \(3, 2\)"):
        form.round(torch.zeros(3, 2))


def test_no_file_can_name_it():
    with pytest.raises(FormatError, match="learned_bits"):
        FORMATS.get("fixed_map").parse({}, WEIGHT)
