"""The table of a model: figures by hand, agreement with the metrics, and models of every kind."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import bitfront as bf
from bitfront.engine.analysis import describe
from bitfront.engine.evaluation.fixed import EvaluationJob, FixedEvaluator
from bitfront.errors import CaptureError, ConfigError
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.metrics.configured import configured_runner
from bitfront.models.base import build_model
from bitfront.report.tables import analysis as sheet
from bitfront.spaces.quantize import single


def toy() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5), nn.ReLU())


EIGHT = {"name": "integer", "data_in_width": 8, "weight_width": 4, "weight_frac_width": 2, "bias_width": 6}
CONFIG = {"by": "type", "linear": {"config": EIGHT}}


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_the_jet_tagger_by_hand(samples):
    result = bf.analyze(toy(), torch.randn(samples, 16), batch=8)
    assert [r.type for r in result.rows] == ["BatchNorm1d", "ReLU", "Linear", "ReLU"]
    assert [r.operations for r in result.rows] == [512, 128, 640, 40]
    assert [r.backward_operations for r in result.rows] == [512, 128, 1280, 40]
    assert [(r.input_buffer, r.output_buffer) for r in result.rows] == [(128, 128), (128, 128), (128, 40), (40, 40)]
    assert [(r.input_bytes, r.output_bytes) for r in result.rows] == [(512, 512), (512, 512), (512, 160), (160, 160)]
    assert [r.parameters for r in result.rows] == [32, 0, 85, 0]
    assert (result.total.operations, result.total.operation_bits) == (1320, 42240)
    assert (result.total.parameters, result.total.parameter_bytes) == (117, 468)
    assert result.total.bitops == 640 * 32 * 32 + 680 * 32
    assert result.total.not_counted == result.total.without_bops == ()


def test_a_candidate_by_hand():
    model = toy()
    with torch.no_grad():
        model[2].weight.zero_()[0, :4] = 1  # 4 of 80 weights are left
    result = bf.analyze(model, torch.randn(1, 16), batch=8, config=CONFIG)
    row = result.rows[2]
    assert (row.data_in_bits, row.weight_bits, row.bias_bits) == (8, 4, 6)
    assert (row.input_bytes, row.output_bytes) == (128, 160)
    assert row.parameter_bytes == 80 * 4 // 8 + math.ceil(5 * 6 / 8)
    assert (row.bitops, row.operation_bits) == (640 * 32, 640 * 8)
    # 7 bits times 3 bits, and 5 bits of each of 5 biases that are not zero.
    biases = int(torch.count_nonzero(Integer(6, 3).round(model[2].bias)))
    assert row.ebops == 8 * (4 * 7 * 3 + 5 * biases)
    assert row.bops == 8 * 80 * (4 / 80 * 32 + 8 + 4 + math.log2(16))
    assert result.total.parameter_bytes == 32 * 4 + row.parameter_bytes
    # Weights that round to zero cause no products.
    with torch.no_grad():
        model[2].weight.fill_(0.05)
        model[2].bias.zero_()
    assert bf.analyze(model, torch.randn(1, 16), config=CONFIG).rows[2].ebops == 0


SPACES = [
    ("jsc-tiny", (16,), 5, {"linear": EIGHT, "relu": {"name": "integer", "data_in_width": 4}}),
    ("digits-cnn", (1, 8, 8), 10, {"conv2d": EIGHT, "linear": {"name": "affine", "weight_width": 3}}),
]


@pytest.mark.parametrize(("name", "shape", "classes", "seed"), SPACES, ids=lambda v: v if isinstance(v, str) else "")
def test_the_totals_are_those_of_the_metrics(name, shape, classes, seed):
    model = build_model(name, shape, classes, seed=0).eval()
    x = torch.randn(20, *shape)
    config = {"by": "type", **{k: {"config": v} for k, v in seed.items()}}
    runners = (configured_runner("basic_computation"), configured_runner("model_size"))
    job = EvaluationJob(
        model=model, sample=x[:2], space="graph/quantize/mixed_precision_ptq", by="type", choices=seed, runners=runners,
        splits={"val": (x, torch.zeros(20, dtype=torch.int64))}, calibration=x,
    )  # fmt: skip
    evaluator = FixedEvaluator(job, single(capture(model, x[:2]), config))
    measured = evaluator.evaluate(np.zeros((1, 0), dtype=np.int64)).values
    total = bf.analyze(model, x, config=config).total
    buffers = sum(b.numel() * 4 for n, b in model.named_buffers() if not n.endswith("num_batches_tracked"))
    assert measured["total_flops"].tolist() == [total.operations]
    assert measured["total_bitops"].tolist() == [total.bitops]
    assert measured["model_size"].tolist() == [total.parameter_bytes + buffers]


def test_a_batch_multiplies_work_and_not_parameters():
    model, x = build_model("digits-cnn", (1, 8, 8), 10, seed=0), torch.randn(2, 1, 8, 8)
    one, many = bf.analyze(model, x).total, bf.analyze(model, x, batch=12).total
    for field in ("operations", "backward_operations", "macs", "bitops", "operation_bits", "ebops"):
        assert getattr(many, field) == 12 * getattr(one, field)
    assert many.bops == pytest.approx(12 * one.bops)
    assert (many.parameters, many.parameter_bytes) == (one.parameters, one.parameter_bytes)


class TiedLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.tied, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Parameter(torch.zeros(3))
        self.tied.weight = self.fc.weight

    def forward(self, x):
        return self.tied(self.fc(self.fc(x)))


def test_shared_parameters_count_once_in_the_total():
    result = bf.analyze(TiedLayers(), torch.randn(2, 6))
    assert [r.parameters for r in result.rows] == [42, 42, 42]
    assert result.total.parameters == 36 + 6 + 6 + 3
    assert result.total.parameter_bytes == 4 * 51
    config = {"fc": {"config": EIGHT}, "fc_1": {"config": {**EIGHT, "weight_width": 8, "weight_frac_width": 4}}}
    quantized = bf.analyze(TiedLayers(), torch.randn(2, 6), config=config)
    # In the widest format of its sites, which is float here: `tied` stays in float.
    assert quantized.total.parameter_bytes == 4 * 36 + 5 + 4 * 6 + 4 * 3
    assert [r.weight_bits for r in quantized.rows] == [4, 8, 32]


class Branches(nn.Module):
    """Not traced by torch.fx."""

    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.fc(x)
        if h.sum() > -1e9:
            h = torch.softmax(h + torch.mv(h, h.new_ones(6))[:, None], -1)
        return self.out(h)


def test_a_model_that_cannot_be_traced():
    result = bf.analyze(Branches(), torch.randn(2, 6), config=CONFIG)
    assert result.untraced.endswith("if h.sum() > -1e9:")
    assert [(r.name, r.macs) for r in result.rows if r.macs] == [("fc", 36), ("mv", 6), ("out", 18)]
    assert {r.name: r.operations for r in result.rows}["softmax"] == 30
    assert [r.weight_bits for r in result.rows if r.type == "Linear"] == [4, 4]
    # A product that the model calls is a site, here in float: 31 bits times 31 bits, without signs.
    assert result.total.without_bops == ()
    assert {r.name: r.ebops for r in result.rows}["mv"] == 6 * 31 * 31


class Dotted(nn.Module):
    """Not traced by torch.fx, with a product that no record has operands for."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        if x.sum() > -1e9:
            x = x * torch.dot(x.flatten(), x.flatten())
        return self.out(x)


def test_products_that_are_no_sites_are_named():
    result = bf.analyze(Dotted(), torch.randn(2, 6))
    assert result.total.without_bops == ("dot (dot)",)
    assert "products that are not in bops and ebops: dot (dot)" in str(result)


class Tokens(nn.Module):
    """Takes token ids and a mask by name, returns a dictionary."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

    def forward(self, ids, mask=None):
        h = self.embed(ids)
        if mask is not None:
            h = h * mask[..., None]
        return {"logits": self.head(h), "hidden": h}


@pytest.mark.parametrize("samples", [1, 3])
def test_inputs_and_outputs_of_other_kinds(samples):
    ids, mask = torch.randint(10, (samples, 5)), torch.ones(samples, 5)
    alone = bf.analyze(Tokens(), ids)
    assert {r.name: r.operations for r in alone.rows} == {"embed": 0, "head": 60}
    assert alone.untraced == "the model must return one tensor of shape (batch, classes); it returned dict"
    for sample in ((ids, mask), {"ids": ids, "mask": mask}):
        result = bf.analyze(Tokens(), sample)
        assert {r.name: r.operations for r in result.rows} == {"embed": 0, "mul": 20, "head": 60}
        assert result.rows[0].output == (5, 4)
    assert result.total.parameters == 55


def test_what_is_not_counted_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Hardshrink())
    result = bf.analyze(model, torch.randn(2, 4))
    assert result.total.not_counted == ("_1 (Hardshrink)",)
    row = result.rows[1]
    assert row.operations is row.backward_operations is row.bitops is row.bops is row.ebops is None
    assert "operations not counted: _1 (Hardshrink)" in result.remarks()
    assert sheet(result).rows[1][6] == "-"


def test_the_model_is_not_changed_and_keeps_no_hooks():
    model = Branches().train()
    x = torch.randn(2, 6, requires_grad=True)
    tensors = (x, *model.parameters())
    values, marks = [t.detach().clone() for t in tensors], [dict(vars(t)) for t in tensors]
    bf.analyze(model, x)
    bf.analyze(Tokens(), torch.randint(10, (2, 5)))
    assert model.training
    assert all(map(torch.equal, tensors, values))
    assert [t.grad for t in tensors] == [None] * len(tensors)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [vars(t) for t in tensors] == marks, "only copies of tensors are marked"


def test_as_dictionary_csv_and_text():
    result = bf.analyze(toy(), torch.randn(2, 16), batch=8)
    document = json.loads(json.dumps(result.to_dict()))
    assert [m["operations"] for m in document["modules"]] == [512, 128, 640, 40]
    wanted = "operations backward_operations parameters parameter_bytes bitops bops ebops".split()
    assert set(wanted) <= set(document["total"])
    rows = list(csv.DictReader(io.StringIO(result.to_csv())))
    assert [int(r["operations"]) for r in rows] == [512, 128, 640, 40]
    assert (rows[2]["inputs"], rows[2]["output"], rows[1]["weight_bits"]) == ("16", "5", "")
    text = str(result).splitlines()
    assert text[0].split()[:3] == ["name", "type", "input"]
    assert text[5].split() == ["total", "117", "1,320", "1,960", "468", "677,120", "698,880", "616,280"]
    assert text[6] == "batch of 8; 42,240 operation bits (operations · input bits)"
    assert [len(r) for r in sheet(result).rows] == [len(sheet(result).columns)] * 5


def test_inputs_have_the_bits_of_the_operands_that_they_are():
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.rand(3, 3))

        def forward(self, x):
            y = torch.bmm(x, x.relu())  # one operand is the weight, though it flows in
            return nn.functional.linear(y + x, self.matrix * 2).flatten(1)

    config = {"by": "type", "bmm": {"config": EIGHT}, "linear": {"config": EIGHT}}
    rows = {r.name: r for r in bf.analyze(Products(), torch.rand(2, 3, 3), batch=1, config=config).rows}
    assert (rows["bmm"].inputs, rows["bmm"].input_bytes) == (((3, 3), (3, 3)), 9 + 5)
    assert (rows["linear"].inputs[0], rows["linear"].input_bytes) == ((3, 3), 9 + 5)
    assert rows["add"].input_bytes == 2 * 36


@pytest.mark.parametrize(
    ("sample", "settings", "error", "message"),
    [
        (torch.randn(2, 7), {}, CaptureError, r"fails on an input of shape \(2, 7\) \(batch first\): RuntimeError"),
        (torch.randn(0, 16), {}, CaptureError, r"needs a batch dimension of at least 1; it has shape \(0, 16\)"),
        ("text", {}, CaptureError, "the sample is a str; allowed: a tensor, or a tuple or mapping of tensors"),
        (torch.randn(2, 16), {"batch": 0}, ConfigError, "a batch of 0 samples is not possible; allowed: 1 or more"),
        (
            torch.randn(2, 16),
            {"config": {"by": "type", "linear": {"config": {**EIGHT, "weight_width": [4, 8]}}}},
            ConfigError,
            "a single configuration is needed, and this leaves a choice at",
        ),
    ],
    ids=["shape", "empty", "text", "batch", "choice"],
)
def test_mistakes_are_named(sample, settings, error, message):
    with pytest.raises(error, match=message):
        bf.analyze(toy(), sample, **settings)


def test_keys_that_name_nothing_are_listed():
    result = bf.analyze(toy(), torch.randn(2, 16), config={**CONFIG, "conv2d": {"config": EIGHT}})
    assert "keys that name nothing in this model: 'conv2d'" in str(result)
    assert describe(capture(toy(), torch.randn(2, 16))).unused == ()
