"""Corrections in a search: each learned once and for its site alone, part of the run's identity, and worth having."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import Normalised, seeded_model
from sklearn.datasets import load_digits
from torch import nn

import bitfront as bf
import bitfront.engine.evaluation.calibration as calibrations
from bitfront.engine.evaluation.calibration import Corrections
from bitfront.engine.evaluation.dispatch import Dispatcher
from bitfront.engine.evaluation.fixed import EvaluationJob, FixedEvaluator, joined
from bitfront.errors import RunError
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.metrics.configured import configured_runner
from bitfront.models.base import build_model
from bitfront.training import TrainSettings, train
from bitfront.transforms.correct import has_bias

BOTH = Corrections(bias=True, batch_norm=True)
FORMATS = {"name": ["integer", "NA"], "data_in_width": [3, 6], "weight_width": [2, 4], "bias_width": [6]}
AUTO = {f"{o}_frac_width": ["auto"] for o in ("data_in", "weight", "bias")}


def job(model, x, y, calibration, seed, corrections):
    return EvaluationJob(
        model=model,
        sample=x[:2],
        space="graph/quantize/mixed_precision_ptq",
        by="type",
        choices=seed,
        runners=(configured_runner("basic_evaluation"),),
        splits={"val": (x, y)},
        calibration=calibration,
        corrections=corrections,
    )


def normalised(corrections=BOTH):
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    return job(seeded_model(Normalised), x, torch.arange(40) % 4, x, {"default": FORMATS | AUTO}, corrections)


# --- what is learned -------------------------------------------------------------------------------------------------


def test_each_bias_is_learned_once_per_weight_format_and_each_norm_once_per_option(monkeypatch):
    calls = {"corrected_bias": [], "output_statistics": []}
    for name, seen in calls.items():
        real = getattr(calibrations, name)
        monkeypatch.setattr(calibrations, name, lambda *a, _r=real, _s=seen: _s.append(a[1].name) or _r(*a))
    evaluator = FixedEvaluator(normalised())
    codes = evaluator.space.sample(200, np.random.default_rng(0))
    evaluator.evaluate(codes)
    for code in codes[:20]:
        evaluator.model(code)
    # Two of the three linear layers have a bias, in two weight formats; two have a batch norm behind them, in four
    # options, and in float.
    assert sorted(calls["corrected_bias"]) == ["_1"] * 2 + ["_7"] * 2
    assert sorted(calls["output_statistics"]) == ["_1"] * 5 + ["_4"] * 5


def test_a_correction_does_not_depend_on_the_other_sites():
    evaluator = FixedEvaluator(normalised())
    space, site = evaluator.space, [s.name for s in evaluator.space.sites].index("_1")
    codes = space.sample(60, np.random.default_rng(1))
    options = space.options(codes)
    states = {}
    for code, option in zip(codes, options[:, site].tolist(), strict=True):
        model = FixedEvaluator(normalised()).model(code) if option not in states else evaluator.model(code)
        state = (model[1].bias.detach(), model[2].running_mean, model[2].running_var)
        assert all(map(torch.equal, state, states.setdefault(option, state)))
    assert len(states) == 5
    means = [mean for _, mean, _ in states.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(means) for b in means[:i])


def test_a_site_in_float_is_not_corrected():
    evaluator = FixedEvaluator(normalised())
    floating = evaluator.space.codes(np.array([[g.size - 1 for g in evaluator.space.groups]]))
    model, original = evaluator.model(floating[0]), seeded_model(Normalised)
    assert all(torch.equal(t, original.state_dict()[k]) for k, t in model.state_dict().items())


def test_the_format_of_a_bias_is_learned_from_the_corrected_bias():
    x = 40 + torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    seed = {"linear": {"name": "integer", "weight_width": [2, 8], "bias_width": 8, "bias_frac_width": "minmax"}}
    corrected = job(
        build_model("digits-mlp", (6,), 5, seed=0), x, torch.arange(64) % 5, x, seed, Corrections(bias=True)
    )
    evaluator = FixedEvaluator(corrected)
    codes = evaluator.space.numbered(0, evaluator.space.size)
    forms = set()
    for code in codes:
        bias, form = evaluator.model(code).fc1.bias.detach(), evaluator.formats(code)["fc1"]["bias"]
        assert form == Integer(8, "minmax").calibrated(bias)
        forms.add(form)
    assert len(forms) == 2
    plain = FixedEvaluator(replace(corrected, corrections=Corrections()))
    assert len({plain.formats(code)["fc1"]["bias"] for code in codes}) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("quick_workers")
def test_worker_processes_correct_to_the_same_bits():
    evaluator = FixedEvaluator(normalised())
    codes = evaluator.space.sample(9, np.random.default_rng(0))
    with Dispatcher(evaluator, n_jobs=2) as dispatcher:
        measured = joined([m for _, m in dispatcher.blocks(codes)])
    assert np.array_equal(measured.values["loss"], evaluator.evaluate(codes).values["loss"])
    assert not np.array_equal(
        measured.values["loss"], FixedEvaluator(normalised(Corrections())).evaluate(codes).values["loss"]
    )


# --- in a search -----------------------------------------------------------------------------------------------------


def searched(folder, **settings):
    rng = np.random.default_rng(0)
    y = np.arange(300) % 4
    x = (rng.normal(size=(4, 6))[y] * 1.5 + rng.normal(size=(300, 6))).astype(np.float32)
    model, data = seeded_model(Normalised), bf.from_arrays(x, y)
    events = Notes()
    run = bf.search(
        model=model,
        data=data,
        space={"default": FORMATS | AUTO},
        metrics={"accuracy": "maximize", "average_bitwidth": "minimize"},
        strategy="optuna:random",
        project="run",
        project_dir=str(folder),
        n_trials=12,
        accelerator="cpu",
        events=events,
        **{f"search.calibration.{k}": v for k, v in settings.items()},
    )
    return run, model, data, events


class Notes(bf.Events):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def test_a_trial_is_rebuilt_with_its_corrections_and_another_calibration_is_refused(tmp_path):
    settings = {"num_samples": 100, "bias_correction": True, "batch_norm": True}
    run, model, data, events = searched(tmp_path, **settings)
    assert not [n for n in events.notes if "has no effect" in n]
    losses = set()
    for trial in run.trials:
        rebuilt = bf.transform_trial(run.folder, trial.number, check=True, model=model, data=data)
        assert rebuilt.evaluation.loss == trial.metrics["loss"]
        assert rebuilt.evaluation.accuracy == trial.metrics["accuracy"]
        losses.add(trial.metrics["loss"])
    changed = [r for r in searched(tmp_path / "plain")[0].trials if r.metrics["loss"] not in losses]
    assert len(changed) >= 10
    assert len(searched(tmp_path, **settings)[0].trials) == 12
    for key, other in (("num_samples", 101), ("bias_correction", False), ("batch_norm", False)):
        with pytest.raises(RunError, match=rf"another configuration:\n  calibration\.{key}: it has"):
            searched(tmp_path, **{**settings, key: other})


def test_corrections_that_find_nothing_are_named(tmp_path):
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.fc(x)) if x.sum() > -1e9 else x[:, :4]

    def notes(model):
        events = Notes()
        bf.search(
            model=model,
            data=bf.from_arrays(np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32), np.arange(60) % 4),
            space={"linear": FORMATS},
            metrics=["accuracy"],
            project=type(model).__name__,
            project_dir=str(tmp_path),
            n_trials=2,
            events=events,
            **{"search.calibration.bias_correction": True, "search.calibration.batch_norm": True},
        )
        return [n for n in events.notes if n.startswith(("bias_correction", "batch_norm"))]

    assert notes(Untraceable()) == [
        "bias_correction = true has no effect: no layer that can be configured has a bias",
        "batch_norm = true has no effect: the model cannot be traced",
    ]
    assert notes(nn.Sequential(nn.Linear(6, 4))) == [
        "batch_norm = true has no effect: no batch norm directly follows a layer with weights"
    ]


# --- what it is good for ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(raw.target, dtype=torch.int64)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


#: The weights that a network begins with → those it was trained to.
TRAINED = {}


def trained(model, digits):
    """Several tests need the same networks; each is trained once."""
    begins = tuple(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    if begins in TRAINED:
        model.load_state_dict(TRAINED[begins])
        return model
    x, y = digits
    splits = {"train": (x[:1200], y[:1200]), "val": (x[1200:], y[1200:])}
    data = SimpleNamespace(name="digits", mapped=False, split=splits.__getitem__, num_classes=10)
    settings = TrainSettings(max_epochs=12, batch_size=32, learning_rate=4e-3)
    TRAINED[begins] = train(model, data, settings).best_state
    model.load_state_dict(TRAINED[begins])
    return model


def with_norms():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64, 10)),
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "which", "gained"),
    [
        # Measured, with weights of 4, 3 and 2 bits: accuracy 0.977, 0.940, 0.856 becomes 0.978, 0.941, 0.894;
        # 0.977, 0.888, 0.471 becomes 0.982, 0.913, 0.734 with corrected biases, 0.978, 0.946, 0.812 with new norms.
        (lambda: build_model("digits-cnn", (1, 8, 8), 10, seed=0), "bias", 0.01),
        (with_norms, "bias", 0.03),
        (with_norms, "batch_norm", 0.05),
    ],
    ids=["digits-cnn-bias", "norms-bias", "norms-batch_norm"],
)
def test_corrections_give_back_accuracy_at_low_precision(digits, make, which, gained):
    x, y = digits
    model = trained(make(), digits)
    settings = {"name": "integer", "data_in_width": 8, "weight_width": [2, 3, 4], "bias_width": 8} | AUTO
    accuracy, loss = {}, {}
    for name in ("", which):
        corrections = Corrections(**{name: True} if name else {})
        evaluator = FixedEvaluator(job(model, x[1200:], y[1200:], x[:512], {"default": settings}, corrections))
        values = evaluator.evaluate(evaluator.space.uniform()).values
        accuracy[name], loss[name] = values["accuracy"], values["loss"]
    assert accuracy[which].mean() > accuracy[""].mean() + gained
    assert loss[which].mean() < 0.9 * loss[""].mean()


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["minmax", "percentile", "mse", "entropy"])
def test_int8_is_as_accurate_as_float(digits, rule):
    """Within 0.3 points; `bench/int8.py` shows it on larger networks, beside ONNX Runtime."""
    x, y = digits
    model = trained(with_norms(), digits)
    settings = {"name": "affine", "data_in_width": 8, "data_in_range": rule, "weight_width": 8}
    evaluator = FixedEvaluator(
        job(model, x[1200:], y[1200:], x[:512], {"conv2d": settings, "linear": settings}, Corrections())
    )
    accuracy = evaluator.evaluate(evaluator.space.numbered(0, 1)).values["accuracy"][0]
    floating = evaluator.float_evaluator().evaluate(np.zeros((1, 0), dtype=np.int64)).values["accuracy"][0]
    assert floating > 0.95
    assert accuracy >= floating - 0.003


def test_a_bias_that_several_use_is_not_corrected():
    """Corrected for one of them it would be another tensor, which nobody has counted."""
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.bias = first.bias
    graph = capture(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(6, 4)), torch.randn(2, 6))
    assert [site.name for site in graph.sites if has_bias(graph, site)] == ["_4"]
