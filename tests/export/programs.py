"""Networks that have an integer program, and random formats for them."""

import hypothesis.strategies as st
import torch
from hypothesis import assume
from torch import nn

from bitfront.errors import ExportError
from bitfront.exporters.lowering import lowered
from bitfront.formats.affine import Affine
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.transforms import calibrate, quantize
from bitfront.transforms.fold import folded
from random_networks import Conv, Depthwise, Grouped, Network, Plain, Projected, Residual


class Overlapping(nn.Module):
    """Two pairs side by side, cut at different places, subtracted; and a part of the channels, leaky, shuffled."""

    def __init__(self, c, n):
        super().__init__()
        self.out = 4 + n
        self.a, self.b = nn.Conv2d(c, 1 + n, 1), nn.Conv2d(c, 3, 1)
        self.c, self.leak, self.bound = nn.Conv2d(c, self.out, 3, padding=1), nn.LeakyReLU(0.1), nn.ReLU6()

    def forward(self, x):
        y = torch.cat([self.a(x), self.b(x)], 1) - self.leak(self.c(x))
        first, second = self.bound(y).split([1, self.out - 1], dim=1)
        return torch.cat([second, first], dim=1)


class Pooled(nn.Module):
    """Windows of three: the largest, and the mean, which has no exact quotient."""

    def __init__(self, c, n):
        super().__init__()
        self.out, self.a = 2 + n, nn.Conv2d(c, 2 + n, 1)
        self.pool = nn.AvgPool2d(3, 1, 1) if n % 2 else nn.MaxPool2d(3, 1, 1)

    def forward(self, x):
        return self.pool(self.a(x))


BLOCKS = (Plain, Residual, Projected, Depthwise, Grouped, Overlapping, Pooled)
__all__ = ["BLOCKS", "Conv", "Network", "case", "cases"]


def _format(draw, family, operand, kind, signed):
    width = draw(st.integers(2, 16 if operand == "bias" else 8))
    if family == "integer":
        return Integer.parse(
            {"width": width, "frac_width": draw(st.sampled_from(["auto", 1, 3, 6]))}, kind, signed=signed
        )
    settings = {"width": width, "symmetric": draw(st.sampled_from(["NA", True]))}
    return Affine.parse({**settings, "granularity": "NA" if operand == "weight" else "tensor"}, kind)


@st.composite
def cases(draw, families=("integer", "affine")):
    """(graph, formats, samples): a network with its norms folded, every site in a format."""
    plan = draw(st.lists(st.tuples(st.sampled_from(BLOCKS), st.integers(0, 3)), max_size=3))
    network = Network(plan, draw(st.booleans()))
    x = torch.randn(24, *Network.shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 3))))
    graph = folded(capture(network, x[:2]), x[:2]).graph
    family = draw(st.sampled_from(families))
    formats = {}
    for site in graph.sites:
        formats[site.name] = {
            o: _format(draw, family, o, site.operation.operand(o).kind(), o != "data_in" or site.negative_inputs_matter)
            for o in site.operands
        }
    return graph, calibrate(graph, formats, x), x


def case(graph, formats):
    """(program, deployed model); a network that has no program is not a case."""
    try:
        return lowered(graph, formats), quantize(graph, formats, bake=True)
    except ExportError as error:
        assume("more than" not in str(error) and "mean" not in str(error))
        raise
