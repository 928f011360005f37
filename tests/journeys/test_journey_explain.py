"""A run explained as a user types it: each sentence is checked against the trials."""

import json
import re
import shutil

import pytest
from journey import settings

from bitfront.engine.storage.run import Run

pytestmark = pytest.mark.journey

#: ``linear0/weight has 4 bits: 2 bits would save 1.5 bits and lose 3.20 points (measured, trial 12); ...``
SENTENCE = re.compile(r"^(?P<place>\S+) has (?P<option>\d+) bits: (?P<rest>.*)\.$", re.M)
OTHER = re.compile(
    r"(?P<option>\d+) bits would (?:cost the same average_bitwidth|(?P<way>save|cost) (?P<bits>[\d.]+) bits) and "
    r"(?:change nothing|(?P<effect>gain|lose) (?P<points>[\d.]+) points) \((?P<how>measured, trial \d+|predicted)\)"
)


def bits_of(trial):
    """Place → bits of a trial."""
    return {
        f"{layer}/{operand}": entry["config"][f"{operand}_width"]
        for layer, entry in trial.config.items()
        if layer not in ("by", "default")
        for operand in ("data_in", "weight")
    }


def test_each_sentence_is_true_of_the_trials(searched):
    run = Run.load(searched.folder / "runs/small")
    bits = {trial.number: bits_of(trial) for trial in run.trials}
    number = run.front[len(run.front) // 2].number
    out = searched("explain", "small", "--trial", number).out
    here, sentences = run.trial(number), list(SENTENCE.finditer(out))
    assert {s["place"] for s in sentences} == set(bits[number])
    checked = 0
    for sentence in sentences:
        assert bits[number][sentence["place"]] == int(sentence["option"])
        for told in OTHER.finditer(sentence["rest"]):
            config = {**bits[number], sentence["place"]: int(told["option"])}
            other = next(t for t in run.trials if bits[t.number] == config)
            assert told["how"] == f"measured, trial {other.number}"
            more = other.metrics["average_bitwidth"] - here.metrics["average_bitwidth"]
            gain = 100 * (other.metrics["accuracy"] - here.metrics["accuracy"])
            if told["bits"]:
                assert float(told["bits"]) * (-1 if told["way"] == "save" else 1) == pytest.approx(more, rel=1e-3)
            else:
                assert more == pytest.approx(0, abs=1e-9)
            if told["effect"]:
                signed = float(told["points"]) * (1 if told["effect"] == "gain" else -1)
                assert signed == pytest.approx(gain, abs=0.0051)
            else:
                assert gain == 0
            checked += 1
        assert sentence["rest"].count(" would ") == len(list(OTHER.finditer(sentence["rest"])))
    assert checked >= len(sentences)
    best = max(run.front, key=lambda t: t.metrics["accuracy"]).metrics["accuracy"]
    assert f"The best verified accuracy is {100 * best:.2f} %" in out
    assert "36 of 36 candidates were evaluated." in out
    assert "Proven: every candidate of the space was evaluated, so the front is complete." in out


def test_a_budget_is_answered_and_verified(shell, data):
    """By a search of some candidates; what it did not evaluate, a search of all did."""
    strategy = 'name = "optuna"\n[search.strategy.setup]\nsampler = "random"\nn_trials = 14'
    shell.write("some.toml", settings(data, project="some", strategy=strategy))
    shell.write("all.toml", settings(data, project="all"))
    shell("search", "--config", "some.toml", "-q")
    shell("search", "--config", "all.toml", "-q")
    truth = {t.code: t.metrics for t in Run.load(shell.folder / "runs/all").trials}
    some = Run.load(shell.folder / "runs/some").trials
    known = {t.code for t in some}
    predicted = 0
    for bound in (2.5, 3.5, 5, 7):
        typed = shell("explain", "some", "--budget", f"average_bitwidth <= {bound}", "--json", code=None)
        if typed.code:
            assert "no candidate of the space fulfils" in typed.err
            continue
        (answer,) = json.loads(typed.out)["answers"]
        metrics = truth[tuple(answer["code"])]
        assert answer["costs"]["average_bitwidth"] == pytest.approx(metrics["average_bitwidth"])
        assert metrics["average_bitwidth"] <= bound
        kept = [t.metrics["accuracy"] for t in some if t.metrics["average_bitwidth"] <= bound]
        best = [t.metrics["accuracy"] for t in some if t.number == answer["measured"]]
        assert best == ([max(kept)] if kept else [])
        if tuple(answer["code"]) in known:
            assert answer["value"]["value"] == metrics["accuracy"]
        elif not predicted:
            predicted += 1
            budget = f"average_bitwidth <= {bound}"
            out = shell("explain", "some", "--budget", budget).out
            assert "It was not evaluated; --verify does that." in out
            out = shell("explain", "some", "--budget", budget, "--verify").out
            assert f"Verified: accuracy {100 * metrics['accuracy']:.2f} %" in out
            (answer,) = json.loads(shell("explain", "some", "--budget", budget, "--verify", "--json").out)["answers"]
            assert answer["verified"] == metrics
            assert answer["broken"] == []
            out = shell("explain", "some", *["--budget", budget] * 2).out
            assert f"With {budget}, the best accuracy" in out
            known_best = (
                "no trial keeps" if answer["measured"] is None else f"trial {answer['measured']} is the best that"
            )
            assert f"Of what was measured, {known_best}" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--trial", "99"), "there is no trial 99"),
        (("--budget", "latency <= 2 ms"), "there is no metric 'latency' here"),
        (("--budget", "loss <= 2"), "loss is not predicted here; a budget is on one of: average_bitwidth, accuracy"),
        (("--budget", "average_bitwidth <= 0.5"), "no candidate of the space fulfils 'average_bitwidth <= 0.5'"),
        (("--metric", "loss"), "'loss' is no metric that can be explained here"),
        (("--verify",), "verify evaluates the answer for budgets"),
    ],
)
def test_what_cannot_be_answered_is_said(searched, words, message):
    assert message in searched("explain", "small", *words, code=2).err


def test_a_run_with_few_trials_is_refused(shell, data):
    strategy = 'name = "optuna"\n[search.strategy.setup]\nsampler = "random"\nn_trials = 6'
    shell.write("few.toml", settings(data, project="few", strategy=strategy))
    shell("search", "--config", "few.toml", "-q")
    err = shell("explain", "few", code=2).err
    assert "it has 6 complete trials with accuracy, and an explanation needs 10" in err
    shutil.rmtree(shell.folder / "runs/few")
    assert "there is no such run folder" in shell("explain", "few", code=2).err
