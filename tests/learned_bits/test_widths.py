"""Tables of supported widths: what is kept has these widths and no others, and is deployed to the bit."""

import math

import numpy as np
import pytest
import torch
from by_integers import Layer
from test_layers import CLASSES, NETWORKS, Normed, clusters, logits_of, model_of
from torch import nn

import bitfront as bf
from bitfront.api import dataset_of
from bitfront.engine.rebuild import transform_trial
from bitfront.errors import ConfigError
from bitfront.graph import capture
from bitfront.kernels import bits
from bitfront.learned_bits.course import starting_ranges
from bitfront.learned_bits.member import BitsMember
from bitfront.learned_bits.program import Granularities, with_learned_bits

pytestmark = pytest.mark.skipif(not bits.available(), reason="no compiled training of bits")


def searched(model, folder, **setup):
    """A short search with learned bits that presses on bytes, and its data."""
    data = {split: clusters(model.shape, size, seed) for seed, (split, size) in enumerate(SIZES.items())}
    usual = {"cycles": 4, "epochs": 2.0, "networks": 2, "batch_size": 64, "learning_rate": 0.01, "last_pressure": 1e-2}
    run = bf.search(
        model=model,
        data=data,
        metrics=["accuracy", "model_size"],
        strategy={"name": "learned_bits", "setup": usual | setup},
        project="run",
        project_dir=str(folder),
    )
    return run, dataset_of(data)


SIZES = {"train": 600, "val": 200}
TABLES = [
    {"weight_width": [4, 8], "data_in_width": [8], "bias_width": [16]},
    {"weight_width": [0, 2, 8], "data_in_width": [4, 8]},
    {"weight_width": [3], "data_in_width": [2, 12], "bias_width": [8, 12]},
]


@pytest.mark.sampled(7)
@pytest.mark.parametrize("shared", ["channel", "layer"])
@pytest.mark.parametrize("table", TABLES, ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_networks_have_supported_widths_and_are_deployed_to_the_bit(network, table, shared, tmp_path):
    model = model_of(network)
    run, data = searched(model, tmp_path, weight=shared, data_in=shared, **table)
    x, y = data.split("val")
    for trial in (run.trials[0], run.trials[-1]):
        rebuilt = transform_trial(tmp_path / "run", trial.number, check=True, data=data, model=model)
        layers = {site: Layer(rebuilt.model.get_submodule(site), formats) for site, formats in rebuilt.formats.items()}
        with torch.no_grad(), logits_of(rebuilt.model) as logits:
            rebuilt.model(x)
        assert np.array_equal(logits[0].numpy(), network.by_integers(layers, x.numpy()))
        right = (network.by_integers(layers, x.numpy()).argmax(1) == y.numpy()).mean()
        assert trial.metrics["accuracy"] == pytest.approx(right)
        assert trial.metrics["model_size"] == bytes_of(rebuilt)
        for site, formats in rebuilt.formats.items():
            weight = rebuilt.model.get_submodule(site).weight
            widths = {operand: form.widths for operand, form in formats.items()}
            check_groups(widths["weight"], shared, table["weight_width"], removed=(weight == 0).numpy())
            # A sign is one of the bits of a width; without one all are of the magnitude.
            check_groups(widths["data_in"], shared, [*table["data_in_width"], *([0] if shared == "channel" else [])])
            if "bias_width" in table and "bias" in widths:
                assert set(np.unique(widths["bias"])) <= set(table["bias_width"])


def check_groups(widths, shared, supported, removed=None):
    """Values that share a width have one of the supported ones; 0 where all are removed."""
    groups = widths.reshape(len(widths), -1) if shared == "channel" else widths.reshape(1, -1)
    for place, group in enumerate(groups):
        assert len(set(group)) == 1
        allowed = set(supported)
        if removed is not None and removed.reshape(len(groups), -1)[place].all():
            allowed = {0}
        assert group[0] in allowed


def bytes_of(rebuilt):
    """Bytes of each weight and bias, rounded up to whole ones; in float what has no format."""
    total = 0
    for formats in rebuilt.formats.values():
        for operand in formats.keys() - {"data_in"}:
            total += math.ceil(formats[operand].widths.astype(np.int64).sum() / 8)
    return total


def test_a_layer_by_name_goes_before_its_type_and_the_rest_is_as_for_all(tmp_path):
    layers = {"fc1": {"weight": "element", "data_in": "element"}, "Linear": {"weight": "channel", "weight_width": [4]}}
    settings = {"weight": "layer", "data_in": "layer", "layers": layers, "cycles": 1, "networks": 1}
    run, data = searched(model_of(Normed), tmp_path, **settings)
    rebuilt = transform_trial(tmp_path / "run", 0, data=data, model=model_of(Normed))
    widths = {site: formats["weight"].widths for site, formats in rebuilt.formats.items()}
    inputs = {site: formats["data_in"].widths for site, formats in rebuilt.formats.items()}
    assert len(np.unique(widths["fc1"])) > 2
    assert set(np.unique(np.concatenate([widths["fc2"].ravel(), widths["fc3"].ravel()]))) <= {0, 4}
    assert len(np.unique(inputs["fc2"])) == len(np.unique(inputs["fc3"])) == 1
    assert len(np.unique(inputs["fc1"])) > 1
    assert run.trials


SETUP = "search.strategy.setup"


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ({"weight_width": [4, 8]}, rf"{SETUP}.weight_width: weight = 'element'.*set weight = 'channel' or 'layer'"),
        ({"data_in_width": [8]}, rf"{SETUP}.data_in_width: data_in = 'element'.*'channel' or 'layer', or remove"),
        ({"weight": "layer", "weight_width": []}, rf"{SETUP}.weight_width: .*at least 1"),
        ({"weight": "layer", "weight_width": [8, 32]}, rf"{SETUP}.weight_width: .*32.*20"),
        ({"weight": "layer", "weight_width": [1, 8]}, rf"{SETUP}.weight_width: 1 bit.*0, and 2 to 20"),
        ({"weight": "layer", "weight_width": [0]}, rf"{SETUP}.weight_width: \[0\] removes everything"),
        ({"bias_width": ["8"]}, rf"{SETUP}.bias_width: "),
        (
            {"layers": {"fc9": {"weight": "layer"}}},
            rf"{SETUP}.layers.fc9: .*no layer 'fc9'.*fc1, fc2, fc3.*types.*linear",
        ),
        ({"layers": {"linaer": {"weight": "layer"}}}, r"Did you mean 'linear'"),
        ({"layers": {"fc1": {"wieght": "layer"}}}, rf"{SETUP}.layers.fc1.wieght: unknown key.*Did you mean 'weight'"),
        ({"layers": {"fc1": {"weight": "chanel"}}}, rf"{SETUP}.layers.fc1.weight: 'chanel'.*Did you mean 'channel'"),
        (
            {"weight": "layer", "weight_width": [4], "layers": {"fc1": {"weight": "element"}}},
            rf"{SETUP}.layers.fc1.weight: weight = 'element'.*remove weight_width",
        ),
    ],
)
def test_mistakes_are_named_with_their_key(setup, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        searched(model_of(Normed), tmp_path, **setup)
    assert not list(tmp_path.rglob("*.sqlite"))


@pytest.mark.parametrize(
    ("shared", "table", "bits_of_none"),
    [("channel", (4, 8), 0), ("channel", (0, 4), 0), ("layer", (4, 8), 4), ("layer", (0, 4, 8), 0), ("layer", (), 0)],
)
def test_what_learns_to_have_no_bits_is_removed_where_that_is_supported(shared, table, bits_of_none):
    """A channel always may be; a layer, where the table says so. Otherwise it has the smallest width."""
    model = model_of(Normed)
    x, _ = clusters((12,), 60)
    granularities = Granularities(shared, shared, table, table)
    graph, program = with_learned_bits(capture(model, x[:2]), (12,), granularities, {})
    member = BitsMember.of(program, graph.model, starting_ranges(graph.model, program, x, lambda m, x: m(x)), 5.0)
    place, values = member.places[1], member.values.numpy()
    values[place.weight_bits][:1] = -6
    values[place.fractions][:1] = -6
    learned = member.rounded(1)
    of_weight = learned.weight_bits[0] if shared == "channel" else learned.weight_bits
    of_data = learned.data_bits[:1] if shared == "channel" else learned.data_bits
    weight = learned.weight[0] if shared == "channel" else learned.weight
    assert set(np.unique(of_weight)) == {max(0, bits_of_none - 1)}
    assert set(np.unique(of_data)) == {bits_of_none}
    assert weight.any() == (bits_of_none > 0)


def test_a_network_of_one_layer_may_name_its_type(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, CLASSES))
    model.shape = (12,)
    settings = {"layers": {"linear": {"weight": "layer", "weight_width": [8]}}, "cycles": 1, "networks": 1}
    run, data = searched(model, tmp_path, **settings)
    rebuilt = transform_trial(tmp_path / "run", 0, data=data, model=model)
    assert [set(np.unique(formats["weight"].widths)) for formats in rebuilt.formats.values()] == [{8}]
    assert len(run) == 1
