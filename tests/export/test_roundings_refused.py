"""Runtimes round what they compute half to even: other roundings of activations are refused, those of weights are not."""

import numpy as np
import pytest
import torch
from torch import nn

from bitfront.errors import ExportError
from bitfront.exporters.integer import integer_model
from bitfront.exporters.lowering import lowered
from bitfront.exporters.onnx import integer_sites, obstacle, onnx_model
from bitfront.exporters.packing import packing
from bitfront.exporters.program import Round
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.kernels import onednn
from bitfront.transforms import quantize

SIZES = {"width": 8, "frac_width": 4}
REMEDY = (
    r"data_in is {}, which rounds .* and .*: search with data_in_rounding = 'even' and data_in_overflow = 'saturate'"
)


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(2, 4))


def formats(data, weight):
    return {"_0": {"data_in": Integer(8, 4, **data), "weight": Integer(8, 4, **weight)}}


@pytest.mark.parametrize(
    ("data", "label"),
    [({"rounding": "half_up"}, "int8.4-h"), ({"rounding": "floor"}, "int8.4-f"), ({"overflow": "wrap"}, "int8.4-w")],
)
def test_inputs_are_refused_by_name(graph, data, label):
    wrong = formats(data, {})
    for form in ("integer", "qdq"):
        with pytest.raises(ExportError, match=f"^_0: {REMEDY.format(label)}$") as refused:
            onnx_model(graph, wrong, form)
        assert refused.value.exit_code == 2
    with pytest.raises(ExportError, match=rf"^_0 \(Linear\): {REMEDY.format(label)}"):
        integer_model(graph, wrong)
    assert obstacle(graph.sites[0], wrong["_0"])
    assert not integer_sites(graph, wrong)


def test_a_program_rounds_whole_numbers_in_any_way_and_floats_in_none_but_the_usual(graph):
    fixed, floats = capture(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(2, 4)), formats({}, {})
    floats["_1"] = formats({"rounding": "floor"}, {})["_0"]  # the sums before it get a bias in float
    with pytest.raises(ExportError, match=f"^_1 .Linear.: {REMEDY.format('int8.4-f')}. It takes a float32"):
        lowered(fixed, floats)
    for of_site in floats.values():
        of_site["bias"] = Integer(8, 4)
    (last,) = (step for step in lowered(fixed, floats).steps if isinstance(step, Round) and step.sources)
    assert (last.rounding, last.overflow) == ("floor", "saturate")


@pytest.mark.parametrize("weight", [{"rounding": "half_up"}, {"rounding": "floor", "overflow": "wrap"}])
def test_weights_are_rounded_before_they_are_written(graph, weight):
    x, right = torch.randn(20, 4), formats({"overflow": "saturate_symmetric"}, weight)
    form = Integer(8, 6, **weight)
    values = torch.arange(-600, 600) / 256
    assert np.array_equal(packing(form, activation=False).pack(values), (form.round(values) * 64).int().numpy())
    assert integer_sites(graph, right) == {"_0"}
    if onednn.exact():
        with torch.no_grad():
            assert torch.equal(integer_model(graph, right)(x), quantize(graph, right)(x))
