"""Networks that do not end in logits: what they give is recognised, and judged as what it is. The judge is torch."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import bitfront as bf
from bitfront import kernels
from bitfront.data.arrays import from_splits
from bitfront.graph import capture
from bitfront.graph.outputs import outputs_note
from bitfront.population import train_population
from bitfront.training import TrainSettings, train

CLASSES = 5


class Body(nn.Module):
    """Two layers, and an end that is given as a function."""

    def __init__(self, end):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.end = nn.Linear(6, 12), nn.Linear(12, CLASSES), end

    def forward(self, x):
        return self.end(self.last(torch.relu(self.first(x))))


class Untraceable(Body):
    def forward(self, x):
        z = self.last(torch.relu(self.first(x)))
        return self.end(z if z.sum() > -1e9 else -z)


class Called(nn.Module):
    """A function as a module that torch.fx looks into."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


ENDS = {
    "module": (nn.Softmax(1), "probabilities"),
    "functional": (Called(lambda z: functional.softmax(z, dim=-1)), "probabilities"),
    "method": (Called(lambda z: z.softmax(-1)), "probabilities"),
    "in a Sequential": (nn.Sequential(nn.Identity(), nn.Softmax(dim=-1), nn.Flatten()), "probabilities"),
    "views follow": (Called(lambda z: z.softmax(1).unsqueeze(2).contiguous().flatten(1)), "probabilities"),
    "clamped": (Called(lambda z: z.softmax(1).clamp(1e-7, 1.0)), "probabilities"),
    "temperature": (Called(lambda z: torch.softmax(z / 3, 1)), "probabilities"),
    "mean of two": (Called(lambda z: (z.softmax(1) + (2 * z).softmax(1)) / 2), "probabilities"),
    "by hand": (Called(lambda z: z.exp() / z.exp().sum(1, keepdim=True)), "probabilities"),
    "softmin": (nn.Softmin(1), "probabilities"),
    "LogSoftmax": (nn.LogSoftmax(1), "log_probabilities"),
    "log_softmax, then a view": (Called(lambda z: functional.log_softmax(z, 1).view(-1, CLASSES)), "log_probabilities"),
    "log of softmax": (Called(lambda z: torch.log(z.softmax(1))), "log_probabilities"),
    "softmax().log()": (Called(lambda z: z.softmax(1).clamp(min=1e-9).log()), "log_probabilities"),
    "Sigmoid": (nn.Sequential(nn.Sigmoid(), nn.Dropout(0.1)), "class_probabilities"),
    "sigmoid()": (Called(lambda z: z.sigmoid().reshape(-1, CLASSES)), "class_probabilities"),
    "Hardsigmoid": (nn.Hardsigmoid(), "class_probabilities"),
    "logsigmoid()": (Called(functional.logsigmoid), "class_log_probabilities"),
    "expit": (Called(torch.special.expit), "class_probabilities"),
    "special": (Called(lambda z: torch.special.log_softmax(z, 1)), "log_probabilities"),
    "LogSigmoid": (nn.LogSigmoid(), "class_log_probabilities"),
    "nothing": (nn.Identity(), "logits"),
    "ReLU": (nn.ReLU(), "logits"),
    "softmax in the middle": (Called(lambda z: z.softmax(1) @ torch.eye(CLASSES).mul(3)), "logits"),
    "over the samples": (nn.Softmax(0), "logits"),
    "a sigmoid, scaled": (Called(lambda z: z.sigmoid() * 0.5), "logits"),
}


def by_torch(values, labels, outputs):
    """The loss, in torch's words and in float64."""
    v = values.double()
    onehot = functional.one_hot(labels, v.shape[1]).double()
    return {
        "logits": lambda: functional.cross_entropy(v, labels),
        "probabilities": lambda: functional.nll_loss(v.log(), labels),
        "log_probabilities": lambda: functional.nll_loss(v, labels),
        "class_probabilities": lambda: functional.binary_cross_entropy(v, onehot),
        "class_log_probabilities": lambda: functional.binary_cross_entropy(v.exp(), onehot),
    }[outputs]().item()


def data(n=300):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator)
    y = (x @ torch.randn(6, CLASSES, generator=generator)).argmax(1)
    a, b = n // 2, 3 * n // 4
    return {"train": (x[:a], y[:a]), "val": (x[a:b], y[a:b]), "test": (x[b:], y[b:])}


@pytest.mark.parametrize("kind", [Body, Untraceable])
@pytest.mark.parametrize("name", ENDS)
def test_what_the_outputs_are_is_recognised_and_said(name, kind):
    end, expected = ENDS[name]
    graph = capture(kind(end), data()["train"][0][:2])
    assert bool(graph.untraced) == (kind is Untraceable)
    assert graph.outputs == expected
    note = outputs_note(graph)
    changed = name == "a sigmoid, scaled" and kind is Body
    assert bool(note) == (expected != "logits" or name == "over the samples" or changed)
    assert expected == "logits" or expected.replace("_", " ") in note


@pytest.mark.parametrize("outputs", ["probabilities", "log_probabilities", "class_probabilities"])
def test_scores_are_those_of_torch(outputs):
    generator = torch.Generator().manual_seed(2)
    z = 6 * torch.randn(3, 7, 500, generator=generator)
    labels = torch.randint(7, (500,), generator=generator)
    end = {"probabilities": z.softmax(1), "log_probabilities": z.log_softmax(1), "class_probabilities": z.sigmoid()}
    values = end[outputs]
    loss, correct = kernels.score(values, labels.int(), outputs=outputs)
    for u in range(3):
        assert loss[u].item() / 500 == pytest.approx(by_torch(values[u].t(), labels, outputs), abs=2e-6)
        assert correct[u].item() == (values[u].argmax(0) == labels).sum().item()
    # In parts it is the same to the last bit, whatever the sizes of the parts.
    parts = [
        kernels.score(v, y.int(), outputs=outputs)[0]
        for v, y in zip(values.split(77, dim=2), labels.split(77), strict=True)
    ]
    assert torch.equal(torch.stack(parts).sum(0), loss)


def test_a_probability_of_zero_costs_a_hundred_nats_and_a_nan_stays_one():
    values = torch.tensor([[[0.0, 1e-42, 1.0, torch.nan], [1.0, 1.0, 0.0, 0.5]]])
    each = [kernels.score(values[:, :, i : i + 1], torch.zeros(1).int(), outputs="probabilities") for i in range(4)]
    losses = [float(loss) for loss, _ in each]
    assert losses[0] == 100
    assert losses[1] == pytest.approx(-float(torch.tensor(1e-42).double().log()), abs=1e-5)
    assert losses[2] == 0
    assert losses[3] != losses[3]
    minus_infinity = torch.tensor([[[-torch.inf], [0.0]]])
    assert float(kernels.score(minus_infinity, torch.zeros(1).int(), outputs="log_probabilities")[0]) == 100


def searched(model, splits, tmp_path, overrides=None, **tables):
    space = {
        "linear": {
            "name": ["integer", "NA"],
            "data_in_width": [6],
            "data_in_frac_width": "auto",
            "weight_width": [3, 8],
            "weight_frac_width": "auto",
        }
    }
    return bf.search(
        model=model,
        data=splits,
        space=space,
        metrics={"accuracy": "maximize", "loss": "minimize", "model_size": "minimize"},
        strategy={"name": "brute_force", **tables},
        project_dir=str(tmp_path),
        project="run",
        **(overrides or {}),
    )


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", [Body, Untraceable])
@pytest.mark.parametrize("name", ["views follow", "LogSoftmax", "log of softmax", "sigmoid()"])
def test_every_trial_has_the_loss_of_what_it_gives(name, kind, tmp_path):
    end, outputs = ENDS[name]
    splits = data()
    model = kind(end).eval()
    run = searched(model, splits, tmp_path)
    x, y = splits["val"]
    for trial in run.trials:
        made = bf.transform_trial(run.folder, trial.number, model=model, data=from_splits(splits), check=True)
        with torch.no_grad():
            values = made.model(x)
        assert trial.metrics["loss"] == pytest.approx(by_torch(values, y, outputs), abs=2e-6)
        assert made.evaluation.loss == trial.metrics["loss"]
        assert trial.metrics["accuracy"] == pytest.approx((values.argmax(1) == y).float().mean().item())
        if trial.test_metrics:
            x_test, y_test = splits["test"]
            with torch.no_grad():
                own = by_torch(made.model(x_test), y_test, outputs)
            assert trial.test_metrics["loss"] == pytest.approx(own, abs=2e-6)
    assert any(trial.test_metrics for trial in run.trials)


@pytest.mark.parametrize("end", [nn.Softmax(1), nn.LogSoftmax(1), nn.Sequential(nn.Softmax(1), nn.Flatten())])
def test_training_with_a_softmax_is_training_without_it(end):
    splits = from_splits(data())
    settings = TrainSettings(max_epochs=5, batch_size=32, learning_rate=1e-2)
    plain = train(Body(nn.Identity()), splits, settings)
    model = Body(end)
    outputs = capture(model, splits.split("train")[0][:2]).outputs
    found = train(model, splits, settings, outputs=outputs)
    for record, expected in zip(found.history, plain.history, strict=True):
        assert record.train_loss == pytest.approx(expected.train_loss, abs=1e-4)
        assert record.val_loss == pytest.approx(expected.val_loss, abs=1e-4)
    (member,) = train_population([model], splits, settings, outputs=outputs)
    assert "outputs" in member.alone
    assert [dataclasses.asdict(r) for r in member.history] == [dataclasses.asdict(r) for r in found.history]


def test_training_of_a_sigmoid_lowers_its_binary_cross_entropy():
    splits = from_splits(data())
    model = Body(nn.Sigmoid())
    result = train(
        model, splits, TrainSettings(max_epochs=30, learning_rate=1e-2, batch_size=32), outputs="class_probabilities"
    )
    model.load_state_dict(result.last_state)
    x, y = splits.split("val")
    with torch.no_grad():
        own = by_torch(model.eval()(x), y, "class_probabilities")
    assert result.history[-1].val_loss == pytest.approx(own, abs=1e-5)
    assert own < 0.6 * result.history[0].val_loss


def test_candidates_that_are_trained_are_trained_on_the_loss_of_what_they_give(tmp_path):
    splits = data()
    runner = {"basic_train": {"max_epochs": 3, "batch_size": 32}, "basic_evaluation": {}}
    losses = []
    for name, end in (("plain", nn.Identity()), ("softmax", nn.Softmax(1))):
        run = searched(Body(end), splits, tmp_path / name, sw_runner=runner)
        losses.append([trial.metrics["loss"] for trial in run.trials])
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)


def test_fine_tuning_goes_by_what_the_network_gives(tmp_path):
    found = []
    for name, end in (("plain", nn.Identity()), ("softmax", nn.Softmax(1))):
        tuned = {"search.finetune.trials": 2, "search.finetune.max_epochs": 3}
        run = searched(Body(end).eval(), data(), tmp_path / name, overrides=tuned)
        trials = [trial.finetuned for trial in run.trials if trial.finetuned]
        found.append([(t.number, t.metrics["loss"], t.test["loss"]) for t in trials])
    assert len(found[0]) == 2
    assert [t[0] for t in found[1]] == [t[0] for t in found[0]]
    for softmax, plain in zip(found[1], found[0], strict=True):
        assert softmax == pytest.approx(plain, abs=1e-4)


def test_the_commands_train_and_test_go_by_what_the_network_gives(tmp_path, monkeypatch):
    (tmp_path / "mine_outputs.py").write_text(
        "from torch import nn\n"
        "def plain(sample_shape, num_classes):\n"
        "    return nn.Sequential(nn.Linear(*sample_shape, 8), nn.ReLU(), nn.Linear(8, num_classes))\n"
        "def softmax(sample_shape, num_classes):\n"
        "    return nn.Sequential(*plain(sample_shape, num_classes), nn.Softmax(-1))\n"
        "def data():\n"
        "    import torch\n"
        "    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))\n"
        "    return x, (x.sum(1) > 0).long()\n"
    )
    monkeypatch.chdir(tmp_path)
    tests, notes = [], []

    class Heard(bf.Events):
        def note(self, text):
            notes.append(text)

    for name in ("plain", "softmax"):
        Path(f"{name}.toml").write_text(
            f'model = "mine_outputs:{name}"\ndataset = "mine_outputs:data"\nproject = "{name}"\nmax_epochs = 3\n'
        )
        config = bf.load_config(f"{name}.toml")
        bf.train(config, events=Heard())
        tests.append(bf.test(config, events=Heard()))
    assert tests[1].loss == pytest.approx(tests[0].loss, abs=1e-5)
    assert tests[1].correct == tests[0].correct
    assert sum("Softmax" in note for note in notes) == 2
