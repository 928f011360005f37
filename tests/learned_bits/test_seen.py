"""What the user sees of a training with learned bits while it runs, and before."""

import io

import torch
from rich.console import Console
from torch import nn

import bitfront as bf
from bitfront.events import Events
from bitfront.learned_bits.course import Moment
from bitfront.report import plans
from bitfront.report.live import Live

SETTINGS = {"cycles": 2, "epochs": 3, "networks": 2, "batch_size": 64, "strategy": "learned_bits"}


def given(tmp_path):
    x = torch.randn(600, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    torch.manual_seed(0)
    return {
        "model": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)),
        "data": {"train": (x[:400], y[:400]), "val": (x[400:], y[400:])},
        "project_dir": str(tmp_path),
        **SETTINGS,
    }


class Heard(Events):
    def __init__(self):
        self.moments = []
        self.plan = None

    def planned(self, plan, seconds):
        self.plan = plan

    def learning(self, moment):
        self.moments.append(moment)


def test_every_epoch_is_told_with_the_network_as_it_is(tmp_path):
    heard = Heard()
    run = bf.search(**given(tmp_path), events=heard)
    assert [m.cycle for m in heard.moments] == sorted(m.cycle for m in heard.moments)
    assert {m.cycles for m in heard.moments} == {2}
    for cycle in (1, 2):
        moments = [m for m in heard.moments if m.cycle == cycle]
        assert [m.epoch for m in moments] == list(range(1, moments[0].epochs + 1))
        assert None not in (moments[-1].quality, moments[-1].cost)
    # Every trial is the network of an epoch, and was told of as it was measured.
    told = {(round(m.quality, 6), m.cost) for m in heard.moments if m.quality is not None}
    assert {(round(t.metrics["accuracy"], 6), t.metrics["ebops"]) for t in run.trials} <= told


def test_the_bar_shows_the_cycle_the_pressure_and_the_network():
    out = io.StringIO()
    with Live(Console(file=out, force_terminal=True, width=160)) as live:
        live.learning(Moment(2, 5, 3, 8, 2e-6))
        live.learning(Moment(2, 5, 4, 8, 2e-6, 0.7654, 12345.0))
    text = out.getvalue()
    assert "cycle 2/5, epoch 4/8, pressure 2.0e-06, accuracy 0.7654, cost 12,345" in text


def test_a_plan_says_what_is_learned_and_how_long_it_takes(tmp_path):
    heard = Heard()
    bf.search(**given(tmp_path), events=heard)
    plan = heard.plan
    lines = plans.plan_summary(plan, 0.5)
    assert lines[0].startswith("learned bits: 2 cycles, each of 3 epochs")
    assert lines[-1].startswith("cost: 500 ms per epoch (measured on one), about 3.0 s of training in all (estimated)")
    assert [offer.site for offer in plan.space.offers()] == ["0", "2"]


def test_measuring_an_epoch_changes_nothing(tmp_path):
    heard = Heard()
    run = bf.search(**given(tmp_path), events=heard)
    plan = heard.plan
    networks = plan.evaluator.learning.course.networks
    assert len(run) == 4
    before = {name: value.clone() for name, value in plan.model.state_dict().items()}
    assert plan.evaluator.seconds_per_epoch() > 0
    assert plan.evaluator.learning.course.networks is networks
    assert all(torch.equal(before[name], value) for name, value in plan.model.state_dict().items())
