"""The ONNX model computes what the simulated model computes, whatever the formats."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from exported import EVERY, case, formats_of
from torch import nn

from bitfront.errors import ExportError
from bitfront.exporters.onnx import INPUT, integer_sites, obstacle, onnx_model
from bitfront.exporters.packing import packing
from bitfront.exporters.written import write_onnx
from bitfront.formats import FORMATS
from bitfront.formats.affine import Affine
from bitfront.formats.base import ACTIVATION, WEIGHT
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.models.base import build_model
from bitfront.operations import OPERATIONS
from bitfront.transforms import calibrate, quantize

onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")


def run(model, x, optimized=True):
    options = ort.SessionOptions()
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {INPUT: x.numpy()})[0])


@pytest.mark.sampled(5)
@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), EVERY, ids=[n for n, _ in EVERY])
@pytest.mark.parametrize(("family", "width"), [("integer", 8), ("integer", 5), ("affine", 8), ("affine", 4)])
@pytest.mark.parametrize("form", ["qdq", "integer"])
def test_onnx_runtime_computes_what_the_simulated_model_computes(name, shape, family, width, form):
    graph, formats, x = case(name, shape, family, width)
    assert any(not obstacle(s, formats[s.name]) for s in graph.sites)
    expected = quantize(graph, formats)(x).detach()
    # Optimized, ONNX Runtime rounds the biases of a QDQ graph to multiples that it chooses.
    model = onnx_model(graph, formats, form)
    computed = run(model, x, optimized=form == "integer")
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-4)
    used = {name for node in model.graph.node for name in node.input}
    assert {i.name for i in model.graph.initializer} <= used, "ONNX Runtime warns of what nothing uses"


@pytest.mark.parametrize(
    ("width", "form", "kind"), [(8, "integer", "UINT8"), (7, "integer", "INT8"), (8, "qdq", "INT8")]
)
def test_bytes_that_may_saturate_are_unsigned(width, form, kind):
    """Where a processor adds two products of bytes in 16 bits, 8-bit weights with signs are too many."""
    graph, formats, x = case("digits-mlp", (64,), "affine", width)
    model = onnx_model(graph, formats, form)
    kinds = {i.name: onnx.TensorProto.DataType.Name(i.data_type) for i in model.graph.initializer}
    assert {kind for name, kind in kinds.items() if name.endswith(".weight")} == {kind}
    expected = quantize(graph, formats)(x).detach()
    torch.testing.assert_close(run(model, x, optimized=form == "integer"), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), EVERY, ids=[n for n, _ in EVERY])
def test_the_float_model_too(name, shape):
    graph, _, x = case(name, shape, "integer", 8)
    torch.testing.assert_close(run(onnx_model(graph, {}), x), graph.model(x).detach(), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["integer", "affine"])
def test_every_candidate_answers_alike_on_digits(family):
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.from_numpy(digits.data / 16).float().reshape(-1, 1, 8, 8)
    y = torch.from_numpy(digits.target)
    model = build_model("digits-cnn", (1, 8, 8), 10, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(25):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:1000]), y[:1000]).backward()
        optimizer.step()
    graph = capture(model, x[:2])
    for width in (8, 3):
        formats = calibrate(graph, formats_of(graph, family, width), x[:256])
        expected = quantize(graph, formats)(x).argmax(1)
        predicted = run(onnx_model(graph, formats), x).argmax(1)
        assert torch.equal(predicted, expected)
        assert (expected == y).double().mean() > (0.7 if width == 8 else 0.1)


class Odd(nn.Module):
    """Nothing that a rule of Bitfront writes: two results of one call, and a number of samples that is computed."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        largest, places = x.view(x.size(0), 2, 2).sort(1)
        return self.last(largest.reshape(-1, 4) + places.sum(1).repeat(1, 2))


def test_what_no_rule_writes_is_written_by_torch():
    torch.manual_seed(0)
    x = torch.randn(20, 4)
    graph = capture(Odd().eval(), x[:2])
    eight = {"last": {"data_in": Integer(8, 4), "weight": Integer(8, 6)}}
    model, deployed = onnx_model(graph, eight), quantize(graph, eight)
    for samples in (x, x[:1]):
        torch.testing.assert_close(run(model, samples), deployed(samples).detach(), rtol=0, atol=1e-5)
    (said,) = model.metadata_props
    assert said.value == "sort, sum, add"


class Decides(nn.Sequential):
    """Cannot be traced: what it does depends on the size of the input."""

    def forward(self, x):
        return super().forward(x if x.shape[1] > 1 else -x)


class Unknown(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvalsh(x.view(-1, 2, 2))


def test_a_model_that_cannot_be_traced_is_written_by_torch(tmp_path):
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    graph = capture(Decides(nn.Linear(4, 3)).eval(), x[:2])
    assert graph.untraced
    assert write_onnx(graph, {}, tmp_path / "net.onnx", x, answers="values").alike == 20
    with pytest.raises(ExportError, match=r"cannot be traced, .* or leave every layer in float"):
        onnx_model(graph, {graph.sites[0].name: {"weight": Integer(8, 4)}})


def test_an_operation_that_torch_cannot_write_either_is_named(monkeypatch):
    graph = capture(Unknown(), torch.randn(2, 4))
    with pytest.raises(ExportError, match=r"^linalg_eigvalsh \(.*has no counterpart in ONNX here; nor does torch.onnx"):
        onnx_model(graph, {})
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ExportError, match=r"torch.onnx needs onnxscript, .*bitfront\[onnx\]"):
        onnx_model(graph, {})


def test_a_wide_format_is_named():
    graph = capture(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    with pytest.raises(ExportError, match=r"^_0: weight is int16.8, and only whole numbers of at most 8 bits"):
        onnx_model(graph, {"_0": {"weight": Integer(16, 8)}})


@pytest.mark.parametrize("form", ["qdq", "integer"])
@pytest.mark.parametrize("operand", ["data_in", "weight"])
@pytest.mark.parametrize(
    ("family", "settings", "label"),
    [("minifloat_ieee", {"width": 8, "exponent_width": 4}, "e4m3"), ("float16", {}, "float16")],
)
def test_a_floating_point_format_is_named(form, operand, family, settings, label):
    graph = capture(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    with pytest.raises(ExportError, match=rf"^_0: {operand} is {label}, and .*whole numbers of at most 8 bits"):
        onnx_model(graph, {"_0": {operand: FORMATS.get(family).parse(settings, WEIGHT)}}, form)


@pytest.mark.parametrize("form", ["integer", "qdq"])
@pytest.mark.parametrize(
    ("name", "settings", "label"),
    [
        ("binary", {}, "binary"),
        ("ternary", {}, "ternary-sc"),
        ("binary_residual", {"levels": 2}, "residual2c"),
        ("nf4", {"group_size": 2}, "nf4-g2"),
        ("affine", {"width": 4, "group_size": 2}, "affine4sg2"),
    ],
)
def test_a_format_without_a_counterpart_is_named(name, settings, label, form):
    net = nn.Sequential(nn.Linear(4, 3))
    graph = capture(net, torch.randn(2, 4))
    weight = FORMATS.get(name).parse(settings, WEIGHT).calibrated(net[0].weight)
    with pytest.raises(ExportError, match=rf"^_0: weight is {label}, and "):
        onnx_model(graph, {"_0": {"weight": weight}}, form)


@pytest.mark.parametrize(
    ("formats", "why"),
    [
        ({}, ""),
        ({"bias": Integer(16, 4)}, ""),
        ({"data_in": Integer(8, 4), "weight": Integer(8, 4)}, ""),
        ({"data_in": Integer(9, 4), "weight": Integer(8, 4)}, "data_in is int9.4"),
        ({"weight": Integer(8, 4)}, "data_in stays in float"),
        ({"data_in": Integer(8, 4)}, "weight stays in float"),
    ],
)
def test_where_there_is_a_kernel_of_bytes(formats, why):
    (site,) = capture(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)).sites
    reason = obstacle(site, formats)
    assert reason.startswith(why)
    assert bool(reason) == bool(why)


def test_signed_activations_are_unsigned_bytes_of_the_same_values():
    x = torch.linspace(-9, 9, 99)
    for number_format in (
        Integer(8, 4),
        Integer(5, 2),
        Affine.parse({"width": 6, "symmetric": True}, ACTIVATION).calibrated(x),
    ):
        held = packing(number_format, activation=True)
        values = (torch.from_numpy(held.pack(x).astype("int64")) - int(held.zero)) * float(held.scale)
        assert held.pack(x).dtype == "uint8"
        assert torch.equal(values.float(), number_format.round(x))
        assert held.narrow == (number_format.bits < 8)


class Projected(nn.Module):
    """A parameter as the second factor of a product."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return x @ self.w


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_product_with_a_parameter(granularity, symmetric):
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    graph = capture(Projected(), x[:2])
    (site,) = graph.sites
    settings = {"width": 8, "granularity": granularity, "symmetric": symmetric}
    weight = Affine.parse(settings, site.operation.operand("weight").kind())
    formats = calibrate(graph, {site.name: {"data_in": Affine.parse({"width": 8}, ACTIVATION), "weight": weight}}, x)
    assert len(formats[site.name]["weight"].scale) == (3 if granularity == "channel" else 1)
    assert not obstacle(site, formats[site.name])
    computed = run(onnx_model(graph, formats), x)
    torch.testing.assert_close(computed, quantize(graph, formats)(x).detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["integer", "qdq"])
@pytest.mark.parametrize("bias", ["tensor", "channel", "element"])
def test_a_binary_point_per_channel(form, bias):
    x = torch.randn(32, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4))
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight[1] *= 8
    graph = capture(model, x[:2])
    forms = {
        "data_in": Integer(8, "auto"),
        "weight": Integer(5, "auto", granularity="channel"),
        "bias": Integer(6, "auto", granularity=bias),
    }
    formats = calibrate(graph, {s.name: forms for s in graph.sites if s.weight}, x)
    assert all(len(set(f["weight"].frac_width)) > 1 for f in formats.values())
    computed = run(onnx_model(graph, formats, form), x, optimized=form == "integer")
    torch.testing.assert_close(computed, quantize(graph, formats)(x).detach(), rtol=0, atol=1e-4)


def test_a_binary_point_per_element_is_refused_by_name():
    x = torch.randn(32, 4)
    graph = capture(nn.Sequential(nn.Linear(4, 3)), x[:2])
    wanted = {"_0": {"data_in": Integer(8, 4), "weight": Integer(4, "auto", granularity="element")}}
    with pytest.raises(ExportError, match=r"^_0: weight is int4\.[-0-9.]*-e"):
        onnx_model(graph, calibrate(graph, wanted, x))


def test_a_factor_with_scales_of_its_rows_has_no_operator():
    graph = capture(Projected(), torch.randn(2, 4))
    (site,) = graph.sites
    rows = Affine.parse({"width": 8}, WEIGHT).calibrated(torch.randn(4, 3))
    assert "columns of a matrix" in obstacle(site, {"data_in": Integer(8, 4), "weight": rows})


def test_asymmetric_weights():
    x = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(108, 4))
    graph = capture(model, x[:2])
    wanted = {
        "_0": {
            "data_in": Affine.parse({"width": 8}, ACTIVATION),
            "weight": Affine.parse({"width": 7, "symmetric": False, "granularity": "tensor"}, WEIGHT),
        },
        "_2": {"data_in": Integer(8, 4), "weight": Affine.parse({"width": 8, "symmetric": False}, WEIGHT)},
    }
    formats = calibrate(graph, wanted, x)
    assert not any(obstacle(s, formats[s.name]) for s in graph.sites)
    computed = run(onnx_model(graph, formats), x)
    torch.testing.assert_close(computed, quantize(graph, formats)(x).detach(), rtol=0, atol=1e-4)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("width", [2, 3, 8])
@pytest.mark.parametrize("family", ["integer", "affine"])
@pytest.mark.parametrize(
    ("name", "shape"), [("digits-cnn", (1, 8, 8)), ("residual", (2, 8, 8)), ("attention", (4, 6)), ("sequence", (2, 8))]
)
def test_the_default_form_answers_as_the_deployed_model(name, shape, family, width):
    graph, formats, _ = case(name, shape, family, width)
    x = torch.randn(300, *shape, generator=torch.Generator().manual_seed(5))
    expected = quantize(graph, formats)(x).detach()
    computed = run(onnx_model(graph, formats), x)  # with all optimizations of the runtime
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-5)
    assert torch.equal(computed.argmax(1), expected.argmax(1))


class Sums(nn.Module):
    """Sites that no integer operator takes: an addition, a layer with a float weight, one with a float input."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.c(torch.relu(self.a(x)) + self.b(x))


def test_what_no_integer_operator_takes_is_rounded_so_that_no_runtime_changes_it():
    # Multiples of 1/16: sums in float are exact then, in any order.
    x = (16 * torch.randn(300, 6, generator=torch.Generator().manual_seed(1))).round() / 16
    torch.manual_seed(0)
    network = Sums()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_((16 * parameter).round() / 16)
    graph = capture(network, x[:2])
    wanted = {
        "a": {"data_in": Integer(3, 1)},
        "b": {"weight": Integer(3, 2)},
        "add": dict.fromkeys(("data_in", "data_in_2"), Affine.parse({"width": 3}, ACTIVATION)),
        "c": {"data_in": Integer(3, 1), "weight": Integer(2, 1), "bias": Integer(8, 4)},
    }
    formats = calibrate(graph, wanted, x)
    assert integer_sites(graph, formats) == {"c"}
    expected = quantize(graph, formats)(x).detach()
    model = onnx_model(graph, formats)
    torch.testing.assert_close(run(model, x), expected, rtol=0, atol=1e-5)
    assert not {"QLinearAdd", "QLinearMatMul"} & {node.op_type for node in model.graph.node}


def affine(width, kind, **settings):
    return Affine.parse({"width": width, **settings}, kind)


def test_no_runtime_changes_a_product_or_a_pooling_behind_a_relu_in_bytes():
    """ONNX Runtime computes DequantizeLinear - MatMul otherwise, and cannot load some DequantizeLinear - MaxPool."""
    torch.manual_seed(0)
    x = torch.randn(300, 2, 6, 6)
    layers = nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(45, 16), nn.ReLU()
    network = nn.Sequential(*layers, nn.Linear(16, 4))
    graph = capture(network, x[:2])
    wanted = {
        "_0": {"data_in": Integer(8, 5), "weight": affine(4, WEIGHT)},
        "_1": {"data_in": affine(4, ACTIVATION, symmetric=True)},
        "_4": {"weight": affine(2, WEIGHT, symmetric=False)},
        "_5": {"data_in": Integer(3, 1, signed=False)},
        "_6": {"weight": affine(3, WEIGHT)},
    }
    formats = calibrate(graph, wanted, x)
    assert {"_1", "_5"} <= integer_sites(graph, formats)
    model = onnx_model(graph, formats)
    assert "DequantizeLinear" not in {node.op_type for node in model.graph.node}
    expected = quantize(graph, formats)(x).detach()
    torch.testing.assert_close(run(model, x), expected, rtol=0, atol=1e-5)


def test_what_onnx_runtime_cannot_load_is_not_written(tmp_path, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(20, 2, 6, 6)
    layers = nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 8, 3), nn.Flatten()
    graph = capture(nn.Sequential(*layers), x[:2])

    class Broken:
        def SerializeToString(self):
            return b"no model"

    monkeypatch.setattr("bitfront.exporters.written.onnx_model", lambda *_: Broken())
    with pytest.raises(ExportError, match="ONNX Runtime does not run the model"):
        write_onnx(graph, {}, tmp_path / "net.onnx", x)
    assert not list(tmp_path.iterdir())


def test_a_form_that_does_not_exist_is_refused():
    graph = capture(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    with pytest.raises(ExportError, match=r"no form 'exact' of an ONNX model; .*integer.*qdq"):
        onnx_model(graph, {}, "exact")


@pytest.mark.parametrize("form", ["integer", "qdq"])
def test_a_file_is_read_back_and_says_what_was_compared(form, tmp_path):
    graph, formats, _ = case("residual", (2, 8, 8), "integer", 3)
    x = torch.randn(300, 2, 8, 8, generator=torch.Generator().manual_seed(5))
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")
    written = write_onnx(graph, formats, path, x, form=form)
    # Once more by hand, from the file.
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    computed = torch.from_numpy(session.run(None, {INPUT: x.numpy()})[0])
    expected = quantize(graph, formats)(x).detach()
    assert written.alike == int((computed.argmax(1) == expected.argmax(1)).sum())
    assert written.difference == pytest.approx(float((computed - expected).abs().max()), abs=1e-6)
    assert f"{written.alike} of 300 answers alike" in written.message
    assert ("approximate" in written.message) == (form == "qdq")
    assert list(tmp_path.iterdir()) == [path]
    if form == "integer":
        assert written.alike == 300


class Turned(nn.Sequential):
    def forward(self, x):
        return -super().forward(x)


def test_a_file_of_another_model_than_the_deployed_one_is_seen(tmp_path):
    graph, formats, x = case("sequence", (2, 8), "integer", 8)
    other = Turned(quantize(graph, formats))
    with pytest.raises(ExportError, match=r"not written: ONNX Runtime answers otherwise .* for 64 of 64 samples"):
        write_onnx(graph, formats, tmp_path / "net.onnx", x, model=other)
    assert not list(tmp_path.iterdir())
    written = write_onnx(graph, formats, tmp_path / "net.onnx", x, model=other, may_differ=64)
    assert written.alike == 0
    assert "0 of 64 answers alike" in written.message
    with pytest.raises(ExportError, match="cannot be written"):
        write_onnx(graph, formats, tmp_path / "nowhere" / "net.onnx", x)
    with pytest.raises(ExportError, match="no samples"):
        write_onnx(graph, formats, tmp_path / "net.onnx", x[:0])


class Reused(nn.Module):
    """Changes a tensor in place, and reads it again or not."""

    def __init__(self, again):
        super().__init__()
        self.again = again

    def forward(self, x):
        y = x.sigmoid()
        z = y.add_(x)
        return z * (y if self.again else 2)


def test_a_tensor_that_is_changed_in_place():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    graph = capture(Reused(again=False), x)
    torch.testing.assert_close(run(onnx_model(graph, {}), x), graph.model(x.clone()))
    with pytest.raises(ExportError, match=r"^add_ \(add_\) changes a tensor in place that others read"):
        onnx_model(capture(Reused(again=True), x), {})


def test_functions_are_written_as_their_modules():
    class Functions(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.rows = nn.BatchNorm1d(6), nn.LayerNorm(6)

        def forward(self, x):
            norm = self.norm
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-3)
            return F.layer_norm(x, (6,), self.rows.weight * 2)

    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    graph = capture(Functions().eval(), x)
    torch.testing.assert_close(run(onnx_model(graph, {}), x), graph.model(x).detach(), rtol=0, atol=1e-5)


@pytest.fixture
def silent_relu():
    """A record whose rule forgets that operands have formats."""
    before = OPERATIONS.get("relu")
    OPERATIONS.replace("relu", replace(before, onnx=lambda w, n: w.add("Relu", [w.tensor(n)], n.name)))
    yield
    OPERATIONS.replace("relu", before)


@pytest.mark.usefixtures("silent_relu")
def test_a_format_that_no_rule_writes_is_named():
    graph = capture(nn.Sequential(nn.ReLU()), torch.randn(2, 4))
    with pytest.raises(ExportError, match=r"^_0 \(ReLU\): the format of data_in cannot be written as ONNX here"):
        onnx_model(graph, {"_0": {"data_in": Integer(8, 4)}})


class Doubled(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


def test_answers_may_be_values(tmp_path):
    # Twice the outputs have the same largest one, and are no answers of a regression.
    graph, formats, x = case("sequence", (2, 8), "integer", 8)
    path, other = tmp_path / "net.onnx", Doubled(quantize(graph, formats))
    assert write_onnx(graph, formats, path, x, model=other).alike == 64
    with pytest.raises(ExportError, match="answers otherwise than the deployed model"):
        write_onnx(graph, formats, path, x, model=other, answers="values")
    assert write_onnx(graph, formats, path, x, answers="values").alike == 64


def test_one_output_is_compared_by_its_value(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    graph = capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)).eval(), x)
    with pytest.raises(ExportError, match="answers otherwise than the deployed model for"):
        write_onnx(graph, {}, tmp_path / "net.onnx", x, model=Doubled(graph.model))
    assert write_onnx(graph, {}, tmp_path / "net.onnx", x).alike == 40


class Moving(nn.Module):
    """Parts, a shuffle, a padding with zeros, an order of dimensions: nothing that ONNX has in torch's words."""

    def __init__(self):
        super().__init__()
        self.first, self.shuffle, self.last = nn.Conv2d(2, 4, 1), nn.PixelShuffle(2), nn.Linear(100, 3)

    def forward(self, x):
        one, two = self.first(x).chunk(2, dim=1)
        joined = torch.cat([two, one[:, :, ::2, :].repeat(1, 1, 2, 1)], 1)
        padded = nn.functional.pad(self.shuffle(joined), (1, 1, 1, 1))
        return self.last(padded.moveaxis(2, 3)[:, 0].flatten(1))


def test_what_moves_values_is_written_as_a_choice_of_values(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(20, 2, 4, 4)
    graph = capture(Moving().eval(), x[:2])
    assert write_onnx(graph, {}, tmp_path / "net.onnx", x, answers="values").alike == 20
    graph = capture(Padded(), x[:2])
    assert write_onnx(graph, {}, tmp_path / "net.onnx", x, answers="values").alike == 20


class Padded(nn.Module):
    def forward(self, x):
        return nn.functional.pad(x, (1, 1), value=1.5)


class Tokens(nn.Module):
    """A token before those of the sample, as a classifier of images has it."""

    def __init__(self):
        super().__init__()
        self.token, self.last = nn.Parameter(torch.randn(1, 1, 6)), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.last(x).mean(1)


def test_a_token_is_repeated_for_each_sample(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(20, 4, 6)
    graph = capture(Tokens().eval(), x[:2])
    assert write_onnx(graph, {}, tmp_path / "net.onnx", x, answers="values").alike == 20
