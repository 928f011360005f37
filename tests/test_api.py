"""The Python API: the same searches as from a file, with objects; and what a run answers."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import bitfront as bf
from bitfront.errors import CheckpointError, ConfigError, MissingExtraError, RunError

SPACE = {
    "linear": {
        "name": ["integer"],
        "data_in_width": [4, 8],
        "data_in_frac_width": ["auto"],
        "weight_width": [2, 4, 8],
        "weight_frac_width": ["auto"],
        "bias_width": [8],
        "bias_frac_width": ["auto"],
    }
}
METRICS = {"accuracy": "maximize", "average_bitwidth": "minimize"}
FILE = """\
model = "digits-mlp"
dataset = "npz"
dataset_path = "{path}"
project = "file"
project_dir = "{runs}"
max_epochs = 1
batch_size = 64
learning_rate = 1e-2
accelerator = "cpu"
[search.search_space]
setup.by = "type"
[search.search_space.seed.linear.config]
name = ["integer"]
data_in_width = [4, 8]
data_in_frac_width = ["auto"]
weight_width = [2, 4, 8]
weight_frac_width = ["auto"]
bias_width = [8]
bias_frac_width = ["auto"]
[search.strategy]
name = "brute_force"
[search.strategy.sw_runner.basic_evaluation]
[search.strategy.hw_runner.average_bitwidth]
[search.strategy.metrics]
accuracy.direction = "maximize"
average_bitwidth.direction = "minimize"
"""


class Net(nn.Module):
    """8-6-3: the sites fc1, relu, fc2."""

    def __init__(self):
        super().__init__()
        self.fc1, self.relu, self.fc2 = nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc2(self.relu(self.fc1(x)))


class Listener(bf.Events):
    """Remembers the events it hears."""

    def __init__(self):
        self.heard, self.notes = [], []

    def note(self, text):
        self.notes.append(text)

    def planned(self, plan, seconds):
        self.heard.append("planned")

    def training(self, settings, samples):
        self.heard.append("training")

    def epoch(self, record):
        self.heard.append("epoch")

    def step(self, step, loss):
        assert loss() > 0

    def progress(self, progress, plan):
        self.heard.append("progress")
        self.done = progress.done

    def finishing(self):
        self.heard.append("finishing")


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    y = np.arange(600) % 3
    return (rng.normal(size=(3, 8))[y] * 1.5 + rng.normal(size=(600, 8))).astype(np.float32), y


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def search(net, arrays, folder, **more):
    given = {"space": SPACE, "metrics": METRICS, "strategy": "brute_force", **more}
    return bf.search(model=net, data=arrays, project="net", project_dir=str(folder), accelerator="cpu", **given)


@pytest.fixture(scope="module")
def run(net, arrays, tmp_path_factory):
    return search(net, arrays, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def from_file(arrays, tmp_path_factory):
    """(path of the file, its run, what was heard meanwhile)."""
    folder = tmp_path_factory.mktemp("file")
    x, y = arrays
    parts = {"train": slice(0, 300), "val": slice(300, 450), "test": slice(450, 600)}
    np.savez(folder / "data.npz", **{f"{n}_{s}": v[rows] for s, rows in parts.items() for n, v in (("X", x), ("y", y))})
    path = folder / "file.toml"
    path.write_text(FILE.format(path=folder / "data.npz", runs=folder / "runs"))
    events = Listener()
    return path, bf.search(path, events=events), events


# --- searching


def test_metrics_may_be_names_alone(net, arrays, tmp_path):
    run = search(net, arrays, tmp_path, metrics=["accuracy", "average_bitwidth"], max_size=36)
    assert run.objectives.directions == ("maximize", "minimize")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("verb", ["train", "search"])
def test_an_accelerator_that_is_not_there_is_one_warning(verb, from_file, tmp_path):
    config = bf.load_config(from_file[0], {"project_dir": str(tmp_path), "accelerator": "cuda"})
    events = Listener()
    getattr(bf, verb)(config, events=events)
    assert len([n for n in events.notes if "computing on the CPU" in n]) == 1


def test_what_is_no_model_is_refused(arrays, tmp_path):
    with pytest.raises(ConfigError, match=r"model is a int; allowed: an nn\.Module, or a name"):
        search(5, arrays, tmp_path)


def test_na_is_none_below_the_top_too(arrays, net, tmp_path):
    strategy = {"name": "brute_force", "setup": {"timeout": "NA", "n_trials": "NA", "direction": "NA"}}
    run = search(net, arrays, tmp_path, strategy=strategy)
    assert run.config.search.strategy.setup.timeout is None


def test_weights_that_stay_in_float_are_named_and_counted(arrays, tmp_path):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.fc = nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(self.lstm(x[:, None])[0][:, 0])

    events = Listener()
    run = search(Recurrent(), arrays, tmp_path, events=events)
    # The LSTM has 4 · 4 · (8 + 4) weights, and as many products per step; the linear layer 12.
    note = "in float in every candidate: 94 % of the weights, 94 % of the multiply-accumulates (lstm (LSTM))"
    assert note in events.notes
    assert run.best(minimize="average_bitwidth").metrics["average_bitwidth"] > 30


def test_what_is_printed_of_a_run_is_short(run):
    assert repr(run) == f"Run({str(run.folder)!r}: 36 trials, {len(run.front)} on the front, space exhausted)"
    assert repr(run.front[0]).startswith(f"Trial({run.front[0].number}, loss=")
    assert len(repr(run.front[0])) < 200


@pytest.mark.long
@pytest.mark.slow
def test_a_script_without_a_main_guard_gets_advice(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, bitfront as bf\n"
        "from torch import nn\n"
        "x = torch.arange(2400.).reshape(300, 8) % 7\n"
        "bf.search(model=nn.Sequential(nn.Linear(8, 3)), data=(x, torch.arange(300) % 3), n_jobs=2,\n"
        "          space={'linear': {'name': 'integer', 'weight_width': [2, 4, 8]}}, metrics=['accuracy'])\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert "put the call below `if __name__ == '__main__':`" in done.stderr


def test_a_search_of_objects(run):
    assert len(run) == len(run.trials) == run.space.size == 36
    assert [t.number for t in run.trials] == list(range(36))
    assert run.stopped == "space exhausted"
    assert set(run.trials[0].metrics) == {"loss", "accuracy", "average_bitwidth", "memory_density"}
    values = np.array([t.values for t in run.trials]) * [-1, 1]
    best = [
        t.number
        for t, row in zip(run.trials, values, strict=True)
        if not ((values <= row).all(axis=1) & (values < row).any(axis=1)).any()
    ]
    assert sorted(t.number for t in run.front) == best
    assert all(t.test_metrics for t in run.front)
    low, high = run.front[0].intervals["accuracy"]
    assert low < run.front[0].metrics["accuracy"] < high


def test_the_model_that_was_given_is_not_changed(net, arrays, tmp_path):
    model = copy.deepcopy(net).train()
    before = copy.deepcopy(model.state_dict())
    search(model, arrays, tmp_path, strategy="optuna:random", n_trials=5)
    assert model.training
    assert type(model.fc1) is nn.Linear
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_file_and_python_give_the_same_numbers(from_file, tmp_path):
    path, run, _ = from_file
    weights = run.folder / "checkpoints" / "best.pt"
    by_name = bf.search(
        model="digits-mlp",
        data="npz",
        dataset_path=str(path.parent / "data.npz"),
        space=SPACE,
        metrics=METRICS,
        strategy="brute_force",
        load_name=str(weights),
        project_dir=str(tmp_path),
        accelerator="cpu",
    )
    assert [(t.code, t.metrics) for t in by_name.trials] == [(t.code, t.metrics) for t in run.trials]
    data = bf.load_dataset("npz", bf_request(path.parent / "data.npz"))
    model = bf.build_model("digits-mlp", data.sample_shape, data.num_classes, 0)
    model.load_state_dict(torch.load(weights, weights_only=True))
    third = bf.search(path, model=model, data=data, project="objects")
    assert [(t.code, t.metrics) for t in third.trials] == [(t.code, t.metrics) for t in run.trials]


def bf_request(path):
    from bitfront.data.base import DataRequest

    return DataRequest(path=path)


def test_a_loaded_configuration_can_be_searched_with_changes(from_file):
    path, run, _ = from_file
    config = bf.load_config(path)
    assert bf.search(config).folder == run.folder
    again = bf.search(config, seed=0, n_trials=4, strategy="brute_force", project="four", load_name=None)
    assert len({t.code for t in again.trials}) == len(again) == 4
    assert {t.code for t in again.trials} < {t.code for t in run.trials}
    assert again.folder.name == "four"


def test_splits_and_datasets_as_data(net, arrays, tmp_path, run):
    x, y = map(torch.tensor, arrays)
    splits = {"train": (x[:300], y[:300]), "val": (x[300:450], y[300:450])}
    result = search(net, splits, tmp_path / "a", n_trials=2)
    assert len(result) == 2
    assert result.notes[:1] == ("test cut from train: train 255, val 150, test 45, stratified, seed 0",)
    result = search(net, bf.from_arrays(*arrays), tmp_path / "b")
    assert [t.metrics for t in result.trials] == [t.metrics for t in run.trials]


def test_what_a_search_tells_meanwhile(from_file):
    _, run, events = from_file
    heard = events.heard
    assert heard[:2] == ["training", "epoch"]
    assert heard[2] == "planned"
    assert set(heard[3:-1]) == {"progress"}
    assert heard[-1] == "finishing"
    assert events.done == 36
    assert run.stopped == "space exhausted"


def test_a_listener_may_interrupt(net, arrays, tmp_path, run):
    class Impatient(bf.Events):
        def progress(self, progress, plan):
            if progress.done >= 3:
                raise KeyboardInterrupt

    interrupted = search(net, arrays, tmp_path, events=Impatient())
    assert interrupted.stopped == "interrupted"
    assert 3 <= len(interrupted) < 36
    whole = search(net, arrays, tmp_path)
    assert [t.metrics for t in whole.trials] == [t.metrics for t in run.trials]
    assert whole.trials[: len(interrupted)] == interrupted.trials


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"metrics": {"accuracy": "maximise"}}, "'maximise' is not possible; allowed: maximize, minimize"),
        ({"metrics": {"acuracy": "maximize"}}, "no metric runner is configured"),
        ({"strategy": "annealing"}, "there is no strategy called 'annealing'; allowed: "),
        ({"strategy": "optuna:tpee"}, "there is no sampler"),
        ({"space": {"fc1": {"name": ["fixt"]}, "by": "name"}}, "there is no format 'fixt'; allowed: "),
        ({"space": {"fc3": {"name": ["integer"]}, "by": "name"}}, "the model has no site 'fc3'"),
        ({"n_trails": 5}, "unknown key"),
        ({"max_size": 35}, "the space has 36 candidates, and brute force stops at max_size = 35"),
    ],
)
def test_mistakes_are_reported_before_any_work(net, arrays, tmp_path, more, message):
    with pytest.raises(ConfigError) as error:
        search(net, arrays, tmp_path, **more)
    assert message in str(error.value)
    assert not any(tmp_path.iterdir())


def test_without_a_model_that_was_trained_there_is_nothing_to_test(from_file, tmp_path):
    config = bf.load_config(from_file[0], {"project_dir": str(tmp_path)})
    with pytest.raises(CheckpointError, match=r"there is no trained model in .*train it first"):
        bf.test(config)
    trained = bf.train(config)
    assert trained.checkpoint.is_file()
    assert bf.test(config).samples == 150
    assert bf.test(config, split="val").accuracy == trained.result.history[trained.result.best_epoch - 1].val_accuracy


# --- what a run answers


def test_best_under_constraints(run):
    small = run.best("average_bitwidth <= 4")
    allowed = [t for t in run.trials if t.metrics["average_bitwidth"] <= 4]
    assert small.metrics["accuracy"] == max(t.metrics["accuracy"] for t in allowed)
    same = [t for t in allowed if t.metrics["accuracy"] == small.metrics["accuracy"]]
    assert small.metrics["average_bitwidth"] == min(t.metrics["average_bitwidth"] for t in same)
    assert run.best().number == run.best(maximize="accuracy").number
    floor = small.metrics["accuracy"]
    cheap = run.best(f"accuracy >= {floor!r}", minimize="average_bitwidth")
    assert cheap.metrics["average_bitwidth"] <= small.metrics["average_bitwidth"]
    assert run.best("average_bitwidth < 3", "accuracy > 0", minimize="loss").metrics["average_bitwidth"] < 3


@pytest.mark.parametrize(
    ("constraints", "keywords", "error", "message"),
    [
        (
            ["average_bitwidth <= 1"],
            {},
            RunError,
            "no trial fulfils 'average_bitwidth <= 1' .*the range of average_bitwidth is 2 to 8",
        ),
        (["bits <= 4"], {}, ConfigError, "there is no metric 'bits' here; allowed: loss, accuracy, average_bitwidth"),
        (["averagebitwidth < 4"], {}, ConfigError, "Did you mean 'average_bitwidth'"),
        (["average_bitwidth"], {}, ConfigError, "cannot read the constraint 'average_bitwidth'; write it like"),
        (["average_bitwidth <= four"], {}, ConfigError, "cannot read the constraint"),
        (["average_bitwidth <= 4e"], {}, ConfigError, "'e' is not a unit of this metric; allowed: bit, bits"),
        ([], {"minimize": "size"}, ConfigError, "this run has no metric 'size'"),
        ([], {"minimize": "loss", "maximize": "accuracy"}, ConfigError, "give either minimize or maximize"),
    ],
)
def test_constraints_that_cannot_be_met_or_read(run, constraints, keywords, error, message):
    with pytest.raises(error, match=message):
        run.best(*constraints, **keywords)


def test_a_run_is_read_again_from_its_folder(run, tmp_path):
    again = bf.Run.load(run.folder)
    assert again.trials == run.trials
    assert again.front == run.front
    assert again.trial(7) == run.trials[7]
    with pytest.raises(RunError, match="there is no trial 36; it has 36 trials, 0 to 35"):
        again.trial(36)
    with pytest.raises(RunError, match=r"there is no such run folder; runs in .*: net"):
        bf.Run.load(run.folder.parent / "nett")
    with pytest.raises(RunError, match=r"this folder has no trials\.sqlite; a search writes it"):
        bf.Run.load(tmp_path)


def test_as_a_data_frame(run):
    pytest.importorskip("pandas", reason="the extra 'pandas' is not installed")
    frame = run.frame
    assert list(frame.index) == list(range(36))
    assert frame["accuracy"].tolist() == [t.metrics["accuracy"] for t in run.trials]
    assert set(frame["state"]) == {"complete"}
    assert frame["config"].tolist() == [t.config for t in run.trials]


def test_without_pandas_the_trials_are_the_same_and_a_data_frame_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    again = bf.Run.load(run.folder)
    assert again.trials == run.trials
    with pytest.raises(MissingExtraError, match=r"run\.frame needs pandas.* 'bitfront\[pandas\]'"):
        _ = again.frame


def test_the_files_say_the_same_as_the_run(run):
    best = json.loads((run.folder / "best.json").read_text())
    assert [e["number"] for e in best.values()] == [t.number for t in run.front]
    assert [e["sampled_config"] for e in best.values()] == [t.config for t in run.front]
    assert [e["value"] for e in best.values()] == [list(t.values) for t in run.front]


# --- rebuilding


def test_a_trial_of_objects_is_rebuilt_with_the_same_objects(run, net, arrays):
    trial = run.front[0]
    rebuilt = bf.transform_trial(run.folder, trial.number, check=True, model=net, data=arrays)
    assert rebuilt.evaluation.accuracy == trial.metrics["accuracy"]
    assert rebuilt.evaluation.loss == trial.metrics["loss"]
    assert set(rebuilt.formats) == {"fc1", "fc2"}
    state = bf.load_checkpoint(rebuilt.folder / "model.pt", net)
    assert list(state) == list(net.state_dict())
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.fc1.weight[0, 0] += 1
    with pytest.raises(RunError, match="the trained weights changed since the search"):
        bf.transform_trial(run.folder, trial.number, model=other, data=arrays)
    with pytest.raises(RunError, match="the data changed since the search"):
        bf.transform_trial(run.folder, trial.number, model=net, data=bf.from_arrays(arrays[0] + 1, arrays[1]))
