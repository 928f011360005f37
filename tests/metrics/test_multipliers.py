"""Multipliers: counts by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from bitfront.engine.evaluation.fixed import EvaluationJob, FixedEvaluator
from bitfront.formats.fixed_map import FixedMap
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.metrics import RUNNERS
from bitfront.spaces.quantize import QuantizationSpace


def multipliers(layer, formats, shape, **settings):
    """The metric of a network of one layer in some formats."""
    model, x = nn.Sequential(layer).eval(), torch.zeros(2, *shape)
    graph = capture(model, x)
    job = EvaluationJob(
        model=model,
        sample=x,
        space="graph/quantize/mixed_precision_ptq",
        by="type",
        choices={},
        runners=(),
        splits={"val": (x, torch.zeros(2, dtype=torch.long))},
        calibration=x,
    )
    context = FixedEvaluator(job, QuantizationSpace.of_formats(graph, {graph.sites[0].name: formats}))
    kind = RUNNERS.get("dsp")
    measured = kind(kind.Settings(**settings)).measure(context, np.zeros((1, 0), dtype=np.int64))
    return measured["dsp"].tolist()


def linear():
    layer = nn.Linear(2, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.5], [0.0, -1.0], [2.0, 0.0]]))  # four are not zero
    return layer


@pytest.mark.parametrize(
    ("data", "weight", "least", "count"),
    [
        (Integer(9, 4), Integer(9, 4), 9, 4),
        (Integer(9, 4), Integer(8, 4), 9, 0),
        (Integer(8, 4), Integer(9, 4), 9, 0),
        (Integer(8, 4), Integer(8, 4), 8, 4),
        (Integer(27, 4), Integer(18, 4), 9, 4),
        (Integer(27, 4, signed=False), Integer(18, 4), 9, 8),  # it needs a sign, which is a 28th bit
        (Integer(16, 4), Integer(19, 4), 9, 8),
        (Integer(28, 4), Integer(32, 4), 9, 16),
    ],
)
def test_multipliers_by_hand(data, weight, least, count):
    assert multipliers(linear(), {"data_in": data, "weight": weight}, (2,), least_width=least) == [count]


def test_a_layer_in_float_counts_as_32_bits():
    assert multipliers(linear(), {}, (2,)) == [4 * 2 * 2]


def test_each_value_of_learned_bits_counts_by_itself():
    widths = np.array([[9, 4], [9, 9], [4, 9]], dtype=np.int8)
    weight = FixedMap.of(widths, np.full(widths.shape, 4, np.int8), signed=True, samples=False)
    data = FixedMap.of(np.array([9, 10], np.int8), np.full(2, 4, np.int8), signed=True, samples=True)
    # Of the four weights that are not zero, those at (0, 0) and (1, 1) have 9 bits beside their sign.
    assert multipliers(linear(), {"data_in": data, "weight": weight}, (2,)) == [2]


def test_a_convolution_has_its_products_at_each_place_but_none_with_padding():
    layer = nn.Conv1d(1, 1, 3, padding=1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[[1.0, 0.0, -1.0]]]))
    formats = {"data_in": Integer(9, 4), "weight": Integer(9, 4)}
    assert multipliers(layer, formats, (1, 4)) == [3 + 3]
