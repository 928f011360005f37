"""Formats reach every call that the user's code makes, and whatever the code changes in place is changed as it says."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitfront as bf
from bitfront.errors import CaptureError, ConfigError
from bitfront.formats.affine import Affine
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.operations import lookup
from bitfront.training import TrainSettings, train
from bitfront.transforms import quantize
from bitfront.transforms.observe import calibrate

COARSE = Integer(width=4, frac_width=1)


def rounded(x):
    return COARSE.round(x)


def inputs():
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


class Twice(nn.Module):
    """One layer at two paths; only the second is called."""

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.second(x))


class InList(Twice):
    """Layers in a list that torch does not know."""

    def __init__(self):
        super().__init__()
        self.steps = [self.first, self.head]

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


class Untraced(Twice):
    def forward(self, x):
        if float(x.sum()) > 1e9:
            return x
        return self.head(self.first(self.second(x)))


@pytest.mark.parametrize("kind", [Twice, InList, Untraced])
def test_a_layer_with_several_names_has_its_format_under_each(kind):
    model, x = kind().eval(), inputs()
    graph = capture(model, x)
    name = graph.sites[0].name
    assert len(graph.sites) == 2
    by_hand = copy.deepcopy(model)
    weight = by_hand.first.weight
    weight.data = rounded(weight.data)
    loose, baked = (quantize(graph, {name: {"weight": COARSE}}, bake=bake)(x) for bake in (False, True))
    assert torch.equal(loose, baked)
    # Sums with an input in float are taken in float64 here, and by torch in float32.
    torch.testing.assert_close(loose, by_hand(x), rtol=1e-6, atol=1e-6)


def test_layers_that_torch_only_reads_the_weights_of_are_called():
    class Encoding(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            if float(x.sum()) > 1e9:
                return x
            return self.head(self.encoder(x.unsqueeze(1)).mean(1))

    x = inputs()
    graph = capture(Encoding().eval(), x)
    formats = {
        "encoder_linear1": {"data_in": Integer(width=4, frac_width="auto"), "weight": Integer(width=2, frac_width=2)}
    }
    changed = quantize(graph, calibrate(graph, formats, x))
    with torch.no_grad():
        assert (changed(x) - graph.model(x)).abs().max() > 1e-3


class InPlace(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.a, self.act, self.b, self.change = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3), change

    def forward(self, x):
        h = self.a(x)
        self.change(self, h, x)
        return self.b(h)


CHANGES = {
    "relu": (lambda m, h, x: F.relu(h, inplace=True), lambda h, x: torch.relu(rounded(h))),
    "relu by place": (lambda m, h, x: F.relu(h, True), lambda h, x: torch.relu(rounded(h))),
    "relu_": (lambda m, h, x: torch.relu_(h), lambda h, x: torch.relu(rounded(h))),
    "a module": (lambda m, h, x: m.act(h), lambda h, x: torch.relu(rounded(h))),
    "add_": (lambda m, h, x: h.add_(x), lambda h, x: rounded(h) + rounded(x)),
    "a view": (lambda m, h, x: h.view(-1).sub_(x.reshape(-1)), lambda h, x: rounded(h) - rounded(x)),
    "a chain": (lambda m, h, x: h.mul_(x).relu_(), lambda h, x: torch.relu(rounded(rounded(h) * rounded(x)))),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_in_place_keeps_its_formats(name):
    change, expected = CHANGES[name]
    model, x = InPlace(change).eval(), inputs()
    graph = capture(model, x)
    sites = {s.name: dict.fromkeys(s.operands, COARSE) for s in graph.sites if s.op != "linear"}
    assert sites
    with torch.no_grad():
        torch.testing.assert_close(quantize(graph, sites)(x), model.b(expected(model.a(x), x)), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_activations_in_half_precision_are_rounded_to_the_format(dtype):
    x = torch.linspace(-1, 1, 101).to(dtype)
    form = Affine(12, False, "tensor", "minmax", 1).calibrated(x.float())
    # The zero point needs eleven bits, and bfloat16 has eight.
    assert form.zero_point[0] > 1024
    assert torch.equal(form.round(x), form.round(x.float()).to(dtype))
    assert (form.round(x).float() - x.float()).abs().max() < 1e-2


def test_a_state_dict_is_loaded_without_spectral_norm():
    x = inputs()
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 3))).eval()
    graph = capture(model, x)
    assert graph.baked == ("0.weight (spectral_norm)",)
    graph.model.load_state_dict(copy.deepcopy(graph.model.state_dict()))
    torch.testing.assert_close(graph.model(x), model(x))


def test_calibration_does_not_change_its_samples():
    class Halving(nn.Linear):
        def forward(self, x):
            return F.linear(x.mul_(0.5), self.weight, self.bias)

    x = inputs()
    graph = capture(nn.Sequential(Halving(4, 4), nn.Linear(4, 3)).eval(), x)
    before = x.clone()
    calibrate(graph, {site.name: {"data_in": Integer(width=4, frac_width="auto")} for site in graph.sites}, x)
    assert torch.equal(x, before)


def test_an_operand_without_dimensions_has_a_format():
    class Scaled(nn.Linear):
        def forward(self, x, scale=torch.tensor(2.3)):  # noqa: B008
            return scale * super().forward(x)

    model, x = nn.Sequential(Scaled(4, 3)).eval(), inputs()
    graph = capture(model, x)
    (site,) = [s for s in graph.sites if s.op == "mul"]
    form = Integer(width=3, frac_width="auto")
    formats = calibrate(graph, {site.name: {"data_in": form, "data_in_2": form}}, x)
    assert float(formats[site.name]["data_in"].round(torch.tensor(2.3))) == 2.0
    with torch.no_grad():
        assert not torch.equal(quantize(graph, formats)(x), model(x))


def test_a_layer_that_calibration_does_not_reach_is_named():
    class Rare(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.rare = nn.Linear(4, 3), nn.Linear(3, 3)

        def forward(self, x):
            h = self.a(x)
            return self.rare(h) if float(x.sum()) > 0 else h

    x = inputs().abs()
    graph = capture(Rare().eval(), x)
    with pytest.raises(CaptureError, match=r"rare .Linear. is not called for the 8 calibration samples"):
        calibrate(graph, {"rare": {"data_in": Integer(width=4, frac_width="auto")}}, -x)


def test_capture_leaves_counters_alone():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.calls = nn.Linear(4, 3), 0
            self.register_buffer("seen", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            self.calls += 1
            self.seen += len(x)
            return self.a(x)

    graph = capture(Counting().eval(), inputs(), training=True)
    assert (graph.model.calls, int(graph.model.seen)) == (0, 0)


def _sine(module, _inputs, out):
    return torch.sin(3 * out) if isinstance(module, nn.Linear) else None


@pytest.fixture
def hook_of_all_modules():
    handle = nn.modules.module.register_module_forward_hook(_sine)
    yield
    handle.remove()


def splits():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(90, 4, generator=generator), torch.arange(90) % 3
    return {s: (x[i : i + 30], y[i : i + 30]) for s, i in (("train", 0), ("val", 30), ("test", 60))}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("n_jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_hooks_of_all_modules_run(tmp_path, hook_of_all_modules, n_jobs):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    assert lookup.hooks(model[0]) == "it has a forward hook of all modules (_sine)"
    run = bf.search(
        model=model,
        data=splits(),
        space={"linear": {"name": "integer", "weight_width": [2, 3], "weight_frac_width": [1]}},
        metrics={"accuracy": "maximize", "loss": "minimize"},
        strategy="brute_force",
        n_jobs=n_jobs,
        project_dir=str(tmp_path),
        project="r",
    )
    x, y = splits()["val"]
    assert run.reference["loss"] == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-5)
    by_hand = copy.deepcopy(model)
    for layer in (by_hand[0], by_hand[2]):
        layer.weight.data = Integer(width=2, frac_width=1).round(layer.weight.data)
    assert run.trial(0).metrics["loss"] == pytest.approx(F.cross_entropy(by_hand(x), y).item(), rel=1e-5)


def test_a_model_without_gradients_is_not_trained():
    class Frozen(nn.Linear):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    with pytest.raises(ConfigError, match="its outputs have no gradients in training mode"):
        train(nn.Sequential(Frozen(4, 3)), bf.from_splits(splits()), TrainSettings(max_epochs=1, batch_size=8))
