"""Searches of models that do something beside the ``forward`` of their classes: every number of the table is that of
the network which is rebuilt, and of the user's own model with rounding written out here."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm

import bitfront as bf

#: Most of them search.
pytestmark = pytest.mark.slow

CHOICES = {
    "name": "integer",
    "data_in_width": [8],
    "data_in_frac_width": "auto",
    "weight_width": [2, 6],
    "weight_frac_width": "auto",
}
TRAINED = {"name": "brute_force", "sw_runner": {"basic_train": {"max_epochs": 2}, "basic_evaluation": {}}}


class Notes(bf.Events):
    def __init__(self):
        self.heard = []

    def note(self, message):
        self.heard.append(message)


def arrays(classes=4, features=4, rows=240):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, features, generator=generator)
    y = (x @ torch.randn(features, classes, generator=generator)).argmax(1)
    return {"train": (x[:120], y[:120]), "val": (x[120:180], y[120:180]), "test": (x[180:], y[180:])}


class Net(nn.Module):
    """As wide at the input as at the output and between, so that a tensor in a wrong place would fit."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.act, self.b = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.act(self.a(x)))


class Tempered(Net):
    def forward(self, x, temperature=0.2, mask=None):
        logits = super().forward(x) / temperature
        return logits if mask is None else logits * mask


class Gained(Net):
    def forward(self, x, *more, gain=torch.tensor(3.0), **named):  # noqa: B008
        return self.b(self.act(self.a(x)) * gain) + len(more) + len(named)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.attention = nn.Linear(2, 4), nn.MultiheadAttention(4, 1, batch_first=True)
        self.b = nn.Linear(4, 4)

    def forward(self, x, mask=None):
        h = self.a(x.reshape(-1, 2, 2))
        return self.b(self.attention(h, h, h, key_padding_mask=mask, need_weights=False)[0].mean(1))


def bend(_module, _inputs, out):
    return torch.sin(3 * out)


def shift(_module, inputs):
    return (inputs[0] * 2 - 1,)


def hooked(path, hook=bend):
    model = Net()
    module = model.get_submodule(path)
    (module.register_forward_hook if hook is bend else module.register_forward_pre_hook)(hook)
    return model


def pruned():
    model = Net()
    prune.l1_unstructured(model.a, "weight", 0.5)
    return model


class Squared(nn.Module):
    def forward(self, w):
        return w * w


def squared():
    model = Net()
    parametrize.register_parametrization(model.b, "weight", Squared())
    return model


def normed():
    model = Net()
    weight_norm(model.a)
    return model


def replaced():
    model = Net()
    model.a.forward = lambda x: torch.sin(F.linear(x, 2 * torch.eye(4)))
    return model


MODELS = {
    "temperature and mask": Tempered,
    "gain that is a tensor": Gained,
    "mask handed on": Attending,
    "hook of a layer": lambda: hooked("a"),
    "hook of an activation": lambda: hooked("act"),
    "pre-hook of a layer": lambda: hooked("b", shift),
    "hook of the model": lambda: hooked(""),
    "pre-hook of the model": lambda: hooked("", shift),
    "pruned": pruned,
    "parametrized": squared,
    "weight norm": normed,
    "forward of one module": replaced,
}


def fixed_point(form, x):
    low, high = (-(2 ** (form.width - 1)), 2 ** (form.width - 1) - 1) if form.signed else (0, 2**form.width - 1)
    return torch.clamp(torch.round(x * 2.0**form.frac_width), low, high) / 2.0**form.frac_width


def rounded_by_hand(model, formats):
    """`model` with formats at its module sites; of a computed weight its value is rounded."""
    if any(parametrize.is_parametrized(m) or prune.is_pruned(m) for m in model.modules()):
        changed = Net().eval()
        for layer in ("a", "b"):
            changed.get_submodule(layer).weight = nn.Parameter(model.get_submodule(layer).weight.detach())
            changed.get_submodule(layer).bias = nn.Parameter(model.get_submodule(layer).bias.detach())
    else:
        changed = copy.deepcopy(model).eval()
    for path, own in formats.items():
        module = changed.get_submodule(path)
        if "weight" in own:
            module.weight = nn.Parameter(fixed_point(own["weight"], module.weight.detach()))
        if "data_in" in own:
            # After the hooks that are there already: the layer's own arithmetic is what is rounded.
            module.register_forward_pre_hook(lambda _m, a, form=own["data_in"]: (fixed_point(form, a[0]), *a[1:]))
    return changed


def scored(model, x, y):
    with torch.no_grad():
        z = model(x)
    return F.cross_entropy(z.double(), y).item(), (z.argmax(1) == y).double().mean().item()


def searched(model, tmp_path, strategy="brute_force", types=("linear", "relu")):
    notes = Notes()
    run = bf.search(
        model=model,
        data=arrays(),
        space=dict.fromkeys(types, CHOICES),
        metrics={"accuracy": "maximize", "average_bitwidth": "minimize", "ebops": "minimize"},
        strategy=strategy,
        project_dir=str(tmp_path),
        project="run",
        events=notes,
    )
    return run, notes.heard


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", MODELS)
def test_the_table_has_the_numbers_of_the_users_model_rounded_by_hand(name, tmp_path):
    model = MODELS[name]().eval()
    x, y = arrays()["val"]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run, notes = searched(model, tmp_path)
    for trial in run.trials:
        made = bf.transform_trial(run.folder, trial.number, model=model, data=bf.from_splits(arrays()))
        loss, accuracy = scored(rounded_by_hand(model, made.formats), x, y)
        assert trial.metrics["loss"] == pytest.approx(loss, abs=2e-6)
        assert trial.metrics["accuracy"] == pytest.approx(accuracy)
        assert scored(made.model, x, y)[0] == pytest.approx(loss, abs=2e-6)
        # A layer that stays in float counts 32 bits per weight; so does an attention that no key names.
        widths = [own["weight"].width for own in made.formats.values() if "weight" in own]
        sizes = [model.get_submodule(path).weight.numel() for path, own in made.formats.items() if "weight" in own]
        attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
        left = sum(m.in_proj_weight.numel() + m.out_proj.weight.numel() for m in attentions)
        left += 16 if name == "forward of one module" else 0
        assert trial.metrics["average_bitwidth"] == pytest.approx(
            (sum(w * s for w, s in zip(widths, sizes, strict=True)) + 32 * left) / (sum(sizes) + left)
        )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    said = [n for n in notes if "stays in float" in n]
    assert bool(said) == (name == "forward of one module")
    computed = [n for n in notes if "computed from other parameters" in n]
    assert bool(computed) == (name in ("pruned", "parametrized", "weight norm"))


def test_training_with_computed_weights_is_said_to_be_another_training(tmp_path):
    _, notes = searched(normed(), tmp_path, TRAINED, ("linear",))
    assert any("trained with these as plain weights" in n for n in notes)


class Dropping(Net):
    rate = 0.0

    def forward(self, x):
        h = F.relu(self.a(x))
        return self.b(F.dropout(h, self.rate, self.training) + h)


@pytest.mark.parametrize("types", [("linear",), ("linear", "relu", "add")])
def test_dropout_in_forward_is_active_where_candidates_are_trained(types, tmp_path):
    losses = []
    for rate in (0.0, 0.5):
        model = Dropping().eval()
        model.rate = rate
        run, _ = searched(model, tmp_path / str(rate), TRAINED, types)
        losses.append([trial.metrics["loss"] for trial in run.trials])
        made = bf.transform_trial(run.folder, 0, model=model, data=bf.from_splits(arrays()))
        assert scored(made.model, *arrays()["val"])[0] == pytest.approx(losses[-1][0], abs=2e-6)
    assert all(a != b for a, b in zip(*losses, strict=True))


class SkippingAtRandom(Net):
    def forward(self, x):
        h = F.relu(self.a(x))
        if self.training and torch.rand(1).item() < 0.5:
            return self.b(h)
        return self.b(h + x)


def test_a_forward_that_is_another_one_in_training_is_trained_as_it_is(tmp_path):
    run, notes = searched(SkippingAtRandom().eval(), tmp_path, TRAINED, ("linear", "add"))
    assert any("functions in forward stay in float" in n and "draws random numbers" in n for n in notes)
    made = bf.transform_trial(run.folder, 0, model=SkippingAtRandom().eval(), data=bf.from_splits(arrays()))
    assert set(made.formats) == {"a", "b"}
    assert type(made.model) is SkippingAtRandom
    assert scored(made.model, *arrays()["val"])[0] == pytest.approx(run.trial(0).metrics["loss"], abs=2e-6)


class Penalised(Net):
    """The code reads a weight and a bias in float, beside the layer that has them in a format."""

    def __init__(self, traceable=True):
        super().__init__()
        self.traceable = traceable

    def forward(self, x):
        if not self.traceable and x.sum() > 1e9:
            x = -x
        h = F.linear(self.act(self.a(x)), self.a.weight.t())
        return self.b(h) - self.a.weight.pow(2).sum(0) + (5 * self.a.bias).sin()


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("traceable", [True, False])
def test_what_the_code_reads_beside_a_layer_stays_in_float(traceable, corrected, tmp_path):
    model, data = Penalised(traceable).eval(), arrays()
    form = {**CHOICES, "weight_width": [2], "bias_width": [2], "bias_frac_width": "auto"}
    run = bf.search(
        model=model,
        data=data,
        space={"by": "name", "a": form},
        metrics={"accuracy": "maximize", "loss": "minimize", "model_size": "minimize"},
        strategy="brute_force",
        project_dir=str(tmp_path),
        project="run",
        **({"search.calibration.bias_correction": True} if corrected else {}),
    )
    made = bf.transform_trial(run.folder, 0, model=model, data=bf.from_splits(data))
    formats = made.formats["a"]
    x, y = data["val"]
    with torch.no_grad():
        weight, bias = (fixed_point(formats[o], getattr(model.a, o)) for o in ("weight", "bias"))
        h = torch.relu(F.linear(fixed_point(formats["data_in"], x), weight, bias))
        by_hand = model.b(F.linear(h, model.a.weight.t())) - model.a.weight.pow(2).sum(0) + (5 * model.a.bias).sin()
        torch.testing.assert_close(made.model(x), by_hand, rtol=1e-5, atol=1e-5)
    trial = run.trial(0).metrics
    assert trial["loss"] == pytest.approx(F.cross_entropy(by_hand, y).item(), abs=2e-6)
    assert trial["model_size"] == 4 * 2 * (16 + 4)


class SequenceFirst(nn.Module):
    """Samples along the second dimension, where other models have channels."""

    def __init__(self, square):
        super().__init__()
        torch.manual_seed(0)
        self.square = square
        self.a, self.w, self.b = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 4)

    def forward(self, x):
        h = torch.relu(self.a(x[:, None].repeat(1, 3, 1).transpose(0, 1)))
        return self.b((self.w @ h[0].t()).t() if self.square else h.mean(0))


@pytest.mark.parametrize("square", [False, True])
def test_a_scale_per_channel_is_none_per_sample(square, tmp_path):
    model, data = SequenceFirst(square).eval(), arrays()
    form = {"name": "affine", "data_in_width": [5], "data_in_granularity": "channel"}
    weights = {"weight_width": [5], "weight_granularity": "channel"}
    losses = []
    for turned in (False, True):
        splits = {s: (x.flip(0), y.flip(0)) if turned else (x, y) for s, (x, y) in data.items()}
        run = bf.search(
            model=model,
            data=splits,
            space={"linear": form, "relu": form, **({"matmul": {**form, **weights}} if square else {})},
            metrics={"accuracy": "maximize", "loss": "minimize", "model_size": "minimize"},
            strategy="brute_force",
            project_dir=str(tmp_path),
            project=f"turned-{turned}",
        )
        made = bf.transform_trial(run.folder, 0, model=model, data=bf.from_splits(splits))
        loss, _ = scored(made.model, *splits["val"])
        losses.append(run.trial(0).metrics["loss"])
        assert losses[-1] == pytest.approx(loss, abs=2e-6)
    assert losses[0] == pytest.approx(losses[1], abs=2e-6)
    assert len(made.formats["a"]["data_in"].scale) == 1
    assert len(made.formats["b"]["data_in"].scale) == 6
    if square:
        assert len(made.formats["matmul"]["weight"].scale) == 1
