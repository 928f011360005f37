"""Formats with shared exponents and scales in spaces, metrics, the evaluation, run folders and exports."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import bitfront as bf
from bitfront.data.arrays import from_arrays
from bitfront.errors import ConfigError, ExportError
from bitfront.exporters.onnx import onnx_model
from bitfront.formats import FORMATS
from bitfront.formats.base import ACTIVATION, WEIGHT
from bitfront.graph import capture
from bitfront.metrics.storage import AverageBitwidth, BitwidthSettings
from bitfront.metrics.stored import weights
from bitfront.testing import check_space

BLOCKS = {
    "block_fp": {"width": 6, "exponent_width": 8, "block_size": [1, 2]},
    "block_minifloat": {"width": 6, "exponent_width": 2, "exponent_bias_width": 8, "block_size": [1, 2]},
    "block_log": {"width": 4, "exponent_bias_width": 8, "block_size": [1, 2]},
    "log": {"width": 5},
    "mx": {"width": 6},
}


def config(name, *operands):
    return {"name": name, **{f"{o}_{k}": v for o in operands for k, v in BLOCKS[name].items()}}


@pytest.mark.parametrize("name", BLOCKS)
def test_each_candidate_is_spelled_out_and_understood(name, space_of, tiny_mlp):
    widths = {"weight_width": [4, 6], "data_in_width": [4, 6, 8]}
    space = space_of(
        tiny_mlp, (4,), {"fc1": {**config(name, "data_in", "weight", "bias"), **widths}, "fc2": {"name": "NA"}}
    )
    check_space(space)
    assert space.size == 6


@pytest.mark.parametrize(
    ("written", "sizes"),
    [([1, 2], [(1, 2)]), ([[1, 2]], [(1, 2)]), ([[1, 2], [3]], [(1, 2), (3,)])],
)
def test_a_choice_of_a_list_is_a_list_within_the_list(written, sizes, space_of, tiny_mlp):
    space = space_of(tiny_mlp, (4,), {"fc1": {**config("block_fp", "weight"), "weight_block_size": written}})
    check_space(space)
    found = {
        space.formats(space.options(c[None])[0])["fc1"]["weight"].block_size for c in space.numbered(0, space.size)
    }
    assert found == set(sizes)


def test_a_list_in_complete_settings_is_a_value(space_of, tiny_mlp):
    tables = [BLOCKS["block_fp"], {**BLOCKS["block_fp"], "block_size": [4]}]
    space = space_of(tiny_mlp, (4,), {"fc1": {"name": "block_fp", "weight": tables}})
    check_space(space)
    assert space.size == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"weight_block_size": [[1, 0]]},
            r"block_size = \[1, 0\] is not possible; allowed: a list of whole numbers from 1",
        ),
        ({"weight_block_size": 16.5}, "block_size = 16.5 is not possible"),
        ({"weight_block_size": []}, "the list of choices is empty"),
        ({"weight_width": [[4]]}, r"width = \[4\] is not possible; allowed: a whole number from 2 to 24"),
        ({"weight_blok_size": [1, 2]}, "unknown key; .*Did you mean 'weight_block_size'"),
    ],
)
def test_mistakes_in_lists_are_named(changed, message, space_of, tiny_mlp):
    with pytest.raises(ConfigError, match=message):
        space_of(tiny_mlp, (4,), {"fc1": {**config("block_fp", "weight"), **changed}})


@pytest.mark.parametrize(
    ("name", "bits"),
    # fc1 has 3 × 4 weights, 6 blocks of 2 or, for mx, 3 rows; the shared part has 8 bits.
    [("block_fp", 6 + 4), ("block_minifloat", 6 + 4), ("block_log", 4 + 4), ("log", 5), ("mx", 6 + 2)],
)
def test_average_bitwidth_counts_what_is_shared(name, bits, space_of, tiny_mlp):
    space = space_of(tiny_mlp, (4,), {"fc1": config(name, "weight"), "fc2": {"name": "NA"}})
    (weight,) = [w for w in weights(space) if w.tensor.elements == 12]
    assert weight.stored_bits(space.options(space.numbered(0, 1))).tolist() == [12 * bits]
    context = SimpleNamespace(space=space)
    for over, expected in (("quantized", bits), ("all", (12 * bits + 6 * 32) / 18)):
        runner = AverageBitwidth(BitwidthSettings(over=over))
        assert runner.measure(context, space.numbered(0, 1))["average_bitwidth"].tolist() == [expected]


class Mixed(nn.Module):
    """A convolution, an addition, a product and linear layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(4 * 16, 5)

    def forward(self, x):
        x = self.relu(self.conv(x))
        x = torch.matmul(x, x.transpose(-1, -2))
        return self.fc((x + x.sigmoid()).flatten(1))


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, 3, 4, 4, generator=generator)
    return from_arrays(x, torch.randint(5, (150,), generator=generator))


@pytest.fixture
def mixed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Mixed()


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_a_search_gives_the_numbers_of_the_deployed_model(name, mixed, images, tmp_path):
    sites = {**config(name, "data_in", "weight", "bias"), "name": [name, "integer", "NA"], "data_in_width": [4, 6]}
    run = bf.search(
        model=mixed,
        data=images,
        space={"by": "type", "default": sites},
        metrics={"accuracy": "maximize", "model_size": "minimize"},
        strategy="optuna:random",
        n_trials=25,
        project_dir=str(tmp_path),
    )
    named = [t for t in run.trials if name in json.dumps(t.config)]
    assert len(named) > 10
    for trial in named[:5]:
        rebuilt = bf.transform_trial(run.folder, trial.number, check=True, data=images, model=mixed)
        assert (rebuilt.evaluation.loss, rebuilt.evaluation.accuracy) == (
            trial.metrics["loss"],
            trial.metrics["accuracy"],
        )
        # The answer for a sample does not depend on the batch it is in.
        x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            together, alone = rebuilt.model(x), torch.cat([rebuilt.model(x[i : i + 1]) for i in range(len(x))])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BLOCKS)
def test_candidates_are_trained_in_it(name, tiny_mlp, tmp_path):
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    run = bf.search(
        model=tiny_mlp,
        data=from_arrays(x, (x.sum(1) > 0).long()),
        space={
            "by": "name",
            "fc1": config(name, "data_in", "weight"),
            "fc2": {"name": ["integer", "NA"], "weight_width": 4},
        },
        metrics={"accuracy": "maximize", "model_size": "minimize"},
        strategy={"name": "brute_force", "sw_runner": {"basic_train": {"max_epochs": 3, "learning_rate": 0.05}}},
        project_dir=str(tmp_path),
    )
    assert len(run) == 2
    assert all(np.isfinite(t.metrics["loss"]) for t in run.trials)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("operand", ["data_in", "weight"])
def test_onnx_is_refused_by_name(name, operand):
    model = nn.Sequential(nn.Linear(4, 3))
    graph = capture(model, torch.randn(2, 4))
    form = FORMATS.get(name).parse(BLOCKS[name], WEIGHT)
    formats = {"_0": {"data_in": FORMATS.get("integer").parse({"width": 8}, ACTIVATION), operand: form}}
    for kind in ("integer", "qdq"):
        with pytest.raises(
            ExportError, match=f"^_0: {operand} is {form.label}, and only whole numbers of at most 8 bits"
        ):
            onnx_model(graph, formats, form=kind)
