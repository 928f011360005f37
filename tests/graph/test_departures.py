"""What a model does beside the ``forward`` of its classes: further arguments, hooks, computed weights. The captured graph
gives the model's outputs to the last bit, in evaluation and in training, or says why not."""

import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from small_net import Net, sample, wide
from torch import nn
from torch.nn.utils import parametrize, prune, spectral_norm
from torch.nn.utils import weight_norm as by_a_hook
from torch.nn.utils.parametrizations import orthogonal
from torch.nn.utils.parametrizations import spectral_norm as parametrized_spectral_norm
from torch.nn.utils.parametrizations import weight_norm as parametrized_weight_norm

from bitfront.errors import CaptureError
from bitfront.graph import capture
from bitfront.graph.checking import check_same
from bitfront.operations.lookup import of_module, unusual
from bitfront.transforms import quantize


def weight_norm(module):
    """The older form, by a hook, without its warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return by_a_hook(module)


# --- arguments --------------------------------------------------------------------------------------------------------


class Settings:
    gain = 3.0


class WithMask(Net):
    def forward(self, x, mask=None):
        h = self.a(x)
        return self.b(h if mask is None else h * mask)


class WithNumbers(Net):
    def forward(self, x, temperature=2.0, flag=True, *, settings=Settings()):  # noqa: B008
        h = self.a(x) * settings.gain
        return (self.b(h) if flag else self.b(-h)) / temperature


class WithTensor(Net):
    def forward(self, x, scale=torch.tensor([2.0])):  # noqa: B008
        return self.b(self.a(x) * scale)


class WithMore(Net):
    def forward(self, *inputs, **options):
        return self.b(self.a(inputs[0])) if len(inputs) == 1 and not options else inputs[1]


class WithAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.attention = nn.Linear(2, 4), nn.MultiheadAttention(4, 1, batch_first=True)

    def forward(self, x, mask=None):
        h = self.a(x.reshape(-1, 4, 2))
        return self.attention(h, h, h, key_padding_mask=mask, need_weights=False)[0].mean(1)


@pytest.mark.parametrize("factory", [WithMask, WithNumbers, WithTensor, WithMore, WithAttention])
def test_further_arguments_keep_their_defaults_and_only_the_input_is_a_placeholder(factory):
    model = factory().eval()
    graph = capture(model, sample())
    assert not graph.untraced
    assert [n.op for n in graph.fx_graph.nodes].count("placeholder") == 1
    assert check_same(graph, model, sample()) == ""
    # What is rebuilt is called as the model is.
    rebuilt = quantize(graph, {"a": {"data_in": wide()}})
    assert torch.allclose(rebuilt(sample()), model(sample()), atol=1e-4)


def test_the_rebuilt_model_still_takes_the_argument():
    model, x = WithMask().eval(), sample()
    rebuilt = quantize(capture(model, x), {"a": {"data_in": wide()}})
    mask = torch.arange(6.0)
    assert torch.allclose(rebuilt(x, mask=mask), model(x, mask=mask), atol=1e-4)
    assert not torch.allclose(rebuilt(x, mask=mask), rebuilt(x))


class Two(Net):
    def forward(self, x, *, context, scale=1.0):
        return self.a(x) * context * scale


def test_a_model_that_needs_two_tensors_is_refused():
    with pytest.raises(CaptureError, match=r"forward of Two needs 2 inputs \(x, context\).*Give context a default"):
        capture(Two(), sample())


# --- hooks ------------------------------------------------------------------------------------------------------------


def bend(_module, _inputs, out):
    return torch.sin(3 * out)


def bend_kwargs(_module, _inputs, _named, out):
    return torch.sin(3 * out)


def shift(_module, inputs):
    return (inputs[0] - 0.5,)


def branching(_module, _inputs, out):
    return out if out.sum() > 1e9 else out * 2


class Nested(Net):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU())

    def forward(self, x):
        return self.b(self.block(x))


@pytest.mark.parametrize("hook", [bend, bend_kwargs, shift, branching])
@pytest.mark.parametrize("path", ["", "a", "act", "block", "block.0", "block.1"])
def test_hooks_are_part_of_the_graph(hook, path):
    model = (Nested() if "block" in path else Net()).eval()
    module = model.get_submodule(path)
    if hook is shift:
        module.register_forward_pre_hook(shift)
    else:
        module.register_forward_hook(hook, with_kwargs=hook is bend_kwargs)
    graph = capture(model, sample())
    assert check_same(graph, model, sample()) == ""
    assert hook.__name__ in unusual(module)
    assert not unusual(model.b)
    # A layer with a hook keeps its site and its name.
    assert {s.name for s in graph.sites} >= ({"block_0", "block_2", "b"} if "block" in path else {"a", "act", "b"})


def test_hooks_that_look_on_change_nothing():
    seen = []
    model = Net().eval()
    plain = capture(model, sample())
    model.a.register_forward_hook(lambda _m, _i, out: seen.append(float(out.abs().max())))
    graph = capture(model, sample())
    assert seen
    assert [s.name for s in graph.sites] == [s.name for s in plain.sites]
    assert check_same(graph, model, sample()) == ""


# --- modules that are something else ----------------------------------------------------------------------------------


class Doubled(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


class Standardised(nn.Linear):
    def forward(self, x):
        w = self.weight
        return F.linear(x, (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True), self.bias)


class AsProperty(nn.Linear):
    @property
    def weight(self):
        return self.root**2

    @weight.setter
    def weight(self, value):
        self.root = value


class Harmless(nn.Linear):
    def extra_repr(self):
        return "as ever"

    def helper(self):
        return 1


def replaced():
    module = nn.Linear(8, 6)
    module.forward = types.MethodType(lambda self, x: torch.sin(F.linear(x, self.weight, self.bias)), module)
    return module


def with_a_buffer():
    module = nn.Linear(8, 6)
    weight = module.weight.detach()
    del module.weight
    module.register_buffer("weight", weight)
    return module


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Doubled(8, 6, 1), "its class Doubled overrides _conv_forward of Conv1d"),
        (Standardised(8, 6), "its class Standardised overrides forward of Linear"),
        (AsProperty(8, 6), "its class AsProperty overrides weight of Linear"),
        (replaced(), "its forward was replaced on this one module"),
        (with_a_buffer(), "its weight is no parameter, but a buffer"),
        (weight_norm(nn.Linear(8, 6)), "its weight is no parameter, but a tensor that something else computes"),
        (parametrized_weight_norm(nn.Linear(8, 6)), "its class ParametrizedLinear overrides weight of Linear"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_a_module_that_computes_something_else_has_no_record_and_says_why(module, words):
    assert of_module(module) is None
    assert unusual(module) == words


def test_a_subclass_that_overrides_nothing_that_counts_is_its_base():
    module = Harmless(8, 6)
    assert of_module(module) is of_module(nn.Linear(8, 6))
    assert not unusual(module)


@pytest.mark.parametrize("factory", [replaced, with_a_buffer])
def test_a_layer_that_stays_in_float_is_named_and_counted(factory):
    model = Net()
    model.a = factory()
    graph = capture(model, sample())
    assert [s.name for s in graph.sites] == ["act", "add", "b"]
    ((path, weights, macs),) = [(layer.path, layer.weights, layer.macs) for layer in graph.left_out]
    assert (path, weights, macs) == ("a", 48, 48)
    assert check_same(graph, model, sample()) == ""


def test_a_weight_computed_in_forward_is_a_weight():
    model = Net()
    model.a = Standardised(8, 6)
    graph = capture(model, sample())
    site = graph.site("linear")
    assert (site.op, site.weight, site.computed_from, site.stored_weights) == ("linear", None, ("a.weight",), 48)
    assert graph.left_out == ()
    assert check_same(graph, model, sample()) == ""


class SetsAWeight(Net):
    """A graph would keep the weight that was there when it was captured."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 8))
        del self.a.weight

    def forward(self, x):
        self.a.weight = self.left @ self.right
        return super().forward(x)


def test_a_forward_that_sets_a_weight_is_run_whole():
    model = SetsAWeight()
    model(sample()).sum().backward()  # leaves a tensor with a history
    graph = capture(model, sample())
    assert "the model's forward sets a.weight" in graph.untraced
    assert [layer.path for layer in graph.left_out] == ["a"]
    assert check_same(graph, model, sample()) == ""


# --- computed weights -------------------------------------------------------------------------------------------------


class Squared(nn.Module):
    def forward(self, w):
        return w * w


class Noisy(nn.Module):
    def forward(self, w):
        return w + torch.randn_like(w)


def squared(module):
    parametrize.register_parametrization(module, "weight", Squared())
    parametrize.register_parametrization(module, "bias", Squared())
    return module


def pruned(module):
    prune.l1_unstructured(module, "weight", 0.5)
    prune.random_unstructured(module, "weight", 0.2)
    return module


BAKED = [weight_norm, spectral_norm, parametrized_weight_norm, parametrized_spectral_norm, orthogonal, squared, pruned]


@pytest.mark.parametrize("computed", BAKED, ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_a_computed_weight_becomes_a_parameter_of_the_copy_alone(computed):
    model = Net()
    model.a = computed(model.a)
    for _ in range(2):  # as training leaves it
        model(sample()).sum().backward()
    before, keys = model.eval()(sample()).detach(), list(model.state_dict())
    graph = capture(model, sample())
    assert graph.baked[0].startswith("a.weight (")
    assert type(graph.model.a) is nn.Linear
    assert graph.sites[0].operand_parameters == (("weight", "a.weight"), ("bias", "a.bias"))
    assert torch.equal(graph.model.a.weight, model.a.weight)
    assert torch.equal(graph.model(sample()), before)
    assert check_same(graph, model, sample()) == ""
    # The user's model is what it was; and what was captured can be captured.
    assert list(model.state_dict()) == keys
    assert torch.equal(model(sample()), before)
    again = capture(graph.model, sample())
    assert (again.nodes, again.baked) == (graph.nodes, ())


def test_a_weight_that_is_not_constant_stays_as_it_is():
    model = Net()
    parametrize.register_parametrization(model.a, "weight", Noisy())
    graph = capture(model, sample())
    assert graph.baked == ()
    assert "a" not in [s.name for s in graph.sites]
    assert [layer.path for layer in graph.left_out] == ["a"]
