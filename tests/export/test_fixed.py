"""Types of fixed-point numbers: wide enough for every number, and for the roundings that follow."""

import numpy as np
import torch
from torch import nn

from bitfront.exporters.fixed import Fixed, input_type, types_of
from bitfront.exporters.lowering import lowered
from bitfront.formats.integer import Integer
from bitfront.graph import capture


def _program(*settings, parallel=False):
    """Linear layers one after the other; each has a format for its input, and weights of 4 bits below 1/8."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in settings])

        def forward(self, x):
            if parallel:
                return self.layers[0](x) + self.layers[1](x)
            for layer in self.layers:
                x = layer(x)
            return x

    graph = capture(Net(), torch.randn(2, 4))
    layers = [s.name for s in graph.sites if s.weight]
    formats = {n: {"data_in": form, "weight": Integer(4, 6)} for n, form in zip(layers, settings, strict=True)}
    return lowered(graph, formats)


def test_a_type_beside_another_holds_both():
    assert Fixed(4, 4, False).beside(Fixed(4, 2, True)) == Fixed(6, 4, True)
    assert Fixed(4, 1, False).beside(Fixed(3, 1, True)) == Fixed(5, 1, True)


def test_what_is_rounded_has_bits_before_the_ones_that_are_kept():
    # Sums below 1/4 are rounded to multiples of 4.
    program = _program(Integer(2, 5), Integer(4, -2))
    (number,) = [step.sources[0] for step in program.steps[1:] if type(step).__name__ == "Round"]
    assert Fixed.of(program.values[number]).whole < 3
    assert types_of(program)[number].whole == 3


def test_an_input_that_is_rounded_to_several_grids_keeps_every_side_of_every_half():
    assert input_type(_program(Integer(6, 3))) == (Fixed(6, 3, True), True)
    kind, rounds = input_type(_program(Integer(6, 3), Integer(6, 5), parallel=True))
    assert not rounds
    halves = (np.arange(-40, 40) + 0.5).astype(np.float32) * np.float32(2**-5)
    near = np.concatenate([np.nextafter(halves, np.float32(end)) for end in (-9, 9)])
    assert (np.floor(np.ldexp(near.astype(np.float64), kind.point)) / 2**kind.point == near).all()


def test_an_input_without_a_sign_that_is_rounded_down_keeps_its_largest_numbers():
    """Its type has a sign, so it needs a bit more: without it, everything above a half of the grid became that half."""
    for signed in (False, True):
        kind, rounds = input_type(_program(Integer(8, 8, signed=signed, rounding="floor")))
        assert not rounds
        largest = (255 if not signed else 127) / 256
        assert kind.signed
        assert 2.0 ** (kind.whole - 1) > largest
