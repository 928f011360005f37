"""Other tasks than classification, as a user types them: train, search, transform, report, and the same numbers."""

import json

import numpy as np
import pytest
from journey import rows

pytestmark = pytest.mark.journey

#: A search of a task on data.npz with the model in nets.py.
SEARCH = """\
task = "{task}"
model = "nets:net"
dataset = "npz"
dataset_path = "data.npz"
project = "run"
max_epochs = {epochs}
batch_size = 32
learning_rate = 1e-2
accelerator = "cpu"
{top}

[search.search_space.setup]
by = "type"

[search.search_space.seed.{layers}.config]
name = ["integer"]
data_in_width = [4, 8]
weight_width = [3, 8]
bias_width = [8]

[search.strategy]
name = "brute_force"

[search.strategy.sw_runner.basic_evaluation]
{more}

[search.strategy.hw_runner.average_bitwidth]

[search.strategy.metrics]
{leading} = {{}}
average_bitwidth = {{}}
"""
REGRESSION = """\
from torch import nn

def net(sample_shape, num_classes):
    return nn.Sequential(nn.Linear(*sample_shape, 24), nn.ReLU(), nn.Linear(24, num_classes))
"""


def written(shell, arrays, net, leading, task, top="", more="", epochs=12, layers="linear"):
    np.savez(shell.folder / "data.npz", **arrays)
    shell.write("nets.py", net)
    text = SEARCH.format(task=task, top=top, more=more, epochs=epochs, leading=leading, layers=layers)
    return shell.write("task.toml", text)


def numbers(outputs=2, samples=900):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(samples, 5)).astype(np.float32)
    y = np.stack([np.sin(x[:, 0]) + x[:, 1] * x[:, 2], x[:, 3] - x[:, 4]], axis=1)[:, :outputs]
    return {"X": x, "y": (y + 0.05 * rng.normal(size=y.shape)).astype(np.float32)}


def checked(shell, leading):
    """The front, of which three trials are rebuilt and evaluated alone: the same bits as in the search."""
    front = json.loads((shell.folder / "runs/run/best.json").read_text())
    for entry in list(front.values())[:: max(1, len(front) // 2)]:
        found = entry["software_metrics"]
        typed = shell("transform", "--run", "runs/run", "--trial", entry["number"], "--check", "--json")
        rebuilt = json.loads(typed.out)
        assert {name: rebuilt[name] for name in found if name in rebuilt} == found
        assert leading in found
    return list(front.values())


def test_a_regression(shell):
    written(shell, numbers(), REGRESSION, "mse", "regression", "[search.constraints]\nmse_increase = '<= 900 %'")
    typed = shell("train", "--config", "task.toml")
    assert ", mse 0." in typed.out
    typed = shell("plan", "--config", "task.toml")
    assert "16" in typed.out
    typed = shell("search", "--config", "task.toml")
    assert "trained earlier with these settings" in typed.err
    assert "16 of 16 candidates evaluated (space exhausted)" in typed.out
    assert "test mse" in typed.out.replace("\n", " ")
    assert "constraints: mse_increase <= 900 %; " in typed.out
    front = checked(shell, "mse")
    assert len(front) >= 2
    for entry in front:
        low, high = entry["intervals"]["mse"]
        assert low < entry["software_metrics"]["mse"] < high
        assert set(entry["test_metrics"]) == {"loss", "mse", "mae", "r2"}
        assert entry["software_metrics"]["loss"] == entry["software_metrics"]["mse"]
    number = front[-1]["number"]
    typed = shell("transform", "--run", "runs/run", "--trial", number, "--check")
    mse = front[-1]["software_metrics"]["mse"]
    assert f"mse {mse!r}, mae " in typed.out
    assert f"(the search found {mse!r})" in typed.out
    typed = shell("test", "--config", "task.toml", "--json")
    assert set(json.loads(typed.out)) == {"loss", "mse", "mae", "r2", "samples", "split"}
    shell("report", "runs/run")
    page = (shell.folder / "runs/run/report.html").read_text()
    assert "test mse" in page
    assert "accuracy" not in page.split("<body")[1].split("<script")[0]
    # Nothing is evaluated again by the same command.
    before = rows(shell.folder / "runs/run/trials.sqlite")
    typed = shell("search", "--config", "task.toml")
    assert "16 trials are known from earlier sessions" in typed.err
    assert rows(shell.folder / "runs/run/trials.sqlite") == before


def test_a_regression_is_trained_in_the_search_and_fine_tuned(shell):
    more = "[search.strategy.sw_runner.basic_train]\nmax_epochs = 1\n[search.finetune]\ntrials = 1\nmax_epochs = 2"
    written(shell, numbers(1, 300), REGRESSION, "r2", "regression", more=more, epochs=3)
    typed = shell("search", "--config", "task.toml")
    assert "16 of 16 candidates evaluated (space exhausted)" in typed.out
    assert "fine-tuning trial" in typed.err
    front = [entry for entry in checked_without_finetuned(shell) if entry["software_metrics"]["trained_epochs"] == 1]
    assert front


def checked_without_finetuned(shell):
    front = list(json.loads((shell.folder / "runs/run/best.json").read_text()).values())
    for entry in front[:: max(1, len(front) // 2)]:
        typed = shell("transform", "--run", "runs/run", "--trial", entry["number"], "--check", "--json")
        kept = entry.get("finetuned", {}).get("kept", False)
        found = entry["finetuned"]["metrics"] if kept else entry["software_metrics"]
        assert json.loads(typed.out)["r2"] == found["r2"]
    return front


@pytest.mark.long
def test_worker_processes_and_another_strategy_measure_the_same(shell):
    written(shell, numbers(1, 300), REGRESSION, "mae", "regression", 'task_settings.loss = "mae"', epochs=2)
    shell("search", "--config", "task.toml")
    alone = {row[1]: row[3:] for row in rows(shell.folder / "runs/run/trials.sqlite")}
    assert all(metrics[0] == metrics[2] for metrics in alone.values()), "the loss is the mean absolute error"
    shell("search", "--config", "task.toml", "--project", "two", "--n-jobs", 2, "--strategy", "evolution")
    together = {row[1]: row[3:] for row in rows(shell.folder / "runs/two/trials.sqlite")}
    assert together
    assert all(alone[code] == metrics for code, metrics in together.items())


@pytest.mark.parametrize(
    ("flags", "more", "message"),
    [
        (["--task", "regresion"], "", "there is no task called 'regresion'; allowed: "),
        ([], "[search.constraints]\naccuracy_drop = '<= 1 %'", "there is no 'accuracy_drop' here; allowed: loss_incr"),
        ([], "[task_settings]\nlos = 'mse'", "unknown key; allowed: output, num_outputs, training_loss, loss"),
        (["--task", "classification"], "", "no configured runner produces this metric; allowed: loss, accuracy"),
    ],
)
def test_what_a_task_does_not_have_is_refused_before_any_work(shell, flags, more, message):
    written(shell, numbers(1, 300), REGRESSION, "mse", "regression", more=more)
    typed = shell("search", "--config", "task.toml", *flags, code=2)
    assert message in typed.err.replace("\n", " ")
    assert not (shell.folder / "runs").exists()


def test_data_with_other_targets_is_refused(shell):
    config = written(shell, numbers(1, 300), REGRESSION, "loss", "classification")
    typed = shell("search", "--config", config, code=2)
    assert "For other tasks there is the key task, e.g. task = 'regression'" in typed.err.replace("\n", " ")
    written(shell, numbers(1, 300), REGRESSION, "mse", "regression")
    typed = shell("search", "--config", "task.toml", "--dataset", "digits", "--dataset-path", "NA", code=2)
    assert "has classes as targets, and task = 'regression' needs numbers" in typed.err.replace("\n", " ")


def test_a_multilabel_classification_that_ends_in_a_sigmoid(shell):
    x = np.random.default_rng(0).normal(size=(600, 6)).astype(np.float32)
    y = np.stack([x[:, 0] > 0, x[:, 1] + x[:, 2] > 1, x[:, 3] * x[:, 4] > 0.5], axis=1)
    net = REGRESSION.replace("num_classes))", "num_classes), nn.Sigmoid())")
    top = "[search.constraints]\nmicro_f1_drop = '<= 60 %'"
    written(shell, {"X": x, "y": y}, net, "micro_f1", "multilabel", top)
    typed = shell("search", "--config", "task.toml")
    assert "its outputs are class probabilities, no logits. `loss` and training go by them" in typed.err.replace(
        "\n", " "
    )
    front = checked(shell, "micro_f1")
    assert front[-1]["software_metrics"]["micro_f1"] > 0.8
    assert set(front[-1]["intervals"]) == {"micro_f1", "macro_f1", "exact_match", "auc"}


UNET = """\
import torch
from torch import nn

def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

class UNet(nn.Module):
    def __init__(self, channels, classes, width=8):
        super().__init__()
        self.down, self.pool, self.bottom = block(channels, width), nn.MaxPool2d(2), block(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.join, self.head = block(2 * width, width), nn.Conv2d(width, classes, 1)

    def forward(self, x):
        skip = self.down(x)
        up = self.up(self.bottom(self.pool(skip)))
        return self.head(self.join(torch.cat([skip, up], dim=1)))

def net(sample_shape, num_classes):
    return UNet(sample_shape[0], num_classes)
"""


def pictures(samples=160, size=16):
    """Bright discs and dark squares on noise: classes 1 and 2; a border without labels."""
    rng = np.random.default_rng(0)
    x = 0.3 * rng.normal(size=(samples, 1, size, size))
    y = np.zeros((samples, size, size), dtype=np.uint8)
    rows, columns = np.mgrid[:size, :size]
    for i in range(samples):
        a, b, c, d = rng.integers(3, size - 3, size=4)
        y[i][(rows - a) ** 2 + (columns - b) ** 2 < 8] = 1
        y[i][(abs(rows - c) < 2) & (abs(columns - d) < 2)] = 2
    x[:, 0] += (y == 1) - 1.0 * (y == 2)
    y[:, 0] = 255
    return {"X": x.astype(np.float32), "y": y, "class_names": np.array(["none", "disc", "square"])}


def test_a_segmentation_with_a_u_net(shell):
    top = "[search.constraints]\nmiou_drop = '<= 30 %'\n[task_settings]\nclass_weights = [0.5, 1.0, 1.0]"
    more = "[search.calibration]\nnum_samples = 32\nbatch_norm = true"
    written(shell, pictures(), UNET, "miou", "segmentation", top, more, layers="conv2d", epochs=8)
    # Four layers with four options each: more than brute force should take here.
    typed = shell("search", "--config", "task.toml", "--strategy", "evolution", "--n-trials", 24)
    assert "24 of 256 candidates evaluated" in typed.out
    front = checked(shell, "miou")
    best = max(entry["software_metrics"]["miou"] for entry in front)
    assert best > 0.6
    for entry in front:
        low, high = entry["intervals"]["miou"]
        assert low <= entry["software_metrics"]["miou"] <= high
    typed = shell("test", "--config", "task.toml")
    assert "miou 0." in typed.out


LANGUAGE = """\
import torch
from torch import nn

class Language(nn.Module):
    def __init__(self, vocabulary, width=16):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mix = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight  # tied

    def forward(self, ids):
        assert not ids.is_floating_point()
        return self.head(self.mix(self.embedding(ids))[0])

def net(sample_shape, num_classes):
    return Language(num_classes)
"""


def sentences(samples=400, length=12, vocabulary=20):
    """Each token follows from the one before, nine times of ten."""
    rng = np.random.default_rng(0)
    after = rng.permutation(vocabulary)
    tokens = [rng.integers(0, vocabulary, size=samples)]
    for _ in range(length):
        tokens.append(np.where(rng.random(samples) < 0.9, after[tokens[-1]], rng.integers(0, vocabulary, size=samples)))
    ids = np.stack(tokens, axis=1)
    asked = ids[:, 1:].copy()
    asked[::5, 8:] = -100
    return {"X": ids[:, :-1], "y": asked}


def test_a_language_model_with_tied_embeddings(shell):
    top = "[search.constraints]\nperplexity_increase = '<= 50 %'"
    written(shell, sentences(), LANGUAGE, "perplexity", "language_modelling", top, epochs=10)
    typed = shell("search", "--config", "task.toml")
    front = checked(shell, "perplexity")
    assert all(1 < entry["software_metrics"]["perplexity"] < 20 for entry in front)
    assert all(entry["software_metrics"]["token_accuracy"] > 0.5 for entry in front)
    assert "is stored in float, whatever formats the sites get" in typed.err.replace("\n", " ")
    for entry in front:
        low, high = entry["intervals"]["perplexity"]
        assert low < entry["software_metrics"]["perplexity"] < high


def test_tied_embeddings_get_a_format_for_each_use(shell):
    written(shell, sentences(), LANGUAGE, "perplexity", "language_modelling", epochs=4, layers="embedding")
    text = (shell.folder / "task.toml").read_text()
    only = text.replace("data_in_width = [4, 8]\nweight_width = [3, 8]\nbias_width = [8]", "weight_width = [3, 8]")
    shell.write("task.toml", only)
    typed = shell("search", "--config", "task.toml")
    assert "2 of 2 candidates evaluated" in typed.out
    checked(shell, "perplexity")


AUTOENCODER = """\
from torch import nn

def net(sample_shape, num_classes):
    return nn.Sequential(nn.Linear(*sample_shape, 3), nn.ReLU(), nn.Linear(3, *sample_shape))
"""


def test_an_autoencoder_for_anomalies(shell):
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(500, 2)) @ rng.normal(size=(2, 6)) + 0.1 * rng.normal(size=(500, 6))
    x = np.concatenate([normal, rng.normal(size=(100, 6))]).astype(np.float32)
    top = "[search.constraints]\nauc_drop = '<= 20 %'"
    arrays = {"X": x, "y": np.arange(600) >= 500}
    written(shell, arrays, AUTOENCODER, "auc", "anomaly_detection", top, epochs=20)
    typed = shell("search", "--config", "task.toml")
    assert "70 anomalies of train are left out: training sees normal samples only" in typed.err.replace("\n", " ")
    front = checked(shell, "auc")
    assert max(entry["software_metrics"]["auc"] for entry in front) > 0.8
    for entry in front:
        low, high = entry["intervals"]["auc"]
        assert low <= entry["software_metrics"]["auc"] <= high
        assert set(entry["test_metrics"]) == {"loss", "auc", "average_precision"}
    shell("report", "runs/run")
    assert "test auc" in (shell.folder / "runs/run/report.html").read_text()


def test_a_search_without_labels_and_with_two_inputs_from_a_file(shell):
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 20, size=(200, 6)), rng.integers(0, 2, size=(200, 6))
    top = "labels = false\nload_name = 'net.pt'\n[task_settings]\noutput = 1\nnum_outputs = 2"
    arrays = {"input_ids": ids, "attention_mask": mask}
    written(shell, arrays, MASKED, "agreement", "classification", top)
    shell.python("import torch, nets; torch.manual_seed(1); torch.save(nets.Masked(20).state_dict(), 'net.pt')")
    shell("search", "--config", "task.toml")
    front = checked(shell, "agreement")
    assert max(entry["software_metrics"]["agreement"] for entry in front) > 0.9
    assert set(front[0]["test_metrics"]) == {"loss", "agreement"}
    # A checkpoint that is gone does not matter: the run folder has the weights.
    (shell.folder / "net.pt").unlink()
    shell("transform", "--run", "runs/run", "--trial", front[0]["number"], "--check")
    typed = shell("train", "--config", "task.toml", code=2)
    assert "labels = false, and the training of a float model needs them" in typed.err.replace("\n", " ")


MASKED = """\
import numpy as np
import torch
from torch import nn

class Masked(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.embedding, self.fc, self.head = nn.Embedding(vocabulary, 8), nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, input_ids, attention_mask):
        hidden = (self.embedding(input_ids) * attention_mask.unsqueeze(2)).sum(1)
        return hidden, self.head(torch.relu(self.fc(hidden)))

def net(sample_shape, num_classes):
    assert sample_shape == {"input_ids": (6,), "attention_mask": (6,)}
    return Masked(20)

def data():
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 20, size=(600, 6)), rng.integers(0, 2, size=(600, 6))
    return {"input_ids": ids, "attention_mask": mask}, (((ids > 12) * mask).sum(1) > 1).astype(int)
"""


def test_several_inputs_and_outputs_by_name(shell):
    written(shell, numbers(1, 300), MASKED, "accuracy", "classification", "[task_settings]\noutput = 1", epochs=6)
    text = (shell.folder / "task.toml").read_text()
    shell.write("task.toml", text.replace('dataset = "npz"\ndataset_path = "data.npz"', 'dataset = "nets:data"'))
    typed = shell("search", "--config", "task.toml")
    assert "16 of 16 candidates evaluated (space exhausted)" in typed.out
    front = checked(shell, "accuracy")
    assert max(entry["software_metrics"]["accuracy"] for entry in front) > 0.7
    shell.write("task.toml", (shell.folder / "task.toml").read_text().replace("output = 1", ""))
    typed = shell("search", "--config", "task.toml", "--project", "other", code=2)
    assert "several outputs (0, 1); say which one the task is about" in typed.err.replace("\n", " ")


def test_init_writes_a_file_for_a_task(shell):
    written(shell, numbers(1, 200), REGRESSION, "mse", "regression")
    words = ["--model", "nets:net", "--dataset", "npz", "--dataset-path", "data.npz", "--task", "regression"]
    shell("init", *words, "--output", "new.toml")
    text = (shell.folder / "new.toml").read_text()
    assert 'task = "regression"' in text
    assert 'mse.direction = "minimize"' in text
    typed = shell("search", "--config", "new.toml", "--max-epochs", 1)
    assert "36 of 36 candidates evaluated" in typed.out


WITHIN = """\
from dataclasses import dataclass
from functools import partial
from bitfront.tasks.base import TaskMetric, mean
from bitfront.tasks.regression import Regression

@dataclass(frozen=True)
class Within(Regression):
    "A regression whose answers count if they are within 0.2."

    metrics = (
        TaskMetric("within", "", "maximize", "share within 0.2", partial(mean, name="within"), share=True),
        *Regression.metrics,
    )

    def results(self, outputs, targets, ends):
        found = super().results(outputs, targets, ends)
        return {**found, "within": (found["absolute"] <= 0.2).double()}
"""


def test_a_task_of_the_user_in_worker_processes(shell):
    shell.write("tasks.py", WITHIN)
    top = "[search.constraints]\nwithin_drop = '<= 90 %'"
    written(shell, numbers(1, 300), REGRESSION, "within", "tasks:Within", top, epochs=3)
    typed = shell("search", "--config", "task.toml", "--n-jobs", 2)
    assert "16 of 16 candidates evaluated (space exhausted)" in typed.out
    assert "worker processes measure another" not in typed.err
    assert checked(shell, "within")


def test_a_comparison_of_strategies_for_a_task(shell):
    written(shell, numbers(1, 300), REGRESSION, "mse", "regression", epochs=2)
    words = ["--strategy", "brute_force", "--strategy", "evolution", "--seeds", 2, "--n-trials", 8]
    typed = shell("compare", "--config", "task.toml", *words)
    assert "evolution" in typed.out


def test_class_weights_train_another_network(shell):
    x = np.random.default_rng(0).normal(size=(400, 5)).astype(np.float32)
    arrays = {"X": x, "y": (x[:, 0] + x[:, 1] > 1.5).astype(int)}
    written(shell, arrays, REGRESSION, "accuracy", "classification", epochs=2)
    plain = json.loads(shell("train", "--config", "task.toml", "--json").out)
    top = "[task_settings]\nclass_weights = [1.0, 5.0]"
    written(shell, arrays, REGRESSION, "accuracy", "classification", top, epochs=2)
    weighted = json.loads(shell("train", "--config", "task.toml", "--json").out)
    assert weighted["train_loss"] != plain["train_loss"]
    shell("search", "--config", "task.toml")
    checked(shell, "accuracy")
