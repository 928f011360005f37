"""The winners of a search trained on, from the flag to the deployed model."""

import json

import pytest

import bitfront as bf
from bitfront.data.base import DataRequest
from bitfront.scoring import evaluate

pytestmark = pytest.mark.journey


def test_winners_are_trained_on_and_can_be_rebuilt(trained, data):
    text = (trained.folder / "small.toml").read_text()
    (trained.folder / "small.toml").write_text(text + "\n[search.finetune]\nmax_epochs = 3\nlearning_rate = 0.003\n")
    typed = trained("search", "--config", "small.toml", "--finetune", 3)
    run = bf.Run.load(trained.folder / "runs/small")
    assert len(run.finetuned) == min(3, len(run.front))
    assert typed.out.splitlines()[0].split("|")[-2].strip() == "fine-tuned"
    assert typed.err.count("fine-tuning trial ") == len(run.finetuned)
    gains = []
    test_split = bf.load_dataset("npz", DataRequest(path=data)).split("test")
    for trial in run.front:
        tuned = trial.finetuned
        if tuned is None:
            continue
        assert tuned.kept == (tuned.metrics["accuracy"] > trial.metrics["accuracy"])
        gains.append(tuned.metrics["accuracy"] - trial.metrics["accuracy"])
        alone = json.loads(
            trained("transform", "--run", "runs/small", "--trial", trial.number, "--check", "--json").out
        )
        expected = tuned.metrics if tuned.kept else trial.metrics
        assert (alone["accuracy"], alone["loss"]) == (expected["accuracy"], expected["loss"])
        if tuned.kept:
            model = bf.transform_trial(run.folder, trial.number).model
            scores = evaluate(model, *test_split, batch_size=1000)
            assert tuned.test["accuracy"] == scores.accuracy
            assert tuned.test["loss"] == pytest.approx(scores.loss, rel=1e-6)
    assert max(gains) > 0
    best = json.loads((trained.folder / "runs/small/best.json").read_text())
    assert sum("finetuned" in entry for entry in best.values()) == len(run.finetuned)

    # What was done is not done again; more of it is.
    again = trained("search", "--config", "small.toml", "--finetune", 3)
    assert "fine-tuning trial" not in again.err
    assert bf.Run.load(trained.folder / "runs/small").finetuned == run.finetuned


def test_training_on_needs_an_accuracy(trained):
    text = (trained.folder / "small.toml").read_text()
    runner = '[search.strategy.sw_runner.basic_evaluation]\ndata_loader = "val_dataloader"\n'
    assert runner in text
    text = "\n".join(line for line in text.replace(runner, "").splitlines() if not line.startswith("accuracy."))
    (trained.folder / "without.toml").write_text(text)
    typed = trained("search", "--config", "without.toml", "--finetune", 3, code=2)
    assert "no runner measures accuracy" in typed.err
