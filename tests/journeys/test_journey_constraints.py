"""A jet classifier with a byte budget: constraints from the file to the table, on data of real size."""

import json
from pathlib import Path

import pytest

import bitfront as bf

pytestmark = pytest.mark.journey
EXAMPLE = Path(__file__).parents[2] / "examples" / "jsc_toy_budget.toml"


@pytest.fixture
def jets(shell, shared_examples):
    shell.env["BITFRONT_DATA"] = str(shared_examples.parent / "data")
    return shell


def test_the_smallest_network_within_one_percent(jets):
    text = EXAMPLE.read_text().replace('accuracy.direction = "maximize"\n', "")
    (jets.folder / "smallest.toml").write_text(text)
    typed = jets("search", "smallest.toml", "--max-epochs", 2)
    run = bf.Run.load(jets.folder / "runs/jsc-budget")
    (best,) = run.front
    floor = run.reference["accuracy"] - 0.01
    fine = [t for t in run.trials if t.metrics["accuracy"] >= floor and t.metrics["model_size"] <= 1000]
    assert 0 < len(fine) < len(run)
    assert best.metrics["accuracy"] >= floor
    assert best.metrics["model_size"] == min(t.metrics["model_size"] for t in fine)
    assert f"constraints: accuracy_drop <= 1 %, model_size <= 1 kB; {len(fine):,} of the evaluated" in typed.out
    # The front is measured once more, on the test split, and both stand in the table.
    header, _, reference, row, *_ = typed.out.splitlines()
    assert header.split("|")[-2].strip() == "test accuracy"
    assert reference.split("|")[1].strip() == "float"
    assert row.split("|")[1].strip() == str(best.number)
    assert float(row.split("|")[-2]) == pytest.approx(best.test_metrics["accuracy"], abs=5e-5)

    # Stored trials answer other questions without a new evaluation.
    before = (jets.folder / "runs/jsc-budget/trials.sqlite").stat().st_mtime_ns
    tighter = run.best("accuracy_drop <= 0.5 %", minimize="ebops")
    expected = [t for t in fine if t.metrics["accuracy"] >= run.reference["accuracy"] - 0.005]
    assert tighter.metrics["ebops"] == min(t.metrics["ebops"] for t in expected)
    with pytest.raises(bf.UserError, match=r"no trial fulfils 'model_size <= 10 B'.*range of model_size is"):
        run.best("model_size <= 10 B")
    assert (jets.folder / "runs/jsc-budget/trials.sqlite").stat().st_mtime_ns == before


@pytest.mark.long
def test_the_same_front_in_whatever_order(jets):
    """All 216 candidates one after the other, drawn at random, and by a genetic sampler: one front."""
    text = EXAMPLE.read_text().replace("[3, 4, 6, 8]", "[3, 8]").replace('model_size = "<= 1 kB"', "")
    (jets.folder / "small.toml").write_text(text)
    jets("train", "--config", "small.toml", "--max-epochs", 1, "--project", "weights")
    fronts = []
    for name, words in {
        "brute": ["--strategy", "brute_force"],
        "evolution": ["--strategy", "evolution"],
        "random": ["--sampler", "random"],
        "nsgaii": ["--sampler", "nsgaii"],
    }.items():
        weights = ["--load-name", "runs/weights/checkpoints/best.pt", "--n-trials", 1000, "--project", name]
        typed = jets("search", "small.toml", *weights, *words)
        assert "216 of 216 candidates evaluated (space exhausted)" in typed.out
        best = json.loads((jets.folder / f"runs/{name}/best.json").read_text())
        fronts.append(
            {json.dumps({k: v for k, v in e.items() if k != "number"}, sort_keys=True) for e in best.values()}
        )
    assert fronts[0]
    assert all(front == fronts[0] for front in fronts)


def test_what_nothing_can_fulfil_is_refused_before_the_training(jets):
    (jets.folder / "tiny.toml").write_text(EXAMPLE.read_text().replace("<= 1 kB", "<= 200 B"))
    typed = jets("search", "tiny.toml", code=2)
    assert "tiny.toml:39: search.constraints.model_size: 'model_size <= 200 B' cannot be fulfilled" in typed.err
    assert "the smallest model_size that this space can reach is" in typed.err
    assert "training" not in typed.err
    assert not (jets.folder / "runs").exists()

    for wrong, message in {
        'model_size = "<= 1 kg"': "'kg' is not a unit of this metric; allowed: B, kB",
        'modelsize = "<= 1 kB"': "there is no metric 'modelsize' here",
        'model_size = "1 kB"': "cannot read the constraint 'model_size 1 kB'",
    }.items():
        (jets.folder / "wrong.toml").write_text(EXAMPLE.read_text().replace('model_size = "<= 1 kB"', wrong))
        typed = jets("plan", "wrong.toml", code=2)
        assert message in typed.err
        assert "wrong.toml:39: search.constraints." in typed.err


def test_a_constraint_brings_its_runner(jets):
    text = EXAMPLE.read_text().replace('model_size = "<= 1 kB"', 'peak_memory = "<= 1 kB"')
    (jets.folder / "more.toml").write_text(text)
    typed = jets("plan", "more.toml")
    assert "[search.constraints] needs runner peak_memory: it was added with its defaults" in typed.err


@pytest.mark.long
def test_as_many_samples_as_settle_the_order(jets):
    text = EXAMPLE.read_text().replace("num_samples = 8192", 'num_samples = "auto"')
    (jets.folder / "auto.toml").write_text(text)
    typed = jets("search", "auto.toml", "--max-epochs", 1, "--strategy", "evolution", "--n-trials", 60)
    assert "num_samples = 'auto': " in typed.err
    run = bf.Run.load(jets.folder / "runs/jsc-budget")
    assert run.samples >= 512
    number = run.trials[0].number
    checked = json.loads(jets("transform", "--run", "runs/jsc-budget", "--trial", number, "--check", "--json").out)
    assert checked["samples"] == run.samples
    assert checked["accuracy"] == run.trials[0].metrics["accuracy"]
    again = jets("search", "auto.toml", "--max-epochs", 1, "--strategy", "evolution", "--n-trials", 61)
    assert "num_samples = 'auto'" not in again.err
    assert "60 trials are known from earlier sessions" in again.err
