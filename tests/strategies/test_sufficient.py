"""Where the surrogate takes what is better than the float model for no better, and that it says so."""

import numpy as np
import pytest
import torch
from torch import nn

import bitfront as bf
from bitfront.strategies.prediction import Prediction


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize(
    ("constraints", "setup", "trained", "sufficient"),
    [
        ({}, {}, False, True),
        ({"accuracy_drop": "<= 50 %"}, {}, False, True),
        ({"accuracy_drop": "<= 50 %"}, {"focus": 100}, False, False),
        ({"accuracy_drop": "<= 50 %"}, {}, True, False),
    ],
)
def test_the_accuracy_of_the_float_model_is_sufficient(constraints, setup, trained, sufficient, tmp_path, monkeypatch):
    known = []
    best = Prediction.best

    def spied(self, n):
        known.append(self.sufficient)
        return best(self, n)

    monkeypatch.setattr(Prediction, "best", spied)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 4, generator=generator)
    y = (x[:, 0] + 0.5 * torch.randn(120, generator=generator) > 0).long()
    torch.manual_seed(0)
    notes = []

    class Said(bf.Events):
        def note(self, text):
            notes.append(text)

    runners = {"basic_train": {"max_epochs": 1, "batch_size": 16}, "basic_evaluation": {}}
    strategy = {"name": "surrogate", "setup": {"n_trials": 24, **setup}, **({"sw_runner": runners} if trained else {})}
    run = bf.search(
        model=Net(), data={"train": (x[:80], y[:80]), "val": (x[80:], y[80:])},
        space={"linear": {"name": "integer", "data_in_width": [4, 6, 8], "data_in_frac_width": "auto",
                          "weight_width": [2, 4, 8], "weight_frac_width": "auto"}},
        metrics={"accuracy": "maximize", "average_bitwidth": "minimize"}, strategy=strategy,
        constraints=constraints, project="p", project_dir=str(tmp_path), events=Said(),
    )  # fmt: skip
    assert known
    expected = None if not sufficient else [-run.reference["accuracy"], -np.inf]
    assert all(k is None if expected is None else list(k) == expected for k in known)
    said = [
        note
        for note in notes
        if "and no higher (that is mostly chance)" in note or "no higher than the float model's" in note
    ]
    assert len(said) == sufficient
