"""The form qdq: ONNX Runtime fuses every convolution, and computes what was evaluated."""

import collections

import numpy as np
import pytest
import torch
from torch import nn

import bitfront as bf
from bitfront.api import dataset_of
from bitfront.engine.rebuild import transform_trial
from bitfront.exporters.onnx import INPUT, OUTPUT, onnx_model
from bitfront.exporters.packing import packing
from bitfront.exporters.sessions import session_options
from bitfront.formats.affine import Affine
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.transforms import calibrate, quantize
from bitfront.transforms.correct import bias_in_steps, step_of_sums
from bitfront.transforms.fold import folded

onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 3, 10, 10)).astype(np.float32)
Y = np.arange(120) % 3


class Net(nn.Module):
    """Residual sums with and without a convolution, both kinds of ReLU, a depthwise convolution, both poolings."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.relu, self.pool = (
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.a, self.bn_a = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.wide, self.bn_w, self.six = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()
        self.deep, self.bn_d = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.narrow, self.bn_n = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.mean, self.shortcut, self.fc = nn.AdaptiveAvgPool2d(1), nn.Identity(), nn.Linear(8, 3)

    def forward(self, x):
        x = self.pool(self.relu(self.bn(self.stem(x))))
        x = torch.relu(self.bn_a(self.a(x)) + self.shortcut(x))
        y = self.six(self.bn_d(self.deep(self.six(self.bn_w(self.wide(x))))))
        return self.fc(self.mean(self.bn_n(self.narrow(y)) + x).flatten(1))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = Net().train()
    for _ in range(40):
        model(torch.tensor(X))
    return model.eval()


def case(net, family, width):
    """(graph without batch norms, biases in steps of the sums; calibrated formats of everything that a runtime rounds)."""
    x = torch.tensor(X)
    graph = folded(capture(net, x[:2])).graph
    graph = graph.naming({"mean"})
    formats = {}
    for site in graph.sites:
        of_site = {}
        for operand in (o for o in site.operands if o != "bias" and site.op != "relu"):
            kind = site.operation.operand(operand).kind()
            if family == "integer":
                of_site[operand] = Integer.parse({"width": width, "frac_width": "auto"}, kind)
            else:
                settings = {"width": width} | ({"symmetric": True} if family == "symmetric" else {})
                of_site[operand] = Affine.parse(settings, kind)
        if of_site:
            formats[site.name] = of_site
    formats = calibrate(graph, formats, x)
    with torch.no_grad():
        for site in (site for site in graph.sites if site.bias):
            bias = graph.model.get_submodule(site.path).bias
            bias.copy_(bias_in_steps(bias, step_of_sums(site, formats[site.name]))[0])
    return graph, formats


def computed(model, x, folder, optimized=True):
    """(what ONNX Runtime gives, how many nodes of each type it runs)."""
    options = session_options(ort, "qdq")
    options.intra_op_num_threads = 1
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(folder / "run.onnx")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result = session.run(None, {INPUT: np.asarray(x)})[0]
    return result, collections.Counter(node.op_type for node in onnx.load(folder / "run.onnx").graph.node)


@pytest.mark.parametrize(
    ("family", "width"),
    [("affine", 8), ("symmetric", 8), ("integer", 8), ("affine", 4), ("symmetric", 4), ("integer", 4)],
)
def test_every_convolution_and_sum_is_fused(net, family, width, tmp_path):
    graph, formats = case(net, family, width)
    model = onnx_model(graph, formats, "qdq")
    kinds = collections.Counter(node.op_type for node in model.graph.node)
    assert "Identity" not in kinds
    found, run = computed(model, X, tmp_path)
    assert run["QLinearConv"] == 5
    assert run["QLinearAdd"] == 2
    assert run["QGemm"] == 1
    assert not {"Conv", "FusedConv", "Add", "Relu", "BatchNormalization"} & set(run)
    # What both write is the same network: a code may fall the other way where a sum lies between two.
    expected = quantize(graph, formats)(torch.tensor(X)).detach().numpy()
    exactly, _ = computed(model, X, tmp_path, optimized=False)
    step = max(float(np.asarray(formats["fc"]["data_in"].grid.step)), 1e-3)
    assert np.mean(np.abs(exactly - expected) > 1e-4) < 0.02
    assert np.mean(np.abs(found - expected) > step) < 0.02
    assert np.mean(found.argmax(1) != expected.argmax(1)) < 0.05


def test_a_tensor_that_two_read_is_rounded_once(net):
    graph, formats = case(net, "affine", 8)
    model = onnx_model(graph, formats, "qdq")
    read = collections.Counter(node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear")
    assert max(read.values()) == 1


def test_weights_of_four_bits_are_packed(net):
    graph, formats = case(net, "affine", 4)
    model = onnx_model(graph, formats, "qdq")
    kinds = {i.name: i.data_type for i in model.graph.initializer}
    weights = [name for name in kinds if name.endswith(".weight")]
    assert len(weights) == 6
    assert {kinds[name] for name in weights} == {onnx.TensorProto.INT4}
    (stored,) = (i for i in model.graph.initializer if i.name == "a.weight")
    assert len(stored.raw_data) == graph.model.a.weight.numel() / 2
    form = packing(formats["a"]["weight"], activation=False)
    values = onnx.numpy_helper.to_array(stored).astype(np.int8)
    assert np.array_equal(values, form.pack(graph.model.a.weight))


def quantized_six(bound):
    """A ReLU6 in front of a convolution whose input has the codes 0 to 255 for 0 to `bound`."""
    graph = capture(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 2, 1), nn.Flatten()).eval(), torch.tensor(X[:2])
    )
    data = Affine.parse({"width": 8}, graph.site("_2").operation.operand("data_in").kind())
    data = data.calibrated(torch.linspace(0, bound, 50))
    weight = Affine.parse({"width": 8}, graph.site("_2").operation.operand("weight").kind())
    return graph, {"_2": {"data_in": data, "weight": weight.calibrated(graph.model[2].weight)}}


@pytest.mark.parametrize("bound", [3.0, 6.0, 9.0])
def test_the_bound_of_a_relu6_is_one_of_codes(bound, tmp_path):
    graph, formats = quantized_six(bound)
    model = onnx_model(graph, formats, "qdq")
    floats = {value.name for value in model.graph.initializer if value.data_type == onnx.TensorProto.FLOAT}
    clips = [node for node in model.graph.node if node.op_type == "Clip"]
    assert not any(floats & set(clip.input) for clip in clips)
    assert len(clips) == (bound > 6)
    x = 20 * X
    expected = quantize(graph, formats)(torch.tensor(x)).detach().numpy()
    assert np.allclose(computed(model, x, tmp_path, optimized=False)[0], expected, atol=1e-5)


@pytest.mark.parametrize("form", ["integer", "qdq"])
def test_the_output_is_that_of_the_last_node(form, tmp_path):
    model = onnx_model(capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(2, 4)), {}, form)
    assert model.graph.node[-1].op_type == "Relu"
    assert list(model.graph.node[-1].output) == [OUTPUT]
    same = onnx_model(capture(nn.Sequential(nn.Identity()), torch.randn(2, 4)), {}, form)
    x = np.ones((3, 4), np.float32)
    assert np.array_equal(computed(same, x, tmp_path)[0], x)


@pytest.fixture(scope="module")
def run(net, tmp_path_factory):
    """A folded search with biases in steps of the sums, one input format."""
    forms = {"name": ["affine"], "data_in_width": [8], "weight_width": [3, 8]}
    space = {"by": "type", "conv2d": forms, "linear": forms, "add": {"name": ["affine"], "data_in_width": [8]}}
    space["adaptive_avg_pool"] = {"name": ["affine"], "data_in_width": [8]}
    return bf.search(
        model=net,
        data=DATA,
        space=space,
        strategy="brute_force",
        metrics=["loss", "average_bitwidth"],
        n_trials=6,
        fold_batch_norm=True,
        accelerator="cpu",
        project="run",
        project_dir=str(tmp_path_factory.mktemp("fused")),
        **{"search.calibration.integer_bias": True},
    )


DATA = dataset_of({name: (X[i : i + 40], Y[i : i + 40]) for i, name in ((0, "train"), (40, "val"), (80, "test"))})


def test_the_file_has_the_biases_that_were_evaluated(run, net, tmp_path):
    rebuilt = transform_trial(run.folder, 2, data=DATA, model=net, check=True)
    assert rebuilt.evaluation.loss == run.trial(2).metrics["loss"]
    model = onnx_model(rebuilt.graph, rebuilt.formats, "qdq")
    biases = [i for i in model.graph.initializer if i.name.endswith(".bias")]
    assert {i.data_type for i in biases} == {onnx.TensorProto.INT32}
    assert len(biases) == 6
    found, counts = computed(model, X[40:80], tmp_path)
    assert (counts["QLinearConv"], counts["QLinearAdd"], counts["QGemm"]) == (5, 2, 1)
    with torch.no_grad():
        expected = rebuilt.model(torch.tensor(X[40:80])).numpy()
    assert np.mean(found.argmax(1) != expected.argmax(1)) <= 0.05
    assert np.median(np.abs(found - expected)) < 1e-5
