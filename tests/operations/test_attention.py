"""Attention with formats: against torch's module and functions, with the operands quantized by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitfront.formats.block_fp import BlockFloat
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.operations.base import DATA_IN
from bitfront.testing import check_operation
from bitfront.transforms import quantize

DATA, WEIGHT, BIAS, INNER = Integer(5, 3), Integer(4, 3), Integer(6, 4), Integer(5, 2)
MASK = torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDING = torch.tensor([False, False, False, True, True])


def filled(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.eval()


class Attending(nn.Module):
    """One attention; `call` says how, from (module, x) to what it returns."""

    def __init__(self, call, **settings):
        super().__init__()
        self.inner, self.call = filled(nn.MultiheadAttention(4, 2, **{"batch_first": True, **settings})), call

    def forward(self, x):
        return self.call(self.inner, x)[0]


class Dot(nn.Module):
    """scaled_dot_product_attention of heads cut from the input, of shape (samples, 5, 8)."""

    def __init__(self, **settings):
        super().__init__()
        self.settings = settings

    def forward(self, x):
        heads = x.view(-1, 5, 4, 2).transpose(1, 2)
        few = heads[:, :2] if self.settings.get("enable_gqa") else heads
        return F.scaled_dot_product_attention(heads, few * 0.5, few.tanh(), **self.settings)


class Function(nn.Module):
    def __init__(self):
        super().__init__()
        inner = filled(nn.MultiheadAttention(4, 2, add_bias_kv=True))
        self.w, self.b, self.k, self.v = inner.in_proj_weight, inner.in_proj_bias, inner.bias_k, inner.bias_v
        self.wo, self.bo = inner.out_proj.weight, inner.out_proj.bias

    def forward(self, x):
        x = x.transpose(0, 1)
        out, _ = F.multi_head_attention_forward(
            x, x, x, 4, 2, self.w, self.b, self.k, self.v, True, 0.0, self.wo, self.bo, training=False
        )
        return out.transpose(0, 1)


def crossed(m, x):
    """Three different inputs, sequence first."""
    q, k, v = x.transpose(0, 1), x.tanh().transpose(0, 1), x.cos().transpose(0, 1)
    out, weights = m(q, k[:4], v[:4], attn_mask=MASK[:, :4])
    return out.transpose(0, 1), weights


def itself(m, x):
    return m(x, x, x)


def quietly(m, x):
    return m(x, x, x, need_weights=False)


def masked(m, x):
    return m(x, x, x, attn_mask=MASK, is_causal=True, need_weights=False)


def padded(m, x):
    return m(x, x, x, key_padding_mask=(x[..., 0] == x[..., 0]) & PADDING, attn_mask=MASK)


def separate(m, x):
    return m(x, x[..., :3], x[..., :2], average_attn_weights=False)


HOW = {
    "itself": (itself, {}),
    "without weights": (quietly, {}),
    "masked": (masked, {}),
    "padded": (padded, {}),
    "crossed": (crossed, {"batch_first": False}),
    "separate": (separate, {"kdim": 3, "vdim": 2}),
    "appended": (itself, {"add_bias_kv": True, "add_zero_attn": True}),
    "without bias": (itself, {"bias": False}),
}


@pytest.mark.sampled(2)
@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_attention_conforms(how):
    torch.manual_seed(0)
    call, settings = HOW[how]
    check_operation("attention", Attending(call, **settings), torch.randn(12, 5, 4))


@pytest.mark.sampled(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"is_causal": True}, {"enable_gqa": True, "scale": 0.3}, {"attn_mask": ~MASK}]
)
def test_functions_conform(settings):
    torch.manual_seed(0)
    check_operation("scaled_dot_product_attention", Dot(**settings), torch.randn(12, 5, 8))
    if not settings:
        check_operation("multi_head_attention_forward", Function(), torch.randn(12, 5, 4))


def captured(module, *shape):
    network = nn.Sequential(module, nn.Flatten(), nn.LazyLinear(3)).eval()
    network(torch.randn(2, *shape))
    graph = capture(network, torch.randn(2, *shape))
    assert graph.untraced == ""
    return network, graph, next(s for s in graph.sites if s.op not in ("linear", "mul", "add"))


def by_hand(m):
    """The attention with quantized parameters, each in the format of its kind."""
    changed = copy.deepcopy(m)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            parameter.copy_((WEIGHT if "weight" in name else BIAS).quantize(parameter))
    return changed


@pytest.mark.parametrize("how", HOW)
def test_inputs_and_parameters_are_what_torch_gets(how):
    """Without formats inside, what is computed is torch's, to the last bit; one key for all projections."""
    torch.manual_seed(1)
    call, settings = HOW[how]
    model, graph, site = captured(Attending(call, **settings), 5, 4)
    x = torch.randn(7, 5, 4)
    inputs = {o: DATA for o in site.operands if o.startswith("data_in")}
    inside = ("query", "key", "value", "scores", "attention", "context")
    formats = inputs | {
        o: WEIGHT if o.startswith("weight") else BIAS for o in site.operands if o not in (*inputs, *inside)
    }
    seen = []

    def rounded(m, x):
        def forward(q, k, v, **named):
            same = q is k and k is v
            q = DATA.quantize(q)
            seen.append(same)
            return by_hand(m)(q, *((q, q) if same else (DATA.quantize(k), DATA.quantize(v))), **named)

        return call(forward, x)

    with torch.no_grad():
        expected = nn.Sequential(*list(model)[1:])(rounded(model[0].inner, x)[0])
        assert torch.equal(quantize(graph, {site.name: formats})(x), expected)
    assert seen


def inside(q, k, v, mask=None, scale=None):
    """Attention written out in the order of the paper, one head."""
    scores = INNER.quantize(q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale))
    if mask is not None:
        scores = scores.masked_fill(mask, -math.inf)
    return INNER.quantize(scores.softmax(-1)) @ v


def test_values_inside_have_their_formats():
    torch.manual_seed(2)
    model, graph, site = captured(Attending(masked), 5, 4)
    x = torch.randn(7, 5, 4)
    names = ("query", "key", "value", "scores", "attention", "context")
    out = quantize(graph, {site.name: dict.fromkeys(names, INNER)})
    m = model[0].inner
    with torch.no_grad():
        q, k, v = (
            INNER.quantize(F.linear(x, w, b))
            for w, b in zip(m.in_proj_weight.chunk(3), m.in_proj_bias.chunk(3), strict=True)
        )
        heads = [inside(*(t[..., h : h + 2] for t in (q, k, v)), MASK) for h in (0, 2)]
        attended = m.out_proj(INNER.quantize(torch.cat(heads, -1)))
        assert torch.allclose(out[0](x), attended, atol=1e-6)
        assert torch.allclose(out(x), nn.Sequential(*list(model)[1:])(attended), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "mask"), [({}, None), ({"is_causal": True}, MASK), ({"attn_mask": ~MASK, "scale": 0.3}, MASK)]
)
def test_scores_of_a_function_have_their_format(settings, mask):
    torch.manual_seed(3)
    model, graph, site = captured(Dot(**settings), 5, 8)
    x = torch.randn(7, 5, 8)
    formats = dict.fromkeys(("query", "key", "value"), DATA) | dict.fromkeys(("scores", "attention"), INNER)
    heads = x.view(-1, 5, 4, 2).transpose(1, 2)
    q, k, v = (DATA.quantize(t) for t in (heads, heads * 0.5, heads.tanh()))
    with torch.no_grad():
        expected = nn.Sequential(*list(model)[1:])(inside(q, k, v, mask, settings.get("scale")))
        assert torch.allclose(quantize(graph, {site.name: formats})(x), expected, atol=1e-5)
        some = quantize(graph, {site.name: dict.fromkeys(("query", "key", "value"), DATA)})
        plain = F.scaled_dot_product_attention(q, k, v, **settings)
        assert torch.allclose(some(x), nn.Sequential(*list(model)[1:])(plain), atol=1e-5)


@pytest.mark.parametrize("how", ["itself", "separate"])
@pytest.mark.parametrize("within", [True, False])
def test_all_parameters_are_trained(how, within):
    torch.manual_seed(4)
    call, settings = HOW[how]
    model, graph, site = captured(Attending(call, **settings), 5, 4)
    formats = {o: Integer(6, 3) for o in site.operands if within or site.parameter(o)}
    changed = quantize(graph, {site.name: formats}).train()
    changed(torch.randn(7, 5, 4)).square().sum().backward()
    for name, parameter in changed.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("module", [Attending(crossed, batch_first=False), Attending(itself), Function()])
def test_no_block_holds_values_of_two_samples(module):
    torch.manual_seed(5)
    _, graph, site = captured(module, 5, 4)
    x = torch.randn(7, 5, 4) * torch.logspace(-2, 2, 7)[:, None, None]
    blocks = BlockFloat.parse({"width": 4, "exponent_width": 8, "block_size": [2]}, DATA_IN.kind())
    changed = quantize(graph, {site.name: {o: blocks for o in site.operands if site.flows(o)}})
    with torch.no_grad():
        alone = torch.cat([changed(one) for one in x.split(1)])
        assert torch.allclose(changed(x), alone, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(changed(x), graph.model(x), atol=1e-3)
