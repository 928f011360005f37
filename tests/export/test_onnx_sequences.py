"""Attention and recurrent layers as ONNX, in float and in formats, in ONNX Runtime's default session."""

import pytest
import torch
from torch import nn

from bitfront.errors import ExportError
from bitfront.exporters.onnx import INPUT, onnx_model
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.transforms import quantize
from libraries import torchvision

ort = pytest.importorskip("onnxruntime")
#: By the role of an operand.
FORMATS = {"weight": Integer(6, 5), "bias": Integer(8, 6), "activation": Integer(8, 5), "inner": Integer(8, 6)}


def computed(model, x):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {INPUT: x.numpy()})[0])


def formats_of(graph, *left_out):
    """A format for every operand but some; not for what Swin V2 computes of parameters alone."""
    sites = [s for s in graph.sites if "cpb_mlp" not in s.name]
    return {s.name: {o.name: FORMATS[o.role] for o in s.specs if not o.name.startswith(left_out)} for s in sites}


def assert_written(network, x, *left_out):
    """In float, in formats, and in formats without some operands, for many samples and for one."""
    graph = capture(network.eval(), x[:2])
    assert not graph.untraced
    cases = [{}, formats_of(graph, "none"), *([formats_of(graph, *left_out)] if left_out else [])]
    for formats in cases:
        model, deployed = onnx_model(graph, formats), quantize(graph, formats)
        assert not model.metadata_props, "a rule has written all of it"
        for samples in (x, x[:1]):
            torch.testing.assert_close(computed(model, samples), deployed(samples).detach(), rtol=0, atol=2e-6)
    return graph


class Windows(nn.Module):
    """torchvision's attention within windows; the image is no whole number of them."""

    def __init__(self, kind, shift):
        super().__init__()
        swin = getattr(torchvision().models.swin_transformer, kind)
        self.inner, self.last = swin(4, [2, 3], list(shift), 2), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.inner(x)).mean((1, 2))


@pytest.mark.parametrize(("kind", "shift"), [("ShiftedWindowAttention", (1, 1)), ("ShiftedWindowAttentionV2", (0, 2))])
def test_windows_of_an_image(kind, shift):
    torch.manual_seed(0)
    network = Windows(kind, shift)
    for parameter in network.inner.parameters():
        nn.init.normal_(parameter, std=0.5)
    assert_written(network, torch.randn(20, 5, 6, 4))


class Words(nn.Module):
    """An encoder layer whose first dimension is the steps, and a mask of the steps to come."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.MultiheadAttention(8, 2), nn.Linear(8, 3)
        self.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool).triu(1))

    def forward(self, x):
        x = x.transpose(0, 1)
        out, weights = self.inner(x, x, x, attn_mask=self.mask)
        return self.last(out[1]) + weights[:, 0]


def test_the_samples_need_not_be_in_front():
    """As many steps as samples in the run that writes the file: nothing but other numbers of samples tells them apart."""
    torch.manual_seed(0)
    graph = capture(Words().eval(), x := torch.randn(20, 3, 8))
    (site,) = [s for s in graph.sites if s.op == "attention"]
    formats = {site.name: formats_of(graph)[site.name]}
    for chosen in ({}, formats):
        model, deployed = onnx_model(graph, chosen), quantize(graph, chosen)
        torch.testing.assert_close(computed(model, x), deployed(x).detach(), rtol=0, atol=2e-6)
        assert not model.metadata_props


class Confused(nn.Module):
    """Attends over the samples, because it is not told that they are in front."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        return self.inner(x, x, x)[0].mean(1)


def test_attention_over_the_samples_is_refused_in_formats():
    graph = capture(Confused().eval(), torch.randn(20, 6, 8))
    with pytest.raises(ExportError, match=r"^inner \(MultiheadAttention\): its inputs have no dimension of samples"):
        onnx_model(graph, formats_of(graph))


class Steps(nn.Module):
    """A recurrent layer, whose output and last state are read."""

    def __init__(self, kind, **settings):
        super().__init__()
        self.inner, self.several = kind(4, 3, batch_first=True, **settings), kind is nn.LSTM
        self.last = nn.LazyLinear(3)

    def forward(self, x):
        out, state = self.inner(x)
        state = state[0] if self.several else state
        return self.last(torch.cat([out[:, 1], state[0], state[-1]], 1))


RECURRENT = {
    "LSTM": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "GRU": (nn.GRU, {"bidirectional": True}),
    "RNN": (nn.RNN, {"num_layers": 2, "nonlinearity": "relu", "bias": False}),
    "projected": (nn.LSTM, {"proj_size": 2}),
}


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_recurrent_layers(name):
    torch.manual_seed(0)
    kind, settings = RECURRENT[name]
    network, x = Steps(kind, **settings), torch.randn(20, 4, 4)
    network(x)
    # Without formats for states, ONNX's operators compute it.
    graph = assert_written(network, x, "state", "cell_state")
    operators = {node.op_type for node in onnx_model(graph, formats_of(graph, "state", "cell_state")).graph.node}
    assert (kind.__name__ in operators) == (name != "projected")
    assert kind.__name__ not in {node.op_type for node in onnx_model(graph, formats_of(graph, "none")).graph.node}
