"""Fixed point that rounds half up or down, and wraps: the tree gives each candidate the numbers of its deployed model."""

import numpy as np
import pytest
import torch
from networks import Chain, Clipped, Grouped, Images, ResidualImages, StartsWithReLU, seeded_model
from test_tree import assert_as_alone, evaluator_of, job_of

from bitfront.engine.evaluation.tree.program import rounding_row
from bitfront.engine.evaluation.tree.rounding import lower
from bitfront.formats.integer import Integer
from bitfront.kernels import convolution, plain
from bitfront.transforms.arithmetic import FLOAT

ROUNDINGS, OVERFLOWS = ["even", "half_up", "floor"], ["saturate", "wrap", "saturate_symmetric"]
KEYS = {
    "data_in_width": [3, 5],
    "data_in_frac_width": [-2, 1, "auto"],
    "data_in_rounding": ROUNDINGS,
    "data_in_overflow": OVERFLOWS,
    "weight_width": [4],
    "weight_frac_width": ["auto", 4],
    "weight_rounding": ROUNDINGS,
    "weight_overflow": OVERFLOWS,
    "bias_width": [5],
    "bias_rounding": ["half_up", "floor"],
    "bias_overflow": ["wrap", "saturate"],
}


def searched(network, keys, seed=0):
    job = job_of(seeded_model(network), network.shape, {"default": {"name": ["integer", "NA"], **keys}}, by="type")
    evaluator = evaluator_of(job)
    codes = evaluator.space.sample(20, np.random.default_rng(seed))
    assert_as_alone(evaluator, codes)
    assert not evaluator.plain
    assert not [why for why in evaluator.inexact.values() if why != FLOAT]
    return evaluator


@pytest.mark.parametrize(
    "network", [Chain, StartsWithReLU, Images, Clipped, Grouped, ResidualImages], ids=lambda n: n.__name__
)
def test_every_way_to_round_has_the_numbers_of_the_deployed_model(network):
    searched(network, KEYS)


def test_without_the_compiled_kernels_they_are_the_same(monkeypatch):
    monkeypatch.setattr("bitfront.kernels.native.library", lambda: None)
    for cached in (convolution.exact, convolution.fast_bytes):
        cached.cache_clear()
    monkeypatch.setattr("bitfront.kernels.compiled", lambda: False)
    try:
        searched(Clipped, KEYS, seed=1)
    finally:
        for cached in (convolution.exact, convolution.fast_bytes):
            cached.cache_clear()


def test_kernels_take_the_roundings_and_leave_what_wraps():
    for rounding in ROUNDINGS:
        assert rounding_row(Integer(8, 4, rounding=rounding)) is not None
        assert rounding_row(Integer(8, 4, rounding=rounding, overflow="saturate_symmetric")) is not None
        assert rounding_row(Integer(8, 4, rounding=rounding, overflow="wrap")) is None


def test_it_matters():
    x = torch.arange(-150, 151) / 16
    forms = [Integer(5, 2, rounding=r, overflow=o) for r in ROUNDINGS for o in OVERFLOWS]
    assert len({form.round(x).numpy().tobytes() for form in forms}) == 9


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_ceiling_is_rounded_like_the_values_below_it(rounding):
    form = Integer(6, -2, rounding=rounding)
    x = torch.arange(-20, 60) / 4.0
    grids = np.array([form.grid.rounding_row()], np.float32)
    lower(grids, 6.0)
    assert torch.equal(plain.rounded(x[None], grids)[0], form.round(x.clamp(max=6.0)))
