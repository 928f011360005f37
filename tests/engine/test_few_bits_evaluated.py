"""Formats of few bits in the tree: each candidate has the numbers of its deployed model, and unscaled signs are merged
exactly. What a mean cuts off is no loss of a range."""

import numpy as np
import pytest
import torch
from networks import Chain, Clipped, Functional, Images, Normalised, ResidualImages, Signals, seeded_model
from test_tree import assert_as_alone, evaluator_of, job_of

from bitfront.engine.evaluation.range_loss import lost
from bitfront.formats import FORMATS
from bitfront.formats.base import WEIGHT

WEIGHTS = {
    "binary": {"weight_width": [1], "weight_scaling_factor": [True, False], "data_in_width": [1, "NA"]},
    "ternary": {"weight_width": [2], "weight_scaling_factor": [True, False], "data_in_width": [2, "NA"]},
    "binary_residual": {"weight_levels": [1, 3], "data_in_levels": [2, "NA"]},
    "nf4": {"weight_width": [4], "weight_group_size": [2, 5, 64]},
    "affine": {"weight_width": [4], "weight_group_size": [2, 5, "NA"], "data_in_width": [8]},
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "network", [Chain, Normalised, Images, Clipped, ResidualImages, Signals, Functional], ids=lambda n: n.__name__
)
@pytest.mark.parametrize("name", WEIGHTS)
def test_candidates_have_the_numbers_of_the_deployed_model(network, name):
    seed = {"default": {"name": "NA"}}
    seed |= {op: {"name": [name], **WEIGHTS[name]} for op in ("linear", "conv1d", "conv2d")}
    evaluator = evaluator_of(job_of(seeded_model(network), network.shape, seed, by="type"))
    assert_as_alone(evaluator, evaluator.space.sample(8, np.random.default_rng(0)))


@pytest.mark.parametrize(("name", "width"), [("binary", 1), ("ternary", 2)])
def test_unscaled_signs_are_merged_exactly_with_fixed_point(name, width):
    """Whole numbers times 1: sums that are exact, whatever their order."""
    formats = {"data_in_width": [width], "weight_width": [width], "bias_width": [width]}
    formats |= {f"{o}_scaling_factor": [False] for o in ("data_in", "weight", "bias")}
    seed = {"default": {"name": [name, "integer"], **formats}}
    evaluator = evaluator_of(job_of(seeded_model(Chain), Chain.shape, seed))
    codes = evaluator.space.sample(8, np.random.default_rng(0))
    assert_as_alone(evaluator, codes)
    assert not evaluator.inexact


def test_values_beyond_a_mean_are_no_saturated_values():
    x = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    for name, settings in (("binary", {"scaling_factor": True}), ("ternary", {}), ("binary_residual", {"levels": 2})):
        form = FORMATS.get(name).parse(settings, WEIGHT).calibrated(x)
        assert lost(form, x, True) == {}
    assert lost(FORMATS.get("integer").parse({"width": 2}, WEIGHT), x, True).keys() == {"saturated"}
    # A threshold that is the same for all may still turn everything into zeros.
    ternary = FORMATS.get("ternary").parse({"granularity": "tensor"}, WEIGHT).calibrated(x)
    assert lost(ternary, x / 100, True) == {"zeros": 1.0}
