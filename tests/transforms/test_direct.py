"""Layers that a kernel rounds, multiplies and scales in one call have the bits of the deployed layer; what the kernel does
not take goes the usual way."""

import pytest
import torch
from test_arithmetic import deployed, network

from bitfront.kernels import convolution
from bitfront.transforms import direct
from bitfront.transforms.direct import DirectProduct, Kept
from bitfront.transforms.quantize import twin_of

pytestmark = pytest.mark.skipif(not convolution.fast_bytes(), reason="this processor does not multiply bytes fast")
FORMS = {
    "int8": (("affine", {"width": 8}), ("affine", {"width": 8})),
    "unsigned": (("affine", {"width": 8, "symmetric": False}), ("affine", {"width": 3, "granularity": "tensor"})),
    "asymmetric": (("affine", {"width": 5, "symmetric": False}), ("affine", {"width": 6})),
    "fixed point": (("integer", {"width": 8, "frac_width": 5}), ("integer", {"width": 4, "frac_width": 6})),
    "both": (("affine", {"width": 7}), ("integer", {"width": 8, "frac_width": 7})),
}


def twins(name, forms, x):
    """(the deployed layer, the one that a kernel may compute, what that one keeps)."""
    model = network(name)
    graph, formats, quantized = deployed(model, x, *forms)
    (site,) = graph.sites
    twin = twin_of(model.get_submodule(site.path), site, formats[site.name])
    twin.kept = Kept(direct={})
    with torch.no_grad():
        twin(x[:3])  # the first call rounds the weight
    return quantized, twin, twin.kept


def samples(*shape):
    return 1.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(1)) - 0.2


@pytest.mark.parametrize("forms", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", ["linear", "without a bias"])
def test_the_kernel_gives_the_bits_of_the_deployed_layer(name, forms):
    x = samples(203, 48)
    quantized, twin, kept = twins(name, forms, x)
    shapes = x, x[:1], x[:64], x[0], x[:200].view(10, 20, 48), x.t().contiguous().t(), 100 * x
    with torch.no_grad():
        for given in shapes:
            assert torch.equal(twin(given), quantized(given))
    (product,) = kept.direct.values()
    with torch.no_grad():
        assert torch.equal(product(x), quantized(x))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_rows(threads, monkeypatch):
    monkeypatch.setattr(direct, "THREAD_PRODUCTS", 1000)
    before = torch.get_num_threads()
    x = samples(333, 48)
    quantized, twin, _ = twins("linear", FORMS["int8"], x)
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            for rows in (1, 63, 64, 65, 130, 192, 333):
                assert torch.equal(twin(x[:rows]), quantized(x[:rows]))
    finally:
        torch.set_num_threads(before)


def test_what_the_kernel_does_not_take_goes_the_usual_way():
    x = samples(9, 48)
    quantized, twin, kept = twins("linear", FORMS["int8"], x)
    with torch.no_grad():
        twin(x)
        (product,) = kept.direct.values()
        broken = x.clone()
        broken[4, 7] = torch.nan
        assert product(broken) is None
        assert torch.equal(twin(broken).isnan(), quantized(broken).isnan())
        assert product(x.double()) is None
        assert product(x[:, :40]) is None
        assert product(x[:0]) is None
        assert twin(x[:0]).shape == (0, 7)
    assert product(x) is None  # gradients may be wanted
    assert twin(x.requires_grad_()).requires_grad


@pytest.mark.parametrize(
    "forms",
    [
        (("affine", {"width": 9}), ("affine", {"width": 8})),
        (("affine", {"width": 8}), ("affine", {"width": 9})),
        (("affine", {"width": 8}), ("affine", {"width": 8, "symmetric": False, "granularity": "tensor"})),
        (("affine", {"width": 8}), None),
        (None, ("affine", {"width": 8})),
        (("minifloat_ieee", {"width": 8, "exponent_width": 4}), ("affine", {"width": 8})),
    ],
)
def test_operands_that_do_not_fit_bytes_go_the_usual_way(forms):
    x = samples(20, 48)
    quantized, twin, kept = twins("linear", forms, x)
    with torch.no_grad():
        assert torch.equal(twin(x), quantized(x))
    assert [p for p in kept.direct.values() if p is not None] == []


def test_deployed_layers_are_not_computed_by_the_kernel(monkeypatch):
    x = samples(9, 48)
    quantized, twin, _ = twins("linear", FORMS["int8"], x)
    calls, call = [], DirectProduct.__call__
    monkeypatch.setattr(DirectProduct, "__call__", lambda self, x: calls.append(1) or call(self, x))
    with torch.no_grad():
        quantized(x)
        assert not calls
        twin(x)
        assert calls
