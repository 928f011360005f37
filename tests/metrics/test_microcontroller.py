"""Flash and RAM as metrics are what is exported: of layers, of channels, of each weight."""

import numpy as np
import pytest
import torch
from test_metrics import evaluator, measure
from torch import nn

from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.exporters.targets.base import Candidate
from bitfront.exporters.targets.c import C
from bitfront.formats.fixed_map import FixedMap
from bitfront.metrics import RUNNERS
from bitfront.metrics.base import RunnerSettings
from bitfront.metrics.configured import ConfiguredRunner, configured_runner
from bitfront.spaces.quantize import QuantizationSpace
from bitfront.testing.metrics import check_runner

FIXED = {
    "name": ["integer"],
    "data_in_width": [4, 8],
    "data_in_frac_width": ["auto"],
    "weight_width": [2, 8],
    "weight_frac_width": ["auto"],
    "bias_width": [8],
    "bias_frac_width": ["auto"],
}
CHANNELS = FIXED | {"weight_granularity": ["channel"]}
AFFINE = {"name": ["affine"], "data_in_width": [8], "weight_width": [3, 8]}
SPACES = {
    "fixed": {"linear": FIXED, "conv2d": FIXED},
    "channels": {"linear": CHANNELS, "conv2d": CHANNELS},
    "affine": {"linear": AFFINE, "conv2d": AFFINE},
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3))


def exported(context, code):
    """What the exported files of a candidate need."""
    graph, formats = context.space.graph, context.formats(code)
    return C().figures(Candidate("net", graph, formats, graph.model))


@pytest.mark.parametrize("seed", SPACES)
def test_it_is_what_export_states(seed):
    context = evaluator(network(), (1, 4, 4), SPACES[seed], by="type")
    codes = context.space.numbered(0, context.space.size)
    values = check_runner("microcontroller", {}, context, codes)
    assert len(np.unique(values["flash"])) > 1
    for i in range(0, len(codes), 3):
        needed = exported(context, codes[i])
        assert needed["flash_bytes"] == values["flash"][i]
        assert needed["ram_bytes"] == values["ram"][i]
        assert needed["cycles"] == round(values["cycles"][i])


def test_bits_of_each_weight():
    context = evaluator(network(), (1, 4, 4), SPACES["fixed"], by="type")
    formats, rng = context.formats(context.space.numbered(0, 1)[0]), np.random.default_rng(0)
    for site in (s for s in context.space.graph.sites if s.weight):
        shape = dict(site.shapes)["weight"]
        widths = (6 * (rng.random(shape) < 0.3)).astype(np.int8)
        formats[site.name]["weight"] = FixedMap.of(widths, np.full(shape, 5, np.int8), signed=True, samples=False)
    learned = FixedEvaluator(context.job, QuantizationSpace.of_formats(context.space.graph, formats))
    (code,) = codes = np.zeros((1, 0), dtype=np.int64)
    values, needed = measure("microcontroller", {}, learned, codes), exported(learned, code)
    assert (values["flash"][0], values["ram"][0]) == (needed["flash_bytes"], needed["ram_bytes"])
    # Fewer bytes than with all weights in the same bits.
    dense = measure("microcontroller", {}, context, context.space.numbered(0, context.space.size))["flash"].max()
    assert values["flash"][0] < dense


def test_a_layer_in_float_has_no_such_numbers():
    choices = {"linear": dict(FIXED, name=["integer", "NA"]), "conv2d": FIXED}
    context = evaluator(network(), (1, 4, 4), choices, by="type")
    codes = context.space.numbered(0, context.space.size)
    in_float = np.array([len(f) < 2 for f in map(context.formats, codes)])
    values = measure("microcontroller", {}, context, codes)
    assert in_float.any()
    for metric in ("flash", "ram", "cycles"):
        assert np.array_equal(np.isnan(values[metric]), in_float)


def test_an_evaluator_with_other_weights_has_numbers_of_its_own():
    context = evaluator(network(), (1, 4, 4), SPACES["fixed"], by="type")
    code = context.space.numbered(3, 4)[0]
    state = {k: torch.zeros_like(v) for k, v in context.space.graph.model.state_dict().items()}
    zeros = context.trained(state, context.formats(code))
    empty = np.zeros((1, 0), dtype=np.int64)
    assert (
        measure("microcontroller", {}, zeros, empty)["flash"]
        < measure("microcontroller", {}, context, code[None])["flash"]
    )


class Counted(RUNNERS.get("microcontroller")):
    """Counts the candidates that it computes."""

    seen = 0

    def measure(self, context, codes):
        type(self).seen += len(codes)
        return super().measure(context, codes)


def test_costs_of_candidates_are_computed_once(monkeypatch):
    monkeypatch.setattr(Counted, "seen", 0)
    choices = {"linear": dict(FIXED, name=["integer", "NA"]), "conv2d": FIXED}
    context = evaluator(
        network(), (1, 4, 4), choices, [ConfiguredRunner("m", "hw_runner", Counted, RunnerSettings())], by="type"
    )
    rng = np.random.default_rng(0)
    for _ in range(4):
        codes = context.space.sample(30, rng)
        asked = context.closed_form_values(codes, {"flash", "ram"})
        for metric, values in measure("microcontroller", {}, context, codes).items():
            np.testing.assert_array_equal(asked.get(metric, values), values)
        asked["flash"][:] = 0  # the caller may change them
    assert Counted.seen == len(next(iter(context._kept.values()))) <= context.space.size
    assert not context.closed_form_values(codes[:0], {"flash"})["flash"].size


def test_an_error_says_why_there_is_no_number():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    context = evaluator(net.eval(), (1, 4, 4), SPACES["fixed"], [configured_runner("microcontroller")], by="type")
    (error,) = context.evaluate(context.space.numbered(0, 1)).errors
    assert error.startswith("flash is nan: _1 (BatchNorm2d): a batch norm in float; fold it into the layer before it")
