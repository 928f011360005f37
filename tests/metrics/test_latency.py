"""Latency: measured where there are kernels, modelled where there are none, never of the simulation."""

import sys

import numpy as np
import pytest
import torch
from test_metrics import evaluator
from torch import nn

from bitfront.errors import ConfigError
from bitfront.kernels import onednn
from bitfront.metrics import RUNNERS
from bitfront.metrics.configured import configured_runner
from bitfront.metrics.deployed import Deployment
from bitfront.metrics.timing import summarise, time_in_turns
from bitfront.models.base import build_model
from bitfront.testing.metrics import check_runner

QUICK = {"seconds": 0.01, "repeats": 5}
BYTES = {"name": ["integer", "NA"], "data_in_width": [4, 8], "weight_width": [8], "bias_width": [16]}
#: A bias is added as float in any case.
FLOAT = {"name": ["integer"], "bias_width": [8]}
BACKENDS = [
    pytest.param(
        "torch", marks=pytest.mark.skipif(not onednn.exact(), reason="no exact kernels of bytes on this machine")
    ),
    "onnxruntime",
]


def latency(**settings):
    kind = RUNNERS.get("latency")
    return kind(kind.Settings(**{**QUICK, **settings}))


def every(context):
    return context.space.numbered(0, context.space.size)


class Counts:
    """Counts the networks that are built."""

    def __init__(self, monkeypatch):
        self.built = 0
        original = Deployment.network

        def network(*args):
            self.built += 1
            return original(*args)

        monkeypatch.setattr(Deployment, "network", network)


@pytest.mark.parametrize("backend", BACKENDS)
def test_networks_in_bytes_are_measured_once_per_signature(backend, tiny_mlp, monkeypatch):
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime")
    counts = Counts(monkeypatch)
    context = evaluator(tiny_mlp, (4,), {"linear": BYTES}, by="type")
    runner = latency(backend=backend, batch_size=3)
    assert set(runner.kinds(context).values()) == {("measured", "")}
    metrics = runner.measure(context, every(context))
    # Two sites in float or in bytes; a narrower input is one more operator of ONNX.
    assert counts.built == (9 if backend == "onnxruntime" else 4)
    # Candidates with one signature share one measurement.
    deployment, measured = Deployment(runner.settings, context), {}
    for code, value in zip(every(context), metrics["latency"].tolist(), strict=True):
        measured.setdefault(deployment.signature(context.space.graph, context.formats(code)), set()).add(value)
    assert [len(values) for values in measured.values()] == [1] * counts.built
    for values in metrics.values():
        assert (values > 0).all()
    assert (metrics["latency_low"] <= metrics["latency"]).all()
    assert (metrics["latency"] <= metrics["latency_high"]).all()
    assert (metrics["latency"] <= metrics["latency_p90"]).all()
    assert metrics["latency_per_sample"] == pytest.approx(metrics["latency"] / 3)
    again = runner.measure(context, every(context)[::-1])
    assert np.array_equal(again["latency"][::-1], metrics["latency"])
    assert counts.built <= 9


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_larger_network_loses_on_any_machine(backend):
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime")
    runner = latency(backend=backend, batch_size=16)
    networks = []
    for width in (1500, 32):
        model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        context = evaluator(model, (8,), {"default": FLOAT})
        networks.append(Deployment(runner.settings, context).network(context, every(context)[0]))
    large, small = (summarise(s) for s in time_in_turns([n.timed for n in networks], 0.05, 20))
    assert large.low > small.high


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"data_in_width": [16], "weight_width": [8]}, "data_in is int16.8, which no kernel of bytes takes"),
        ({"data_in_width": [8], "weight_width": [8, 12]}, "weight is int12.6, which no kernel of bytes takes"),
        ({"weight_width": [8]}, "data_in stays in float"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_option_without_a_kernel_and_nothing_is_measured(backend, entry, why, tiny_mlp, monkeypatch):
    counts = Counts(monkeypatch)
    context = evaluator(tiny_mlp, (4,), {"fc2": {"name": ["integer", "NA"], **entry}, "fc1": BYTES})
    runner = latency(backend=backend)
    assert set(runner.kinds(context).values()) == {("modelled", f"fc2 (Linear): {why}")}
    metrics = runner.measure(context, every(context))
    assert counts.built == 0
    for name in ("latency_low", "latency_high", "latency_p90"):
        assert np.array_equal(metrics[name], metrics["latency"])


def test_the_float_model_beside_a_search_comes_about_as_its_candidates_do(tiny_mlp):
    wide = {"name": ["integer"], "data_in_width": [16], "weight_width": [16]}
    context = evaluator(tiny_mlp, (4,), {"fc1": wide}, runners=[configured_runner("latency", QUICK)])
    (kind,) = {k for k, _ in context.float_evaluator().runners[0].kinds(context.float_evaluator()).values()}
    assert kind == "modelled"
    floating = context.float_evaluator().evaluate(np.zeros((1, 0), dtype=np.int64)).values["latency"][0]
    wider = context.evaluate(every(context)).values["latency"][0]
    assert floating > wider > 0
    # And shares what was measured.
    context = evaluator(tiny_mlp, (4,), {"fc1": FLOAT}, runners=[configured_runner("latency", QUICK)])
    first = context.evaluate(every(context)).values["latency"]
    assert np.array_equal(context.float_evaluator().evaluate(np.zeros((1, 0), dtype=np.int64)).values["latency"], first)


def test_the_roofline_of_jsc_tiny_by_hand():
    seed = {"seq_blocks_2": {"name": ["integer", "NA"], "data_in_width": [8], "weight_width": [4]}}
    context = evaluator(build_model("jsc-tiny", (16,), 5, seed=0), (16,), seed)
    settings = {"backend": "modelled", "batch_size": 10, "operations_per_second": 1e6, "bytes_per_second": 1e9}
    metrics = latency(**settings).measure(context, every(context))
    # BatchNorm 4·16, ReLU 16, Linear 16·5 at a quarter, ReLU 5: all bound by operations at a million per second.
    assert metrics["latency"] == pytest.approx([10 * (64 + 16 + 80 / 4 + 5) / 1e3, 10 * (64 + 16 + 80 + 5) / 1e3])
    assert metrics["latency_per_sample"] == pytest.approx(metrics["latency"] / 10)
    settings |= {"operations_per_second": 1e15, "bytes_per_second": 1e3}
    metrics = latency(**settings).measure(context, every(context))
    norm, relu, last = (16 + 16) * 4 * 10 + 32 * 4, (16 + 16) * 4 * 10, (5 + 5) * 4 * 10
    quantized, floating = 80 * 4 / 8 + 10 * (16 + 5 * 4), 80 * 4 + 10 * (16 * 4 + 5 * 4)
    assert metrics["latency"] == pytest.approx([norm + relu + last + quantized, norm + relu + last + floating])


def test_the_modelled_latency_conforms(tiny_mlp):
    context = evaluator(tiny_mlp, (4,), {"default": {**BYTES, "weight_width": [8, 16]}})
    check_runner("latency", {"backend": "modelled"}, context, context.space.sample(24, np.random.default_rng(0)))


def test_a_model_that_cannot_be_traced_is_measured_in_float_only():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(x) if x.sum() > 1e9 else self.fc(-x)

    floating = evaluator(Branching(), (4,), {"default": FLOAT})
    assert latency().kinds(floating)["latency"] == ("measured", "")
    kind, why = latency().kinds(evaluator(Branching(), (4,), {"default": BYTES}))["latency"]
    assert kind == "modelled"
    assert "cannot be traced" in why


def test_a_missing_package_is_said_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    runner = latency(backend="onnxruntime")
    with pytest.raises(ConfigError, match=r"pip install 'bitfront\[onnx\]'") as caught:
        runner.ready("cpu")
    assert caught.value.key == ("backend",)
    latency().ready("cpu")


def test_threads_of_torch_are_as_before(tiny_mlp):
    before = torch.get_num_threads()
    context = evaluator(tiny_mlp, (4,), {"default": FLOAT})
    latency(threads=2).measure(context, every(context))
    assert torch.get_num_threads() == before


def test_a_qdq_file_with_additions_in_formats_is_measured(monkeypatch):
    pytest.importorskip("onnxruntime")

    class Sum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x) + x

    forms = {"name": ["integer"], "data_in_width": [4, 8]}
    choices = {"linear": forms | {"weight_width": [8], "bias_width": [16]}, "add": forms}
    context = evaluator(Sum().eval(), (4,), choices, by="type")
    counts, codes = Counts(monkeypatch), every(context)
    runner = latency(backend="onnxruntime", onnx_form="qdq")
    assert set(runner.kinds(context).values()) == {("measured", "")}
    assert (runner.measure(context, codes)["latency"] > 0).all()
    assert counts.built == len(codes)
    modelled = latency(backend="onnxruntime", onnx_form="integer").kinds(context)
    assert "there is no kernel of bytes for add" in next(iter(modelled.values()))[1]
