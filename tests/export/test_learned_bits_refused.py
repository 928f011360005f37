"""Bits of each value have no operator in ONNX and no kernel of bytes: exporters say so, and what to do."""

import numpy as np
import pytest
import torch
from torch import nn

from bitfront.errors import ExportError
from bitfront.exporters.integer import integer_model
from bitfront.exporters.onnx import onnx_model
from bitfront.exporters.written import write_onnx
from bitfront.formats.fixed_map import FixedMap
from bitfront.graph import capture

REMEDY = r"'learned_bits' learns them.*take the weights and formats that `bitfront transform` saves, or search formats"


def bits_of(shape, width, *, samples=False):
    widths = np.full(shape, width, dtype=np.int8)
    return FixedMap.of(widths, widths - np.int8(2), signed=True, samples=samples)


@pytest.fixture(params=["all", "weight", "data_in"])
def learned(request):
    """(a captured network, formats): of all operands of its layer, or of one."""
    torch.manual_seed(0)
    graph = capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(2, 4))
    formats = {
        "data_in": bits_of((4,), 6, samples=True),
        "weight": bits_of((3, 4), 5),
        "bias": bits_of((3,), 5),
    }
    return graph, {"_0": formats if request.param == "all" else {request.param: formats[request.param]}}


@pytest.mark.parametrize("form", ["integer", "qdq"])
def test_onnx(learned, form, tmp_path):
    with pytest.raises(ExportError, match=rf"^_0: (weight|data_in) is fix~[56], and only .*{REMEDY}") as refused:
        onnx_model(*learned, form)
    assert refused.value.exit_code == 2
    path = tmp_path / "network.onnx"
    with pytest.raises(ExportError, match=REMEDY):
        write_onnx(*learned, path, torch.randn(2, 4), form=form)
    assert not list(tmp_path.iterdir())


def test_kernels_of_bytes(learned):
    with pytest.raises(ExportError, match=rf"^_0 \(Linear\): .*{REMEDY}") as refused:
        integer_model(*learned)
    assert refused.value.exit_code == 2
