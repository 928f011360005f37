"""Products of bytes by oneDNN: what the probe says, and what it says where operators are missing or wrong."""

from types import SimpleNamespace

import pytest
import torch

from bitfront.kernels import onednn

probe = onednn.exact.__wrapped__
exact_only = pytest.mark.skipif(not onednn.exact(), reason="no exact kernels of bytes on this machine")
OPERATORS = ("qlinear_prepack", "qlinear_pointwise", "qconv_prepack", "qconv2d_pointwise")


@pytest.mark.parametrize("missing", OPERATORS)
def test_a_build_of_torch_without_an_operator_has_no_kernels(missing, monkeypatch):
    there = {name: getattr(torch.ops.onednn, name) for name in OPERATORS if name != missing}
    monkeypatch.setattr(torch.ops, "onednn", SimpleNamespace(**there))
    assert probe() is False


@pytest.mark.parametrize("other", OPERATORS)
def test_an_operator_that_takes_other_arguments_is_not_used(other, monkeypatch):
    def refuse(*_):
        raise RuntimeError("expected at most 3 arguments")

    there = {name: getattr(torch.ops.onednn, name) for name in OPERATORS}
    monkeypatch.setattr(torch.ops, "onednn", SimpleNamespace(**{**there, other: refuse}))
    assert probe() is False


@exact_only
@pytest.mark.parametrize("wrong", ["qlinear_pointwise", "qconv2d_pointwise"])
def test_a_processor_that_saturates_has_no_kernels(wrong, monkeypatch):
    there = {name: getattr(torch.ops.onednn, name) for name in OPERATORS}
    right = there[wrong]

    def saturating(*arguments):
        # The largest sums are cut, as where pairs of products are added in 16 bits.
        out = right(*arguments)
        return out.clamp(max=0.9 * float(out.max()))

    assert probe() is True
    monkeypatch.setattr(torch.ops, "onednn", SimpleNamespace(**{**there, wrong: saturating}))
    assert probe() is False


def operands(samples, *shape):
    """Bytes from 0 to 255, weights, steps, biases with two decimals."""
    random = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, samples, generator=random)
    weight = torch.randint(-128, 128, shape, generator=random)
    return x, weight, 2.0 ** -torch.arange(shape[0]), torch.randn(shape[0], generator=random).round(decimals=2)


@exact_only
@pytest.mark.parametrize(("kind", "zero"), [(torch.uint8, 7), (torch.int8, -3)])
def test_a_linear_layer_computes_what_its_integers_say(kind, zero):
    x, weight, steps, bias = operands((4, 20), 9, 20)
    x = x if kind == torch.uint8 else x - 128
    kernel = onednn.LinearKernel.of(weight.to(torch.int8), steps, bias, 0.5, zero)
    wanted = (x - zero).double() @ weight.double().T * 0.5 * steps + bias
    torch.testing.assert_close(kernel(x.to(kind)).double(), wanted, rtol=1e-6, atol=1e-6)


@exact_only
@pytest.mark.parametrize("groups", [1, 3])
def test_a_convolution_computes_what_its_integers_say(groups):
    x, weight, steps, bias = operands((2, 6, 5, 7), 9, 6 // groups, 2, 3)
    geometry = ([2, 1], [1, 0], [1, 2])
    kernel = onednn.ConvolutionKernel.of(weight.to(torch.int8), steps, bias, 0.5, 7, geometry, groups)
    sums = torch.conv2d((x - 7).double(), weight.double(), None, *geometry, groups)
    wanted = sums * 0.5 * steps.view(-1, 1, 1) + bias.view(-1, 1, 1)
    out = kernel(x.to(torch.uint8).contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(out.double(), wanted, rtol=1e-6, atol=1e-6)
