"""Bit operations of a site: the published figures of the jet-tagging network, and convolutions by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from bitfront.graph import capture, costs


def jet_tagger() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in [(16, 64), (64, 32), (32, 32)]:
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, 5))


def sites(model: nn.Module, *shape: int):
    return capture(nn.Sequential(*model, nn.Flatten()), torch.randn(2, *shape)).sites


def bops(site, *bits, **more):
    return sum(costs.bops(product, *bits, **more) for product in site.products)


def ebops(site, *bits, **more):
    return sum(costs.ebops(product, *bits, **more) for product in site.products)


@pytest.mark.parametrize(
    ("bits", "input_bits", "published"),
    [(32, 32, 4_652_832), (8, 32, 583_968), (6, 32, 412_960), (6, 16, 298_272), (6, 6, 226_592), (4, 32, 267_808)],
)
def test_bops_of_the_jet_tagger_are_those_published(bits, input_bits, published):
    layers = sites(jet_tagger(), 16)
    data = [input_bits, *[bits] * (len(layers) - 1)]
    assert sum(bops(site, b, bits) for site, b in zip(layers, data, strict=True)) == published


def test_pruning_saves_products_and_not_the_additive_terms():
    first = sites(jet_tagger(), 16)[0]
    assert bops(first, 16, 6, density=0.25) == 1024 * (0.25 * 96 + 16 + 6 + 4)
    uniform = sum(bops(s, 32, 32, density=0.3) for s in sites(jet_tagger(), 16))
    assert round(uniform) == 1_602_131


@pytest.mark.parametrize(
    ("hidden", "bits", "input_bits", "published"),
    [((64, 32, 32), 6, 16, 214_656), ((32, 16, 16), 6, 6, 48_960), ((16, 8, 8), 4, 4, 7_808)],
)
def test_ebops_of_dense_jet_taggers_are_those_published(hidden, bits, input_bits, published):
    sizes = [16, *hidden, 5]
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))
    layers = sites(model, 16)
    data = [input_bits, *[bits] * (len(layers) - 1)]
    total = sum(ebops(s, b, bits * s.weight_shape[0] * s.weight_shape[1]) for s, b in zip(layers, data, strict=True))
    assert total == published


def test_a_convolution_uses_its_weights_once_per_position():
    site = sites([nn.Conv2d(4, 8, (3, 2), groups=2)], 4, 7, 9)[0]
    assert site.products[0].fan_in == 12
    positions = 5 * 8
    assert bops(site, 8, 4) == pytest.approx(8 * positions * 12 * (32 + 8 + 4 + np.log2(12)))
    assert ebops(site, 8, 4 * 50) == 50 * 32 * positions


def test_a_linear_layer_on_rows_uses_its_weights_once_per_row():
    site = sites([nn.Linear(6, 5)], 3, 6)[0]
    assert bops(site, 8, 4) == pytest.approx(3 * 30 * (32 + 12 + np.log2(6)))
    assert ebops(site, 8, 4 * 30) == 3 * 30 * 32


def test_a_product_of_activations_is_a_site_with_weights():
    class Scores(nn.Module):
        def forward(self, x):
            return torch.matmul(x, x.transpose(1, 2))

    site = capture(Scores(), torch.randn(2, 3, 6)).site("matmul")
    assert site.products[0].fan_in == 6
    assert bops(site, 8, 4) == pytest.approx(9 * 6 * (32 + 12 + np.log2(6)))
    assert ebops(site, 8, 4 * 18) == 54 * 32


def test_options_are_counted_at_once():
    linear, relu = sites([nn.Linear(6, 5), nn.ReLU()], 6)
    data, weight, share = np.array([8, 8, 16]), np.array([4, 8, 4]), np.array([1.0, 0.5, 0.0])
    each = [bops(linear, d, w, p) for d, w, p in zip(data, weight, share, strict=True)]
    assert bops(linear, data, weight, share).tolist() == each
    assert ebops(linear, data, weight * 30 * share).tolist() == [30 * 32, 15 * 64, 0]
    assert relu.products == ()
