"""A quantized model equals what one would write by hand, and nothing of the captured model changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitfront.formats.affine import Affine
from bitfront.formats.base import ACTIVATION
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.transforms import calibrate, quantize

DATA, WEIGHT, BIAS = Integer(6, 3), Integer(4, 3), Integer(8, 6)
ALL = {"data_in": DATA, "weight": WEIGHT, "bias": BIAS}


def inputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


def captured(model, *shape):
    return capture(model, inputs(2, *shape))


def state_is(model, before):
    return model.state_dict().keys() == before.keys() and all(
        torch.equal(t, before[k]) for k, t in model.state_dict().items()
    )


CONVOLUTIONS = [
    (kind, {"padding": padding, "groups": groups, "padding_mode": mode, "bias": bias, **more})
    for kind in ("conv1d", "conv2d")
    for padding, groups, mode, bias, more in [
        (1, 1, "zeros", True, {}),
        (0, 2, "zeros", True, {"stride": 2}),
        ("same", 4, "zeros", True, {"dilation": 2}),
        (2, 1, "reflect", True, {}),
        (1, 2, "circular", True, {}),
        (1, 1, "replicate", False, {}),
    ]
]


@pytest.mark.parametrize(
    ("kind", "settings"), CONVOLUTIONS, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
def test_a_quantized_convolution_is_the_convolution_of_quantized_operands(kind, settings):
    module = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d}[kind](4, 8, 3, **settings)
    shape = (4, 9) if kind == "conv1d" else (4, 9, 7)
    x = inputs(3, *shape)
    graph = captured(nn.Sequential(module, nn.Flatten()), *shape)
    out = quantize(graph, {"_0": {k: f for k, f in ALL.items() if k != "bias" or settings["bias"]}})(x)

    data, weight = DATA.round(x), WEIGHT.round(module.weight.detach())
    bias = BIAS.round(module.bias.detach()) if settings["bias"] else None
    padding = settings["padding"]
    if settings["padding_mode"] != "zeros":
        data = F.pad(data, [padding] * (2 * (len(shape) - 1)), mode=settings["padding_mode"])
        padding = 0
    function = {"conv1d": F.conv1d, "conv2d": F.conv2d}[kind]
    expected = function(
        data, weight, bias, settings.get("stride", 1), padding, settings.get("dilation", 1), settings["groups"]
    )
    assert torch.equal(out, expected.flatten(1))


def test_a_quantized_linear_and_relu_are_those_of_quantized_operands(tiny_mlp):
    graph, x = captured(tiny_mlp, 4), inputs(5, 4)
    formats = {"fc1": ALL, "relu": {"data_in": Integer(3, 1, signed=False)}, "fc2": {"weight": WEIGHT}}
    fc1, fc2 = tiny_mlp.fc1, tiny_mlp.fc2
    h = F.linear(DATA.round(x), WEIGHT.round(fc1.weight), BIAS.round(fc1.bias))
    h = F.relu(Integer(3, 1, signed=False).round(h))
    expected = F.linear(h, WEIGHT.round(fc2.weight), fc2.bias)
    assert torch.equal(quantize(graph, formats)(x), expected)


@pytest.mark.parametrize("operand", ["data_in", "weight", "bias"])
def test_every_operand_has_an_effect(tiny_mlp, operand):
    graph, x = captured(tiny_mlp, 4), inputs(64, 4)
    coarse = Integer(3, 1)
    assert not torch.equal(quantize(graph, {"fc1": {operand: coarse}})(x), graph.model(x))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b, self.m = nn.Parameter(inputs(5, 6)), nn.Parameter(inputs(5)), nn.Parameter(inputs(5, 3))

    def forward(self, x):
        h = F.linear(x, self.w, bias=self.b)
        return torch.matmul(torch.relu(h + h.relu()), self.m)


def test_functional_sites_are_quantized_argument_by_argument():
    model, x = Functional(), inputs(7, 6)
    graph = captured(model, 6)
    assert [s.name for s in graph.sites] == ["linear", "relu", "add", "relu_1", "matmul"]
    by_site = {
        "linear": ALL,
        "relu": {"data_in": Integer(5, 2)},
        "add": {"data_in": Integer(4, 1), "data_in_2": Integer(4, 1)},
        "matmul": {"data_in": Integer(6, 1), "weight": Integer(5, 2)},
    }
    h = F.linear(DATA.round(x), WEIGHT.round(model.w), BIAS.round(model.b))
    summands = Integer(4, 1).round(h), Integer(4, 1).round(F.relu(Integer(5, 2).round(h)))
    expected = Integer(6, 1).round(F.relu(sum(summands))) @ Integer(5, 2).round(model.m)
    assert torch.equal(quantize(graph, by_site)(x), expected)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        h = x + x
        return self.fc(self.fc(h))


def test_both_inputs_of_an_addition_are_quantized_also_where_they_are_one():
    x = inputs(5, 4)
    model = Twice()
    out = quantize(captured(model, 4), {"add": {"data_in": DATA, "data_in_2": DATA}})(x)
    assert torch.equal(out, model.fc(model.fc(DATA.round(x) + DATA.round(x))))
    one = quantize(captured(model, 4), {"add": {"data_in": DATA}})(x)
    assert torch.equal(one, model.fc(model.fc(DATA.round(x) + x)))


def test_calls_of_a_shared_module_have_separate_formats():
    x, model = inputs(5, 4), Twice()
    graph = captured(model, 4)
    fc = model.fc

    def linear(v, weight):
        return F.linear(v.double(), weight.round(fc.weight).double()).float() + fc.bias

    fine, coarse = Integer(8, 7), Integer(3, 2)
    both = quantize(graph, {"fc": {"weight": fine}, "fc_1": {"weight": coarse}})
    assert torch.equal(both(x), linear(linear(x + x, fine), coarse))
    second = quantize(graph, {"fc_1": {"weight": coarse}})
    assert torch.equal(second(x), linear(fc(x + x), coarse))


def models():
    return {
        "jsc-like": (nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(inplace=True)), (6,)),
        "conv": (nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)), (2, 5, 5)),
        "functional": (Functional(), (6,)),
        "shared": (Twice(), (4,)),
        "untraceable": (Untraceable(), (4,)),
    }


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x):
        return self.act(self.fc(x)) if x.sum() > -1e9 else x


NAMES = list(models())


@pytest.mark.parametrize("name", NAMES)
def test_without_formats_the_outputs_are_those_of_the_model_bit_by_bit(name):
    model, shape = models()[name]
    graph, x = captured(model, *shape), inputs(9, *shape)
    assert torch.equal(quantize(graph, {})(x), model.eval()(x))
    assert torch.equal(quantize(graph, {s.name: {} for s in graph.sites})(x), model(x))


@pytest.mark.parametrize("form", ["integer", "affine"])
@pytest.mark.parametrize("name", NAMES)
def test_baked_weights_compute_the_same_and_are_what_the_format_holds(name, form):
    model, shape = models()[name]
    graph, x = captured(model, *shape), inputs(9, *shape)
    make = {
        "integer": lambda _: Integer(5, "auto"),
        "affine": lambda spec: Affine.parse({"width": 5, "range": "mse"}, spec.kind()),
    }[form]
    formats = calibrate(graph, {s.name: {o: make(s.operation.operand(o)) for o in s.operands} for s in graph.sites}, x)
    before = copy.deepcopy(graph.model.state_dict())
    soft, baked = quantize(graph, formats), quantize(graph, formats, bake=True)
    assert torch.equal(soft(x), baked(x))
    assert not torch.equal(soft(x), graph.model(x))
    assert state_is(graph.model, before)
    assert not soft.training
    # Copies have nothing in common with one another, or with the captured model.
    copied = copy.deepcopy(soft)
    expected = soft(x).detach()
    with torch.no_grad():
        for p in [*baked.parameters(), *copied.parameters()]:
            p.zero_()
    assert torch.equal(soft(x), expected)
    assert state_is(graph.model, before)


@pytest.mark.parametrize("name", ["jsc-like", "conv", "untraceable"])
def test_module_sites_keep_their_class_and_the_keys_of_the_state_dict(name):
    model, shape = models()[name]
    graph, x = captured(model, *shape), inputs(9, *shape)
    formats = {s.name: {"data_in": DATA, "weight": WEIGHT} if s.weight else {"data_in": DATA} for s in graph.sites}
    twin = quantize(graph, formats, bake=True)
    assert type(twin) is type(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert all(isinstance(m, type(model.get_submodule(n))) for n, m in twin.named_modules() if n)
    # What is deployed can be loaded into a soft twin, and computes the same there.
    soft = quantize(graph, formats)
    soft.load_state_dict(twin.state_dict())
    assert torch.equal(soft(x), twin(x))
    weight = next(s for s in graph.sites if s.weight)
    stored = twin.state_dict()[weight.weight]
    assert torch.equal(WEIGHT.round(model.state_dict()[weight.weight]), stored)


class FunctionalLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 1))

    def forward(self, x):
        return F.linear(x, self.weight)


@pytest.mark.parametrize("functional", [False, True])
def test_a_weight_that_is_cut_off_can_come_back(functional):
    model = FunctionalLayer() if functional else nn.Sequential(nn.Linear(1, 2, bias=False))
    (weight,) = model.parameters()
    weight.data = torch.tensor([[9.0], [0.25]])
    graph = captured(model, 1)
    (site,) = (s for s in graph.sites if s.op == "linear")
    twin = quantize(graph, {site.name: {"weight": Integer(4, 2)}})  # up to 1.75
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.25)
    for _ in range(40):
        optimizer.zero_grad()
        (twin(torch.ones(1, 1)) - 0.5).square().sum().backward()
        optimizer.step()
    assert twin(torch.ones(1, 1)).flatten().tolist() == [0.5, 0.5]


def test_gradients_reach_the_float_weights_of_a_quantized_model(tiny_mlp):
    twin = quantize(captured(tiny_mlp, 4), {"fc1": ALL, "fc2": ALL})
    twin(inputs(16, 4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in twin.parameters())


def test_parameters_that_are_frozen_stay_so(tiny_mlp):
    tiny_mlp.fc1.weight.requires_grad_(False)
    for bake in (False, True):
        twin = quantize(captured(tiny_mlp, 4), {"fc1": ALL}, bake=bake)
        assert {n: p.requires_grad for n, p in twin.named_parameters()} == {
            n: p.requires_grad for n, p in tiny_mlp.named_parameters()
        }


@pytest.mark.parametrize("name", NAMES)
def test_calibration_looks_at_the_float_model_alone(name):
    model, shape = models()[name]
    graph, x = captured(model, *shape), inputs(64, *shape)
    wanted = {s.name: {o: Integer(6, "auto") for o in s.operands} for s in graph.sites}
    whole = calibrate(graph, wanted, x)
    assert not any(f.calibrates for operands in whole.values() for f in operands.values())
    for site in graph.sites:
        for operand in site.operands:
            alone = calibrate(graph, {site.name: {operand: Integer(6, "auto")}}, x)
            assert alone[site.name][operand] == whole[site.name][operand]


def test_calibration_learns_from_what_arrives_at_the_operand(tiny_mlp):
    graph, x = captured(tiny_mlp, 4), inputs(200, 4)
    auto = Integer(6, "auto")
    learned = calibrate(graph, {"fc1": {"data_in": auto, "weight": auto}, "fc2": {"data_in": auto}}, x)
    hidden = F.relu(tiny_mlp.fc1(x)).detach()
    assert learned["fc1"] == {"data_in": auto.calibrated(x), "weight": auto.calibrated(tiny_mlp.fc1.weight)}
    assert learned["fc2"]["data_in"] == auto.calibrated(hidden)
    # What does not calibrate comes back as it is.
    assert calibrate(graph, {"fc1": {"weight": WEIGHT}}, x) == {"fc1": {"weight": WEIGHT}}


def test_a_channelwise_input_scale_follows_the_channels_of_an_image():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten())
    x = inputs(8, 3, 4, 4) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    form = Affine.parse({"width": 8, "granularity": "channel"}, ACTIVATION)
    learned = calibrate(captured(model, 3, 4, 4), {"_0": {"data_in": form}}, x)["_0"]["data_in"]
    spans = [float(x[:, c].max() - x[:, c].min()) for c in range(3)]
    assert learned.scale == pytest.approx([s / 255 for s in spans])
