"""The module of byte kernels computes what the simulated model computes."""

import pytest
import torch
from exported import EVERY, case
from torch import nn

from bitfront.errors import ExportError
from bitfront.exporters.integer import integer_model, obstacle
from bitfront.formats.affine import Affine
from bitfront.formats.base import ACTIVATION
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.kernels import onednn
from bitfront.transforms import quantize

exact_only = pytest.mark.skipif(not onednn.exact(), reason="no exact kernels of bytes on this machine")


@pytest.mark.slow
@exact_only
@pytest.mark.parametrize(("name", "shape"), EVERY, ids=[n for n, _ in EVERY])
@pytest.mark.parametrize(("family", "width"), [("integer", 8), ("integer", 5), ("affine", 8), ("affine", 4)])
def test_bytes_compute_what_the_simulated_model_computes(name, shape, family, width):
    graph, formats, x = case(name, shape, family, width)
    # What has no kernel stays in float, in both.
    formats = {s.name: formats[s.name] for s in graph.sites if not obstacle(graph, s, formats[s.name])}
    assert formats
    before = {k: v.clone() for k, v in graph.model.state_dict().items()}
    model = integer_model(graph, formats)
    with torch.inference_mode():
        computed = model(x)
    torch.testing.assert_close(computed, quantize(graph, formats)(x).detach(), rtol=0, atol=1e-4)
    assert sum("integer" in n for n, _ in model.named_children()) == len(formats)
    assert all(torch.equal(v, before[k]) for k, v in graph.model.state_dict().items())


PER_CHANNEL = Integer(4, (1, 2, 5), granularity="channel", shape=(3,))
PER_INPUT = Integer(4, (1, 2, 5, 2), granularity="channel", axis=1, shape=(1, 4))
PER_ELEMENT = Integer(4, tuple(range(-2, 7)) + (0,) * 3, granularity="element", shape=(3, 4))


@exact_only
def test_a_binary_point_per_channel_is_a_step_per_channel():
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(nn.Linear(4, 3))
    graph = capture(model, x[:2])
    formats = {"_0": {"data_in": Integer(8, 4), "weight": PER_CHANNEL}}
    with torch.inference_mode():
        torch.testing.assert_close(
            integer_model(graph, formats)(x), quantize(graph, formats)(x).detach(), rtol=0, atol=1e-5
        )


@exact_only
@pytest.mark.parametrize(
    ("formats", "why"),
    [
        ({}, ""),
        ({"data_in": Integer(8, 4), "weight": Integer(3, 2)}, ""),
        ({"data_in": Integer(16, 8), "weight": Integer(8, 4)}, "data_in is int16.8"),
        ({"data_in": Integer(8, 4), "weight": Integer(8, 4, signed=False)}, "its weight is uint8.4"),
        ({"weight": Integer(8, 4)}, "data_in stays in float"),
        ({"data_in": Integer(8, 4), "weight": PER_CHANNEL}, ""),
        ({"data_in": PER_INPUT, "weight": Integer(8, 4)}, "an input with a scale per channel cannot be summed"),
        ({"data_in": Integer(8, 4), "weight": PER_ELEMENT}, "weight is int4.-2..6-e, which no kernel of bytes takes"),
    ],
)
def test_where_there_is_a_kernel(formats, why):
    graph = capture(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    reason = obstacle(graph, graph.sites[0], formats)
    assert reason.startswith(why)
    assert bool(reason) == bool(why)


def test_a_site_without_a_kernel_is_named():
    graph = capture(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    with pytest.raises(ExportError, match=r"^_0 \(Linear\): data_in is int16.8"):
        integer_model(graph, {"_0": {"data_in": Integer(16, 8), "weight": Integer(8, 4)}})


def test_a_relu_of_asymmetric_bytes_has_none():
    graph = capture(nn.Sequential(nn.ReLU()), torch.randn(2, 4))
    asymmetric = Affine.parse({"width": 8}, ACTIVATION).calibrated(torch.linspace(-1, 1, 9))
    assert obstacle(graph, graph.sites[0], {"data_in": asymmetric}) == "its input has a zero point other than 0"


def test_where_products_of_bytes_are_not_exact_only_relus_have_kernels(monkeypatch):
    monkeypatch.setattr(onednn, "exact", lambda: False)
    graph = capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(2, 4))
    linear, relu = graph.sites
    formats = {"_0": {"data_in": Integer(8, 4), "weight": Integer(8, 4)}, "_1": {"data_in": Integer(8, 4)}}
    why = "this processor or build of torch has no exact kernels of bytes"
    assert obstacle(graph, linear, formats["_0"]) == why
    assert obstacle(graph, relu, formats["_1"]) == ""
    with pytest.raises(ExportError, match=rf"^_0 \(Linear\): {why}$"):
        integer_model(graph, formats)
