"""Metrics: figures by hand, and the conformance suite."""

import itertools
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitfront.constraints import Constraint
from bitfront.engine.evaluation.fixed import EvaluationJob, FixedEvaluator
from bitfront.engine.planning.feasibility import closest
from bitfront.errors import ConfigError
from bitfront.metrics import RUNNERS
from bitfront.metrics.base import Runner, SampleChoice
from bitfront.metrics.configured import configured_runner
from bitfront.models.base import build_model
from bitfront.testing.metrics import check_runner

NAME = "graph/quantize/mixed_precision_ptq"


def evaluator(model, shape, seed, runners=(), by="name", samples=60):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, *shape, generator=generator)
    y = torch.randint(2, (samples,), generator=generator)
    return FixedEvaluator(
        EvaluationJob(
            model=model.eval(),
            sample=x[:2],
            space=NAME,
            by=by,
            choices=seed,
            runners=tuple(runners),
            splits={"val": (x, y), "train": (x[:20], y[:20])},
            calibration=x,
        )
    )


def measure(runner, settings, context, codes=None):
    kind = RUNNERS.get(runner)
    codes = context.space.numbered(0, context.space.size) if codes is None else codes
    return kind(kind.Settings(**settings)).measure(context, codes)


INT = {"name": ["integer", "NA"], "data_in_width": [4, 8], "weight_width": [2, "NA"], "bias_width": [6]}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("average_bitwidth", {}),
        ("average_bitwidth", {"over": "quantized", "compare_to": 8}),
        ("model_size", {}),
        ("basic_computation", {}),
        ("bops", {}),
        ("bops", {"input_bits": 16}),
        ("ebops", {}),
        ("ebops", {"input_bits": 7, "sign_bits": True, "count": "set_bits", "biases": False}),
        ("dsp", {}),
        ("dsp", {"least_width": 2}),
        ("sparsity", {}),
        ("peak_memory", {}),
        ("basic_train", {"max_epochs": 3}),
        ("basic_evaluation", {}),
        ("basic_evaluation", {"num_samples": 7, "data_loader": "train_dataloader"}),
    ],
)
def test_runners_conform(name, settings, tiny_mlp):
    context = evaluator(tiny_mlp, (4,), {"default": INT})
    codes = context.space.sample(24, np.random.default_rng(0))
    check_runner(name, settings, context, codes)


def test_a_configured_runner_is_parsed_once_and_travels():
    runner = configured_runner("basic-evaluation", {"num_samples": 5})
    assert (runner.name, runner.side, runner.where[-1]) == ("basic_evaluation", "sw_runner", "basic_evaluation")
    assert runner.settings.samples == SampleChoice("val", 5)
    assert pickle.loads(pickle.dumps(runner)) == runner  # noqa: S301
    elsewhere = configured_runner("model_size", side="sw_runner")
    assert elsewhere.side == "sw_runner"
    assert elsewhere.settings.samples is None
    auto = configured_runner("basic_evaluation", {"num_samples": "auto", "data_loader": "train"}).settings
    assert auto.samples == SampleChoice("train", None, auto=True)
    assert auto.with_samples(70).samples == SampleChoice("train", 70)


@pytest.mark.parametrize(
    ("name", "given", "key", "message"),
    [
        ("basic_evaluatoin", {}, "", r"no metric runner called .* Did you mean 'basic_evaluation'"),
        ("basic_evaluation", {"num_sample": 3}, "num_sample", r"unknown key; .* Did you mean 'num_samples'"),
        ("basic_evaluation", {"num_samples": 0}, "num_samples", r"0 is not possible: input should be greater"),
        ("basic_evaluation", {"data_loader": "test"}, "data_loader", r"'test' is not possible; allowed: val_data"),
        ("basic_train", {"halving": {"rungs": [1.5]}}, "halving.rungs", r"1.5 is of the wrong type"),
        ("basic_train", {"halving": {"rugs": [1]}}, "halving.rugs", r"unknown key; .* Did you mean 'rungs'"),
        ("model_size", {"over": "all"}, "over", r"unknown key; nothing can be set here"),
    ],
)
def test_mistakes_in_the_settings_of_a_runner_name_their_key(name, given, key, message):
    with pytest.raises(ConfigError, match=message) as caught:
        configured_runner(name, given, "sw_runner")
    assert ".".join(caught.value.key) == f"search.strategy.sw_runner.{name}" + (f".{key}" if key else "")


def test_every_registered_runner_is_checked_here_or_in_another_file():
    here = {"average_bitwidth", "model_size", "basic_computation", "basic_evaluation", "basic_train"}
    elsewhere = {"latency", "energy", "lut", "adder_bits", "microcontroller"}
    assert set(RUNNERS.names()) == here | {"bops", "ebops", "dsp", "sparsity", "peak_memory"} | elsewhere


class MeansOfAllBefore(RUNNERS.get("basic_evaluation")):
    """What the system we start from does: a metric that is never reset."""

    seen = ()

    def measure(self, context, codes):
        metrics = super().measure(context, codes)
        type(self).seen = (*self.seen, *metrics["loss"])
        return {**metrics, "loss": np.full(len(codes), np.mean(self.seen))}


class CountsFailuresAsWrong(RUNNERS.get("basic_evaluation")):
    """A number where there is none."""

    def measure(self, context, codes):
        scores = context.scores(codes, "val", None)
        return {"loss": np.nan_to_num(scores.loss), "accuracy": scores.correct / scores.samples}


@pytest.mark.parametrize(
    ("kind", "message"),
    [(MeansOfAllBefore, "loss of the same candidates differs"), (CountsFailuresAsWrong, "not NaN")],
)
def test_the_conformance_suite_notices(kind, message, tiny_mlp, monkeypatch):
    assert issubclass(kind, Runner)
    monkeypatch.setitem(RUNNERS._members, "basicevaluation", ("basic_evaluation", kind))
    context = evaluator(tiny_mlp, (4,), {"default": INT})
    with pytest.raises(AssertionError, match=message):
        check_runner("basic_evaluation", {}, context, context.space.numbered(0, 6))


# --- bits ------------------------------------------------------------------------------------------------------------


def test_average_bitwidth_is_the_mean_over_all_weights_and_float_ones_count_32(tiny_mlp):
    # fc1 has 12 weights, fc2 has 6; biases and the ReLU's input do not count.
    seed = {"fc1": {"name": ["integer", "NA"], "weight_width": [4], "bias_width": [2]}}
    context = evaluator(tiny_mlp, (4,), seed)
    metrics = measure("average_bitwidth", {}, context)
    assert metrics["average_bitwidth"].tolist() == [(12 * 4 + 6 * 32) / 18, 32.0]
    assert metrics["memory_density"].tolist() == [32 / ((12 * 4 + 6 * 32) / 18), 1.0]
    metrics = measure("average_bitwidth", {"over": "quantized", "compare_to": 16}, context)
    assert metrics["average_bitwidth"].tolist() == [4.0, 32.0]
    assert metrics["memory_density"].tolist() == [4.0, 0.5]


def test_average_bitwidth_weighs_sites_by_their_weights(tiny_mlp):
    seed = {k: {"name": ["integer"], "weight_width": [w]} for k, w in (("fc1", 2), ("fc2", 8))}
    metrics = measure("average_bitwidth", {}, evaluator(tiny_mlp, (4,), seed))
    assert metrics["average_bitwidth"].tolist() == [(12 * 2 + 6 * 8) / 18]


def test_a_product_of_activations_has_no_weights_to_count():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return torch.bmm(self.fc(x), x.transpose(1, 2)).flatten(1)

    seed = {"default": {"name": ["integer"], "weight_width": [4]}}
    metrics = measure("average_bitwidth", {}, evaluator(Attention(), (3, 4), seed))
    assert metrics["average_bitwidth"].tolist() == [4.0]


# --- operations ------------------------------------------------------------------------------------------------------


def test_operations_of_jsc_tiny_by_hand():
    seed = {
        "seq_blocks_2": {"name": ["integer"], "data_in_width": [8], "weight_width": [4], "bias_width": [4]},
        "seq_blocks_3": {"name": ["integer", "NA"], "data_in_width": [3]},
    }
    metrics = measure("basic_computation", {}, evaluator(build_model("jsc-tiny", (16,), 5, seed=0), (16,), seed))
    # BatchNorm 4·16 and ReLU 16 in float, Linear 16·5 multiply-adds, ReLU 5.
    assert metrics["total_flops"].tolist() == [64 + 16 + 80 + 5] * 2
    float_part = 64 * 32 + 16 * 32
    assert metrics["total_bitops"].tolist() == [float_part + 80 * 8 * 4 + 5 * 3, float_part + 80 * 8 * 4 + 5 * 32]


def test_bit_operations_of_a_float_site_are_those_of_32_bits(tiny_mlp):
    seed = {"fc1": {"name": ["integer"], "weight_width": [4]}}
    metrics = measure("basic_computation", {}, evaluator(tiny_mlp, (4,), seed))
    assert metrics["total_bitops"].tolist() == [12 * 32 * 4 + 3 * 32 + 6 * 32 * 32]


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_model_size_counts_parameters_and_buffers_in_whole_bytes():
    model = build_model("jsc-tiny", (16,), 5, seed=0)
    seed = {"seq_blocks_2": {"name": ["integer", "NA"], "weight_width": [3], "bias_width": [3]}}
    # BatchNorm: weight, bias, mean and variance of 16 floats each; its step counter is not deployed.
    norm = 4 * 16 * 4
    quantized, whole = measure("model_size", {}, evaluator(model, (16,), seed))["model_size"]
    assert quantized == norm + 80 * 3 // 8 + 2  # 5 biases of 3 bits end on a whole byte
    assert whole == norm + (80 + 5) * 4


@pytest.mark.parametrize(
    ("settings", "overhead_bits"),
    [
        ({}, 3 * 32),
        ({"granularity": ["tensor"]}, 32),
        ({"symmetric": [False]}, 3 * (32 + 5)),
        ({"granularity": ["tensor"], "symmetric": [False]}, 32 + 5),
    ],
)
def test_model_size_includes_the_scales(tiny_mlp, settings, overhead_bits):
    table = {"name": ["affine"], "weight_width": [5], **{f"weight_{k}": v for k, v in settings.items()}}
    (size,) = measure("model_size", {}, evaluator(tiny_mlp, (4,), {"fc1": table}))["model_size"]
    assert size == -(-(12 * 5 + overhead_bits) // 8) + (3 + 6 + 2) * 4


class SharedLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.fc(x))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.again = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.again.weight = self.fc.weight

    def forward(self, x):
        return self.again(self.fc(x))


class Functionally(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.scale = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return F.linear(F.linear(x, self.w) * 2, self.w) * self.scale


@pytest.mark.parametrize(
    ("factory", "sites", "rest"),
    [(SharedLayer, ("fc", "fc_1"), 16), (Tied, ("fc", "again"), 0), (Functionally, ("linear", "linear_1"), 16)],
)
def test_a_shared_parameter_is_stored_once_per_format(factory, sites, rest):
    for widths, size in (((4, 8), 24), ((8, 8), 16)):
        seed = {s: {"name": ["integer"], "weight_width": [w]} for s, w in zip(sites, widths, strict=True)}
        assert measure("model_size", {}, evaluator(factory(), (4,), seed))["model_size"].tolist() == [size + rest]


# --- loss and accuracy -----------------------------------------------------------------------------------------------


def test_loss_and_accuracy_are_those_of_the_quantized_model_on_the_samples_asked_for(tiny_mlp):
    context = evaluator(tiny_mlp, (4,), {"default": INT})
    codes = context.space.numbered(0, 5)
    for split, num in (("val", None), ("val", 13), ("train", 9)):
        settings = {"data_loader": f"{split}_dataloader", "num_samples": num}
        metrics = measure("basic_evaluation", settings, context, codes)
        x, y = (t[:num] for t in context.job.splits[split])
        for i, code in enumerate(codes):
            logits = context.model(code)(x).detach()
            assert metrics["accuracy"][i] == (logits.argmax(1) == y).double().mean()
            assert metrics["loss"][i] == pytest.approx(float(F.cross_entropy(logits.double(), y)), rel=1e-6)


# --- bit operations


class Jets(nn.Sequential):
    """16-64-32-32-5, the network of Hawks et al. 2021, with weights that no format rounds to zero."""

    def __init__(self):
        widths = [16, 64, 32, 32, 5]
        layers = [m for i, o in itertools.pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
        super().__init__(*layers[:-1])
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.5)


def jets(bits):
    settings = {"name": ["integer"], "data_in_width": [bits], "weight_width": [bits], "weight_frac_width": ["auto"]}
    return evaluator(Jets(), (16,), {"linear": settings}, by="type")


@pytest.mark.parametrize(
    ("bits", "input_bits", "published"), [(8, 32, 583_968), (6, 32, 412_960), (6, 16, 298_272), (4, 32, 267_808)]
)
def test_bops_are_the_published_ones(bits, input_bits, published):
    assert measure("bops", {"input_bits": input_bits}, jets(bits))["bops"].tolist() == [published]


def test_bops_of_the_float_network_are_the_published_ones():
    float_one = jets(8).float_evaluator()
    codes = np.zeros((1, 0), dtype=np.int64)
    assert measure("bops", {}, float_one, codes)["bops"].tolist() == [4_652_832]


def test_ebops_of_dense_uniform_networks_are_the_published_ones():
    # published_jsc: 64-32-32, 4 bits everywhere, 8 at the input: 84,480.
    # They count signs, and no biases.
    published = {"sign_bits": True, "biases": False}
    assert measure("ebops", {"input_bits": 8, **published}, jets(4))["ebops"].tolist() == [84_480]
    assert measure("ebops", {"input_bits": 16, **published}, jets(6))["ebops"].tolist() == [214_656]
    # As HGQ2 counts: 7 · 3 and 3 · 3 bits, 31 bits for each of 133 biases in float.
    assert measure("ebops", {"input_bits": 8}, jets(4))["ebops"].tolist() == [1024 * 21 + 3232 * 9 + 133 * 31]


def test_weights_that_round_to_zero_cost_nothing(tiny_mlp):
    context = evaluator(
        tiny_mlp, (4,), {"linear": {"name": ["integer"], "data_in_width": [8], "weight_width": [2, 8]}}, by="type"
    )
    codes = context.space.numbered(0, context.space.size)
    sparsity = measure("sparsity", {}, context)["sparsity"]
    ebops = measure("ebops", {}, context)["ebops"]
    choosing = [g for g, group in enumerate(context.space.groups) if group.size > 1]
    for i, (code, options) in enumerate(zip(codes, context.space.options(codes), strict=True)):
        linears = [m for m in context.model(code, bake=True).modules() if isinstance(m, nn.Linear)]
        zeros = sum(int((m.weight == 0).sum()) for m in linears)
        assert sparsity[i] == pytest.approx(zeros / sum(m.weight.numel() for m in linears))
        bits = [int(context.space.bits("weight")[g][options[g]]) for g in choosing]
        products = sum(int((m.weight != 0).sum()) * 7 * (b - 1) for m, b in zip(linears, bits, strict=True))
        assert ebops[i] == products + sum(31 * len(m.bias) for m in linears)


# --- peak memory


class Residual(nn.Module):
    """8 values in, 8 to 32 to 8, added to the input, 4 out."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.out = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.out(x + self.down(torch.relu(self.up(x))))


def test_peak_memory_is_the_largest_set_of_live_activations():
    context = evaluator(Residual(), (8,), {"default": INT})
    # relu holds what it takes (32) and gives (32), while the input (8) waits for the addition: 72 values of 4 bytes.
    code = np.zeros((1, 0), dtype=np.int64)
    assert measure("peak_memory", {}, context.float_evaluator(), code)["peak_memory"].tolist() == [72 * 4]


def test_activations_are_held_in_the_widest_format_that_takes_them():
    seed = {
        "up": {"name": ["integer"], "data_in_width": [4]},
        "down": {"name": ["integer"], "data_in_width": [8]},
        "relu": {"name": ["integer"], "data_in_width": [16]},
        "add": {"name": ["integer"], "data_in_width": [6]},
        "out": {"name": ["integer"], "data_in_width": [8]},
    }
    context = evaluator(Residual(), (8,), seed)
    # At the relu: 32 values of 16 bits in, 32 of 8 out, and the input, which the addition takes in 6 bits: 6 bytes.
    assert measure("peak_memory", {}, context)["peak_memory"].tolist() == [64 + 32 + 6]


def test_views_make_no_second_copy():
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 2))
    context = evaluator(net, (1, 4, 4), {"default": INT})
    code = np.zeros((1, 0), dtype=np.int64)
    # Convolution: 16 in, 32 out. Flatten: the same 32. Linear: 32 in, 2 out.
    assert measure("peak_memory", {}, context.float_evaluator(), code)["peak_memory"].tolist() == [48 * 4]


def test_the_least_peak_is_that_of_all_candidates():
    """A maximum over sites, which no single site may move."""
    settings = {"name": ["NA", "integer"], "data_in_width": [8, 4]}
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    context = evaluator(net, (8,), {"default": settings}, runners=[configured_runner("peak_memory")])
    limit = Constraint("peak_memory <= 1 B", "peak_memory", "<=", 1.0)
    least = context.closed_form_values(closest(context, [limit])[None], {"peak_memory"})["peak_memory"][0]
    everything = context.space.numbered(0, context.space.size)
    assert least == context.closed_form_values(everything, {"peak_memory"})["peak_memory"].min()
