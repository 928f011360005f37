"""Formats whose grids no fast path takes: a step per channel or per value, or values that are only some of a grid's. The
tree gives each candidate the numbers of its deployed model, and merges what the grid says is exact."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from networks import Chain, Clipped, Functional, Images, Normalised, ResidualImages, Signals, seeded_model
from test_tree import assert_as_alone, evaluator_of, job_of

from bitfront.formats.base import ACTIVATION, Format, FormatError, FormatParameter
from bitfront.formats.grid import Grid
from bitfront.testing import check_format
from bitfront.transforms.arithmetic import FLOAT

NETS = pytest.mark.parametrize(
    "network", [Chain, Normalised, Images, Clipped, ResidualImages, Signals, Functional], ids=lambda n: n.__name__
)


@dataclass(frozen=True)
class Stepped(Format):
    """Fixed point with a power of two per channel of a weight, per value of it, or for all."""

    width: int
    each: str
    steps: tuple[float, ...] | None = None
    shape: tuple[int, ...] = ()

    parameters: ClassVar[Mapping[str, FormatParameter]] = {
        "width": FormatParameter("bits of a value", low=2, high=8),
        "each": FormatParameter("what has a step", words=("channel", "value", "tensor")),
    }

    @classmethod
    def _build(cls, values, kind, signed):
        return cls(values["width"], values["each"])

    @property
    def bits(self):
        return self.width

    @property
    def label(self):
        return f"step{self.width}{self.each[0]}"

    @property
    def calibrates(self):
        return self.steps is None

    def calibrated(self, sample):
        if not self.calibrates:
            return self
        size = sample.abs() if self.each == "value" else sample.abs().flatten(1).amax(1)
        size = size.amax() if self.each == "tensor" else size
        steps = 2.0 ** torch.ceil(torch.log2(size.clamp(min=2.0**-20))) / 2 ** (self.width - 1)
        return replace(self, steps=tuple(steps.flatten().tolist()), shape=tuple(steps.shape))

    @property
    def grid(self):
        if self.steps is None:
            raise FormatError("must be calibrated before it is used")
        high = 2 ** (self.width - 1) - 1
        if not self.shape:
            return Grid(self.steps[0], -high - 1, high)
        step = torch.tensor(self.steps, dtype=torch.float64).reshape(self.shape)
        return Grid(step, -high - 1, high, block=(1,) * len(self.shape))

    def round(self, x):
        return self.grid.round(x)

    def bounds(self, x):
        return self.grid.ends(x)


@dataclass(frozen=True)
class Powers(Format):
    """0 and powers of two of either sign: some of the numbers of a grid, and another rounding than the grid's."""

    width: int

    parameters: ClassVar[Mapping[str, FormatParameter]] = {"width": FormatParameter("bits of a value", low=2, high=4)}

    @classmethod
    def _build(cls, values, kind, signed):
        return cls(values["width"])

    @property
    def bits(self):
        return self.width

    @property
    def label(self):
        return f"pow{self.width}"

    @property
    def sizes(self):
        return [2.0 ** (1 - e) for e in range(2 ** (self.width - 1) - 1)]

    @property
    def grid(self):
        smallest = min(self.sizes)
        return Grid(smallest, -int(2 / smallest), int(2 / smallest), complete=False)

    def round(self, x):
        values = torch.tensor([0.0, *sorted(self.sizes)], dtype=x.dtype)
        ends = (values[1:] + values[:-1]) / 2
        return torch.copysign(values[torch.bucketize(x.abs().contiguous(), ends)], x)

    def bounds(self, x):
        return -max(self.sizes), max(self.sizes)


def test_they_keep_the_contract(formats):
    formats.register("stepped")(Stepped)
    formats.register("powers")(Powers)
    check_format("stepped", {"width": 4, "each": "channel"}, positional=True)
    check_format("stepped", {"width": 4, "each": "tensor"}, kind=ACTIVATION)
    for width in (2, 3, 4):
        check_format("powers", {"width": width})
        check_format("powers", {"width": width}, kind=ACTIVATION)


@pytest.mark.sampled(2)
@NETS
@pytest.mark.parametrize("each", ["channel", "value"])
def test_steps_per_channel_or_value_have_the_numbers_of_the_deployed_model(network, each, formats):
    formats.register("stepped")(Stepped)
    data = {"data_in_width": [4, 6], "data_in_each": "tensor", "data_in_frac_width": "auto"}
    weights = {"weight_width": [2, 4], "weight_each": each, "weight_frac_width": "auto"}
    seed = {"default": {"name": ["stepped", "integer"], **data, **weights}}
    evaluator = evaluator_of(job_of(seeded_model(network), network.shape, seed, by="type"))
    codes = evaluator.space.sample(8, np.random.default_rng(0))
    assert_as_alone(evaluator, codes)


@pytest.mark.sampled(2)
@NETS
@pytest.mark.parametrize("data", ["tensor", "channel"])
def test_fixed_point_per_channel_or_element_has_the_numbers_of_the_deployed_model(network, data):
    rule = {"frac_width": ["auto"]}
    settings = {
        "data_in": {"width": [4, 6], **rule, "granularity": [data]},
        "weight": {"width": [2, 4], **rule, "granularity": ["tensor", "channel", "element"]},
        "bias": {"width": [5], **rule, "granularity": ["tensor", "channel"]},
    }
    keys = {f"{operand}_{key}": value for operand, table in settings.items() for key, value in table.items()}
    seed = {"default": {"name": ["integer", "NA"], **keys}}
    evaluator = evaluator_of(job_of(seeded_model(network), network.shape, seed, by="type"))
    codes = evaluator.space.sample(24, np.random.default_rng(0))
    assert_as_alone(evaluator, codes)
    assert not evaluator.plain
    assert not [why for why in evaluator.inexact.values() if why != FLOAT]


@NETS
def test_values_that_are_some_of_a_grid_are_merged_exactly(network, formats):
    formats.register("powers")(Powers)
    widths = {"data_in_width": [2, 3], "weight_width": [2, 3]}
    if network in (Chain, Images, Signals, Functional):
        widths["bias_width"] = [3]
    evaluator = evaluator_of(job_of(seeded_model(network), network.shape, {"default": {"name": ["powers"], **widths}}))
    codes = evaluator.space.sample(8, np.random.default_rng(0))
    assert_as_alone(evaluator, codes)
    if network is Chain:
        assert not evaluator.inexact


SHARED = {
    "block_fp": {"exponent_width": 8, "block_size": [1, 4]},
    "block_minifloat": {"exponent_width": 2, "exponent_bias_width": 8, "block_size": [1, 4]},
    "block_log": {"exponent_bias_width": 8, "block_size": [1, 4]},
    "log": {},
    "mx": {},
}


@pytest.mark.sampled(3)
@NETS
@pytest.mark.parametrize("name", SHARED)
def test_shared_exponents_and_logarithms_have_the_numbers_of_the_deployed_model(name, network):
    settings = {"width": [4, 6], **SHARED[name]}
    seed = {"name": [name, "NA"], **{f"{o}_{k}": v for o in ("data_in", "weight", "bias") for k, v in settings.items()}}
    evaluator = evaluator_of(job_of(seeded_model(network), network.shape, {"default": seed}, by="type"))
    assert_as_alone(evaluator, evaluator.space.sample(8, np.random.default_rng(0)))
