"""A search whose batch norms are folded: what is searched, reported, rebuilt and deployed is the folded network."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn

import bitfront as bf
from bitfront.api import _configured, dataset_of
from bitfront.engine.evaluation.trained import open_evaluator
from bitfront.engine.planning.builder import make_plan
from bitfront.engine.planning.notes import folding_notes
from bitfront.engine.rebuild import transform_trial
from bitfront.errors import ConfigError, RunError
from bitfront.graph import capture
from bitfront.transforms.fold import Folded, folded
from properties import max_examples
from random_networks import Network, networks

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(60, 3, 6, 6)).astype(np.float32), np.arange(60) % 3
SPLITS = {"train": (X[:30], Y[:30]), "val": (X[30:45], Y[30:45]), "test": (X[45:], Y[45:])}
DATA = dataset_of(SPLITS)
FORMATS = {"name": ["affine"], "data_in_width": [8], "weight_width": [3, 5], "bias_width": [8]}
SPACE = {"by": "type", "conv2d": FORMATS, "linear": FORMATS}
WIDTHS = {"by": "name", "first": {"name": ["output_only"], "channel_multiplier": [0.5, 1]}}


class Net(nn.Module):
    """A norm behind a convolution, one behind a sum, which cannot be folded, one behind a linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc1, self.bn3, self.fc2 = nn.Linear(36, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        x = torch.relu(self.bn1(self.first(x)))
        x = self.pool(torch.relu(self.bn2(self.second(x) + x)))
        return self.fc2(torch.relu(self.bn3(self.fc1(x.flatten(1)))))


def net():
    torch.manual_seed(0)
    model = Net()
    for norm in (model.bn1, model.bn2, model.bn3):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return model.eval()


def search(folder, **settings):
    usual = {"space": SPACE, "strategy": "brute_force", "metrics": ["loss", "average_bitwidth"], "n_trials": 16}
    usual |= {"accelerator": "cpu", "fold_batch_norm": True, "batch_size": 16} | settings
    return bf.search(model=net(), data=DATA, project="run", project_dir=str(folder), **usual)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return search(tmp_path_factory.mktemp("folded"))


def by_hand(model):
    """The network with bn1 and bn3 folded, by the formula; in float64, as a list of (weight, bias)."""
    found = []
    for layer, norm in ((model.first, model.bn1), (model.fc1, model.bn3)):
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        weight = layer.weight.double() * scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
        found.append((weight.float(), (norm.bias.double() - norm.running_mean.double() * scale).float()))
    return found


def test_the_trials_are_of_the_folded_network_and_are_rebuilt_alike(run):
    for number in (0, 5):
        rebuilt = transform_trial(run.folder, number, data=DATA, model=net(), check=True)
        assert rebuilt.evaluation.loss == run.trial(number).metrics["loss"]
        kinds = [type(m) for m in rebuilt.model.modules()]
        assert kinds.count(nn.BatchNorm2d) == 1
        assert nn.BatchNorm1d not in kinds
        # The bits are those of the folded weights.
        layers = [rebuilt.graph.model.get_submodule(path) for path in ("first", "fc1")]
        for layer, (weight, bias) in zip(layers, by_hand(net()), strict=True):
            assert torch.allclose(layer.weight, weight, rtol=1e-6)
            assert torch.allclose(layer.bias, bias, rtol=1e-6)
        for site, path in (("first", "first"), ("fc1", "fc1")):
            weight = rebuilt.graph.model.get_submodule(path).weight
            form = rebuilt.formats[site]["weight"]
            assert torch.equal(rebuilt.model.get_submodule(path).weight, form.round(weight))


def test_the_plan_says_what_was_folded_and_the_search_how_near_it_is(run):
    notes = "\n".join(run.notes)
    assert "bn1 into first, bn3 into fc1" in notes
    assert "the batch norm bn2 is not folded, and stays in float: it follows add" in notes
    assert "measured on 15 samples" in notes
    assert "the same up to float error" in notes


def test_explaining_reads_the_folded_run(run):
    places = {effects.place.partition("/")[0] for effects in run.explain().effects}
    assert places == {"first", "second", "fc1", "fc2"}


def test_the_float_model_beside_is_the_users(run):
    model = net()
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(torch.tensor(SPLITS["val"][0])), torch.tensor(SPLITS["val"][1]))
    assert run.reference["loss"] == pytest.approx(float(loss), rel=1e-6)


def test_a_search_that_is_continued_is_the_same_and_another_is_refused(run, tmp_path):
    search(tmp_path, n_trials=3)
    with pytest.raises(RunError, match="folded"):
        search(tmp_path, fold_batch_norm=False)
    again = search(tmp_path)
    # With a small budget, an exhaustive search begins elsewhere.
    found, expected = ({str(t.config): t.metrics for t in of.trials} for of in (again, run))
    assert found == expected


def test_without_the_key_nothing_is_folded(tmp_path, run):
    plain = search(tmp_path, fold_batch_norm=False)
    assert not any("folded" in note for note in plain.notes)
    rebuilt = transform_trial(plain.folder, 0, data=DATA, model=net())
    assert nn.BatchNorm1d in [type(m) for m in rebuilt.model.modules()]
    assert [t.metrics["loss"] for t in plain.trials] != [t.metrics["loss"] for t in run.trials]
    assert plain.reference["loss"] == run.reference["loss"]


def test_a_worker_folds_to_the_same_bits():
    config = _configured(None, net(), DATA, SPACE, ["loss"], "brute_force", {"fold_batch_norm": True})
    evaluator = make_plan(config, model=net(), dataset=DATA).evaluator
    codes = evaluator.space.numbered(0, 4)
    sent = open_evaluator(pickle.loads(pickle.dumps(evaluator.job)))  # noqa: S301
    assert np.array_equal(sent.evaluate(codes).values["loss"], evaluator.evaluate(codes).values["loss"])


@pytest.mark.parametrize("trained", [False, True])
def test_other_widths_and_training_go_on_from_the_folded_network(trained, tmp_path):
    joint = {"name": "joint", "widths": WIDTHS, "quantize": SPACE}
    strategy = {"name": "evolution", "sw_runner": {"basic_train": {"max_epochs": 1}} if trained else {}}
    found = search(tmp_path, space=joint, strategy=strategy, n_trials=4)
    rebuilt = transform_trial(found.folder, 1, data=DATA, model=net(), check=True)
    assert rebuilt.evaluation.loss == found.trial(1).metrics["loss"]
    assert nn.BatchNorm1d not in [type(m) for m in rebuilt.model.modules()]
    assert any("trained without them" in note for note in found.notes) == trained


def test_finetuning_and_equalisation_start_from_the_folded_network(tmp_path):
    more = {"search.finetune.trials": 1, "search.finetune.max_epochs": 1, "search.calibration.equalisation": True}
    found = search(tmp_path, n_trials=3, **more, metrics=["accuracy", "loss", "average_bitwidth"])
    (number,) = [t.number for t in found.trials if t.finetuned is not None]
    rebuilt = transform_trial(found.folder, number, data=DATA, model=net(), check=True)
    trial = found.trial(number)
    assert rebuilt.evaluation.loss == (trial.finetuned.metrics if trial.finetuned.kept else trial.metrics)["loss"]


def test_new_weights_have_nothing_to_fold(tmp_path):
    strategy = {"name": "evolution", "sw_runner": {"basic_train": {"max_epochs": 1, "init": "fresh"}}}
    with pytest.raises(ConfigError, match="init = 'fresh'"):
        search(tmp_path, strategy=strategy)


class Odd(nn.Module):
    """One batch norm for each reason why it is not folded."""

    def __init__(self):
        super().__init__()
        self.input, self.twice, self.current = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.current.track_running_stats, self.current.running_mean, self.current.running_var = False, None, None
        self.read, self.shared, self.turned = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.hooked, self.unused, self.tokens = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm1d(3)
        self.a, self.b, self.c, self.d, self.e = (nn.Conv2d(3, 3, 1) for _ in range(5))
        self.fc, self.back, self.last = nn.Linear(36, 36), nn.ConvTranspose2d(3, 3, 1), nn.Linear(36, 3)
        self.hooked.register_forward_hook(lambda module, inputs, output: output + 0)

    def forward(self, x):
        x = self.current(self.c(self.twice(self.a(self.twice(self.a(self.input(x)))))))
        x = self.b(x)
        x = self.read(x) + x
        x = self.hooked(self.e(self.turned(self.back(x))))
        return self.last(self.tokens(self.fc(x.flatten(2)))).mean(1)


REASONS = {
    "input": "it follows the input",
    "twice": "called several times",
    "current": "no running statistics",
    "read": "others read the output of b too",
    "turned": "it follows back",
    "hooked": "hook",
    "unused": "does not call it",
    "shared": "does not call it",
    "tokens": "another dimension",
}


def test_every_norm_that_is_not_folded_has_a_reason():
    graph = capture(Odd().eval(), torch.randn(2, 3, 6, 6))
    result = folded(graph)
    assert result.into == {}
    assert result.kept.keys() == REASONS.keys()
    for path, words in REASONS.items():
        assert words in result.kept[path], path


def test_norms_with_the_same_reason_are_one_note():
    into, kept = {f"n{i}": f"c{i}" for i in range(9)}, {f"k{i}": "it follows add" for i in range(9)} | {"o": "it hums"}
    changed = Folded(capture(net(), torch.randn(2, 3, 6, 6)), into, kept=kept)
    config = _configured(None, net(), DATA, SPACE, ["loss"], "brute_force", {"fold_batch_norm": True})
    first, *others = folding_notes(config, changed, trains=False)
    assert "n0 into c0, n1 into c1, n2 into c2, n3 into c3, n4 into c4, n5 into c5 and 3 more. The float" in first
    assert others == [
        "9 batch norms are not folded, and stay in float (k0, k1, k2, k3, k4, k5 and 3 more): it follows add",
        "the batch norm o is not folded, and stays in float: it hums",
    ]


@max_examples(25)
@given(networks())
def test_a_folded_network_computes_the_same_and_names_every_norm(model):
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, *Network.shape, generator=torch.Generator().manual_seed(0))
    result = folded(capture(model, x))
    norms = {path for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert result.into.keys() | result.kept.keys() == norms
    assert not result.into.keys() & result.kept.keys()
    left = {path for path, m in result.graph.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert left == set(result.kept)
    with torch.no_grad():
        expected, found = model.eval()(x), result.graph.model(x)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
