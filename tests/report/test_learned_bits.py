"""The report of learned bits: its maps are the weights of the trials, and the page has what the figures show."""

import numpy as np
import pytest
import torch
from torch import nn

import bitfront as bf
from bitfront.api import dataset_of
from bitfront.report import learned, page_tables
from bitfront.report.learned import SHOWN, LearnedFront


def data():
    x = torch.randn(700, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] + x[:, 1] * x[:, 2] > 0).long()
    return {"train": (x[:500], y[:500]), "val": (x[500:], y[500:])}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 2))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return bf.search(
        model=net(),
        data=data(),
        strategy={"name": "learned_bits", "setup": {"cycles": 4, "epochs": 3, "networks": 3, "batch_size": 64}},
        project_dir=str(tmp_path_factory.mktemp("learned")),
    )


def test_a_map_has_the_bits_of_each_weight_and_marks_zeros(run):
    front = learned.learned_front(run)
    assert front.cost == "ebops"
    figure = learned.bits(run, front)
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 2 * len(front.spread)
    for k, place in enumerate(front.spread):
        number = int(run.columns.number[front.rows[place]])
        state = bf.transform_trial(run.folder, number, data=dataset_of(data()), model=net()).model.state_dict()
        for axes, name in zip(panels[2 * k : 2 * k + 2], ("0", "2"), strict=True):
            drawn = np.ma.filled(np.ma.masked_invalid(axes.images[0].get_array()), np.nan)
            assert (np.isnan(drawn) == (state[f"{name}.weight"].numpy() == 0)).all()
            assert np.nanmin(drawn, initial=1) >= 1


def test_the_course_has_every_network_and_the_fronts_pressures(run):
    front = learned.learned_front(run)
    panels = learned.course(run, front).axes
    assert len(panels[0].lines[0].get_xdata()) == len(run) == 12
    order = np.argsort(front.costs, kind="stable")
    pressures = [front.networks[k].pressure for k in order]
    assert panels[2].lines[0].get_ydata().tolist() == pressures
    assert [float(v) for v in panels[2].lines[0].get_xdata()] == sorted(front.costs.tolist())
    # The networks of a later cycle were trained under more pressure.
    cycles = [run.row(int(front.rows[k])).config["learned_bits"]["config"]["cycle_number"] for k in order]
    assert [p for _, p in sorted(zip(cycles, pressures, strict=True))] == sorted(pressures)


def test_the_page_and_the_folder_have_them(run, tmp_path):
    report = bf.write_report(run, tmp_path)
    names = {path.stem for path in report.figures}
    assert {"bits", "learning"} <= names
    assert "layers" not in names
    text = report.page.read_text()
    assert "What each layer learned" in text
    assert 'id="mattered"' not in text
    # Each for a light and for a dark page.
    assert text.count('alt="Bits of each weight') == text.count('alt="Accuracy and cost over the cycles') == 2
    table = page_tables.learned_layers(run, learned.learned_front(run))
    assert [row[0].text for row in table.rows] == ["0", "2"]


def test_networks_are_spread_over_their_costs():
    costs = np.array([1000.0, 999, 998, 997, 996, 500, 100, 50, 10, 9])
    front = LearnedFront(np.arange(10), (), "ebops", costs)
    assert len(front.spread) <= SHOWN
    assert {0, 9} <= set(front.spread)
    assert not {1, 2, 3, 4} & set(front.spread)
