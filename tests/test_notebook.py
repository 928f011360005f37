"""Bitfront in a notebook: results as HTML and figures, progress as lines, networks back from the objects of the call."""

import ast
import builtins
import json
import pickle
import re
import sys
import types
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bitfront as bf
from bitfront import libraries, listing
from bitfront.errors import ConfigError, DataError, MissingExtraError, RunError
from bitfront.report import live, notebook, tables

ROOT = Path(__file__).parents[1]
SPACE = {"linear": {"name": "integer", "weight_width": [2, 4, 8], "weight_frac_width": [4], "data_in_width": [6]}}


def net(outputs=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, outputs))


def arrays(step=1):
    """Samples of three classes, most of them as the network in float tells them apart; the classes are `step` apart."""
    x = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32) * 2
    with torch.no_grad():
        y = net()(torch.from_numpy(x)).argmax(1).numpy()
    y[:40] = 1
    return x, y * step


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    given = {"model": net(), "data": arrays(), "space": SPACE, "metrics": ["accuracy", "average_bitwidth"]}
    return {
        **given,
        "strategy": "brute_force",
        "project_dir": str(tmp_path_factory.mktemp("<b>")),
        "accelerator": "cpu",
    }


@pytest.fixture(scope="module")
def run(asked):
    run = bf.search(**asked, project="run")
    assert len(run.front) > 1
    return run


class Cells(HTMLParser):
    """Reads HTML: the rows of its table, the text outside it, every tag and every attribute."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.rest, self.tags, self.attributes, self.open = [], "", set(), set(), []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "br":
            self.handle_data("\n")
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif data.strip():
            self.rest += data


def read(value):
    cells = Cells(value._repr_html_())
    assert cells.tags <= {"div", "table", "tr", "td", "th", "br", "p"}
    assert cells.attributes <= {"style", "colspan"}, "nothing is loaded, nothing is run"
    return cells


# --- results as HTML


def test_a_run_is_the_table_of_the_command(run):
    shown = read(run)
    sheet = tables.best_trials(run)
    assert shown.rows == [list(sheet.columns), *map(list, sheet.rows)]
    assert f"9 of 9 candidates evaluated (space exhausted); {len(run.front)} on the front" in shown.rest
    assert str(run.folder) in shown.rest
    assert "<b>" in str(run.folder), "what a path contains is no markup"
    assert f"run.model({run.front[0].number})" in shown.rest


def test_a_front_and_trials_are_tables_and_still_tuples(run):
    assert [row[0] for row in read(run.front).rows] == ["number", "float", *(str(t.number) for t in run.front)]
    assert len(read(run.trials).rows) == 2 + 9
    assert run.front == tuple(run.front)
    assert type(run.front[:1]) is tuple
    assert [t.number for t in pickle.loads(pickle.dumps(run.front))] == [t.number for t in run.front]  # noqa: S301
    assert bf.Trials(run.front)._repr_html_() is None


def test_a_long_table_is_cut(monkeypatch, run):
    monkeypatch.setattr(notebook, "ROWS", 4)
    monkeypatch.setattr(tables, "SHOWN", 6)
    shown = read(run.trials)
    numbers = [row[0] for row in shown.rows]
    assert numbers == ["number", "float", "0", "... 3 rows are left out ...", "4", "5"]
    assert shown.rest == "... and 3 more"


def test_a_plan_and_an_analysis(asked):
    plan = bf.plan(**asked)
    shown = read(plan)
    assert [row[0] for row in shown.rows] == ["site", "_0", "_1", "_2"]
    assert "space: 9 distinct candidates, 2 parameters" in shown.rest
    assert "objectives: accuracy (maximize), average_bitwidth (minimize)" in shown.rest
    assert "ms per candidate" not in shown.rest, "nothing was measured"
    analysis = bf.analyze(net(), torch.zeros(1, 4))
    assert read(analysis).rows[-1][:5] == ["total", "", "", "", "43"]


# --- figures, frames


def test_the_front_as_a_figure(run):
    pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
    figure = run.plot()
    (axes,) = figure.axes
    assert axes.get_xlabel() == "average_bitwidth [bits]"
    (line,) = [line for line in axes.lines if line.get_linestyle() == "-"]
    assert sorted(line.get_xdata()) == sorted(t.metrics["average_bitwidth"] for t in run.front)
    assert figure._repr_png_().startswith(b"\x89PNG"), "what a notebook shows"


def test_without_matplotlib_the_error_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"run\.plot\(\) needs matplotlib.* 'bitfront\[report\]'"):
        run.plot()


# --- a plan takes what a search takes


def test_a_plan_from_a_file_and_from_a_configuration(run, tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(
        (run.folder / "config.toml").read_text().replace('"arrays"', '"digits"').replace("Sequential", "digits-mlp")
    )
    from_path, from_config = bf.plan(path, n_trials=3), bf.plan(bf.load_config(path))
    assert (from_path.n_trials, from_config.n_trials) == (3, from_config.space.size)
    assert [p.name for p in from_path.space.parameters] == [p.name for p in from_config.space.parameters]
    with pytest.raises(ConfigError, match=r"allowed: an nn\.Module, or a name"):
        bf.plan(model=3)


# --- networks from the objects of the call


def test_a_network_of_the_call(run, asked):
    trial = run.front[0]
    x, y = run.given.data
    before = set(run.folder.rglob("*"))
    network = run.model(trial.number)
    assert set(run.folder.rglob("*")) == before, "nothing is written"
    val = bf.from_arrays(x, y).split("val")
    assert float((network(val[0]).argmax(1) == val[1]).double().mean()) == trial.metrics["accuracy"]
    assert not network.training
    assert asked["model"][0].weight.equal(net()[0].weight), "the user's model is not changed"


def test_in_another_process_the_objects_are_given_again(run):
    again = bf.Run.load(run.folder)
    number, x = run.front[0].number, torch.from_numpy(arrays()[0])
    network = again.model(number, model=net(), data=arrays())
    assert network(x).equal(run.model(number)(x))
    asks = "the search was given its {} from Python, and no file has it"
    for some, what in (({}, r"data \('arrays'\)"), ({"data": arrays()}, r"model \('Sequential'\)")):
        with pytest.raises(RunError, match=asks.format(what)):
            again.model(number, **some)
    with pytest.raises(RunError, match="there is no trial 9; it has 9 trials"):
        again.model(9)


def test_what_else_takes_a_run_takes_its_objects(run):
    done = bf.export(run.front[0], to="c")
    assert done.differing == 0
    checked = bf.transform_trial(run, run.front[0].number, check=True, save=False)
    assert checked.evaluation.accuracy == run.front[0].metrics["accuracy"]
    assert not (run.folder / "transformed").exists()


# --- classes that are named, and classes that are missing


def test_class_names(asked, tmp_path):
    names = ["up", "down", "left", "none"]
    more = {**asked, "project_dir": str(tmp_path), "model": net(4), "class_names": names}
    run = bf.search(**more)
    assert run.config.class_names == names
    assert "no training sample of class none" in run.notes
    x = torch.zeros(2, 4)
    assert bf.Run.load(run.folder).model(0, model=net(4), data=arrays())(x).equal(run.model(0)(x))
    with pytest.raises(
        DataError, match=r"dataset 'arrays' names its classes itself \(0, 1, 2\); leave class_names out"
    ):
        bf.search(**{**more, "data": bf.from_arrays(*arrays())})


def test_a_part_of_the_data_that_lacks_classes(asked, tmp_path):
    more = {**asked, "project_dir": str(tmp_path), "data": arrays(2)}
    run = bf.search(**{**more, "model": net(5)})
    assert "no training sample of class 1, 3" in run.notes
    assert run.model(0)(torch.zeros(2, 4)).shape == (2, 5)
    trained = {"name": "brute_force", "sw_runner": {"basic_train": {}}}
    for training in ({"model": "jsc-tiny"}, {"strategy": "learned_bits", "space": None}, {"strategy": trained}):
        with pytest.raises(DataError, match="number the classes from 0 without gaps, or give class_names"):
            bf.plan(**{**more, "model": net(5), **training})


# --- the example


def shown(cell, names):
    """What a notebook shows below a cell: the value of its last line, if that is an expression."""
    *statements, last = ast.parse(cell).body
    value = isinstance(last, ast.Expr)
    exec(compile(ast.Module(statements if value else [*statements, last], []), "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if value else None  # noqa: S307


@pytest.mark.long
@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch):
    for module in ("timm", "PIL", "matplotlib", "pandas", "onnxruntime"):
        libraries.torchvision("a test")  # timm imports it
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "examples" / "notebook.ipynb").read_text())["cells"]
    names = {}
    values = [shown("".join(c["source"]), names) for c in cells if c["cell_type"] == "code"]
    kinds = [type(v).__name__ for v in values if v is not None]
    assert kinds == ["Plan", "Run", "ShownFigure", "DataFrame", "Trial", "Explanation", "int", "tuple"]
    assert len(names["run"]) == 40
    assert names["best"].metrics["model_size"] < names["run"].reference["model_size"] / 2
    assert names["exported"].differing == 0
    assert (names["exported"].folder / f"shapes_{names['best'].number}.onnx").is_file()
    explained = Cells(names["run"].explain()._repr_html_())
    assert explained.tags <= {"div", "h4", "table", "tr", "td", "th", "br", "p"}


# --- progress in a notebook


@pytest.fixture
def shell(monkeypatch):
    """A notebook, as far as rich and Bitfront look: a kernel's shell."""
    kind = type("ZMQInteractiveShell", (), {})
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setattr(builtins, "get_ipython", kind, raising=False)


def test_progress_in_a_notebook_is_lines_once(shell, asked, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(live, "EVERY", 0.0)
    bf.search(**{**asked, "project_dir": str(tmp_path)})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)), "nothing is printed twice"
    assert "space: 9 distinct candidates, 2 parameters" in lines
    assert any(re.fullmatch(r"searching: 9/9  best accuracy \S+, average_bitwidth \S+", line) for line in lines)
    bf.search(**{**asked, "project_dir": str(tmp_path), "project": "silent"}, events=bf.Events())
    assert capsys.readouterr().out == ""


def test_elsewhere_nothing_is_shown(asked, tmp_path, capsys):
    bf.search(**{**asked, "project_dir": str(tmp_path)})
    assert capsys.readouterr() == ("", "")


# --- what can be listed


def test_listing_without_a_kind():
    columns, rows = listing.members()
    assert columns == ["kind", "what its members are"]
    assert [kind for kind, _ in rows] == list(listing.ROOMS)
    assert all(listing.members(kind)[1] for kind, _ in rows)
