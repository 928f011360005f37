"""The transformers of torch.nn are looked into: their layers are sites, and the bits are those of the user's model."""

import numpy as np
import pytest
import torch
from torch import nn

from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.engine.evaluation.interface import EvaluationJob
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.graph.channels import channels
from bitfront.graph.checking import check_same
from bitfront.metrics.configured import configured_runner
from bitfront.scoring import evaluate
from bitfront.transforms import quantize, widen

CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)


class Encoding(nn.Module):
    def __init__(self, mask=None, layers=2, packs=False, **settings):
        super().__init__()
        settings = {"batch_first": True, "dropout": 0.2, **settings}
        self.turned = not settings["batch_first"]
        layer = nn.TransformerEncoderLayer(8, 2, 12, **settings)
        norm = nn.LayerNorm(8)
        self.encoder = nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=packs) if layers else layer
        self.head, self.mask = nn.Linear(8, 3), mask

    def forward(self, x):
        x = x.transpose(0, 1) if self.turned else x
        x = self.encoder(x, **({} if self.mask is None else {"mask": self.mask}))
        return self.head(x[-1] if self.turned else x[:, -1])


class Decoding(nn.Module):
    def __init__(self, whole):
        super().__init__()
        if whole:
            self.inner = nn.Transformer(8, 2, 1, 1, 12, batch_first=True)
        else:
            self.inner = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, batch_first=True), 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        given = (x, x[:, :3]) if isinstance(self.inner, nn.Transformer) else (x[:, :3], x)
        return self.head(self.inner(*given, tgt_mask=CAUSAL[:3, :3])[:, -1])


MODELS = {
    "encoder": Encoding,
    "norm first": lambda: Encoding(norm_first=True, activation="gelu"),
    "sequence first": lambda: Encoding(batch_first=False),
    "causal": lambda: Encoding(CAUSAL),
    "boolean mask": lambda: Encoding(torch.tensor([[False, True, False, False, False]] * 5)),
    "without bias": lambda: Encoding(bias=False),
    "a layer": lambda: Encoding(layers=0),
    "decoder": lambda: Decoding(False),
    "transformer": lambda: Decoding(True),
}
LAYERS = {"linear": 2, "attention": 1, "add": 2}


def built(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval(), torch.randn(6, 5, 8)


@pytest.mark.parametrize("name", MODELS)
def test_the_layers_are_sites_and_the_bits_are_those_of_the_model(name):
    model, x = built(name)
    graph = capture(model, x, training=True)
    assert (graph.untraced, graph.not_in_training) == ("", "")
    inside = [s for s in graph.sites if s.name != "head"]
    assert {s.op for s in inside} >= {"linear", "attention", "add"}
    weights = {n for s in graph.sites for n in s.parameters}
    assert {n for n, _ in model.named_parameters() if "norm" not in n} <= weights
    assert sum(s.macs for s in graph.sites) == sum(n.macs for n in graph.nodes)
    for training in (False, True):
        assert check_same(graph, graph.model, x, training=training) == ""
    with torch.no_grad():
        assert torch.allclose(graph.model(x), model(x), atol=1e-6)
        assert graph.unfused == (not torch.equal(graph.model(x), model(x)))


@pytest.mark.parametrize("name", MODELS)
def test_quantized_weights_are_what_the_layers_compute_with(name):
    """By hand: the user's model with rounded weights, and torch's own slow path."""
    model, x = built(name)
    graph = capture(model, x)
    form = Integer(4, 2)
    formats = {
        s.name: {o: form for o, _ in s.operand_parameters if o.startswith("weight")}
        for s in graph.sites
        if s.operand_parameters
    }
    with torch.no_grad():
        changed = quantize(graph, formats)(x)
        baked = quantize(graph, formats, bake=True)
        for n, parameter in model.named_parameters():
            if n.endswith("weight") and "norm" not in n:
                parameter.copy_(form.quantize(parameter))
        assert torch.allclose(changed, model(x), atol=1e-5)
        assert torch.equal(baked(x), changed)
        same = {n: torch.equal(p, baked.state_dict()[n]) for n, p in model.state_dict().items()}
        assert all(same.values()), same


@pytest.mark.parametrize("name", ["encoder", "causal", "transformer"])
def test_candidates_together_are_as_each_alone(name):
    model, x = built(name)
    y = torch.arange(len(x)) % 3
    choices = {"name": ["integer", "NA"]}
    for operand in ("data_in", "weight", "bias"):
        choices |= {f"{operand}_width": [3, 5, 8], f"{operand}_frac_width": 2}
    job = EvaluationJob(
        model=model,
        sample=x[:2],
        space="graph/quantize/mixed_precision_ptq",
        by="name",
        choices={"default": choices},
        runners=(configured_runner("basic_evaluation"), configured_runner("model_size"), configured_runner("bops")),
        splits={"val": (x, y)},
        calibration=x,
    )
    evaluator = FixedEvaluator(job)
    codes = evaluator.space.sample(12, np.random.default_rng(0))
    together = evaluator.evaluate(codes)
    assert not any(together.errors)
    assert not evaluator.plain
    for i, code in enumerate(codes):
        assert together.values["loss"][i] == evaluate(evaluator.model(code), x, y, batch_size=evaluator.chunk).loss
    assert len(set(together.values["model_size"])) > 6
    assert len(set(together.values["bops"])) > 6


class Asking(nn.TransformerEncoderLayer):
    """A layer of a user, which the tracer cannot follow."""

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        return super().forward(src) if src.sum() > -1e9 else src


class Padded(Encoding):
    """Torch packs the positions that are no padding; which are, depends on the data."""

    def __init__(self, reads=0):
        super().__init__(packs=True)
        self.reads = reads

    def forward(self, x):
        padding = (x[..., 0] == x[..., 0]) & torch.tensor([False] * 3 + [True] * 2)
        return self.head(self.encoder(x, src_key_padding_mask=padding)[:, self.reads])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padding_is_computed_where_nobody_reads_it():
    torch.manual_seed(0)
    model, x = Padded().eval(), torch.randn(6, 5, 8)
    graph = capture(model, x)
    assert graph.untraced == ""
    assert {"linear", "attention"} <= {s.op for s in graph.sites}
    with torch.no_grad():
        assert torch.allclose(graph.model(x), model(x), atol=1e-6)
        # Where padding is read it is zeros, as in the user's model.
        model = Padded(4).eval()
        assert torch.allclose(capture(model, x).model(x), model(x), atol=1e-6)


def test_what_cannot_be_traced_through_stays_a_model():
    torch.manual_seed(0)
    x = torch.randn(6, 5, 8)
    model = Encoding().eval()
    model.encoder.layers[1] = Asking(8, 2, 12, batch_first=True).eval()
    graph = capture(model, x)
    assert "src.sum() > -1e9" in graph.untraced
    assert {"linear", "attention"} <= {s.op for s in graph.sites}


def test_a_hook_of_an_encoder_runs():
    model, x = built("encoder")
    model.encoder.register_forward_hook(lambda _m, _i, out: out * 2)
    graph = capture(model, x)
    assert check_same(graph, model, x) == ""


def test_the_layers_inside_can_be_widened():
    model, x = built("encoder")
    graph = capture(model, x)
    free = [group.index for group in channels(graph).groups if not group.fixed]
    assert len(free) == 2
    wider = widen(graph, {free[1]: 24})
    assert wider.encoder.layers[1].linear1.out_features == 24
    with torch.no_grad():
        assert torch.allclose(wider(x), model(x), atol=1e-4)
