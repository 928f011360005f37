"""Settings of learned bits where torch trains the network: supported widths, layers by type, timeouts, constraints,
checks of data and parameters, and networks without the channels that do nothing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from learning_by_hand import Reference
from learning_networks import Cnn, Mlp, SignedMlp
from test_gradients import WIDTHS, leaves_of
from test_layers import CLASSES, clusters, model_of, searched
from test_pacing import lose_all_but_the_clock, meta
from test_torch import (
    COST,
    INT8,
    Branching,
    Curved,
    Transformer,
    Upwards,
    alike_after_a_step,
    both,
    drawn,
    needs_compiler,
)
from test_torch import torch_program as program_in_torch
from torch import nn

import bitfront as bf
from bitfront.engine.rebuild import transform_trial
from bitfront.errors import ConfigError, DataError, EvaluationError, RunError
from bitfront.graph import capture
from bitfront.learned_bits.program import Granularities
from bitfront.learned_bits.state import Samples, Steps
from bitfront.learned_bits.torch_member import TorchMember
from bitfront.learned_bits.torch_program import open_program

# --- supported widths -------------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@needs_compiler
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("shared", ["channel", "layer"])
@pytest.mark.parametrize("kind", [Mlp, SignedMlp, Cnn])
def test_a_step_with_supported_widths_is_that_of_the_compiled_trainer(kind, shared, widths, monkeypatch):
    a, b, of_a, of_b = both(monkeypatch, kind, Granularities(shared, shared, *widths), WIDTHS.index(widths))
    alike_after_a_step(a, b, of_a, of_b)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("widths", [(), *WIDTHS], ids=str)
@pytest.mark.parametrize(("kind", "shared"), [(Mlp, "channel"), (Mlp, "layer"), (Cnn, "channel"), (SignedMlp, "layer")])
def test_gradients_are_those_of_autograd_without_a_compiler(kind, shared, widths, monkeypatch):
    torch.manual_seed(0)
    model = kind().eval()
    x, y = torch.randn(45, *kind.shape), torch.randint(0, kind.classes, (45,))
    program = program_in_torch(monkeypatch, capture(model, x[:2]), x[:3], Granularities(shared, shared, *widths))
    member = drawn(TorchMember.of(program, model, [np.ones(la.source, np.float32) for la in program.layers], 5.0), 1)
    member.values[member.places[0].bias] *= 2.0**-9  # below the grid of its bits
    values = leaves_of(program, member.values.numpy(), member.places)
    for leaf in (leaf for v in values.values() for leaf in v.leaves().values()):
        leaf.requires_grad_()
    costs = (COST.pairs, COST.stored, COST.biases)
    reference = Reference(model, values, {layer.path: layer.signed for layer in program.layers}, costs)
    reference.loss(kind.reference, x.double(), F.one_hot(y, kind.classes).double(), 3e-4).backward()
    samples = Samples(x, y.int())
    assert member.measured(samples, COST)[0] == pytest.approx(reference.cost.item(), rel=1e-9)
    member.learn(samples, Steps(torch.arange(45).int(), 45, np.ones(1), np.array([3e-4]), 1.0, COST))
    for layer, place in zip(program.layers, member.places, strict=True):
        for name, leaf in values[layer.path].leaves().items():
            got = 10 * member.moments[0][getattr(place, name)].reshape(leaf.shape).double()
            assert torch.allclose(got, leaf.grad, rtol=1e-4, atol=1e-6), f"{layer.path}.{name}"


TABLES = [
    {"weight_width": [4, 8], "data_in_width": [8], "bias_width": [16]},
    {"weight_width": [0, 2, 8], "data_in_width": [4, 8], "bias_width": [8, 12]},
]


@pytest.mark.sampled(7)
@pytest.mark.parametrize("shared", ["channel", "layer"])
@pytest.mark.parametrize("table", TABLES, ids=str)
@pytest.mark.parametrize("network", [Transformer, Upwards, Curved])
def test_networks_in_torch_have_supported_widths(network, table, shared, tmp_path):
    model = model_of(network)
    settings = {"weight": shared, "data_in": shared, "cycles": 2, "learning_rate": 0.02, "last_pressure": 1e-3}
    run, data = searched(model, tmp_path, **settings, **table)
    for trial in (run.trials[0], run.trials[-1]):
        rebuilt = transform_trial(tmp_path / "run", trial.number, check=True, data=data, model=model)
        assert rebuilt.evaluation.accuracy == trial.metrics["accuracy"]
        assert rebuilt.evaluation.loss == trial.metrics["loss"]
        for site, formats in rebuilt.formats.items():
            layer = rebuilt.graph.site(site)
            axis = (layer.operand("weight").channel_axis or 0) if shared == "channel" else None
            for operand, listed in (("weight", table["weight_width"]), ("bias", table["bias_width"])):
                widths = formats[operand].widths
                removed = {0} if shared == "channel" or 0 in listed else set()
                assert set(np.unique(widths)) <= {*listed, *(removed if operand == "weight" else ())}
                if operand == "weight":
                    for group in [widths] if axis is None else np.moveaxis(widths, axis, 0):
                        assert len(np.unique(group)) == 1
            allowed = {*table["data_in_width"], *([0] if shared == "channel" else [])}
            assert set(np.unique(formats["data_in"].widths)) <= allowed


def test_layers_that_only_torch_can_train_have_settings_by_type(tmp_path):
    layers = {
        "conv_transpose2d": {"weight": "layer", "weight_width": [6]},
        "Conv2d": {"weight": "channel", "weight_width": [3, 5]},
        "Linear": {"data_in": "layer", "data_in_width": [7]},
    }
    model = model_of(Upwards)
    run, data = searched(model, tmp_path, cycles=1, networks=1, layers=layers)
    formats = transform_trial(run.folder, 0, data=data, model=model).formats
    assert set(np.unique(formats["up"]["weight"].widths)) == {6}
    assert set(np.unique(formats["conv"]["weight"].widths)) <= {0, 3, 5}
    assert set(np.unique(formats["fc"]["data_in"].widths)) == {7}
    assert len(np.unique(formats["fc"]["weight"].widths)) > 1
    with pytest.raises(
        ConfigError, match=r"setup.layers.act: the model has no layer 'act' .*conv, up, fc, or the types"
    ):
        searched(model, tmp_path / "other", layers={"act": {"weight": "layer"}})
    assert not (tmp_path / "other" / "run" / "trials.sqlite").exists()


# --- data, parameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setup", [{"learning_rate": 1e6}, {"learning_rate": 1e38}, {"first_pressure": 1e300}])
def test_a_training_in_torch_that_leaves_all_bounds_is_an_error(setup, tmp_path):
    with pytest.raises(EvaluationError, match=r"diverged within .* smaller learning_rate than .* less pressure"):
        searched(model_of(Transformer), tmp_path, **setup)


def test_a_parameter_in_float_that_is_no_number_is_seen():
    x, _ = clusters(Transformer.shape, 8)
    graph, program = open_program(capture(model_of(Transformer), x[:2]), x[:3], Granularities(), {})
    member = TorchMember.of(program, graph.model, [np.ones(la.source, np.float32) for la in program.layers], 5.0)
    assert member.largest() == float(member.values.abs().max())
    member.loose[3] = float("nan")
    assert np.isnan(member.largest())


@pytest.mark.parametrize("factor", [1e8, 1e-8])
def test_values_beyond_the_bits_are_an_error_before_teachers_are_trained(factor, tmp_path, monkeypatch):
    class Scaled(Curved):
        def forward(self, x):
            return super().forward(factor * x)

    monkeypatch.setattr(
        "bitfront.engine.evaluation.learned_bits.fresh_models", lambda *_, **__: pytest.fail("it takes time")
    )
    with pytest.raises(DataError, match=r"largest value that 'fc1' reads is .*e[+-]0[78], .* scale the data"):
        searched(model_of(Scaled), tmp_path, teacher="ensemble", members=2, float_epochs=1)


def test_small_values_have_bits_from_the_start():
    x, _ = clusters(Curved.shape, 60)
    graph, program = open_program(capture(model_of(Curved), x[:2]), x[:3], Granularities(), {})
    largest = [np.full(layer.source, 2.0**-9, np.float32) for layer in program.layers]
    learned = TorchMember.of(program, graph.model, largest, 5.0).rounded(0)
    assert (learned.data_bits == 5).all()


# --- how long it trains, and where ------------------------------------------------------------------------------------


def test_a_timeout_in_torch_is_spread_over_the_range_and_the_same_after_a_resume(tmp_path):
    data = {
        split: clusters(Curved.shape, size, seed) for seed, (split, size) in enumerate((("train", 300), ("val", 80)))
    }

    def run_of(timeout):
        settings = {"networks": 2, "members": 2, "batch_size": 64, "strategy": "learned_bits", "timeout": timeout}
        return bf.search(model=model_of(Curved), data=data, project="run", project_dir=str(tmp_path), **settings)

    run_of(1.5)
    folder = tmp_path / "run"
    known, files, before = lose_all_but_the_clock(folder)
    again = run_of(60.0)
    assert [path.read_bytes() for path in files] == before
    assert meta(folder)["length"] == known["length"]
    assert again.trials


def test_members_in_torch_are_trained_one_after_another(monkeypatch):
    x, _ = clusters(Curved.shape, 8)
    _, program = open_program(capture(model_of(Curved), x[:2]), x[:3], Granularities(), {})
    assert program.at_a_time(8, 4) == 1


def test_a_bound_on_ebops_steers_though_products_in_float_count_too(tmp_path):
    """600 of them of 31 by 31 bits are in every network; the training's cost does not have them."""
    data = {split: clusters(Transformer.shape, n, s) for s, (split, n) in enumerate((("train", 400), ("val", 100)))}
    in_float, setup = 600 * 31**2, {"cycles": 4, "epochs": 2.0, "networks": 1, "batch_size": 32, "learning_rate": 0.03}

    def run_of(place, constraints):
        return bf.search(
            model=model_of(Transformer),
            data=data,
            metrics=["accuracy", "ebops"],
            strategy={"name": "learned_bits", "setup": setup},
            constraints=constraints,
            project=place,
            project_dir=str(tmp_path),
        )

    free = run_of("free", {})
    costs = [trial.metrics["ebops"] - in_float for trial in free.trials]
    assert min(costs) > 0
    bound = in_float + 0.7 * costs[0]
    steered = run_of("steered", {"ebops": f"<= {bound:.0f}"})
    assert steered.trials[0].metrics == free.trials[0].metrics
    assert steered.trials[0].metrics["ebops"] > bound
    assert [t.metrics for t in steered.trials] != [t.metrics for t in free.trials]
    assert min(t.metrics["ebops"] for t in steered.trials) <= bound


# --- the smaller network ----------------------------------------------------------------------------------------------


def rebuilt_smaller(network, folder, space=None, **setup):
    model = model_of(network)
    run, data = searched(model, folder, space, **setup)
    return transform_trial(run.folder, run.trials[-1].number, check=True, smaller=True, data=data, model=model), run


def test_the_smaller_network_between_functions_in_float(tmp_path):
    """Constants go through sigmoid and tanh."""
    result, run = rebuilt_smaller(Curved, tmp_path, cycles=5, epochs=6.0, last_pressure=3e-3, learning_rate=0.03)
    small = result.smaller
    assert small.samples == 1000
    assert sum(np.prod(now) for _, now in small.layers.values()) < sum(np.prod(old) for old, _ in small.layers.values())
    assert result.smaller_metrics["ebops"] <= 1.1 * run.trials[-1].metrics["ebops"]


def test_the_smaller_transformer_keeps_the_channels_of_tokens_and_says_so(tmp_path):
    result, _ = rebuilt_smaller(Transformer, tmp_path, cycles=1, networks=1)
    small = result.smaller
    assert all(old == now for old, now in small.layers.values())
    assert any("block_up is called for each token" in note for note in small.stays), small.stays


class Frozen(nn.Sequential):
    """The layer in the middle stays in float."""

    shape = (12,)

    def __init__(self):
        layers = [nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 9), nn.ReLU(), nn.Linear(9, CLASSES)]
        super().__init__(*layers)
        layers[2].requires_grad_(False)


def test_channels_beside_a_layer_in_float_stay(tmp_path):
    small = rebuilt_smaller(Frozen, tmp_path, cycles=1, networks=1)[0].smaller
    assert all(old == now for old, now in small.layers.values())
    assert set(small.layers) == {"0", "4"}
    assert sum("_2 stays in float" in note for note in small.stays) == 2


def test_the_smaller_network_is_refused_with_formats_of_the_file_and_without_a_trace(tmp_path):
    with pytest.raises(
        RunError, match=r"only where bits were learned .* of block_act is int8.6; rebuild this trial without"
    ):
        rebuilt_smaller(Transformer, tmp_path / "fixed", {"gelu": INT8}, cycles=1, networks=1)
    with pytest.raises(RunError, match=r"only for a model that torch.fx can trace.* without `smaller`"):
        rebuilt_smaller(Branching, tmp_path / "untraced", cycles=1, networks=1)
