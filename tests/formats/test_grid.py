"""The whole numbers behind a format's values: codes and values one by one, and who may round by them."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitfront.exporters.packing import packing
from bitfront.formats.affine import Affine
from bitfront.formats.base import Format
from bitfront.formats.grid import WHOLE, FixedPoint, Grid
from bitfront.formats.integer import Integer

#: block → shape of the tensors of a grid for values of shape (4, 6, 2).
BLOCKS = {
    (): (),
    (1,): (4,),
    (WHOLE, 1): (1, 6),
    (1, 3): (4, 2),
    (2, 4): (2, 2),
    (1, 1, 1): (4, 6, 2),
    (WHOLE, WHOLE, 1): (1, 1, 2),
}


def bits(x):
    return x.contiguous().view(torch.int32)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("zeros", ["none", "one", "each"])
def test_each_value_has_the_step_of_its_block(block, zeros):
    rng = np.random.default_rng(0)
    shape = BLOCKS[block]
    step, zero = 2.0 ** rng.integers(-3, 2, shape), rng.integers(-2, 3, shape)
    low, high = -rng.integers(2, 6, shape), rng.integers(2, 6, shape)

    def entry(values, kind=float):
        return torch.as_tensor(values) if block else kind(values)

    given_zero = {"none": None, "one": 2, "each": entry(zero, int)}[zeros]
    grid = Grid(entry(step), entry(low, int), entry(high, int), given_zero, block)
    x = torch.randn(4, 6, 2, generator=torch.Generator().manual_seed(0)) * 2
    codes, values = grid.codes(x), grid.round(x)
    assert torch.equal(grid.values(codes), values)
    smallest, largest = (e.expand(4, 6, 2) for e in grid.ends(x))
    for place in np.ndindex(4, 6, 2):
        padded = (*block, *[WHOLE] * (len(shape) - len(block)))
        at = tuple(0 if size == WHOLE else i // size for i, size in zip(place, padded, strict=False))
        z = {"none": 0, "one": 2, "each": int(zero[at])}[zeros]
        code = int(np.clip(np.rint(float(x[place]) / step[at]) + z, low[at], high[at]))
        assert float(codes[place]) == code
        assert float(values[place]) == (code - z) * step[at]
        assert float(smallest[place]) == (low[at] - z) * step[at]
        assert float(largest[place]) == (high[at] - z) * step[at]


@given(st.integers(1, 24), st.integers(-8, 12), st.booleans(), st.integers(0, 99))
def test_fixed_point_rounds_as_its_grid_to_the_sign_of_a_zero(width, frac, signed, seed):
    form = Integer(width, min(frac, width), signed)
    x = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 2.0**-form.frac_width * 4
    x[:4] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    assert torch.equal(bits(form.grid.round(x)), bits(form.round(x)))
    assert form.grid.rounding == FixedPoint(2.0**-form.frac_width, *form.codes)
    assert form.grid_of(x).fixed_point == form.grid.fixed_point


def test_what_is_no_fixed_point_is_refused_by_who_rounds_fixed_point():
    point = Grid(0.25, -8, 7)
    assert point.uniform
    assert point.rounding == point.fixed_point == FixedPoint(0.25, -8, 7)
    assert FixedPoint(0.25, -8, 7).row == (4.0, -8, 7, 0.25)
    # Values that are among those numbers without being all of them can be added up, but not rounded to.
    sparse = Grid(0.25, -8, 7, complete=False)
    assert (sparse.fixed_point, sparse.rounding) == (FixedPoint(0.25, -8, 7), None)
    steps = torch.tensor([0.25, 0.5])
    for other in (
        Grid(0.3, -8, 7),
        Grid(0.25, -8, 7, zero=0),  # rounding to it turns −0 into 0
        Grid(steps, -8, 7, block=(1,)),
        Grid(0.25, torch.tensor([-8, -4]), 7, block=(1,)),
    ):
        assert (other.fixed_point, other.rounding) == (None, None)
    # Nor an affine format whose scale happens to be a power of two.
    assert Affine(4, True, "tensor", "minmax", 0, (0.25,), (0,)).grid.fixed_point is None


@pytest.mark.parametrize(
    ("block", "axis"), [((), None), ((1,), 0), ((WHOLE, 1), 1), ((1, 1), None), ((WHOLE, 4), None), ((WHOLE,), None)]
)
def test_the_axis_is_the_one_dimension_along_which_steps_differ(block, axis):
    step = torch.ones([1] * len(block)) if block else 1.0
    assert Grid(step, -8, 7, block=block).axis == axis


def test_tensors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"step has shape \(2,\), which does not fit block = \(\)"):
        Grid(torch.ones(2), -8, 7)
    with pytest.raises(ValueError, match=r"zero has shape \(\), which does not fit block = \(1,\)"):
        Grid(torch.ones(2), -8, 7, torch.tensor(0), (1,))
    with pytest.raises(ValueError, match=r"a tensor of shape \(3,\) has no dimension 1"):
        Grid(torch.ones(1, 3), -8, 7, block=(WHOLE, 1)).round(torch.ones(3))


@dataclass(frozen=True)
class OnGrid(Format):
    """What another package could bring: any grid."""

    number: int
    grids: ClassVar[list[Grid]] = []

    bits = 8
    label = "grid"

    @classmethod
    def _build(cls, values, kind, signed):
        raise NotImplementedError

    @property
    def grid(self):
        return self.grids[self.number]

    def round(self, x):
        return self.grid.round(x)

    def bounds(self, x):
        return self.grid.ends(x)


@pytest.mark.parametrize(
    ("grid", "held"),
    [
        (Grid(0.3, -100, 100), (0.3, 0, -100, 100, True, None)),
        (Grid(0.3, 0, 200, zero=7), (0.3, 7, 0, 200, False, None)),
        (Grid(torch.tensor([0.3, 0.5]), -8, 7, block=(1,)), ([0.3, 0.5], [0, 0], -8, 7, True, 0)),
        (Grid(0.3, -8, 7, torch.tensor([[1, 2]]), (WHOLE, 1)), ([0.3, 0.3], [1, 2], -8, 7, True, 1)),
        (Grid(0.3, -200, 7), None),
        (Grid(0.3, -1, 200), None),
        (Grid(0.3, 5, 20), None),
        (Grid(0.5, -8, 7, complete=False), None),
        (Grid(torch.ones(2, 2), -8, 7, block=(1, 1)), None),
        (Grid(torch.ones(1, 2), -8, 7, block=(WHOLE, 4)), None),
        (Grid(1.0, torch.tensor([-8, -8]), 7, block=(1,)), None),
    ],
)
@pytest.mark.parametrize("activation", [False, True])
def test_bytes_hold_any_grid_with_a_scale_per_tensor_or_channel(grid, held, activation, monkeypatch):
    monkeypatch.setattr(OnGrid, "grids", [grid])
    layout = packing(OnGrid(0), activation=activation)
    if held is None:
        assert layout is None
        return
    scale, zero, low, high, signed, axis = held
    shift = 128 if signed and activation else 0
    np.testing.assert_array_equal(layout.scale, np.array(scale, dtype=np.float32))
    np.testing.assert_array_equal(layout.zero, np.array(zero) + shift)
    assert (layout.low, layout.high, layout.signed, layout.axis) == (
        low + shift,
        high + shift,
        signed and not shift,
        axis,
    )
    x = torch.randn(2, 2, generator=torch.Generator().manual_seed(0)) * 10
    packed = torch.from_numpy(layout.pack(x)).float() - shift
    assert torch.equal(packed, grid.codes(x))
