"""Counted operations of real networks, against torch's counter.

``torch.utils.flop_counter`` counts products (a multiply-accumulate as two), at the level of aten, where it cannot miss
any, and nothing elementwise; so twice our multiply-accumulates must be its total, to the last one. Two things are
set so that it sees them: gradients are on, because it does not know the fused attention of nn.MultiheadAttention that
is used without; and scaled_dot_product_attention runs as products, because it does not know the CPU's fused one.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import libraries
from bitfront.graph import capture
from bitfront.graph.nodes import recorded_nodes

pytestmark = pytest.mark.slow

SIZE, BATCH = 64, 2
TORCHVISION = "resnet18 mobilenet_v3_small densenet121 efficientnet_b0 convnext_tiny swin_t shufflenet_v2_x0_5".split()
TIMM = {
    "mobilenetv3_small_100": {},
    "convnext_atto": {},
    "vit_tiny_patch16_224": {"img_size": SIZE, "depth": 2},
    "mixer_s32_224": {"img_size": SIZE},
    "regnety_002": {},
    "resnetv2_50": {},
}


def expected(model: nn.Module, *args, **kwargs) -> float:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*args, **kwargs)
    return counter.get_total_flops() / 2 / BATCH


def agree(model: nn.Module, *args, traced: bool = True, **kwargs) -> None:
    model.eval()
    graph = capture(model, args[0]) if traced else None
    recorded = recorded_nodes(model, args, kwargs, BATCH)
    for nodes in (graph.nodes if graph else (), recorded):
        assert [n.title for n in nodes if n.operations is None] == []
    macs = sum(n.macs for n in recorded)
    if graph is not None:
        # Both ways of seeing a model agree in everything, additions and activations too.
        assert graph.fx_graph is not None
        assert sum(n.operations for n in graph.nodes) == sum(n.operations for n in recorded)
        assert sum(n.macs for n in graph.nodes) == macs
    assert macs == expected(model, *args, **kwargs) > 0


def images(size: int = SIZE) -> torch.Tensor:
    return torch.randn(BATCH, 3, size, size)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", TORCHVISION)
def test_networks_of_torchvision(name):
    models = libraries.torchvision().models
    agree(getattr(models, name)(weights=None), images())


def test_vision_transformer_of_torchvision():
    models = libraries.torchvision().models
    # vit_b_16 with fewer and smaller blocks, of the same types.
    model = models.VisionTransformer(
        image_size=SIZE, patch_size=16, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128
    )
    agree(model, images())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm(name):
    libraries.torchvision()  # timm imports it
    pytest.importorskip("timm", exc_type=ModuleNotFoundError)
    agree(importlib.import_module("timm").create_model(name, pretrained=False, **TIMM[name]), images())


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
OURS = {"vocab_size": 50, "bos_token_id": None, "eos_token_id": None}
TRANSFORMERS = {
    "BertModel": ("BertConfig", {**SMALL, "vocab_size": 50}),
    "DistilBertModel": (
        "DistilBertConfig",
        {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    ),
    "GPT2LMHeadModel": ("GPT2Config", {**OURS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}),
    "LlamaForCausalLM": ("LlamaConfig", {**SMALL, **OURS, "num_key_value_heads": 2}),
    "ViTForImageClassification": ("ViTConfig", {**SMALL, "image_size": 32, "patch_size": 16}),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_networks_of_transformers(name, attention):
    """They return more than a tensor and branch on data: seen by running them."""
    libraries.torchvision()  # transformers asks for it
    transformers = pytest.importorskip("transformers", exc_type=ModuleNotFoundError)
    config, settings = TRANSFORMERS[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**settings, attn_implementation=attention))
    if name.startswith("ViT"):
        agree(model, images(32), traced=False)
    else:
        agree(model, input_ids=torch.arange(16).reshape(BATCH, 8), traced=False)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 7)),
        (nn.ConvTranspose1d(4, 6, 3), (4, 9)),
        (nn.Conv3d(2, 4, (1, 2, 3), groups=2), (2, 4, 5, 6)),
        (nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, batch_first=True), (5, 8)),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2), (5, 8)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_modules_that_multiply_inside(module, shape):
    agree(nn.Sequential(module, nn.Flatten()), torch.randn(BATCH, *shape))


class Equation(nn.Module):
    def __init__(self, equation):
        super().__init__()
        self.equation, self.other = equation, nn.Parameter(torch.randn(4, 5, 6))

    def forward(self, x):
        return torch.einsum(self.equation, x, self.other).flatten(1)


@pytest.mark.parametrize(("equation", "shape"), [("bij,ijk->bk", (4, 5)), ("b...j,...jk->b...k", (4, 5))])
def test_einsum(equation, shape):
    agree(Equation(equation), torch.randn(BATCH, *shape))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        h = torch.addmm(self.b, x, self.a)
        h = torch.baddbmm(h[:, None], h[:, :, None].transpose(1, 2), torch.ones(len(x), 6, 4) @ h.new_ones(4, 6))
        return torch.mm(h.flatten(1), self.a.T)


def test_products_with_a_sum():
    agree(Functional(), torch.randn(BATCH, 5), traced=False)


class Sequence(nn.Module):
    def __init__(self, kind, **settings):
        super().__init__()
        self.inner = kind(6, 5, batch_first=True, **settings)

    def forward(self, x):
        return self.inner(x)[0].flatten(1)


@pytest.mark.parametrize(("kind", "gates", "per_unit"), [(nn.LSTM, 4, 13), (nn.GRU, 3, 11), (nn.RNN, 1, 2)])
def test_recurrent_layers_by_hand(kind, gates, per_unit):
    """torch's counter does not know them: they are one call of a library."""
    steps = 7
    for settings, macs, units in [
        ({}, gates * 5 * (6 + 5), 5),
        ({"num_layers": 2}, gates * 5 * (6 + 5 + 5 + 5), 10),
        ({"bidirectional": True}, 2 * gates * 5 * (6 + 5), 10),
    ]:
        graph = capture(Sequence(kind, **settings), torch.randn(BATCH, steps, 6))
        node = next(n for n in graph.nodes if n.type == kind.__name__)
        assert node.macs == steps * macs
        assert node.operations == steps * (macs + units * per_unit)


ACTIVATIONS = """ReLU6 LeakyReLU PReLU ELU SELU CELU GELU SiLU Mish Hardtanh Hardswish Hardsigmoid Sigmoid LogSigmoid Tanh
Softplus Softsign""".split()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_one_operation_per_element(name):
    graph = capture(nn.Sequential(getattr(nn, name)()), torch.randn(BATCH, 12))
    assert [n.operations for n in graph.nodes] == [12]


@pytest.mark.parametrize(
    ("module", "shape", "operations"),
    [
        (nn.GroupNorm(2, 4), (4, 3, 3), 5 * 36),
        (nn.InstanceNorm2d(4), (4, 3, 3), 5 * 36),
        (nn.RMSNorm(6), (6,), 4 * 6),
        (nn.MaxPool3d(2), (1, 4, 4, 4), 8 * 8),
        (nn.LPPool2d(2, (2, 1)), (1, 4, 4), 8 * 2),
        (nn.AdaptiveMaxPool3d(1), (2, 3, 3, 3), 54),
        (nn.PixelShuffle(2), (4, 3, 3), 0),
        (nn.Upsample(scale_factor=2), (1, 3, 3), 0),
        (nn.Upsample(scale_factor=2, mode="bilinear"), (1, 3, 3), 36 * 4),
        (nn.GLU(), (8,), 8),
        (nn.Softmax(-1), (8,), 5 * 8),
    ],
    ids=str,
)
def test_other_modules_by_hand(module, shape, operations):
    graph = capture(nn.Sequential(module, nn.Flatten()), torch.randn(BATCH, *shape))
    assert graph.nodes[0].operations == operations


class Opaque(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.numpy() * 2)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.opaque = nn.Linear(4, 4), Opaque()

    def forward(self, x):
        return torch.fft.rfft(self.opaque(self.fc(x))).abs()


def test_what_cannot_be_seen_or_has_no_rule_is_listed():
    nodes = recorded_nodes(Unknown().eval(), (torch.randn(BATCH, 4),), {}, BATCH)
    assert {n.type for n in nodes if n.operations is None} >= {"fft_rfft", "Opaque"}
    assert sum(n.macs for n in nodes) == 16
    numpy_free = nn.Sequential(nn.Linear(4, 4), nn.Hardshrink())
    nodes = recorded_nodes(numpy_free, (torch.randn(BATCH, 4),), {}, BATCH)
    assert [n.title for n in nodes if n.operations is None] == ["1_hardshrink (hardshrink)"]


def test_rows_of_several_samples_in_one_dimension_are_shared_out():
    class Windows(nn.Module):
        def forward(self, x):
            rows = x.reshape(-1, 4, 6)  # (batch · 3, 4, 6)
            return torch.bmm(rows, rows.transpose(1, 2)).reshape(x.size(0), -1)

    node = capture(Windows(), torch.randn(BATCH, 3, 4, 6)).site("bmm")
    assert (node.inputs[0], node.output, node.macs) == ((3, 4, 6), (3, 4, 4), 3 * 4 * 4 * 6)
