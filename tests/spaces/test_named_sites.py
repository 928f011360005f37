"""Operations that have formats only where a key names them: norms, activations, pooling, concatenation and others."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitfront as bf
from bitfront.api import dataset_of
from bitfront.engine.analysis import describe
from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.engine.evaluation.interface import EvaluationJob
from bitfront.errors import ConfigError
from bitfront.formats.base import ACTIVATION
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.metrics.configured import configured_runner
from bitfront.metrics.peak_memory import activations
from bitfront.spaces.quantize import QuantizationSpace, single
from bitfront.spaces.request import Part, SpaceRequest
from bitfront.testing.spaces import check_space
from bitfront.transforms import quantize
from bitfront.transforms.observe import calibrate

INT = {"name": ["integer"], "data_in_width": [4, 8], "weight_width": [4], "bias_width": [8], "data_in_frac_width": [3]}
INT |= {"weight_frac_width": [2], "bias_frac_width": [4]}


class Net(nn.Module):
    """A norm, an activation that is called twice, functions, a pool and a concatenation around two layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.SiLU()
        self.pool, self.head = nn.AvgPool2d(2), nn.Linear(32, 3)
        for tensor in (self.norm.weight, self.norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        x = torch.cat([self.act(x), F.gelu(x)], 1)
        return self.head(torch.flatten(self.pool(x), 1)).softmax(1)


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    return capture(Net(), torch.randn(2, 2, 6, 6))


EVERYTHING = ["conv", "norm", "act", "act_1", "gelu", "cat", "pool", "head", "softmax"]


def names(graph, seed, by="name", default_for="usual"):
    built = QuantizationSpace(SpaceRequest(graph, by, seed, default_for=default_for))
    assert [s.name for s in built.sites] == [s.name for s in built.graph.sites]
    return {site.name: built.assignments[g].key for g, site in enumerate(built.sites)}


def test_default_means_the_usual_sites(graph):
    assert names(graph, {"default": INT}) == dict.fromkeys(["conv", "head"], "default")
    assert [s.name for s in graph.sites] == ["conv", "head"]
    assert [s.name for s in graph.nameable] == [n for n in EVERYTHING if n not in ("conv", "head")]


def test_default_for_all(graph):
    assert names(graph, {"default": INT}, default_for="all") == dict.fromkeys(EVERYTHING, "default")
    seed = {"default": INT, "norm": {"name": ["NA"]}}
    assert names(graph, seed, default_for="all") == dict.fromkeys(EVERYTHING, "default") | {"norm": "norm"}


@pytest.mark.parametrize(
    ("by", "key", "sites"),
    [
        ("name", "norm", ["norm"]),
        ("name", "act_1", ["act_1"]),
        ("type", "batch_norm", ["norm"]),
        ("type", "BatchNorm2d", ["norm"]),
        ("type", "silu", ["act", "act_1"]),
        ("type", "concatenation", ["cat"]),
        ("type", "cat", ["cat"]),
        ("type", "softmax", ["softmax"]),
        ("regex_name", "act.*", ["act", "act_1"]),
        ("regex_name", "(norm|cat|softmax)", ["norm", "cat", "softmax"]),
    ],
)
def test_a_key_names_them(graph, by, key, sites):
    expected = dict.fromkeys(["conv", "head"], "default") | dict.fromkeys(sites, key)
    assert names(graph, {"default": INT, key: INT}, by) == expected
    assert names(graph, {"default": INT, key: {"name": ["NA"]}}, by) == expected


def test_a_pattern_for_layers_does_not_take_what_is_between_them(graph):
    assert names(graph, {".*": INT}, "regex_name") == dict.fromkeys(["conv", "head"], ".*")
    assert names(graph, {"(conv|norm)": INT, "norm": INT}, "regex_name") == {
        "conv": "(conv|norm)",
        "norm": "norm",
        "head": "default",
    }
    assert names(graph, {".*": INT}, "regex_name", "all") == dict.fromkeys(EVERYTHING, ".*")


def test_a_space_with_all_of_them_keeps_the_contract_of_spaces(graph):
    check_space(QuantizationSpace(SpaceRequest(graph, choices={"default": INT}, default_for="all")))


def test_what_has_no_record_is_refused_with_a_short_list(graph):
    with pytest.raises(
        ConfigError, match=r"flatten \(flatten\) cannot be configured; allowed: conv, head, or"
    ) as error:
        names(graph, {"flatten": INT})
    assert "gelu" in str(error.value)
    assert "instance_norm" not in str(error.value)  # this model has none
    with pytest.raises(ConfigError, match=r"the model has no site 'nrom'; allowed: conv, head. Did you mean 'norm'"):
        names(graph, {"nrom": INT})
    with pytest.raises(ConfigError, match=r"default_for = 'each' is not possible; allowed: usual, all"):
        single(graph, {"default_for": "each", "norm": {"config": {"name": "integer", "weight_width": 4}}})


def test_a_candidate_spelled_out_has_them(graph):
    built = QuantizationSpace(SpaceRequest(graph, choices={"default": INT, "norm": INT, "softmax": INT}))
    code = built.numbered(5, 6)[0]
    config = built.decode(code)
    assert set(config) >= {"norm", "softmax", "conv"}
    assert np.array_equal(built.encode(config), code)
    assert single(graph, config).formats(np.zeros(4, dtype=np.int64)) == built.formats(built.options(code[None])[0])
    with pytest.raises(ConfigError, match=r"this space offers no formats at pool \(AvgPool2d\)"):
        built.encode({**config, "pool": {"config": {"name": "integer", "data_in_width": 4}}})


def test_the_two_parts_of_a_joint_space(graph):
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3))
    choices = {"0": {"channel_multiplier": [1, 2], "name": ["output_only"]}}
    for default_for, number in (("usual", 2), ("all", 4)):
        parts = {"widths": Part("name", choices), "quantize": Part("name", {"default": INT}, default_for)}
        built = bf.spaces.SPACES.get("joint")(SpaceRequest(capture(model, torch.randn(2, 4)), parts=parts))
        assert len(built.quantization(built.graph).sites) == number
        widened = capture(bf.transforms.widen(built.graph, {}), torch.randn(2, 4))
        assert [s.op for s in built.quantization(widened).sites][1:-1] == ["layer_norm", "gelu"][: number - 2]


# --- what they compute -----------------------------------------------------------------------------------------------

RUNNERS = ("basic_evaluation", "model_size", "average_bitwidth", "basic_computation", "bops", "peak_memory", "sparsity")


def job(model, x, seed, runners=RUNNERS, **more):
    return EvaluationJob(
        model=model,
        sample=x[:2],
        space="graph/quantize/mixed_precision_ptq",
        by="name",
        choices=seed,
        runners=tuple(configured_runner(name) for name in runners),
        splits={"val": (x, torch.arange(len(x)) % 3), "train": (x, torch.arange(len(x)) % 3)},
        calibration=x,
        **more,
    )


def test_in_float_they_cost_and_compute_what_they_did():
    torch.manual_seed(1)
    model, x = Net().eval(), torch.randn(12, 2, 6, 6)
    usual = FixedEvaluator(job(model, x, {"default": INT}))
    named = FixedEvaluator(job(model, x, {"default": INT, **{n: {"name": ["NA"]} for n in EVERYTHING[1:-2]}}))
    codes = usual.space.numbered(0, usual.space.size)
    assert named.space.size == usual.space.size
    one, other = usual.evaluate(codes), named.evaluate(codes)
    # A batch norm that is a site is one of the sites with weights, which these two speak of.
    for metric in set(one.values) - {"average_bitwidth", "memory_density", "sparsity"}:
        assert np.array_equal(one.values[metric], other.values[metric]), metric
    kinds = {s.node.name: s.kind for s in usual._tree.program.steps}
    assert kinds["norm"] == "norm"  # merged, as ever
    assert {s.node.name: s.kind for s in named._tree.program.steps}["norm"] == "call"


def test_candidates_with_them_are_computed_as_deployed():
    torch.manual_seed(1)
    model, x = Net().eval(), torch.randn(12, 2, 6, 6)
    seed = {"default": {**INT, "name": ["integer", "NA"], "data_in_frac_width": [1, "auto"]}}
    evaluator = FixedEvaluator(job(model, x, seed, default_for="all"))
    codes = evaluator.space.sample(40, np.random.default_rng(0))
    measured = evaluator.evaluate(codes)
    assert not evaluator.plain
    for i, code in enumerate(codes):
        outputs = evaluator.space.graph.outputs
        alone = bf.scoring.evaluate(
            evaluator.model(code), x, torch.arange(len(x)) % 3, batch_size=evaluator.chunk, outputs=outputs
        )
        assert measured.values["loss"][i] == alone.loss


def test_they_are_counted():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)), torch.randn(12, 4)
    table = {"name": ["integer"], "weight_width": [4], "bias_width": [8], "data_in_width": [8]}
    evaluator = FixedEvaluator(job(model, x, {"1": table}))
    (values,) = (evaluator.evaluate(np.zeros((1, 0), dtype=np.int64)).values,)
    floats = 4 * (24 + 6 + 18 + 3)
    assert values["model_size"] == floats + 3 + 6  # 6 weights of 4 bits, 6 biases of 8
    assert values["average_bitwidth"] == 32  # the scale of a norm is no weight
    # Products of 32 bits; the norm has five operations for each of 6 values of 8 bits.
    assert values["total_bitops"] == (24 + 18) * 32 * 32 + 5 * 6 * 8
    row = describe(evaluator.space.graph, 1, {"1": {"config": {k: v[0] for k, v in table.items()}}}).rows[1]
    assert (row.data_in_bits, row.weight_bits, row.bias_bits, row.parameter_bytes) == (8, 4, 8, 9)


def test_analyze_sees_each_input_of_a_concatenation(graph):
    rows = describe(graph, 1, {"cat": {"config": {"name": "integer", "data_in_width": 8}}}).rows
    (row,) = [r for r in rows if r.name == "cat"]
    assert row.input_bytes == 2 * 4 * 4 * 4
    named = graph.naming(["cat"])
    taken = {a.name: a.uses for a in activations(named)}
    assert taken["act_1"] == taken["gelu"] == ((1, "data_in"),)


def test_one_of_several_calls_of_a_module(graph):
    x = torch.randn(4, 2, 6, 6)
    four = Integer.parse({"width": 4, "frac_width": 1}, "data_in", signed=True)
    model = quantize(graph, {"act_1": {"data_in": four}})
    net = graph.model
    before = net.act(net.norm(net.conv(x)))
    inside = torch.cat([F.silu(four.quantize(before)), F.gelu(before)], 1)
    expected = net.head(torch.flatten(net.pool(inside), 1)).softmax(1)
    assert torch.equal(model(x), expected)


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.extra, self.head = nn.Parameter(torch.linspace(-9, 9, 2).expand(12, 2).clone()), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.cat((x, 4 * x[:, :2], self.extra[: x.shape[0]]), dim=1))


def test_a_concatenation_rounds_each_tensor_by_one_format_that_saw_all():
    x = torch.randn(12, 4).clamp(-2, 2)
    graph = capture(Joined(), x[:2])
    wanted = {"cat": {"data_in": bf.formats.FORMATS.get("affine").parse({"width": 8}, ACTIVATION)}}
    formats = calibrate(graph, wanted, x)
    form = formats["cat"]["data_in"]
    assert form.quantize(torch.tensor([9.0, -9.0])).abs().min() > 8.9  # the widest of the three
    extra = graph.model.extra
    joined = torch.cat([form.quantize(part) for part in (x, 4 * x[:, :2], extra)], 1)
    model = quantize(graph, formats)
    assert torch.equal(model(x), graph.model.head(joined))
    model(x).sum().backward()
    assert model.extra.grad.abs().sum() > 0


class InPlace(nn.Module):
    """Reads its input again after a function has changed it."""

    def __init__(self, function):
        super().__init__()
        self.function, self.body, self.head = function, nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        y = self.body(x)
        self.function(y)
        return self.head(y)


@pytest.mark.parametrize(
    ("name", "function", "plain"),
    [
        ("silu", lambda y: F.silu(y, inplace=True), F.silu),
        ("silu", lambda y: F.silu(y, True), F.silu),
        ("leaky_relu", lambda y: F.leaky_relu(y, 0.2, True), lambda y: F.leaky_relu(y, 0.2)),
        ("leaky_relu_", lambda y: F.leaky_relu_(y, 0.2), lambda y: F.leaky_relu(y, 0.2)),
        ("sigmoid_", lambda y: torch.sigmoid_(y), torch.sigmoid),
        ("tanh_", lambda y: y.tanh_(), torch.tanh),
    ],
)
def test_functions_that_change_their_input(name, function, plain):
    x = torch.randn(8, 6)
    graph = capture(InPlace(function), x[:2])
    form = Integer.parse({"width": 4, "frac_width": 2}, "data_in", signed=True)
    (site,) = [s for s in graph.nameable if s.name == name]
    model = quantize(graph, {site.name: {"data_in": form}})
    assert torch.equal(model(x), model.head(plain(form.quantize(model.body(x)))))


# --- training --------------------------------------------------------------------------------------------------------


def test_a_batch_norm_with_formats_trains_as_torch_does():
    torch.manual_seed(0)
    x = torch.randn(8, 4, 3, 3)
    for settings in ({}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}):
        graph = capture(nn.Sequential(nn.BatchNorm2d(4, **settings), nn.Flatten()), x[:2])
        forms = {o: Integer.parse({"width": 6, "frac_width": 3}, o, signed=True) for o in graph.nameable[0].operands}
        twin = quantize(graph, {"_0": forms}).train()
        plain = nn.BatchNorm2d(4, **settings).train()
        for _ in range(2):
            out = twin(x)
            assert torch.equal(out, plain(forms["data_in"].quantize(x)).flatten(1))
        for name, buffer in plain.named_buffers():
            assert torch.equal(dict(twin[0].named_buffers())[name], buffer)
        if settings.get("affine", True):
            out.square().sum().backward()
            assert all(p.grad.abs().sum() > 0 for p in twin.parameters())


@pytest.mark.sampled(2)
@pytest.mark.slow
@pytest.mark.parametrize("activation", [nn.ReLU6, nn.ReLU])
def test_a_search_with_them(activation, tmp_path):
    """Evaluated at the door and at the end as deployed models: a difference would be an error."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), activation(), nn.Linear(8, 3), nn.LogSoftmax(1))
    x = torch.randn(400, 6)
    data = dataset_of((x, x[:, :3].argmax(1)))
    runner = {"basic_train": {"max_epochs": 1, "batch_size": 32}, "basic_evaluation": {}}
    for trains in (False, True):
        run = bf.search(
            model=model,
            data=data,
            space={"default_for": "all", "default": {**INT, "name": ["integer", "NA"]}},
            metrics=["accuracy", "model_size"],
            strategy={"name": "evolution", "sw_runner": runner if trains else {}},
            n_trials=12,
            project_dir=str(tmp_path / str(trains)),
        )
        assert len(run.trials) == 12
        assert {site for trial in run.trials for site in trial.config} >= {"_1", "_2", "_4"}
        trial = run.front[0]
        transformed = bf.transform_trial(run.folder, trial.number, data=data, model=model, check=True)
        assert transformed.evaluation.accuracy == trial.metrics["accuracy"]


def test_relu6_has_an_input_without_a_sign(graph):
    model = capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU6(), nn.Linear(4, 3)), torch.randn(2, 4))
    built = QuantizationSpace(SpaceRequest(model, "type", {"relu6": INT}))
    assert not built.site_formats[1][0]["data_in"].signed


def test_a_graph_is_not_changed(graph):
    named = graph.naming(["norm", "no such node"])
    assert [s.name for s in named.sites] == ["conv", "norm", "head"]
    assert [s.name for s in graph.sites] == ["conv", "head"]
    assert named.naming(["norm"]) is named
    assert [s.name for s in named.naming_only(["gelu"]).sites] == ["conv", "gelu", "head"]
    assert named.naming_only([]).nodes == graph.nodes
    assert replace(named, nodes=graph.nodes).sites == graph.sites
