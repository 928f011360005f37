"""Capture: which sites a model has, what they cost, and that the user's model stays as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bitfront.errors import CaptureError
from bitfront.graph import capture
from bitfront.models.base import build_model


def sites(graph):
    return [(s.name, s.op, s.operands) for s in graph.sites]


WEIGHTED = ("data_in", "weight", "bias")


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.fc(x)


class Concatenating(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 2), nn.Linear(6, 3, bias=False), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(torch.cat([self.a(x), self.b(x)], dim=1))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = F.relu(self.stem(x))
        return self.left(h) * torch.relu(self.right(h))


class SharedLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(self.fc(x))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5))
        self.matrix = nn.Parameter(torch.randn(5, 4))

    def forward(self, x):
        h = F.linear(x, self.weight, bias=self.bias)
        h = torch.add(h.relu(), h)
        return torch.matmul(h, self.matrix) + 1


class FunctionalConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.k1, self.k2 = nn.Parameter(torch.randn(4, 1, 3)), nn.Parameter(torch.randn(2, 2, 3, 3))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x):
        h = F.conv1d(x, self.k1, self.bias, padding=1, groups=2)
        return F.conv2d(h.reshape(-1, 2, 2, 8), self.k2, padding=1).flatten(1)


@pytest.mark.parametrize(
    ("factory", "shape", "expected"),
    [
        (Residual, (6,), [("fc", "linear", WEIGHTED), ("add", "add", ("data_in", "data_in_2"))]),
        (
            Concatenating,
            (6,),
            [("a", "linear", WEIGHTED), ("b", "linear", ("data_in", "weight")), ("head", "linear", WEIGHTED)],
        ),
        (
            Branching,
            (6,),
            [
                ("stem", "linear", WEIGHTED),
                ("relu", "relu", ("data_in",)),
                ("left", "linear", WEIGHTED),
                ("right", "linear", WEIGHTED),
                ("relu_1", "relu", ("data_in",)),
                ("mul", "mul", ("data_in", "data_in_2")),
            ],
        ),
        (SharedLayer, (6,), [("fc", "linear", WEIGHTED), ("fc_1", "linear", WEIGHTED)]),
        (
            Functional,
            (6,),
            [
                ("linear", "linear", WEIGHTED),
                ("relu", "relu", ("data_in",)),
                ("add", "add", ("data_in", "data_in_2")),
                ("matmul", "matmul", ("data_in", "weight")),
            ],
        ),
        (FunctionalConv, (2, 8), [("conv1d", "conv1d", WEIGHTED), ("conv2d", "conv2d", ("data_in", "weight"))]),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_sites_and_their_operands(factory, shape, expected):
    graph = capture(factory(), torch.randn(2, *shape))
    assert graph.fx_graph is not None
    assert sites(graph) == expected


def test_functional_sites_know_the_parameters_behind_their_operands():
    graph = capture(Functional(), torch.randn(2, 6))
    linear, matmul = graph.site("linear"), graph.site("matmul")
    assert linear.parameter("weight") == ("weight", (5, 6))
    assert linear.parameter("bias") == ("bias", (5,))
    assert linear.parameter("data_in") is None
    assert matmul.parameter("weight") == ("matrix", (5, 4))
    # Adding a number to a tensor is no site, but counts.
    assert [n.operations for n in graph.nodes if n.op == "add"] == [5, 4]


@pytest.mark.parametrize("name", ["jsc-tiny", "jsc-toy", "jsc-three-linear-layers"])
def test_sites_of_the_jsc_models_have_the_names_users_of_mase_know(name):
    graph = capture(build_model(name, (16,), 5, seed=0), torch.randn(2, 16))
    assert graph.site("seq_blocks_2") is graph.site("seq_blocks.2")
    assert graph.site("seq_blocks_2").type == "Linear"
    assert [n.name for n in graph.nodes] == [f"seq_blocks_{i}" for i in range(len(graph.nodes))]
    # A batch norm is a site only where something names it.
    assert "seq_blocks_0" not in [site.name for site in graph.sites]
    assert graph.site("seq_blocks_0") in graph.nameable
    with pytest.raises(KeyError):
        graph.site("seq_blocks_99")


def test_operations_per_sample_of_jsc_tiny():
    graph = capture(build_model("jsc-tiny", (16,), 5, seed=0), torch.randn(2, 16))
    assert [n.operations for n in graph.nodes] == [64, 16, 80, 5]
    assert [n.macs for n in graph.nodes] == [0, 0, 80, 0]
    assert graph.sample_shape == (16,)
    assert graph.uncounted == ()


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Conv2d(4, 8, 3, padding=1), (4, 7, 9)),
        (nn.Conv2d(4, 8, (3, 2), stride=2, groups=2), (4, 7, 9)),
        (nn.Conv2d(4, 4, 3, groups=4, dilation=2), (4, 9, 9)),
        (nn.Conv1d(6, 4, 5, stride=3, groups=2), (6, 31)),
        (nn.Linear(6, 5), (3, 6)),
        (nn.Linear(6, 5, bias=False), (6,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [2, 5])
def test_macs_are_half_of_what_torch_counts(model, shape, batch):
    model = nn.Sequential(model, nn.Flatten())
    x = torch.randn(batch, *shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    graph = capture(model, x)
    assert sum(n.macs for n in graph.nodes) * 2 * batch == counter.get_total_flops()


@pytest.mark.parametrize("factory", [Functional, FunctionalConv, SharedLayer, Concatenating])
def test_macs_of_functional_and_shared_sites_are_half_of_what_torch_counts(factory):
    model, shape = factory(), (2, 8) if factory is FunctionalConv else (6,)
    x = torch.randn(3, *shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert sum(n.macs for n in capture(model, x).nodes) * 2 * 3 == counter.get_total_flops()


@pytest.mark.parametrize(
    ("module", "shape", "operations"),
    [
        (nn.BatchNorm2d(3), (3, 4, 5), 4 * 60),
        (nn.LayerNorm(6), (6,), 5 * 6),
        (nn.MaxPool2d(2), (3, 4, 6), 18 * 4),
        (nn.AvgPool1d(3), (2, 9), 6 * 3),
        (nn.AdaptiveAvgPool2d(1), (3, 4, 5), 60),
        (nn.Dropout(), (7,), 0),
        (nn.Sigmoid(), (7,), 7),
    ],
    ids=str,
)
def test_operations_of_modules_that_are_no_sites(module, shape, operations):
    graph = capture(nn.Sequential(module, nn.Flatten()), torch.randn(2, *shape))
    assert graph.nodes[0].operations == operations
    assert graph.sites == ()


def test_what_no_rule_counts_is_reported_not_taken_as_zero():
    graph = capture(nn.Sequential(nn.Linear(4, 4), nn.Hardshrink()), torch.randn(2, 4))
    assert [n.title for n in graph.uncounted] == ["_1 (Hardshrink)"]


def test_a_subclass_that_computes_something_else_is_not_its_base():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    graph = capture(nn.Sequential(Doubled(4, 4)), torch.randn(2, 4))
    # Traced through: the site is the function inside, not the module, which a twin would replace whole.
    assert [(n.op, n.path) for n in graph.nodes] == [("linear", ""), ("mul", "")]


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.extra, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.act(self.fc(x))
        if x.sum() > -1e9:  # the culprit
            h = self.fc(self.extra(h))
        return h


def test_a_model_that_cannot_be_traced_gives_its_modules_and_names_the_line():
    graph = capture(DataDependent(), torch.randn(2, 6))
    assert graph.fx_graph is None
    assert graph.untraced.startswith(__file__)
    assert graph.untraced.endswith("if x.sum() > -1e9:  # the culprit")
    # In the order of their first call; what is never called is no site; a module called twice counts twice.
    assert [(s.name, s.macs) for s in graph.sites] == [("fc", 72), ("act", 0), ("extra", 36)]


MODELS = [Residual, Concatenating, Branching, SharedLayer, Functional, DataDependent]


@pytest.mark.parametrize("factory", MODELS)
def test_the_users_model_is_not_changed(factory):
    model = nn.Sequential(factory(), nn.BatchNorm1d(4 if factory in (Concatenating, Branching, Functional) else 6))
    model.train()
    model[1].eval()
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    graph = capture(model, torch.randn(2, 6))
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags
    for module in [*model.modules(), *graph.model.modules()]:
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert getattr(model[0], "act", nn.ReLU(inplace=True)).inplace
    # What was captured is a copy: the user may go on training.
    kept = copy.deepcopy(graph.model.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert all(torch.equal(t, kept[k]) for k, t in graph.model.state_dict().items())
    assert not graph.model.training


def test_in_place_activations_are_captured_out_of_place_and_compute_the_same():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 3), nn.ReLU(inplace=True)).eval()
    x = torch.randn(4, 6)
    graph = capture(model, x)
    assert [s.op for s in graph.sites] == ["linear", "relu", "linear", "relu"]
    assert not any(getattr(m, "inplace", False) for m in graph.model.modules())
    assert torch.equal(graph.model(x), model(x))


class OverwritesItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.fc = nn.ReLU(inplace=True), nn.Linear(6, 6)

    def forward(self, x):
        h = self.fc(x)
        self.act(h)  # the result is dropped: only the overwriting matters
        return h * 1


def test_in_place_activations_that_the_model_relies_on_stay():
    model, x = OverwritesItsInput().eval(), torch.randn(8, 6)
    graph = capture(model, x)
    assert torch.equal(graph.model(x), model(x))
    assert float(model(x).detach().min()) == 0


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return x + y


class ReturnsTuple(nn.Module):
    def forward(self, x):
        return x, x


class Raises(nn.Module):
    def forward(self, x):
        raise ValueError("no such luck")


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("holds a socket")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(5, 3), r"the model fails on an input of shape \(2, 6\) \(batch first\): RuntimeError"),
        (TwoInputs(), r"forward of TwoInputs needs 2 inputs \(x, y\).*Give y a default, or give the data by the names"),
        (Raises(), r"ValueError: no such luck"),
        (ReturnsTuple(), r"must return one tensor of shape \(batch, classes\); it returned tuple"),
        (nn.Flatten(0), r"it returned shape \(12,\)"),
        (nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (1, 12))), r"it returned shape \(1, 12\)"),
        (Uncopyable(6, 2), r"the model cannot be copied \(RuntimeError: holds a socket\)"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_models_that_cannot_be_captured_say_why(model, message):
    with pytest.raises(CaptureError, match=message):
        capture(model, torch.randn(2, 6))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchScript is deprecated, and people have its models
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3)), r"0\.weight has no shape yet.*model\(x\[:2\]\)"),
        (lambda: nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(6, 3)), r"has no shape yet"),
        (lambda: torch.jit.script(nn.Linear(6, 3)), r"is a ScriptModule.*model\.load_state_dict\(scripted"),
        (lambda: torch.jit.trace(nn.Linear(6, 3), torch.zeros(2, 6)), r"is a ScriptModule"),
        (lambda: nn.Linear(6, 3, device="meta"), r"weight is on the meta device.*model\.to_empty"),
        (lambda: nn.Linear(6, 3).half(), r"its weights are float16, and samples are float32.*model\.float\(\)"),
        (lambda: nn.Linear(6, 3).bfloat16(), r"its weights are bfloat16"),
        (lambda: nn.Linear(6, 3).double(), r"its weights are float64"),
    ],
)  # fmt: skip
def test_models_that_people_have_are_refused_with_the_line_that_helps(make, message):
    with pytest.raises(CaptureError, match=message):
        capture(make(), torch.zeros(2, 6))
