"""Products that a model calls which cannot be traced: sites too, replaced while the model runs."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.graph.checking import check_same
from bitfront.transforms import quantize
from bitfront.transforms.correct import has_bias
from bitfront.transforms.functions import _entered
from bitfront.transforms.observe import calibrate

DATA, OTHER, SCORES = Integer(5, 3), Integer(4, 2), Integer(5, 2)


class Attention(nn.Module):
    """Two products of one kind around a child that has one too, and a weight of its own."""

    def __init__(self):
        super().__init__()
        self.qkv, self.child = nn.Linear(4, 12), Scaled()
        self.out = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = self.child(torch.matmul(q, k.transpose(-2, -1)))
        return F.linear(torch.matmul(scores.softmax(-1), v), self.out)


class Scaled(nn.Module):
    def forward(self, x):
        return torch.matmul(x, torch.eye(5) * 0.5)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = Attention(), nn.Linear(4, 3)

    def forward(self, x):
        x = x + self.attention(x) if x.sum() > -1e9 else x
        h = x[:, None].tanh()
        x = x + F.scaled_dot_product_attention(h, h, h, is_causal=True)[:, 0]
        return self.head((x + self.attention(x)).mean(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval(), torch.randn(6, 5, 4)


NAMES = (
    "attention_matmul",
    "attention_child_matmul",
    "attention_matmul_1",
    "attention_linear",
    "scaled_dot_product_attention",
)


def test_products_are_sites_by_the_module_that_calls_them(net):
    model, x = net
    graph = capture(model, x)
    assert "x.sum() > -1e9" in graph.untraced
    functions = [s for s in graph.sites if not s.path]
    assert [s.name for s in functions] == list(NAMES)
    assert [s.caller for s in functions] == ["attention", "attention.child", "attention", "attention", ""]
    assert [s.earlier_calls for s in functions] == [0, 0, 1, 0, 0]
    # The attention is called twice.
    assert [s.macs for s in functions] == [2 * 100, 2 * 125, 2 * 100, 2 * 80, 200]
    assert functions[3].parameter("weight") == ("attention.out", (4, 4))
    assert sum(s.macs for s in graph.sites) == sum(n.macs for n in graph.nodes)


def by_hand(model, x):
    """The same network, written out with rounded values."""

    def attention(x):
        m = model.attention
        q, k, v = m.qkv(x).chunk(3, -1)
        scores = torch.matmul(DATA.quantize(q), OTHER.quantize(k.transpose(-2, -1)))
        scores = torch.matmul(scores, OTHER.quantize(torch.eye(5) * 0.5))
        return F.linear(torch.matmul(DATA.quantize(scores.softmax(-1)), v), OTHER.quantize(m.out))

    x = x + attention(x)
    h = DATA.quantize(x[:, None].tanh())
    scores = SCORES.quantize(h @ h.transpose(-2, -1) * 0.5)
    scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
    x = x + (scores.softmax(-1) @ h)[:, 0]
    return model.head((x + attention(x)).mean(1))


FORMATS = {
    "attention_matmul": {"data_in": DATA, "weight": OTHER},
    "attention_child_matmul": {"weight": OTHER},
    "attention_matmul_1": {"data_in": DATA},
    "attention_linear": {"weight": OTHER},
    "scaled_dot_product_attention": {"query": DATA, "key": DATA, "value": DATA, "scores": SCORES},
}


def test_their_operands_are_rounded_wherever_they_are_called(net):
    model, x = net
    graph = capture(model, x)
    changed = quantize(graph, FORMATS)
    with torch.no_grad():
        expected = by_hand(model, x)
        assert torch.allclose(changed(x), expected, atol=1e-6)
        assert not torch.allclose(model(x), expected, atol=1e-3)
        for again in (copy.deepcopy(changed), pickle.loads(pickle.dumps(changed))):  # noqa: S301 (of this process)
            assert torch.equal(again(x), changed(x))
    assert changed.state_dict().keys() == model.state_dict().keys()
    assert check_same(graph, model, x) == ""


def test_weights_of_functions_get_gradients(net):
    model, x = net
    changed = quantize(capture(model, x), FORMATS).train()
    changed(x).sum().backward()
    assert changed.attention.out.grad.abs().sum() > 0
    assert model.attention.out.grad is None


def test_what_they_take_is_observed(net):
    model, x = net
    graph = capture(model, x)
    auto = Integer(8, "auto")
    formats = calibrate(graph, {n: {"data_in": auto} for n in NAMES}, x)
    with torch.no_grad():
        h = (x + model.attention(x))[:, None].tanh()
    learned = formats["scaled_dot_product_attention"]
    assert {"query", "key", "value", "scores", "attention"} == learned.keys()
    # What is shared is learned from the values of each operand.
    assert learned["query"] == auto.calibrated(h)
    assert learned["scores"] == auto.calibrated(h @ h.transpose(-2, -1) * 0.5)
    assert learned["scores"] != learned["query"]


def test_a_failing_forward_leaves_nothing_behind(net):
    model, x = net
    changed = quantize(capture(model, x), FORMATS)
    with pytest.raises(RuntimeError):
        changed(x[..., :3])
    assert not _entered()
    with torch.no_grad():
        assert torch.allclose(changed(x), by_hand(model, x), atol=1e-6)


class OtherInTraining(Net):
    def forward(self, x):
        return (
            super().forward(x) if self.training else self.head(self.attention(x).mean(1) + x.sum((1, 2))[:, None] * 0)
        )


def test_a_model_that_calls_others_in_training_has_no_functions_as_sites():
    torch.manual_seed(0)
    model, x = OtherInTraining().eval(), torch.randn(6, 5, 4)
    model.register_forward_pre_hook(lambda _m, inputs: None if inputs[0].sum() > -1e9 else inputs)
    for training in (False, True):
        graph = capture(model, x, training=training)
        assert graph.untraced
        assert any(not s.path for s in graph.sites) != training
        assert bool(graph.not_in_training) == training
        assert check_same(graph, model, x) == ""


class Refused(nn.Module):
    """Calls a product of two tensors, and one of three, which no format applies to."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        if x.sum() > -1e9:
            x = torch.einsum("bi,bj,bk->bi", x, x, x) + torch.einsum("bi,bi->bi", x, x)
            x = torch.einsum("bi,bij->bj", x, x[:, None] * x[:, :, None])
        return self.head(x)


def test_calls_that_a_record_refuses_are_no_sites_and_are_counted():
    torch.manual_seed(0)
    model, x = Refused().eval(), torch.randn(6, 4)
    graph = capture(model, x)
    sites = [s for s in graph.sites if not s.path]
    assert [s.op for s in sites] == ["einsum"] * len(sites)
    assert sites[-1].earlier_calls == 2
    changed = quantize(graph, {sites[-1].name: {"data_in": DATA, "weight": OTHER}})
    with torch.no_grad():
        h = torch.einsum("bi,bj,bk->bi", x, x, x) + torch.einsum("bi,bi->bi", x, x)
        expected = torch.einsum("bi,bij->bj", DATA.quantize(h), OTHER.quantize(h[:, None] * h[:, :, None]))
        assert torch.allclose(changed(x), model.head(expected), atol=1e-5)


class Biased(nn.Module):
    """A linear function with a bias, in a model that is not traced."""

    def __init__(self):
        super().__init__()
        self.layer = nn.ParameterDict({"w": torch.randn(3, 4), "b": torch.randn(3)})

    def forward(self, x):
        return F.linear(x, self.layer["w"], self.layer["b"]) if x.sum() > -1e9 else x


def test_biases_of_functions_are_not_corrected():
    torch.manual_seed(0)
    graph = capture(Biased().eval(), torch.randn(6, 4))
    (site,) = graph.sites
    assert site.bias == "layer.b"
    assert not has_bias(graph, site)
