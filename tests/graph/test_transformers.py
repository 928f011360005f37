"""Transformers of libraries: nearly all of their products have formats, and what is deployed computes in them."""

import importlib

import pytest
import torch
from torch import nn

import libraries
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.testing import check_operation
from bitfront.transforms import quantize

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}
TINY_GPT = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 16,
    "vocab_size": 50,
    "bos_token_id": None,
    "eos_token_id": None,
}


class Logits(nn.Module):
    """A model of transformers that returns its logits alone, of the last token where there is one for each."""

    def __init__(self, kind, config, settings, attention):
        super().__init__()
        libraries.torchvision()  # transformers asks for it
        library = pytest.importorskip("transformers", exc_type=ModuleNotFoundError)
        torch.manual_seed(0)
        self.inner = getattr(library, kind)(getattr(library, config)(**settings, attn_implementation=attention))

    def forward(self, x):
        logits = self.inner(x).logits
        return logits[:, -1] if logits.dim() == 3 else logits


def captured(model, x):
    model.eval()
    graph = capture(model, x)
    assert sum(s.macs for s in graph.sites) >= 0.95 * sum(n.macs for n in graph.nodes)
    return graph


def change_alone(graph, x):
    """Each kind of site changes the output, and no other does."""
    form, before = Integer(4, 2), graph.model(x)
    for op in dict.fromkeys(s.op for s in graph.sites if s.macs):
        formats = {s.name: dict.fromkeys(s.operands, form) for s in graph.sites if s.op == op}
        changed = quantize(graph, formats)
        assert not torch.equal(changed(x), before), op
    assert torch.equal(graph.model(x), before)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bert(attention):
    model = Logits("BertForSequenceClassification", "BertConfig", {**SMALL, "num_labels": 3}, attention)
    x = torch.randint(50, (4, 8))
    graph = captured(model, x)
    assert graph.untraced
    functions = [s.op for s in graph.sites if not s.path]
    assert functions == (["matmul"] * 4 if attention == "eager" else ["scaled_dot_product_attention"] * 2)
    with torch.no_grad():
        change_alone(graph, x)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_of_gpt(attention):
    model = Logits("GPT2LMHeadModel", "GPT2Config", TINY_GPT, attention).eval()
    graph = capture(model, torch.randint(50, (4, 8)))
    left = {n.type for n in graph.nodes if n.macs and n not in graph.sites}
    assert not left & {"matmul", "scaled_dot_product_attention"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_transformers_of_torchvision(name):
    models = libraries.torchvision().models
    torch.manual_seed(0)
    if name == "vit":
        model = models.VisionTransformer(32, 16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3)
        nn.init.normal_(model.heads.head.weight)
    else:
        model = models.SwinTransformer([4, 4], 8, [1, 2], [2, 4], [2, 2], num_classes=3)
    x = torch.randn(2, 3, 32, 32)
    graph = captured(model, x)
    assert graph.untraced == ""
    with torch.no_grad():
        change_alone(graph, x)


@pytest.mark.slow
def test_windows_of_swin_by_hand():
    """Without formats inside, the function gets rounded arguments; with them, each changes the output."""
    models = libraries.torchvision().models
    torch.manual_seed(0)
    model = models.SwinTransformer([4, 4], 8, [2], [2], [2, 2], num_classes=3).eval()
    x, form = torch.randn(2, 3, 16, 16), Integer(5, 3)
    graph = capture(model, x)
    site = [s for s in graph.sites if s.op == "shifted_window_attention"][1]
    named = dict(site.operand_parameters)
    assert [n.rpartition(".")[2] for n in named.values()] == ["weight", "weight", "bias", "bias"]
    with torch.no_grad():
        before = model(x)
        changed = quantize(graph, {site.name: dict.fromkeys(named, form)})(x)
        for parameter in named.values():
            model.get_parameter(parameter).copy_(form.quantize(model.get_parameter(parameter)))
        assert torch.equal(changed, model(x))
        for operand in ("query", "key", "value", "scores", "attention", "context"):
            assert not torch.equal(quantize(graph, {site.name: {operand: Integer(3, 1)}})(x), before)


@pytest.mark.slow
def test_windows_conform():
    swin = libraries.torchvision().models.swin_transformer
    torch.manual_seed(0)
    module = swin.ShiftedWindowAttention(4, [2, 2], [1, 1], 2)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    check_operation("shifted_window_attention", module, torch.randn(12, 4, 4, 4))


@pytest.mark.slow
def test_a_vit_of_timm():
    pytest.importorskip("timm", exc_type=ModuleNotFoundError)
    libraries.torchvision()
    timm = importlib.import_module("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3, drop_path_rate=0.0)
    graph = captured(model, torch.randn(2, 3, 32, 32))
    assert "scaled_dot_product_attention" in {s.op for s in graph.sites}
