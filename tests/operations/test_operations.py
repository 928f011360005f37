"""Every record of an operation passes the conformance suite, with an example of each of its modules and of the functions
that other tests do not reach."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitfront.errors import ExportError
from bitfront.graph import capture
from bitfront.kernels import training as steps
from bitfront.operations import OPERATIONS
from bitfront.operations.base import DATA_IN, Count, Merge, OperandSpec, extend
from bitfront.operations.lookup import of_class
from bitfront.operations.onnx import unary
from bitfront.population import why_alone
from bitfront.testing import check_operation

RECORDS = {name: OPERATIONS.get(name) for name in OPERATIONS.names()}
MODULES = [kind for record in RECORDS.values() for kind in record.modules]
#: The arguments of a module, and the shape of a sample that it takes; others have no arguments and take 6 values.
ARGUMENTS = {
    nn.Linear: ((6, 5), (6,)),
    nn.Conv1d: ((2, 3, 3), (2, 6)),
    nn.Conv2d: ((2, 3, 3), (2, 5, 5)),
    nn.Conv3d: ((2, 3, 2), (2, 3, 3, 3)),
    nn.ConvTranspose1d: ((2, 3, 2), (2, 4)),
    nn.ConvTranspose2d: ((2, 3, 2), (2, 3, 3)),
    nn.ConvTranspose3d: ((2, 3, 2), (2, 2, 2, 2)),
    nn.Threshold: ((0.1, -1.0), (6,)),
    nn.Softmax: ((-1,), (2, 4)),
    nn.LogSoftmax: ((1,), (2, 4)),
    nn.Softmin: ((1,), (6,)),
    nn.Softmax2d: ((), (2, 3, 3)),
    nn.BatchNorm1d: ((6,), (6,)),
    nn.BatchNorm2d: ((2,), (2, 3, 3)),
    nn.BatchNorm3d: ((2,), (2, 2, 2, 2)),
    nn.SyncBatchNorm: ((2,), (2, 3, 3)),
    nn.LayerNorm: ((4,), (2, 4)),
    nn.GroupNorm: ((2, 4), (4, 3)),
    nn.InstanceNorm1d: ((2,), (2, 4)),
    nn.InstanceNorm2d: ((2,), (2, 3, 3)),
    nn.InstanceNorm3d: ((2,), (2, 2, 2, 2)),
    nn.RMSNorm: ((4,), (2, 4)),
    nn.MaxPool1d: ((2,), (2, 6)),
    nn.MaxPool2d: ((2,), (2, 6, 6)),
    nn.MaxPool3d: ((2,), (2, 4, 4, 4)),
    nn.AvgPool1d: ((2,), (2, 6)),
    nn.AvgPool2d: ((2,), (2, 6, 6)),
    nn.AvgPool3d: ((2,), (2, 4, 4, 4)),
    nn.LPPool1d: ((2, 2), (2, 6)),
    nn.LPPool2d: ((2, 2), (2, 6, 6)),
    nn.LPPool3d: ((2, 2), (2, 4, 4, 4)),
    nn.AdaptiveAvgPool1d: ((2,), (2, 6)),
    nn.AdaptiveAvgPool2d: ((1,), (2, 6, 6)),
    nn.AdaptiveAvgPool3d: ((2,), (2, 4, 4, 4)),
    nn.AdaptiveMaxPool1d: ((2,), (2, 6)),
    nn.AdaptiveMaxPool2d: ((2,), (2, 6, 6)),
    nn.AdaptiveMaxPool3d: ((2,), (2, 4, 4, 4)),
    nn.Upsample: ((None, 2), (2, 3, 3)),
    nn.UpsamplingNearest2d: ((None, 2), (2, 3, 3)),
    nn.UpsamplingBilinear2d: ((None, 2), (2, 3, 3)),
    nn.Flatten: ((), (2, 3)),
    nn.Unflatten: ((1, (2, 3)), (6,)),
    nn.Dropout1d: ((), (2, 3)),
    nn.Dropout2d: ((), (2, 3, 3)),
    nn.Dropout3d: ((), (2, 2, 2, 2)),
    nn.PixelShuffle: ((2,), (4, 2, 2)),
    nn.PixelUnshuffle: ((2,), (2, 4, 4)),
    nn.ChannelShuffle: ((2,), (4, 2, 2)),
    nn.Unfold: ((2,), (2, 3, 3)),
    nn.ConstantPad1d: ((1, 0.5), (2, 3)),
    nn.ConstantPad2d: ((1, 0.5), (2, 3, 3)),
    nn.ConstantPad3d: ((1, 0.5), (2, 2, 2, 2)),
    **{
        getattr(nn, f"{kind}Pad{dims}d"): ((1,), (2, *[3] * dims))
        for kind in ("Zero", "Reflection", "Circular", "Replication")
        for dims in (1, 2, 3)
    },
    **{getattr(nn, f"{kind}{cell}"): ((4, 3), (4,) if cell else (5, 4)) for kind in ("LSTM", "GRU", "RNN") for cell in ("", "Cell")},
}  # fmt: skip


class Attending(nn.Module):
    """nn.MultiheadAttention takes three tensors."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)
        nn.init.normal_(self.inner.in_proj_bias), nn.init.normal_(self.inner.out_proj.bias)

    def forward(self, x):
        return self.inner(x, x, x)[0]


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Bilinear(4, 4, 3)

    def forward(self, x):
        return self.inner(x, x)


class Projected(nn.Module):
    """The second factor is a parameter."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 12).reshape(4, 3))

    def forward(self, x):
        return x @ self.w


class Functional(nn.Module):
    """A function of a weight and a bias that are parameters."""

    def __init__(self, function, shape, **settings):
        super().__init__()
        size = torch.Size(shape).numel()
        self.weight, self.bias = (
            nn.Parameter(torch.linspace(-1, 0.9, size).reshape(shape)),
            nn.Parameter(torch.arange(3) / 7),
        )
        self.function, self.settings = function, settings

    def forward(self, x):
        return self.function(x, self.weight, self.bias, **self.settings)


class LookedUp(nn.Module):
    """Samples are floats; a table takes whole numbers."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(torch.sigmoid(x).mul(9).long())


class Bags(nn.Module):
    """Bags of two indices, one after another in a flat tensor, with a weight each."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1.3, 40).reshape(10, 4))

    def forward(self, x):
        ids = torch.sigmoid(x).mul(9).long().flatten()
        weights = torch.tanh(x).flatten()
        return F.embedding_bag(
            ids, self.weight, torch.arange(0, ids.numel(), 2), mode="sum", per_sample_weights=weights
        )


class Added(nn.Module):
    """A product with a parameter, to which another is added."""

    def __init__(self, function, weight, bias):
        super().__init__()
        self.function = function
        self.weight, self.bias = (
            nn.Parameter(torch.linspace(-1, 1.2, torch.Size(shape).numel()).reshape(shape)) for shape in (weight, bias)
        )

    def forward(self, x):
        return self.function(self.bias, x, self.weight)


class WithState(nn.Module):
    """A cell whose state is not zero: products with it would change nothing."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state = x[:, :3]
        return self.cell(x, (state, state.cos()) if isinstance(self.cell, nn.LSTMCell) else state)


class Normed(nn.Module):
    """A function of a weight and a bias of 6 values each."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight, self.bias = (nn.Parameter(torch.linspace(-1, 1.3, 6)), nn.Parameter(torch.arange(6) / 7))

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


class Slope(nn.Module):
    """A function of one parameter."""

    def __init__(self, function):
        super().__init__()
        self.function, self.slope = function, nn.Parameter(torch.linspace(-1, 1.3, 6))

    def forward(self, x):
        return self.function(x, self.slope)


class Statistics(nn.Module):
    """A norm with running statistics, as a function."""

    def __init__(self, function, **settings):
        super().__init__()
        self.function, self.settings = function, settings
        self.weight, self.bias = (nn.Parameter(torch.linspace(-1, 1.3, 6)), nn.Parameter(torch.arange(6) / 7))
        self.register_buffer("mean", torch.linspace(-0.5, 0.5, 6))
        self.register_buffer("variance", torch.linspace(0.3, 2, 6))

    def forward(self, x):
        return self.function(x, self.mean, self.variance, self.weight, self.bias, **self.settings)


def example_of(kind):
    if kind is nn.MultiheadAttention:
        return Attending(), torch.randn(12, 5, 4)
    if kind is nn.Bilinear:
        return Bilinear(), torch.randn(12, 4)
    if kind in (nn.Embedding, nn.EmbeddingBag):
        return LookedUp(kind(20, 4)), torch.randn(12, 3)
    arguments, shape = ARGUMENTS.get(kind, ((), (6,)))
    more = {"batch_first": True} if kind in (nn.LSTM, nn.GRU, nn.RNN) else {}
    module = kind(*arguments, **more)
    for tensor in (getattr(module, "weight", None), getattr(module, "bias", None)):
        if isinstance(tensor, nn.Parameter) and tensor.dim() == 1:
            nn.init.uniform_(tensor, 0.3, 2)  # norms begin with ones and zeros, which every format holds
    module = WithState(module) if kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell) else module
    for tensor in (getattr(module, "running_mean", None), getattr(module, "running_var", None)):
        if tensor is not None:
            tensor.uniform_(0.3, 2)
    return module, torch.randn(12, *shape)


@pytest.mark.sampled(6)
@pytest.mark.slow
@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_modules(kind):
    torch.manual_seed(0)
    check_operation(of_class(kind).name, *example_of(kind))


#: Of the examples above; everything else is trained by itself.
TRAINED = {
    nn.Linear, nn.Conv2d, nn.ReLU, nn.BatchNorm1d, nn.BatchNorm2d, nn.Identity, nn.MaxPool2d, nn.AvgPool2d,
    nn.AdaptiveAvgPool2d, nn.Flatten,
}  # fmt: skip


@pytest.mark.skipif(not steps.available(), reason="no compiled training steps")
@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_who_is_trained_with_others(kind):
    example, x = example_of(kind)
    with torch.no_grad():
        out = example(x)
        out = (out[0] if isinstance(out, tuple) else out)[0]
    model = nn.Sequential(example, nn.Flatten(), nn.Linear(out.numel(), 3))
    assert (why_alone(model, tuple(x.shape[1:])) == "") == (kind in TRAINED and kind is not nn.Flatten)


#: Their functions have examples in another file.
ELSEWHERE = {"scaled_dot_product_attention", "multi_head_attention_forward", "shifted_window_attention"}
FUNCTIONS = {
    "getitem": [(lambda x: x[:, 1:], (4,)), (lambda x: x[..., :2], (3, 4))],
    "unbind": [(lambda x: x.unbind(1)[1], (3, 4))],
    "add": [(lambda x: x + x.tanh(), (4,)), (lambda x: torch.add(x, 2), (4,)), (lambda x: x.add(x.sigmoid()), (4,))],
    "sub": [(lambda x: x - x.tanh(), (4,)), (lambda x: 1 - x, (4,))],
    "mul": [(lambda x: x * x.tanh(), (4,)), (lambda x: x * 0.5, (4,))],
    "matmul": [(lambda x: x @ x.transpose(1, 2), (3, 4)), (lambda x: torch.matmul(x, x.transpose(1, 2)), (3, 4)), (Projected(), (4,))],
    "bmm": [(lambda x: torch.bmm(x, x.transpose(1, 2)), (3, 4))],
    "mm": [(Added(lambda _, x, w: torch.mm(x, w), (4, 3), (3,)), (4,)), (Added(lambda _, x, w: x.mm(w), (4, 3), (3,)), (4,))],
    "mv": [(Added(lambda _, x, w: torch.mv(x, w).unsqueeze(1), (4,), (3,)), (4,))],
    "addmm": [
        (Added(torch.addmm, (4, 3), (3,)), (4,)),
        (Added(lambda _, x, w: torch.addmm(x.tanh(), x, mat2=w), (4, 4), (3,)), (4,)),
        (Added(lambda b, x, w: b.addmm(x, w), (4, 3), (3,)), (4,)),
    ],
    "baddbmm": [(lambda x: torch.baddbmm(x, x.tanh(), x.transpose(1, 2)), (4, 4))],
    "einsum": [
        (lambda x: torch.einsum("bij,bkj->bik", x, x.tanh()), (3, 4)),
        (Added(lambda _, x, w: torch.einsum("b...i,io->b...o", x, w), (4, 3), (3,)), (2, 4)),
    ],
    "conv3d": [(Functional(F.conv3d, (3, 2, 2, 2, 2), padding=1), (2, 3, 3, 3))],
    "conv_transpose1d": [(Functional(F.conv_transpose1d, (2, 3, 2), stride=2), (2, 4))],
    "conv_transpose2d": [(Functional(F.conv_transpose2d, (2, 3, 2, 2), stride=2, output_padding=1), (2, 3, 3))],
    "conv_transpose3d": [(Functional(F.conv_transpose3d, (2, 3, 2, 2, 2), padding=1), (2, 3, 3, 3))],
    "embedding": [(Added(lambda _, x, w: F.embedding(torch.sigmoid(x).mul(9).long(), w), (10, 4), (3,)), (3,))],
    "embedding_bag": [(Bags(), (2,))],
    "bilinear": [(Added(lambda b, x, w: F.bilinear(x, x.tanh(), w, b), (3, 4, 4), (3,)), (4,))],
    "linear": [(Functional(F.linear, (3, 4)), (4,))],
    "conv1d": [(Functional(F.conv1d, (3, 2, 2), stride=2), (2, 6))],
    "conv2d": [(Functional(F.conv2d, (3, 2, 3, 3), padding="same"), (2, 4, 4))],
    "relu": [(F.relu, (4,)), (torch.relu, (4,)), (lambda x: x.relu(), (4,))],
    "div": [(lambda x: x / (x.sigmoid() + 1), (4,)), (lambda x: torch.div(x, other=x.tanh() + 2), (4,)), (lambda x: x / 2, (4,)), (lambda x: x.div(x.sigmoid() + 1), (4,))],
    "maximum": [(lambda x: torch.maximum(x, x.tanh()), (4,)), (lambda x: x.maximum(x.sigmoid()), (2, 3, 3))],
    "minimum": [(lambda x: torch.minimum(x, x.tanh()), (4,)), (lambda x: x.minimum(other=x.sigmoid()), (4,))],
    "relu6": [(F.relu6, (4,)), (lambda x: F.relu6(x, inplace=True), (4,))],
    "hardtanh": [(lambda x: F.hardtanh(x, -0.5, 0.75), (4,))],
    "leaky_relu": [(lambda x: F.leaky_relu(x, 0.2), (4,))],
    "prelu": [(Slope(F.prelu), (6,)), (Slope(torch.prelu), (6, 2)), (Slope(lambda x, slope: x.prelu(slope)), (6,))],
    "elu": [(lambda x: F.elu(x, alpha=0.7), (4,))],
    "celu": [(lambda x: torch.celu(x, 0.7), (4,))],
    "selu": [(torch.selu, (4,))],
    "mish": [(F.mish, (4,))],
    "hardswish": [(F.hardswish, (4,))],
    "hardsigmoid": [(F.hardsigmoid, (4,))],
    "softplus": [(lambda x: F.softplus(x, beta=2), (4,))],
    "glu": [(lambda x: F.glu(x, 1), (4,))],
    "batch_norm": [(Statistics(F.batch_norm), (6,)), (Statistics(F.batch_norm), (6, 3))],
    "instance_norm": [(Statistics(F.instance_norm, use_input_stats=False), (6, 3))],
    "layer_norm": [(Normed(lambda x, weight, bias: F.layer_norm(x, (6,), weight=weight, bias=bias)), (2, 6)), (lambda x: F.layer_norm(x, (6,)), (2, 6))],
    "group_norm": [(Normed(lambda x, weight, bias: F.group_norm(x, 3, weight, bias)), (6, 3))],
    "rms_norm": [(Normed(lambda x, weight, bias: F.rms_norm(x, (6,), weight)), (2, 6))],
    "sigmoid": [(torch.sigmoid, (4,)), (lambda x: x.sigmoid(), (4,))],
    "tanh": [(torch.tanh, (4,)), (lambda x: x.tanh(), (4,))],
    "gelu": [(lambda x: F.gelu(x, approximate="tanh"), (4,))],
    "silu": [(F.silu, (4,))],
    "softmax": [(lambda x: torch.softmax(x, -1), (3, 4)), (lambda x: x.softmax(dim=1), (3, 4))],
    "log_softmax": [(lambda x: F.log_softmax(x, 1), (3, 4))],
    "max_pool1d": [(lambda x: F.max_pool1d(x, 2), (2, 6))],
    "max_pool2d": [(lambda x: F.max_pool2d(x, 3, stride=1, padding=1), (2, 6, 6))],
    "avg_pool": [(lambda x: F.avg_pool2d(x, 2, padding=1), (2, 6, 6)), (lambda x: F.avg_pool1d(x, 3), (2, 6))],
    "adaptive_avg_pool": [(lambda x: F.adaptive_avg_pool2d(x, (3, 1)), (2, 6, 6))],
    "mean": [(lambda x: x.mean((2, 3)), (2, 6, 6)), (lambda x: torch.mean(x, 1, keepdim=True), (2, 6))],
    "dropout": [(lambda x: F.dropout(x, 0.5, False), (4,)), (lambda x: F.dropout2d(x, training=False), (2, 3, 3))],
    "flatten": [(lambda x: torch.flatten(x, 2), (2, 3, 4)), (lambda x: x.flatten(1), (2, 3))],
    "view": [(lambda x: x.view(-1, 6), (2, 3)), (lambda x: torch.reshape(x, (x.size(0), 3, 2)), (2, 3))],
    "squeeze": [(lambda x: x.squeeze(1), (1, 4))],
    "unsqueeze": [(lambda x: torch.unsqueeze(x, 1), (4,))],
    "clone": [(lambda x: x.clone(), (4,)), (lambda x: torch.detach(x), (4,))],
    "contiguous": [(lambda x: x.transpose(1, 2).contiguous(), (2, 3))],
    "permute": [(lambda x: x.permute(0, 3, 1, 2), (2, 3, 4)), (lambda x: torch.permute(x, (0, 2, 1)), (2, 3))],
    "transpose": [(lambda x: x.transpose(2, 1), (2, 3)), (lambda x: torch.transpose(x, 1, -1), (2, 3, 4))],
    "concatenation": [(lambda x: torch.cat([x, x.tanh(), x], dim=-1), (2, 3)), (lambda x: torch.concat((x, x.tanh()), 1), (3,))],
}  # fmt: skip


@pytest.mark.sampled(6)
@pytest.mark.slow
@pytest.mark.parametrize(("name", "at"), [(name, at) for name, cases in FUNCTIONS.items() for at in range(len(cases))])
def test_functions(name, at):
    example, shape = FUNCTIONS[name][at]
    torch.manual_seed(0)
    check_operation(name, example, torch.randn(12, *shape))


@pytest.mark.parametrize("name", RECORDS)
def test_records(name):
    record = check_operation(name)
    if not record.modules and (record.operands or record.merge or record.train or record.onnx):
        assert name in FUNCTIONS or name in ELSEWHERE or name == "transposed_linear"


class TransposedLinear(nn.Module):
    """As transformers has it."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.linspace(-1, 1.2, nx * nf).reshape(nx, nf))
        self.bias = nn.Parameter(torch.linspace(-0.9, 0.4, nf))

    def forward(self, x):
        size_out = (*x.size()[:-1], self.nf)
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return x.view(size_out)


@pytest.fixture
def conv1d(monkeypatch):
    """A class that is called like the one of transformers, which need not be installed."""
    named = type("Conv1D", (TransposedLinear,), {"__module__": "transformers.pytorch_utils", "__qualname__": "Conv1D"})
    # The class itself has the forward that the record knows, and pickle finds it under its name.
    named.forward = TransposedLinear.forward
    here = types.ModuleType("transformers.pytorch_utils")
    here.Conv1D = named
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", here)
    return named


def test_the_layer_of_transformers_is_known_by_its_name(conv1d):
    for shape in ((4,), (2, 4)):
        check_operation("transposed_linear", conv1d(3, 4), torch.randn(12, *shape))
    assert of_class(TransposedLinear) is None
    assert of_class(type("Other", (conv1d,), {})).name == "transposed_linear"
    assert of_class(type("Other", (conv1d,), {"forward": lambda self, x: x})) is None


def test_the_layer_of_transformers_itself():
    kind = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    layer = kind(3, 4)
    nn.init.normal_(layer.bias)
    check_operation("transposed_linear", layer, torch.randn(12, 2, 4))


@pytest.fixture
def changed():
    """Gives a record other answers for the time of a test."""
    before = {}

    def change(name, **answers):
        before.setdefault(name, OPERATIONS.get(name))
        extend(name, **answers)

    yield change
    for name, record in before.items():
        OPERATIONS.replace(name, record)


def silu(module, operands):
    return F.silu(operands["data_in"])


def test_an_activation_that_can_be_quantized(changed):
    changed("silu", operands=(DATA_IN,), call=silu, by_default=True)
    for example in (nn.SiLU(), F.silu):
        check_operation("silu", example, torch.randn(12, 6))


class Swish(nn.Module):
    """A layer that is nobody's but ours, with an operand that only it has."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.linspace(-1, 1.3, 6))

    def forward(self, x):
        return x * torch.sigmoid(self.slope * x)


def swish(module, operands):
    return operands["data_in"] * torch.sigmoid(operands["slope"] * operands["data_in"])


def test_a_layer_of_a_user(changed):
    slope = OperandSpec("slope", "weight", 1, "slope", channel_axis=0)
    changed("silu", modules=(Swish,), operands=(DATA_IN, slope), call=swish, onnx=None, by_default=True)
    model = nn.Sequential(nn.Linear(6, 6), Swish(), nn.Linear(6, 3))
    _, site, _ = capture(model, torch.randn(2, 6)).sites
    assert (site.type, site.operands, site.parameter("slope")) == ("Swish", ("data_in", "slope"), ("1.slope", (6,)))
    check_operation("silu", Swish(), torch.randn(12, 6))


WEIGHT = OperandSpec("weight", "weight", 1, "weight")


@pytest.mark.parametrize(
    ("kind", "answers", "message"),
    [
        (nn.SiLU, {"call": None}, "modules of silu have operands, but the record has no call"),
        (nn.SiLU, {"operands": (DATA_IN, DATA_IN)}, "two operands of silu have one name"),
        (nn.SiLU, {"names": ("silu", "tanhshrink")}, "is in two operations"),
        (nn.SiLU, {"operands": (DATA_IN,), "call": lambda m, o: o["data_in"].sigmoid()}, "the call of silu computes"),
        (nn.PReLU, {"operands": (DATA_IN, WEIGHT), "call": lambda m, o: F.prelu(o["data_in"], m.weight)}, "a format of weight changes nothing"),
        (nn.SiLU, {"count": lambda c: Count(-c.n)}, "silu counts -"),
        (nn.SiLU, {"count": lambda c: Count(c.n / 2)}, "which is no whole number"),
        (nn.SiLU, {"count": lambda c: Count(1, 2)}, "more products than operations"),
        (nn.SiLU, {"count": lambda c: Count(72)}, "for twice as many"),
        (nn.SiLU, {"count": lambda c: None}, "silu does not count the example"),
        (nn.SiLU, {"onnx": unary("Tanh")}, "in float, the ONNX model differs"),
        (nn.SiLU, {"merge": Merge("identity")}, "among others and"),
        (nn.SiLU, {"train": lambda r, n, m: r.value(r.sources(n, 1)[0])}, "a population trains"),
        (nn.Linear, {"onnx_integer": lambda packed: "no"}, "integer operators do not take 8 bits"),
        (nn.Linear, {"onnx": None}, "and no rule for ONNX"),
        (nn.ReLU, {"onnx": lambda w, n: w.add("Relu", [w.tensor(n)], n.name)}, "the format of data_in cannot be written"),
    ],
)  # fmt: skip
def test_broken_promises_are_named(kind, answers, message, changed):
    torch.manual_seed(0)
    name = of_class(kind).name
    changed(name, **answers)
    with pytest.raises((AssertionError, ValueError, ExportError), match=message):
        check_operation(name, kind(*ARGUMENTS.get(kind, ((),))[0]), torch.randn(12, 6))
