"""Members of a population: trained as if alone, whatever the other members are; some models are trained alone."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bitfront.errors import ConfigError, DataError
from bitfront.formats.affine import Affine
from bitfront.formats.base import WEIGHT
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.kernels import training as steps
from bitfront.models.base import build_model
from bitfront.population import train_population, why_alone
from bitfront.population.batched import GpuTrainer, structure
from bitfront.population.programs import program
from bitfront.scoring import evaluate
from bitfront.training import TrainSettings, learning_rate, train
from bitfront.transforms import quantize

compiled = pytest.mark.skipif(not steps.available(), reason="no compiled training steps")


def clusters(shape, classes, samples=700, val=300, seed=0):
    """Clusters, in as many classes: what training needs of a Dataset."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (samples + val,), generator=generator)
    x = torch.randn(classes, *shape, generator=generator)[y] + torch.randn(len(y), *shape, generator=generator)
    splits = {"train": (x[:samples], y[:samples]), "val": (x[samples:], y[samples:])}
    return SimpleNamespace(name="clusters", mapped=False, split=splits.__getitem__, num_classes=classes)


JETS = clusters((16,), 5)
IMAGES = clusters((1, 8, 8), 10, samples=300)
#: 700 samples: five batches and a rest of 60, which fills no whole vectors.
SETTINGS = TrainSettings(max_epochs=2, batch_size=128, learning_rate=3e-3, seed=5)


def mlp(*widths, seed=0, norm=False):
    layers = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        layers += [nn.ReLU()] * (i > 0) + [nn.Linear(a, b)] + [nn.BatchNorm1d(b)] * norm
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in layers:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
    return nn.Sequential(*layers)


def quantized(model, *widths, shape=(16,), **ways):
    """Formats of these widths, taken in turn by the operands of the sites."""
    graph = capture(model, torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))
    formats, turn = {}, 0
    for site in graph.sites:
        if site.op not in ("linear", "conv2d", "relu"):
            continue
        operands = ["data_in", *(o for o in ("weight", "bias") if site.parameter(o) is not None)]
        formats[site.name] = {}
        for operand in operands:
            width = widths[turn % len(widths)]
            signed = site.op != "relu"
            # Some of everything is cut off: inputs beyond ±2, weights and biases beyond ±1/8.
            frac = width - 2 if operand == "data_in" else width + 2
            formats[site.name][operand] = Integer(width, frac, signed, **ways)
            turn += 1
    return quantize(graph, formats)


class Residual(nn.Module):
    """Batch norms of images, an addition of a value that has another reader, both averages and functional ReLUs."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6, momentum=0.3)
        self.conv2 = nn.Conv2d(6, 6, (3, 1), padding=(1, 0))
        self.bn2 = nn.BatchNorm2d(6, affine=False)
        self.down = nn.AvgPool2d(2)
        self.last = nn.Conv2d(6, 5, 3, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(5, 10)

    def forward(self, x):
        first = torch.relu(self.bn1(self.conv1(x)))
        both = torch.relu(first + self.bn2(self.conv2(first)))
        return self.fc(torch.flatten(self.pool(self.last(self.down(both))), 1))


class Branches(nn.Module):
    """Values that two others read, one of them through a batch norm or a rounding."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(16, 12, bias=False)
        self.norm = nn.BatchNorm1d(12)
        self.relu = nn.ReLU()
        self.fc2, self.fc3 = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.fc1(x)
        x = self.relu(x + self.norm(x))
        return self.fc3(self.fc2(x) + x)


CASES = {
    "jsc-mlp": (lambda: build_model("jsc-mlp", (16,), 5, seed=0), JETS),
    "jsc-toy": (lambda: build_model("jsc-toy", (16,), 5, seed=0), JETS),
    "odd widths": (lambda: mlp(16, 21, 3, 5), JETS),
    "one layer": (lambda: mlp(16, 5), JETS),
    "digits-mlp": (lambda: build_model("digits-mlp", (1, 8, 8), 10, seed=0), IMAGES),
    "digits-cnn": (lambda: build_model("digits-cnn", (1, 8, 8), 10, seed=0), IMAGES),
    "residual": (Residual, IMAGES),
    "branches": (Branches, JETS),
    "quantized branches": (lambda: quantized(Branches(), 8, 4), JETS),
    "quantized": (lambda: quantized(mlp(16, 24, 12, 5), 8, 6, 7), JETS),
    "quantized, half up": (lambda: quantized(mlp(16, 24, 5), 6, 4, rounding="half_up"), JETS),
    "quantized, floor": (
        lambda: quantized(mlp(16, 24, 5), 6, 5, rounding="floor", overflow="saturate_symmetric"),
        JETS,
    ),
    "quantized, norms": (lambda: quantized(mlp(16, 24, 12, 5, norm=True), 8, 8, 12), JETS),
    "quantized cnn": (lambda: quantized(build_model("digits-cnn", (1, 8, 8), 10, seed=0), 8, shape=(1, 8, 8)), IMAGES),
}
#: What the loss does not depend on has a gradient of rounding errors, which Adam makes as large as any other: biases
#: before a batch norm, and the running means that follow them.
FREE = {
    "jsc-toy": ("2.bias", "5.bias", "8.bias", "running_mean"),
    "residual": ("conv2.bias", "bn2.running_mean"),
    "quantized, norms": (".bias", "running_mean"),
}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("more", "reason"),
    [({"scheduler": "linear"}, "changes with every step"), ({"accumulation": 2}, "each step is of 2 batches")],
)
def test_what_populations_cannot_do_the_plain_training_does(more, reason):
    make, data = CASES[next(iter(CASES))]
    model, settings = make(), TrainSettings(max_epochs=2, max_steps=8, batch_size=128, **more)
    (member,) = train_population([model], data, settings)
    assert reason in member.alone
    assert equal(member.state, train(model, data, settings).last_state)


@pytest.mark.sampled(3)
@compiled
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_a_member_is_trained_as_if_alone(name, optimizer):
    make, data = CASES[name]
    torch.manual_seed(0)
    model = make()
    assert why_alone(model, tuple(data.split("train")[0].shape[1:])) == ""
    before = copy.deepcopy(model.state_dict())
    decay = 0.0 if name in FREE else 0.02
    # One epoch of few steps: later, rounding errors have grown wherever a ReLU or a format flips.
    settings = TrainSettings(
        max_epochs=1,
        max_steps=4,
        batch_size=128,
        learning_rate=0.05 if optimizer == "sgd" else 3e-3,
        optimizer=optimizer,
        weight_decay=decay,
        seed=3,
    )
    alone = train(model, data, settings)
    (member,) = train_population([model], data, settings)
    assert (member.stopped, member.alone, member.error) == (alone.stopped, "", "")
    assert member.state.keys() == alone.last_state.keys()
    moved = 0
    for key, value in alone.last_state.items():
        assert member.state[key].dtype == value.dtype
        assert member.state[key].shape == value.shape
        moved += not torch.equal(value, before[key])
        if not any(key.endswith(free) for free in FREE.get(name, ())):
            # Adam divides by the gradient's size: of one that is nearly zero it sees rounding errors, too.
            off = (member.state[key] - value).abs().float()
            assert off.max() <= settings.learning_rate / 10, key
            assert (off > 2e-5 + 1e-4 * value.abs()).float().mean() <= 1e-3, key
    assert moved >= 2
    assert equal(model.state_dict(), before)
    (ours,), (theirs,) = member.history, alone.history
    assert ours.train_loss == pytest.approx(theirs.train_loss, abs=1e-5)
    assert ours.val_loss == pytest.approx(theirs.val_loss, abs=2e-3 if name in FREE else 1e-4)
    assert ours.train_accuracy == pytest.approx(theirs.train_accuracy, abs=0.005)
    assert ours.learning_rate == theirs.learning_rate


@compiled
@pytest.mark.parametrize("name", ["jsc-mlp", "jsc-toy", "quantized", "digits-cnn"])
def test_several_epochs_end_at_the_same_place(name):
    make, data = CASES[name]
    model = make()
    settings = TrainSettings(max_epochs=4, batch_size=100, learning_rate=5e-3, seed=1)
    alone = train(model, data, settings)
    (member,) = train_population([model], data, settings)
    assert [r.epoch for r in member.history] == [1, 2, 3, 4]
    for ours, theirs in zip(member.history, alone.history, strict=True):
        assert ours.learning_rate == theirs.learning_rate
        assert ours.val_loss == pytest.approx(theirs.val_loss, abs=0.03)
        assert ours.val_accuracy == pytest.approx(theirs.val_accuracy, abs=0.03)
    # The state is the one that the last record was taken of.
    model.load_state_dict(member.state)
    scores = evaluate(model, *data.split("val"))
    assert scores.loss == pytest.approx(member.history[-1].val_loss, abs=1e-5)
    assert scores.accuracy == pytest.approx(member.history[-1].val_accuracy, abs=0.004)


def population():
    return [
        mlp(16, 24, 12, 5, seed=1),
        quantized(mlp(16, 24, 12, 5, seed=1), 4, 6),
        mlp(16, 7, 5, seed=2),
        mlp(16, 24, 12, 5, seed=3, norm=True),
        quantized(mlp(16, 24, 12, 5, seed=4), 8, 3, 5),
        mlp(16, 64, 33, 5, seed=5),
    ]


@pytest.mark.long
@compiled
@pytest.mark.parametrize("threads", [1, 2])
def test_other_members_and_order_change_no_bit(threads):
    models = population()
    # The last batch of one sample is left to members without batch norms, and to them alone.
    data = clusters((16,), 5, samples=641)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = train_population(models, data, SETTINGS)
        backwards = train_population(models[::-1], data, SETTINGS)[::-1]
    finally:
        torch.set_num_threads(before)
    for model, a, b in zip(models, together, backwards, strict=True):
        (alone,) = train_population([model], data, SETTINGS)
        assert a.alone == ""
        assert equal(a.state, alone.state)
        assert equal(b.state, alone.state)
        assert a.history == b.history == alone.history
        ordinary = train(model, data, SETTINGS)
        assert ordinary.history[-1].val_loss == pytest.approx(alone.history[-1].val_loss, abs=0.03)


def test_halving_lets_members_go_and_changes_nothing_for_the_rest():
    models = [*population()[:4], nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 5))]
    settings = TrainSettings(max_epochs=3, batch_size=128, learning_rate=3e-3)
    all_records = []

    def keep(epoch, records, state):
        all_records.append(records)
        losses = [r.val_loss if r else float("inf") for r in records]
        limit = sorted(losses)[1]
        return [r is not None and (epoch > 1 or loss <= limit) for r, loss in zip(records, losses, strict=True)]

    halved = train_population(models, JETS, settings, keep=keep)
    whole = train_population(models, JETS, settings)
    assert [m.stopped for m in halved].count("dropped") == 3
    assert [sum(r is not None for r in records) for records in all_records] == [5, 2, 2]
    for ours, theirs in zip(halved, whole, strict=True):
        kept = len(ours.history)
        assert kept == (3 if ours.stopped == "max_epochs" else 1)
        assert ours.history == theirs.history[:kept]
        if kept == 3:
            assert equal(ours.state, theirs.state)
    # If no member goes on, training ends.
    ended = train_population(models, JETS, settings, keep=lambda epoch, records, state: [False] * len(records))
    assert [len(m.history) for m in ended] == [1] * 5


def test_keep_answers_for_every_model():
    with pytest.raises(ValueError, match="2 models"):
        train_population([mlp(16, 5), mlp(16, 5)], JETS, SETTINGS, keep=lambda epoch, records, state: [True])


def test_patience_and_steps_end_each_member_as_alone():
    models = population()[:3]
    settings = TrainSettings(max_epochs=12, batch_size=128, learning_rate=0.2, patience=1)
    for member in train_population(models, JETS, settings):
        losses = [r.val_loss for r in member.history]
        assert member.stopped == "patience"
        assert losses[-1] >= losses[-2]
        assert all(b < a for a, b in itertools.pairwise(losses[:-1]))
    settings = TrainSettings(max_epochs=12, batch_size=128, max_steps=8)
    for member in train_population(models, JETS, settings):
        assert (member.stopped, len(member.history)) == ("max_steps", 2)


class Twice(nn.Module):
    """Two modules with one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight
        self.out = nn.Linear(16, 5)

    def forward(self, x):
        return self.out(self.b(self.a(x)))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(16, 5)

    def forward(self, x):
        return self.out(x if x.sum() > 0 else -x)


def hooked():
    model = mlp(16, 8, 5)
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return model


def frozen():
    model = mlp(16, 8, 5)
    model[0].weight.requires_grad_(False)
    return model


def affine():
    model = mlp(16, 8, 5)
    graph = capture(model, torch.randn(2, 16))
    form = Affine.parse({"width": 8}, WEIGHT).calibrated(model[0].weight)
    return quantize(graph, {graph.sites[0].name: {"weight": form}})


def per_channel():
    model = mlp(16, 8, 5)
    graph = capture(model, torch.randn(2, 16))
    with torch.no_grad():
        model[0].weight[0] *= 8
    form = Integer(4, "auto", granularity="channel").calibrated(model[0].weight)
    return quantize(graph, {graph.sites[0].name: {"weight": form}})


@compiled
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Twice, "share"),
        (Branching, "traced"),
        (hooked, "hooks"),
        (frozen, "0.weight is not trained"),
        (affine, "the format affine8sc of 0 is no fixed-point grid"),
        (lambda: quantized(mlp(16, 8, 5), 8, overflow="wrap"), "the format int8.6-w of 0 wraps, and compiled"),
        (per_channel, "the format int4.2..5-c of 0 is no fixed-point grid with one step"),
        (lambda: nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 5)), "1 is a Tanh"),
        (lambda: nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 5)), "random"),
        (lambda: nn.Sequential(nn.BatchNorm1d(16, momentum=None), nn.Linear(16, 5)), "moving"),
    ],
)
def test_a_model_that_is_no_program_is_trained_alone_and_says_why(make, reason):
    torch.manual_seed(0)
    model, other = make(), mlp(16, 8, 5)
    assert reason in why_alone(model, (16,))
    first, second = train_population([model, other], JETS, SETTINGS)
    assert reason in first.alone
    assert second.alone == ""
    alone = train(model, JETS, SETTINGS)
    assert equal(first.state, alone.last_state)
    assert first.history == alone.history


def test_values_that_are_neither_vectors_nor_images_are_trained_alone():
    data = clusters((2, 3), 5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5))
    assert "it flattens values of shape (2, 3)" in why_alone(model, (2, 3))
    (member,) = train_population([model], data, SETTINGS)
    assert equal(member.state, train(model, data, SETTINGS).last_state)


def test_dropout_draws_the_same_numbers_as_alone():
    models = [nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 5)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    random = torch.get_rng_state()
    members = train_population(models, JETS, SETTINGS)
    assert torch.equal(random, torch.get_rng_state())
    alone = train(models[0], JETS, SETTINGS)
    assert all(equal(m.state, alone.last_state) for m in members)


def test_without_compiled_steps_everyone_is_trained_alone(monkeypatch):
    monkeypatch.setattr(steps, "available", lambda: False)
    model = mlp(16, 8, 5)
    assert "compiled" in why_alone(model, (16,))
    (member,) = train_population([model], JETS, SETTINGS)
    assert "compiled" in member.alone
    assert equal(member.state, train(model, JETS, SETTINGS).last_state)


def test_one_that_diverges_does_not_take_the_others_with_it():
    wild = mlp(16, 8, 5, seed=1)
    with torch.no_grad():
        wild[0].weight.mul_(1e38)
    calm = mlp(16, 8, 5)
    for model in (wild, nn.Sequential(wild[0], nn.Tanh(), nn.Linear(8, 5).requires_grad_())):
        with torch.no_grad():
            model[0].weight[0, 0] = float("nan")
        first, second = train_population([model, calm], JETS, SETTINGS)
        assert first.stopped == "failed"
        assert "diverged" in first.error
        assert first.history == ()
        assert (second.stopped, second.error) == ("max_epochs", "")


def test_nobody_is_no_error():
    assert train_population([], JETS, SETTINGS) == ()


def test_mistakes_are_named():
    empty = clusters((16,), 5)
    none = (torch.zeros(0, 16), torch.zeros(0, dtype=torch.int64))
    lacking = SimpleNamespace(
        name="e", mapped=False, num_classes=5, split=lambda s: none if s == "val" else empty.split("train")
    )
    with pytest.raises(DataError, match="val split"):
        train_population([mlp(16, 5)], lacking, SETTINGS)
    with pytest.raises(ConfigError, match="no parameter"):
        train_population([nn.Flatten()], JETS, SETTINGS)
    with pytest.raises(ConfigError, match="batch_size"):
        train_population([mlp(16, 5, norm=True)], JETS, TrainSettings(batch_size=1))
    (member,) = train_population([mlp(16, 4)], JETS, SETTINGS)
    assert member.stopped == "failed"
    assert "(128, 5)" in member.error
    assert "classes" in member.alone


@compiled
def test_seconds_are_added_by_part():
    parts = {}
    train_population([mlp(16, 8, 5, norm=True)], JETS, SETTINGS, parts=parts)
    assert set(parts) == set(steps.PARTS)
    assert all(seconds > 0 for seconds in parts.values())


@pytest.mark.sampled(2)
@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CASES if n != "one layer"])
def test_the_trainer_for_gpus_trains_as_if_alone(name):
    """On the CPU of this machine."""
    make, data = CASES[name]
    torch.manual_seed(0)
    models = [make() for _ in range(3)]
    for model in models[1:]:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    settings = TrainSettings(max_epochs=2, batch_size=100, learning_rate=3e-3, optimizer="adamw", weight_decay=0.01)
    shape = tuple(data.split("train")[0].shape[1:])
    programs = [program(model, shape, {}) for model in models]
    assert len({structure(m, p) for m, p in zip(models, programs, strict=True)}) == 1
    trainer = GpuTrainer(models, programs, settings, torch.device("cpu"))
    order = torch.Generator().manual_seed(settings.seed)
    (x, y), val = data.split("train"), data.split("val")
    # One goes on for two epochs and one for one; the last is let go in between.
    for epoch, going in ((1, [0, 1, 2]), (2, [0, 1])):
        batches = torch.randperm(len(y), generator=order).split(settings.batch_size)
        outcomes = trainer.epoch(going, x, y, val, batches, learning_rate(settings, epoch))
        assert len(outcomes) == len(going)
    for i, model in enumerate(models):
        alone = train(model, data, settings)
        record = alone.history[0 if i == 2 else 1]
        if i < 2:
            assert outcomes[i].val_loss == pytest.approx(record.val_loss, abs=5e-3)
            assert outcomes[i].correct / len(y) == pytest.approx(record.train_accuracy, abs=0.01)
            assert float(outcomes[i].losses[0]) < 10
        state = trainer.state(i)
        assert state.keys() == alone.last_state.keys()
        if i < 2:
            for key, value in alone.last_state.items():
                assert state[key].shape == value.shape
                if not any(key.endswith(free) for free in FREE.get(name, ())):
                    torch.testing.assert_close(
                        state[key], value, rtol=0.02, atol=0.02, msg=lambda m, k=key: f"{k}: {m}"
                    )


def test_stacks_are_of_one_structure():
    def of(model):
        return structure(model, program(model, (16,), {}))

    assert of(mlp(16, 8, 5, seed=1)) == of(mlp(16, 8, 5, seed=2))
    assert of(quantized(mlp(16, 8, 5), 4)) == of(quantized(mlp(16, 8, 5), 8, 6))
    assert of(mlp(16, 8, 5)) != of(mlp(16, 9, 5))
    assert of(mlp(16, 8, 5)) != of(mlp(16, 8, 5, norm=True))
    assert of(mlp(16, 8, 5)) != of(quantized(mlp(16, 8, 5), 4))
    slower = mlp(16, 8, 5, norm=True)
    slower[1].momentum = 0.2
    assert of(slower) != of(mlp(16, 8, 5, norm=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_members_are_trained_as_if_alone():
    models = population()
    members = train_population(models, JETS, SETTINGS, device="cuda")
    for model, member in zip(models, members, strict=True):
        alone = train(model, JETS, SETTINGS, device="cuda")
        assert member.alone == ""
        assert member.history[-1].val_loss == pytest.approx(alone.history[-1].val_loss, abs=0.03)
