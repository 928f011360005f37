"""What stays in float: the mean bits per weight count it, and the plan and the tables say its shares, as by hand."""

import numpy as np
import pytest
import torch
from test_metrics import evaluator, measure
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import bitfront as bf
from bitfront.engine.planning.coverage import float_shares, in_float
from bitfront.engine.storage.records import InFloat
from bitfront.report import remarks
from bitfront.report.page_tables import summary

INT = {"name": ["integer"], "data_in_width": [8], "weight_width": [4]}


class Rotation(nn.Module):
    """A parameter of its own, 8 × 8, that no format reaches."""

    def __init__(self):
        super().__init__()
        self.angles = nn.Parameter(torch.randn(8, 8) / 8)

    def forward(self, x):
        return x + torch.linalg.matrix_exp(self.angles - self.angles.t()).sum(0)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.rotation = nn.Linear(4, 8), Rotation()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 2)
        self.position = nn.Parameter(torch.randn(1, 8))

    def forward(self, x):
        return self.head(self.norm(self.rotation(self.fc1(x)) + self.position))


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv1d(1, 2, 3, padding=1), nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(self.conv(x[:, None]).flatten(1))


def subject(model, seed, shape=(4,), **keywords):
    torch.manual_seed(0)
    return evaluator(model, shape, seed, by="type", **keywords)


def test_weights_of_no_site_count_32_bits_and_vectors_of_norms_do_not_count():
    context = subject(Mixed(), {"linear": INT})
    covered, left = 4 * 8 + 8 * 2, 8 * 8 + 8
    assert measure("average_bitwidth", {}, context)["average_bitwidth"].tolist() == [
        (covered * 4 + left * 32) / (covered + left)
    ]
    assert measure("average_bitwidth", {"over": "quantized"}, context)["average_bitwidth"].tolist() == [4.0]


def test_a_layer_that_nothing_runs_counts_and_is_named():
    model = Convolved()
    model.conv, model.fc, model.unused = nn.Identity(), nn.Linear(4, 2), nn.Linear(8, 4)
    context = subject(model, {"linear": INT})
    assert measure("average_bitwidth", {}, context)["average_bitwidth"].tolist() == [(8 * 4 + 32 * 32) / 40]
    assert in_float(context.space) == InFloat(0.8, 0.0, ("unused (Linear)",))


def test_a_weight_that_is_computed_from_others_counts_once():
    context = subject(nn.Sequential(weight_norm(nn.Linear(4, 2)), nn.Linear(2, 2)), {"linear": INT})
    assert measure("average_bitwidth", {}, context)["average_bitwidth"].tolist() == [4.0]
    assert in_float(context.space) == InFloat()


def test_what_stays_in_float_in_every_candidate_is_named_by_size():
    found = in_float(subject(Mixed(), {"linear": {**INT, "name": ["integer", "NA"]}}).space)
    assert found == InFloat(72 / 120, 0.0, ("rotation.angles (parameter)", "position (parameter)"))
    assert found.text == (
        "in float in every candidate: 60 % of the weights (rotation.angles (parameter), position (parameter))"
    )


def test_products_of_layers_that_nothing_names_stay_in_float():
    # 6 weights, each used at 4 positions; 16 weights, used once.
    found = in_float(subject(Convolved(), {"linear": INT}).space)
    assert (found.weights, found.macs) == (6 / 22, 24 / 40)
    assert found.text == (
        "in float in every candidate: 27 % of the weights, 60 % of the multiply-accumulates (conv (Conv1d))"
    )
    # Weights alone have formats: then no product is in float alone, and no weight is.
    only = {"name": ["integer"], "weight_width": [4]}
    assert in_float(subject(Convolved(), {"default": only}).space) == InFloat()


def test_of_many_parts_three_are_named():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    found = in_float(evaluator(model, (4,), {"0": INT}).space)
    assert found.largest == tuple(f"{n} (Linear)" for n in (1, 2, 3))
    assert found.text.endswith("(1 (Linear), 2 (Linear), 3 (Linear), 2 more)")


def test_a_small_share_and_a_model_that_is_covered_are_no_line():
    assert in_float(subject(Convolved(), {"default": INT}).space) == InFloat()
    assert InFloat().text == ""
    assert InFloat(0.01, 0.01, ("a",)).text == ""
    assert "99.95 % of the weights (" in InFloat(0.9995, 0.0, ("a",)).text
    assert "1.5 % of the multiply-accumulates (" in InFloat(0.0, 0.015, ("a",)).text


def test_shares_of_a_candidate_are_those_of_its_formats():
    context = subject(Convolved(), {"default": {**INT, "name": ["integer", "NA"]}})
    space = context.space
    codes = space.numbered(0, space.size)
    rows = []
    for code in codes:
        formats = context.formats(code)
        conv, fc = "conv" not in formats, "fc" not in formats
        rows.append([(6 * conv + 16 * fc) / 22, (24 * conv + 16 * fc) / 40])
    assert len(rows) == 4
    assert float_shares(context, codes).tolist() == rows


def data(features=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, features, generator=generator)
    return x, (x[:, 0] > 0).long()


def searched(model, tmp_path, space, **settings):
    torch.manual_seed(0)
    metrics = {"accuracy": "maximize", "average_bitwidth": "minimize"}
    where = {"project_dir": str(tmp_path), "project": "run"}
    run = bf.search(model=model, data=data(), space=space, metrics=metrics, strategy="brute_force", **where, **settings)
    return bf.Run.load(tmp_path / "run"), run.notes


@pytest.mark.slow
def test_the_tables_of_a_run_say_what_every_candidate_and_what_one_leaves_in_float(tmp_path):
    run, notes = searched(Mixed(), tmp_path, {"linear": {**INT, "name": ["integer", "NA"]}})
    line = InFloat(72 / 120, 0.0, ("rotation.angles (parameter)", "position (parameter)")).text
    assert run.in_float.text == line
    assert line in notes
    assert line in remarks.summary(run)
    assert line in summary(run)[1]
    assert set(run.float_shares) == {trial.number for trial in run.front}
    chosen = {t.number: next(s for s in remarks.summary(run) if s.startswith(f"  {t.number}: ")) for t in run.front}
    for number, text in chosen.items():
        weights, macs = run.float_shares[number]
        more = [size for size, site in ((32, "fc1 float"), (16, "head float")) if site in text]
        assert weights == pytest.approx((72 + sum(more)) / 120)
        assert macs == pytest.approx(sum(more) / 48)
        assert ("; in float: " in text) == bool(more)


@pytest.mark.slow
def test_a_run_that_leaves_nothing_in_float_has_no_such_line(tmp_path):
    run, notes = searched(Convolved(), tmp_path, {"default": INT})
    assert run.in_float == InFloat()
    assert not any("in float" in line for line in (*remarks.summary(run), *summary(run)[1], *notes))


@pytest.mark.slow
def test_shares_of_a_candidate_are_those_of_its_widths(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    space = {
        "name": "joint",
        "widths": {"by": "name", "0": {"name": "both", "channel_multiplier": [1, 2]}},
        "quantize": {"by": "name", "0": INT, "1": INT},
    }
    run, notes = searched(model, tmp_path, space)
    assert run.in_float == InFloat(8 / 40, 8 / 40, ("2 (Linear)",))
    assert run.in_float.text in notes
    for trial in run.front:
        width = 4 * trial.config["widths"]["_0"]["config"]["channel_multiplier"]
        assert run.float_shares[trial.number] == (pytest.approx(8 / (8 * width + 8)),) * 2


@pytest.mark.slow
def test_a_search_of_widths_alone_has_no_such_line(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    space = {"name": "channel_size", "by": "name", "0": {"name": "both", "channel_multiplier": [0.5, 1]}}
    run, notes = searched(model, tmp_path, space)
    assert len(run) == 2
    assert not any("in float" in line for line in (*remarks.summary(run), *notes))
    assert not np.any(list(run.float_shares.values()))
