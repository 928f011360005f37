"""Training in torch: the same numbers as compiled steps where both can train a network, and networks that only it can."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from learning_by_hand import Reference
from learning_networks import Cnn, Mlp, SignedMlp
from test_gradients import leaves_of
from test_layers import CLASSES, clusters, model_of, searched
from torch import nn

import bitfront as bf
from bitfront.engine.rebuild import transform_trial
from bitfront.errors import ConfigError
from bitfront.formats.fixed_map import FixedMap
from bitfront.graph import capture
from bitfront.kernels import bits as compiled
from bitfront.learned_bits.member import BitsMember
from bitfront.learned_bits.network import formats_of, state_of
from bitfront.learned_bits.program import Granularities, with_learned_bits
from bitfront.learned_bits.state import Cost, Samples, Steps
from bitfront.learned_bits.torch_member import TorchMember
from bitfront.learned_bits.torch_program import TorchProgram, open_program
from bitfront.transforms.quantize import quantize

needs_compiler = pytest.mark.skipif(not compiled.available(), reason="needs a compiler")
COST, GRAIN = Cost(0.7, 0.3, 1.0), ("element", "channel", "layer")


def torch_program(monkeypatch, graph, x, shared):
    """The program of training in torch, also for a network that has compiled steps."""
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "available", lambda: False)
        return open_program(graph, x, shared, {})[1]


def drawn(member, seed):
    """The member with drawn bits, some without room for a value; its weights stay."""
    draw, values = np.random.default_rng(seed), member.values.numpy()
    for place in member.places:
        for part, low, high in (
            (place.weight_bits, 0.6, 5.4),
            (place.bias_bits, 0.6, 5.4),
            (place.fractions, 0.6, 5.4),
            (place.integers, -1.4, 1.4),
        ):
            values[part] = draw.uniform(low, high, part.stop - part.start)
    return member


def both(monkeypatch, kind, shared, seed, samples=150):
    """(compiled member, torch member, samples for each) of one network, with the same values."""
    torch.manual_seed(seed)
    model = kind().eval()
    x, y = torch.randn(samples, *kind.shape), torch.randint(0, kind.classes, (samples,)).int()
    graph = capture(model, x[:2])
    _, program = with_learned_bits(graph, kind.shape, shared, {})
    other = torch_program(monkeypatch, graph, x[:3], shared)
    assert isinstance(other, TorchProgram)
    assert [layer.signed for layer in other.layers] == [layer.signed for layer in program.layers]
    places = range(len(program.layers))
    assert [other.follows(i) for i in places] == [program.follows(i) for i in places]
    largest = [np.ones(layer.source, np.float32) for layer in program.layers]
    members = [cls.of(p, graph.model, largest, 5.0) for cls, p in ((BitsMember, program), (TorchMember, other))]
    assert torch.equal(members[0].values, members[1].values)
    return *(drawn(member, seed) for member in members), Samples.of(x, y), Samples(x, y)


def alike_after_a_step(a, b, of_a, of_b):
    """Assert that cost, right answers, loss and all gradients of two members of ``both`` are the same."""
    for first, second in zip(a.measured(of_a, COST), b.measured(of_b, COST), strict=True):
        assert first == pytest.approx(second, rel=1e-12)
    steps = epoch(150, 150)
    assert a.learn(of_a, steps) == pytest.approx(b.learn(of_b, steps), rel=1e-6)
    for place in a.places:
        for name in ("weight", "bias", "weight_bits", "bias_bits", "fractions", "integers"):
            first, second = (member.moments[0][getattr(place, name)] for member in (a, b))
            if first.numel():
                largest = a.moments[0].abs().max() if name in ("weight", "bias") else first.abs().max()
                assert float((first - second).abs().max()) <= 1e-5 * float(largest) + 1e-9, name


def epoch(samples, batch, seed=0, rate=3e-3, pressure=3e-4):
    """The steps of an epoch."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed)).int()
    count = -(-samples // batch)
    return Steps(order, batch, np.full(count, rate), np.full(count, pressure), 2.0, COST)


@pytest.mark.sampled(2)
@needs_compiler
@pytest.mark.parametrize("kind", [Mlp, SignedMlp, Cnn])
@pytest.mark.parametrize("weight", GRAIN)
@pytest.mark.parametrize("data", GRAIN)
def test_a_step_is_that_of_the_compiled_trainer(kind, weight, data, monkeypatch):
    """Cost, right answers, loss and all gradients: Adam's first moment is a tenth of them after the first step."""
    seed = 3 * GRAIN.index(weight) + GRAIN.index(data)
    a, b, of_a, of_b = both(monkeypatch, kind, Granularities(weight, data), seed)
    alike_after_a_step(a, b, of_a, of_b)
    # An almost vanishing gradient may have any sign, so its step has; the others are Adam's.
    large = a.moments[0].abs() > 1e-4 * a.moments[0].abs().max()
    assert float((a.values - b.values)[large].abs().max()) < 1e-6


@needs_compiler
@pytest.mark.parametrize("rounding", ["half_up", "floor"])
@pytest.mark.parametrize("kind", [SignedMlp, Cnn])
def test_a_step_that_rounds_otherwise_is_that_of_the_compiled_trainer(kind, rounding, monkeypatch):
    a, b, of_a, of_b = both(monkeypatch, kind, Granularities(data_in_rounding=rounding), 0)
    even = both(monkeypatch, kind, Granularities(), 0)[0]
    assert even.learn(of_a, epoch(150, 150)) != a.copy().learn(of_a, epoch(150, 150))
    alike_after_a_step(a, b, of_a, of_b)


@needs_compiler
@pytest.mark.parametrize(
    ("kind", "weight"), [(Mlp, "element"), (Mlp, "channel"), (Cnn, "element"), (SignedMlp, "layer")]
)
def test_after_some_epochs_both_trainers_are_as_far(kind, weight, monkeypatch):
    a, b, of_a, of_b = both(monkeypatch, kind, Granularities(weight, weight), 1)
    begin = a.alive
    for number in range(24):
        steps = epoch(150, 50, number, 1e-2, 1e-3)
        losses = a.learn(of_a, steps), b.learn(of_b, steps)
        a.prune(3)
        b.prune(3)
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
    assert a.alive == pytest.approx(b.alive, abs=0.03 * begin)
    assert weight != "element" or max(a.alive, b.alive) < begin
    (cost_a, _), (cost_b, _) = a.measured(of_a, COST), b.measured(of_b, COST)
    assert cost_a == pytest.approx(cost_b, rel=0.05)


def test_its_gradients_are_those_of_autograd_without_a_compiler(monkeypatch):
    torch.manual_seed(0)
    model = Mlp().eval()
    x, y = torch.randn(45, 6), torch.randint(0, 3, (45,))
    program = torch_program(monkeypatch, capture(model, x[:2]), x[:3], Granularities())
    member = drawn(TorchMember.of(program, model, [np.ones(la.source, np.float32) for la in program.layers], 5.0), 0)
    values = leaves_of(program, member.values.numpy(), member.places)
    for leaf in (leaf for v in values.values() for leaf in v.leaves().values()):
        leaf.requires_grad_()
    costs = (COST.pairs, COST.stored, COST.biases)
    reference = Reference(model, values, {layer.path: layer.signed for layer in program.layers}, costs)
    reference.loss(Mlp.reference, x.double(), F.one_hot(y, 3).double(), 3e-4).backward()
    member.learn(Samples(x, y.int()), Steps(torch.arange(45).int(), 45, np.ones(1), np.array([3e-4]), 1.0, COST))
    for layer, place in zip(program.layers, member.places, strict=True):
        for name, leaf in values[layer.path].leaves().items():
            got = 10 * member.moments[0][getattr(place, name)].reshape(leaf.shape).double()
            assert torch.allclose(got, leaf.grad, rtol=1e-4, atol=1e-6), f"{layer.path}.{name}"


# --- networks that only torch can train -------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and two linear layers, each behind a layer norm, with dropout."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.act, self.down = nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        n, t, d = x.shape
        parts = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        y = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(n, t, d)
        x = x + self.drop(self.out(y))
        return x + self.down(self.act(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A small classifier of series."""

    shape = (5, 6)

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Linear(6, 12), nn.Parameter(torch.zeros(5, 12))
        self.block, self.norm, self.head = Block(12, 2), nn.LayerNorm(12), nn.Linear(12, CLASSES)

    def forward(self, x):
        return self.head(self.norm(self.block(self.embed(x) + self.place)).mean(1))


class Curved(nn.Module):
    """Sigmoid and tanh; the values behind the first have no sign."""

    shape = (12,)

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(12, 10), nn.Linear(10, 9), nn.Linear(9, CLASSES)

    def forward(self, x):
        return self.fc3(torch.tanh(self.fc2(torch.sigmoid(self.fc1(x)))))


class Upwards(nn.Module):
    """A batch norm that follows no layer, circular padding, a transposed convolution, PReLU, a softmax at the end."""

    shape = (2, 4, 4)

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.BatchNorm2d(2), nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")
        self.up, self.act, self.fc = nn.ConvTranspose2d(4, 3, 2, stride=2), nn.PReLU(), nn.Linear(192, CLASSES)

    def forward(self, x):
        x = self.act(self.up(torch.relu(self.norm(self.conv(self.first(x))))))
        return torch.softmax(self.fc(x.flatten(1)), 1)


class Recurrent(nn.Module):
    """A recurrent layer, which stays in float."""

    shape = (5, 6)

    def __init__(self):
        super().__init__()
        self.rec, self.fc = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.fc(self.rec(x)[0][:, -1])


@pytest.mark.parametrize(
    ("network", "layers", "named"),
    [
        (
            Transformer,
            ["embed", "block.qkv", "block.out", "block.up", "block.down", "head"],
            ["GELU: block.act; LayerNorm: block.norm1, block.norm2, norm", "600 multiply-accumulates"],
        ),
        (Curved, ["fc1", "fc2", "fc3"], ["sigmoid: sigmoid; tanh: tanh", "ebops and bops do not count it"]),
        (Upwards, ["conv", "up", "fc"], ["BatchNorm2d: first; PReLU: act", "norm into conv"]),
        (Recurrent, ["fc"], ["LSTM: rec", "rec: 2,240 multiply-accumulates"]),
    ],
)
def test_other_networks_are_trained_and_what_is_reported_is_true(network, layers, named, tmp_path):
    model = model_of(network)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run, data = searched(model, tmp_path)
    text = "\n".join(run.notes)
    assert all(words in text for words in named), text
    learned = {f"{path}.{name}" for path in layers for name in ("weight", "bias")}
    for trial in (run.trials[0], run.trials[-1]):
        rebuilt = transform_trial(tmp_path / "run", trial.number, check=True, data=data, model=model)
        assert (rebuilt.evaluation.accuracy, rebuilt.evaluation.loss) == (
            trial.metrics["accuracy"],
            trial.metrics["loss"],
        )
        assert sorted(rebuilt.formats) == sorted(path.replace(".", "_") for path in layers)
        state = rebuilt.model.state_dict()
        others = [name for name, parameter in model.named_parameters() if name not in learned and name in state]
        others = [name for name in others if not name.startswith("norm.") or network is not Upwards]
        # What stays in float was trained too, and is in the checkpoint.
        assert all(not torch.equal(state[name], before[name]) for name in others)
    assert run.trials[-1].metrics["ebops"] < run.trials[0].metrics["ebops"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


INT8 = {"name": "integer", "data_in_width": 8, "data_in_frac_width": "auto"}


def test_what_learns_no_bits_has_the_format_that_the_file_gives_it(tmp_path):
    model = model_of(Transformer)
    in_float, _ = searched(model, tmp_path / "float", cycles=1, epochs=1.0)
    several = {**INT8, "data_in_width": [4, 8]}
    space = {"scaled_dot_product_attention": INT8, "gelu": INT8, "layer_norm": several}
    run, data = searched(model, tmp_path, space, cycles=2, epochs=1.0)
    text = "\n".join(run.notes)
    assert "block_act: data_in int8" in text
    assert "block_norm1, block_norm2, norm: the file offers several formats" in text
    assert "LayerNorm: block.norm1, block.norm2, norm" in text
    for trial in run.trials:
        rebuilt = transform_trial(tmp_path / "run", trial.number, check=True, data=data, model=model)
        assert (rebuilt.evaluation.accuracy, rebuilt.evaluation.loss) == (
            trial.metrics["accuracy"],
            trial.metrics["loss"],
        )
        assert {"scaled_dot_product_attention", "block_act", "embed"} < set(rebuilt.formats)
        assert not {"norm", "block_norm1"} & set(rebuilt.formats)
    # 600 products of values of 7 bits and a sign in place of such of 31.
    saved = 600 * (31**2 - 7**2)
    assert run.trials[0].metrics["ebops"] < in_float.trials[0].metrics["ebops"] - 0.9 * saved


@pytest.mark.parametrize(("network", "site"), [(Curved, "tanh"), (Curved, ""), (Transformer, "block_act")])
def test_the_training_computes_what_is_deployed(network, site):
    """Also with a fixed format of few bits, which changes what is computed; after some steps, on other samples."""
    x, y = clusters(network.shape, 90)
    graph = capture(model_of(network), x[:2])
    shape = {"tanh": (9,), "block_act": (5, 24)}.get(site, ())
    bits = np.full(shape, 3, np.int8)
    form = FixedMap.of(bits, bits - 2, signed=True, samples=True)
    graph, program = open_program(
        graph, x[:3], Granularities(), {}, offered={site: [{"data_in": form}]} if site else {}
    )
    largest = [np.full(layer.source, 3, np.float32) for layer in program.layers]
    member = TorchMember.of(program, graph.model, largest, 4.0)
    member.learn(Samples(x, y.int()), epoch(90, 45, rate=1e-2))
    more, labels = clusters(network.shape, 80, 5)
    _, right = member.measured(Samples(more, labels.int()), COST)
    layers = {layer.path: member.rounded(i) for i, layer in enumerate(program.layers)}
    deployed = copy.deepcopy(graph.model)
    deployed.load_state_dict(state_of(graph, layers, member.floats()))
    formats = {**program.fixed, **formats_of(graph, layers)}
    assert (site in formats) == bool(site)
    with torch.no_grad():
        expected = quantize(replace(graph, model=deployed), formats)(more)
        got = member._opened().outputs(more)
        other = quantize(replace(graph, model=deployed), formats_of(graph, layers))(more)
    assert torch.allclose(got, expected, atol=1e-4)
    assert right == int((expected.argmax(1) == labels).sum())
    assert not site or not torch.allclose(other, expected, atol=1e-2)


@pytest.mark.long
def test_a_search_in_torch_goes_on_behind_the_last_complete_cycle(tmp_path):
    """With dropout, whose random numbers must go on as well, and two members."""
    settings = {"members": 2, "float_epochs": 1}
    whole, _ = searched(model_of(Transformer), tmp_path / "whole", **settings)
    part, _ = searched(model_of(Transformer), tmp_path / "part", **settings)
    folder = tmp_path / "part" / "run"
    for file in (*folder.glob("checkpoints/cycle-[23].pt*"), *folder.glob("trials.sqlite*")):
        file.unlink()
    again, _ = searched(model_of(Transformer), tmp_path / "part", **settings)
    for name, values in whole.columns.metrics.items():
        assert np.array_equal(values, again.columns.metrics[name])
        assert np.array_equal(values, part.columns.metrics[name])
    names = [path.name for path in (tmp_path / "whole" / "run" / "checkpoints").glob("cycle-*.pt")]
    assert len(names) == 3
    for name in names:
        files = [(tmp_path / place / "run" / "checkpoints" / name).read_bytes() for place in ("whole", "part")]
        assert files[0] == files[1]


def test_dropout_is_that_of_the_training_mode_and_leaves_the_random_state_alone(monkeypatch):
    x, y = clusters((12,), 64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Dropout(0.5), nn.Sigmoid(), nn.Linear(8, CLASSES)).eval()
    graph, program = open_program(capture(model, x[:2]), x[:3], Granularities(), {})
    member = TorchMember.of(program, graph.model, [np.ones(la.source, np.float32) for la in program.layers], 8.0, 5)
    samples, none = Samples(x, y.int()), epoch(64, 64, rate=0.0)
    state = torch.get_rng_state()
    losses = [member.learn(samples, none) for _ in range(2)]
    assert losses[0] != losses[1]  # other values are dropped in each epoch
    again = TorchMember.of(program, graph.model, [np.ones(la.source, np.float32) for la in program.layers], 8.0, 5)
    assert again.learn(samples, none) == losses[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert member.measured(samples, COST) == again.measured(samples, COST)


def test_compiled_steps_are_taken_on_a_cpu_where_the_whole_network_has_them(monkeypatch):
    x, _ = clusters((12,), 3)
    plain = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, CLASSES)).eval()
    curved = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, CLASSES)).eval()
    cases = {("cpu", plain, True): "compiled steps", ("cpu", plain, False): "no C++ compiler here"}
    cases |= {("cuda", plain, True): "on cuda (compiled steps are for CPUs"}
    cases |= {(device, curved, True): f"on {device} (no compiled steps: 1 is a Tanh" for device in ("cpu", "cuda")}
    for (device, model, compiler), words in cases.items():
        monkeypatch.setattr(compiled, "available", lambda there=compiler: there)
        _, program = open_program(capture(model, x[:2]), x, Granularities(), {}, device)
        assert words in program.trainer
        assert isinstance(program, TorchProgram) == (words != "compiled steps")


def test_tokens_of_a_table_go_through_as_they_are(tmp_path):
    class Words(nn.Module):
        shape = (6,)

        def __init__(self):
            super().__init__()
            self.table, self.drop, self.fc = nn.Embedding(20, 8), nn.Dropout(0.2), nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(self.drop(self.table(x.long()).mean(1)))

    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 20, (300, 6), generator=generator)
    data = {"train": (x[:200], x[:200, 0] % 3), "val": (x[200:], x[200:, 0] % 3)}
    setup = {"cycles": 2, "epochs": 2.0, "networks": 1, "batch_size": 32}
    strategy = {"name": "learned_bits", "setup": setup}
    run = bf.search(model=model_of(Words), data=data, strategy=strategy, project="words", project_dir=str(tmp_path))
    assert len(run.trials) == 2
    assert any("Embedding: table" in note for note in run.notes)


def test_a_layer_that_is_called_twice_or_frozen_stays_in_float(tmp_path):
    class Twice(nn.Module):
        shape = (12,)

        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.fc3 = nn.Linear(12, 12), nn.Linear(12, 9), nn.Linear(9, CLASSES)
            self.fc2.weight.requires_grad_(False)

        def forward(self, x):
            return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(torch.relu(self.fc1(x)))))))

    run, _ = searched(model_of(Twice), tmp_path, cycles=1, epochs=1.0)
    text = "\n".join(run.notes)
    assert "fc1 (Linear) learns no bits and stays in float: it is called more than once" in text
    assert "fc2 (Linear) learns no bits and stays in float: fc2.weight is not trained" in text


def test_a_model_without_a_layer_that_learns_is_an_error(tmp_path):
    class Alone(nn.Module):
        shape = (5, 6)

        def __init__(self):
            super().__init__()
            self.rec = nn.LSTM(6, CLASSES, batch_first=True)

        def forward(self, x):
            return self.rec(x)[0][:, -1]

    with pytest.raises(ConfigError, match=r"search.strategy.name: .*no layer here whose bits it could learn"):
        searched(model_of(Alone), tmp_path)


class Branching(nn.Module):
    """Cannot be traced: which layer is called depends on the samples."""

    shape = (12,)

    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(12, 10), nn.LayerNorm(10), nn.Linear(10, CLASSES)

    def forward(self, x):
        x = torch.relu(self.fc1(x))
        return self.fc2(self.norm(x) if x.abs().sum() >= 0 else x)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("network", [Upwards, Branching])
@pytest.mark.parametrize("teacher", ["self", "ensemble"])
def test_members_and_teachers_of_a_network_in_torch(network, teacher, tmp_path):
    model = model_of(network)
    settings = {"cycles": 1, "epochs": 1.0, "members": 2, "float_epochs": 1, "teacher": teacher}
    run, data = searched(model, tmp_path, **settings)
    for number in (1, 3):
        rebuilt = transform_trial(tmp_path / "run", number, check=True, data=data, model=model)
        assert rebuilt.evaluation.accuracy == run.trial(number).metrics["accuracy"]
