"""Products of quantized operands against whole numbers summed by NumPy, and what their bits must not depend on."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bitfront.formats import FORMATS
from bitfront.formats.base import ACTIVATION, WEIGHT
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.kernels import plain
from bitfront.transforms import quantize
from bitfront.transforms.arithmetic import EXACT, whole, whole_product
from bitfront.transforms.observe import calibrate


def parsed(name, kind, **settings):
    return FORMATS.get(name).parse(settings, kind)


class Matrix(nn.Module):
    """A product with a parameter, and a product of two activations."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 12))

    def forward(self, x):
        a = x.reshape(len(x), 4, 12) @ self.weight
        return torch.bmm(a, x.reshape(len(x), 12, 4)).flatten(1)


class Called(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(48, 5)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.inner.weight, self.inner.bias)


def images(layer):
    return nn.Sequential(nn.Unflatten(1, (3, 4, 4)), layer, nn.Flatten())


LAYERS = {
    "linear": lambda: nn.Linear(48, 7),
    "without a bias": lambda: nn.Linear(48, 7, bias=False),
    "function": Called,
    "conv1d": lambda: nn.Sequential(nn.Unflatten(1, (6, 8)), nn.Conv1d(6, 4, 3, stride=2, padding=1), nn.Flatten()),
    "conv2d": lambda: images(nn.Conv2d(3, 6, 3, padding=1)),
    "same": lambda: images(nn.Conv2d(3, 6, (2, 3), padding="same", dilation=(2, 1))),
    "circular": lambda: images(nn.Conv2d(3, 6, 3, stride=2, padding=1, padding_mode="circular")),
    "depthwise": lambda: images(nn.Conv2d(3, 6, 3, padding=1, groups=3)),
    "matrix": Matrix,
}


def network(name, seed=0):
    torch.manual_seed(seed)
    return LAYERS[name]().eval()


def deployed(model, x, data, weight):
    """The model with formats at all of its products, and these formats, calibrated."""
    graph = capture(model, x[:2])
    wanted = {}
    for site in graph.sites:
        factor = site.flows("weight")
        wanted[site.name] = {
            "data_in": parsed(data[0], ACTIVATION, **data[1]) if data else None,
            "weight": parsed(weight[0], site.operation.operand("weight").kind(from_samples=factor), **weight[1])
            if weight
            else None,
        }
        wanted[site.name] = {o: f for o, f in wanted[site.name].items() if f is not None}
    formats = calibrate(graph, wanted, x)
    return graph, formats, quantize(graph, formats)


def codes(form, values):
    """Codes less the zero point as int64, and the steps as float32, computed from scale and zero point by NumPy."""
    shape = [1] * values.ndim
    if len(form.scale) > 1:
        shape[form.axis % values.ndim] = -1
    scale = np.float32(form.scale).reshape(shape)
    zero = np.array(form.zero_point).reshape(shape)
    low, high = form.codes
    return (np.clip(np.rint(values / scale) + zero, low, high) - zero).astype(np.int64), np.float32(form.scale)


AFFINE = {
    "int8": (("affine", {"width": 8}), ("affine", {"width": 8})),
    "asymmetric": (("affine", {"width": 6}), ("affine", {"width": 5, "symmetric": False, "granularity": "tensor"})),
    "wide": (("affine", {"width": 16}), ("affine", {"width": 16})),
}


@pytest.mark.parametrize("formats", AFFINE.values(), ids=AFFINE)
@pytest.mark.parametrize("name", ["linear", "without a bias", "function"])
def test_linear_layers_are_sums_of_whole_numbers(name, formats):
    model, x = network(name), torch.randn(200, 48, generator=torch.Generator().manual_seed(1))
    graph, chosen, twin = deployed(model, x, *formats)
    ((site, by_operand),) = chosen.items()
    weight, bias = (
        None if n is None else dict(model.named_parameters())[n]
        for n in (graph.site(site).weight, graph.site(site).bias)
    )
    cx, sx = codes(by_operand["data_in"], x.numpy())
    cw, sw = codes(by_operand["weight"], weight.detach().numpy())
    expected = (cx @ cw.T).astype(np.float32) * (sx * sw)
    if bias is not None:
        expected = expected + bias.detach().numpy()
    assert np.array_equal(twin(x).detach().numpy(), expected)


@pytest.mark.parametrize("formats", AFFINE.values(), ids=AFFINE)
def test_convolutions_are_sums_of_whole_numbers(formats):
    model, x = network("conv2d"), torch.randn(40, 48, generator=torch.Generator().manual_seed(1))
    _, chosen, twin = deployed(model, x, *formats)
    ((_, by_operand),) = chosen.items()
    layer = model[1]
    cx, sx = codes(by_operand["data_in"], x.view(-1, 3, 4, 4).numpy())
    cw, sw = codes(by_operand["weight"], layer.weight.detach().numpy())
    padded = np.pad(cx, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    sums = np.einsum("nchwij,ocij->nohw", windows, cw)
    column = (-1, 1, 1)
    expected = sums.astype(np.float32) * (sx * sw).reshape(column) + layer.bias.detach().numpy().reshape(column)
    assert np.array_equal(twin(x).detach().numpy(), expected.reshape(40, -1))


FORMS = {
    "integer of 16 bits": (("integer", {"width": 16, "frac_width": "auto"}),) * 2,
    "a point per channel": (("integer", {"width": 8, "frac_width": "auto", "granularity": "channel"}),) * 2,
    "a point per element": (
        ("integer", {"width": 8, "frac_width": "auto"}),
        ("integer", {"width": 4, "frac_width": "auto", "granularity": "element"}),
    ),
    "affine": AFFINE["int8"],
    "groups": (("affine", {"width": 8}), ("affine", {"width": 4, "group_size": 4})),
    "mx": (("mx", {"width": 6}),) * 2,
    "half precision": (("float16", {}),) * 2,
    "weights alone": (None, ("affine", {"width": 4})),
    "inputs alone": (("affine", {"width": 4}), None),
    "nf4": (None, ("nf4", {})),
}


def for_parameters_alone(form):
    return form and ("group_size" in form[1] or form[0] == "nf4" or form[1].get("granularity") == "element")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("formats", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_bits_depend_on_nothing_beside_the_sample(name, formats):
    """Any part of the samples, in any order, in float32 and on several threads: the same bits."""
    if name == "matrix" and any(map(for_parameters_alone, formats)):
        pytest.skip("the second factor of a product of activations has no groups, nor a point per element")
    model, x = network(name), torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    _, _, twin = deployed(model, x, *formats)
    with torch.no_grad():
        whole_batch = twin(x)
        for size in (1, 7, 33):
            assert torch.equal(torch.cat([twin(part) for part in x.split(size)]), whole_batch)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
        assert torch.equal(twin(x[order]), whole_batch[order])
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            assert torch.equal(twin(x), whole_batch)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("data", ["tensor", "channel"])
@pytest.mark.parametrize("weight", ["tensor", "channel", "element"])
@pytest.mark.parametrize("name", ["linear", "conv2d", "depthwise"])
def test_sums_of_fixed_point_are_those_of_fractions(name, data, weight):
    """Whatever has a binary point of its own: the exact sum of products, rounded to float32 once, plus the bias."""
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.01, 9, 48)
    settings = {"width": 6, "frac_width": "auto"}
    both = [("integer", {**settings, "granularity": granularity}) for granularity in (data, weight)]
    model = network(name)
    _, chosen, twin = deployed(model, x, *both)
    ((_, forms),) = chosen.items()
    layer = model if name == "linear" else model[1]
    given = x if name == "linear" else x.view(-1, 3, 4, 4)
    rows = forms["weight"].round(layer.weight.detach()).double()
    rounded = forms["data_in"].round(given).double()
    if name != "linear":
        rounded = torch.nn.functional.unfold(rounded, 3, padding=1).transpose(1, 2)  # a row per position
        if name == "depthwise":
            spread = torch.zeros(6, 3, 3, 3, dtype=torch.float64)
            for channel in range(6):
                spread[channel, channel // 2] = rows[channel, 0]
            rows = spread
        rows = rows.flatten(1)
    sums = [
        [float(sum(Fraction(a) * Fraction(b) for a, b in zip(row, w, strict=True) if a and b)) for w in rows.tolist()]
        for row in rounded.flatten(0, -2).tolist()
    ]
    expected = np.float32(np.array(sums)) + layer.bias.detach().numpy()
    if name != "linear":
        expected = expected.reshape(5, 16, 6).transpose(0, 2, 1).reshape(5, -1)
    assert np.array_equal(twin(x).detach().numpy(), expected)


def test_points_too_far_apart_are_summed_in_order():
    from bitfront.operations.dense import LINEAR

    data, weight = Integer(8, (0, 40), shape=(1, 2), granularity="channel", axis=1), torch.ones(1, 2)
    assert "53 bits" in whole_product(LINEAR.product, weight, (data, Integer(16, (0, 30), shape=(1, 2))))
    near = whole_product(LINEAR.product, weight, (replace(data, frac_width=(0, 10)), Integer(4, (0, 3), shape=(1, 2))))
    assert near.inputs.step == 2.0**-10
    assert near.weight.whole.step == 2.0**-3
    # 128 and 127 / 2^10 in steps of 2^-10, times the weights, which are 8 steps each.
    assert near.longest == 128 * 2**10 * 8 * 2


@pytest.mark.parametrize("formats", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_products_are_near_those_of_torch_and_have_their_gradients(name, formats):
    if name == "matrix" and any(map(for_parameters_alone, formats)):
        pytest.skip("the second factor of a product of activations has no groups, nor a point per element")
    model, x = network(name), torch.randn(16, 48, generator=torch.Generator().manual_seed(1))
    _, _, twin = deployed(model, x, *formats)
    results = []
    for training in (False, True):
        twin.train(training).zero_grad()
        given = x.clone().requires_grad_()
        out = twin(given)
        (out * torch.linspace(0, 1, out.shape[1])).sum().backward()
        results.append((out.detach(), given.grad, *(p.grad for p in twin.parameters())))
    for evaluated, trained in zip(*results, strict=True):
        assert (evaluated is None) == (trained is None)
        if evaluated is not None:
            assert torch.allclose(evaluated, trained, rtol=1e-4, atol=1e-4 * float(trained.abs().max()))
    with torch.no_grad():
        assert torch.equal(twin.eval()(x), results[0][0])


@given(st.integers(2, 16), st.integers(2, 16), st.integers(1, 300), st.integers(0, 2**31))
def test_sums_cut_into_digits_are_exact(data_width, weight_width, inner, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(inner, 3, bias=False)
    x = torch.randn(5, inner, generator=generator)
    data = parsed("affine", ACTIVATION, width=data_width).calibrated(x)
    weight = parsed("affine", WEIGHT, width=weight_width).calibrated(layer.weight.detach())
    from bitfront.operations.dense import LINEAR

    rounded = weight.round(layer.weight.detach())
    way = whole_product(LINEAR.product, rounded, (data, weight))
    inputs, numbers = way.inputs, way.weight
    exact = codes(data, x.numpy())[0] @ codes(weight, layer.weight.detach().numpy())[0].T
    assert np.abs(exact).max() <= numbers.longest(inputs)
    digits = numbers.digits(inputs)
    if numbers.longest(inputs) <= EXACT:
        return
    if digits is not None:
        assert torch.equal(sum(digits), numbers.numbers)
        parts = [inputs.numbers(data.round(x)) @ d.T for d in digits]
        assert np.array_equal(sum(p.double() for p in parts).numpy(), exact.astype(np.float64))


def test_without_compiled_kernels_the_bits_are_the_same(monkeypatch):
    from bitfront import kernels

    x = torch.randn(50, 48, generator=torch.Generator().manual_seed(1))
    for name in LAYERS:
        _, _, twin = deployed(network(name), x, *FORMS["mx"])
        with torch.no_grad():
            compiled = twin(x)
            with monkeypatch.context() as patched:
                patched.setattr(kernels, "compiled", lambda: False)
                assert torch.equal(twin(x), compiled)


def test_the_plain_kernel_sums_in_order():
    """0.5 is lost beside 2^53 where it comes second, and not where it comes last."""
    x = torch.tensor([[[1.0], [0.5], [-1.0]]])
    assert float(plain.ordered(torch.tensor([[2.0**60, 1.0, 2.0**60]]), x)) == 0.0
    assert float(plain.ordered(torch.tensor([[2.0**60, 1.0, 2.0**60]]), x[:, [0, 2, 1]][:, [0, 1, 2]])) != 0.5
    assert float(plain.ordered(torch.tensor([[2.0**60, 2.0**60, 1.0]]), x[:, [0, 2, 1]])) == 0.5


def test_what_is_no_whole_number_is_said():
    from bitfront.operations.dense import LINEAR

    weight = torch.randn(4, 64)
    int8 = parsed("affine", ACTIVATION, width=8).calibrated(torch.randn(9, 64))
    groups = parsed("affine", WEIGHT, width=4, group_size=16).calibrated(weight)
    per_row = parsed("affine", WEIGHT, width=4).calibrated(weight)
    assert whole_product(LINEAR.product, weight, (None, per_row)) == "an operand is left in float"
    assert "differ within a sum" in whole_product(LINEAR.product, groups.round(weight), (int8, groups))
    wide = parsed("minifloat_ieee", WEIGHT, width=12, exponent_width=5)
    data = parsed("minifloat_ieee", ACTIVATION, width=12, exponent_width=5)
    assert "53 bits" in whole_product(LINEAR.product, wide.round(weight), (data, wide))
    assert whole_product(LINEAR.product, per_row.round(weight), (int8, per_row)).longest <= EXACT
    assert whole(int8.grid).coded
