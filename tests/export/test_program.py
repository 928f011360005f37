"""The integer program of a candidate computes what the deployed model computes, to the bit."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import case, cases
from torch import nn

from bitfront.errors import ExportError
from bitfront.exporters import oracle
from bitfront.exporters.lowering import lowered
from bitfront.exporters.program import Cut, Product, Round, Value, Window, width
from bitfront.formats.affine import Affine
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.transforms import quantize
from properties import max_examples


@max_examples(40)
@given(cases())
def test_a_program_computes_what_the_deployed_model_computes(given_case):
    graph, formats, x = given_case
    program, model = case(graph, formats)
    with torch.no_grad():
        expected = model(x.clone()).numpy()
    computed = oracle.as_floats(program.result, oracle.run(program, x.numpy()))
    np.testing.assert_array_equal(computed, expected)


@max_examples(20)
@given(cases(families=("integer",)))
def test_every_number_is_within_its_range_also_for_inputs_that_nobody_expects(given_case):
    graph, formats, x = given_case
    program, _ = case(graph, formats)
    far = torch.cat([x, 100 * x, torch.full_like(x[:1], 1e30), torch.full_like(x[:1], -1e30)]).numpy()
    for value, numbers in zip(program.values, oracle.every_value(program, far), strict=True):
        assert numbers.shape[1:] == value.shape
        assert (numbers >= value.low).all(), value.name
        assert (numbers <= value.high).all(), value.name
        if not value.floats:
            assert value.bits >= width(int(numbers.min()), int(numbers.max()))


@given(st.integers(-(2**40), 2**40), st.integers(1, 2**20), st.sampled_from(["even", "half_up", "floor"]))
def test_quotients_are_rounded_as_python_rounds_fractions(numerator, divisor, rounding):
    exact = Fraction(numerator, divisor)
    expected = {"even": round(exact), "half_up": math.floor(exact + Fraction(1, 2)), "floor": math.floor(exact)}
    assert oracle.divided(np.array(numerator), divisor, rounding) == expected[rounding]


@given(st.lists(st.integers(-(2**61), 2**61), min_size=1))
def test_a_cut_is_what_a_float32_holds(numbers):
    value = Value("x", (len(numbers),), np.array(numbers), np.array(numbers))
    (cut,) = oracle.apply(Cut((0,)), [np.array([numbers])], [value])
    assert cut.tolist() == [int(np.float32(n)) for n in numbers]


@given(st.data())
def test_products_agree_with_torch_in_whole_numbers(data):
    dims, groups = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    stride, pad, dilation = (data.draw(st.integers(*ends)) for ends in ((1, 2), (0, 2), (1, 2)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    x = torch.randint(-8, 8, (2, 2 * groups, *[6] * dims), generator=generator)
    w = torch.randint(-8, 8, (2 * groups, 2, *[2] * dims), generator=generator)
    convolve = (nn.functional.conv1d, nn.functional.conv2d)[dims - 1]
    expected = convolve(x.double(), w.double(), None, stride, pad, dilation, groups).long()
    pads = (pad,) * dims
    step = Product((0,), w.numpy(), 0, Window((2,) * dims, (stride,) * dims, pads, pads, (dilation,) * dims), groups)
    for kind in (np.int64, np.float64):
        np.testing.assert_array_equal(oracle.products(step, x.numpy(), kind), expected.numpy())


LAYER = {"data_in": Integer(6, 3), "weight": Integer(6, 4), "bias": Integer(8, 6)}


def _graph(*layers, shape=(4,)):
    torch.manual_seed(0)
    return capture(nn.Sequential(*layers), torch.zeros(2, *shape))


def test_what_has_no_program_is_refused_by_name():
    with pytest.raises(ExportError, match=r"_0 \(Linear\): its data_in stays in float; give it a format"):
        lowered(_graph(nn.Linear(4, 3)), {})
    with pytest.raises(ExportError, match=r"_0 \(Linear\): its weight stays in float"):
        lowered(_graph(nn.Linear(4, 3)), {"_0": {"data_in": Integer(6, 3)}})
    with pytest.raises(ExportError, match=r"_1 \(BatchNorm1d\): a batch norm in float; fold it"):
        lowered(_graph(nn.Linear(4, 3), nn.BatchNorm1d(3)), {"_0": LAYER})
    with pytest.raises(ExportError, match=r"_1 \(Tanh\) has no form in whole numbers"):
        lowered(_graph(nn.Linear(4, 3), nn.Tanh()), {"_0": LAYER})


def test_a_bias_in_float_makes_floats_and_says_so():
    graph = _graph(nn.Linear(4, 3), nn.ReLU())
    formats = {"_0": {"data_in": Integer(6, 3), "weight": Integer(6, 4)}}
    program = lowered(graph, formats)
    assert program.floats == ("_0", "_1")
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        np.testing.assert_array_equal(oracle.run(program, x.numpy()), quantize(graph, formats)(x).numpy())


def test_sums_that_a_float32_cannot_hold_are_cut_as_there():
    graph = _graph(nn.Linear(64, 3), shape=(64,))
    formats = {"_0": {"data_in": Integer(16, 8), "weight": Integer(16, 14), "bias": Integer(16, 14)}}
    program = lowered(graph, formats)
    assert any(isinstance(step, Cut) for step in program.steps)
    x = 10 * torch.randn(300, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = quantize(graph, formats)(x).numpy()
    np.testing.assert_array_equal(oracle.as_floats(program.result, oracle.run(program, x.numpy())), expected)


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), nn.MaxPool2d(1), nn.AvgPool2d(1)])
def test_pools_of_one_value_are_that_value(pool):
    """Also where a sum of several would have more bits than a float32."""
    graph = _graph(nn.Conv2d(16, 4, 2), nn.ReLU(), pool, nn.Flatten(), nn.Linear(4, 3), shape=(16, 2, 2))
    wide = {"data_in": Integer(16, 12), "weight": Integer(16, 14), "bias": Integer(16, 14)}
    program = lowered(graph, {"_0": wide, "_4": LAYER})
    x = 4 * torch.randn(200, 16, 2, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = quantize(graph, {"_0": wide, "_4": LAYER})(x).numpy()
    np.testing.assert_array_equal(oracle.as_floats(program.result, oracle.run(program, x.numpy())), expected)


def test_an_input_that_is_moved_before_its_first_format():
    graph = _graph(nn.Flatten(), nn.Linear(4, 3), shape=(2, 2))
    program = lowered(graph, {"_1": LAYER})
    assert isinstance(program.steps[0], Round)
    assert program.steps[0].points.shape == (4,)


def test_an_input_that_is_not_finite_has_no_numbers():
    program = lowered(_graph(nn.Linear(4, 3)), {"_0": LAYER})
    with pytest.raises(ExportError, match="infinite or not a number"):
        oracle.run(program, np.full((1, 4), np.nan, np.float32))


def test_affine_weights_have_a_scale_per_channel_and_inputs_only_one():
    graph = _graph(nn.Linear(4, 3))
    kinds = {o: graph.sites[0].operation.operand(o).kind() for o in ("data_in", "weight")}
    per_channel = Affine.parse({"width": 8, "granularity": "channel"}, kinds["data_in"]).calibrated(torch.randn(9, 4))
    weight = Affine.parse({"width": 8}, kinds["weight"]).calibrated(torch.randn(3, 4))
    with pytest.raises(ExportError, match="a scale per channel"):
        lowered(graph, {"_0": {"data_in": per_channel, "weight": weight}})
