"""What calibration learned is kept in the run folder: used when a search is resumed, and never believed wrongly."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from networks import Normalised, seeded_model
from torch import nn

import bitfront as bf
import bitfront.engine.evaluation.calibration as calibrations
from bitfront.api import dataset_of
from bitfront.engine.evaluation import memory as memories
from bitfront.engine.evaluation.calibration import Calibration, Corrections
from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.engine.evaluation.memory import Memory, fingerprint
from bitfront.engine.rebuild import transform_trial
from bitfront.engine.storage import learned
from bitfront.errors import RunError
from bitfront.events import Events
from bitfront.formats.affine import Affine
from bitfront.formats.base import WEIGHT
from bitfront.formats.integer import Integer
from bitfront.graph import capture

BOTH = Corrections(bias=True, batch_norm=True)
X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
SPACE = {
    "linear": {
        "name": "affine", "data_in_width": [8], "weight_width": [2, 4, 8], "weight_range": ["mse"], "bias_width": ["NA"],
    }
}  # fmt: skip


class Notes(Events):
    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)


def search(folder, model=None, **more):
    return bf.search(
        model=model or seeded_model(Normalised), data=(X.numpy(), np.arange(40) % 4), space=SPACE,
        metrics={"accuracy": "maximize", "average_bitwidth": "minimize"}, strategy="brute_force",
        project_dir=str(folder), project="run",
        **{"search.calibration.bias_correction": True, "search.calibration.batch_norm": True}, **more,
    )  # fmt: skip


def values(run):
    """Code → metrics: a search that was interrupted tries candidates in another order."""
    rows = range(len(run))
    columns = run.columns.metrics.values()
    return {tuple(run.columns.codes([row])[0].tolist()): [column[row] for column in columns] for row in rows}


def counted(monkeypatch, name):
    calls, real = [], getattr(calibrations, name)
    monkeypatch.setattr(calibrations, name, lambda *a: calls.append(a) or real(*a))
    return calls


def files(folder):
    return learned.files(folder / "run")


# --- files -----------------------------------------------------------------------------------------------------------


def entries():
    eight = Affine.parse({"width": 8}, WEIGHT)
    key = learned.Learned("format", "_0", "weight", (("weight", eight),))
    form = eight.calibrated(torch.randn(5, 7))
    norms = learned.Learned("norms", "_0", "", (("data_in", Integer(8, "auto")), ("weight", eight)), "bias")
    tensors = {"a": torch.randn(3, 2), "b": torch.randn(4).double(), "c": torch.tensor(3), "d": torch.zeros(0, 2)}
    return {
        key: learned.Entry(form, losses={"saturated": (0.25, "affine8")}),
        norms: learned.Entry(tensors=tensors),
    }


def test_what_is_written_is_read_to_the_bit(tmp_path):
    written = entries()
    learned.write(tmp_path, "source", written)
    (path,) = learned.files(tmp_path)
    source, again = learned.read(path)
    assert source == "source"
    assert again.keys() == written.keys()
    for key, entry in written.items():
        assert again[key].form == entry.form
        assert again[key].losses == entry.losses
        assert again[key].tensors.keys() == entry.tensors.keys()
        for name, tensor in entry.tensors.items():
            assert torch.equal(again[key].tensors[name], tensor)
            assert again[key].tensors[name].dtype == tensor.dtype


def test_no_byte_of_a_file_can_change_unseen(tmp_path):
    learned.write(tmp_path, "source", entries())
    (path,) = learned.files(tmp_path)
    data = path.read_bytes()
    for place in [*range(0, len(data), 37), 64]:
        damaged = bytearray(data)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        if place != 64:  # the line feed says nothing
            with pytest.raises(RunError, match="learned again"):
                learned.read(path)
    for cut in (0, 10, 70, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(RunError, match="learned again"):
            learned.read(path)


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_the_same_in_another_process_and_tells_what_differs(monkeypatch):
    graph = capture(seeded_model(Normalised), X[:2])
    here = fingerprint(graph, X)
    code = (
        "import sys; sys.path.insert(0, 'tests/engine'); import torch; from networks import Normalised, seeded_model\n"
        "from bitfront.engine.evaluation.memory import fingerprint; from bitfront.graph import capture\n"
        "x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))\n"
        "print(fingerprint(capture(seeded_model(Normalised), x[:2]), x))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == here
    other = seeded_model(Normalised)
    next(other.parameters()).data.view(-1)[3] += 1e-6
    assert fingerprint(capture(other, X[:2]), X) != here
    assert fingerprint(graph, X[:39]) != here
    assert fingerprint(capture(nn.Sequential(*seeded_model(Normalised), nn.ReLU()).eval(), X[:2]), X) != here
    monkeypatch.setattr(memories, "_code", lambda: "edited")
    assert fingerprint(graph, X) != here


# --- sharing ---------------------------------------------------------------------------------------------------------


def options(graph):
    forms = {"data_in": Integer(8, "auto"), "weight": Affine.parse({"width": 4}, WEIGHT), "bias": Integer(6, "auto")}
    return [(site, {o: f for o, f in forms.items() if o in site.operands}) for site in graph.sites]


def test_evaluators_of_one_model_share_what_they_learn(monkeypatch):
    seen, corrected = counted(monkeypatch, "observe"), counted(monkeypatch, "corrected_bias")
    graph, memory = capture(seeded_model(Normalised), X[:2]), Memory()
    first, second = (Calibration(graph, X, BOTH, memory=memory) for _ in range(2))
    first.learn(options(graph))
    count = len(corrected)
    second.learn(options(graph))
    sent = pickle.loads(pickle.dumps(memory))  # noqa: S301
    third = Calibration(capture(seeded_model(Normalised), X[:2]), X.clone(), BOTH, memory=sent)
    third.learn(options(graph))
    assert (len(seen), len(corrected)) == (1, count)
    for site, formats in options(graph):
        assert first.formats(site, formats) == third.formats(site, formats)
        mine, theirs = first.correction(site, formats), third.correction(site, formats)
        assert (mine.bias is None) == (theirs.bias is None)
        assert mine.bias is None or torch.equal(mine.bias, theirs.bias)
        assert all(map(torch.equal, *([t for p in c.norms.values() for t in p] for c in (mine, theirs))))


def test_other_corrections_are_learned_apart():
    graph, memory = capture(seeded_model(Normalised), X[:2]), Memory()
    ((site, formats),) = [pair for pair in options(graph) if pair[0].name == "_1"]
    biases = []
    for corrections in (Corrections(bias=True), BOTH, Corrections()):
        shared, alone = (Calibration(graph, X, corrections, memory=m) for m in (memory, None))
        for calibration in (shared, alone):
            calibration.learn([(site, formats)])
        mine, theirs = shared.correction(site, formats), alone.correction(site, formats)
        assert mine.norms.keys() == theirs.norms.keys()
        assert shared.formats(site, formats) == alone.formats(site, formats)
        biases.append(mine.bias is None)
    assert biases == [False, False, True]


# --- searches --------------------------------------------------------------------------------------------------------


def test_a_resumed_search_learns_nothing_again_and_measures_the_same(tmp_path, monkeypatch):
    whole = search(tmp_path / "whole")
    search(tmp_path, n_trials=5)
    assert files(tmp_path)
    # A plan looks at ranges, and does not know yet whether a run folder belongs to it.
    monkeypatch.setattr(FixedEvaluator, "range_losses", lambda _: {})
    calls = {name: counted(monkeypatch, name) for name in ("observe", "corrected_bias", "output_statistics")}
    run = search(tmp_path)
    assert values(run) == values(whole)
    again = {name: len(c) for name, c in calls.items()}
    search(tmp_path)  # everything is known now
    assert {name: len(c) for name, c in calls.items()} == again
    before = {path: path.read_bytes() for path in files(tmp_path)}
    data = dataset_of((X.numpy(), np.arange(40) % 4))
    transform_trial(tmp_path / "run", 3, data=data, model=seeded_model(Normalised))
    assert {name: len(c) for name, c in calls.items()} == again
    assert {path: path.read_bytes() for path in files(tmp_path)} == before


@pytest.mark.parametrize("damage", ["a bit", "cut", "other weights", "edited code"])
def test_what_is_damaged_or_foreign_is_learned_again_with_a_note(damage, tmp_path, monkeypatch):
    whole = search(tmp_path / "whole")
    run = search(tmp_path, n_trials=5)
    path = files(tmp_path)[0]
    if damage == "a bit":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 8
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "other weights":
        wrong = {}
        for file in files(tmp_path):  # one of each session that learned something, whose number depends on the clock
            source, known = learned.read(file)
            file.unlink()
            wrong |= {k: learned.Entry(e.form, {n: t + 1 for n, t in e.tensors.items()}) for k, e in known.items()}
        learned.write(tmp_path / "run", source[::-1], wrong)
        (path,) = files(tmp_path)
    else:
        monkeypatch.setattr(memories, "_code", lambda: "edited")
    events = Notes()
    run = search(tmp_path, events=events)
    assert values(run) == values(whole)
    (note,) = [text for text in events.texts if "learned" in text]
    assert path.name in note
    assert not path.exists()


def test_a_search_that_starts_anew_learns_anew(tmp_path, monkeypatch):
    search(tmp_path)
    calls = counted(monkeypatch, "observe")
    search(tmp_path, restart=True)
    assert calls


def test_where_nothing_can_be_written_a_note_says_so(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / learned.FOLDER).write_text("a file where a folder should be")
    events = Notes()
    run = search(tmp_path, events=events)
    assert values(run) == values(search(tmp_path / "whole"))
    assert any("is not kept" in text for text in events.texts)


@pytest.mark.long
@pytest.mark.slow
def test_workers_use_what_is_kept(tmp_path):
    whole = search(tmp_path / "whole")
    search(tmp_path, n_trials=5)
    assert values(search(tmp_path, n_jobs=2)) == values(whole)
