"""Layers of real networks under learned bits: what is deployed equals an evaluation in whole numbers, to the bit."""

import contextlib
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_integers import Layer, ebops, relu, windows
from torch import nn

import bitfront as bf
from bitfront.api import dataset_of
from bitfront.engine.rebuild import transform_trial
from bitfront.graph import capture
from bitfront.kernels import bits
from bitfront.learned_bits.course import starting_ranges
from bitfront.learned_bits.member import BitsMember
from bitfront.learned_bits.network import formats_of, state_of
from bitfront.learned_bits.program import Granularities, with_learned_bits
from bitfront.learned_bits.state import Cost
from bitfront.transforms.fold import folded

pytestmark = pytest.mark.skipif(not bits.available(), reason="no compiled training of bits")

CLASSES = 4


class Normed(nn.Module):
    """Linear layers with and without a bias, each with a batch norm, with or without weights."""

    shape = (12,)

    def __init__(self):
        super().__init__()
        self.fc1, self.bn1 = nn.Linear(12, 10, bias=False), nn.BatchNorm1d(10)
        self.fc2, self.bn2 = nn.Linear(10, 9), nn.BatchNorm1d(9, affine=False)
        self.fc3 = nn.Linear(9, CLASSES)

    def forward(self, x):
        return self.fc3(F.relu(self.bn2(self.fc2(torch.relu(self.bn1(self.fc1(x)))))))

    @staticmethod
    def by_integers(layers, x):
        return layers["fc3"](relu(layers["fc2"](relu(layers["fc1"](x)))))


class Residual(nn.Module):
    """A small residual network with batch norms: a sum that two read, a shortcut with a stride, a mean at the end."""

    shape = (2, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv1, self.norm1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv3, self.norm3 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.short, self.norm4 = nn.Conv2d(6, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8)
        self.pool, self.flat, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))
        x = torch.relu(self.norm3(self.conv3(x)) + self.norm4(self.short(x)))
        return self.fc(self.flat(self.pool(x)))

    @staticmethod
    def by_integers(layers, x):
        x = relu(layers["stem"](x))
        x = relu(x + layers["conv2"](relu(layers["conv1"](x))))
        x = relu(layers["conv3"](x) + layers["short"](x))
        return layers["fc"](windows(x, 4).sum(-1, dtype=np.float64).astype(np.float32).reshape(len(x), -1) / 16)


class Depthwise(nn.Module):
    """Depthwise and pointwise convolutions with batch norms and ReLU6, a grouped and a dilated one, both poolings;
    dropout, and a softmax at the end."""

    shape = (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.norm1 = nn.Conv2d(8, 16, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(16)
        self.point, self.norm2 = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, (3, 1), padding=(2, 0), dilation=(2, 1), groups=2)
        self.act, self.largest, self.flat = nn.ReLU6(), nn.MaxPool2d(2), nn.Flatten()
        self.drop, self.fc = nn.Dropout(0.3), nn.Linear(32, CLASSES)

    def forward(self, x):
        x = self.largest(self.act(self.norm(self.stem(x))))
        x = F.hardtanh(self.norm2(self.point(self.act(self.norm1(self.deep(x))))), 0.0, 2.5)
        x = F.avg_pool2d(self.act(self.grouped(x)), 2)
        return F.log_softmax(self.fc(self.drop(self.flat(x))), dim=1)

    @staticmethod
    def by_integers(layers, x):
        x = windows(np.minimum(relu(layers["stem"](x)), 6), 2).max(-1)
        x = np.minimum(relu(layers["point"](np.minimum(relu(layers["deep"](x)), 6))), np.float32(2.5))
        x = np.minimum(relu(layers["grouped"](x)), 6)
        x = windows(x, 2).sum(-1, dtype=np.float64).astype(np.float32) / 4
        return layers["fc"](x.reshape(len(x), -1))


class Series(nn.Module):
    """Convolutions over a series, leaky ReLUs, a concatenation of values with and without a sign, a pooling."""

    shape = (2, 12)

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv1d(2, 6, 3, padding=1)
        self.conv2, self.norm = nn.Conv1d(6, 6, 3, padding="same", groups=3, bias=False), nn.BatchNorm1d(6)
        self.conv3 = nn.Conv1d(12, 5, 2, stride=2, dilation=2)
        self.leaky, self.pool, self.flat = nn.LeakyReLU(0.125), nn.MaxPool1d(2), nn.Flatten()
        self.fc1, self.fc2 = nn.Linear(10, 7), nn.Linear(7, CLASSES)

    def forward(self, x):
        x = self.leaky(self.conv1(x))
        x = torch.cat([x, torch.relu(self.norm(self.conv2(x)))], dim=1)
        x = self.flat(self.pool(self.conv3(x)))
        return self.fc2(F.leaky_relu(self.fc1(x), negative_slope=0.1))

    @staticmethod
    def by_integers(layers, x):
        x = layers["conv1"](x)
        x = np.where(x < 0, x * np.float32(0.125), x)
        x = np.concatenate([x, relu(layers["conv2"](x))], axis=1)
        x = layers["conv3"](x)[:, :, :4].reshape(len(x), 5, 2, 2).max(-1).reshape(len(x), -1)
        x = layers["fc1"](x)
        return layers["fc2"](np.where(x < 0, x * np.float32(0.1), x))


NETWORKS = (Normed, Residual, Depthwise, Series)


def model_of(network, seed=0):
    """The network with seeded weights, and statistics as if it had been trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network().eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(module.running_mean, 0, 0.2)
                nn.init.uniform_(module.running_var, 0.3, 2)
                if module.affine:
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.normal_(module.bias, 0, 0.2)
    return model


def clusters(shape, samples=600, seed=0):
    """Samples around a point per class: (x, y)."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (samples,), generator=generator)
    return torch.randn(CLASSES, *shape, generator=generator)[y] + torch.randn(samples, *shape, generator=generator), y


@contextlib.contextmanager
def logits_of(model):
    """What the last linear layer gives in each call of the model, as a list."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    seen = []
    handle = last.register_forward_hook(lambda _, inputs, output: seen.append(output))
    yield seen
    handle.remove()


SIZES = {"train": 600, "val": 200, "test": 200}


def searched(model, folder, space=None, **settings):
    """A short search with learned bits, and its data; `space` has formats of layers that learn none."""
    data = {split: clusters(model.shape, size, seed) for seed, (split, size) in enumerate(SIZES.items())}
    usual = {"cycles": 3, "epochs": 2.0, "networks": 2, "batch_size": 64, "learning_rate": 0.01, "last_pressure": 2e-4}
    run = bf.search(
        model=model,
        data=data,
        space=space,
        metrics=["accuracy", "ebops"],
        strategy={"name": "learned_bits", "setup": usual | settings},
        project="run",
        project_dir=str(folder),
    )
    return run, dataset_of(data)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_deployed_network_equals_its_evaluation_in_whole_numbers(network, tmp_path):
    model = model_of(network)
    before = copy.deepcopy(model.state_dict())
    run, data = searched(model, tmp_path)
    x, y = data.split("val")
    assert len(run.trials) == 6
    # What is written out in whole numbers takes seconds where there are convolutions.
    most = 10_000 if len(network.shape) == 1 else 1_500
    for trial, samples in ((run.trials[0], 500), (run.trials[-1], most)):
        many, _ = clusters(network.shape, samples, 9)
        rebuilt = transform_trial(tmp_path / "run", trial.number, check=True, data=data, model=model)
        layers = {site: Layer(rebuilt.model.get_submodule(site), formats) for site, formats in rebuilt.formats.items()}
        with torch.no_grad(), logits_of(rebuilt.model) as logits:
            rebuilt.model(many)
        assert np.array_equal(logits[0].numpy(), network.by_integers(layers, many.numpy()))
        right = (network.by_integers(layers, x.numpy()).argmax(1) == y.numpy()).mean()
        assert trial.metrics["accuracy"] == pytest.approx(right) == pytest.approx(rebuilt.evaluation.accuracy)
        assert trial.metrics["ebops"] == ebops(layers.values()) > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert run.trials[-1].metrics["ebops"] < run.trials[0].metrics["ebops"]


@pytest.mark.parametrize("network", NETWORKS)
def test_what_is_compiled_computes_the_same(network):
    """Its gradients are those of the same steps; here its logits and its cost are compared."""
    model = model_of(network)
    x, _ = clusters(network.shape, 70)
    graph, program = with_learned_bits(capture(model, x[:2]), network.shape, Granularities(), {})
    member = BitsMember.of(program, graph.model, starting_ranges(graph.model, program, x, lambda m, x: m(x)), 8.0)
    order = torch.arange(len(x), dtype=torch.int32)
    logits, cost = bits.logits(member.native, member.workspace, Cost().native, x.flatten(1).contiguous(), order)
    learned = {layer.path: member.rounded(i) for i, layer in enumerate(program.layers)}
    formats = formats_of(graph, learned)
    deployed = copy.deepcopy(graph.model)
    deployed.load_state_dict(state_of(graph, learned))
    layers = {site: Layer(deployed.get_submodule(site), of) for site, of in formats.items()}
    assert np.allclose(logits.numpy().T, network.by_integers(layers, x.numpy()), rtol=0, atol=1e-5)
    assert cost == ebops(layers.values())
    with torch.no_grad():
        # With enough bits the network computes what the model computes.
        with logits_of(model) as expected:
            model(x)
        assert torch.allclose(logits.T, expected[0], atol=0.2)


@pytest.mark.parametrize("weight", ["element", "channel", "layer"])
@pytest.mark.parametrize("network", NETWORKS)
def test_it_counts_what_is_left_where_channels_have_no_weight(network, weight):
    """The first channels are pruned, so that channels with weights have larger numbers than there are weights."""
    model = model_of(network)
    x, _ = clusters(network.shape, 20)
    graph, program = with_learned_bits(capture(model, x[:2]), network.shape, Granularities(weight), {})
    member = BitsMember.of(program, graph.model, starting_ranges(graph.model, program, x, lambda m, x: m(x)), 8.0)
    for place, layer in zip(member.places, program.layers, strict=True):
        member.values[place.weight][: layer.weights - 3] = 0
    assert member.prune(1)
    assert member.alive <= 3 * len(program.layers)
    order = torch.arange(len(x), dtype=torch.int32)
    for _ in range(2):
        got = bits.logits(member.native, member.workspace, Cost().native, x.flatten(1).contiguous(), order)[1]
        learned = {layer.path: member.rounded(i) for i, layer in enumerate(program.layers)}
        deployed = copy.deepcopy(graph.model)
        deployed.load_state_dict(state_of(graph, learned))
        layers = [Layer(deployed.get_submodule(site), of) for site, of in formats_of(graph, learned).items()]
        assert got == ebops(layers)
    assert member.workspace.widths.numel() >= max(layer.weight_groups(np.arange(1))[1] for layer in program.layers)


@pytest.mark.parametrize("network", NETWORKS)
def test_its_gradients_are_those_of_the_model(network):
    """With so many bits that rounding hardly matters; the first moment of the first step is a tenth of the gradient."""
    model = model_of(network)
    x, y = clusters(network.shape, 50)
    graph, program = with_learned_bits(capture(model, x[:2]), network.shape, Granularities(), {})
    member = BitsMember.of(program, graph.model, starting_ranges(graph.model, program, x, lambda m, x: m(x)), 16.0)
    order, steps = torch.arange(len(x), dtype=torch.int32), np.zeros(1)
    given = (member.native, member.workspace, Cost().native, x.flatten(1).contiguous(), y.int())
    loss = bits.learn(*given, None, order, len(x), steps, steps, 0, member.first_bits, 1.0)
    # log_softmax of logarithms of probabilities changes nothing.
    expected = F.cross_entropy(graph.model(x), y)
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-4)
    for layer, place in zip(program.layers, member.places, strict=True):
        module = graph.model.get_submodule(layer.path)
        for parameter, where in ((module.weight, place.weight), (module.bias, place.bias)):
            got = 10 * member.moments[0][where].reshape(parameter.shape)
            assert float(parameter.grad.norm()) > 0
            assert float((got - parameter.grad).norm()) < 1e-3 * float(parameter.grad.norm()), layer.path


def test_folding_keeps_what_is_computed_and_the_model():
    model = model_of(Residual)
    x, _ = clusters(Residual.shape, 64)
    before = copy.deepcopy(model.state_dict())
    graph = capture(model, x[:2])
    result = folded(graph)
    assert result.into == {"norm": "stem", "norm1": "conv1", "norm2": "conv2", "norm3": "conv3", "norm4": "short"}
    assert isinstance(result.graph.model.norm, nn.Identity)
    assert isinstance(graph.model.norm, nn.BatchNorm2d)
    assert result.graph.model.stem.bias is not None
    with torch.no_grad():
        assert torch.allclose(result.graph.model(x), model(x), atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [site.name for site in result.graph.sites] == [site.name for site in graph.sites]


def test_a_plan_says_what_was_folded_and_the_float_model_is_the_users(tmp_path):
    model = model_of(Normed)
    run, data = searched(model, tmp_path, cycles=1, epochs=1.0)
    assert any("bn1 into fc1, bn2 into fc2" in note for note in run.notes)
    x, y = data.split("val")
    with torch.no_grad():
        assert run.reference["accuracy"] == pytest.approx(float((model(x).argmax(1) == y).float().mean()))


@pytest.mark.long
@pytest.mark.parametrize("network", [Normed, Depthwise])
@pytest.mark.parametrize("teacher", ["self", "ensemble", "checkpoint"])
def test_float_models_beside_have_the_layers_of_the_users(network, teacher, tmp_path):
    """Batch norms and dropout are in them; a member starts from one with its norms folded."""
    model = model_of(network)
    if teacher == "checkpoint":
        teacher = str(tmp_path / "teacher.pt")
        torch.save(model_of(network, 1).state_dict(), teacher)
    settings = {"cycles": 1, "epochs": 1.0, "members": 2, "float_epochs": 1, "teacher": teacher}
    run, data = searched(model, tmp_path, **settings)
    rebuilt = transform_trial(tmp_path / "run", 3, check=True, data=data, model=model)
    assert run.trial(3).metrics["accuracy"] == pytest.approx(rebuilt.evaluation.accuracy)
    if network is Depthwise:
        assert any("nothing is dropped while bits are learned: drop" in note for note in run.notes)


class First(nn.Sequential):
    """A batch norm that follows no layer."""

    shape = (12,)

    def __init__(self):
        super().__init__(nn.BatchNorm1d(12), nn.Linear(12, CLASSES))


class Twice(nn.Module):
    """A layer that a batch norm and an addition read."""

    shape = (12,)

    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, CLASSES)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(torch.relu(x + self.norm(x)))


@pytest.mark.parametrize(("network", "words"), [(First, "0"), (Twice, "norm")])
def test_a_norm_that_cannot_be_folded_stays_in_float(network, words, tmp_path):
    model = model_of(network)
    run, data = searched(model, tmp_path, cycles=1, epochs=1.0)
    assert any(f"BatchNorm1d: {words}" in note for note in run.notes)
    rebuilt = transform_trial(tmp_path / "run", 1, check=True, data=data, model=model)
    assert run.trial(1).metrics["accuracy"] == rebuilt.evaluation.accuracy
